"""Voxels to disk: an array is there whole, under its name, or not at all."""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.write import sync
from shards.layout import (
    METADATA_FILE,
    PROFILES,
    SHARD_FILE,
    TEMPORARY_PREFIX,
    Profile,
    Shape,
    array_metadata,
    chunk_bytes,
    chunk_grid,
    dataset_folder,
    pack_chunk,
    volume_chunk,
)
from shards.read import context, refuse_fork, system_error


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """Where an array lies and what it takes: the shard columns of the catalog."""

    path: str
    """Relative to the shards folder."""
    shape: Shape
    """(C, D, H, W) of a volume, (N, C, H, W) of a pack."""
    stored_bytes: list[int]
    """Compressed bytes of each image: one number for a volume, N for a pack."""


def write_volume(
    shards_root: Path, name: str, voxels: npt.NDArray[Any], profile: Profile = "fast"
) -> StoredArray:
    """Write one volume (C, D, H, W) of integers or floats under `name` (see `array_name`).

    The same voxels give the same bytes. Takes about twice the size of `voxels` in memory. A complete array of
    that name is kept as it is, in whatever profile: the name stands for its content. Raises OSError
    if the disk is full or refuses, and leaves nothing behind then.
    """
    if voxels.ndim != 4:
        raise ValueError(f"{name}: a volume has the axes (C, D, H, W), got the shape {voxels.shape}")
    sizes = _write(shards_root / name, voxels, volume_chunk(voxels.shape), profile)
    return StoredArray(path=name, shape=voxels.shape, stored_bytes=[int(sizes.sum())])


def write_pack(
    shards_root: Path, name: str, images: Sequence[npt.NDArray[Any]], profile: Profile = "fast"
) -> StoredArray:
    """Write 2-D images (C, 1, H, W) of one dtype and one C as a pack (N, C, H, W).

    H and W are those of the largest; the others are padded with 0 at the end of each axis, and the catalog
    keeps their true sizes. Otherwise as `write_volume`.
    """
    kinds = {(image.dtype, image.shape[:2]) for image in images}
    if len(kinds) != 1 or any(image.ndim != 4 or image.shape[1] != 1 for image in images):
        raise ValueError(f"{name}: a pack holds images (C, 1, H, W) of one dtype and one C, got {kinds}")
    height, width = (max(image.shape[axis] for image in images) for axis in (2, 3))
    pack = np.zeros((len(images), images[0].shape[0], height, width), images[0].dtype)
    for slot, image in zip(pack, images, strict=True):
        slot[:, : image.shape[2], : image.shape[3]] = image[:, 0]
    sizes = _write(shards_root / name, pack, pack_chunk(pack.shape), profile)
    return StoredArray(path=name, shape=pack.shape, stored_bytes=sizes.ravel().tolist())


def remove_leftovers(shards_root: Path, dataset: str) -> None:
    """Delete what killed writers left of a dataset. Only while no other writer of that dataset runs."""
    for leftover in sorted((shards_root / dataset_folder(dataset)).glob(f"{TEMPORARY_PREFIX}*")):
        shutil.rmtree(leftover)


def _write(target: Path, voxels: npt.NDArray[Any], chunk: Shape, profile: Profile) -> npt.NDArray[np.int64]:
    """Bytes of the inner chunks of the array that now lies at `target`."""
    if voxels.dtype.kind not in "iuf" or voxels.size == 0:
        raise ValueError(f"{target}: cannot store {voxels.dtype} of the shape {voxels.shape}")
    kept = _complete(target, voxels.shape, voxels.dtype, chunk)
    if kept is not None:
        return kept
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(target.parent.parent)
    temporary = _temporary(target)
    try:
        _encode(temporary, voxels, chunk, profile)
        for path in (temporary / METADATA_FILE, temporary / SHARD_FILE, temporary):
            sync(path)
        sizes = _complete(temporary, voxels.shape, voxels.dtype, chunk)
        if sizes is None:
            raise OSError(f"{target}: the array just written to {temporary} does not read back")
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Something lies there: the same content, which another process just finished, or a ruin.
            kept = _complete(target, voxels.shape, voxels.dtype, chunk)
            if kept is not None:
                return kept
            ruin = _temporary(target)
            target.rename(ruin)
            temporary.rename(target)
            shutil.rmtree(ruin)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sizes


def _temporary(target: Path) -> Path:
    return target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


def _complete(target: Path, shape: Shape, dtype: npt.DTypeLike, chunk: Shape) -> npt.NDArray[np.int64] | None:
    """Bytes of the inner chunks if `target` is a whole array of this shape and dtype, else None."""
    try:
        found = json.loads((target / METADATA_FILE).read_bytes())
        sizes = chunk_bytes(target / SHARD_FILE, chunk_grid(shape, chunk))
    except (FileNotFoundError, ValueError):
        return None
    known = (array_metadata(shape, dtype, chunk, profile) for profile in PROFILES)
    return sizes if any(found == metadata for metadata in known) else None


def _encode(folder: Path, voxels: npt.NDArray[Any], chunk: Shape, profile: Profile) -> None:
    import tensorstore  # 50 ms that callers who write nothing need not pay

    refuse_fork()
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        "metadata": array_metadata(voxels.shape, voxels.dtype, chunk, profile),
        "create": True,
        # Nothing is left out, so that a reader can tell a lost chunk from background.
        "store_data_equal_to_fill_value": True,
    }
    native = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    try:
        array = tensorstore.open(spec, context=context()).result()
        array.write(native, can_reference_source_data_indefinitely=True).result()
    except ValueError as error:
        refused = system_error(error, folder)
        if refused is None:
            raise
        raise refused from error
