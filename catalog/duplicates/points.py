"""How many salient points of two images are alike where one placement of the images explains them all.

Codes meet by the signs of one point. Lookalikes, such as the radiographs of two people, have some points that
are alike, but few in places that one flip, shift and scale an axis bring together; forms of one image have
many. To compare all signs of a pair and the places of its points costs a tenth of laying the pictures over each
other, and tells how these are to be laid.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from catalog.duplicates.align import MOST_SCALE, MOST_SHIFT, PLANES, Placement
from catalog.duplicates.codes import MIRRORED, NO_POINT, PLACE, PLACES, POINTS, SIZES, Points
from catalog.duplicates.equal import distinct
from catalog.duplicates.rows import RowFile

_DIFFERENT = {1: 11, 3: 12}
"""By the number of pictures: signs of two points that may differ, of 56."""
_ENOUGH = 4
"""Points that must be alike, ..."""
_FEW = 0.5
"""... of an image with few points this share of them, ..."""
_FEWEST = 2
"""... but no fewer than so many."""
_BESIDE = 0.03
"""A point is where the placement tells if it is at most this share of a side away."""
_TRUST = (0.1, 0.05, 0.03, 0.02)
"""Shares of a side at which a point has a fourth of its weight, in one estimate of the placement after another.
"""
_STIFF = 1e-3
"""So much variance of places speaks for a scale of 1."""
_MANY, _BEHIND = 8, 1
"""From so many points on a pair is looked at in any case, else if it is at most this far behind the best."""
_AT_ONCE = 128
_SIGNS = np.uint64((1 << PLACE) - 1)
_FLIPS = np.array(list(itertools.product((False, True), repeat=3)))

Whole = npt.NDArray[np.int64]


def _belonging(count: int) -> npt.NDArray[np.int64]:
    """(count * 4, 8): whether mirrored surroundings, in the slabs, belong to each flip."""
    table = np.zeros((count, 4, len(_FLIPS)), np.int64)
    for slab, (down, across) in enumerate(PLANES[count]):
        table[slab, _FLIPS[:, down] + 2 * _FLIPS[:, across], np.arange(len(_FLIPS))] = 1
    return table.reshape(4 * count, -1)


_BELONGS = {count: _belonging(count) for count in PLANES}


class Likeness(NamedTuple):
    """What the points of pairs tell."""

    points: Whole
    """(B,) points that are alike in the placement, 0 where these are not enough."""
    placement: Placement


class PointStore:
    """The points of many images, on disk: 520 bytes of a 2-D image, 700 of a volume."""

    def __init__(self, images: int, folder: Path | None = None) -> None:
        """`folder`: where the files lie; by default that of temporary files."""
        self._files = {
            count: RowFile(
                [("signs", "<u8", (len(SIZES), count * points)), ("places", "u1", (count * points, 2))], folder
            )
            for count, points in POINTS.items()
        }
        self._row = np.zeros(images, np.uint32)

    def __enter__(self) -> PointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    def add(self, count: int, numbers: Whole, points: Points) -> None:
        """Append the points of images of `count` pictures."""
        file = self._files[count]
        self._row[numbers] = np.arange(len(file), len(file) + len(numbers))
        rows = np.empty(len(numbers), file.kind)
        rows["signs"], rows["places"] = points
        file.append(rows)

    def likeness(self, count: int, pairs: npt.NDArray[np.integer]) -> Likeness:
        """Of pairs (n, 2), at least one, of images of `count` pictures."""
        found = []
        for start in range(0, len(pairs), _AT_ONCE):
            numbers = self._row[pairs[start : start + _AT_ONCE]]
            rows = self._files[count].at(numbers.reshape(-1)).reshape(-1, 2)
            first, second = (Points(rows["signs"][:, side], rows["places"][:, side]) for side in (0, 1))
            found.append(likeness(first, second, count))
        placements = (np.concatenate(parts) for parts in zip(*(one.placement for one in found), strict=True))
        return Likeness(np.concatenate([one.points for one in found]), Placement(*placements))


def most_alike(
    pairs: npt.NDArray[np.integer], points: npt.NDArray[np.integer], best: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Which pairs (n, 2) have many points alike, or almost as many as any other pair of one of their images.

    So of an image with many lookalikes only the likest are looked at: the work grows with the images.

    Args:
        best: by image, the most points of any of its pairs.
    """
    return np.asarray((points >= _MANY) | (points[:, None] + _BEHIND >= best[pairs]).any(axis=1))


def likeness(first: Points, second: Points, count: int) -> Likeness:
    """Of pairs of images of `count` pictures."""
    pair, slab, one, two, flip = _matches(first, second, count)
    pairs = len(first.signs)
    planes = np.array(PLANES[count])[slab]
    each = pair[:, None]
    here, there = (
        points.places[pair, slab * POINTS[count] + point].astype(np.float64) / PLACES - 0.5
        for points, point in ((first, one), (second, two))
    )
    there = np.where(flip[each, planes], -there, there)
    axis = (3 * each + planes).reshape(-1)
    shift, scale = np.zeros(3 * pairs), np.ones(3 * pairs)

    def away() -> npt.NDArray[np.float64]:
        apart = there.reshape(-1) - shift[axis] - scale[axis] * here.reshape(-1)
        return np.asarray((apart.reshape(-1, 2) ** 2).sum(axis=1))

    x, y = here.reshape(-1), there.reshape(-1)
    for trust in _TRUST:
        weight = np.repeat((trust**2 / (trust**2 + away())) ** 2, 2)
        total = np.bincount(axis, weight, 3 * pairs) + 1e-3
        x_mean, y_mean, xx, xy = (
            np.bincount(axis, weight * each, 3 * pairs) / total for each in (x, y, x * x, x * y)
        )
        stiff = _STIFF / total
        scale = np.clip((xy - x_mean * y_mean + stiff) / (xx - x_mean**2 + stiff), 1 / MOST_SCALE, MOST_SCALE)
        shift = np.clip(y_mean - scale * x_mean, -MOST_SHIFT, MOST_SHIFT)
    placed = away() < _BESIDE**2
    alike = distinct((pair * count + slab)[placed] * POINTS[count] + one[placed])
    points = np.bincount(alike // (count * POINTS[count]), minlength=pairs)
    least = np.minimum(*((each.signs[:, 0] != NO_POINT).sum(axis=-1) for each in (first, second)))
    enough = np.clip(np.floor(_FEW * least), _FEWEST, _ENOUGH)
    placement = (each.reshape(pairs, 3).astype(np.float32) for each in (shift, scale))
    return Likeness(np.where(points >= enough, points, 0), Placement(flip, *placement))


def _matches(
    first: Points, second: Points, count: int
) -> tuple[Whole, Whole, Whole, Whole, npt.NDArray[np.bool_]]:
    """Pairs, slabs, points of the first and of the second image that are alike in the flip in which most are,
    (m,) each; and that flip (B, 3)."""
    pairs, sizes, _ = first.signs.shape
    # Either image in its own size beside the other in all: what brings them together is one ratio of sizes.
    signs = first.signs, second.signs
    once = [signs[0][:, :1].repeat(sizes, 1), signs[0][:, 1:]], [signs[1], signs[1][:, :1].repeat(sizes - 1, 1)]
    one, two = (np.concatenate(parts, 1).reshape(pairs, 2 * sizes - 1, count, -1) for parts in once)
    between = one[..., :, None] ^ two[..., None, :]
    near = np.flatnonzero(np.bitwise_count(between & _SIGNS) <= _DIFFERENT[count])
    pair, size, slab, i, j = np.unravel_index(near, between.shape)
    there = (one[pair, size, slab, i] != NO_POINT) & (two[pair, size, slab, j] != NO_POINT)
    ways = (between.reshape(-1)[near] >> np.uint64(MIRRORED)).astype(np.int64)
    n = one.shape[-1]
    each = distinct(((((pair * count + slab) * 4 + ways) * n + i) * n + j)[there])
    i, j, way = each // n % n, each % n, each // n**2 % 4
    pair, slab = np.divmod(each // (4 * n**2), count)
    # Each point of the first image has one vote, with whomever it is alike.
    votes = distinct(each // n) // n
    votes = np.bincount(votes, minlength=pairs * count * 4).reshape(pairs, -1)
    flip = _FLIPS[(votes @ _BELONGS[count]).argmax(axis=1)]
    planes = np.array(PLANES[count])[slab]
    belongs = (flip[pair[:, None], planes] == np.stack([way & 1, way >> 1], axis=1)).all(axis=1)
    return pair[belongs], slab[belongs], i[belongs], j[belongs], flip
