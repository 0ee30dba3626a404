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

PLACES = 256
"""Steps along a side in which the place of a point is told."""

Signs = npt.NDArray[np.uint64]

POINTS = {1: 20, 3: 9}
"""Points of a picture at most, by the number of pictures of the image."""
_BLURS = (1.1, 2.2)
_SMOOTHING = 1.2
"""Blurs are in cells of a slab; a larger picture has them in proportion."""
_RADIUS = 0.2
"""Half the side of the surroundings, as a share of the picture."""
SIZES = (1.0, 1.1, 1.22)
_GRID = 8
_LEAST = 0.05
"""Response of a point, relative to the standard deviation of the picture."""
_REFERENCE_SIDE = 32
_MOST_ROWS = 32_000
"""Of a picture that OpenCV reads from."""


class Codes(NamedTuple):
    """Codes of many images, one after the other."""

    image: npt.NDArray[np.int64]
    """Index among the images given."""
    code: Signs


class Points(NamedTuple):
    """The salient points of images of one kind: those of the first picture, then of the next."""

    signs: Signs
    """(N, sizes, points): codes as above, NO_POINT where there is none."""
    places: Levels
    """(N, points, 2): how far down and across, PLACES to a side."""


def described(pictures: Levels) -> tuple[Codes, Points]:
    """All codes of images, (N, 1 or 3, side, side), and their points.

    A picture without structure has none.
    """
    images, count, side, _ = pictures.shape
    signs, weakest, places = _signs(pictures.reshape(-1, side, side), POINTS[count])
    # Flat pictures and the three slabs have nothing in common: 0, and 1 to 3.
    which = np.tile(np.arange(count, dtype=np.uint64), images) + np.uint64(count == 3)
    signs |= np.where(signs == NO_POINT, 0, which[:, None, None] << np.uint64(BUCKET_BITS))
    # Once more with the sign that is least certain the other way round.
    both = np.stack([signs, signs ^ (np.uint64(1) << weakest)])
    valid = both[:1].repeat(2, 0) != NO_POINT
    image = np.broadcast_to(np.repeat(np.arange(images), count)[:, None, None], both.shape)
    each = Codes(image[valid], both[valid])
    signs = signs.reshape(images, count, len(SIZES), -1).swapaxes(1, 2).reshape(images, len(SIZES), -1)
    return each, Points(signs, places.reshape(images, -1, 2))


def _signs(levels: Levels, points: int) -> tuple[Signs, Signs, Levels]:
    """(P, side, side) to all signs but the number of the picture, and the least certain of the first:
    (P, sizes, points) each; and the places (P, points, 2)."""
    pictures = levels.astype(np.float32)
    number, side, _ = pictures.shape
    unit = side / _REFERENCE_SIDE
    down, across, valid = _salient(pictures, points, unit)
    smooth = blurred(pictures, _SMOOTHING * unit)
    steps = ((np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID * 2 - 1) * _RADIUS * side
    steps = np.multiply.outer(np.array(SIZES, np.float32), steps)[:, None]
    around = _sampled(smooth, down[:, None, :, None] + steps, across[:, None, :, None] + steps)
    waves = around.reshape(-1, _GRID**2) @ _waves()
    falls = waves[:, :2] < 0
    bits = np.zeros((len(waves), 64), bool)
    ordered = waves[:, 2:]
    bits[:, :BUCKET_BITS] = ordered[:, :BUCKET_BITS] > 0
    bits[:, REST : REST + REST_BITS] = ordered[:, BUCKET_BITS:] > 0
    bits[:, MIRRORED : MIRRORED + 2] = falls
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<u8")[:, 0]
    # Mirrored so that both slopes rise: odd waves change their sign with the direction.
    for fall, odd in zip(falls.T, _odd(), strict=True):
        packed ^= np.where(fall, odd, np.uint64(0))
    uncertain = np.abs(ordered[:, :BUCKET_BITS]).argmin(-1).astype(np.uint64)
    packed, uncertain = (each.reshape(number, len(SIZES), points) for each in (packed, uncertain))
    packed |= np.arange(points, dtype=np.uint64) % np.uint64(16) << np.uint64(PLACE)
    places = np.rint((np.stack([down, across], axis=-1) + 0.5) * (PLACES / side)).astype(np.uint8)
    return np.where(valid[:, None], packed, NO_POINT), uncertain, places


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
    """Linear interpolation at all pairs of rows and columns: (P, ..., g) twice to (P, ..., g, g)."""
    import cv2

    number, side, _ = pictures.shape
    shape = (*down.shape, down.shape[-1])
    last = side - 1.001
    found = np.empty(shape, np.float32)
    # Pictures lie under each other, no more of them at a time than OpenCV counts rows.
    at_once = _MOST_ROWS // side
    for start in range(0, number, at_once):
        some = slice(start, start + at_once)
        offset = side * np.arange(len(pictures[some]), dtype=np.float32)
        rows = np.clip(down[some], 0, last) + offset.reshape(-1, *(1,) * (down.ndim - 1))
        columns = np.clip(across[some], 0, last)
        x, y = (
            np.broadcast_to(each, (len(offset), *shape[1:])).reshape(len(offset), -1)
            for each in (columns[..., None, :], rows[..., :, None])
        )
        read = cv2.remap(pictures[some].reshape(-1, side), x, y, cv2.INTER_LINEAR)
        found[some] = read.reshape(len(offset), *shape[1:])
    return found


@functools.cache
def _waves() -> Floats:
    """(cells, 2 + signs): the cosine transform (DCT-II) of surroundings, the slopes first, then in order."""
    waves = np.cos(np.pi * (np.arange(_GRID) + 0.5) * np.arange(_GRID)[:, None] / _GRID)
    both = np.kron(waves, waves)[[_GRID, 1, *_order()]]
    return np.ascontiguousarray(both.T / np.linalg.norm(both, axis=1), np.float32)


@functools.cache
def _odd() -> tuple[np.uint64, np.uint64]:
    """The signs that change when surroundings are mirrored down, and across."""
    bits = np.zeros((2, 64), bool)
    for each, waves in zip(bits, np.divmod(_order(), _GRID), strict=True):
        each[:BUCKET_BITS], each[REST : REST + REST_BITS] = np.split(waves % 2 == 1, [BUCKET_BITS])
    down, across = np.packbits(bits, axis=-1, bitorder="little").view("<u8")[:, 0]
    return down, across


@functools.cache
def _order() -> npt.NDArray[np.int64]:
    """Waves from coarse to fine, without the mean and the two slopes that the mirroring has made positive."""
    down, across = np.divmod(np.arange(_GRID**2), _GRID)
    ordered = np.lexsort((across, down, down**2 + across**2))
    return ordered[3 : 3 + BUCKET_BITS + REST_BITS]
