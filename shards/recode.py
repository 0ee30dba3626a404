"""An array in another codec profile: the same voxels in other bytes, chunk by chunk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.store import Location
from shards.check import metadata_forms, proven_chunks
from shards.layout import (
    METADATA_FILE,
    SHARD_FILE,
    Profile,
    Shape,
    array_chunk,
    chunk_bytes,
    chunk_grid,
    in_profile,
    refuse_newer_layout,
)
from shards.write import StoredArray, encode_chunk, write_chunks

_RUNS = 4


@dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """What the catalog tells of an array."""

    path: str
    """Relative to the shards folder."""
    shape: Shape
    """(C, D, H, W) of a volume, (N, C, H, W) of a pack."""
    dtype: str
    is_pack: bool
    sha256: str | None
    """Of the shard file; None if it was written before that was recorded."""

    @property
    def chunk(self) -> Shape:
        return array_chunk(self.shape, is_pack=self.is_pack)

    @property
    def grid(self) -> Shape:
        return chunk_grid(self.shape, self.chunk)

    @property
    def decoded_bytes(self) -> int:
        """Of all its inner chunks, with what pads them."""
        return int(np.prod(self.grid) * np.prod(self.chunk)) * np.dtype(self.dtype).itemsize


def recode(shards_root: Location, array: ArrayRecord, profile: Profile) -> StoredArray:
    """Write an array under its name in `profile`, and leave it as it is. It is held one inner chunk at a time.

    The bytes are those that ingest gives the same voxels in that profile. Every byte that is read is proven. A
    complete array of the new name is kept.

    Raises SetupError if the array is of a later layout, ValueError if it is damaged or not what `array` says,
    OSError if it cannot be read or the new one cannot be written.
    """
    target = in_profile(array.path, profile)
    sizes, sha256 = write_chunks(
        shards_root, target, array.shape, array.dtype, array.chunk, profile, _chunks(shards_root, array)
    )
    stored = sizes.reshape(array.shape[0] if array.is_pack else 1, -1).sum(axis=1).tolist()
    return StoredArray(path=target, shape=array.shape, stored_bytes=stored, sha256=sha256)


@dataclass(frozen=True)
class Sample:
    """What re-encoding some inner chunks of an array gave."""

    decoded: int
    """Bytes of the chunks, decoded."""
    before: int
    """As they are stored."""
    after: int
    """As the other profile stores them."""
    seconds: float
    """CPU time."""


def sample(shards_root: Location, array: ArrayRecord, profile: Profile, decoded_bytes: int) -> Sample:
    """Re-encode about `decoded_bytes` of an array, in runs spread over it. Nothing is written.

    Raises as `recode`, and FileNotFoundError if the array is missing.
    """
    _refuse_unknown(shards_root / array.path, array)
    shard_file = shards_root / array.path / SHARD_FILE
    sizes = chunk_bytes(shard_file, array.grid).ravel()
    offsets = np.cumsum(sizes) - sizes
    of_one = array.decoded_bytes // len(sizes)
    length = max(1, decoded_bytes // of_one // _RUNS)
    starts = np.linspace(0, max(0, len(sizes) - length), _RUNS).astype(int)
    chosen = sorted({number for start in starts for number in range(start, min(start + length, len(sizes)))})
    before = after = 0
    start = time.process_time()
    with shard_file.open("rb") as file:
        for number in chosen:
            file.seek(int(offsets[number]))
            encoded = file.read(int(sizes[number]))
            before += len(encoded)
            after += len(encode_chunk(_decoded(encoded[:-4], array), profile)) + 4
    return Sample(of_one * len(chosen), before, after, time.process_time() - start)


def _chunks(shards_root: Location, array: ArrayRecord) -> Iterator[npt.NDArray[Any]]:
    _refuse_unknown(shards_root / array.path, array)
    shard_file = shards_root / array.path / SHARD_FILE
    digest = hashlib.sha256()
    for encoded in proven_chunks(shard_file, array.grid, digest.update):
        yield _decoded(encoded, array)
    if array.sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"{shard_file} does not have the sha256 that the catalog tells")


def _decoded(encoded: bytes, array: ArrayRecord) -> npt.NDArray[Any]:
    import imagecodecs  # 50 ms that a listing need not pay

    raw = imagecodecs.blosc_decode(encoded, numthreads=1)
    return np.frombuffer(raw, np.dtype(array.dtype).newbyteorder("<")).reshape(array.chunk)


def _refuse_unknown(folder: Location, array: ArrayRecord) -> None:
    content = (folder / METADATA_FILE).read_bytes()
    if content not in metadata_forms(array.shape, array.dtype, array.chunk):
        refuse_newer_layout(folder, content)
        raise ValueError(f"{folder / METADATA_FILE} is not that of {array.dtype} {array.shape}")
