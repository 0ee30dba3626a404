"""Compressed chunks on a local disk: what the shards of an object store have sent before.

A shard that was read from has one sparse file here, with each chunk at the place it has in the shard, and the
index at the end. Chunk and index end with their own checksums, so nothing else need be recorded: what is
missing, half written by a killed process or flipped by the disk is no sound chunk, and is fetched. That makes
every write safe beside every read, by any process, without a lock; only who counts and evicts takes one. The
shards read longest ago go first, whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from shards.chunks import index_bytes, is_sound, parse_index

_LOG = logging.getLogger(__name__)
_FOLDER = "pumit-chunks-1"
"""Everything lies in this folder of the user's, so that nothing else is evicted. The number: of the layout."""
_LOCK = ".lock"
_EVICT_ABOVE, _EVICT_TO = 0.95, 0.85
"""Shares of the limit. What processes wrote and have not told yet has room above the first."""
_BLOCK = 4096
"""Disks give out whole blocks, so a chunk takes up to one more than its bytes."""
_TOLD_AT_ONCE = 8 << 20
"""Bytes that a process writes before it tells the others, at most."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where and how large."""

    folder: Path
    limit_bytes: int


class ShardCache:
    """Chunks of the shards below one place, in a folder that any number of processes and places share.

    The folder stays below its limit as long as a twentieth of that is more than 8 MB for each process.
    """

    def __init__(self, config: CacheConfig, place: str) -> None:
        """`place` names the shards folder among others: one component of a path.

        Raises SetupError if the folder cannot be made.
        """
        self.config = config
        self._place = place
        self._root = config.folder / _FOLDER
        self._writing = True
        self._lock = threading.Lock()
        self._told_at_once = min(_TOLD_AT_ONCE, max(config.limit_bytes // 64, 1))
        self._untold = 0
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SetupError(
                f"the cache folder {config.folder} cannot be made: {error.strerror}. Name another with --cache"
            ) from error

    def __reduce__(self) -> tuple[type[ShardCache], tuple[CacheConfig, str]]:
        return type(self), (self.config, self._place)

    @contextlib.contextmanager
    def shard(self, path: str) -> Iterator[CachedShard]:
        """What is here of one shard, by its path relative to the shards folder."""
        if {"", ".", ".."} & set(path.split("/")):
            raise ValueError(f"{path!r} is no path of a shard")
        shard = CachedShard(self, self._root / self._place / path)
        try:
            yield shard
        finally:
            shard.close()

    @property
    def writing(self) -> bool:
        """Whether it still takes chunks: not any more after the disk refused one."""
        return self._writing

    def turn_off(self, error: OSError) -> None:
        """Write no more; say so once."""
        with self._lock:
            was, self._writing = self._writing, False
        if was:
            _LOG.warning(
                "the cache in %s takes no more chunks (%s); they come from the store instead, so training goes "
                "on, only slower. Give it another disk, or a smaller limit, at the next start.",
                self.config.folder,
                error.strerror or error,
            )

    def wrote(self, count: int) -> None:
        """Take note of bytes that were written, and evict if there are too many."""
        with self._lock:
            self._untold += count
            if self._untold < self._told_at_once:
                return
            count, self._untold = self._untold, 0
        try:
            told = self._tell(count)
        except OSError as error:
            self.turn_off(error)
        else:
            if not told:
                with self._lock:
                    self._untold += count

    def _tell(self, count: int) -> bool:
        """Add to the sum that all processes keep in the lock file; False if another process has it."""
        handle = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            content = os.pread(handle, 32, 0)
            # A process that was killed while it wrote the sum left none: then everything is counted.
            used = int(content) + count if content.endswith(b"\n") and content.strip().isdigit() else None
            if used is None or used > self.config.limit_bytes * _EVICT_ABOVE:
                used = self._evict()
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{used}\n".encode(), 0)
        finally:
            os.close(handle)
        return True

    def _evict(self) -> int:
        """Delete the files used longest ago if there is too much; the bytes that then are here."""
        found = sorted(_files(self._root))
        used = sum(size for _, size, _ in found)
        if used > self.config.limit_bytes * _EVICT_ABOVE:
            for _, size, path in found:
                if used <= self.config.limit_bytes * _EVICT_TO:
                    break
                with contextlib.suppress(FileNotFoundError):
                    Path(path).unlink()
                used -= size
        return used


class CachedShard:
    """The file for one shard. Whatever goes wrong with it counts as absent."""

    def __init__(self, cache: ShardCache, path: Path) -> None:
        self._cache, self._path = cache, path
        self._handle: int | None = None
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            os.utime(self._handle)  # the order of eviction
        except FileNotFoundError:
            pass
        except OSError as error:
            cache.turn_off(error)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def index(self, chunk_count: int) -> npt.NDArray[np.int64] | None:
        """As `parse_index`, if it is here."""
        size = index_bytes(chunk_count)
        try:
            start = 0 if self._handle is None else os.fstat(self._handle).st_size - size
            return parse_index(self._read(start, start + size), chunk_count) if start > 0 else None
        except ValueError:
            return None

    def chunk(self, start: int, stop: int) -> tuple[bytes | None, bool]:
        """The chunk at a place of the shard if it is here, and whether something else is."""
        if self._is_hole(start, stop):
            return None, False
        found = self._read(start, stop)
        if len(found) == stop - start and is_sound(found):
            return found, False
        return None, bool(found.strip(b"\0"))

    def keep(self, start: int, content: bytes | memoryview) -> None:
        """Store a chunk, or the index, at its place of the shard."""
        if not self._cache.writing:
            return
        try:
            if self._handle is None:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.pwrite(self._handle, content, start) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._cache.turn_off(error)
        else:
            self._cache.wrote(len(content) + _BLOCK)

    def keep_index(self, start: int, content: bytes) -> None:
        """Store the index, with which the file ends."""
        self.keep(start, content)
        if self._handle is not None and self._cache.writing:
            os.ftruncate(self._handle, start + len(content))

    def _is_hole(self, start: int, stop: int) -> bool:
        """Whether nothing was stored there; the system knows without reading."""
        if self._handle is None:
            return True
        try:
            return os.lseek(self._handle, start, os.SEEK_DATA) >= stop
        except OSError as error:
            return error.errno == errno.ENXIO  # nothing from there to the end

    def _read(self, start: int, stop: int) -> bytes:
        if self._handle is None:
            return b""
        try:
            return os.pread(self._handle, stop - start, start)
        except OSError as error:
            self._cache.turn_off(error)
            return b""


def _files(folder: Path | str) -> Iterator[tuple[int, int, str]]:
    """(time of last use, bytes on the disk, path) of all shards below a folder."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.name != _LOCK:
            with contextlib.suppress(FileNotFoundError):
                told = entry.stat(follow_symlinks=False)
                yield told.st_mtime_ns, told.st_blocks * 512, entry.path
