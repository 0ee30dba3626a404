"""Frames of one series to volumes: which frames belong together, in which order, at which distance.

Pure arithmetic on headers; vectors are in LPS+ mm until the affine, which is in RAS+.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.readers.dicom_frames import Frame
from ingest.reasons import ExcludedImage

MAX_TILT_DEGREES = 30.0
_TILT_ROUNDING_DEGREES = 0.5
_SAME_POSITION_MM = 0.01
_SAME_DIRECTION = 1e-3
_NOT_ORTHONORMAL = 0.01

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stack:
    """The volumes of one series. All of them share geometry and number of slices."""

    volumes: list[list[Frame]]
    """Frames of each volume, in ascending position along the normal (row direction x column direction)."""
    spacing: tuple[float, float, float]
    """mm between slices (along the normal), rows, columns."""
    affine: Vector
    """4 x 4, from (slice, row, column) to RAS+ mm. A tilted gantry's shift is not in it."""
    flags: tuple[str, ...]


def build_stack(frames: Sequence[Frame], label: str) -> Stack:
    """Sort the frames of a series into volumes and check that they are whole.

    Args:
        frames: of one series, in any order.
        label: how messages call the series.

    Raises:
        ExcludedImage: `no_pixels`, `colour_volume`, `single_slice`, `spacing_missing`, `mixed_orientation`,
            `mixed_shapes`, `spacing_invalid`, `sheared_affine`, `duplicate_slices`, `missing_slices`,
            `uneven_slices`, `gantry_tilt`.
    """
    _check_formats(frames, label)
    rows, columns, normal = _axes(frames, label)
    _check_same_formats(frames, label)
    y, x = _pixel_spacing(frames, label)

    positions = np.array([frame.position for frame in frames])
    slots, heights = _slots(positions @ normal)
    if len(heights) == 1:
        raise ExcludedImage(
            "single_slice", f"{label}: all {len(frames)} slices lie at one position. {_DECLARE_2D}"
        )
    volumes = _split(frames, slots, label)
    step = _step(heights, label)
    paths = [np.array([frame.position for frame in volume]) for volume in volumes]
    tilt = _tilt(paths, normal, min(y, x), label)

    affine = np.eye(4)
    affine[:3, :3] = np.stack([normal * step, columns * y, rows * x], axis=1)
    affine[:3, 3] = np.array(volumes[0][0].position)
    return Stack(
        volumes=volumes,
        spacing=(step, y, x),
        affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine,
        flags=("gantry_tilt",) if tilt > _TILT_ROUNDING_DEGREES else (),
    )


_DECLARE_2D = "If the dataset is 2-D, declare `dimension: 2` in datasets.yaml."


def _check_formats(frames: Sequence[Frame], label: str) -> None:
    without = sum(not frame.has_pixels for frame in frames)
    if without:
        raise ExcludedImage("no_pixels", f"{label}: {without} of {len(frames)} objects have no pixel data.")
    if any(frame.format.channels > 1 or frame.format.photometric == "PALETTE COLOR" for frame in frames):
        raise ExcludedImage("colour_volume", f"{label}: voxels are colours. Find the grey original.")
    if len(frames) == 1:
        raise ExcludedImage("single_slice", f"{label}: the series has one slice. {_DECLARE_2D}")
    if any(None in (frame.orientation, frame.position, frame.pixel_spacing) for frame in frames):
        raise ExcludedImage("spacing_missing", f"{label}: slices lack orientation, position or pixel spacing.")
    for frame in frames:
        check_scaling(frame, label)
        refuse_burned_in(frame, label)


def check_scaling(frame: Frame, label: str) -> None:
    """Refuse a rescale that leaves no image.

    Raises:
        ExcludedImage: `constant` for a slope of zero, `not_finite`.
    """
    if not math.isfinite(frame.slope) or not math.isfinite(frame.intercept):
        raise ExcludedImage("not_finite", f"{label}: rescale slope or intercept is not a number.")
    if frame.slope == 0:
        raise ExcludedImage("constant", f"{label}: the rescale slope is zero, so all voxels have one value.")


def refuse_burned_in(frame: Frame, label: str) -> None:
    """Refuse pixels that the header says hold text.

    Raises:
        ExcludedImage: `burned_in_annotation`.
    """
    if frame.burned_in:
        raise ExcludedImage(
            "burned_in_annotation",
            f"{label}: BurnedInAnnotation is YES: text in the pixels may name the patient. Blacken it and "
            "state NO.",
        )


def _axes(frames: Sequence[Frame], label: str) -> tuple[Vector, Vector, Vector]:
    """Unit vectors along a row, along a column, and their normal."""
    orientations = np.array([frame.orientation for frame in frames])
    positions = np.array([frame.position for frame in frames])
    if not (np.isfinite(orientations).all() and np.isfinite(positions).all()):
        raise ExcludedImage("spacing_invalid", f"{label}: orientation or position is not a number.")
    if np.abs(orientations - orientations[0]).max() > _SAME_DIRECTION:
        raise ExcludedImage(
            "mixed_orientation",
            f"{label}: its {len(frames)} slices are not parallel: a localizer or several scans.",
        )
    rows, columns = np.array(orientations[0][:3]), np.array(orientations[0][3:])
    lengths = np.linalg.norm(rows), np.linalg.norm(columns)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(rows @ columns)) > _NOT_ORTHONORMAL:
        raise ExcludedImage("sheared_affine", f"{label}: rows and columns are not perpendicular unit vectors.")
    rows, columns = rows / lengths[0], columns / lengths[1]
    normal = np.cross(rows, columns)
    return rows, columns, normal / np.linalg.norm(normal)


def _check_same_formats(frames: Sequence[Frame], label: str) -> None:
    formats = Counter(frame.format for frame in frames)
    if len(formats) > 1:
        kinds = ", ".join(sorted(f"{f.rows}x{f.columns} {f.bits_stored}-bit ({n})" for f, n in formats.items()))
        raise ExcludedImage("mixed_shapes", f"{label}: slices differ in size or pixel format: {kinds}.")


def _pixel_spacing(frames: Sequence[Frame], label: str) -> tuple[float, float]:
    spacings = np.array([frame.pixel_spacing for frame in frames])
    if not (np.isfinite(spacings).all() and (spacings > 0).all()):
        raise ExcludedImage("spacing_invalid", f"{label}: pixel spacing {spacings.min():g} mm.")
    if np.ptp(spacings, axis=0).max() > _SAME_DIRECTION * spacings.min():
        raise ExcludedImage("mixed_shapes", f"{label}: slices differ in pixel spacing.")
    return float(spacings[0, 0]), float(spacings[0, 1])


def _slots(heights: Vector) -> tuple[list[int], Vector]:
    """Number each frame's position along the normal; returns the numbers and the positions, ascending."""
    order = np.argsort(heights, kind="stable")
    starts = np.diff(heights[order], prepend=-math.inf) > _SAME_POSITION_MM
    slots = np.empty(len(heights), dtype=int)
    slots[order] = np.cumsum(starts) - 1
    return slots.tolist(), heights[order][starts]


def _split(frames: Sequence[Frame], slots: Sequence[int], label: str) -> list[list[Frame]]:
    """Separate the volumes of a series that shows each position several times.

    A label (time, trigger, clock, b-value, dimension, echo, kind) counts if each of its values shows all
    positions equally often; a clock that runs from slice to slice does not. Volumes are ordered by the labels
    that count; frames that these leave together, by clock, then instance number.
    """
    repeats = Counter(slots)
    if len(set(repeats.values())) > 1:
        raise ExcludedImage(
            "duplicate_slices",
            f"{label}: positions occur {min(repeats.values())} to {max(repeats.values())} times; "
            "volumes of one series would show each equally often. Remove the copies.",
        )
    if len({(slot, *frame.order[1:]) for slot, frame in zip(slots, frames, strict=True)}) < len(frames):
        raise ExcludedImage("duplicate_slices", f"{label}: slices are there twice. Remove the copies.")

    keys: list[tuple[Any, ...]] = [() for _ in frames]
    for column in range(len(frames[0].labels)):
        finer = [(*key, _sortable(frame.labels[column])) for key, frame in zip(keys, frames, strict=True)]
        if _balanced(finer, slots):
            keys = finer

    grouped: dict[tuple[Any, ...], dict[int, list[Frame]]] = defaultdict(lambda: defaultdict(list))
    for key, slot, frame in zip(keys, slots, frames, strict=True):
        grouped[key][slot].append(frame)
    volumes = []
    for key in sorted(grouped):
        at_slots = [
            sorted(at_slot, key=lambda frame: frame.order) for _, at_slot in sorted(grouped[key].items())
        ]
        volumes.extend([list(volume) for volume in zip(*at_slots, strict=True)])
    return volumes


def _sortable(value: Any) -> tuple[int, Any]:
    """Puts frames without the label first; files give it types that the standard does not."""
    if value is None or value == "":
        return (0, 0)
    if isinstance(value, int | float) and math.isfinite(value):
        return (1, float(value))
    return (2, value) if isinstance(value, tuple) else (3, str(value))


def _balanced(keys: Sequence[tuple[Any, ...]], slots: Sequence[int]) -> bool:
    """Whether each key shows every position, and all positions equally often."""
    positions = len(set(slots))
    shown: dict[tuple[Any, ...], Counter[int]] = defaultdict(Counter)
    for key, slot in zip(keys, slots, strict=True):
        shown[key][slot] += 1
    return all(len(counts) == positions and len(set(counts.values())) == 1 for counts in shown.values())


def _step(heights: Vector, label: str) -> float:
    """The median distance of neighbours, in mm, once all are within max(2 %, 0.1 mm) of it."""
    steps = np.diff(heights)
    median = float(np.median(steps))
    tolerance = max(0.02 * median, 0.1)
    odd = steps[np.abs(steps - median) > tolerance]
    if not len(odd):
        return median
    multiples = np.round(odd / median)
    found = ", ".join(f"{step:.4g}" for step in sorted(set(np.round(odd, 2)))[:5])
    if np.all((multiples >= 2) & (np.abs(odd - multiples * median) <= tolerance)):
        raise ExcludedImage(
            "missing_slices",
            f"{label}: steps of {found} mm where {median:.4g} mm is usual: "
            f"{int(multiples.sum()) - len(odd)} slices are missing. Download the series again.",
        )
    raise ExcludedImage(
        "uneven_slices",
        f"{label}: steps of {found} mm where {median:.4g} mm is usual, {tolerance:.2g} mm off is allowed.",
    )


def _tilt(volumes: Sequence[Vector], normal: Vector, pixel_mm: float, label: str) -> float:
    """Angle in degrees between the shift from slice to slice and the normal, the largest of all volumes."""
    largest = 0.0
    for positions in volumes:
        path = positions - positions[0]
        height = path @ normal
        shift = path[-1] / height[-1]  # per mm of height
        largest = max(largest, math.degrees(math.acos(min(1.0, 1 / float(np.linalg.norm(shift))))))
        if largest > MAX_TILT_DEGREES:
            raise ExcludedImage(
                "gantry_tilt",
                f"{label}: slices shift by {largest:.1f} degrees, {MAX_TILT_DEGREES:g} are allowed.",
            )
        # Half a voxel aside is still the same voxel; more, and the slices do not lie over one another.
        if np.abs(path - np.outer(height, shift)).max() > 0.5 * pixel_mm + _SAME_POSITION_MM:
            raise ExcludedImage("uneven_slices", f"{label}: slices are shifted unevenly within their plane.")
    return largest
