"""Whether two images show the same: their pictures are laid over each other, and what is fine in both is
compared.

A crop or another spacing moves and stretches each axis by itself. So the search is over flips, and a shift and
a scale an axis, which the three slabs of a volume share: least squares from coarse to fine (Lucas and Kanade,
IJCAI 1981), of many pairs at a time. What is coarse is then taken away, for brains in one atlas have it in
common.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.uint8]

FLAT_THRESHOLD, VOLUME_THRESHOLD = 0.76, 0.72
"""Agreement from which on two 2-D images, or two volumes, count as near duplicates (benchmarks/RESULTS.md)."""

PLANES = {1: ((0, 1),), 3: ((1, 2), (0, 2), (0, 1))}
"""By the number of pictures: the axes of the image that run down and across each."""
_SEARCH_BLUR = 2.5
_SEARCHED_SCALES = (1.0, 0.9, 1.11, 0.8, 1.25)
_STARTS = 2
"""Of all flips and scales, so many are followed."""
_BLURS = (3.0, 1.8, 0.9)
_STEPS = 4
_DAMPING = 0.02
_MOST_SHIFT, _MOST_SCALE = 0.14, 1.39
"""Beyond what crops of up to 10 % a side do: share of a side, and factor."""
_FINE = 2.0
"""Blur that takes away what is coarse."""


class Placement(NamedTuple):
    """How the second of each pair lies on the first."""

    shift: Floats
    """(B, axes) in cells."""
    scale: Floats
    """(B, axes)"""

    def of(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Placement:
        return Placement(self.shift[chosen], self.scale[chosen])


def agreement(first: Levels, second: Levels) -> Floats:
    """How well each of many pairs agrees, at most 1: (B, 1 or 3, side, side) twice to (B,).

    It is the correlation of the fine structure, where both show something, in the best placement; the mean over
    the slabs of a volume.
    """
    a, b = first.astype(np.float32), second.astype(np.float32)
    best = np.full(len(a), -1, np.float32)
    for start, candidates in _starts(a, b):
        best = np.maximum(best, _fine_agreement(a, candidates, _placed(a, candidates, start)))
    return best


def threshold(count: int) -> float:
    """From which agreement on images of `count` pictures are near duplicates."""
    return VOLUME_THRESHOLD if count == 3 else FLAT_THRESHOLD


def blurred(pictures: Floats, sigma: float) -> Floats:
    """(..., side, side) convolved with a Gaussian of `sigma` cells, cut off and normalised at the edges."""
    matrix = _blur(pictures.shape[-1], sigma)
    return np.asarray(matrix @ pictures @ matrix.T)


def _starts(a: Floats, b: Floats) -> list[tuple[Placement, Floats]]:
    """The best flips and scales at a coarse look: placements, and the second pictures flipped accordingly."""
    count, side = a.shape[1], a.shape[-1]
    flips = list(itertools.product((False, True), repeat=len(PLANES[count]) if count == 3 else 2))
    coarse_a, coarse_b = blurred(a, _SEARCH_BLUR), blurred(b, _SEARCH_BLUR)
    choices, likeness = [], []
    for scale in _SEARCHED_SCALES:
        matrix, inside = _interpolation(np.zeros(1, np.float32), np.full(1, scale, np.float32), side)
        seen = np.outer(inside[0], inside[0]).astype(np.float32)
        x, y = _standardised(coarse_a, seen), _standardised(matrix[0] @ coarse_b @ matrix[0].T, seen)
        for flip in flips:
            choices.append((flip, scale))
            likeness.append((x * _flipped(y, flip)).sum((-1, -2)).mean(-1))
    order = np.argsort(-np.stack(likeness, axis=1), axis=1, kind="stable")[:, :_STARTS]
    found = []
    for rank in range(_STARTS):
        turned = b.copy()
        scales = np.empty(len(a), np.float32)
        for number, (flip, scale) in enumerate(choices):
            here = order[:, rank] == number
            turned[here] = _flipped(b[here], flip)
            scales[here] = scale
        axes = 3 if count == 3 else 2
        found.append((Placement(np.zeros((len(a), axes), np.float32), np.tile(scales[:, None], axes)), turned))
    return found


def _flipped(pictures: Floats, flip: tuple[bool, ...]) -> Floats:
    """(B, count, side, side) of images that are flipped along their axes."""
    turned = []
    for number, axes in enumerate(PLANES[pictures.shape[1]]):
        down, across = (-1 if flip[axis] else 1 for axis in axes)
        turned.append(pictures[:, number, ::down, ::across])
    return np.stack(turned, axis=1)


def _placed(a: Floats, b: Floats, start: Placement) -> Placement:
    """Gauss-Newton steps on the difference of both, each brought to mean 0 and norm 1 where they overlap."""
    pairs, count, side, _ = a.shape
    axes = start.shift.shape[1]
    ramp = np.arange(side, dtype=np.float32) - (side - 1) / 2
    gradient = _gradient(side)
    shift, scale = start.shift.copy(), start.scale.copy()
    for sigma in _BLURS:
        smooth_a, smooth_b = blurred(a, sigma), blurred(b, sigma)
        for _ in range(_STEPS):
            normal = np.zeros((pairs, 2 * axes, 2 * axes), np.float32)
            right = np.zeros((pairs, 2 * axes), np.float32)
            for number, (down, across) in enumerate(PLANES[count]):
                rows, rows_inside = _interpolation(shift[:, down], scale[:, down], side)
                columns, columns_inside = _interpolation(shift[:, across], scale[:, across], side)
                columns = columns.transpose(0, 2, 1)
                seen = (rows_inside[:, :, None] & columns_inside[:, None, :]).astype(np.float32)
                source = smooth_b[:, number]
                moved: Floats = np.asarray(rows @ source @ columns, np.float32)
                moved = (moved - _mean(moved, seen)) * seen
                norm = _norm(moved)
                x = _standardised(smooth_a[:, number], seen)
                along = (rows @ (gradient @ source) @ columns) * seen / norm
                beside = (rows @ (source @ gradient.T) @ columns) * seen / norm
                slopes = np.stack([along, along * ramp[:, None], beside, beside * ramp], axis=-1)
                slopes = slopes.reshape(pairs, -1, 4)
                slopes = slopes - slopes.mean(axis=1, keepdims=True)
                places = np.array([2 * down, 2 * down + 1, 2 * across, 2 * across + 1])
                transposed = slopes.transpose(0, 2, 1)
                normal[:, places[:, None], places] += transposed @ slopes
                right[:, places] += (transposed @ (x - moved / norm).reshape(pairs, -1, 1))[..., 0]
            diagonal = np.einsum("bii->bi", normal)
            normal[:, np.arange(2 * axes), np.arange(2 * axes)] += _DAMPING * diagonal + 1e-6
            step = np.linalg.solve(normal, right[..., None])[..., 0].reshape(pairs, axes, 2)
            shift = shift + np.clip(step[..., 0], -1.5, 1.5)
            scale = scale + np.clip(step[..., 1], -0.08, 0.08)
            shift = np.clip(shift, -_MOST_SHIFT * side, _MOST_SHIFT * side)
            scale = np.clip(scale, 1 / _MOST_SCALE, _MOST_SCALE)
    return Placement(shift, scale)


def _fine_agreement(a: Floats, b: Floats, placement: Placement) -> Floats:
    side = a.shape[-1]
    found = []
    for number, (down, across) in enumerate(PLANES[a.shape[1]]):
        rows, rows_inside = _interpolation(placement.shift[:, down], placement.scale[:, down], side)
        columns, columns_inside = _interpolation(placement.shift[:, across], placement.scale[:, across], side)
        seen = (rows_inside[:, :, None] & columns_inside[:, None, :]).astype(np.float32)
        x: Floats = a[:, number]
        y: Floats = np.asarray(rows @ b[:, number] @ columns.transpose(0, 2, 1), np.float32)
        # What lies outside counts as the mean, so that the blur sees no edge there.
        x, y = (x - _mean(x, seen)) * seen, (y - _mean(y, seen)) * seen
        x, y = (_standardised(picture - blurred(picture, _FINE), seen) for picture in (x, y))
        found.append((x * y).sum((-1, -2)))
    return np.asarray(np.mean(found, axis=0))


def _standardised(pictures: Floats, seen: Floats) -> Floats:
    """Mean 0 and norm 1 over what is `seen`, 0 elsewhere."""
    centred = (pictures - _mean(pictures, seen)) * seen
    return np.asarray(centred / _norm(centred))


def _mean(pictures: Floats, seen: Floats) -> Floats:
    count = np.maximum(seen.sum((-1, -2), keepdims=True), 1)
    return np.asarray((pictures * seen).sum((-1, -2), keepdims=True) / count)


def _norm(pictures: Floats) -> Floats:
    # A picture without structure agrees with none, and must not with itself by its rounding errors.
    return np.asarray(np.sqrt((pictures**2).sum((-1, -2), keepdims=True)) + 1e-3)


def _interpolation(shift: Floats, scale: Floats, side: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Matrices (B, side, side) that read cells at centre + shift + scale * (cell - centre), and which exist."""
    centre = (side - 1) / 2
    cells = np.arange(side, dtype=np.float32)
    at = centre + shift[:, None] + scale[:, None] * (cells - centre)
    inside = (at > -0.51) & (at < side - 0.49)
    distance = np.abs(np.clip(at, 0, side - 1)[:, :, None] - cells)
    return np.maximum(1 - distance, 0).astype(np.float32), inside


@functools.cache
def _blur(side: int, sigma: float) -> Floats:
    distance = np.arange(side)[:, None] - np.arange(side)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


@functools.cache
def _gradient(side: int) -> Floats:
    """Central differences, one-sided at both ends."""
    matrix = (np.eye(side, k=1) - np.eye(side, k=-1)) / 2
    matrix[0, :2] = matrix[-1, -2:] = -1, 1
    return matrix.astype(np.float32)
