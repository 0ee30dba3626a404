"""Ingest on many workers: what two real ones gain, and what a driver of 1,000 for 10 million images costs.

- **real files**: the same volumes with one and with two worker processes; tasks alone, without the start of the
  cluster. The machine's cores are the limit: other programs on them count.
- **Dask**: what submitting a task, its passage through a real scheduler and its result cost, with tasks that do
  nothing, on one worker in the same machine.
- **simulation**: the driver as it is, with sources that a generator makes up and workers that are a clock and a
  heap. Task times are those of benchmarks/RESULTS.md. The driver's clock runs from the first task on, by its
  own CPU time and by what Dask costs for each task. One image in ten is a volume, the others lie in packs.
  Each size runs in a process of its own, so that its peak of memory can be told.
- **catalog**: 10,000 new rows, with previews, merged into a catalog of so many rows, against reading,
  concatenating, sorting and writing whole tables, which needs them all in memory.

    python benchmarks/scaling.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# This file's own folder comes first otherwise, and it has a module called `ingest` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq

import ingest.found
from catalog.corpus import Corpus
from catalog.schema import CATALOG_SCHEMA, FEATURES_SCHEMA, PREVIEW_SCHEMA
from catalog.split import hold_out
from catalog.write import merge_batches
from ingest.cluster import DaskPool, open_client
from ingest.discover import Found
from ingest.drive import run_tasks
from ingest.found import FoundSources
from ingest.image import NORMALISATION_VERSION
from ingest.journal import Journal, Stamp
from ingest.names import NameKey
from ingest.run import ingest_dataset, plan_ingest
from ingest.source import ImageSource
from ingest.spec import DatasetSpec
from ingest.task import IngestTask, TaskResult
from shards.layout import PACK_SIZE

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
WORKERS = 1000
VOLUMES_IN = 10  # one image in ten is a volume
VOLUME_SECONDS, VOLUME_BYTES = 0.8, 67_000_000  # CT of 512 x 512 x 300 as .nii.gz, benchmarks/RESULTS.md
PICTURE_SECONDS, PICTURE_BYTES = 0.1, 3_000_000  # radiograph of 3000 x 2500 as .png
VOLUMES_AT_ONCE = 64
NEW_ROWS = 10_000


SPEC = DatasetSpec.model_validate(
    {
        "id": "many",
        "title": "many",
        "folder": "many",
        "images": [
            {
                "globs": ["*.nii.gz"],
                "format": "nifti",
                "dimension": 3,
                "path": r"(?P<name>[^.]+)\..*",
                "key": "{name}",
                "modality": "CT",
            }
        ],
    }
)


# real files --------------------------------------------------------------------------------------------------


def real_row(copies: int, rounds: int) -> dict[str, Any]:
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, found in times.items():
            found.append(ingest_seconds(copies, workers))
    one, two = (sorted(found)[len(found) // 2] for found in times.values())
    return row(f"{copies} CT volumes, 2 workers", two, "1 worker", one, "s")


def ingest_seconds(copies: int, workers: int) -> float:
    """Wall-clock seconds from the first task to the merged catalog, on workers that are warm."""
    with tempfile.TemporaryDirectory() as folder, open_client(workers) as client:
        client.run(warm_up)
        corpus = Corpus(Path(folder) / "data")
        plan = plan_ingest(SPEC, copied(copies, Path(folder)), corpus)
        start = time.perf_counter()
        report = ingest_dataset(plan, corpus, client, lambda *_: None)
        assert set(report.total) == {("ingested", "")}, report.total
        return time.perf_counter() - start


def copied(copies: int, folder: Path) -> Path:
    file = SAMPLES / "CT/totalsegmentator/chest.nii.gz"
    raw = folder / "raw"
    (raw / "many").mkdir(parents=True)
    for number in range(copies):
        shutil.copy(file, raw / "many" / f"image{number:04d}.nii.gz")
    return raw


def warm_up() -> None:
    import cv2  # noqa: F401
    import imagecodecs  # noqa: F401
    import nibabel  # noqa: F401

    import ingest.image  # noqa: F401
    import shards.write  # noqa: F401


# Dask --------------------------------------------------------------------------------------------------------


def nothing(task: IngestTask) -> TaskResult:
    return TaskResult(Counter({("ingested", ""): len(task.places)}), [], 0, 0)


def dask_overhead(tasks: int) -> tuple[float, float]:
    """Per task: CPU seconds of client and scheduler, both in this process; and the scheduler's transitions."""
    import ingest.cluster

    original = ingest.cluster.run_task
    ingest.cluster.run_task = nothing
    try:
        with open_client(1) as client:
            pool = DaskPool(client)
            scheduler = client.cluster.scheduler
            for _ in run_tasks(made_up_tasks(100), pool):
                pass
            before, start = scheduler.transition_counter, time.process_time()
            for _ in run_tasks(made_up_tasks(tasks), pool):
                pass
            spent = time.process_time() - start
            return spent / tasks, (scheduler.transition_counter - before) / tasks
    finally:
        ingest.cluster.run_task = original


def made_up_tasks(number: int) -> Iterator[IngestTask]:
    with tempfile.TemporaryDirectory() as folder:
        for group in found_sources(number * VOLUMES_IN, Path(folder)).groups():
            if group.pack is None:
                yield as_task(group, Path(folder))


# simulation --------------------------------------------------------------------------------------------------


class SimulatedPool:
    """Workers that are a heap of moments, and a driver's clock."""

    def __init__(self, workers: int, seconds_of: Callable[[IngestTask], float], overhead: float) -> None:
        self.now = self.work = 0.0
        self.tasks = 0
        self._width = 2 * workers
        self._seconds_of = seconds_of
        self._overhead = overhead
        self._idle_from = [0.0] * workers
        self._waiting: deque[IngestTask] = deque()
        self._running: list[tuple[float, int, IngestTask]] = []
        self._cpu = time.process_time()

    def width(self) -> int:
        return self._width

    def in_flight(self) -> int:
        return len(self._running)

    def submit(self, task: IngestTask) -> None:
        self._tick()
        self.now += self._overhead
        self.tasks += 1
        seconds = self._seconds_of(task)
        end = max(self.now, heapq.heappop(self._idle_from)) + seconds
        heapq.heappush(self._idle_from, end)
        heapq.heappush(self._running, (end, self.tasks, task))
        self.work += seconds

    def wait(self) -> tuple[IngestTask, TaskResult | None]:
        self._tick()
        end, _, task = heapq.heappop(self._running)
        self.now = max(self.now, end)
        return task, nothing(task)

    def _tick(self) -> None:
        """The driver's own CPU time passes on its clock too."""
        cpu = time.process_time()
        self.now += cpu - self._cpu
        self._cpu = cpu


def size_of(_: type[Stamp], path: Path) -> Stamp:
    return Stamp(PICTURE_BYTES if path.suffix == ".png" else VOLUME_BYTES, 1, 1)


def found_sources(number: int, root: Path) -> FoundSources:
    """Sources that nobody wrote to disk."""

    def stream(_spec: DatasetSpec, _root: Path, _names: NameKey | None) -> Iterator[Found]:
        for index in range(number):
            flat = index % VOLUMES_IN != 0
            # In no order, as a file system lists them.
            name = f"patient{index * 7919 % number:08d}/image"
            source = ImageSource(
                dataset="many",
                key=name,
                subject=name[:15],
                path=f"{name}.png" if flat else f"{name}.nii.gz",
                root=root,
                format="raster" if flat else "nifti",
                dimension=2 if flat else 3,
                modality="XR" if flat else "CT",
                upstream_modality="XR" if flat else "CT",
            )
            yield Found(group=0, glob=0, share=None, source=source)

    original = ingest.found.stream_sources, Stamp.if_any
    ingest.found.stream_sources = stream
    Stamp.if_any = classmethod(size_of)  # type: ignore[method-assign]
    try:
        sources = FoundSources(SPEC, root)
        sources.select(re.compile(""))
    finally:
        ingest.found.stream_sources, Stamp.if_any = original  # type: ignore[method-assign]
    corpus = Corpus(root / "data")
    journal = Journal(corpus, "many")
    journal.folder.mkdir(parents=True, exist_ok=True)
    sources.compare(journal, corpus, NORMALISATION_VERSION)
    sources.assign_packs(journal, PACK_SIZE)
    return sources


def as_task(group: Any, root: Path) -> IngestTask:
    return IngestTask(
        name=f"pack-{group.pack:05d}" if group.pack is not None else "volume-0123456789abcdef01234567",
        run="01234567",
        dataset="many",
        corpus=Corpus(root),
        root=root,
        kinds=group.kinds,
        places=group.places,
        validation_subjects=frozenset(),
        entry_hash="0" * 64,
    )


def simulate(images: int, overhead_s: float) -> dict[str, float]:
    """A whole run of the driver; figures of time, memory and tasks."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        root = Path(folder)
        before = resident("VmRSS")
        start = time.process_time()
        sources = found_sources(images, root)
        hold_out(Corpus(root / "data"), "many", sources.subjects())
        planned = time.process_time() - start
        tasks = (as_task(group, root) for group in sources.groups(VOLUMES_AT_ONCE))

        def seconds_of(task: IngestTask) -> float:
            return len(task.places) * (PICTURE_SECONDS if task.is_pack else VOLUME_SECONDS)

        pool = SimulatedPool(WORKERS, seconds_of, overhead_s)
        done = sum(len(task.places) for task, _ in run_tasks(tasks, pool))
        assert done == images
        return {
            "peak_mb": resident("VmHWM") - before,
            "plan_s": planned,
            "makespan_s": pool.now,
            "ideal_s": pool.work / WORKERS,
            "tasks": pool.tasks,
        }


def simulated_rows(sizes: list[int], dask_tasks: int) -> Iterator[dict[str, Any]]:
    overhead, transitions = dask_overhead(dask_tasks)
    spawn = multiprocessing.get_context("spawn")
    figures = {}
    for images in sizes:
        with ProcessPoolExecutor(1, spawn) as pool:
            figures[images] = pool.submit(simulate, images, overhead).result()
        smallest, now = figures[sizes[0]], figures[images]
        case = f"driver, {images:,} images"
        yield row(case, now["peak_mb"], f"{sizes[0]:,} images", smallest["peak_mb"], "MB above imports")
        mean_s = (VOLUME_SECONDS + (VOLUMES_IN - 1) * PICTURE_SECONDS) / VOLUMES_IN
        yield row(case, now["plan_s"] / images * 1e6, "to ingest it", mean_s * 1e6, "us an image to find")
        yield row(f"{WORKERS} workers, {images:,} images", now["makespan_s"], "ideal", now["ideal_s"], "s")
    largest = figures[sizes[-1]]
    budget = largest["ideal_s"] / largest["tasks"]
    yield row("a task through Dask", overhead * 1e3, f"{WORKERS} workers end one in", budget * 1e3, "ms")
    yield row("a task through Dask", transitions, "released to memory and back", 5, "scheduler transitions")
    for is_pack in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            groups = found_sources(PACK_SIZE * 2 * VOLUMES_IN, Path(folder)).groups(VOLUMES_AT_ONCE)
            tasks = (as_task(group, Path(folder)) for group in groups)
            task = next(task for task in tasks if task.is_pack == is_pack)
            plain = (task.name, task.dataset, task.corpus, tuple(task.sources), frozenset(), task.entry_hash)
            case = f"task of {len(task.places)} images"
            yield row(case, len(pickle.dumps(task)), "with whole sources", len(pickle.dumps(plain)), "bytes")


# catalog -----------------------------------------------------------------------------------------------------


def commit_rows(sizes: list[int]) -> Iterator[dict[str, Any]]:
    for size in sizes:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            corpus = Corpus(Path(folder))
            merge_batches(corpus, "many", (made_up_rows(start, 1) for start in range(0, size, NEW_ROWS)))
            start = time.perf_counter()
            merge_batches(corpus, "many", [made_up_rows(size // 2, 2)])
            ours = time.perf_counter() - start
            yield row(f"merge into {size:,} rows", ours, "whole tables", whole_tables(corpus, size), "s")


def made_up_rows(start: int, version: int) -> tuple[pa.Table, pa.Table, pa.Table, list[str]]:
    keys = [f"patient{number:08d}/image" for number in range(start, start + NEW_ROWS)]
    given: dict[str, Any] = {
        "dataset": ["many"] * NEW_ROWS,
        "key": keys,
        "subject": keys,
        "status": ["ingested"] * NEW_ROWS,
        "split": ["train"] * NEW_ROWS,
        "spacing_z": [number / 7 for number in range(NEW_ROWS)],
        "intensity_mean": [number / 3 + version for number in range(NEW_ROWS)],
        "shard_path": [f"many/{key}.zarr" for key in keys],
        "source_path": [f"{key}.nii.gz" for key in keys],
        "source_hash": [f"{number:064x}" for number in range(NEW_ROWS)],
        "entry_hash": ["0" * 64] * NEW_ROWS,
        "normalisation_version": [1] * NEW_ROWS,
    }
    empty = pa.nulls(NEW_ROWS)
    rows = pa.table([given.get(name, empty) for name in CATALOG_SCHEMA.names], names=CATALOG_SCHEMA.names)
    pictures = pa.array([os.urandom(64) * 32] * NEW_ROWS)
    previews = pa.table([given["dataset"], keys, pictures], schema=PREVIEW_SCHEMA)
    return rows.cast(CATALOG_SCHEMA), previews, FEATURES_SCHEMA.empty_table(), given["source_path"]


def whole_tables(corpus: Corpus, size: int) -> float:
    rows, previews, _, _ = made_up_rows(size // 2, 3)
    start = time.perf_counter()
    for path, new in ((corpus.catalog_file("many"), rows), (corpus.preview_file("many"), previews)):
        old = pq.read_table(path, partitioning=None, page_checksum_verification=True).cast(new.schema)
        kept = old.filter(pa.compute.invert(pa.compute.is_in(old["key"], new["key"])))
        table = pa.concat_tables([kept, new]).sort_by("key").combine_chunks()
        pq.write_table(table, path, write_page_checksum=True, compression="zstd", row_group_size=1 << 16)
    return time.perf_counter() - start


# frame -------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """MB of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status does not tell {field}")
    return int(found[1]) * 1024 / 1e6


def row(case: str, mine: float, peer: str, theirs: float, unit: str) -> dict[str, Any]:
    ratio = theirs / mine
    print(f"{case:32} {mine:10.3f}  {peer:26} {theirs:10.3f} {unit:22} {ratio:6.2f}", flush=True)
    return {"case": case, "ours": mine, "peer": peer, "theirs": theirs, "unit": unit, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 images instead of 10 million")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows = [real_row(8 if options.quick else 64, 1 if options.quick else 3)]
    sizes = [10_000, 100_000] if options.quick else [100_000, 1_000_000, 10_000_000]
    rows += simulated_rows(sizes, 500 if options.quick else 5000)
    rows += commit_rows(sizes[:2])
    if options.json:
        report = {"benchmark": "scaling", "machine": machine(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
