"""Boxes of arrays in an object store: the chunks of many boxes are asked for at once, and decoded as they come.

So latency is paid once for all boxes that are under way, not once a chunk. Own code and not TensorStore's
driver, since what comes is kept in a cache, counted, and read from any store that obstore knows.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.store import Location, RemotePath
from shards.cache import CacheConfig, CachedShard, ShardCache
from shards.chunks import Wanted, decode, index_bytes, is_sound, parse_index, pieces
from shards.layout import METADATA_FILE, SHARD_FILE, refuse_newer_layout
from shards.read import ShardReader

_T = TypeVar("_T")
Voxels = npt.NDArray[Any]

_REQUESTS_AT_ONCE = 32
"""Shards that a process asks for at the same time: at 50 ms, 300 boxes a second."""
_INDEX_MEMORY = 16 << 20
"""Bytes of indexes that a process keeps: each read anew would be a request of its own."""
_LAST_WORDS_SECONDS = 3


@dataclass
class Traffic:
    """What reading took so far; only ever grows."""

    received_bytes: int = 0
    """From the store."""
    cached_bytes: int = 0
    """From the cache."""
    cache_hits: int = 0
    """Chunks that the cache had."""
    cache_misses: int = 0
    """Chunks that it did not have, or damaged."""
    cache_damaged: int = 0
    """Chunks that it had and that were not what had been stored."""
    decode_seconds: float = 0.0
    """CPU of the threads that check, decode and copy; without the library's own, which receive."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: float) -> None:
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class Coming(NamedTuple):
    """A box that was asked for."""

    shard: str
    future: Future[None]
    voxels: Voxels

    def result(self) -> Voxels:
        """The voxels, once they are here; raises what reading them raised."""
        self.future.result()
        return self.voxels

    def cancel(self) -> None:
        """Do not ask for it any more, if that has not begun."""
        self.future.cancel()


class RemoteReader:
    """Reads boxes of the arrays below `root`. Cheap to make, to pickle and to send to a worker.

    Safe to use by several threads.
    """

    def __init__(self, root: RemotePath, cache: CacheConfig | None = None) -> None:
        """Raises SetupError if the cache has no place."""
        self._root, self._config = root, cache
        self._cache = ShardCache(cache, _place(root)) if cache is not None else None
        self._threads = _Threads(_REQUESTS_AT_ONCE)
        self._indexes = _Indexes(_INDEX_MEMORY)
        self._computing = threading.Lock()
        self._process = os.getpid()
        self.traffic = Traffic()

    def __reduce__(self) -> tuple[type[RemoteReader], tuple[RemotePath, CacheConfig | None]]:
        return type(self), (self._root, self._config)

    def read(self, wanted: Wanted) -> Voxels:
        """The voxels of a box: a new C-contiguous array (C, d, h, w).

        Raises SetupError if the array is missing, damaged, not what the catalog says or of a later version,
        StoreError if the store does not answer or denies access, ValueError if the box lies outside.
        """
        return self.request([wanted])[0].result()

    def request(self, wanted: Sequence[Wanted], into: Sequence[Voxels] | None = None) -> list[Coming]:
        """Ask for boxes and return at once. Of a chunk that several of them touch, there is one request.

        `into` are the arrays (C, d, h, w) that the voxels go to; new ones by default. Raises RuntimeError in a
        process forked from the one that made the reader.
        """
        if self._process != os.getpid():
            raise RuntimeError(
                "connections to a store do not survive a fork. Start workers by 'forkserver' or 'spawn' "
                "(DataLoader(multiprocessing_context='forkserver'))."
            )
        if into is None:
            into = [one.empty() for one in wanted]
        groups: dict[str, list[_Box]] = defaultdict(list)
        for box in zip(wanted, into, strict=True):
            groups[box[0].path].append(box)
        futures = {path: self._threads.submit(self._read, boxes) for path, boxes in groups.items()}
        return [
            Coming(str(self._root / one.path / SHARD_FILE), futures[one.path], voxels)
            for one, voxels in zip(wanted, into, strict=True)
        ]

    def _read(self, boxes: list[_Box]) -> None:
        """Boxes of one array."""
        began = time.thread_time()
        path = boxes[0][0].path
        folder = self._root / path
        try:
            uses = _uses(boxes)  # a box that lies outside is refused before anything is asked for
            try:
                self._attempt(boxes[0][0], uses)
            except ValueError:
                # What lies there may have been written anew, in another codec: then the index was of before.
                self._indexes.forget(path)
                self._explained(folder, boxes[0][0], uses)
        except FileNotFoundError as error:
            raise SetupError(_complaint(folder, f"{SHARD_FILE} is missing")) from error
        finally:
            self.traffic.add(decode_seconds=time.thread_time() - began)

    def _explained(self, folder: RemotePath, one: Wanted, uses: _Uses) -> None:
        """Once more, from the store alone; SetupError if that is damaged."""
        try:
            self._attempt(one, uses, trust=False)
        except ValueError as error:
            with contextlib.suppress(OSError):
                refuse_newer_layout(folder, (folder / METADATA_FILE).read_bytes())
            raise SetupError(_complaint(folder, str(error))) from error

    def _attempt(self, one: Wanted, uses: _Uses, *, trust: bool = True) -> None:
        """`trust` takes index and chunks from the cache. ValueError if something is damaged."""
        file = self._root / one.path / SHARD_FILE
        with self._cache.shard(one.path) if self._cache is not None else contextlib.nullcontext() as kept:
            index = self._index(one, file, kept, trust)
            encoded = self._chunks(index[list(uses)], file, kept, trust)
        # Many threads wait better than one, but compute worse: they would pass the interpreter's lock around.
        with self._computing:
            for content, parts in zip(encoded, uses.values(), strict=True):
                voxels = decode(content, one.chunk, one.dtype)
                for source, target in parts:
                    target[...] = voxels[source]

    def _index(
        self, first: Wanted, file: RemotePath, kept: CachedShard | None, trust: bool
    ) -> npt.NDArray[np.int64]:
        count = first.chunk_count
        index = kept.index(count) if kept is not None and trust else None
        if index is not None:
            return index
        end = self._indexes.get(first.path)
        if end is None or len(end) != index_bytes(count):
            end = file.end(index_bytes(count))
            self.traffic.add(received_bytes=len(end))
        index = parse_index(end, count)
        self._indexes.put(first.path, end)
        if kept is not None:
            kept.keep_index(int(index[-1, 1]), end)
        return index

    def _chunks(
        self, places: npt.NDArray[np.int64], file: RemotePath, kept: CachedShard | None, trust: bool
    ) -> list[bytes]:
        """The chunks at some places (start, stop) of the shard file."""
        spans: list[tuple[int, int]] = [(start, stop) for start, stop in places.tolist()]
        found: dict[tuple[int, int], bytes] = {}
        damaged = 0
        if kept is not None and trust:
            with self._computing:
                for span in spans:
                    content, other = kept.chunk(*span)
                    damaged += other
                    if content is not None:
                        found[span] = content
            hits = len(found)
            cached = sum(map(len, found.values()))
            self.traffic.add(
                cache_hits=hits, cache_misses=len(spans) - hits, cache_damaged=damaged, cached_bytes=cached
            )
        missing = [span for span in spans if span not in found]
        if missing:
            parts = file.ranges([start for start, _ in missing], [stop for _, stop in missing])
            self.traffic.add(received_bytes=sum(map(len, parts)))
            for span, content in zip(missing, parts, strict=True):
                if not is_sound(content):
                    raise ValueError("the checksum of a chunk does not agree")
                found[span] = content
                if kept is not None:
                    kept.keep(span[0], content)
        return [found[span] for span in spans]


_Box: TypeAlias = tuple[Wanted, Voxels]
"""What is wanted, and where it goes: (C, d, h, w)."""
_Uses: TypeAlias = dict[int, list[tuple[tuple[slice, ...], Voxels]]]
"""Chunks by number, ascending: the parts of each that are wanted, and where they go."""


def _uses(boxes: list[_Box]) -> _Uses:
    """ValueError if a box lies outside."""
    uses: _Uses = defaultdict(list)
    for one, voxels in boxes:
        whole = voxels if one.slot is None else voxels.transpose(1, 0, 2, 3)
        for number, source, target in pieces(one):
            uses[number].append((source, whole[target]))
    return {number: uses[number] for number in sorted(uses)}


class _Indexes:
    """The indexes used last, up to some bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> bytes | None:
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
            return self._kept.get(path)

    def put(self, path: str, end: bytes) -> None:
        self.forget(path)
        with self._lock:
            self._kept[path] = end
            self._used += len(end)
            while self._used > self._limit and len(self._kept) > 1:
                self._used -= len(self._kept.popitem(last=False)[1])

    def forget(self, path: str) -> None:
        with self._lock:
            self._used -= len(self._kept.pop(path, b""))


class _Threads:
    """Threads that a process does not wait for when it ends, as it would for those of an executor.

    A request that a dead store leaves unanswered would otherwise hold up the end of an interrupted training.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._busy = 0
        self._change = threading.Condition()
        self._closing = False

    def submit(self, function: Callable[[Any], _T], argument: Any) -> Future[_T]:
        future: Future[_T] = Future()
        self._tasks.put((future, function, argument))
        if not self._idle.acquire(blocking=False) and self._started < self._limit:
            if self._started == 0:
                atexit.register(self._close)
            self._started += 1
            threading.Thread(target=self._work, daemon=True, name="pumit-shards").start()
        return future

    def _work(self) -> None:
        while True:
            future, function, argument = self._tasks.get()
            with self._change:
                if self._closing:
                    return
                self._busy += 1
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(function(argument))
            except BaseException as error:
                future.set_exception(error)
            with self._change:
                self._busy -= 1
                self._change.notify_all()
            self._idle.release()
            del future, argument

    def _close(self) -> None:
        """Begin nothing more, and let end what ends soon: a thread should not outlive the interpreter."""
        with self._change:
            self._closing = True
            self._change.wait_for(lambda: self._busy == 0, _LAST_WORDS_SECONDS)


Reader: TypeAlias = ShardReader | RemoteReader
"""What reads boxes of the arrays in a folder, or in an object store."""


def open_reader(shards: Location, cache: CacheConfig | None = None) -> Reader:
    """The reader for a place; of a folder, nothing is cached."""
    return RemoteReader(shards, cache) if isinstance(shards, RemotePath) else ShardReader(shards)


def read_box(reader: Reader, wanted: Wanted) -> Voxels:
    """The voxels of one box, (C, d, h, w); errors as of the reader."""
    return reader.read(wanted) if isinstance(reader, RemoteReader) else reader.read(*wanted)


def _complaint(folder: RemotePath, found: str) -> str:
    return (
        f"cannot read the shard {folder}: {found}. "
        f"Delete that folder and run `pumit-data ingest {folder.parent.name}` again, which writes it anew."
    )


def _place(root: RemotePath) -> str:
    """A name for the shards of one store and prefix, as one component of a path."""
    return hashlib.sha256(f"{root.provider.endpoint or ''}\0{root}".encode()).hexdigest()[:16]
