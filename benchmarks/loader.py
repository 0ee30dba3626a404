"""The loader, section by section, beside its peers and its limits.

    python benchmarks/loader.py [--section NAME]... [--quick] [--work FOLDER] [--json FILE]

- `planner`: what planning costs beside ten million images; described in benchmarks/loading/planner.py.
- `read`: reading and decoding the boxes of a batch, files in memory. CPU time.
- `cold`: the same from disk, with the system's copies dropped before each batch: time, and bytes from disk.
- `remote`: a loader of one worker on a store on loopback that answers at once, after 20 ms, or after 500, where
  only waiting counts: 25 times as many crops a second are what 20 ms let through, also on a busy machine. Time.
- `delivered`: augmented crops on the CPU, from file to tensor. CPU time.
- `gpu`: crops delivered to a GPU and augmented there, and the share of steps spent waiting for them.

Contestants of a section take turns, batch by batch, in one process with one thread for torch. Figures are for
one crop: means over the batches, medians over rounds. Crops are 64 x 128 x 128, or as the DA level asks, of
real images (benchmarks/loading/volumes.py), with the paper's augmentation. The peers:

- **float16 memory map**: the reference implementation's files. In `delivered` it reads whole slices, at most
  96, and MONAI transforms them lazily with one resampling, as there.
- **MONAI PersistentDataset**: its cache of whole tensors on disk, cropped by RandSpatialCrop.
- **blosc2**: chunks and blocks sized by nnU-Net's rule and its codec, on the stored integers.
- **MosaicML Streaming**, **WebDataset**: whole volumes of float16, one crop of each.
- **TensorStore**: the limit; the same boxes of the same files by handles that are open.

A peer that is not installed has no rows: `pip install -e '.[bench]'`. MosaicML Streaming is not in it, since
it wants numpy below 2.2: `pip install --no-deps --target FOLDER mosaicml-streaming` and the packages that it
imports (brotli, catalogue, cramjam, huggingface-hub, python-snappy, regex, tokenizers, torchvision, tqdm,
transformers, xxhash, zstd), then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# This file's own folder comes first otherwise, and it holds a `catalog` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.ingest import machine
from benchmarks.loading import planner
from benchmarks.loading.peers import Reader, delivering, forget, ours, readers
from benchmarks.loading.volumes import Group, has, make_groups
from benchmarks.server.slow_store import serving
from catalog.corpus import Corpus
from catalog.sampling import CropGeometry
from catalog.store import RemotePath
from shards.layout import SHARD_FILE, chunk_bytes, chunk_grid, pack_chunk, volume_chunk
from training.augment import render
from training.loader import make_loader
from training.plan import BatchPlan, SamplePlan

BATCH = 8
SECTIONS = ("planner", "read", "cold", "remote", "delivered", "gpu")
PEERS = ("blosc2", "streaming", "webdataset")
VIT_CROP = CropGeometry(tokens_z=5, tokens_x=10)
Row = dict[str, Any]


# measurement -------------------------------------------------------------------------------------------------


def row(case: str, mine: float, peer: str, theirs: float, unit: str, *, more_is_better: bool = False) -> Row:
    ratio = mine / theirs if more_is_better else theirs / mine
    print(f"{case:44} {peer:34} {mine:10.2f} {theirs:10.2f} {unit:14} {ratio:7.2f}", flush=True)
    return {"case": case, "ours": mine, "peer": peer, "theirs": theirs, "unit": unit, "ratio": ratio}


def interleaved(
    contestants: dict[str, Callable[[BatchPlan], Any]], plans: list[BatchPlan], rounds: int
) -> dict[str, float]:
    """ms of CPU time for one crop: the mean over the plans, since crops differ; the median of the rounds."""
    order, times = random.Random(0), {name: [0.0] * rounds for name in contestants}
    for number in range(rounds):
        for plan in plans:
            for name in order.sample(list(contestants), len(contestants)):
                gc.collect()
                start = time.process_time()
                contestants[name](plan)
                times[name][number] += (time.process_time() - start) * 1e3
    crops = sum(len(plan.samples) for plan in plans)
    return {name: statistics.median(found) / crops for name, found in times.items()}


def wall_ms() -> float:
    return time.perf_counter() * 1e3


def read_from_disk_mb() -> float:
    """MB that this process made the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("read_bytes:"))


def compared(case: str, found: dict[str, float], unit: str) -> Iterator[Row]:
    """Rows of ours against all others; the profile `train` against its own limit only, and the default."""
    mine = found["ours, fast"]
    for name, theirs in found.items():
        if name not in ("ours, fast", "TensorStore, train"):
            yield row(case, mine, name, theirs, unit)
    if "TensorStore, train" in found:
        yield row(
            f"{case}, profile train",
            found["ours, train"],
            "TensorStore, train",
            found["TensorStore, train"],
            unit,
        )


# sections ----------------------------------------------------------------------------------------------------


def first_plans(group: Group, quick: bool) -> list[BatchPlan]:
    planner = group.planner(BATCH)
    return [planner.plan(step) for step in range(2 if quick else 8)]


def read_section(groups: list[Group], quick: bool) -> Iterator[Row]:
    for group in groups:
        plans = first_plans(group, quick)
        contestants = readers(group, plans[0])
        for reader in contestants.values():  # imports, caches of files and of MONAI
            reader(plans[0])
        yield from compared(
            f"read, {group.name}", interleaved(contestants, plans, 1 if quick else 5), "ms CPU/crop"
        )


def cold_section(groups: list[Group], quick: bool) -> Iterator[Row]:
    for group in groups:
        plans = [group.planner(BATCH).plan(step) for step in range(100, 102 if quick else 115)]
        contestants: dict[str, Reader] = {
            name: reader
            for name, reader in readers(group, plans[0]).items()
            if "whole volumes" not in name and "train" not in name
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        bytes_read: dict[str, list[float]] = {name: [] for name in contestants}
        for plan in plans:
            for name in random.Random(plan.step).sample(list(contestants), len(contestants)):
                forget(group.folder)
                start, read = wall_ms(), read_from_disk_mb()
                contestants[name](plan)
                times[name].append((wall_ms() - start) / BATCH)
                bytes_read[name].append((read_from_disk_mb() - read) / BATCH)
        if not all(sum(read) for read in bytes_read.values()):
            print(f"cold, {group.name}: not measured, since the system did not drop its copies (memory disk?)")
            continue
        case = f"cold, {group.name}"
        yield from compared(case, {name: statistics.mean(found) for name, found in times.items()}, "ms/crop")
        mean = {name: statistics.mean(found) for name, found in bytes_read.items()}
        yield from compared(f"{case}, bytes", mean, "MB/crop")
        least = statistics.mean(touched_mb(group, plan) for plan in plans)
        yield row(f"{case}, bytes", mean["ours, fast"], "chunks touched", least, "MB/crop")


def touched_mb(group: Group, plan: BatchPlan) -> float:
    """Stored MB of the inner chunks that a plan touches, by crop; what crops have in common counts once."""
    chunks: dict[tuple[Any, ...], int] = {}
    for sample in plan.samples:
        image = sample.image
        chunk = (volume_chunk if image.shard_index is None else pack_chunk)(image.shard_shape)
        grid = chunk_grid(image.shard_shape, chunk)
        sizes = chunk_bytes(group.corpus("fast").shards_folder / image.shard_path / SHARD_FILE, grid)
        for at in _touched(sample, chunk):
            chunks[image.shard_path, *at] = int(sizes[at])
    return sum(chunks.values()) / 1e6 / len(plan.samples)


def _touched(sample: SamplePlan, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if sample.image.shard_index is not None:
        yield sample.image.shard_index, 0, 0, 0
        return
    depth, height, width = (
        range(start // step, (stop - 1) // step + 1)
        for (start, stop), step in zip(sample.box, chunk[1:], strict=True)
    )
    yield from ((0, z, y, x) for z in depth for y in height for x in width)


def remote_section(groups: list[Group], quick: bool) -> Iterator[Row]:
    batches = {"isotropic": 25, "anisotropic": 75, "2-D": 200}
    with serving(groups[0].folder.parent) as url, tempfile.TemporaryDirectory() as cache:
        # Before the first worker is made: the server that forks them keeps the environment it was started in.
        os.environ |= {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "XDG_CACHE_HOME": cache,
        }
        for group in groups:
            near = group.corpus("fast")
            corpora = {"local disk": near}
            for latency in (0, 20, 500):
                place = RemotePath("s3", f"after-{latency}-ms", f"{group.name}/fast")
                corpora[f"{latency} ms"] = Corpus(near.root, place)
            found: dict[str, list[float]] = {name: [] for name in corpora}
            for _ in range(1 if quick else 3):  # in turn, so that other work on the machine delays all alike
                for name, corpus in corpora.items():
                    found[name].append(crops_per_second(corpus, group, batches[group.name]))
            local, *speeds = ((name, statistics.median(each)) for name, each in found.items())
            for name, speed in speeds:
                case = f"remote, {group.name}, {name}"
                yield row(case, speed, *local, "crops/s", more_is_better=True)


def crops_per_second(corpus: Corpus, group: Group, batches: int) -> float:
    """Of a loader with one worker, after its first batches."""
    loader = iter(make_loader(corpus, group.planner(BATCH), 0, batches + 2, workers=1))
    for _ in range(3):
        next(loader)
    start = time.perf_counter()
    found = sum(len(batch.plan.samples) for batch in loader)
    return found / (time.perf_counter() - start)


def delivered_section(groups: list[Group], quick: bool) -> Iterator[Row]:
    for group in groups:
        plans, rounds = first_plans(group, quick), 1 if quick else 3
        contestants = delivering(group)
        for deliver in contestants.values():
            deliver(plans[0])
        found = interleaved(contestants, plans, rounds)
        reading = interleaved({"ours": ours(group, "fast")}, plans, rounds)["ours"]
        print(f"delivered, {group.name}: of ours, {reading:.2f} ms are reading and decoding")
        yield from compared(f"delivered, {group.name}", found, "ms CPU/crop")


def gpu_section(groups: list[Group], quick: bool) -> Iterator[Row]:
    if not torch.cuda.is_available():
        print("gpu: not measured: no GPU")
        return
    device, batch, steps = torch.device("cuda"), 84, 20 if quick else 100
    workers = max(len(os.sched_getaffinity(0)) - 2, 1)
    for group in groups:
        corpus, plans = group.corpus("train"), group.planner(batch, VIT_CROP)
        loader = iter(make_loader(corpus, plans, 0, 2 * steps + 9, workers, prefetch=4))
        for _ in range(10):
            render(next(loader), device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            render(next(loader), device)
        torch.cuda.synchronize()
        speed = steps * batch / (time.perf_counter() - start)
        yield row(f"gpu, {group.name}, {workers} workers", speed, "goal", 1000, "crops/s", more_is_better=True)
        waited = total = 0.0
        work = torch.randn(8192, 8192, device=device)
        for _ in range(steps):  # a training step that takes as long as 1,000 crops a second allow
            begin = time.perf_counter()
            raw = next(loader)
            waited += time.perf_counter() - begin
            render(raw, device)
            while time.perf_counter() - begin < batch / 1000:
                work @ work
                torch.cuda.synchronize()
            total += time.perf_counter() - begin
        share = 100 * waited / total
        yield row(f"gpu, {group.name}, wait of a step", max(share, 1e-3), "goal", 2, "% of step")


RUN: dict[str, Callable[[list[Group], bool], Iterator[Row]]] = {
    "read": read_section,
    "cold": cold_section,
    "remote": remote_section,
    "delivered": delivered_section,
    "gpu": gpu_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--section", action="append", choices=SECTIONS, help="only this one; may be repeated; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller images, fewer rounds")
    parser.add_argument("--rows", type=int, help="images of the planner's section")
    parser.add_argument("--work", type=Path, help="folder for some 4 GB of images, on the disk to be measured")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    sections = options.section or list(SECTIONS)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    rows: list[Row] = []
    if "planner" in sections:
        size = options.rows or (planner.QUICK_ROWS if options.quick else planner.ROWS)
        rows += planner.measure(size, 1 if options.quick else 3)
    if set(sections) - {"planner"}:
        for package in PEERS:
            if not has(package):
                print(f"{package} is not installed: no rows of it")
        work = Path(tempfile.mkdtemp(prefix="pumit-data-loader-", dir=options.work))
        try:
            groups = make_groups(work, options.quick)
            for section in sections:
                if section in RUN:
                    rows += RUN[section](groups, options.quick)
        finally:
            shutil.rmtree(work)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"benchmark": "loader", "machine": machine(), "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
