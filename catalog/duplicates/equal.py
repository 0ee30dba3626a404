"""Which of many images are equal in something, and which are connected by pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Side = npt.NDArray[np.bool_]
"""By image: on which of two sides it is."""


def distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each of many numbers (n,) once, in order.

    `np.unique` puts integers into a hash table, which takes 30 times as long where most differ.
    """
    ordered = np.sort(values)
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    found: npt.NDArray[Any] = ordered[new]
    return found


def first_equal(values: npt.NDArray[Any]) -> Numbers:
    """By image, the first whose row of `values`, (n,) or (n, columns), is the same: (n,)."""
    columns = values.reshape(len(values), -1).T
    order = np.lexsort(columns)
    new = np.ones(len(values), bool)
    new[1:] = False
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    first = np.empty(len(values), np.int64)
    # The sort is stable: a run begins with its first image.
    first[order] = np.repeat(order[new], np.diff(np.flatnonzero(np.r_[new, True])))
    return first


def equal_pairs(values: npt.NDArray[Any], side: Side | None = None) -> Numbers:
    """Pairs (n, 2) that connect all images of equal values, the smaller number first, in order.

    The first image with each of the others; with `side`, each image with the first of the other side.
    """
    first = first_equal(values)
    images = np.arange(len(values))
    if side is None:
        others = np.flatnonzero(first != images)
        return in_order(np.stack([first[others], others], axis=1))
    found = []
    for here in (False, True):
        partner = np.full(len(values), -1)
        there = images[side != here][::-1]
        partner[first[there]] = there
        mine = images[side == here]
        pairs = np.stack([mine, partner[first[mine]]], axis=1)
        found.append(pairs[pairs[:, 1] >= 0])
    return in_order(np.concatenate(found))


def in_order(pairs: Numbers) -> Numbers:
    """Each pair once, its smaller number first, sorted."""
    ordered = np.sort(pairs, axis=1)
    each = distinct(ordered[:, 0] << 32 | ordered[:, 1])
    return np.stack([each >> 32, each & 0xFFFFFFFF], axis=1)


class Sets:
    """Which images are connected, by pairs: 8 bytes an image."""

    def __init__(self, images: int) -> None:
        self._parent = np.arange(images)

    def roots(self, images: Numbers) -> Numbers:
        """The first image of the sets that images are in."""
        parent = self._parent
        found = parent[images]
        while (above := parent[found]).tobytes() != found.tobytes():
            found = above
        parent[images] = found
        return found

    def unite(self, pairs: Numbers) -> None:
        """Connect the images of pairs (n, 2)."""
        while len(pairs):
            roots = np.sort(np.stack([self.roots(images) for images in pairs.T], axis=1), axis=1)
            apart = roots[:, 0] != roots[:, 1]
            pairs, roots = pairs[apart], roots[apart]
            # Of several sets to join, one gets the lowest; the others come in the next round.
            np.minimum.at(self._parent, roots[:, 1], roots[:, 0])


def connected(pairs: Numbers, images: int) -> tuple[Numbers, Numbers]:
    """Images that are in pairs, and the numbers of their groups, from 0: (n,) each.

    Groups are in the order of their first images, and images in order in each.
    """
    sets = Sets(images)
    sets.unite(pairs)
    members = distinct(pairs.reshape(-1))
    roots = sets.roots(members)
    order = np.argsort(roots, kind="stable")
    return members[order], np.unique(roots[order], return_inverse=True)[1]
