"""Boxes of arrays in an object store: the chunks of many boxes are asked for at once, and decoded as they come.

So latency is paid once for all boxes that are under way, not once a chunk. Own code and not TensorStore's
driver, since what comes is kept in a cache, counted, and read from any store that obstore knows.

One set of threads sees to arrays: index, cache, which chunks to ask for. Another makes calls: some requests
each, whose chunks are decoded as soon as they are here. A box of a large volume takes twenty requests, and in
one call of the library all boxes of a volume would share ten at a time.
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
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.store import GAP, Location, RemotePath
from shards.cache import CacheConfig, CachedShard, ShardCache
from shards.chunks import Wanted, decode, index_bytes, is_sound, parse_index, pieces
from shards.layout import METADATA_FILE, SHARD_FILE, refuse_newer_layout
from shards.read import ShardReader

_T = TypeVar("_T")
Voxels = npt.NDArray[Any]

_ARRAYS_AT_ONCE = 64
"""At 50 ms, each first waiting for its index: 600 boxes of as many arrays a second."""
_CALLS_AT_ONCE = 32
_REQUESTS_OF_A_CALL = 8
"""A thread for each request took two fifths more CPU. The two together bound the connections of a process."""
_BYTES_OF_A_CALL = 2 << 20
"""One chunk may be larger. Times the number of calls: what is in memory at most, and not yet decoded."""
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
        self._arrays, self._calls = _Threads(_ARRAYS_AT_ONCE), _Threads(_CALLS_AT_ONCE)
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
        futures = {path: self._arrays.submit(self._read, boxes) for path, boxes in groups.items()}
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
            chunks = [
                _Chunk(start, stop, parts)
                for (start, stop), parts in zip(index[list(uses)].tolist(), uses.values(), strict=True)
            ]
            if kept is not None and trust:
                chunks = self._from_cache(one, chunks, kept)
            fetching = [
                self._calls.submit(self._fetch, _Call(one, file, kept, together))
                for together in _in_calls(chunks)
            ]
            wait(fetching)  # for all, also after a fault: each writes into the boxes
        for fetched in fetching:
            fetched.result()

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

    def _from_cache(self, one: Wanted, chunks: list[_Chunk], kept: CachedShard) -> list[_Chunk]:
        """Put what the cache has in its place; the chunks that it does not have."""
        missing, damaged, cached = [], 0, 0
        with self._computing:
            for chunk in chunks:
                content, other = kept.chunk(chunk.start, chunk.stop)
                damaged += other
                if content is None:
                    missing.append(chunk)
                else:
                    cached += len(content)
                    _place_chunk(one, chunk, content)
        self.traffic.add(
            cache_hits=len(chunks) - len(missing),
            cache_misses=len(missing),
            cache_damaged=damaged,
            cached_bytes=cached,
        )
        return missing

    def _fetch(self, call: _Call) -> None:
        """Ask for chunks and put them in their places. ValueError if one is damaged."""
        began = time.thread_time()
        one, file, kept, chunks = call
        try:
            answers = file.ranges([chunk.start for chunk in chunks], [chunk.stop for chunk in chunks])
            self.traffic.add(received_bytes=sum(map(len, answers)))
            # Many threads wait better than one, but compute worse: they pass the interpreter's lock around.
            with self._computing:
                for chunk, answer in zip(chunks, answers, strict=True):
                    content = bytes(answer)  # in memory that the one before has just left, and so at hand
                    if not is_sound(content):
                        raise ValueError("the checksum of a chunk does not agree")
                    _place_chunk(one, chunk, content)
            if kept is not None:
                for chunk, answer in zip(chunks, answers, strict=True):
                    kept.keep(chunk.start, answer)
        finally:
            self.traffic.add(decode_seconds=time.thread_time() - began)


class _Chunk(NamedTuple):
    """A chunk of which something is wanted."""

    start: int
    """First byte in the shard file."""
    stop: int
    parts: _Parts


class _Call(NamedTuple):
    """Chunks of one array that a thread asks for."""

    one: Wanted
    """Any box of the array."""
    file: RemotePath
    kept: CachedShard | None
    chunks: list[_Chunk]
    """Ascending."""


def _place_chunk(one: Wanted, chunk: _Chunk, content: bytes) -> None:
    """ValueError if the content, whose checksum agrees, is not what the catalog says."""
    voxels = decode(content, one.chunk, one.dtype)
    for source, target in chunk.parts:
        target[...] = voxels[source]


def _in_calls(chunks: list[_Chunk]) -> list[list[_Chunk]]:
    """Ascending chunks by call. Neighbours share a request, as in `RemotePath.ranges`."""
    calls: list[list[_Chunk]] = []
    requests = size = 0
    for chunk in chunks:
        length = chunk.stop - chunk.start
        new = not calls or chunk.start - calls[-1][-1].stop > GAP
        if not calls or requests + new > _REQUESTS_OF_A_CALL or size + length > _BYTES_OF_A_CALL:
            calls.append([])
            requests, size, new = 0, 0, True
        calls[-1].append(chunk)
        requests, size = requests + new, size + length
    return calls


_Box: TypeAlias = tuple[Wanted, Voxels]
"""What is wanted, and where it goes: (C, d, h, w)."""
_Parts: TypeAlias = list[tuple[tuple[slice, ...], Voxels]]
"""What of a chunk is wanted, and where it goes."""
_Uses: TypeAlias = dict[int, _Parts]
"""Chunks by number, ascending."""


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
                self._busy += 1
            try:
                if self._closing:
                    future.cancel()
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
            self._change.wait_for(lambda: self._busy == 0 and self._tasks.empty(), _LAST_WORDS_SECONDS)


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
