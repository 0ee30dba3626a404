"""Values of one image: percentiles, foreground box, resize, statistics, storage type, window. Pure functions.

Integers are counted, not sorted: a histogram of at most 65536 bins gives every statistic exactly. Everything
that sums does so over counts or over sorted values, so that no result depends on the order of the axes.
Paper, pre-processing, for the rules; "above the minimum" is how its reference implementation counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ingest.reasons import ExcludedImage
from ingest.volume import Voxels

LOW_PERCENT, HIGH_PERCENT = 0.5, 99.5
MAX_IN_PLANE_SIZE = 512
"""The shorter in-plane side is shrunk to this."""
MAX_WINDOWS = 16
"""True floats whose range is wider than this many windows are stored as float32."""

Bounds = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

_CHUNK = 1 << 18  # voxels; 2 MB of int64 fit into the second-level cache
_QUANTISED_MAX = 65535
_EXACT_AREA_SIZE = 1000


class Distribution(Protocol):
    """How often each value occurs in an image, padding counted as the minimum of the other voxels."""

    minimum: float
    maximum: float
    size: int
    """Number of voxels."""
    at_minimum: int
    """Number of voxels that hold the minimum."""

    def ranked(self, ranks: Sequence[int]) -> npt.NDArray[np.float64]:
        """The values at 0-based positions in ascending order."""

    def moments(self) -> tuple[float, float]:
        """Mean, and standard deviation with ddof 0."""


class CountedDistribution:
    """Distribution of integers of at most 16 bits, from their histogram.

    Args:
        values: that occur, ascending.
        counts: how often each does, at least once.
    """

    def __init__(self, values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> None:
        self._values, self._counts = values, counts
        self._ends = np.cumsum(counts)
        self.minimum, self.maximum = float(values[0]), float(values[-1])
        self.size, self.at_minimum = int(self._ends[-1]), int(counts[0])

    @classmethod
    def of(cls, voxels: Voxels, padding: int | None) -> CountedDistribution:
        """Count `voxels`."""
        values, counts = _occurrences(voxels)
        is_other = np.full(len(values), True) if padding is None else values != padding
        if is_other.any() and not is_other.all():
            padded = counts[~is_other][0]
            values, counts = values[is_other], counts[is_other]
            counts[0] += padded
        return cls(values, counts)

    def without(self, parts: Sequence[Voxels], padding: int | None) -> CountedDistribution:
        """What remains when `parts` of the voxels, but not all of them, are taken away."""
        minimum = parts[0].dtype.type(self.minimum)
        # What a crop leaves out is background, which need not be counted one by one.
        others = np.concatenate([part[part != minimum] for part in parts])
        if padding is not None:
            others = others[others != padding]
        counts = self._counts.copy()
        counts[0] -= sum(part.size for part in parts) - len(others)
        if len(others):
            values, gone = _occurrences(others)
            counts[np.searchsorted(self._values, values)] -= gone
        left = counts > 0
        return CountedDistribution(self._values[left], counts[left])

    def ranked(self, ranks: Sequence[int]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = self._values[np.searchsorted(self._ends, ranks, side="right")]
        return found

    def moments(self) -> tuple[float, float]:
        mean = float((self._values * self._counts).sum() / self.size)
        variance = float((np.square(self._values - mean) * self._counts).sum() / self.size)
        return mean, math.sqrt(variance)


class SortedDistribution:
    """Distribution of wider integers and floats, from a sorted copy."""

    def __init__(self, voxels: Voxels, padding: int | None = None) -> None:
        values = voxels.flatten(order="K")
        if padding is not None:
            outside = values == padding
            if outside.any() and not outside.all():
                values[outside] = values[~outside].min()
        values.sort()
        self._sorted = values
        self.minimum, self.maximum = float(values[0]), float(values[-1])
        self.size = len(values)
        self.at_minimum = int(np.searchsorted(values, values[0], side="right"))

    def ranked(self, ranks: Sequence[int]) -> npt.NDArray[np.float64]:
        return self._sorted[list(ranks)].astype(np.float64)

    def moments(self) -> tuple[float, float]:
        mean = math.fsum(float(chunk.sum()) for chunk in self._chunks()) / self.size
        squares = math.fsum(float(np.square(chunk - mean).sum()) for chunk in self._chunks())
        return mean, math.sqrt(squares / self.size)

    def _chunks(self) -> Iterator[npt.NDArray[np.float64]]:
        for start in range(0, self.size, _CHUNK):
            yield self._sorted[start : start + _CHUNK].astype(np.float64)


def distribution(voxels: Voxels, padding: int | None = None) -> Distribution:
    """Distribution of `voxels` (any shape and strides, not empty, finite), exact for every dtype.

    Voxels equal to `padding` count as the minimum of the others.
    """
    counted = voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2
    return CountedDistribution.of(voxels, padding) if counted else SortedDistribution(voxels, padding)


def distribution_within(
    whole: Distribution, voxels: Voxels, box: Bounds, padding: int | None = None
) -> Distribution:
    """Distribution of the voxels inside `box`, padding counted as the minimum of the whole.

    Args:
        whole: distribution of all `voxels`, with the same padding.
        voxels: (C, D, H, W), any strides.
        box: along D, H, W.
        padding: as of `distribution`.
    """
    inside = voxels[:, *(slice(*bounds) for bounds in box)]
    if inside.size == voxels.size:
        return whole
    if isinstance(whole, CountedDistribution):
        return whole.without([part for part in _outside(voxels, box) if part.size], padding)
    if padding is not None:
        inside = without_padding(inside, padding, whole.minimum)
    return distribution(inside)


def percentile_above_minimum(values: Distribution, percent: float) -> float:
    """Percentile over the voxels strictly above the minimum, linear interpolation in float64.

    Raises:
        ExcludedImage: constant, as then no voxel is above the minimum.
    """
    above = values.size - values.at_minimum
    if above == 0:
        raise ExcludedImage("constant", f"all voxels have the value {values.minimum:g}")
    position = percent / 100 * (above - 1)
    lower = math.floor(position)
    ranks = [values.at_minimum + lower, values.at_minimum + min(lower + 1, above - 1)]
    low, high = values.ranked(ranks)
    return float(low + (high - low) * (position - lower))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one image; percentiles over the voxels above the minimum, the others over all."""

    mean: float
    std: float
    median: float
    minimum: float
    maximum: float
    p0_5: float
    p99_5: float

    def in_real_units(self, slope: float, intercept: float) -> Statistics:
        """The statistics of slope * voxels + intercept, for slope > 0."""

        def real(value: float) -> float:
            return slope * value + intercept

        return Statistics(
            mean=real(self.mean),
            std=slope * self.std,
            median=real(self.median),
            minimum=real(self.minimum),
            maximum=real(self.maximum),
            p0_5=real(self.p0_5),
            p99_5=real(self.p99_5),
        )


def statistics(voxels: Voxels) -> Statistics:
    """Exact statistics of `voxels` (any shape), in the units they are stored in.

    Raises:
        ExcludedImage: constant.
    """
    return describe(distribution(voxels))


def describe(values: Distribution) -> Statistics:
    """Exact statistics of the voxels that `values` counts.

    Raises:
        ExcludedImage: constant.
    """
    low, high = (percentile_above_minimum(values, percent) for percent in (LOW_PERCENT, HIGH_PERCENT))
    mean, std = values.moments()
    return Statistics(
        mean=mean,
        std=std,
        median=float(values.ranked([(values.size - 1) // 2, values.size // 2]).mean()),
        minimum=values.minimum,
        maximum=values.maximum,
        p0_5=low,
        p99_5=high,
    )


def percentile_window(found: Statistics) -> tuple[float, float]:
    """(low, high) of the normalisation window, low < high.

    It is (p0.5, p99.5). Where nearly all voxels above the minimum share one value, these are equal and the
    minimum takes the place of p0.5: both percentiles lie above it.
    """
    return (found.p0_5 if found.p0_5 < found.p99_5 else found.minimum), found.p99_5


def foreground_box(voxels: Voxels, threshold: float, padding: int | None = None) -> Bounds:
    """Smallest box around the voxels above `threshold` in all channels; ends are exclusive.

    Args:
        voxels: (C, D, H, W), any strides.
        threshold: in stored values; compared in float64, so a fraction counts.
        padding: stored value outside the scan, never foreground.

    Raises:
        ExcludedImage: empty_crop.
    """
    # Channels lie interleaved in memory: pairs are compared faster than all along an axis of length 3.
    lowest: Voxels = functools.reduce(np.minimum, voxels)
    # Walked in memory order: maxima of whole contiguous slabs instead of strided ones.
    steps = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in lowest.strides)
    order = sorted(range(3), key=lambda axis: -abs(lowest.strides[axis]))
    slabs = lowest[steps].transpose(order)
    limit = np.float64(threshold)
    hidden = padding if padding is not None and padding > threshold else None

    def visible(slab: Voxels) -> Voxels:
        return (
            slab if hidden is None else np.where(slab == hidden, slab.dtype.type(math.floor(threshold)), slab)
        )

    projection: Voxels = visible(slabs[0]).copy()
    slab_maximum = np.empty(len(slabs), dtype=slabs.dtype)
    together = max(1, _CHUNK // slabs[0].size)
    for start in range(0, len(slabs), together):
        group = visible(slabs[start : start + together])
        np.maximum(projection, group.max(axis=0) if together > 1 else group[0], out=projection)
        slab_maximum[start : start + together] = group.max(axis=(1, 2))
    foreground = projection > limit
    profiles = (slab_maximum > limit, np.logical_or.reduce(foreground, 1), np.logical_or.reduce(foreground, 0))
    occupied = dict(zip(order, profiles, strict=True))
    if not foreground.any():
        raise ExcludedImage("empty_crop", f"no voxel is above {threshold:g} in all channels")
    z, y, x = (_bounds(occupied[axis][steps[axis]]) for axis in range(3))
    return z, y, x


def without_padding(voxels: Voxels, padding: int, minimum: float) -> Voxels:
    """C-contiguous copy in which voxels equal to `padding` hold `minimum`."""
    result: Voxels = np.array(voxels, order="C")
    result[result == padding] = minimum
    return result


def resized_shape(height: int, width: int) -> tuple[int, int]:
    """In-plane size after ingest: the shorter side at most 512, the longer in proportion, half to even."""
    shorter = min(height, width)
    if shorter <= MAX_IN_PLANE_SIZE:
        return height, width
    return round(height * MAX_IN_PLANE_SIZE / shorter), round(width * MAX_IN_PLANE_SIZE / shorter)


def resize_in_plane(voxels: Voxels, size: tuple[int, int]) -> Voxels:
    """Shrink H and W of `voxels` (C, D, H, W) to `size` by true area weights; depth is untouched.

    Integers come back in their dtype, rounded half to even; floats in theirs. The arithmetic is float32,
    float64 for types wider than that can hold.
    """
    channels, depth = voxels.shape[:2]
    exact = voxels.dtype.itemsize > 2 and voxels.dtype != np.float32
    work = np.float64 if exact else np.float32
    result: Voxels = np.empty((channels, depth, *size), dtype=voxels.dtype)
    is_integer = voxels.dtype.kind in "iu"
    for channel, slices in enumerate(voxels):
        for z, plane in enumerate(slices):
            shrunk = _shrink(plane, size, np.dtype(work))
            if is_integer:
                limits = np.iinfo(voxels.dtype)
                np.clip(np.rint(shrunk, out=shrunk), limits.min, limits.max, out=shrunk)
            result[channel, z] = shrunk
    return result


def in_substance(voxels: Voxels) -> Voxels:
    """`voxels` in the type that holds them in substance, every value unchanged.

    Integers of at most 16 bits keep their dtype; wider ones, and floats that hold integers only, become int16,
    uint16, int32 or uint32, the first that fits. True floats stay float32 or float64.

    Raises:
        ExcludedImage: not_finite; unsupported_layout for complex and structured voxels.
    """
    kind, width = voxels.dtype.kind, voxels.dtype.itemsize
    if kind == "b":
        return voxels.view(np.uint8)
    if kind in "iu":
        if width <= 2:
            return voxels
        target = _narrowest(int(voxels.min()), int(voxels.max()))
        return voxels if target is None else voxels.astype(target)
    if kind != "f":
        raise ExcludedImage("unsupported_layout", f"voxels of type {voxels.dtype} are no intensities")
    low, high, integral = _scan_floats(voxels)
    target = _narrowest(int(low), int(high)) if integral else None
    if target is None:
        target = np.dtype(np.float32 if width <= 4 else np.float64)
    return voxels.astype(target, copy=False)


def complement(voxels: Voxels) -> tuple[Voxels, int]:
    """(offset - voxels, offset): the order of the values reversed, in the same dtype and without overflow."""
    if voxels.dtype.kind == "f":
        return -voxels, 0
    limits = np.iinfo(voxels.dtype)
    return ~voxels, int(limits.max) + int(limits.min)


def quantise(voxels: Voxels, found: Statistics) -> tuple[Voxels, float, float]:
    """True floats as they are stored: (stored, slope, intercept), value = slope * stored + intercept.

    uint16 over the image's range if that is at most 16 windows, so that the error (half a slope) is at most
    1/8192 of the window; else float32.

    Args:
        voxels: (C, D, H, W) float32 or float64.
        found: their statistics.

    Raises:
        ExcludedImage: not_finite where a float64 exceeds float32.
    """
    low, high = percentile_window(found)
    spread = found.maximum - found.minimum
    slope = spread / _QUANTISED_MAX
    fits = math.isfinite(spread) and spread <= MAX_WINDOWS * (high - low)
    if not fits or slope < np.finfo(np.float64).tiny:
        if max(-found.minimum, found.maximum) > float(np.finfo(np.float32).max):
            raise ExcludedImage("not_finite", f"values up to {found.maximum:g} do not fit float32")
        return np.ascontiguousarray(voxels, dtype=np.float32), 1.0, 0.0
    stored = np.empty(voxels.shape, dtype=np.uint16)
    for channel, slices in enumerate(voxels):
        for z, plane in enumerate(slices):
            steps = np.rint((plane.astype(np.float64) - found.minimum) / slope)
            stored[channel, z] = np.minimum(steps, _QUANTISED_MAX)
    return stored, slope, found.minimum


def _occurrences(voxels: Voxels) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The values of a type of at most 16 bits that occur, ascending, and how often each does."""
    counts = _histogram(voxels.ravel(order="K").view(_unsigned(voxels.dtype)))
    bins = np.flatnonzero(counts)
    values = bins.astype(_unsigned(voxels.dtype)).view(voxels.dtype).astype(np.float64)
    order = np.argsort(values, kind="stable")
    return values[order], counts[bins[order]]


def _histogram(flat: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Counts of unsigned values of at most 16 bits, from 0 to the largest or beyond."""
    background = flat[:1]  # of a masked image, and of most others, a corner is
    if flat.size <= _CHUNK:
        return _count(flat, background)
    counts = np.zeros(1 << (8 * flat.itemsize), dtype=np.int64)
    for start in range(0, flat.size, _CHUNK):
        found = _count(flat[start : start + _CHUNK], background)
        counts[: len(found)] += found
    return counts


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _count(flat: npt.NDArray[Any], background: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """As `_histogram`, of few values; `background`, of shape (1,), only decides how fast."""
    if flat.itemsize == 1:
        import cv2

        # Four times faster on bytes. It counts in float32, which is exact up to 2^24.
        return np.asarray(cv2.calcHist([flat], [0], None, [256], [0, 256])).ravel().astype(np.int64)
    # To count one value again and again is slow, and most of a masked image is background, in long runs: four
    # voxels of it are left out at a time, if a look at some shows that it pays.
    whole = len(flat) // 4 * 4
    words, empty = flat[:whole].view(np.uint64), np.repeat(background, 4).view(np.uint64)
    if 2 * np.count_nonzero(words[::256] == empty) < len(words[::256]):
        return np.bincount(flat)
    others = np.concatenate([words[words != empty].view(flat.dtype), flat[whole:]])
    counts = np.bincount(others, minlength=int(background[0]) + 1)
    counts[background[0]] += len(flat) - len(others)
    return counts


def _outside(voxels: Voxels, box: Bounds) -> Iterator[Voxels]:
    """Six disjoint blocks that make up what `box` leaves out of `voxels`, some of them empty."""
    rest = voxels
    for axis, (start, stop) in enumerate(box, start=1):
        whole = (slice(None),) * axis
        yield rest[*whole, :start]
        yield rest[*whole, stop:]
        rest = rest[*whole, start:stop]


def _bounds(occupied: npt.NDArray[np.bool_]) -> tuple[int, int]:
    where = np.flatnonzero(occupied)
    return int(where[0]), int(where[-1]) + 1


def _shrink(plane: Voxels, size: tuple[int, int], work: np.dtype[Any]) -> Voxels:
    height, width = size
    if max(size) >= _EXACT_AREA_SIZE or work == np.float64:
        # OpenCV leaves out parts of a pixel under 1/1000, which a side of n pixels has from n = 1000 on, and
        # holds its weights in float32 whatever the type of the voxels.
        rows = _area_weighted(plane.astype(np.float64), height)
        return _area_weighted(rows.T, width).T.astype(work)
    import cv2  # 0.1 s that a caller of the statistics need not pay

    def resized(part: Voxels, height: int) -> Voxels:
        floats = np.ascontiguousarray(part, dtype=work)
        shrunk: Voxels = cv2.resize(floats, (width, height), interpolation=cv2.INTER_AREA)
        return shrunk

    if plane.shape[0] % height == 0 or plane.shape[1] % width == 0:
        return resized(plane, height)  # OpenCV adds up whole blocks in an order of its own
    # It sums along rows before it sums along columns, so bands of rows give the same bits, and the plane is
    # never there as floats.
    narrow = np.empty((len(plane), width), dtype=work)
    together = max(1, _CHUNK // plane.shape[1])
    for start in range(0, len(plane), together):
        band = plane[start : start + together]
        narrow[start : start + together] = resized(band, len(band))
    return resized(narrow, height)


def _area_weighted(plane: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Mean over `size` equal, fractional intervals of the first axis, from differences of the running sum."""
    length = len(plane)
    sums = np.zeros((length + 1, plane.shape[1]))
    np.cumsum(plane, axis=0, out=sums[1:])
    whole, part = np.divmod(np.arange(size + 1) * length, size)
    following = np.minimum(whole + 1, length)
    at_edges = sums[whole] + (sums[following] - sums[whole]) * (part / size)[:, None]
    means: npt.NDArray[np.float64] = np.diff(at_edges, axis=0) * (size / length)
    return means


def _narrowest(low: int, high: int) -> np.dtype[Any] | None:
    for candidate in (np.int16, np.uint16, np.int32, np.uint32):
        limits = np.iinfo(candidate)
        if limits.min <= low and high <= limits.max:
            return np.dtype(candidate)
    return None


def _scan_floats(voxels: Voxels) -> tuple[float, float, bool]:
    """Minimum, maximum, and whether all values are integers. Raises ExcludedImage not_finite."""
    flat = voxels.ravel(order="K")
    low, high, integral = math.inf, -math.inf, True
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        smallest, largest = float(chunk.min()), float(chunk.max())
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            count = sum(
                int((~np.isfinite(flat[begin : begin + _CHUNK])).sum()) for begin in range(0, flat.size, _CHUNK)
            )
            raise ExcludedImage("not_finite", f"{count} of {flat.size} voxels are NaN or infinite")
        low, high = min(low, smallest), max(high, largest)
        integral = integral and bool((chunk == np.rint(chunk)).all())
    return low, high, integral
