"""AUC and accuracy of a classification, as the evaluator of MedMNIST defines them.

Own code of a few lines: the package medmnist brings torchvision, whose wheels do not load beside every build of
torch. Shape suffixes: N cases, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating[Any]]

THRESHOLD = 0.5
"""Above which the score of the second of two classes counts as that class."""


def auc(labels_N: Labels, scores_NK: Scores) -> float:
    """Area under the ROC curve: of two classes that of the second, of more the mean of each against the rest.

    `scores_NK` are probabilities. Classes without a case, or without another, have no curve and do not count;
    NaN if none has one.
    """
    classes = [1] if scores_NK.shape[1] == 2 else range(scores_NK.shape[1])
    areas = [_area(labels_N == k, scores_NK[:, k]) for k in classes]
    known = [area for area in areas if not math.isnan(area)]
    return sum(known) / len(known) if known else math.nan


def accuracy(labels_N: Labels, scores_NK: Scores) -> float:
    """Share of cases whose class is found: of two by THRESHOLD, of more the one with the highest score."""
    found_N = scores_NK[:, 1] > THRESHOLD if scores_NK.shape[1] == 2 else scores_NK.argmax(axis=1)
    return float((found_N == labels_N).mean())


def cross_entropy(labels_N: Labels, scores_NK: Scores) -> float:
    """Mean -log of the score of the right class, in nats."""
    right_N = scores_NK[np.arange(len(labels_N)), labels_N]
    return float(-np.log(np.maximum(right_N, _LEAST_SCORE)).mean())


_LEAST_SCORE = 1e-12
"""One case that is utterly wrong must not make the mean infinite."""


def _area(positive_N: npt.NDArray[np.bool_], score_N: Scores) -> float:
    """The chance that a positive case scores above a negative one; ties count half."""
    positives, negatives = int(positive_N.sum()), int((~positive_N).sum())
    if not positives or not negatives:
        return math.nan
    _, at_N, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal scores, from 1
    above = ranks[at_N][positive_N].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))
