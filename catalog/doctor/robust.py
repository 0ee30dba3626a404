"""What is unusual among many values, by medians: pure functions on arrays.

The score is the modified z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993), with the
median absolute deviation of each side of the median for itself, as spacings and shapes are skewed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LEAST = 10
"""Values that a group must have for one of them to be unusual."""
BEYOND = 6.0
"""Robust z from which a value is an outlier. Images are many, their tails heavy: the usual 3.5 is noise."""
MOST_SHARE = 0.05
"""Share of a group that outliers are at most; more are a second kind of image."""

_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

Values = npt.NDArray[np.float64]


def robust_z(values: Values, floor: float) -> Values:
    """Distance of each of N values from their median, in robust standard deviations; NaN where a value is NaN.

    Args:
        values: (N,).
        floor: smallest standard deviation, in the unit of the values; for groups of (nearly) equal ones.

    All are NaN where fewer than LEAST values are known.
    """
    known = np.isfinite(values)
    if np.count_nonzero(known) < LEAST:
        return np.full(values.shape, np.nan)
    distance = values - np.median(values[known])
    below, above = (_deviation(side, floor) for side in (-distance[known], distance[known]))
    return np.where(known, distance / np.where(distance < 0, below, above), np.nan)


def _deviation(distance: Values, floor: float) -> float:
    return max(floor, _NORMAL * float(np.median(distance[distance >= 0])))


def is_mixture(unusual: int, count: int) -> bool:
    """Whether so many of `count` values are unusual that they are no outliers."""
    return unusual > max(1, int(MOST_SHARE * count))


def odd_ones(codes: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_], Any]:
    """Which of N codes differ from the one that (nearly) all others have, and that one.

    None differs where there are fewer than LEAST, or where those that differ are a second kind.
    """
    found, counts = np.unique(codes, return_counts=True)
    if len(codes) < LEAST:
        return np.zeros(len(codes), bool), None
    usual = found[np.argmax(counts)]
    odd = codes != usual
    if is_mixture(int(np.count_nonzero(odd)), len(codes)):
        return np.zeros(len(codes), bool), None
    return odd, usual
