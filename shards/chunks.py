"""Which inner chunks a box touches, where they lie in the shard file, and what is in them.

For who fetches the bytes of a shard: TensorStore, which reads shards in folders, knows all this itself.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from shards.layout import Shape, chunk_grid, pack_chunk, volume_chunk
from shards.read import Box

_CHECKSUM_BYTES = 4
_RESIDUE = 0x48674BC7
"""The crc32c of whatever ends with its own crc32c: so nothing has to be cut off, which would copy it."""


class Wanted(NamedTuple):
    """A box of a stored image, in the catalog's terms."""

    path: str
    """shard_path: of the array, relative to the shards folder."""
    shape: Shape
    """shard_shape: (C, D, H, W) of a volume, (N, C, H, W) of a pack."""
    dtype: str
    """stored_dtype"""
    slot: int | None
    """shard_index: which image of a pack; None for a volume."""
    box: Box

    @property
    def chunk(self) -> Shape:
        """Shape of an inner chunk."""
        return volume_chunk(self.shape) if self.slot is None else pack_chunk(self.shape)

    @property
    def chunk_count(self) -> int:
        """Inner chunks of the whole array."""
        return math.prod(chunk_grid(self.shape, self.chunk))

    @property
    def region(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) along each axis of the array.

        Raises ValueError if the box or the index lies outside it.
        """
        region = ((0, self.shape[0]), *self.box)
        extent = self.shape
        if self.slot is not None:
            region = ((self.slot, self.slot + 1), (0, self.shape[1]), *self.box[1:])
            inside = self.box[0] == (0, 1)
        else:
            inside = True
        inside &= all(0 <= start < stop <= size for (start, stop), size in zip(region, extent, strict=True))
        if not inside:
            where = f"box {self.box} of image {self.slot}"
            raise ValueError(f"{self.path}: {where} is not inside the array of shape {self.shape}")
        return region

    def empty(self) -> npt.NDArray[Any]:
        """An array (C, d, h, w) for the box. ValueError as `region`."""
        shape = [stop - start for start, stop in self.region]
        return np.empty(shape if self.slot is None else [shape[1], 1, *shape[2:]], self.dtype)


class Piece(NamedTuple):
    """What a box takes from one inner chunk."""

    number: int
    """Of the chunk, in the order of the index."""
    source: tuple[slice, ...]
    """In the chunk."""
    target: tuple[slice, ...]
    """In the region."""


def pieces(wanted: Wanted) -> list[Piece]:
    """The inner chunks that a box touches, ascending.

    Raises ValueError if the box or the index lies outside the array.
    """
    axes = []
    stride = 1
    chunk = wanted.chunk
    sizes = zip(wanted.region, chunk, chunk_grid(wanted.shape, chunk), strict=True)
    for (start, stop), step, count in reversed(list(sizes)):
        along = []
        for at in range(start // step, -(-stop // step)):
            low, high = max(start, at * step), min(stop, (at + 1) * step)
            source, target = slice(low - at * step, high - at * step), slice(low - start, high - start)
            along.append((at * stride, source, target))
        axes.append(along)
        stride *= count
    return [
        Piece(sum(number), source, target)
        for number, source, target in (zip(*parts, strict=True) for parts in itertools.product(*axes[::-1]))
    ]


def index_bytes(chunk_count: int) -> int:
    """Size of the index at the end of a shard file."""
    return 16 * chunk_count + _CHECKSUM_BYTES


def parse_index(end: bytes, chunk_count: int) -> npt.NDArray[np.int64]:
    """(start, stop) of every chunk in the shard file, (chunk_count, 2), from the last bytes of that file.

    Raises ValueError if they are no sound index of so many chunks.
    """
    if len(end) != index_bytes(chunk_count) or not is_sound(end):
        raise ValueError("its index is damaged, or it has another number of chunks than the catalog says")
    places = np.frombuffer(end[:-_CHECKSUM_BYTES], "<u8").reshape(chunk_count, 2).astype(np.int64)
    starts, stops = places[:, 0], places.sum(axis=1)
    if starts[0] or (starts[1:] != stops[:-1]).any():
        raise ValueError("its chunks do not follow each other as its index tells")
    return np.stack([starts, stops], axis=1)


def is_sound(encoded: bytes) -> bool:
    """Whether the checksum at the end of a chunk, or of an index, agrees."""
    return len(encoded) > _CHECKSUM_BYTES and google_crc32c.value(encoded) == _RESIDUE


def decode(encoded: bytes, shape: Shape, dtype: str) -> npt.NDArray[Any]:
    """The voxels of a chunk whose checksum agrees, read-only. Other threads run meanwhile.

    Raises ValueError if they are not of this shape and type.
    """
    import imagecodecs  # a listing of the catalog need not pay for it

    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    try:
        content = imagecodecs.blosc_decode(encoded, numthreads=1)
    except imagecodecs.BloscError as error:
        raise ValueError(f"a chunk cannot be decoded ({error})") from error
    if len(content) != size:
        raise ValueError(f"a chunk holds {len(content)} bytes where the catalog says {size}")
    return np.frombuffer(content, kind.newbyteorder("<")).reshape(shape)
