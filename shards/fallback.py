"""Boxes of an array by zarr-python, where TensorStore cannot be imported: the same voxels, more slowly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.store import Location, RemotePath, store_error, zarr_store
from shards.layout import SHARD_FILE, Shape, array_chunk, chunk_bytes, chunk_grid


def open_with_zarr(
    folder: Location, shape: Shape, dtype: str, *, is_pack: bool
) -> Callable[[tuple[slice, ...]], npt.NDArray[Any]]:
    """What reads boxes of the array in `folder`, C-contiguous. `shape` and `dtype` are the catalog's.

    It and what it returns raise ValueError if the array is damaged or not what the catalog says,
    FileNotFoundError if a file is missing, OSError if one cannot be read.
    """
    import zarr

    grid = chunk_grid(shape, array_chunk(shape, is_pack=is_pack))
    if isinstance(folder, RemotePath):
        array = _asked(folder, lambda: zarr.open_array(zarr_store(folder), path=folder.key, mode="r"))
    else:
        array = zarr.open_array(folder, mode="r", zarr_format=3)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"it holds {array.dtype} {array.shape} where the catalog says {dtype} {shape}")

    def read(where: tuple[slice, ...]) -> npt.NDArray[Any]:
        chunk_bytes(folder / SHARD_FILE, grid)  # zarr-python takes what is missing for background
        try:
            return np.ascontiguousarray(_asked(folder, lambda: array[where]))
        except RuntimeError as error:  # of the codec
            raise ValueError(str(error)) from error

    return read


def _asked(folder: Location, request: Callable[[], Any]) -> Any:
    if not isinstance(folder, RemotePath):
        return request()
    from obstore.exceptions import BaseError

    try:
        return request()
    except BaseError as error:
        raise store_error(folder, str(error)) from None
