"""How fast the audit of a large catalog is: `pumit-data stats` against pandas over CSV, on synthetic rows.

    python benchmarks/catalog.py [--quick] [--rows N] [--json FILE]      # needs the extra `bench`: pandas

The peer is how the reference implementation keeps its facts: one CSV file of spacings and shapes a dataset,
read with pandas. Both sides run as processes of their own, interleaved, and peak memory is the process's. The
peer computes less: no shapes, no DA histogram, no outcomes, no checksums.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# This file's own folder comes first otherwise, and this file is called `catalog` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from catalog.corpus import Corpus
from catalog.schema import CATALOG_SCHEMA
from catalog.spacing import da_level
from catalog.write import write_table

ROWS, QUICK_ROWS = 10_000_000, 500_000
DATASETS = 55
MODALITIES = ["CT", "MRI/T1", "MRI/T2", "MRI/DWI", "XR", "US", "fundus"]
LEVELS = {"min": -1050, "p0_5": -990, "p99_5": 900, "max": 1500}
CSV_COLUMNS = [
    *("dataset", "key", "subject", "status", "modality", "dimension", "da_level", "split", "sampling_weight"),
    *("shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x", "stored_bytes"),
]
PANDAS = """
import sys, pandas as pd, numpy as np
from pathlib import Path
t = pd.concat(pd.read_csv(f) for f in sorted(Path(sys.argv[1]).glob('*.csv')))
t = t[t.status == 'ingested']
t['voxels'] = t.shape_d * t.shape_h * t.shape_w
t['in_plane'] = np.minimum(t.spacing_y, t.spacing_x)
t['person'] = t.dataset + '\\0' + t.subject
t['weight'] = t.sampling_weight.where(t.split == 'train', 0)
for by in sys.argv[2].split(','):
    g = t.groupby(by)
    out = g.agg(images=('key', 'size'), subjects=('person', 'nunique'), slices=('shape_d', 'sum'),
                voxels=('voxels', 'sum'), stored=('stored_bytes', 'sum'), weight=('weight', 'sum'))
    q = [0, .05, .25, .5, .75, .95, 1]
    z, xy = g.spacing_z.quantile(q).unstack(), g.in_plane.quantile(q).unstack()
    print(out.join(z).join(xy, rsuffix='_xy').to_string())
"""


def write_catalog(folder: Path, rows: int) -> None:
    """A corpus with a catalog of `rows` images and the same facts as CSV in `csv/`."""
    corpus = Corpus(folder)
    (folder / "csv").mkdir(parents=True)
    for number in range(DATASETS):
        table = dataset_table(number, rows // DATASETS)
        file = corpus.catalog_file(f"synthetic-{number:02d}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(file, table)
        pacsv.write_csv(table.select(CSV_COLUMNS), folder / "csv" / f"{number:02d}.csv")


def dataset_table(number: int, rows: int) -> pa.Table:
    """Rows of one dataset: spacings, shapes, subjects and outcomes as mixed as in the public sources."""
    noise = np.random.default_rng(number)
    flat = number % 4 == 0
    modality = noise.choice(MODALITIES[4:] if flat else MODALITIES[:4], rows)
    in_plane = noise.choice([0.35, 0.5, 0.7, 0.9, 1.0], rows) * noise.uniform(0.9, 1.1, rows)
    spacing_z = in_plane * noise.choice([1, 1.3, 2.5, 5, 10], rows) * noise.uniform(1, 1.4, rows)
    levels = np.minimum(np.floor(np.log2(spacing_z / in_plane)), 5).astype(np.int8)
    assert da_level(4.0) == 2
    depth = np.ones(rows, np.int32) if flat else noise.integers(12, 600, rows).astype(np.int32)
    side = noise.integers(128, 513, rows).astype(np.int32)
    ingested = noise.random(rows) > 0.02
    subject = noise.integers(0, max(rows // 3, 1), rows)
    voxels = depth.astype(np.int64) * side * side

    def text(prefix: str, values: np.ndarray) -> pa.Array:
        return pa.array(np.char.add(prefix, values.astype("U9")))

    nothing = np.zeros(rows, bool)
    columns: dict[str, pa.Array] = {
        "dataset": pa.array([f"synthetic-{number:02d}"] * rows),
        "key": text("case-", np.arange(rows) + 100_000_000),
        "subject": text("patient-", subject),
        "status": pa.array(np.where(ingested, "ingested", "excluded")),
        "reason": pa.array(np.where(ingested, None, "uneven_slices"), pa.string()),
        "modality": pa.array(modality),
        "upstream_modality": pa.array(modality),
        "body_part": pa.array([["chest", "abdomen"] if number % 5 == 0 else ["brain"]] * rows),
        "dimension": pa.array(np.full(rows, 2 if flat else 3, np.int8)),
        "shape_c": pa.array(np.ones(rows, np.int32)),
        "shape_d": pa.array(depth),
        "shape_h": pa.array(side),
        "shape_w": pa.array(side),
        "spacing_z": pa.array(spacing_z, mask=~nothing if flat else nothing),
        "spacing_y": pa.array(in_plane),
        "spacing_x": pa.array(in_plane),
        "da": pa.array(spacing_z / in_plane, mask=~nothing if flat else nothing),
        "da_level": pa.array(np.full(rows, 5, np.int8) if flat else levels),
        "split": pa.array(np.where(subject == 0, "validation", "train")),
        "sampling_weight": pa.array(np.full(rows, 0.2 if flat else 1.0)),
        "stored_bytes": pa.array(voxels),
        "shard_path": text(f"synthetic-{number:02d}/", np.arange(rows)),
        "source_path": text("images/", np.arange(rows)),
        "source_hash": text("0123456789abcdef0123456789abcdef0123456789abcdef0123456", np.arange(rows)),
        "entry_hash": pa.array(["0" * 64] * rows),
        "normalisation_version": pa.array(np.ones(rows, np.int32)),
        **{
            f"intensity_{name}": pa.array(noise.normal(middle, 30, rows))
            for name, middle in {**LEVELS, "mean": -300, "std": 400, "median": -500}.items()
        },
        "slope": pa.array(np.ones(rows)),
        "original_shape": pa.array(np.stack([side, side, depth], axis=1).tolist()),
        "crop_box": pa.array([[0, 9, 0, 400, 0, 400]] * rows),
        "original_orientation": pa.array(np.where(noise.random(rows) < 0.97, "LPS", "RAS")),
        "depth_axis": pa.array(["SI"] * rows),
        "depth_rule": pa.array(noise.choice(["metadata", "anisotropy"], rows)),
        "geometry_flags": pa.array([[], ["orthonormalised"]] * (rows // 2) + [[]] * (rows % 2)),
    }
    complete = {
        field.name: columns[field.name].cast(field.type)
        if field.name in columns
        else pa.nulls(rows, field.type)
        for field in CATALOG_SCHEMA
    }
    return pa.table(complete, schema=CATALOG_SCHEMA)


KINDS = ("wall", "CPU", "peak memory")


class Cost(NamedTuple):
    """What a process took; on a machine that others use, compare CPU time."""

    wall: float
    cpu: float
    memory: float


def measured(command: list[str]) -> Cost:
    """Wall and CPU time in seconds and peak memory in MB of a process."""
    start = time.perf_counter()
    probe = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", probe, *command], check=True, capture_output=True, text=True)
    wall = time.perf_counter() - start
    cpu, memory = done.stdout.split()
    return Cost(wall, float(cpu), int(memory) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS:,} rows instead of {ROWS:,}")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--keep", type=Path, help="Write the synthetic corpus here, or use the one that is here."
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary) / "corpus"
        if not folder.exists():
            write_catalog(folder, rows)
        program = str(Path(sys.executable).parent / "pumit-data")
        stats = [program, "stats", "--data", str(folder)]
        query = [program, "query", "--data", str(folder)]
        pandas = [sys.executable, "-c", PANDAS, str(folder / "csv")]
        cases = {
            "stats": (stats, [*pandas, "modality,dataset,da_level"]),
            "stats --by modality": ([*stats, "--by", "modality"], [*pandas, "modality"]),
            "stats --by dataset,modality,da_level": ([*stats, "--by", "dataset,modality,da_level"], None),
            "stats --by body_part": ([*stats, "--by", "body_part"], None),
            "stats --where": ([*stats, "--where", "modality = 'CT' and spacing_z < 2"], None),
            "doctor": ([program, "doctor", "--data", str(folder)], None),
            "query": ([*query, "SELECT modality, count(*), avg(spacing_z) FROM images GROUP BY ALL"], None),
        }
        result = []
        for case, (ours, theirs) in cases.items():
            own: list[Cost] = []
            peer: list[Cost] = []
            for _ in range(1 if options.quick else options.repeats):
                own.append(measured(ours))
                if theirs is not None:
                    peer.append(measured(theirs))
            a = Cost(*map(statistics.median, zip(*own, strict=True)))
            print(f"{case}: {a.wall:.2f} s, CPU {a.cpu:.2f} s, {a.memory:,.0f} MB", flush=True)
            if peer:
                b = Cost(*map(statistics.median, zip(*peer, strict=True)))
                print(f"  pandas over CSV: {b.wall:.2f} s, CPU {b.cpu:.2f} s, {b.memory:,.0f} MB", flush=True)
                result += [
                    {"case": f"{case}, {name}", "ours": x, "peer": "pandas over CSV", "theirs": y,
                     "unit": unit, "ratio": y / x}
                    for name, unit, x, y in zip(KINDS, ("s", "s", "MB"), a, b, strict=True)
                ]  # fmt: skip
    if options.json is not None:
        machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
        report = {"benchmark": "catalog", "machine": machine | {"rows": rows}, "rows": result}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
