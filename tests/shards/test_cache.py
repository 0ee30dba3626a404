"""The cache gives back what was stored or nothing, whoever is killed, and stays below its limit."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from catalog.errors import SetupError
from shards.cache import CacheConfig, ShardCache

CHUNKS, SIZE = 8, 4096
Places = list[tuple[int, int]]


def sealed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


def chunk(shard: int, number: int) -> bytes:
    content = np.random.default_rng([shard, number]).bytes(SIZE - 4)
    return sealed(content)


def index() -> bytes:
    places = np.array([[number * SIZE, SIZE] for number in range(CHUNKS)], "<u8")
    return sealed(places.tobytes())


def store(cache: ShardCache, shard: int) -> None:
    with cache.shard(f"demo/{shard}.zarr") as kept:
        kept.keep_index(CHUNKS * SIZE, index())
        for number in range(CHUNKS):
            kept.keep(number * SIZE, chunk(shard, number))


def found(cache: ShardCache, shard: int) -> list[bytes | None]:
    with cache.shard(f"demo/{shard}.zarr") as kept:
        return [kept.chunk(number * SIZE, (number + 1) * SIZE)[0] for number in range(CHUNKS)]


def is_whole(cache: ShardCache, shard: int) -> bool:
    return found(cache, shard) == [chunk(shard, number) for number in range(CHUNKS)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.zarr") if path.is_file()]


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files(folder))


def config(folder: Path, limit: int = 1 << 30) -> CacheConfig:
    return CacheConfig(folder=folder, limit_bytes=limit)


def test_what_was_stored_comes_back_and_nothing_else(tmp_path: Path) -> None:
    cache = ShardCache(config(tmp_path), "place")
    with cache.shard("demo/1.zarr") as kept:
        assert kept.index(CHUNKS) is None
        assert kept.chunk(0, SIZE) == (None, False)
        kept.keep_index(CHUNKS * SIZE, index())
        kept.keep(2 * SIZE, chunk(1, 2))
    again = pickle.loads(pickle.dumps(cache))
    with again.shard("demo/1.zarr") as kept:
        places = kept.index(CHUNKS)
        assert places is not None
        assert places.tolist() == [[number * SIZE, (number + 1) * SIZE] for number in range(CHUNKS)]
        assert kept.index(CHUNKS - 1) is None
        assert kept.chunk(2 * SIZE, 3 * SIZE) == (chunk(1, 2), False)
        assert kept.chunk(3 * SIZE, 4 * SIZE) == (None, False), "a hole is no damage"
    with ShardCache(config(tmp_path), "another-place").shard("demo/1.zarr") as kept:
        assert kept.index(CHUNKS) is None
    assert not any(path.stat().st_mode & 0o077 for path in files(tmp_path)), "patients' images, for nobody else"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "garbage"])
def test_damage_is_absence(tmp_path: Path, damage: str) -> None:
    cache = ShardCache(config(tmp_path), "place")
    store(cache, 1)
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[SIZE + 100] ^= 4
    damaged = {
        "cut": content[: SIZE + 10],
        "empty": b"",
        "longer": bytes(content) + b"x" * 100,
        "garbage": b"x" * len(content),
    }.get(damage, bytes(content))
    file.write_bytes(damaged)
    with cache.shard("demo/1.zarr") as kept:
        for number in range(CHUNKS):
            read, other = kept.chunk(number * SIZE, (number + 1) * SIZE)
            assert read in (None, chunk(1, number))
            sound = (
                damage == "longer" or (damage == "flip" and number != 1) or (damage == "cut" and number == 0)
            )
            assert (read is not None) == sound
            if damage in ("flip", "garbage"):
                assert other == (not sound), "damage is told from a hole"
        if damage != "flip":
            assert kept.index(CHUNKS) is None
    store(cache, 1)
    assert is_whole(cache, 1)
    with cache.shard("demo/1.zarr") as kept:
        assert kept.index(CHUNKS) is not None


def test_the_shards_used_longest_ago_go_first(tmp_path: Path) -> None:
    whole = CHUNKS * SIZE + 4096  # an index takes a block of the disk
    cache = ShardCache(config(tmp_path, 10 * whole), "place")
    for shard in range(9):
        store(cache, shard)
        time.sleep(0.01)
    assert all(is_whole(cache, shard) for shard in range(9))
    time.sleep(0.05)  # the clock of files ticks every few milliseconds
    found(cache, 0)  # used again: now the second is the oldest
    time.sleep(0.05)
    store(cache, 9)
    assert used(tmp_path) <= 10 * whole
    there = [is_whole(cache, shard) for shard in range(10)]
    assert there[0]
    assert there[9]
    assert not there[1]


def test_it_stays_below_its_limit(tmp_path: Path) -> None:
    limit = 64 * SIZE
    cache = ShardCache(config(tmp_path, limit), "place")
    (tmp_path / "of-the-user").write_bytes(b"x" * limit)
    for shard in range(100):
        store(cache, shard)
        assert used(tmp_path) <= limit
    assert is_whole(cache, 99)
    assert (tmp_path / "of-the-user").exists()


def test_a_lost_sum_is_counted_anew(tmp_path: Path) -> None:
    limit = 64 * SIZE
    for content in (None, b"", b"12", b"\xff\n", b"-5\n"):
        generous = ShardCache(config(tmp_path), "place")
        for shard in range(20):
            store(generous, shard)
        assert used(tmp_path) > limit
        if content is not None:
            (lock,) = tmp_path.rglob(".lock")
            lock.write_bytes(content)
        store(ShardCache(config(tmp_path, limit), "place"), 99)
        assert used(tmp_path) <= limit


def hammer(limits: CacheConfig, seed: int, seconds: float) -> None:
    """Read and store at random; ends with an error if anything wrong ever comes back."""
    cache = ShardCache(limits, "place")
    draw = np.random.default_rng(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shard = int(draw.integers(40))
        for number, content in enumerate(found(cache, shard)):
            if content is not None and content != chunk(shard, number):
                os._exit(17)
        store(cache, shard)
    os._exit(0 if cache.writing else 18)


def test_many_processes_and_killed_ones(tmp_path: Path) -> None:
    limit = 30 * (CHUNKS + 1) * SIZE
    context = multiprocessing.get_context("spawn")
    start = [context.Process(target=hammer, args=(config(tmp_path, limit), seed, 1.5)) for seed in range(4)]
    for process in start:
        process.start()
    deadline = time.monotonic() + 60
    while used(tmp_path) < limit / 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in start[:2]:
        process.kill()
    for process in start:
        process.join()
    assert [process.exitcode for process in start[2:]] == [0, 0]
    hammering = context.Process(target=hammer, args=(config(tmp_path, limit), 9, 0.5))
    hammering.start()
    hammering.join()
    assert hammering.exitcode == 0
    assert 0 < used(tmp_path) <= limit


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_turns_it_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    cache = ShardCache(config(tmp_path), "place")
    store(cache, 1)

    def refuse(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", refuse)
    with caplog.at_level(logging.WARNING):
        for shard in range(2, 5):
            store(cache, shard)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.strerror(code) in caplog.text
    assert str(tmp_path) in caplog.text
    assert not cache.writing
    assert is_whole(cache, 1), "what is there is still read"
    assert found(cache, 3) == [None] * CHUNKS


def test_a_write_cut_short_counts_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(config(tmp_path), "place")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, at: write(handle, content[: SIZE // 2], at))
    store(cache, 1)
    assert not cache.writing
    assert found(cache, 1) == [None] * CHUNKS


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be made"):
        ShardCache(config(tmp_path / "file" / "cache"), "place")
    with pytest.raises(ValueError, match="no path of a shard"), ShardCache(config(tmp_path), "p").shard("../x"):
        pass
