"""Boxes of an array by zarr-python, where TensorStore cannot be imported: the same voxels, more slowly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.layout import SHARD_FILE, Shape, array_chunk, chunk_bytes, chunk_grid


def open_with_zarr(
    folder: Path, shape: Shape, dtype: str, *, is_pack: bool
) -> Callable[[tuple[slice, ...], npt.NDArray[Any]], Callable[[], object]]:
    """What starts to read boxes of the array in `folder`, as `shards.read.Opened`; it reads at once.

    `shape` and `dtype` are the catalog's. It and what it returns raise ValueError if the array is damaged or
    not what the catalog says, FileNotFoundError if a file is missing, OSError if one cannot be read.
    """
    import zarr

    grid = chunk_grid(shape, array_chunk(shape, is_pack=is_pack))
    array = zarr.open_array(folder, mode="r", zarr_format=3)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"it holds {array.dtype} {array.shape} where the catalog says {dtype} {shape}")

    def begin(where: tuple[slice, ...], into: npt.NDArray[Any]) -> Callable[[], object]:
        chunk_bytes(folder / SHARD_FILE, grid)  # zarr-python takes what is missing for background
        try:
            into[...] = array[where]
        except RuntimeError as error:  # of the codec
            raise ValueError(str(error)) from error
        return lambda: None

    return begin
