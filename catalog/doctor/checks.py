"""The rules: each looks at the images of a dataset and yields the suspects of a group, worst first.

Thresholds and what they mean stand in `catalog.doctor.codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.doctor.codes import (
    BRIGHTEST_AIR,
    DARKEST_TISSUE,
    DENSE_BRIGHT,
    DENSE_MEAN,
    EMPTY_CROP,
    EMPTY_MEAN,
    FEWEST_STEPS,
    HIGHEST_HU,
    IN_PLANE,
    IN_PLANE_2D,
    LONGEST_MM,
    LOWEST_HU,
    NARROW_HU,
    SHORTEST_MM,
)
from catalog.doctor.robust import BEYOND, is_mixture, odd_ones, robust_z
from catalog.doctor.rows import Group, Images, Rows

Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_GREY = ("CT", "MRI", "PET", "XR", "US", "OCT")
_ANY_FACTOR = ("MRI", "PET")
"""Modalities whose intensities have an arbitrary factor."""


@dataclass(frozen=True)
class Told:
    """What is said of one suspect."""

    value: str
    usual: str | None = None
    z: float | None = None


@dataclass(frozen=True)
class Suspects:
    """What a rule found in one group."""

    code: str
    group: Group
    rows: Rows
    """The images, worst first; empty where the group as a whole is meant."""
    tell: Callable[[int], Told]
    """What is said of the n-th of them; of a group as a whole, for 0."""
    count: int
    """How many images are meant."""


Check = Callable[[Images], Iterator[Suspects]]


def _found(code: str, group: Group, where: Mask, worst: Values | None, tell: Callable[[int], Told]) -> Suspects:
    """Suspects at the places of `where`, (N,) over the group; `worst`, (N,), is large for the worst."""
    places = np.flatnonzero(where)
    if worst is not None:
        places = places[np.argsort(-worst[places], kind="stable")]
    return Suspects(code, group, group.rows[places], lambda number: tell(int(places[number])), len(places))


def hounsfield(images: Images) -> Iterator[Suspects]:
    groups = [group for group in images.groups if group.kind == "CT"]
    if not groups:
        return
    low, high, mean, dark, bright = (
        images.numbers(f"intensity_{name}") for name in ("min", "max", "mean", "p0_5", "p99_5")
    )
    for group in groups:
        a, b, m, d, e = (column[group.rows] for column in (low, high, mean, dark, bright))
        airless = a > DARKEST_TISSUE
        narrow = b - a <= NARROW_HU
        missing = airless & (m > DENSE_MEAN) & (e > DENSE_BRIGHT)
        twice = e < BRIGHTEST_AIR
        wrong = (missing | twice) & ~narrow

        def tell(at: int, a: Values = a, b: Values = b, m: Values = m, d: Values = d, e: Values = e) -> Told:
            return Told(
                f"{a[at]:.4g} to {b[at]:.4g} HU, mean {m[at]:.4g}, p0.5 {d[at]:.4g}, p99.5 {e[at]:.4g}",
                "air at -1000, tissue from -100 to 100, bone up to 2000 HU",
            )

        yield _found("ct_intercept", group, wrong, None, tell)
        yield _found("ct_narrow", group, narrow, None, tell)
        outside = ((d < LOWEST_HU) | (e > HIGHEST_HU)) & ~wrong & ~narrow
        yield _found("ct_outside_hu", group, outside, None, tell)
        yield _found("ct_masked", group, airless & ~wrong & ~narrow & ~outside, None, tell)


def emptiness(images: Images) -> Iterator[Suspects]:
    low, mean, median, dark, bright, slope = (
        images.numbers(name)
        for name in (*(f"intensity_{n}" for n in ("min", "mean", "median", "p0_5", "p99_5")), "slope")
    )
    steps = (bright - dark) / np.where(slope > 0, slope, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        filled = (mean - low) / (bright - low)
        kept = images.lengths("crop_box") / images.lengths("original_shape")
    del dark, bright, slope, mean
    constant = steps <= FEWEST_STEPS
    sparse = (median == low) & (filled < EMPTY_MEAN)
    # A picture is often cut out of a large black frame on purpose.
    cut = (kept < EMPTY_CROP) & (images.numbers("dimension") == 3)
    for group in images.groups:
        s, f, k = (column[group.rows] for column in (steps, filled, kept))
        c: Mask = constant[group.rows]
        n: Mask = cut[group.rows] & ~c
        empty: Mask = (sparse[group.rows] & ~c) | n

        def tell_constant(at: int, s: Values = s) -> Told:
            return Told(f"{s[at] + 1:.3g} stored values from dark to bright end", "hundreds")

        def tell_empty(at: int, f: Values = f, k: Values = k, n: Mask = n) -> Told:
            if n[at]:
                return Told(f"the crop kept {k[at]:.2%} of the file's voxels")
            return Told(f"mean at {f[at]:.2%} of the bright end, median at the minimum")

        yield _found("near_constant", group, c, -s, tell_constant)
        yield _found("mostly_empty", group, empty, -f, tell_empty)


def extents(images: Images) -> Iterator[Suspects]:
    with np.errstate(invalid="ignore"):
        sides = [
            images.numbers(f"shape_{a}") * images.numbers(f"spacing_{b}")
            for a, b in zip("dhw", "zyx", strict=True)
        ]
    longest = np.maximum(np.maximum(sides[0], sides[1]), sides[2])
    for group in images.groups:
        here = longest[group.rows]
        small = (here < SHORTEST_MM) & (group.kind != "OCT")

        def tell(at: int, group: Group = group) -> Told:
            size = " x ".join(f"{side[group.rows[at]]:.4g}" for side in sides)
            return Told(f"{size} mm", f"{SHORTEST_MM:g} to {LONGEST_MM:g} mm")

        yield _found("impossible_extent", group, (here > LONGEST_MM) | small, np.abs(np.log(here)), tell)


@dataclass(frozen=True)
class _Measure:
    """One quantity that is compared within a group."""

    name: str
    unit: str
    values: Values
    """(N,) over all images of the dataset."""
    log_floor: float | None
    """Smallest deviation of the logarithms; null: the values themselves are compared, against `floor`."""
    floor: Values | None = None
    """(N,): of each image, in its group the median counts."""

    def z(self, group: Group) -> Values:
        here = self.values[group.rows]
        if self.log_floor is None:
            floors = np.zeros(0) if self.floor is None else self.floor[group.rows]
            floors = floors[np.isfinite(floors)]
            return robust_z(here, float(np.median(floors)) if len(floors) else 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return robust_z(np.log(np.where(here > 0, here, np.nan)), self.log_floor)

    def told(self, group: Group, at: int, z: float) -> Told:
        here = self.values[group.rows]
        unit = f" {self.unit}" if self.unit else ""
        usual = f"median {np.nanmedian(here):.4g}{unit}, z {z:+.1f}"
        return Told(f"{self.name} {here[at]:.4g}{unit}", usual, z)


def spacings(images: Images) -> Iterator[Suspects]:
    in_plane = np.fmin(images.numbers("spacing_y"), images.numbers("spacing_x"))
    measures = [
        _Measure("between slices", "mm", images.numbers("spacing_z"), 0.05),
        _Measure("in-plane", "mm", in_plane, 0.05),
    ]
    yield from _outliers("spacing_outlier", measures, images.groups)


def shapes(images: Images) -> Iterator[Suspects]:
    names = {"slices": "shape_d", "rows": "shape_h", "columns": "shape_w"}
    measures = [_Measure(name, "", images.numbers(column), 0.1) for name, column in names.items()]
    yield from _outliers("shape_outlier", measures, images.groups)


def intensities(images: Images) -> Iterator[Suspects]:
    names = {"dark end": "intensity_p0_5", "mean": "intensity_mean", "bright end": "intensity_p99_5"}
    columns = {name: images.numbers(column) for name, column in names.items()}
    floor = 0.02 * (columns["bright end"] - columns["dark end"])
    of_kind: dict[str, list[Group]] = {"factor": [], "HU": [], "": []}
    for group in images.groups:
        unit = "HU" if group.kind == "CT" else "factor" if group.kind in _ANY_FACTOR else ""
        of_kind[unit].append(group)
    for unit, groups in of_kind.items():
        with_factor = unit == "factor"
        measures = [
            _Measure(name, "" if with_factor else unit, values, 0.1 if with_factor else None, floor)
            for name, values in columns.items()
            # The dark end of what has no zero of its own is noise.
            if not (with_factor and name == "dark end")
        ]
        yield from _outliers("intensity_outlier", measures, groups)


def _outliers(code: str, measures: list[_Measure], groups: list[Group]) -> Iterator[Suspects]:
    """Images beyond in any of the measures, told by the worst of them; a mixture is told of as a group."""
    for group in groups:
        worst = np.zeros(len(group.rows))
        which = np.zeros(len(group.rows), np.int8)
        for number, measure in enumerate(measures):
            z = np.nan_to_num(measure.z(group))
            beyond = np.flatnonzero(np.abs(z) > BEYOND)
            if is_mixture(len(beyond), len(group.rows)):
                yield _mixture(group, measure, len(beyond))
                continue
            worse = beyond[np.abs(z[beyond]) > np.abs(worst[beyond])]
            worst[worse], which[worse] = z[worse], number

        def tell(at: int, group: Group = group, worst: Values = worst, which: npt.NDArray[Any] = which) -> Told:
            return measures[int(which[at])].told(group, at, float(worst[at]))

        yield _found(code, group, worst != 0, np.abs(worst), tell)


def _mixture(group: Group, measure: _Measure, count: int) -> Suspects:
    here = measure.values[group.rows]
    low, middle, high = np.nanquantile(here, (0.05, 0.5, 0.95))
    unit = f" {measure.unit}" if measure.unit else ""
    told = Told(
        f"{measure.name}: {count:,} of {len(here):,} images beyond z {BEYOND:g}",
        f"median {middle:.4g}{unit}, 5 % to 95 %: {low:.4g} to {high:.4g}{unit}",
    )
    return Suspects("mixed_group", group, group.rows[:0], lambda number: told, count)


def depth(images: Images) -> Iterator[Suspects]:
    rules, names = images.texts("depth_rule")
    ruled = [(*names, rule).index(rule) for rule in ("overridden", "declared", "metadata", "default")]
    z, y, x = (images.numbers(f"spacing_{axis}") for axis in "zyx")
    flat = images.numbers("dimension") == 2
    with np.errstate(invalid="ignore"):
        difference = np.fmax(y, x) / np.fmin(y, x) - 1
    low, middle, high = np.sort(np.stack([z, y, x]), axis=0)
    with np.errstate(invalid="ignore"):
        odd = np.where(low * high >= middle**2 * (1 - 1e-6), high, low)
    named = np.isin(rules, ruled[1:])
    disagrees = ~flat & ((rules == ruled[0]) | (named & (difference > IN_PLANE) & (odd != z)))
    unequal = (difference > np.where(flat, IN_PLANE_2D, IN_PLANE)) & ~disagrees
    axes, axis_names = images.texts("depth_axis")
    orientations, orientation_names = images.texts("original_orientation")
    for group in images.groups:

        def tell(at: int, group: Group = group) -> Told:
            row = group.rows[at]
            sides = (y[row], x[row]) if flat[row] else (z[row], y[row], x[row])
            rule = "" if flat[row] else f", depth by rule {names[rules[row]]}"
            return Told(f"{' x '.join(f'{side:.4g}' for side in sides)} mm{rule}", "equal in-plane spacings")

        yield _found("depth_rule_disagrees", group, disagrees[group.rows], difference[group.rows], tell)
        yield _found("in_plane_anisotropy", group, unequal[group.rows], difference[group.rows], tell)
        yield from _odd_codes("depth_axis_unlike_siblings", group, axes, axis_names, missing="none")
        yield from _odd_codes("orientation_unlike_siblings", group, orientations, orientation_names)
        yield from _odd_codes("orientation_missing", group, orientations, orientation_names, missing="only")


def _odd_codes(
    code: str, group: Group, codes: npt.NDArray[Any], names: list[Any], missing: str = "none"
) -> Iterator[Suspects]:
    """Images whose text differs from that of nearly all; those without one are meant with `missing` 'only'."""
    here = codes[group.rows]
    odd, usual = odd_ones(here)
    if usual is None or names[usual] is None:
        return
    without = np.array([name is None for name in names])[here]
    wanted = odd & (without if missing == "only" else ~without)

    def tell(at: int) -> Told:
        return Told(f"{names[here[at]] or 'none'}", f"{names[usual]}")

    yield _found(code, group, wanted, None, tell)


def colours(images: Images) -> Iterator[Suspects]:
    channels = images.numbers("shape_c")
    equal = images.flagged("equal_channels")
    for group in images.groups:
        here, same = channels[group.rows], equal[group.rows]

        def tell(at: int, here: Values = here) -> Told:
            return Told(f"{here[at]:g} channels", "1 channel")

        in_grey = (here == 3) & (group.kind in _GREY)
        yield _found("colour_unexpected", group, in_grey, None, tell)
        yield _found("equal_channels", group, same, None, lambda at: Told("three equal channels; one was kept"))
        odd, usual = odd_ones(here)

        def tell_odd(at: int, here: Values = here, usual: Any = usual) -> Told:
            return Told(f"{here[at]:g} channel{'' if here[at] == 1 else 's'}", f"{usual:g}")

        yield _found("channels_unlike_siblings", group, odd & ~in_grey & ~same, None, tell_odd)


CHECKS: tuple[Check, ...] = (hounsfield, emptiness, extents, spacings, shapes, intensities, depth, colours)
COLUMNS = [
    *("dataset", "key", "status", "modality", "dimension", "shape_c", "shape_d", "shape_h", "shape_w"),
    *("spacing_z", "spacing_y", "spacing_x", "slope", "intensity_mean", "intensity_median", "intensity_min"),
    *("intensity_max", "intensity_p0_5", "intensity_p99_5", "original_shape", "original_orientation"),
    *("geometry_flags", "depth_axis", "depth_rule", "crop_box"),
]
"""Columns of the catalog that the rules read."""
