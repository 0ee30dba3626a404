"""AUC and accuracy are those of MedMNIST's evaluator."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.downstream.metrics import accuracy, auc

BINARY = np.array([0, 0, 1, 1, 0, 1, 1, 0])
BINARY_P = np.array([0.1, 0.4, 0.35, 0.8, 0.5, 0.5, 0.9, 0.2])
THREE = np.array([0, 1, 2, 2, 1, 0, 0])
THREE_P = np.array(
    [
        [0.6, 0.3, 0.1],
        [0.2, 0.5, 0.3],
        [0.3, 0.3, 0.4],
        [0.5, 0.2, 0.3],
        [0.1, 0.1, 0.8],
        [0.4, 0.4, 0.2],
        [0.3, 0.6, 0.1],
    ]
)


def test_what_the_evaluator_of_medmnist_3_0_2_gave() -> None:
    two = np.stack([1 - BINARY_P, BINARY_P], axis=1)
    assert auc(BINARY, two) == pytest.approx(0.84375)
    assert accuracy(BINARY, two) == 0.75  # a score of 0.5 is not the second class
    assert auc(THREE, THREE_P) == pytest.approx(0.6472222222222223)
    assert accuracy(THREE, THREE_P) == pytest.approx(4 / 7)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    draw = np.random.default_rng(1)
    labels = np.array([0, 1, *draw.integers(0, 2, 60)])
    scores = draw.integers(0, 9, len(labels)) / 9
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    expected = sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)
    assert auc(labels, np.stack([1 - scores, scores], axis=1)) == pytest.approx(expected)


def test_a_class_without_a_curve_does_not_count() -> None:
    four = np.concatenate([THREE_P, np.zeros((len(THREE), 1))], axis=1)
    assert auc(THREE, four) == pytest.approx(auc(THREE, THREE_P))
    assert math.isnan(auc(np.zeros(3, np.int64), np.full((3, 2), 0.5)))
