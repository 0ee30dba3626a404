"""Training on a corpus in a store: the same batches as from a folder, from the cache where it has them."""

from __future__ import annotations

import json
import logging
import multiprocessing.forkserver
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import training.loader
from catalog.errors import SetupError
from catalog.query import load_catalog
from catalog.remote import open_corpus
from catalog.sampling import CropGeometry
from catalog.store import RemotePath
from shards.cache import CacheConfig
from shards.chunks import Wanted
from shards.layout import METADATA_FILE, SHARD_FILE
from shards.read import ShardReader
from shards.remote import RemoteReader
from shards.write import write_volume
from tests.commands import run
from tests.object_store import Fault, Proxy, upload
from training.loader import BatchLoader, RawBatch, make_loader
from training.plan import BatchPlanner

SHARDS = r"c\.0\.0\.0\.0"


def rows_of(place: Any) -> list[dict[str, Any]]:
    return load_catalog(open_corpus(place)).to_pylist()


def wanted(row: dict[str, Any], box: Any = None) -> Wanted:
    box = box or ((0, row["shape_d"]), (0, row["shape_h"]), (0, row["shape_w"]))
    return Wanted(row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], row["shard_index"], box)


def some_boxes(rows: list[dict[str, Any]]) -> list[Wanted]:
    draw = np.random.default_rng(0)
    boxes = []
    for row in rows * 4:
        spans = [sorted(draw.integers(0, row[f"shape_{axis}"] + 1, 2).tolist()) for axis in "dhw"]
        spans = [(low, high) if low < high else (0, 1) for low, high in spans]
        boxes.append(wanted(row, tuple(spans)))
    return boxes


def read(reader: RemoteReader | ShardReader, boxes: list[Wanted]) -> list[bytes]:
    if isinstance(reader, ShardReader):
        return [reader.read(*box).tobytes() for box in boxes]
    found = [coming.result() for coming in reader.request(boxes)]
    assert all(voxels.flags.c_contiguous and voxels.flags.writeable for voxels in found)
    return [voxels.tobytes() for voxels in found]


def asked(proxy: Proxy) -> list[str]:
    return [request.path for request in proxy.requests if "/shards/" in request.path]


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=tmp_path / "chunks", limit_bytes=1 << 30)


@pytest.fixture(autouse=True)
def fresh_workers() -> Iterator[None]:
    """Workers come from a server that keeps the environment it was started in: the proxy of an earlier test."""
    yield
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def boxes(corpus: RemotePath) -> list[Wanted]:
    rows = rows_of(corpus)
    return [*map(wanted, rows), *some_boxes(rows)]


@pytest.fixture
def right(local: Path, boxes: list[Wanted]) -> list[bytes]:
    """What the boxes hold, read from the folder."""
    return read(ShardReader(local / "shards"), boxes)


def test_boxes_are_those_of_the_folder_and_chunks_are_asked_for_once(
    corpus: RemotePath, proxy: Proxy, boxes: list[Wanted], right: list[bytes]
) -> None:
    proxy.requests.clear()
    reader = RemoteReader(corpus / "shards")
    assert read(reader, boxes) == right
    received = sum(request.received for request in proxy.requests)
    size = sum((corpus / "shards" / path / SHARD_FILE).size() for path in {box.path for box in boxes})
    assert received == reader.traffic.received_bytes == size, "each chunk and each index once, nothing else"


def test_the_cache_serves_every_later_reader(
    corpus: RemotePath, proxy: Proxy, cache: CacheConfig, boxes: list[Wanted], right: list[bytes]
) -> None:
    first = RemoteReader(corpus / "shards", cache)
    assert read(first, boxes) == right
    assert first.traffic.cache_hits == 0
    proxy.requests.clear()
    later = RemoteReader(corpus / "shards", cache)
    assert read(later, boxes) == right
    assert asked(proxy) == []
    assert (later.traffic.cache_misses, later.traffic.received_bytes) == (0, 0)
    assert later.traffic.cache_hits == first.traffic.cache_misses
    assert later.traffic.cached_bytes > 0


def test_what_is_damaged_in_the_cache_is_fetched_again(
    corpus: RemotePath, proxy: Proxy, cache: CacheConfig, boxes: list[Wanted], right: list[bytes]
) -> None:
    read(RemoteReader(corpus / "shards", cache), boxes)
    for number, file in enumerate(sorted(path for path in cache.folder.rglob("*.zarr") if path.is_file())):
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        if number % 2:
            content[-3] ^= 1  # of the index
        file.write_bytes(content)
    damaged = RemoteReader(corpus / "shards", cache)
    assert read(damaged, boxes) == right
    assert damaged.traffic.cache_damaged > 0
    proxy.requests.clear()
    mended = RemoteReader(corpus / "shards", cache)
    assert read(mended, boxes) == right
    assert (asked(proxy), mended.traffic.cache_damaged) == ([], 0)


def test_an_array_written_anew_in_another_codec_is_read_right(
    local: Path, corpus: RemotePath, cache: CacheConfig, tmp_path: Path
) -> None:
    row = max(rows_of(corpus), key=lambda row: row["stored_bytes"])
    part = wanted(row, ((0, 20), (0, 70), (0, 70)))
    reader = RemoteReader(corpus / "shards", cache)
    read(reader, [part])
    voxels = ShardReader(local / "shards").read(*wanted(row))
    write_volume(tmp_path / "other", row["shard_path"], voxels, profile="small")
    upload(tmp_path / "other", corpus / "shards")
    right = [voxels.tobytes()]
    assert read(reader, [wanted(row)]) == right
    assert read(RemoteReader(corpus / "shards", cache), [wanted(row)]) == right


@pytest.mark.parametrize("kind", ["status", "reset", "stall"])
def test_faults_are_retried(
    corpus: RemotePath, proxy: Proxy, boxes: list[Wanted], right: list[bytes], kind: Any
) -> None:
    proxy.faults.append(Fault(kind, path=SHARDS, times=2))
    assert read(RemoteReader(corpus / "shards"), boxes) == right
    assert proxy.faults[0].times == 0


@pytest.mark.parametrize(("kind", "told"), [("status", "status 503"), ("reset", "breaks off")])
def test_what_keeps_failing_names_image_and_shard(
    corpus: RemotePath, proxy: Proxy, kind: Any, told: str
) -> None:
    loader = batches(corpus, steps=1)
    proxy.faults.append(Fault(kind, path=SHARDS, times=99))
    with pytest.raises(SetupError, match=rf"demo/.* \(shard demo/.*\.zarr\): s3://.*{told}"):
        list(loader)


def test_damage_in_the_store_is_told(corpus: RemotePath, cache: CacheConfig) -> None:
    row = max(rows_of(corpus), key=lambda row: row["stored_bytes"])
    folder = corpus / "shards" / row["shard_path"]
    content = bytearray((folder / SHARD_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARD_FILE).write(bytes(content))
    for config in (None, cache):
        with pytest.raises(SetupError, match=r"cannot read the shard s3://.*checksum of a chunk"):
            read(RemoteReader(corpus / "shards", config), [wanted(row)])
    (folder / SHARD_FILE).write(b"short")
    with pytest.raises(SetupError, match="its index is damaged"):
        read(RemoteReader(corpus / "shards"), [wanted(row)])
    metadata = json.loads((folder / METADATA_FILE).read_bytes())
    metadata["attributes"]["pumit_layout_version"] = 99
    (folder / METADATA_FILE).write(json.dumps(metadata).encode())
    with pytest.raises(SetupError, match="version 99 of the shard layout"):
        read(RemoteReader(corpus / "shards"), [wanted(row)])
    (folder / SHARD_FILE).unlink()
    with pytest.raises(SetupError, match="is missing"):
        read(RemoteReader(corpus / "shards"), [wanted(row)])
    with pytest.raises(ValueError, match="not inside"):
        read(RemoteReader(corpus / "shards"), [wanted(row, ((0, 1), (0, 1), (0, 9999)))])


def content(batch: RawBatch) -> tuple[Any, list[bytes]]:
    return batch.plan, [box.numpy().tobytes() for box in batch.boxes]


def batches(place: Any, steps: int, workers: int = 0, **options: Any) -> BatchLoader:
    corpus = open_corpus(place)
    table = load_catalog(corpus, split="train")
    planner = BatchPlanner(table, CropGeometry(tokens_z=1, tokens_x=2), 6, seed=1)
    return make_loader(corpus, planner, 0, steps - 1, workers, **options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(
    local: Path, corpus: RemotePath, proxy: Proxy, cache: CacheConfig, workers: int
) -> None:
    near = [content(batch) for batch in batches(local, 7)]
    for _ in range(2):
        loader = batches(corpus, 7, workers, cache=cache)
        assert [content(batch) for batch in loader] == near
    work = loader.take_meter().work
    assert (work.batches, work.crops) == (7, 42)
    assert work.cache_hits > 0
    assert work.cache_misses == work.received_bytes == 0
    assert work.decode_seconds > 0


def test_small_batches_are_asked_for_further_ahead_while_they_fit(
    corpus: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, planned = BatchPlanner.plan, []

    def noted(planner: BatchPlanner, step: int, *rank: int) -> Any:
        planned.append(step)
        return plan(planner, step, *rank)

    def begun_for_the_first(place: Any) -> list[int]:
        planned.clear()
        next(iter(batches(place, 40)))
        return planned.copy()

    monkeypatch.setattr(BatchPlanner, "plan", noted)
    assert begun_for_the_first(corpus) == [*range(11)], "of 6 crops each: 66"
    monkeypatch.setattr(training.loader, "_BYTES_UNDER_WAY", 1)
    assert begun_for_the_first(corpus) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_who_waits_says_for_what(
    corpus: RemotePath,
    proxy: Proxy,
    workers: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    loader = batches(corpus, 1, workers, notice_seconds=0.3)
    proxy.faults.append(Fault("stall", path=SHARDS))
    with caplog.at_level(logging.WARNING):
        assert len(list(loader)) == 1, "the run goes on"
    told = caplog.text + capfd.readouterr().err
    who = "rank 0, worker 0" if workers else "rank 0"
    assert f"{who} has waited" in told
    assert "for step 0" in told
    assert f"of which a part of {corpus}/shards/demo/" in told
    assert "due from worker 0 of 1" in told or not workers


def test_a_forked_process_is_refused(corpus: RemotePath) -> None:
    reader = RemoteReader(corpus / "shards")
    child = os.fork()
    if child == 0:
        try:
            reader.request([])
        except RuntimeError as error:
            os._exit(7 if "forkserver" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.slow
def test_commands_take_a_cache(corpus: RemotePath, proxy: Proxy, tmp_path: Path) -> None:
    chunks = tmp_path / "chunks"
    cached = ("--data", str(corpus), "--preset", "tiny", "--cache", chunks)
    short = ("--set", "steps=2", "--set", "optim.warmup_steps=1", "--set", "data.batch_size=2")
    trained = run("pumit-train", "tokenizer", *cached, "--cache-gb", "0.5", *short, "--run", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    settings = json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]
    assert (settings["cache_dir"], settings["cache_gb"]) == (str(chunks), 0.5)
    assert any(path.is_file() for path in chunks.rglob("*.zarr"))
    told = run("pumit-data", "bench-loader", *cached, "--workers", "0", "--seconds", "0.2", "--json")
    assert told.returncode == 0, told.stderr
    figures = json.loads(told.stdout)
    assert figures["remote"]
    assert 0 < figures["cache_hit_share"] <= 1
    assert figures["loader"]["limit"] in ("network", "workers", "decoding")
