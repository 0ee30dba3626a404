"""What planning costs beside many images: start-up, memory, time a batch, and bytes sent to a worker.

A synthetic catalog as in benchmarks/catalog.py, with what training needs of each image. Each round is a fresh
process. Peers are limits or the plainest way: reading the same columns and doing nothing, holding them as one
table in memory, and pickling that table to each worker.
"""

from __future__ import annotations

import multiprocessing
import pickle
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.catalog import DATASETS, dataset_table
from catalog.corpus import Corpus
from catalog.query import catalog_fingerprint, load_catalog
from catalog.sampling import CropGeometry
from catalog.schema import CATALOG_SCHEMA
from catalog.write import write_table
from training.data import Candidates, plan_batches, training_tables
from training.images import IMAGE_COLUMNS
from training.plan import BatchPlanner

ROWS, QUICK_ROWS = 10_000_000, 500_000
BATCH, BATCHES = 48, 1000
CROP = CropGeometry(tokens_z=4, tokens_x=8)


def write_catalog(corpus: Corpus, rows: int) -> None:
    """Images as `benchmarks.catalog` makes them, with a window and a place for their voxels."""
    for number in range(DATASETS):
        table = dataset_table(number, rows // DATASETS)
        noise, size = np.random.default_rng(number), table.num_rows
        shape = np.stack([table[f"shape_{axis}"].to_numpy() for axis in "cdhw"], axis=1)
        name = np.char.add(f"synthetic-{number:02d}/case-", (np.arange(size) + 100_000_000).astype("U9"))
        columns = {
            "stored_dtype": pa.array(["int16"] * size),
            "slope": pa.array(np.ones(size)),
            "intercept": pa.array(noise.integers(-1024, 1, size)),
            "window_low": pa.array(noise.normal(-500, 10, size)),
            "window_high": pa.array(noise.normal(900, 50, size)),
            "shard_path": pa.array(np.char.add(name, "-0123456789ab.zarr")),
            "shard_shape": pa.ListArray.from_arrays(np.arange(size + 1, dtype=np.int32) * 4, shape.ravel()),
        }
        for column, values in columns.items():
            field = CATALOG_SCHEMA.field(column)
            table = table.set_column(table.schema.get_field_index(column), field, values.cast(field.type))
        path = corpus.catalog_file(f"synthetic-{number:02d}")
        path.parent.mkdir(parents=True)
        write_table(path, table)


def resident_mb(kind: str) -> float:
    """Memory of this process in MB: `RssAnon` is its own, `RssFile` is mapped and shared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{kind}:"))


def planned(corpus: Corpus) -> BatchPlanner:
    return plan_batches(corpus, CROP, BATCH, 1, Candidates(64))


def measure_reading(corpus: Corpus, answer: Connection) -> None:
    start = time.perf_counter()
    for _ in training_tables(corpus, Candidates(0)):
        pass
    answer.send({"start-up": time.perf_counter() - start})


def measure_table(corpus: Corpus, answer: Connection) -> None:
    before = resident_mb("RssAnon")
    table = load_catalog(corpus, IMAGE_COLUMNS, split="train")
    answer.send({"memory": resident_mb("RssAnon") - before, "sent": len(pickle.dumps(table, protocol=5)) / 1e6})


def measure_fingerprint(corpus: Corpus, answer: Connection) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    catalog_fingerprint(corpus)
    answer.send({"fingerprint": time.perf_counter() - start, "CPU of it": time.process_time() - cpu})


def measure_planner(corpus: Corpus, answer: Connection) -> None:
    before, start, cpu = resident_mb("RssAnon"), time.perf_counter(), time.process_time()
    planner = planned(corpus)
    found = {"start-up": time.perf_counter() - start, "CPU of it": time.process_time() - cpu}
    found["memory"] = resident_mb("RssAnon") - before
    found["sent"] = len(pickle.dumps(planner)) / 1e6
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=plan_many, args=(planner, theirs))
    worker.start()
    answer.send(found | ours.recv())
    worker.join()


def plan_many(planner: BatchPlanner, answer: Connection) -> None:
    """What a worker does: it has got the planner, and plans."""
    before = resident_mb("RssAnon")
    walls, cpus = [], []
    for step in range(BATCHES):
        start, cpu = time.perf_counter(), time.process_time()
        planner.plan(step)
        walls.append((time.perf_counter() - start) * 1e3)
        cpus.append((time.process_time() - cpu) * 1e3)
    found = {"batch": statistics.median(walls), "CPU of a batch": statistics.median(cpus)}
    answer.send(found | {"memory of a worker": resident_mb("RssAnon") - before})


MEASURES = {
    "planner": measure_planner,
    "reading": measure_reading,
    "table": measure_table,
    "fingerprint": measure_fingerprint,
}


def rounds(corpus: Corpus, number: int) -> dict[str, dict[str, float]]:
    """Medians of interleaved rounds, each measurement in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MEASURES}
    for _ in range(number):
        for name, measure in MEASURES.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(corpus, theirs))
            process.start()
            theirs.close()
            found[name].append(ours.recv())
            process.join()
    return {
        name: {kind: statistics.median(one[kind] for one in each) for kind in each[0]}
        for name, each in found.items()
    }


def measure(rows: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the section, for a catalog of so many synthetic images."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "corpus"
        write_catalog(Corpus(folder), rows)
        found = rounds(Corpus(folder), repeats)
    planner, reading, table = found["planner"], found["reading"]["start-up"], found["table"]
    cases = [
        ("start-up", planner["start-up"], "reading the columns", reading, "s"),
        ("memory of its own", planner["memory"], "the columns in one table", table["memory"], "MB"),
        ("sent to a worker", planner["sent"], "the columns, pickled", table["sent"], "MB"),
        ("a batch of 48", planner["batch"], "goal", 1.0, "ms"),
    ]
    for name, kinds in found.items():
        print(name, ", ".join(f"{kind} {value:.4g}" for kind, value in kinds.items()))
    return [
        {"case": f"planner, {case}, {rows:,} images", "ours": ours, "peer": peer, "theirs": theirs,
         "unit": unit, "ratio": theirs / ours}
        for case, ours, peer, theirs, unit in cases
    ]  # fmt: skip
