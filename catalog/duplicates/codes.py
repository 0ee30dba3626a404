"""Codes under which images that show the same meet: what surrounds the salient points of their pictures.

A salient point is an extremum of the difference of two blurs; its surroundings, in three sizes, are brought to
one of their four mirror images and told by the signs of their cosine transform. Such a code knows nothing of
the image's ends, so a crop leaves most as they are; the three sizes bridge the other scale that it brings
about.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from catalog.duplicates.align import Floats, Levels, blurred

BUCKET_BITS, REST_BITS = 24, 32
"""Signs that must be equal for two codes to meet, and further ones."""
REST, PLACE, MIRRORED = 26, 58, 62
"""Where these begin in a code, of 64 bits. It has first the bucket: BUCKET_BITS signs, and the number of the
picture (0 of a flat image, 1 to 3 of the slabs); then the rest; the last four bits of the number of the point;
and whether its surroundings were mirrored down, and across."""
NO_POINT = np.uint64(2**64 - 1)

Signs = npt.NDArray[np.uint64]

_POINTS = {1: 20, 3: 9}
"""Points of a picture at most, by the number of pictures of the image."""
_BLURS = (1.1, 2.2)
_SMOOTHING = 1.2
"""Blurs are in cells of a slab; a larger picture has them in proportion."""
_RADIUS = 0.2
"""Half the side of the surroundings, as a share of the picture."""
_SIZES = (1.0, 1.1, 1.22)
_GRID = 8
_LEAST = 0.05
"""Response of a point, relative to the standard deviation of the picture."""
_REFERENCE_SIDE = 32


class Codes(NamedTuple):
    """Codes of many images, one after the other."""

    image: npt.NDArray[np.int64]
    """Index among the images given."""
    code: Signs


def described(pictures: Levels) -> tuple[Codes, Signs]:
    """All codes of images, (N, 1 or 3, side, side), and their signs (N, sizes, points).

    A picture without structure has none.
    """
    images, count, side, _ = pictures.shape
    signs, weakest = _signs(pictures.reshape(-1, side, side), _POINTS[count])
    # Flat pictures and the three slabs have nothing in common: 0, and 1 to 3.
    which = np.tile(np.arange(count, dtype=np.uint64), images) + np.uint64(count == 3)
    signs |= np.where(signs == NO_POINT, 0, which[:, None, None] << np.uint64(BUCKET_BITS))
    # Once more with the sign that is least certain the other way round.
    both = np.stack([signs, signs ^ (np.uint64(1) << weakest)])
    valid = both[:1].repeat(2, 0) != NO_POINT
    image = np.broadcast_to(np.repeat(np.arange(images), count)[:, None, None], both.shape)
    each = Codes(image[valid], both[valid])
    signs = signs.reshape(images, count, len(_SIZES), -1).swapaxes(1, 2).reshape(images, len(_SIZES), -1)
    return each, signs


def _signs(levels: Levels, points: int) -> tuple[Signs, Signs]:
    """(P, side, side) to all signs but the number of the picture, and the least certain of the first:
    (P, sizes, points)."""
    pictures = levels.astype(np.float32)
    number, side, _ = pictures.shape
    unit = side / _REFERENCE_SIDE
    down, across, valid = _salient(pictures, points, unit)
    smooth = blurred(pictures, _SMOOTHING * unit)
    places = ((np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID * 2 - 1) * _RADIUS * side
    cosines, order = _cosines(_GRID), _order()
    odd = np.arange(_GRID) % 2 == 1
    point = np.arange(points, dtype=np.uint64) % np.uint64(16) << np.uint64(PLACE)
    found, uncertain = [], []
    for size in _SIZES:
        around = _sampled(smooth, down[..., None] + size * places, across[..., None] + size * places)
        transformed = cosines @ around @ cosines.T
        falls = transformed[..., 1, 0] < 0, transformed[..., 0, 1] < 0
        # Mirrored so that both slopes rise: odd waves change their sign with the direction.
        for fall, waves in zip(falls, (odd[:, None], odd[None, :]), strict=True):
            transformed = np.where(waves & fall[..., None, None], -transformed, transformed)
        ordered = transformed.reshape(number, points, -1)[..., order]
        bits = np.zeros((number, points, 64), bool)
        bits[..., :BUCKET_BITS] = ordered[..., :BUCKET_BITS] > 0
        bits[..., REST : REST + REST_BITS] = ordered[..., BUCKET_BITS:] > 0
        bits[..., MIRRORED], bits[..., MIRRORED + 1] = falls
        packed = np.packbits(bits, axis=-1, bitorder="little").view("<u8")[..., 0]
        found.append(np.where(valid, packed | point, NO_POINT))
        uncertain.append(np.abs(ordered[..., :BUCKET_BITS]).argmin(-1).astype(np.uint64))
    return np.stack(found, axis=1), np.stack(uncertain, axis=1)


def _salient(pictures: Floats, points: int, unit: float) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Rows and columns (P, points), finer than cells, of the strongest points; and which of them there are."""
    number, side, _ = pictures.shape
    margin = int(np.ceil(0.8 * _RADIUS * side))
    inner = side - 2 * margin
    response = blurred(pictures, _BLURS[0] * unit) - blurred(pictures, _BLURS[1] * unit)
    strength = np.abs(response)
    middle = strength[:, margin:-margin, margin:-margin]
    peak = np.ones(middle.shape, bool)
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            y, x = margin + row, margin + column
            peak &= middle >= strength[:, y : y + inner, x : x + inner]
    peak &= middle > _LEAST * pictures.std((1, 2))[:, None, None] + 1e-3
    ranked = np.where(peak, middle, 0).reshape(number, -1)
    chosen = np.argsort(-ranked, axis=1, kind="stable")[:, :points]
    valid = np.take_along_axis(ranked, chosen, 1) > 0
    down, across = chosen // inner + margin, chosen % inner + margin
    each = np.arange(number)[:, None]
    here = response[each, down, across]
    finer_down = _vertex(response[each, down - 1, across], here, response[each, down + 1, across])
    finer_across = _vertex(response[each, down, across - 1], here, response[each, down, across + 1])
    return (down + finer_down).astype(np.float32), (across + finer_across).astype(np.float32), valid


def _vertex(before: Floats, here: Floats, after: Floats) -> Floats:
    """Where the parabola through three values has its extremum, at most half a cell away."""
    curvature = before - 2 * here + after
    bent = np.abs(curvature) > 1e-6
    return np.clip(np.where(bent, 0.5 * (before - after) / np.where(bent, curvature, 1), 0), -0.5, 0.5)


def _sampled(pictures: Floats, down: Floats, across: Floats) -> Floats:
    """Linear interpolation at all pairs of rows and columns: (P, n, g) twice to (P, n, g, g)."""
    last = pictures.shape[-1] - 1.001
    down, across = np.clip(down, 0, last), np.clip(across, 0, last)
    rows, columns = down.astype(np.int64), across.astype(np.int64)
    below, beside = (down - rows)[..., :, None], (across - columns)[..., None, :]
    each = np.arange(len(pictures))[:, None, None, None]
    y, x = rows[..., :, None], columns[..., None, :]
    upper = pictures[each, y, x] * (1 - beside) + pictures[each, y, x + 1] * beside
    lower = pictures[each, y + 1, x] * (1 - beside) + pictures[each, y + 1, x + 1] * beside
    return np.asarray(upper * (1 - below) + lower * below)


@functools.cache
def _cosines(size: int) -> Floats:
    """The orthonormal cosine transform (DCT-II)."""
    waves = np.cos(np.pi * (np.arange(size) + 0.5) * np.arange(size)[:, None] / size) * np.sqrt(2 / size)
    waves[0] /= np.sqrt(2)
    return np.asarray(waves, np.float32)


@functools.cache
def _order() -> npt.NDArray[np.int64]:
    """Waves from coarse to fine, without the mean and the two slopes that the mirroring has made positive."""
    down, across = np.divmod(np.arange(_GRID**2), _GRID)
    ordered = np.lexsort((across, down, down**2 + across**2))
    return ordered[3 : 3 + BUCKET_BITS + REST_BITS]
