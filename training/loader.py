"""From plans to voxels: workers read and decode the boxes of a step; nothing else happens on the CPU.

Worker w of W handles the steps first + w, first + w + W, ... and hands each over as one message, so steps
arrive in order whatever W is. A batch crosses the process border as one block of shared memory. Of a corpus in
an object store, each worker asks for the boxes of the next batches while it decodes those of one.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from catalog.corpus import Corpus
from catalog.errors import SetupError
from shards.cache import CacheConfig
from shards.chunks import Wanted
from shards.read import ShardReader
from shards.remote import Coming, Reader, RemoteReader, open_reader
from training.meter import Meter, Stopwatch, Work
from training.plan import BatchPlan, Planner, SamplePlan
from training.watch import NOTICE_SECONDS, Watch

_ALIGNMENT = 16  # bytes: any stored dtype may start at a multiple of it
_BATCHES_AHEAD = 2
"""Of a store, so many batches are under way beside the one that is put together: they hide its latency."""
_CROPS_UNDER_WAY, _BYTES_UNDER_WAY = 64, 64 << 20
"""Small batches of small crops, which are read faster than a store answers: more of them, up to either."""
BATCHES_WAITING = 2
"""At most, of each worker: read, and not yet taken."""
_READ_AT_ONCE = 8
"""Boxes of a folder under way in one process: while one is decoded, the disk reads the next."""


@dataclass(frozen=True, slots=True, eq=False)
class RawBatch:
    """One rank's boxes of a step, as stored, and the plan that says what to make of them."""

    plan: BatchPlan
    buffer: Tensor
    """All boxes one after the other, uint8, on the CPU or, after `to`, on a device."""
    work: Work = Work()  # noqa: RUF009 - an immutable constant
    """What reading them took."""

    @property
    def step(self) -> int:
        return self.plan.step

    @property
    def level(self) -> int:
        """DA level of every sample."""
        return self.plan.level

    @property
    def keys(self) -> tuple[str, ...]:
        """`dataset/key` of every sample."""
        return tuple(f"{sample.image.dataset}/{sample.image.key}" for sample in self.plan.samples)

    @property
    def images(self) -> tuple[str, ...]:
        """`dataset/key` of every image, of which each may have several samples."""
        return self.keys[:: self.plan.views]

    @property
    def indices(self) -> tuple[int, ...]:
        """Position of every sample in the global batch: the address of its random numbers."""
        return tuple(sample.index for sample in self.plan.samples)

    @property
    def boxes(self) -> list[Tensor]:
        """Stored voxels of every sample, (C, d, h, w) in the stored dtype: views of `buffer`."""
        places, _ = _layout(self.plan)
        return [
            self.buffer[place.start : place.stop].view(place.torch_dtype).view(place.shape) for place in places
        ]

    def split(self, parts: int) -> list[RawBatch]:
        """The same in `parts` batches of about equal size, in their order: views of one buffer.

        Raises SetupError if there are fewer crops than parts.
        """
        samples = self.plan.samples
        if parts > len(samples):
            raise SetupError(
                f"a process's {len(samples)} crops of a batch cannot be made in {parts} passes: lower "
                "data.accumulate, or raise data.batch_size"
            )
        ends = [part * len(samples) // parts for part in range(parts + 1)]
        return [self._part(first, stop) for first, stop in itertools.pairwise(ends)]

    def first(self, crops: int) -> RawBatch:
        """Its first crops alone, as a batch of their own."""
        part = self._part(0, crops)
        return replace(part, plan=replace(part.plan, global_size=crops))

    def _part(self, first: int, stop: int) -> RawBatch:
        places, size = _layout(self.plan)
        starts = [place.start for place in places] + [size]
        plan = replace(self.plan, samples=self.plan.samples[first:stop])
        return replace(self, plan=plan, buffer=self.buffer[starts[first] : starts[stop]])

    def pin_memory(self) -> RawBatch:
        """The same in page-locked memory, from which copies to a GPU overlap with its work."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device) -> RawBatch:
        """The same with the boxes on a device, in one copy."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))


def read_batch(reader: Reader, plan: BatchPlan) -> RawBatch:
    """Read the boxes of a plan.

    Raises SetupError, naming dataset, key and shard, if a box cannot be read.
    """
    return _Reading(reader, plan, plan_seconds=0.0).finish(Watch("the reader"))


class _Reading:
    """A batch on its way: of a store, its boxes are asked for at once."""

    def __init__(self, reader: Reader, plan: BatchPlan, plan_seconds: float) -> None:
        self._plan, self._plan_seconds = plan, plan_seconds
        places, size = _layout(plan)
        self._buffer = torch.empty(size, dtype=torch.uint8)
        raw = self._buffer.numpy()
        into = [raw[place.start : place.stop].view(place.dtype).reshape(place.shape) for place in places]
        wanted = [_wanted(sample) for sample in plan.samples]
        self._coming: Sequence[Coming] = ()
        if isinstance(reader, RemoteReader):
            self._coming = reader.request(wanted, into)
            self._boxes: Iterable[Callable[[], object]] = [one.result for one in self._coming]
        else:
            self._boxes = _side_by_side(reader, wanted, into)

    @property
    def crops(self) -> int:
        return len(self._plan.samples)

    @property
    def size(self) -> int:
        """Bytes of the boxes, decoded."""
        return len(self._buffer)

    def cancel(self) -> None:
        for one in self._coming:
            one.cancel()

    def finish(self, watch: Watch) -> RawBatch:
        """The batch, once all of it is here; SetupError as `read_batch`."""
        samples = self._plan.samples
        shards = [one.shard for one in self._coming] or [sample.image.shard_path for sample in samples]
        wall, cpu = time.perf_counter(), time.process_time()
        for sample, shard, box in zip(samples, shards, self._boxes, strict=True):
            image = f"{sample.image.dataset}/{sample.image.key}"
            with watch.waiting(f"step {self._plan.step}: {image}, of which a part of {shard} is to come"):
                _named(sample, box)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        work = Work(
            batches=1,
            crops=len(samples),
            plan_seconds=self._plan_seconds,
            decode_seconds=0 if self._coming else cpu,  # a remote reader counts its own, of all its threads
            blocked_seconds=wall if self._coming else max(wall - cpu, 0.0),
        )
        return RawBatch(self._plan, self._buffer, work)


def _has_room(under_way: Collection[_Reading]) -> bool:
    """Whether one more batch of a store should be asked for."""
    crops, size = sum(one.crops for one in under_way), sum(one.size for one in under_way)
    return len(under_way) <= _BATCHES_AHEAD or (crops < _CROPS_UNDER_WAY and size < _BYTES_UNDER_WAY)


class BatchLoader:
    """The batches of steps first ... last, in order. Every iteration starts anew, with fresh workers."""

    def __init__(
        self, batches: DataLoader[RawBatch | SetupError], steps: range, rank: int, notice_seconds: float
    ) -> None:
        self._batches = batches
        self._steps = steps
        self._rank, self._notice = rank, notice_seconds
        self._meter = Meter()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[RawBatch]:
        with Watch(f"rank {self._rank}", self._notice) as watch:
            began, batches = time.perf_counter(), iter(self._batches)
            for number, step in enumerate(self._steps):
                with watch.waiting(self._due(number, step)):
                    batch = next(batches)
                if isinstance(batch, SetupError):
                    raise batch
                self._meter.add(batch.work, time.perf_counter() - began)
                yield batch
                began = time.perf_counter()

    def take_meter(self) -> Meter:
        """What the batches took that arrived since the last call."""
        meter, self._meter = self._meter, Meter()
        return meter

    def _due(self, number: int, step: int) -> str:
        workers = self._batches.num_workers
        return f"step {step}" + (f", due from worker {number % workers} of {workers}" if workers else "")


def make_loader(
    corpus: Corpus,
    planner: Planner,
    first_step: int,
    last_step: int,
    workers: int,
    *,
    rank: int = 0,
    world: int = 1,
    prefetch: int = BATCHES_WAITING,
    cache: CacheConfig | None = None,
    notice_seconds: float = NOTICE_SECONDS,
) -> BatchLoader:
    """Load rank `rank`'s slices of the steps first_step ... last_step (both included).

    Any number of workers gives the same batches; 0 reads in the calling process. At most `prefetch` batches
    per worker wait in memory. Workers are started by forkserver, since TensorStore does not survive a fork.
    Neither the loader nor its workers touch the global random state. Of a corpus in a store, what was read is
    kept in the `cache`. Who waits longer than `notice_seconds` logs for what.

    Raises SetupError while iterating, naming dataset, key and shard, if an image cannot be read.
    """
    steps = range(first_step, last_step + 1)
    loader: DataLoader[RawBatch | SetupError] = DataLoader(
        _Steps(open_reader(corpus.shards, cache), planner, steps, rank, world, notice_seconds),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=worker_context() if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    return BatchLoader(loader, steps, rank, notice_seconds)


def worker_context() -> BaseContext:
    """Workers come from a server that has imported this module once, instead of each importing torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Steps(IterableDataset[RawBatch | SetupError]):
    """The stream of one worker. A failure travels as an item: as an exception, its message would be wrapped."""

    def __init__(
        self, reader: Reader, planner: Planner, steps: range, rank: int, world: int, notice_seconds: float
    ) -> None:
        self._reader, self._planner = reader, planner
        self._steps = steps
        self._rank, self._world = rank, world
        self._notice = notice_seconds

    def __iter__(self) -> Iterator[RawBatch | SetupError]:
        worker = get_worker_info()
        mine = self._steps[worker.id :: worker.num_workers] if worker else self._steps
        try:
            yield from read_steps(self._reader, self._planner, mine, self._rank, self._world, self._notice)
        except SetupError as error:
            yield error


def _end_with_parent() -> None:
    """Wait until the process that this worker reads for has ended, also by SIGKILL, and end.

    A worker of a forkserver would live on: PyTorch watches the process that forked it, which is the server, and
    that waits for its workers.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def read_steps(
    reader: Reader,
    planner: Planner,
    steps: Iterable[int],
    rank: int,
    world: int,
    notice_seconds: float = NOTICE_SECONDS,
) -> Iterator[RawBatch]:
    """Rank `rank`'s slices of some steps, read in this process.

    Raises SetupError, naming dataset, key and shard, if an image cannot be read.
    """
    worker = get_worker_info()
    if worker:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    remote = reader if isinstance(reader, RemoteReader) else None
    stopwatch = Stopwatch(remote.traffic if remote else None)
    under_way: deque[_Reading] = deque()
    coming = iter(steps)

    def begin(step: int) -> _Reading:
        began = time.thread_time()
        plan = planner.plan(step, rank, world)
        return _Reading(reader, plan, time.thread_time() - began)

    try:
        with Watch(f"rank {rank}" + (f", worker {worker.id}" if worker else ""), notice_seconds) as watch:
            while True:
                while not under_way or (remote and _has_room(under_way)):
                    step = next(coming, None)
                    if step is None:
                        break
                    under_way.append(begin(step))
                if not under_way:
                    return
                batch = under_way.popleft().finish(watch)
                yield replace(batch, work=batch.work + Work(**stopwatch.lap()))
    finally:
        for reading in under_way:
            reading.cancel()


def _wanted(sample: SamplePlan) -> Wanted:
    image = sample.image
    return Wanted(image.shard_path, image.shard_shape, image.dtype, image.shard_index, sample.box)


def _side_by_side(
    reader: ShardReader, wanted: Sequence[Wanted], into: Sequence[npt.NDArray[Any]]
) -> Iterator[Callable[[], object]]:
    """What waits for each box, some of those behind it being under way."""
    under_way: deque[Callable[[], object]] = deque()
    for one in zip(wanted, into, strict=True):
        under_way.append(_begun(reader, *one))
        if len(under_way) == _READ_AT_ONCE:
            yield under_way.popleft()
    yield from under_way


def _begun(reader: ShardReader, wanted: Wanted, into: npt.NDArray[Any]) -> Callable[[], object]:
    """What waits for a box. What goes wrong on the way is raised then, when it is clear whose box it is."""
    try:
        return reader.begin(*wanted, into)
    except (SetupError, OSError, ValueError) as error:
        return partial(_raise, error)


def _raise(error: Exception) -> None:
    raise error


def _named(sample: SamplePlan, read: Callable[[], object]) -> None:
    image = sample.image
    try:
        read()
    except (SetupError, OSError, ValueError) as error:
        raise SetupError(f"{image.dataset}/{image.key} (shard {image.shard_path}): {error}") from error


class _Place(NamedTuple):
    """Where a box lies in the buffer of its batch."""

    shape: tuple[int, ...]
    """(C, d, h, w)"""
    dtype: np.dtype[Any]
    start: int
    """First byte."""
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.from_numpy(np.empty(0, self.dtype)).dtype


def _layout(plan: BatchPlan) -> tuple[list[_Place], int]:
    """The places of a plan's boxes, and the size of the buffer in bytes."""
    places, start = [], 0
    for sample in plan.samples:
        shape = (sample.image.shape[0], *(stop - first for first, stop in sample.box))
        dtype = np.dtype(sample.image.dtype)
        stop = start + math.prod(shape) * dtype.itemsize
        places.append(_Place(shape, dtype, start, stop))
        start = -(-stop // _ALIGNMENT) * _ALIGNMENT
    return places, start
