"""DICOM: a folder of one or several series, or one file, to volumes (3-D source) or pictures (2-D source)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingest.readers import check_size, name, reading
from ingest.readers.dicom_frames import Frame, find_frames, parse, quiet
from ingest.readers.dicom_pixels import decode
from ingest.readers.dicom_stack import Stack, build_stack, check_scaling, refuse_burned_in
from ingest.reasons import ExcludedImage
from ingest.source import ImageSource
from ingest.volume import Volume, Voxels

_LIT = 32
"""Stored values above it are drawn; below it lies what lossy compression leaves of black."""


def read(source: ImageSource) -> Iterator[Volume | ExcludedImage]:
    """Yield the images of all series, ordered by series number and UID, never by file name.

    A 3-D source gives (1, K, rows, columns) per volume, slices ascending along the normal, `slice_axis` 0; a
    series with several volumes (b-values, phases) gives each, in the order of `dicom_stack`. Stored integers
    keep one slope and intercept; where these differ between slices they are applied, giving float32 (float64
    beyond 16 bits). A 2-D source gives every frame as (C, 1, H, W), colour as RGB, MONOCHROME1 inverted.
    `source_hash` is sha256 over the sorted sha256 of the files.

    Raises:
        ExcludedImage: no DICOM image is there, or the only image is unfit.
        FailedImage: see `ingest.readers.read_volumes`.
    """
    frames, source_hash = find_frames(source)
    if not frames:
        raise ExcludedImage("no_pixels", f"{name(source)}: no DICOM image is there. Check the dataset's rule.")
    if source.dimension == 2:
        yield from _pictures(source, frames, source_hash)
    else:
        yield from _volumes(source, frames, source_hash)


@dataclass(frozen=True)
class _Planned:
    """One volume to come: its frames and the series it belongs to."""

    frames: Sequence[Frame]
    stack: Stack


def _volumes(
    source: ImageSource, frames: Sequence[Frame], source_hash: str
) -> Iterator[Volume | ExcludedImage]:
    plan: list[_Planned | ExcludedImage] = []
    by_series = sorted(frames, key=lambda frame: frame.series)
    series = [list(group) for _, group in itertools.groupby(by_series, key=lambda frame: frame.series)]
    for number, group in enumerate(series):
        label = name(source) if len(series) == 1 else f"{name(source)}, series {number + 1} of {len(series)}"
        try:
            stack = build_stack(group, label)
            plan.extend(_Planned(volume, stack) for volume in stack.volumes)
        except ExcludedImage as outcome:
            plan.append(outcome)

    for index, planned in enumerate(plan):
        if isinstance(planned, ExcludedImage):
            if len(plan) == 1:
                raise planned
            yield planned
            continue
        voxels, scaling, padding = _read_stack(source, planned.frames)
        yield Volume(
            voxels=voxels,
            dimension=3,
            spacing=planned.stack.spacing,
            affine=planned.stack.affine,
            slope=scaling[0],
            intercept=scaling[1],
            slice_axis=0,
            padding_value=padding,
            flags=(*planned.stack.flags, *_lookup_flag(planned.frames[0])),
            index=index,
            count=len(plan),
            source_hash=source_hash,
        )


def _read_stack(source: ImageSource, frames: Sequence[Frame]) -> tuple[Voxels, tuple[float, float], int | None]:
    """(1, K, rows, columns), (slope, intercept), padding value."""
    pixel_format = frames[0].format
    check_size(source, len(frames) * pixel_format.rows * pixel_format.columns)
    scalings = {(frame.slope, frame.intercept) for frame in frames}
    paddings = {frame.padding for frame in frames}
    voxels: Voxels | None = None
    padded = []
    for k, (frame, pixels) in enumerate(_decoded(source, frames)):
        if len(scalings) > 1:
            padded.append(pixels == frame.padding if frame.padding is not None else np.zeros((), dtype=bool))
            dtype = np.float32 if pixel_format.bits_allocated <= 16 else np.float64
            pixels = (pixels * np.float64(frame.slope) + frame.intercept).astype(dtype)
        if voxels is None:
            with reading(source):
                voxels = np.empty((1, len(frames), *pixels.shape), dtype=pixels.dtype)
        voxels[0, k] = pixels
    if voxels is None:
        raise ValueError("a stack has at least two frames")

    if len(scalings) == 1:
        return voxels, scalings.pop(), paddings.pop() if len(paddings) == 1 else None
    # One stored value no longer marks the padding, so it takes the value it would count as.
    mask = np.stack([np.broadcast_to(m, voxels.shape[2:]) for m in padded])[np.newaxis]
    if mask.any() and not mask.all():
        voxels[mask] = voxels[~mask].min()
    return voxels, (1.0, 0.0), None


def _pictures(
    source: ImageSource, frames: Sequence[Frame], source_hash: str
) -> Iterator[Volume | ExcludedImage]:
    ordered = sorted(frames, key=lambda frame: (frame.series, frame.order[1:]))
    refusals = [_refusal(source, frame) for frame in ordered]
    decoded = _decoded(source, [frame for frame, refusal in zip(ordered, refusals, strict=True) if not refusal])
    for index, (frame, refusal) in enumerate(zip(ordered, refusals, strict=True)):
        if refusal is not None:
            if len(ordered) == 1:
                raise refusal
            yield refusal
            continue
        _, pixels = next(decoded)
        yield Volume(
            dimension=2,
            spacing=_picture_spacing(frame),
            affine=None,
            slope=frame.slope,
            intercept=frame.intercept,
            index=index,
            count=len(ordered),
            source_hash=source_hash,
            **_picture(frame, pixels),
        )


def _refusal(source: ImageSource, frame: Frame) -> ExcludedImage | None:
    label = f"{name(source)}{frame.place}"
    try:
        if not frame.has_pixels:
            raise ExcludedImage("no_pixels", f"{label}: no pixel data.")
        check_scaling(frame, label)
        refuse_burned_in(frame, label)
    except ExcludedImage as outcome:
        return outcome
    return None


def _picture(frame: Frame, pixels: Voxels) -> dict[str, Any]:
    """`voxels` (C, 1, H, W), `padding_value` and `flags` of one frame."""
    flags = (*_lookup_flag(frame), *_banner_flag(frame, pixels))
    padding = frame.padding
    if frame.format.photometric == "MONOCHROME1" and pixels.dtype.kind in "iu":
        # Bits turned over: largest minus value where unsigned, -1 minus value where signed.
        top = -1 if frame.format.signed else (1 << frame.format.bits_stored) - 1
        pixels = (pixels.dtype.type(top) - pixels).astype(pixels.dtype)
        padding = None if padding is None else top - padding
        flags = (*flags, "inverted")
    if pixels.ndim == 2:
        return {"voxels": pixels[np.newaxis, np.newaxis], "padding_value": padding, "flags": flags}
    if all(np.array_equal(pixels[..., 0], pixels[..., c]) for c in (1, 2)):
        grey = np.ascontiguousarray(pixels[..., 0])[np.newaxis, np.newaxis]
        return {"voxels": grey, "flags": (*flags, "equal_channels")}
    return {"voxels": pixels.transpose(2, 0, 1)[:, np.newaxis], "flags": flags}


def _banner_flag(frame: Frame, pixels: Voxels) -> tuple[str, ...]:
    """Is something drawn beside the scans of an ultrasound image, and nothing says that it names nobody?"""
    if frame.scan_regions is None or frame.burned_in is False:
        return ()
    lit = (pixels if pixels.ndim == 2 else pixels.max(axis=2)) > _LIT
    for x0, y0, x1, y1 in frame.scan_regions:
        lit[y0 : y1 + 1, x0 : x1 + 1] = False
    return ("banner_possible",) if lit.any() else ()


def _picture_spacing(frame: Frame) -> tuple[float, float, float] | None:
    """(nan, y, x) in mm as the header states them, if it does."""
    if frame.pixel_spacing is None:
        return None
    return (math.nan, frame.pixel_spacing[0], frame.pixel_spacing[1])


def _decoded(source: ImageSource, frames: Sequence[Frame]) -> Iterator[tuple[Frame, Voxels]]:
    """Each frame with its stored values; neighbours from one file share the open file."""
    for file, group in itertools.groupby(frames, key=lambda frame: frame.file):
        with reading(source):
            dataset = parse(file, force=True)
        for frame in group:
            with reading(source, frame.place), quiet():
                pixels = decode(dataset, frame.number, frame.format)
            yield frame, pixels


def _lookup_flag(frame: Frame) -> tuple[str, ...]:
    return ("modality_lut_ignored",) if frame.has_lookup else ()
