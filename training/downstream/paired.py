"""Whether one start is better than another, judged by pairs of runs with the same seed.

Runs with one seed use the same cases in the same order, so their difference is free of what both share. What
the tests say is about the seeds: how sure it is that another seed would give the same order. The test cases are
the same for all (unless the task draws its parts by seed), and say nothing about other patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from catalog.errors import SetupError


class Paired(NamedTuple):
    """Two rows of paired values compared."""

    pairs: int
    difference: float
    """Mean of first - second."""
    p_t: float
    """Two-sided, of the paired t test; NaN with fewer than two pairs, or where all differ by the same."""
    p_wilcoxon: float
    """Two-sided, of Wilcoxon's signed-rank test, exact where there are no ties; NaN if no pair differs."""


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare values of the same seeds, in the same order."""
    try:
        from scipy import stats
    except ImportError as error:
        raise SetupError("paired tests need scipy: pip install 'pumit-data[downstream]'") from error

    differences = [a - b for a, b in zip(first, second, strict=True)]
    pairs = len(differences)
    mean = sum(differences) / pairs if pairs else math.nan
    p_t = p_wilcoxon = math.nan
    if pairs >= 2:
        spread = max(differences) - min(differences)
        if spread > 1e-12:
            p_t = float(stats.ttest_rel(first, second).pvalue)
        if any(differences):
            p_wilcoxon = float(stats.wilcoxon(differences).pvalue)
    return Paired(pairs, mean, p_t, p_wilcoxon)


def smallest_p(pairs: int) -> float:
    """The smallest two-sided p that Wilcoxon's test can give: every one of the pairs in the same direction."""
    return min(2.0 ** (1 - pairs), 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's method; NaN stands for no test and stays."""
    tests = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = list(p_values)
    largest = 0.0
    for done, (p, index) in enumerate(tests):
        largest = max(largest, min(p * (len(tests) - done), 1.0))
        corrected[index] = largest
    return corrected


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample (ddof 1); the latter NaN for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
