"""From plans to voxels: workers read and decode the boxes of a step; nothing else happens on the CPU.

Worker w of W handles the steps first + w, first + w + W, ... and hands each over as one message, so steps
arrive in order whatever W is. A batch crosses the process border as one block of shared memory.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from catalog.corpus import Corpus
from catalog.errors import SetupError
from shards.read import ShardReader
from training.images import StoredImage
from training.plan import BatchPlan, Planner, SamplePlan

_ALIGNMENT = 16  # bytes: any stored dtype may start at a multiple of it
_READ_AT_ONCE = 8
"""Boxes under way in one process: while one is decoded, the disk reads the next. Each holds some MB."""


@dataclass(frozen=True, slots=True, eq=False)
class RawBatch:
    """One rank's boxes of a step, as stored, and the plan that says what to make of them."""

    plan: BatchPlan
    buffer: Tensor
    """All boxes one after the other, uint8, on the CPU or, after `to`, on a device."""

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

    def pin_memory(self) -> RawBatch:
        """The same in page-locked memory, from which copies to a GPU overlap with its work."""
        return RawBatch(self.plan, self.buffer.pin_memory())

    def to(self, device: torch.device) -> RawBatch:
        """The same with the boxes on a device, in one copy."""
        return RawBatch(self.plan, self.buffer.to(device, non_blocking=True))


def read_batch(reader: ShardReader, plan: BatchPlan) -> RawBatch:
    """Read the boxes of a plan.

    Raises SetupError, naming dataset, key and shard, if a box cannot be read.
    """
    places, size = _layout(plan)
    buffer = torch.empty(size, dtype=torch.uint8)
    raw = buffer.numpy()
    under_way: deque[Callable[[], None]] = deque()
    for sample, place in zip(plan.samples, places, strict=True):
        if len(under_way) == _READ_AT_ONCE:
            under_way.popleft()()
        under_way.append(
            _begin(reader, sample, raw[place.start : place.stop].view(place.dtype).reshape(place.shape))
        )
    for finish in under_way:
        finish()
    return RawBatch(plan, buffer)


class BatchLoader:
    """The batches of steps first ... last, in order. Every iteration starts anew, with fresh workers."""

    def __init__(self, batches: DataLoader[RawBatch | SetupError], steps: int) -> None:
        self._batches = batches
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[RawBatch]:
        for batch in self._batches:
            if isinstance(batch, SetupError):
                raise batch
            yield batch


def make_loader(
    corpus: Corpus,
    planner: Planner,
    first_step: int,
    last_step: int,
    workers: int,
    *,
    rank: int = 0,
    world: int = 1,
    prefetch: int = 2,
) -> BatchLoader:
    """Load rank `rank`'s slices of the steps first_step ... last_step (both included).

    Any number of workers gives the same batches; 0 reads in the calling process. At most `prefetch` batches
    per worker wait in memory. Workers are started by forkserver, since TensorStore does not survive a fork.
    Neither the loader nor its workers touch the global random state.

    Raises SetupError while iterating, naming dataset, key and shard, if an image cannot be read.
    """
    steps = range(first_step, last_step + 1)
    loader: DataLoader[RawBatch | SetupError] = DataLoader(
        _Steps(corpus, planner, steps, rank, world),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=_worker_context() if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    return BatchLoader(loader, len(steps))


def _worker_context() -> BaseContext:
    """Workers come from a server that has imported this module once, instead of each importing torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Steps(IterableDataset[RawBatch | SetupError]):
    """The stream of one worker. A failure travels as an item: as an exception, its message would be wrapped."""

    def __init__(self, corpus: Corpus, planner: Planner, steps: range, rank: int, world: int) -> None:
        self._reader = ShardReader(corpus.shards)
        self._planner = planner
        self._steps = steps
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[RawBatch | SetupError]:
        worker = get_worker_info()
        mine = self._steps[worker.id :: worker.num_workers] if worker else self._steps
        for step in mine:
            try:
                yield read_batch(self._reader, self._planner.plan(step, self._rank, self._world))
            except SetupError as error:
                yield error
                return


def _begin(reader: ShardReader, sample: SamplePlan, into: npt.NDArray[Any]) -> Callable[[], None]:
    image = sample.image
    with _naming(image):
        finish = reader.begin(
            image.shard_path, image.shard_shape, image.dtype, image.shard_index, sample.box, into
        )
    return _naming(image)(finish)


@contextmanager
def _naming(image: StoredImage) -> Iterator[None]:
    try:
        yield
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
