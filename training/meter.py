"""What loading takes: counted where the work is done, added up where the batches arrive."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

from shards.remote import Traffic

_IO_FILE = Path("/proc/self/io")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What some batches took in the processes that read them."""

    batches: float = 0
    crops: float = 0
    plan_seconds: float = 0
    """CPU."""
    decode_seconds: float = 0
    """CPU of all threads that read and decode; of a corpus in a store, without those that receive."""
    blocked_seconds: float = 0
    """Wall time in which a reading process had nothing to do but wait for a disk or a store."""
    disk_bytes: float = 0
    """Fetched from a disk, so without what the system still had in memory. 0 where the system does not tell."""
    received_bytes: float = 0
    """From an object store."""
    cached_bytes: float = 0
    """From the local cache."""
    cache_hits: float = 0
    """Chunks."""
    cache_misses: float = 0
    cache_damaged: float = 0
    """Chunks that were fetched again since the cached ones were not what had been stored."""

    def __add__(self, other: Work) -> Work:
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in _NAMES})


_NAMES = tuple(field.name for field in fields(Work))


_TRAFFIC = ("received_bytes", "cached_bytes", "cache_hits", "cache_misses", "cache_damaged", "decode_seconds")


class Meter:
    """Adds up the work of the batches that arrive, and how long their receiver waited for them."""

    def __init__(self) -> None:
        self.work = Work()
        self.waited_seconds = 0.0
        self._began = time.perf_counter()

    def add(self, work: Work, waited_seconds: float) -> None:
        self.work += work
        self.waited_seconds += waited_seconds

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return time.perf_counter() - self._began


def scalars(meter: Meter) -> dict[str, float]:
    """The points of the training curves: shares of time, CPU a crop, MB/s, share of chunks in the cache."""
    work, seconds = meter.work, max(meter.seconds, 1e-9)
    crops, chunks = max(work.crops, 1), work.cache_hits + work.cache_misses
    found = {
        "loader/wait_share": meter.waited_seconds / seconds,
        "loader/decode_ms_per_crop": 1e3 * work.decode_seconds / crops,
        "loader/blocked_ms_per_crop": 1e3 * work.blocked_seconds / crops,
        "loader/disk_MB_per_s": work.disk_bytes / 1e6 / seconds,
        "loader/received_MB_per_s": work.received_bytes / 1e6 / seconds,
    }
    if chunks:
        found["loader/cache_hit_share"] = work.cache_hits / chunks
        found["loader/cache_damaged_chunks"] = float(work.cache_damaged)
    return found


class Stopwatch:
    """Measures the work of one batch after the other in the process that does it."""

    def __init__(self, traffic: Traffic | None) -> None:
        """`traffic` of the reader, if it counts its own."""
        self._traffic = traffic
        self._told = self._counts()

    def lap(self) -> dict[str, float]:
        """What was counted since the last lap, by the names of Work."""
        now = self._counts()
        before, self._told = self._told, now
        return {name: value - before[name] for name, value in now.items()}

    def _counts(self) -> dict[str, float]:
        counts: dict[str, float] = {"disk_bytes": _bytes_from_disk()}
        if (traffic := self._traffic) is not None:
            counts |= {name: getattr(traffic, name) for name in _TRAFFIC}
        return counts


def _bytes_from_disk() -> int:
    try:
        lines = _IO_FILE.read_text().splitlines()
    except OSError:  # no Linux, or hidden from us
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)
