"""Reading boxes of a corpus in an object store: against the same corpus in a folder, and against TensorStore.

    python benchmarks/stores.py [--quick] [--json FILE]

A store on loopback (benchmarks/server/slow_store.py) answers each request after 0, 20 or 50 ms. One process
reads batches of 16 boxes of 64-80 x 96-256 x 96-256 voxels from noisy synthetic CT (about 1.2 bytes a voxel).
Rounds are interleaved; wall and CPU time are medians. Store and reader share the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file's own folder comes first otherwise, and it holds a `catalog` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.server.slow_store import serving
from catalog.store import RETRIES, RemotePath
from shards.cache import CacheConfig
from shards.chunks import Wanted
from shards.read import ShardReader
from shards.remote import RemoteReader
from shards.write import write_volume

SHAPE = (1, 160, 512, 512)
VOLUMES, BATCH, AHEAD = 6, 16, 2
Times = tuple[float, float]
"""Wall and CPU, ms a box."""


def write_volumes(shards: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(VOLUMES):
        coarse = torch.tensor(draw.normal(0, 1, (1, 1, 10, 24, 24)), dtype=torch.float32)
        smooth = torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="trilinear")[0].numpy()
        voxels = (300 * smooth / smooth.std() + draw.normal(0, 12, SHAPE)).astype(np.int16)
        write_volume(shards, f"synthetic/{number}.zarr", voxels)


def batches(count: int) -> list[list[Wanted]]:
    draw = np.random.default_rng(1)

    def box() -> Wanted:
        size = [int(draw.integers(64, 81)), *(int(side) for side in draw.integers(96, 257, 2))]
        start = [int(draw.integers(0, whole - side + 1)) for side, whole in zip(size, SHAPE[1:], strict=True)]
        z, y, x = ((first, first + side) for first, side in zip(start, size, strict=True))
        return Wanted(f"synthetic/{draw.integers(VOLUMES)}.zarr", SHAPE, "int16", None, (z, y, x))

    return [[box() for _ in range(BATCH)] for _ in range(count)]


def read_folder(shards: Path, work: list[list[Wanted]]) -> None:
    reader = ShardReader(shards)
    for batch in work:
        for one in batch:
            reader.read(*one)


def read_ahead(start: Callable[[list[Wanted]], list[Any]], work: list[list[Wanted]]) -> None:
    """As the loader does: the boxes of the next batches are asked for while those of one are taken."""
    coming: list[list[Any]] = []
    for number in range(len(work)):
        while len(coming) <= AHEAD and number + len(coming) < len(work):
            coming.append(start(work[number + len(coming)]))
        for one in coming.pop(0):
            one.result()


def read_remote(root: RemotePath, work: list[list[Wanted]], cache: CacheConfig | None = None) -> None:
    reader = RemoteReader(root, cache)
    read_ahead(reader.request, work)


def read_tensorstore(root: RemotePath, work: list[list[Wanted]], at_once: int) -> None:
    """Its own driver, all boxes of a batch and of those ahead as futures."""
    import tensorstore

    limits = {
        "cache_pool": {"total_bytes_limit": 32 << 20},
        "data_copy_concurrency": {"limit": 1},
        "s3_request_concurrency": {"limit": at_once},
    }
    context = tensorstore.Context(limits | {"s3_request_retries": {"max_retries": RETRIES}})
    arrays: dict[str, Any] = {}

    def start(batch: list[Wanted]) -> list[Any]:
        for one in batch:
            if one.path not in arrays:
                kvstore = {
                    "driver": "s3",
                    "endpoint": os.environ["AWS_ENDPOINT_URL"],
                    "aws_region": os.environ["AWS_REGION"],
                    "aws_credentials": {"type": "environment"},
                    "bucket": root.bucket,
                    "path": f"{(root / one.path).key}/",
                }
                spec = {"driver": "zarr3", "kvstore": kvstore, "open": True}
                known = {"fill_missing_data_reads": False, "recheck_cached_data": False}
                arrays[one.path] = tensorstore.open(spec | known, context=context)
        return [
            arrays[one.path].result()[(slice(None), *(slice(*span) for span in one.box))].read(order="C")
            for one in batch
        ]

    read_ahead(start, work)


def read_one_by_one(root: RemotePath, work: list[list[Wanted]]) -> None:
    reader = RemoteReader(root)
    for batch in work:
        for one in batch:
            reader.read(one)


def timed(run: Callable[[], None], boxes: int) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return 1e3 * (time.perf_counter() - wall) / boxes, 1e3 * (time.process_time() - cpu) / boxes


def measured(shards: Path, latency_ms: int, work: list[list[Wanted]], rounds: int) -> dict[str, Times]:
    root = RemotePath("s3", f"after-{latency_ms}-ms", "shards")
    boxes = sum(map(len, work))
    warm = CacheConfig(folder=shards.parent / "cache", limit_bytes=10 << 30)
    cold = CacheConfig(folder=shards.parent / "cold", limit_bytes=10 << 30)
    cases: dict[str, Callable[[], None]] = {
        "folder": lambda: read_folder(shards, work),
        "store": lambda: read_remote(root, work),
        "store, empty cache": lambda: read_remote(root, work, cold),
        "store, full cache": lambda: read_remote(root, work, warm),
        "store, box by box": lambda: read_one_by_one(root, work[:1]),
        "TensorStore, 16 requests at once": lambda: read_tensorstore(root, work, 16),
        "TensorStore, 64 requests at once": lambda: read_tensorstore(root, work, 64),
    }
    read_remote(root, work, warm)
    read_tensorstore(root, work[:1], 16)  # imports
    found: dict[str, list[Times]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            shutil.rmtree(cold.folder, ignore_errors=True)
            found[name].append(timed(run, BATCH if name.endswith("box by box") else boxes))
    return {
        name: (statistics.median(wall for wall, _ in each), statistics.median(cpu for _, cpu in each))
        for name, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of fewer boxes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    torch.set_num_threads(1)
    rows = []
    work = batches(3 if options.quick else 6)
    with tempfile.TemporaryDirectory(prefix="pumit-streaming-") as folder, serving(Path(folder)) as url:
        os.environ["AWS_ENDPOINT_URL"] = url
        shards = Path(folder) / "shards"
        write_volumes(shards)
        for latency in (0, 20, 50):
            found = measured(shards, latency, work, 1 if options.quick else 3)
            for name, (wall, cpu) in found.items():
                print(f"{latency:3d} ms  {name:34s} {wall:7.2f} ms a box, CPU {cpu:6.2f} ms", flush=True)
            ours = found["store"][0]
            peers = {name: wall for name, (wall, _) in found.items() if name.startswith(("folder", "Tensor"))}
            rows += [
                {"case": f"box of a store at {latency} ms", "ours": ours, "peer": name, "theirs": wall,
                 "unit": "ms", "ratio": wall / ours}
                for name, wall in peers.items()
            ]  # fmt: skip
            cached = found["store, full cache"][0]
            rows.append(
                {"case": f"box in the cache at {latency} ms", "ours": cached, "peer": "folder",
                 "theirs": found["folder"][0], "unit": "ms", "ratio": found["folder"][0] / cached}
            )  # fmt: skip
            shutil.rmtree(Path(folder) / "cache")
    if options.json is not None:
        machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
        report = {"benchmark": "stores", "machine": machine, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
