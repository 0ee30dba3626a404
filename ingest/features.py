"""What is kept of an image to find it again: a hash of its values, and small pictures of its middle.

Both are pure functions of the stored voxels, in exact arithmetic: every machine gets the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.duplicates.pictures import FEATURES_VERSION, FLAT_SIDE, LEVELS, SLAB_SIDE, pack
from ingest.volume import Voxels

_WHOLE_BYTES = 1 << 20
"""Up to so many bytes an image is hashed as one string; of a larger one, the checksums of its blocks are."""
_BLOCK_BYTES = 1 << 16
_SIGNIFICANT_DIGITS = 7
"""Of slope and smallest value: headers hold them in float32."""
_GATHERED = 32
_PROBED = 1 << 10
"""Values that show, of almost every image, that they have no common step but 1."""

_GREY_LEVELS = 1023
_SAMPLES = 4
"""Voxels along an axis that are looked at for each cell of a picture, at most."""
_SLICES = 9
"""Planes of a volume that make a slab, at most."""
_SLAB = 0.3
"""Thickness of a slab as a share of its axis; the weight of its planes falls from the middle to both faces."""
_SLAB_WEIGHT = 16
_OUTSIDE = 0.01
"""Share of the cells that may lie beyond either end of a picture's grey scale."""

_Cells = npt.NDArray[np.float64]
"""Whole numbers, so small that sums of their products are exact in whatever order."""


@dataclass(frozen=True)
class Features:
    """What features.parquet holds of an image."""

    voxel_hash: bytes
    pictures: bytes
    """As `catalog.duplicates.pictures.pack` has them."""

    def columns(self) -> dict[str, Any]:
        """Those of FEATURES_SCHEMA but dataset and key."""
        return {
            "features_version": FEATURES_VERSION,
            "voxel_hash": self.voxel_hash,
            "pictures": self.pictures,
        }


def features(voxels: Voxels, row: Mapping[str, Any]) -> Features:
    """Features of an image as it is stored: the same at ingest and of what a shard gives back.

    Args:
        voxels: (C, D, H, W), any strides. An image with D = 1 counts as 2-D.
        row: slope, intercept, window_low and window_high of the catalog.
    """
    slope, intercept = row["slope"], row["intercept"]
    low, high = ((row[name] - intercept) / slope for name in ("window_low", "window_high"))
    return Features(voxel_hash(voxels, slope, intercept), pack(pictures(voxels, (low, high))))


def voxel_hash(voxels: Voxels, slope: float, intercept: float) -> bytes:
    """16 bytes, equal for images of equal shape and equal real values, however these are stored.

    Integers are hashed as multiples of their greatest common step above their minimum, floats as float32:
    dtype, slope and intercept do not matter as such. It is BLAKE2b of all values, or, beyond 1 MiB, of the
    CRC-32 of each 64 KiB of them, which runs at the speed of memory and tells apart whatever no forger made.
    """
    from isal import isal_zlib  # twenty times the speed of zlib

    whole = voxels.dtype.kind in "iu"
    lowest, highest = (int(voxels.min()), int(voxels.max())) if whole else (0, 0)
    step = _common_step(voxels, lowest) if whole else 1
    kind = np.dtype(_unsigned((highest - lowest) // step) if whole else "<f4")
    scale = [
        f"{value:.{_SIGNIFICANT_DIGITS}g}"
        for value in (slope * step * (highest > lowest), slope * lowest + intercept)
    ]
    digest = hashlib.blake2b(f"{kind.str} {voxels.shape} {scale if whole else ''}\0".encode(), digest_size=16)
    is_small = voxels.size * kind.itemsize <= _WHOLE_BYTES
    for part in _parts(voxels):
        if whole:
            # Modulo the size of the type, into which the difference fits.
            unsigned = np.dtype(f"u{part.dtype.itemsize}")
            values = part.view(unsigned) - np.array(lowest, part.dtype).view(unsigned)
            values = values if step == 1 else values // unsigned.type(step)
        else:
            values = (slope * part.astype(np.float64) + intercept).astype(kind) + kind.type(0)  # no -0
        data = np.ascontiguousarray(values, kind).data.cast("B")
        if is_small:
            digest.update(data)
            continue
        for start in range(0, len(data), _BLOCK_BYTES):
            digest.update(isal_zlib.crc32(data[start : start + _BLOCK_BYTES]).to_bytes(4, "little"))
    return digest.digest()


def pictures(voxels: Voxels, window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """The pictures of an image: (1, FLAT_SIDE, FLAT_SIDE), or (3, SLAB_SIDE, SLAB_SIDE) of a volume.

    A cell holds the level, below LEVELS, of the mean of its voxels, half by value and half by rank among the
    cells: another window moves it little. The slabs lie across D, H and W.
    """
    if voxels.shape[1] == 1:
        return _levels(_shrunk(_grey(voxels[:, 0], window, FLAT_SIDE), FLAT_SIDE))[np.newaxis]
    slabs = (_slab(voxels[0], axis, window) for axis in range(3))
    return np.stack([_levels(_shrunk(slab, SLAB_SIDE)) for slab in slabs])


def _parts(voxels: Voxels) -> Iterator[Voxels]:
    """The planes of each channel, as many at a time as a processor's cache holds. Cut the same for all
    types."""
    planes = max(1, _WHOLE_BYTES // (2 * math.prod(voxels.shape[2:])))
    # Planes across the order of memory are gathered many at once: each cache line then serves all of them.
    gathered = planes if abs(voxels.strides[-1]) == voxels.itemsize else -(-_GATHERED // planes) * planes
    for channel in voxels:
        for first in range(0, len(channel), gathered):
            slab = channel[first : first + gathered]
            slab = slab if gathered == planes else np.ascontiguousarray(slab)
            for start in range(0, len(slab), planes):
                yield slab[start : start + planes]


def _common_step(voxels: Voxels, lowest: int) -> int:
    """The greatest number that divides all differences from the lowest value; 1 where there are none."""
    middle = voxels[0, voxels.shape[1] // 2].ravel()
    step = _divisor(middle[:: max(1, middle.size // _PROBED)], lowest)
    if step != 1:
        step = 0
        for part in _parts(voxels):
            step = math.gcd(step, _divisor(part, lowest))
            if step == 1:
                break
    return step or 1


def _divisor(values: Voxels, lowest: int) -> int:
    if values.dtype.itemsize == 8:  # differences may not fit
        return math.gcd(*(int(value) - lowest for value in np.unique(values)))
    return int(np.gcd.reduce(values.astype(np.int64).ravel() - lowest))


def _unsigned(largest: int) -> str:
    return next(name for name in ("<u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(name).max)


def _slab(volume: Voxels, axis: int, window: tuple[float, float]) -> _Cells:
    """The weighted sum of planes (two axes left) around the middle of `volume` (D, H, W)."""
    middle, half = (volume.shape[axis] - 1) / 2, max(_SLAB * volume.shape[axis] / 2, 0.5)
    first, last = math.ceil(middle - half), math.floor(middle + half)
    count = min(_SLICES, last - first + 1)
    places = [
        first + (2 * number * (last - first) + count - 1) // (2 * max(count - 1, 1)) for number in range(count)
    ]
    total = np.zeros((), np.float64)
    for place in places:
        weight = round(_SLAB_WEIGHT * (1 - abs(place - middle) / (half + 0.5)))
        plane = volume[(slice(None),) * axis + (place,)]
        total = total + weight * _grey(plane[np.newaxis], window, SLAB_SIDE)
    return total


def _grey(plane: Voxels, window: tuple[float, float], side: int) -> _Cells:
    """Whole grey levels of a plane (C, h, w), summed over channels; of a large one, of every n-th row and
    column."""
    down, across = (max(1, extent // (_SAMPLES * side)) for extent in plane.shape[1:])
    seen = plane[:, down // 2 :: down, across // 2 :: across].astype(np.float64)
    low, high = window
    # A header may put the values so far from 0 that the ends of the window round to one number.
    scale = _GREY_LEVELS / (high - low) if high > low else math.inf
    if math.isinf(scale):
        return np.zeros(seen.shape[1:])
    levels = np.rint(np.clip((seen - low) * scale, 0, _GREY_LEVELS))
    return np.asarray(levels.sum(axis=0))


def _shrunk(plane: _Cells, side: int) -> _Cells:
    down, across = (_areas(extent, side) for extent in plane.shape)
    return down @ plane @ across.T


@functools.lru_cache(maxsize=512)
def _areas(extent: int, side: int) -> _Cells:
    """(side, extent): how much of each pixel lies in each of `side` equal cells, in units of 1 / side."""
    cells, pixels = np.arange(side)[:, np.newaxis] * extent, np.arange(extent) * side
    overlap = np.minimum(cells + extent, pixels + side) - np.maximum(cells, pixels)
    return np.asarray(np.maximum(overlap, 0), np.float64)


def _levels(cells: _Cells) -> npt.NDArray[np.uint8]:
    """Sums of a picture's cells as levels; one without contrast is all 0."""
    ordered = np.sort(cells, axis=None)
    last = ordered.size - 1
    low, high = ordered[round(_OUTSIDE * last)], ordered[last - round(_OUTSIDE * last)]
    if high <= low:
        low, high = ordered[0], ordered[-1]
    if high <= low:
        return np.zeros(cells.shape, np.uint8)
    value = np.clip((cells - low) / (high - low), 0, 1)
    rank = (np.searchsorted(ordered, cells, "left") + np.searchsorted(ordered, cells, "right")) / (
        2 * cells.size
    )
    levels: npt.NDArray[np.uint8] = np.minimum((value + rank) * (LEVELS / 2), LEVELS - 1).astype(np.uint8)
    return levels
