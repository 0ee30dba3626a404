"""Voxels to disk: an array is there whole, under its name, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

from catalog.durable import sync
from catalog.store import Location, RemotePath
from shards.check import checked_digest, metadata_forms
from shards.layout import (
    METADATA_FILE,
    PROFILES,
    SHARD_FILE,
    TEMPORARY_PREFIX,
    Profile,
    Shape,
    array_metadata,
    chunk_grid,
    dataset_folder,
    pack_chunk,
    volume_chunk,
)

_WRITE_BUFFER = 1 << 20  # bytes: one call of the operating system for some twenty chunks


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """Where an array lies and what it takes: the shard columns of the catalog."""

    path: str
    """Relative to the shards folder."""
    shape: Shape
    """(C, D, H, W) of a volume, (N, C, H, W) of a pack."""
    stored_bytes: list[int]
    """Compressed bytes of each image: one number for a volume, N for a pack."""
    sha256: str
    """Of the shard file, hashed while it was written."""


def write_volume(
    shards_root: Location, name: str, voxels: npt.NDArray[Any], profile: Profile = "fast"
) -> StoredArray:
    """Write one volume (C, D, H, W) of integers or floats, of any strides, under `name` (see `array_name`).

    The same voxels give the same bytes. Chunks are encoded one by one: no copy of `voxels` is made. A complete
    array of that name whose checksums agree is kept as it is, in whatever profile: the name stands for its
    content. Raises OSError if the disk is full or refuses, or StoreError if an object store does, and leaves
    nothing behind then that a reader could take for an array.
    """
    if voxels.ndim != 4:
        raise ValueError(f"{name}: a volume has the axes (C, D, H, W), got the shape {voxels.shape}")
    chunk = volume_chunk(voxels.shape)
    array = _Array(shards_root / name, voxels.shape, voxels.dtype, chunk, profile)
    sizes, sha256 = _write(array, _boxes(voxels, chunk))
    return StoredArray(path=name, shape=voxels.shape, stored_bytes=[int(sizes.sum())], sha256=sha256)


def write_pack(
    shards_root: Location, name: str, images: Sequence[npt.NDArray[Any]], profile: Profile = "fast"
) -> StoredArray:
    """Write 2-D images (C, 1, H, W) of one dtype and one C as a pack (N, C, H, W).

    H and W are those of the largest; the others are padded with 0 at the end of each axis, and the catalog
    keeps their true sizes. Otherwise as `write_volume`.
    """
    kinds = {(image.dtype, image.shape[:2]) for image in images}
    if len(kinds) != 1 or any(image.ndim != 4 or image.shape[1] != 1 for image in images):
        raise ValueError(f"{name}: a pack holds images (C, 1, H, W) of one dtype and one C, got {kinds}")
    height, width = (max(image.shape[axis] for image in images) for axis in (2, 3))
    shape = (len(images), images[0].shape[0], height, width)
    array = _Array(shards_root / name, shape, images[0].dtype, pack_chunk(shape), profile)
    sizes, sha256 = _write(array, (image[np.newaxis, :, 0] for image in images))
    return StoredArray(path=name, shape=shape, stored_bytes=sizes.ravel().tolist(), sha256=sha256)


def write_chunks(
    shards_root: Location,
    name: str,
    shape: Shape,
    dtype: npt.DTypeLike,
    chunk: Shape,
    profile: Profile,
    chunks: Iterable[npt.NDArray[Any]],
) -> tuple[npt.NDArray[np.int64], str]:
    """Write an array from its inner chunks in the order of the index; otherwise as `write_volume`.

    Returns the bytes of each inner chunk (one number for each place of the chunk grid) and the sha256 of the
    shard file. What `chunks` raises ends the writing, and nothing is left behind.
    """
    return _write(_Array(shards_root / name, shape, np.dtype(dtype), chunk, profile), chunks)


def encode_chunk(chunk: npt.NDArray[Any], profile: Profile) -> bytes:
    """A C-contiguous inner chunk as the profile's codec stores it."""
    import imagecodecs  # 50 ms that callers who write nothing need not pay

    codec: dict[str, Any] = PROFILES[profile]
    # The array, though the type asks for bytes: of those it shuffles single ones, whatever typesize says.
    encoded = imagecodecs.blosc_encode(
        chunk,  # type: ignore[arg-type]
        level=codec["clevel"],
        compressor=codec["cname"],
        shuffle=codec["shuffle"],
        typesize=chunk.itemsize,
        numthreads=1,
    )
    return bytes(encoded)


def remove_leftovers(shards_root: Path, dataset: str) -> None:
    """Delete what killed writers left of a dataset. Only while no other writer of that dataset runs."""
    for leftover in sorted((shards_root / dataset_folder(dataset)).glob(f"{TEMPORARY_PREFIX}*")):
        shutil.rmtree(leftover)


_Written: TypeAlias = tuple[npt.NDArray[np.int64], str]
"""Bytes of the inner chunks, and sha256 of the shard file."""


@dataclass(frozen=True)
class _Array:
    """What is to lie where."""

    target: Location
    shape: Shape
    dtype: np.dtype[Any]
    chunk: Shape
    profile: Profile


def _boxes(voxels: npt.NDArray[Any], chunk: Shape) -> Iterator[npt.NDArray[Any]]:
    """Views of the inner chunks in the order of the index, smaller at the ends of the axes."""
    for position in np.ndindex(*chunk_grid(voxels.shape, chunk)):
        yield voxels[tuple(slice(at * step, (at + 1) * step) for at, step in zip(position, chunk, strict=True))]


def _write(array: _Array, boxes: Iterable[npt.NDArray[Any]]) -> _Written:
    """What now lies at the array's target; `boxes` hold what goes into its inner chunks."""
    target = array.target
    if array.dtype.kind not in "iuf" or 0 in array.shape:
        raise ValueError(f"{target}: cannot store {array.dtype} of the shape {array.shape}")
    kept = _complete(target, array)
    if kept is not None:
        return kept
    if isinstance(target, RemotePath):
        return _upload(target, array, boxes)
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(target.parent.parent)
    temporary = _temporary(target)
    try:
        written = _encode(temporary, array, boxes)
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Something lies there: the same content, which another process just finished, or a ruin.
            kept = _complete(target, array)
            if kept is not None:
                return kept
            ruin = _temporary(target)
            target.rename(ruin)
            temporary.rename(target)
            shutil.rmtree(ruin)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _upload(target: RemotePath, array: _Array, boxes: Iterable[npt.NDArray[Any]]) -> _Written:
    """Encode here, then send the files. The metadata come last, for an array is there when they are."""
    with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
        encoded = Path(folder) / "array"
        written = _encode(encoded, array, boxes)
        for name in (SHARD_FILE, METADATA_FILE):
            (target / name).write(encoded / name)
    return written


def _temporary(target: Path) -> Path:
    return target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


def _complete(target: Location, array: _Array) -> _Written | None:
    """What lies at `target` if it is a whole and sound array of this shape and dtype, else None."""
    try:
        if (target / METADATA_FILE).read_bytes() not in metadata_forms(
            array.shape, array.dtype.name, array.chunk
        ):
            return None
        return checked_digest(target / SHARD_FILE, chunk_grid(array.shape, array.chunk))
    except (FileNotFoundError, ValueError):
        return None


def _encode(folder: Path, array: _Array, boxes: Iterable[npt.NDArray[Any]]) -> _Written:
    """Write metadata and shard into a new `folder`, forced to disk.

    Not by TensorStore, which holds all chunks of a shard, and their encoded bytes, before it writes the first.
    """
    metadata = array_metadata(array.shape, array.dtype, array.chunk, array.profile)
    try:
        folder.mkdir()
        with _forced(folder / METADATA_FILE) as file:
            file.write(json.dumps(metadata).encode())
        with _forced(folder / SHARD_FILE) as file:
            written = _write_shard(file, array, boxes)
        sync(folder)
    except OSError as error:
        if error.filename is not None:
            raise
        # A failed write, unlike a failed open, does not name its file.
        raise OSError(error.errno, error.strerror, str(folder)) from error
    return written


@contextmanager
def _forced(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on disk when it is closed."""
    with path.open("wb", buffering=_WRITE_BUFFER) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_shard(file: BinaryIO, array: _Array, boxes: Iterable[npt.NDArray[Any]]) -> _Written:
    """Every inner chunk with its crc32c, then the index of (offset, bytes) and its own.

    Nothing is left out, so that a reader can tell a lost chunk from background.
    """
    grid = chunk_grid(array.shape, array.chunk)
    index = np.empty((*grid, 2), "<u8")
    entries = index.reshape(-1, 2)
    chunk = np.zeros(array.chunk, array.dtype.newbyteorder("<"))
    offset = 0
    digest = hashlib.sha256()

    def write(data: bytes) -> int:
        checksum: bytes = google_crc32c.value(data).to_bytes(4, "little")
        digest.update(data)
        digest.update(checksum)
        return file.write(data) + file.write(checksum)

    for number, box in enumerate(boxes):
        if box.shape != chunk.shape:
            chunk[...] = 0
        chunk[tuple(slice(size) for size in box.shape)] = box
        size = write(encode_chunk(chunk, array.profile))
        entries[number] = offset, size
        offset += size
    write(index.tobytes())
    return index[..., 1].astype(np.int64), digest.hexdigest()
