"""Which file axis is the depth axis, and how a file's axes become (D, H, W). Pure functions on metadata.

Paper, pre-processing: the depth axis comes first, decided by the official description, else by metadata,
else by the axis whose spacing differs most. Oblique volumes are reordered to the nearest canonical axes,
never resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
import numpy.typing as npt

from ingest.reasons import ExcludedImage
from ingest.source import DepthAxis
from ingest.volume import Volume, Voxels

DepthRule = Literal["declared", "metadata", "anisotropy", "default", "overridden"]

DISPLAY_CODES: dict[DepthAxis, str] = {"SI": "SPL", "AP": "PIL", "LR": "LIP"}
"""Radiological display: the directions in which the indices of D, H and W grow."""

EQUAL_SPACING = 0.01
"""Relative difference up to which two spacings count as equal."""
MAX_IN_PLANE_ANISOTROPY = 0.10
"""Relative difference of the in-plane spacings beyond which a volume is excluded."""
ROUNDING_COSINE = 1e-3
"""Cosine between two axes up to which their not being perpendicular is rounding of the file's numbers."""
MAX_TILT_DEGREES = 30.0

# Files hold spacings as float32: a nominal 1 % must not fall on either side by its rounding.
_FLOAT32_SLACK = 1e-6
_FLOAT32_COSINE = 1e-5

_AXIS_OF_CODE: dict[str, DepthAxis] = {"R": "LR", "L": "LR", "A": "AP", "P": "AP", "S": "SI", "I": "SI"}
_CODES = (("R", "L"), ("A", "P"), ("S", "I"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the spatial axes of a file become (D, H, W), and what is known of them then."""

    axes: tuple[int, int, int]
    """The spatial axis of the file that becomes D, H, W."""
    flipped: tuple[bool, bool, bool]
    """Whether that axis is reversed on the way."""
    spacing: tuple[float | None, float | None, float | None]
    """(z, y, x) in mm; z is null for 2-D, y and x where a 2-D image has none."""
    depth_axis: DepthAxis | None
    """Anatomical direction of D; null if unknown."""
    depth_rule: DepthRule | None
    """What decided the depth axis; null for 2-D."""
    flags: tuple[str, ...]
    """What was repaired or is unusual."""

    @property
    def codes(self) -> str | None:
        """Directions in which the indices of D, H and W grow; null if unknown."""
        return DISPLAY_CODES[self.depth_axis] if self.depth_axis else None


def plan_layout(volume: Volume, *, declared: DepthAxis | None, is_ct: bool) -> Layout:
    """Decide how the axes of `volume` become (D, H, W).

    Args:
        volume: (C, I, J, K), axes as the file has them.
        declared: depth axis by the dataset's official description; of no use without orientation.
        is_ct: whether SI is the default of a volume on which nothing else decides.

    Raises:
        ExcludedImage: no_pixels, single_slice, spacing_missing, spacing_invalid, sheared_affine,
            gantry_tilt, in_plane_spacing.
    """
    if 0 in volume.voxels.shape:
        raise ExcludedImage("no_pixels", f"the array has shape {volume.voxels.shape}")
    if volume.dimension == 2:
        return _plan_2d(volume)
    shape = volume.voxels.shape[1:]
    if 1 in shape:
        raise ExcludedImage("single_slice", f"a volume of shape {shape} has an axis of length 1")
    spacing = checked_spacing(volume.spacing)
    codes, cosines = None, np.eye(3)
    if volume.affine is not None:
        cosines = direction_cosines(volume.affine)
        codes = axis_codes(cosines)

    strides = tuple(abs(stride) for stride in volume.voxels.strides[1:])
    depth, rule = _choose_depth(
        spacing, codes, declared=declared, slice_axis=volume.slice_axis, is_ct=is_ct, strides=strides
    )
    flags: set[str] = set()
    tilt = _tilt_sine(cosines, depth)
    is_tilted = tilt > ROUNDING_COSINE or "gantry_tilt" in volume.flags
    if is_tilted:
        spacing = _untilted(volume, spacing, depth, tilt)
        flags.add("gantry_tilt")
    elif _largest_cosine(cosines) > _FLOAT32_COSINE:
        flags.add("orthonormalised")
    difference = _in_plane_difference(spacing, depth)
    if difference > MAX_IN_PLANE_ANISOTROPY + _FLOAT32_SLACK:
        repaired = [axis for axis in range(3) if _is_equal(_in_plane_difference(spacing, axis))]
        # Slices of a tilted gantry are shifted against each other: no other axis gives whole planes.
        if not repaired or is_tilted:
            raise ExcludedImage(
                "in_plane_spacing",
                f"spacings of {_in_mm(spacing)} along the file's axes, depth axis {depth} ({rule}): the other "
                f"two differ by {difference:.0%}, at most {MAX_IN_PLANE_ANISOTROPY:.0%} is allowed. If it was "
                "scanned along another axis, set `depth_axis` for the dataset in datasets.yaml",
            )
        depth, rule = repaired[0], "overridden"
        difference = _in_plane_difference(spacing, depth)
    if not _is_equal(difference):
        flags.add("in_plane_anisotropic")

    axes, flipped = _display_order(codes, depth) if codes else (_stored_order(strides, depth), (False,) * 3)
    z, y, x = (spacing[axis] for axis in axes)
    return Layout(
        axes=axes,
        flipped=flipped,
        spacing=(_without_noise(z), _without_noise(y), _without_noise(x)),
        depth_axis=_AXIS_OF_CODE[codes[depth]] if codes else None,
        depth_rule=rule,
        flags=tuple(sorted(flags)),
    )


def reorder(voxels: Voxels, layout: Layout) -> Voxels:
    """View of `voxels` as (C, D, H, W); nothing is copied."""
    reverse = (slice(None, None, -1) if flip else slice(None) for flip in layout.flipped)
    axes = (0, *(axis + 1 for axis in layout.axes))
    view: Voxels = voxels.transpose(axes)[:, *reverse]
    return view


def checked_spacing(spacing: tuple[float, float, float] | None) -> tuple[float, float, float]:
    """The three spacings of a volume in mm, as floats.

    Raises:
        ExcludedImage: spacing_missing, spacing_invalid (zero, negative, infinite, not a number).
    """
    if spacing is None:
        raise ExcludedImage("spacing_missing", "the file states no spacing")
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise ExcludedImage("spacing_invalid", f"the file states spacings of {_in_mm(spacing)}")
    first, second, third = (float(value) for value in spacing)
    return first, second, third


def _without_noise(spacing: float) -> float:
    """Six significant digits: headers compute in float32, and 7.4999979 mm must not miss a DA level."""
    return float(f"{spacing:.6g}")


def direction_cosines(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Unit vectors (columns) along the file's axes, in RAS+ world axes.

    Raises:
        ExcludedImage: spacing_invalid where a column of the 4 x 4 affine is zero or not finite.
    """
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.sqrt(np.square(linear).sum(axis=0))
    if not np.isfinite(linear).all() or not lengths.all():
        raise ExcludedImage("spacing_invalid", f"the affine has a zero or non-finite column: {linear.tolist()}")
    cosines: npt.NDArray[np.float64] = linear / lengths
    return cosines


def axis_codes(cosines: npt.NDArray[np.float64]) -> str:
    """Directions in which the file's indices grow, as nearest canonical axes: RAS, LPS, ...

    The assignment of file axes to world axes is the one of the six with the largest sum of |cosine|, so that
    it does not depend on the order of the file's axes (a greedy one does).
    """
    strength = np.abs(cosines)
    columns = [tuple(map(float, strength[:, axis])) for axis in range(3)]

    def fit(row_of: tuple[int, ...]) -> tuple[float, list[tuple[float, ...]]]:
        # fsum is exact, hence the same for every order of the axes; so is the choice between equal sums.
        total = math.fsum(columns[axis][row] for axis, row in enumerate(row_of))
        return total, [columns[row_of.index(row)] for row in range(3)]

    world = max(permutations(range(3)), key=fit)
    return "".join(_CODES[row][int(cosines[row, axis] < 0)] for axis, row in enumerate(world))


def most_different_axis(spacing: tuple[float, float, float]) -> int | None:
    """The axis whose spacing differs most from the other two (log ratio); None if all are within 1 %.

    Where the steps from the smallest to the middle and on to the largest are equal, it is the largest.
    """
    low, middle, high = sorted(spacing)
    if _is_equal(high / low - 1):
        return None
    rounding = 1 - _FLOAT32_SLACK
    return spacing.index(high if low * high >= middle**2 * rounding else low)


def _plan_2d(volume: Volume) -> Layout:
    """A 2-D image stays as stored. Its spacing is kept where known; none of it ever excludes the image."""
    y: float | None
    x: float | None
    y, x = volume.spacing[1:] if volume.spacing else (math.nan, math.nan)
    flags: tuple[str, ...] = ()
    if not (math.isfinite(y) and math.isfinite(x) and y > 0 and x > 0):
        flags = () if math.isnan(y) and math.isnan(x) else ("invalid_spacing_dropped",)
        y = x = None
    elif not _is_equal(max(y, x) / min(y, x) - 1):
        flags = ("in_plane_anisotropic",)
    return Layout(
        axes=(0, 1, 2),
        flipped=(False, False, False),
        spacing=(None, y, x),
        depth_axis=None,
        depth_rule=None,
        flags=flags,
    )


def _choose_depth(
    spacing: tuple[float, float, float],
    codes: str | None,
    *,
    declared: DepthAxis | None,
    slice_axis: int | None,
    is_ct: bool,
    strides: tuple[int, ...],
) -> tuple[int, DepthRule]:
    anatomy = [_AXIS_OF_CODE[code] for code in codes] if codes else []
    if declared is not None and anatomy:
        return anatomy.index(declared), "declared"
    if slice_axis is not None:
        return slice_axis, "metadata"
    different = most_different_axis(spacing)
    if different is not None:
        return different, "anisotropy"
    if is_ct and anatomy:
        return anatomy.index("SI"), "default"
    return max(range(3), key=lambda axis: strides[axis]), "default"


def _tilt_sine(cosines: npt.NDArray[np.float64], depth: int) -> float:
    """Sine of the angle between the depth axis and the slice normal.

    Raises:
        ExcludedImage: sheared_affine where the two other axes are not perpendicular.
    """
    first, second = (axis for axis in range(3) if axis != depth)
    in_plane = abs(float(cosines[:, first] @ cosines[:, second]))
    if in_plane > ROUNDING_COSINE:
        raise ExcludedImage(
            "sheared_affine",
            f"the file's axes {first} and {second}, which span the slices, are "
            f"{math.degrees(math.acos(min(in_plane, 1.0))):.2f} degrees apart instead of 90",
        )
    along_first, along_second = (float(cosines[:, depth] @ cosines[:, axis]) for axis in (first, second))
    return math.sqrt(along_first**2 + along_second**2)


def _largest_cosine(cosines: npt.NDArray[np.float64]) -> float:
    products = np.abs(cosines.T @ cosines)
    return float(products[~np.eye(3, dtype=bool)].max())


def _untilted(
    volume: Volume, spacing: tuple[float, float, float], depth: int, sine: float
) -> tuple[float, float, float]:
    """Spacings with the one of the depth axis measured along the slice normal."""
    if "gantry_tilt" in volume.flags or volume.affine is None:
        return spacing  # the reader knows the slice positions and has done it
    angle = math.degrees(math.asin(min(sine, 1.0)))
    if angle > MAX_TILT_DEGREES:
        raise ExcludedImage(
            "gantry_tilt",
            f"slices are shifted by {angle:.1f} degrees against their normal, "
            f"at most {MAX_TILT_DEGREES:g} is allowed",
        )
    step = float(np.sqrt(np.square(volume.affine[:3, depth]).sum()))
    along_normal = step * math.sqrt(1 - sine**2)
    first, second, third = (along_normal if axis == depth else spacing[axis] for axis in range(3))
    return first, second, third


def _in_plane_difference(spacing: tuple[float, float, float], depth: int) -> float:
    low, high = sorted(value for axis, value in enumerate(spacing) if axis != depth)
    return high / low - 1


def _is_equal(difference: float) -> bool:
    return difference <= EQUAL_SPACING + _FLOAT32_SLACK


def _display_order(codes: str, depth: int) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    wanted = DISPLAY_CODES[_AXIS_OF_CODE[codes[depth]]]
    anatomy = [_AXIS_OF_CODE[code] for code in codes]
    d, h, w = (anatomy.index(_AXIS_OF_CODE[code]) for code in wanted)
    flip_d, flip_h, flip_w = (codes[axis] != code for axis, code in zip((d, h, w), wanted, strict=True))
    return (d, h, w), (flip_d, flip_h, flip_w)


def _stored_order(strides: tuple[int, ...], depth: int) -> tuple[int, int, int]:
    """Depth first, then the other two from slow to fast in memory: rows of the file stay rows."""
    h, w = sorted((axis for axis in range(3) if axis != depth), key=lambda axis: -strides[axis])
    return depth, h, w


def _in_mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in spacing) + " mm"
