"""How many salient points of two images are alike, in mirror images that belong together.

That is a look at all signs of a pair, which costs a hundredth of laying their pictures over each other.

Codes meet by the signs of one point. Lookalikes, such as the radiographs of two people, have one or two points
that meet by chance; forms of one image have many that are alike, though few of them in every sign of a bucket.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from catalog.duplicates.align import PLANES
from catalog.duplicates.codes import MIRRORED, NO_POINT, PLACE, Signs
from catalog.duplicates.pictures import PACKED_BYTES

_ALIKE = {1: (11, 4), 3: (12, 4)}
"""By the number of pictures: signs of two points that may differ, of 56, and points that must be alike."""
_FEW = 0.5
"""Of an image with few points this share is enough, ..."""
_FEWEST = 2
"""... but no fewer than so many."""
_MANY, _BEHIND = 8, 1
"""From so many points on a pair is looked at in any case, else if it is at most this far behind the best."""
_AT_ONCE = 128
_SIGNS = np.uint64((1 << PLACE) - 1)


class Points:
    """Signs of the points of many images, on disk: 480 bytes of a 2-D image, 650 of a volume."""

    def __init__(self, images: int, folder: Path | None = None) -> None:
        """`folder`: where the files lie; by default that of temporary files."""
        self._files = {count: tempfile.TemporaryFile(dir=folder) for count in PACKED_BYTES}  # noqa: SIM115
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._rows = dict.fromkeys(PACKED_BYTES, 0)
        self._row = np.zeros(images, np.uint32)

    def __enter__(self) -> Points:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, count: int, numbers: npt.NDArray[np.int64], signs: Signs) -> None:
        """Append the signs (n, sizes, points) of images of `count` pictures."""
        self._shapes[count] = signs.shape[1:]
        self._row[numbers] = np.arange(self._rows[count], self._rows[count] + len(numbers))
        self._rows[count] += len(numbers)
        self._files[count].write(np.ascontiguousarray(signs).data)

    def alike(self, count: int, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many points are alike in pairs (n, 2) of images of `count` pictures, 0 where not enough: (n,)."""
        if not len(pairs):
            return np.zeros(0, np.int64)
        self._files[count].flush()
        stored = np.memmap(self._files[count], np.uint64, "r", shape=(self._rows[count], *self._shapes[count]))
        found = []
        for start in range(0, len(pairs), _AT_ONCE):
            rows = self._row[pairs[start : start + _AT_ONCE]]
            found.append(alike(stored[rows[:, 0]], stored[rows[:, 1]], count))
        return np.concatenate(found)


def most_alike(
    pairs: npt.NDArray[np.int64], points: npt.NDArray[np.int64], images: int
) -> npt.NDArray[np.bool_]:
    """Which pairs (n, 2) have many points alike, or almost as many as any other pair of one of their images.

    So of an image with many lookalikes only the likest are looked at: the work grows with the images.
    """
    best = np.zeros(images, np.int64)
    for image in pairs.T:
        np.maximum.at(best, image, points)
    return np.asarray((points >= _MANY) | (points[:, None] >= best[pairs] - _BEHIND).any(axis=1))


def alike(first: Signs, second: Signs, count: int) -> npt.NDArray[np.int64]:
    """Points of pairs that are alike in the best flip, 0 where not enough: (B, sizes, points) twice to (B,)."""
    points, there = _points_alike(first, second, count)
    needed = np.clip(np.floor(_FEW * there), _FEWEST, _ALIKE[count][1])
    return np.where(points >= needed, points, 0)


def _points_alike(
    first: Signs, second: Signs, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Points of the first images that some of the second are like in the best flip, and of the poorer: (B,)."""
    pairs, sizes, _ = first.shape
    # Either image in its own size beside the other in all: what brings them together is one ratio of sizes.
    once = [first[:, :1].repeat(sizes, 1), first[:, 1:]], [second, second[:, :1].repeat(sizes - 1, 1)]
    one, two = (np.concatenate(parts, 1).reshape(pairs, 2 * sizes - 1, count, -1) for parts in once)
    between = one[..., :, None] ^ two[..., None, :]
    near = np.bitwise_count(between & _SIGNS) <= _ALIKE[count][0]
    near &= (one != NO_POINT)[..., :, None] & (two != NO_POINT)[..., None, :]
    mirrored = np.where(near, between >> np.uint64(MIRRORED), 4).astype(np.uint8)
    matched = np.stack([(mirrored == way).any((1, 4)) for way in range(4)], axis=-1)  # (B, count, points, ways)
    by_slab = matched.sum(axis=2)
    found = np.zeros(pairs, np.int64)
    for flip in itertools.product((0, 1), repeat=3):
        planes = PLANES[3] if count == 3 else ((1, 2),)
        of_flip = [by_slab[:, slab, flip[i] + 2 * flip[j]] for slab, (i, j) in enumerate(planes)]
        found = np.maximum(found, np.sum(of_flip, axis=0))
    there = np.minimum(*((signs[:, 0] != NO_POINT).sum(axis=-1) for signs in (first, second)))
    return found, there
