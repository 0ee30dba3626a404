"""One image from the reader's volume to voxels, catalog row and preview: the steps of ingest in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catalog.schema import CATALOG_SCHEMA
from catalog.spacing import da_level, degree_of_anisotropy
from ingest.features import Features, features
from ingest.geometry import Layout, axis_codes, direction_cosines, plan_layout, reorder
from ingest.intensity import (
    LOW_PERCENT,
    Distribution,
    complement,
    describe,
    distribution,
    distribution_within,
    foreground_box,
    in_substance,
    percentile_above_minimum,
    percentile_window,
    quantise,
    resize_in_plane,
    resized_shape,
    statistics,
    without_padding,
)
from ingest.preview import render_preview
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume, Voxels

NORMALISATION_VERSION = 1
"""Raised whenever the same files would give other voxels or another row."""

_KNOWN_LATER = {
    "split",
    "shard_path",
    "shard_shape",
    "shard_index",
    "stored_bytes",
    "shard_sha256",
    "entry_hash",
}
_ROW_COLUMNS = [name for name in CATALOG_SCHEMA.names if name not in _KNOWN_LATER]

_LARGEST = float(np.finfo(np.float32).max)
"""Beyond it a voxel is infinite to a training."""

Spacing = tuple[float | None, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """One image as it enters the corpus."""

    voxels: Voxels
    """(C, D, H, W); real value = slope * voxels + intercept. Of a volume perhaps a view of the reader's memory,
    with any strides; of a 2-D image C-contiguous, as many wait for their pack and should not hold what is
    cropped away."""
    row: dict[str, Any]
    """The columns of the catalog known from the image: all but split, shard and entry hash."""
    preview: bytes
    """PNG of the mid-planes."""
    features: Features
    """What duplicates of it are found by."""

    def beside(self) -> dict[str, Any]:
        """The columns of the catalog's siblings."""
        return {"preview": self.preview} | self.features.columns()


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Voxels as they are stored, and how to read them."""

    voxels: Voxels
    slope: float
    intercept: float
    resize_factor: float
    spacing: Spacing


def normalise(volume: Volume, source: ImageSource, *, lossless: bool = False) -> Normalised:
    """Orient, crop, resize and describe one image. The volume is left as it is.

    Args:
        volume: what the reader found.
        source: what the dataset's rule says of it.
        lossless: keep true floats as floats (float32, float64) instead of 16-bit integers.

    Raises:
        ExcludedImage: the image is unfit by rule; its message names dataset and key.
    """
    try:
        return _normalise(volume, source, lossless=lossless)
    except ExcludedImage as outcome:
        key = image_key(source, volume.index, volume.count)
        raise ExcludedImage(
            outcome.reason, f"{source.dataset}/{key} ({source.path}): {outcome.message}"
        ) from outcome


def excluded_row(
    source: ImageSource,
    outcome: ExcludedImage | FailedImage,
    index: int | None,
    count: int,
    volume: Volume | None,
) -> dict[str, Any]:
    """Row of an image that does not enter the corpus; it keeps what is known.

    Args:
        source: what the dataset's rule says of it.
        outcome: why.
        index: position among the volumes of its file; null when the file as a whole is out.
        count: number of volumes of the file.
        volume: what the reader found, if it came that far.
    """
    row = _described(source, index, count)
    row |= {
        "status": "excluded" if isinstance(outcome, ExcludedImage) else "failed",
        "reason": outcome.reason,
        "message": outcome.message,
        "dimension": source.dimension,
    }
    if volume is None:
        return row
    row |= _original(volume)
    try:
        layout = _layout(volume, source)
    except ExcludedImage:
        return row  # the geometry itself is what is unfit
    return row | _geometry(layout, volume.flags) | _spacing(layout.spacing)


def image_key(source: ImageSource, index: int | None, count: int) -> str:
    """`key`, or `key#0003` for one of several volumes of a file or series."""
    return source.key if index is None or count == 1 else f"{source.key}#{index:04d}"


def _normalise(volume: Volume, source: ImageSource, *, lossless: bool) -> Normalised:
    if source.volume_modalities and len(source.volume_modalities) != volume.count:
        expected = len(source.volume_modalities)
        raise ExcludedImage("volume_count", f"{volume.count} volumes in the file instead of {expected}")
    layout = _layout(volume, source)
    values, slope, intercept, padding = _ascending(volume)
    is_8_bit_2d = volume.dimension == 2 and volume.voxels.dtype == np.uint8

    whole = distribution(values, padding)
    extremes = [slope * value + intercept for value in (whole.minimum, whole.maximum)]
    if not max(map(abs, extremes)) <= _LARGEST:
        raise ExcludedImage("not_finite", f"values from {extremes[0]:.3g} to {extremes[1]:.3g}")
    low = percentile_above_minimum(whole, LOW_PERCENT)
    uncropped = reorder(values, layout)
    box = foreground_box(uncropped, 0.0 if is_8_bit_2d else low, padding)
    image = uncropped[:, *(slice(*bounds) for bounds in box)]
    if padding is not None:
        image = without_padding(image, padding, whole.minimum)
    size = resized_shape(*image.shape[2:])
    inside = distribution_within(whole, uncropped, box, padding) if size == image.shape[2:] else None
    del whole  # of floats it is a copy of the volume
    stored = _store(image, inside, size, layout.spacing, slope, intercept, lossless=lossless)

    if inside is not None and stored.voxels.dtype == image.dtype:
        found = describe(inside)
    else:
        found = statistics(stored.voxels)
    stored_window = percentile_window(found)
    if is_8_bit_2d:
        # The reverse order of a negative slope maps the 8-bit range onto itself.
        stored_window = (0.0, 255.0)
    real = found.in_real_units(stored.slope, stored.intercept)
    window_low, window_high = (stored.slope * value + stored.intercept for value in stored_window)
    channels, depth, height, width = stored.voxels.shape
    flags = (*volume.flags, *(("negative_slope",) if volume.slope < 0 else ()))
    row = _described(source, volume.index, volume.count)
    row |= _original(volume) | _geometry(layout, flags) | _spacing(stored.spacing)
    row |= {
        "status": "ingested",
        "shape_c": channels,
        "shape_d": depth,
        "shape_h": height,
        "shape_w": width,
        "stored_dtype": stored.voxels.dtype.name,
        "slope": stored.slope,
        "intercept": stored.intercept,
        "window_low": window_low,
        "window_high": window_high,
        "intensity_mean": real.mean,
        "intensity_std": real.std,
        "intensity_median": real.median,
        "intensity_min": real.minimum,
        "intensity_max": real.maximum,
        "intensity_p0_5": real.p0_5,
        "intensity_p99_5": real.p99_5,
        "crop_box": [end for bounds in box for end in bounds],
        "resize_factor": stored.resize_factor,
        "sampling_weight": source.volume_weight(volume.index, volume.count),
    }
    preview = render_preview(stored.voxels, spacing=stored.spacing, window=stored_window, codes=layout.codes)
    return Normalised(voxels=stored.voxels, row=row, preview=preview, features=features(stored.voxels, row))


def _layout(volume: Volume, source: ImageSource) -> Layout:
    channels = len(volume.voxels)
    if volume.dimension == 3 and channels != 1:
        raise ExcludedImage("colour_volume", f"a volume with {channels} channels")
    if volume.dimension == 2 and (channels not in (1, 3) or volume.voxels.shape[1] != 1):
        raise ExcludedImage("unsupported_layout", f"a 2-D image of shape (C, D, H, W) {volume.voxels.shape}")
    is_ct = source.modality.split("/")[0] == "CT"
    return plan_layout(volume, declared=source.depth_axis, is_ct=is_ct)


def _ascending(volume: Volume) -> tuple[Voxels, float, float, int | None]:
    """Voxels in their type in substance with slope > 0: (voxels, slope, intercept, padding value).

    Foreground is what is bright in real units, so the order of the values is reversed for a negative slope.
    """
    slope, intercept, padding = volume.slope, volume.intercept, volume.padding_value
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ExcludedImage("not_finite", f"slope {slope} and intercept {intercept} of the file")
    if slope == 0:
        raise ExcludedImage("constant", f"the file's slope is 0: all voxels are {intercept:g}")
    values = in_substance(volume.voxels)
    if slope > 0:
        return values, slope, intercept, padding
    values, offset = complement(values)
    return values, -slope, slope * offset + intercept, None if padding is None else offset - padding


def _store(
    image: Voxels,
    inside: Distribution | None,
    size: tuple[int, int],
    spacing: Spacing,
    slope: float,
    intercept: float,
    *,
    lossless: bool,
) -> _Stored:
    """Resize `image` (C, D, H, W, cropped) to `size` and bring it into the type it is stored in.

    `inside` is the distribution of `image` where it keeps its size.
    """
    height, width = image.shape[2:]
    if inside is None:
        image = resize_in_plane(image, size)
    if image.dtype.kind == "f" and not lossless:
        found = statistics(image) if inside is None else describe(inside)
        image, step, start = quantise(image, found)
        slope, intercept = slope * step, slope * start + intercept
    z, y, x = spacing
    return _Stored(
        voxels=image if spacing[0] is not None else np.ascontiguousarray(image),
        slope=slope,
        intercept=intercept,
        resize_factor=min(size) / min(height, width),
        spacing=(z, y, x) if y is None or x is None else (z, y * height / size[0], x * width / size[1]),
    )


def _described(source: ImageSource, index: int | None, count: int) -> dict[str, Any]:
    """A row with every column, filled with what the source tells."""
    named = source.volume_modalities
    modality = named[index] if index is not None and len(named) == count else source.modality
    return dict.fromkeys(_ROW_COLUMNS) | {
        "dataset": source.dataset,
        "key": image_key(source, index, count),
        "subject": source.subject,
        "modality": modality,
        "upstream_modality": source.upstream_modality or modality,
        "body_part": list(source.body_part),
        "source_path": source.public_path,
        "normalisation_version": NORMALISATION_VERSION,
    }


def _original(volume: Volume) -> dict[str, Any]:
    """What the file itself says, axes as stored there."""
    spatial = slice(1, None) if volume.dimension == 3 else slice(2, None)
    spacing = volume.spacing[spatial.start - 1 :] if volume.spacing else None
    return {
        "dimension": volume.dimension,
        "original_shape": list(volume.voxels.shape[spatial]),
        "original_spacing": None if spacing is None or np.isnan(spacing).all() else list(spacing),
        "original_orientation": _orientation(volume),
        "geometry_flags": sorted(set(volume.flags)),
        "source_hash": volume.source_hash or None,
    }


def _orientation(volume: Volume) -> str | None:
    if volume.affine is None or volume.dimension == 2:
        return None
    try:
        return axis_codes(direction_cosines(volume.affine))
    except ExcludedImage:
        return None


def _geometry(layout: Layout, flags: Sequence[str]) -> dict[str, Any]:
    return {
        "geometry_flags": sorted({*flags, *layout.flags}),
        "depth_axis": layout.depth_axis,
        "depth_rule": layout.depth_rule,
    }


def _spacing(spacing: Spacing) -> dict[str, Any]:
    z, y, x = spacing
    da = None if z is None or y is None or x is None else degree_of_anisotropy((z, y, x))
    return {"spacing_z": z, "spacing_y": y, "spacing_x": x, "da": da, "da_level": da_level(da)}
