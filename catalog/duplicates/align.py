"""Whether two images show the same: their pictures are laid over each other, and what is fine in both is
compared.

A crop or another spacing moves and stretches each axis by itself. So a placement is a flip, a shift and a scale
an axis, which the three slabs of a volume share. The salient points of both images tell it to a fraction of a
cell (`points`); least squares (Lucas and Kanade, IJCAI 1981) of many pairs at a time do the rest, where there
is hope. What is coarse is then taken away, for brains in one atlas have it in common.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.uint8]

FLAT_THRESHOLD, VOLUME_THRESHOLD = 0.76, 0.72
"""Agreement from which on two 2-D images, or two volumes, count as near duplicates (benchmarks/RESULTS.md)."""

PLANES = {1: ((1, 2),), 3: ((1, 2), (0, 2), (0, 1))}
"""By the number of pictures: which of the axes D, H and W of the image run down and across each."""
_HOPEFUL = 0.45
"""Agreement where the salient points lay the pictures, from which on it is worth to look for a better place. Of
forms of one image 99 in 100 have more than 0.55 there."""
_BLUR = 0.9
_STEPS = 2
_DAMPING = 0.02
MOST_SHIFT, MOST_SCALE = 0.14, 1.39
"""Beyond what crops of up to 10 % a side do: share of a side, and factor."""
_FINE = 2.0
"""Blur that takes away what is coarse."""


class Placement(NamedTuple):
    """How the second of each pair lies on the first, along the axes D, H and W: (B, 3) each."""

    flip: npt.NDArray[np.bool_]
    shift: Floats
    """Shares of a side."""
    scale: Floats

    def of(self, chosen: npt.NDArray[np.bool_]) -> Placement:
        return Placement(self.flip[chosen], self.shift[chosen], self.scale[chosen])


def agreement(first: Levels, second: Levels, start: Placement) -> Floats:
    """How well each of many pairs agrees, at most 1: (B, 1 or 3, side, side) twice to (B,).

    It is the correlation of the fine structure, where both show something, in the best placement near `start`;
    the mean over the slabs of a volume.
    """
    a, b = first.astype(np.float32), _flipped(second.astype(np.float32), start.flip)
    found = _fine_agreement(a, b, start)
    hopeful = found >= _HOPEFUL
    if hopeful.any():
        a, b, start = a[hopeful], b[hopeful], start.of(hopeful)
        found[hopeful] = np.maximum(found[hopeful], _fine_agreement(a, b, _placed(a, b, start)))
    return found


def threshold(count: int) -> float:
    """From which agreement on images of `count` pictures are near duplicates."""
    return VOLUME_THRESHOLD if count == 3 else FLAT_THRESHOLD


def blurred(pictures: Floats, sigma: float) -> Floats:
    """(..., side, side) convolved with a Gaussian of `sigma` cells, cut off and normalised at the edges."""
    matrix = _blur(pictures.shape[-1], sigma)
    return np.asarray(matrix @ pictures @ matrix.T)


def _flipped(pictures: Floats, flip: npt.NDArray[np.bool_]) -> Floats:
    """(B, count, side, side) of images that are flipped along some of their axes each."""
    turned = pictures.copy()
    for number, axes in enumerate(PLANES[pictures.shape[1]]):
        for way, axis in enumerate(axes, start=1):
            chosen = flip[:, axis]
            turned[chosen, number] = np.flip(turned[chosen, number], way)
    return turned


def _placed(a: Floats, b: Floats, start: Placement) -> Placement:
    """Gauss-Newton steps on the difference of both, each brought to mean 0 and norm 1 where they overlap."""
    pairs, count, side, _ = a.shape
    ramp = np.arange(side, dtype=np.float32) - (side - 1) / 2
    gradient = _gradient(side)
    shift, scale = start.shift * side, start.scale.copy()
    smooth_a, smooth_b = blurred(a, _BLUR), blurred(b, _BLUR)
    sources = np.stack([smooth_b, gradient @ smooth_b, smooth_b @ gradient.T], axis=2)
    for _ in range(_STEPS):
        normal = np.zeros((pairs, 6, 6), np.float32)
        right = np.zeros((pairs, 6), np.float32)
        for number, (down, across) in enumerate(PLANES[count]):
            rows, rows_inside = _interpolation(shift[:, down], scale[:, down], side)
            columns, columns_inside = _interpolation(shift[:, across], scale[:, across], side)
            seen = (rows_inside[:, :, None] & columns_inside[:, None, :]).astype(np.float32)
            read = rows[:, None] @ sources[:, number] @ columns.transpose(0, 2, 1)[:, None]
            moved = (read[:, 0] - _mean(read[:, 0], seen)) * seen
            norm = _norm(moved)
            difference = _standardised(smooth_a[:, number], seen) - moved / norm
            along, beside = (read[:, place] * (seen / norm) for place in (1, 2))
            slopes = np.stack([along, along * ramp[:, None], beside, beside * ramp], axis=1)
            slopes = slopes.reshape(pairs, 4, -1)
            slopes -= slopes.mean(axis=2, keepdims=True)
            places = np.array([2 * down, 2 * down + 1, 2 * across, 2 * across + 1])
            normal[:, places[:, None], places] += slopes @ slopes.transpose(0, 2, 1)
            right[:, places] += (slopes @ difference.reshape(pairs, -1, 1))[..., 0]
        diagonal = np.einsum("bii->bi", normal)
        normal[:, np.arange(6), np.arange(6)] += _DAMPING * diagonal + 1e-6
        step = np.linalg.solve(normal, right[..., None])[..., 0].reshape(pairs, 3, 2)
        shift = shift + np.clip(step[..., 0], -1.5, 1.5)
        scale = scale + np.clip(step[..., 1], -0.08, 0.08)
        shift = np.clip(shift, -MOST_SHIFT * side, MOST_SHIFT * side)
        scale = np.clip(scale, 1 / MOST_SCALE, MOST_SCALE)
    return Placement(start.flip, shift / side, scale)


def _fine_agreement(a: Floats, b: Floats, placement: Placement) -> Floats:
    side = a.shape[-1]
    found = []
    for number, (down, across) in enumerate(PLANES[a.shape[1]]):
        rows, rows_inside = _interpolation(side * placement.shift[:, down], placement.scale[:, down], side)
        columns, columns_inside = _interpolation(
            side * placement.shift[:, across], placement.scale[:, across], side
        )
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
