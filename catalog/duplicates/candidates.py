"""Which pairs of millions of images are worth a comparison: those of which some codes meet.

Codes wait on disk, in parts by bucket, and each part is sorted in memory. In a bucket a code is compared with
the next few only, in the order of the rest of their signs: one that is crowded, of images without much in them,
costs time in proportion to its size and not to its square. Meetings wait on disk in the same way, in parts of
successive images. A pair met by chance has one point in common, in several sizes: so points are counted, and
only in mirror images that belong together.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.duplicates.align import PLANES
from catalog.duplicates.codes import BUCKET_BITS, PLACE, REST, Codes
from catalog.duplicates.equal import Numbers, Side, distinct

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is, out of how much)."""

NEIGHBOURS = 16
"""So many following codes of its bucket a code is compared with."""
_NEIGHBOURS_ACROSS = 4096
"""The same between two sides, where only buckets with codes of both are looked at."""
_MOST_DIFFERENT, _ROOMY = 9, 16
"""Codes meet whose rests differ in so many signs at most; of unlike surroundings half do, and one pair in 100
comes through. That is for buckets of up to _ROOMY codes. Each time a bucket is 4 times as large it is one sign
less, which lets a fourth of the pairs through: in a crowd an image meets as many others by chance as elsewhere.
"""
_PARTS, _IMAGES_OF_A_PART = 128, 1 << 14
"""Files of codes, and of meetings: as many, or one for so many images."""
_HELD = 1 << 22
_SURE, _POINTS = 3, 2
"""A pair is worth it if the rests of two codes differ in _SURE signs less than they may, or _POINTS points meet
whose mirror images belong together, ..."""
_MOST = 8
"""... and if no more than so many pairs of its first image with later ones have more points that meet."""

_CODE = np.dtype([("code", "<u8"), ("image", "<u4")])
_MEETING = np.dtype([("a", "<u4"), ("b", "<u4"), ("spare", "u1"), ("place", "u1")])
_BUCKET, _UP_TO_PLACE = np.uint64((1 << REST) - 1), np.uint64((1 << PLACE) - 1)


class Candidates:
    """Takes codes of images and gives back pairs, of up to 2^32 images. In memory is one part at a time."""

    def __init__(self, images: int, folder: Path | None = None) -> None:
        """Args:
        images: number of images.
        folder: where files may lie meanwhile, some 2 kB an image and 10 bytes a meeting; by default that of
            temporary files.
        """
        self._images = images
        # A power of two: the last bits of a code are those of its bucket.
        self._parts = max(_PARTS, 1 << (images // _IMAGES_OF_A_PART).bit_length())
        self._folder = tempfile.TemporaryDirectory(prefix="pumit-data-codes-", dir=folder)
        self._held: list[npt.NDArray[np.void]] = []
        self.codes = 0
        """So many were sorted, ..."""
        self.crowded = 0
        """... and of these had more neighbours in their bucket than they were compared with."""
        self.meetings = 0
        self.passed_over = 0
        """Pairs that would have been worth it, but of whose first image _MOST others are more so."""

    def __enter__(self) -> Candidates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def add(self, codes: Codes) -> None:
        """`codes.image` holds the numbers of images."""
        entries = np.empty(len(codes.code), _CODE)
        entries["code"], entries["image"] = codes.code, codes.image
        self._held.append(entries)
        if sum(map(len, self._held)) >= _HELD:
            self._spill()

    def pairs(
        self, source: npt.NDArray[np.integer[Any]], progress: Progress, side: Side | None = None
    ) -> Iterator[Numbers]:
        """Pairs (n, 2) of image numbers, the smaller first, each once and in order. To be called once.

        Args:
            source: by image; those of one source are no pair.
            progress: told of the codes that were sorted, and of the meetings that were counted.
            side: by image; if given, only pairs of both sides are wanted.
        """
        self._spill()
        met: list[npt.NDArray[np.void]] = []
        held = 0
        for number in range(self._parts):
            progress("buckets", number, self._parts)
            for meetings in self._meetings(number, source, side):
                met.append(meetings)
                held += len(meetings)
                if held >= _HELD:
                    self._spill_meetings(met)
                    met, held = [], 0
        self._spill_meetings(met)
        for number in range(self._parts):
            progress("meetings", number, self._parts)
            file = self._part("meetings", number)
            if file.exists():
                worthwhile, first = _worthwhile(np.fromfile(file, _MEETING))
                # An evaluation set may hold many forms of one image, which do not lead to each other.
                chosen = first if side is None else np.ones(len(worthwhile), bool)
                self.passed_over += int(np.count_nonzero(~chosen))
                yield worthwhile[chosen]
                file.unlink()

    def _spill(self) -> None:
        if self._held:
            entries = np.concatenate(self._held)
            self._held = []
            self._append("codes", entries, entries["code"] % np.uint64(self._parts))

    def _spill_meetings(self, met: list[npt.NDArray[np.void]]) -> None:
        """In parts of successive images, so that the pairs come in order."""
        if met:
            meetings = np.concatenate(met)
            self._append("meetings", meetings, meetings["a"].astype(np.int64) * self._parts // self._images)

    def _append(self, what: str, entries: npt.NDArray[np.void], part: npt.NDArray[np.integer[Any]]) -> None:
        order = np.argsort(part.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=self._parts))
        for number, chosen in enumerate(np.split(entries[order], ends[:-1])):
            if len(chosen):
                with self._part(what, number).open("ab") as file:
                    chosen.tofile(file)

    def _part(self, what: str, number: int) -> Path:
        return Path(self._folder.name) / f"{what}-{number:05d}"

    def _meetings(
        self, number: int, source: npt.NDArray[np.integer[Any]], side: Side | None
    ) -> Iterator[npt.NDArray[np.void]]:
        """The meetings of codes in one part."""
        file = self._part("codes", number)
        if not file.exists():
            return
        entries = np.fromfile(file, _CODE)
        file.unlink()
        if side is not None:
            here = side[entries["image"]]
            buckets = entries["code"] & _BUCKET
            both = np.intersect1d(buckets[here], buckets[~here])
            entries = entries[np.isin(buckets, both)]
        # By bucket, then rest: the bits are turned so that those of the bucket are the first.
        signs = entries["code"] & _UP_TO_PLACE
        turned = (signs << np.uint64(64 - REST)) | (signs >> np.uint64(REST))
        order = _ordered(turned, entries["image"], entries["code"] >> np.uint64(PLACE))
        code, image = (np.ascontiguousarray(entries[name][order]) for name in ("code", "image"))
        bucket, rest = code & _BUCKET, (code & _UP_TO_PLACE) >> np.uint64(REST)
        slab = (bucket >> np.uint64(BUCKET_BITS)).astype(np.uint8)
        at = (code >> np.uint64(PLACE)).astype(np.uint8)
        self.codes += len(bucket)
        sizes = np.diff(np.flatnonzero(np.r_[bucket[1:] != bucket[:-1], True]), prepend=-1)
        fewer = np.ceil(np.log2(np.maximum(sizes, _ROOMY) / _ROOMY) / 2)
        allowed = np.repeat(np.maximum(_MOST_DIFFERENT - fewer, 0).astype(np.uint8), sizes)
        together = np.arange(len(bucket))
        most = NEIGHBOURS if side is None else _NEIGHBOURS_ACROSS
        for distance in range(1, most + 2):
            together = together[: np.searchsorted(together, len(bucket) - distance)]
            together = together[bucket[together] == bucket[together + distance]]
            if not len(together):
                break
            if distance > most:
                self.crowded += len(together)
                break
            different = np.bitwise_count(rest[together] ^ rest[together + distance])
            near = different <= allowed[together]
            one, two = together[near], together[near] + distance
            spare = allowed[one] - different[near]
            wanted = source[image[one]] != source[image[two]]
            if side is not None:
                wanted &= side[image[one]] != side[image[two]]
            one, two, spare = one[wanted], two[wanted], spare[wanted]
            swapped = image[one] > image[two]
            one, two = np.where(swapped, two, one), np.where(swapped, one, two)
            met = np.empty(len(one), _MEETING)
            met["a"], met["b"], met["spare"] = image[one], image[two], spare
            met["place"] = (slab[one] << 6) | ((at[one] ^ at[two]) & 48) | (at[one] & 15)
            self.meetings += len(met)
            yield met


def _ordered(
    signs: npt.NDArray[np.uint64], image: npt.NDArray[np.uint32], place: npt.NDArray[np.uint64]
) -> Numbers:
    """As `np.lexsort((place, image, signs))`, in less time: few signs are equal."""
    order = np.argsort(signs)
    ordered = signs[order]
    same = ordered[1:] == ordered[:-1]
    tied = np.flatnonzero(np.r_[same, False] | np.r_[False, same])
    of_tied = order[tied]
    order[tied] = of_tied[np.lexsort((place[of_tied], image[of_tied], ordered[tied]))]
    return order


def _worthwhile(meetings: npt.NDArray[np.void]) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Pairs (n, 2), each once and in order, of those that met in one part; and which are among the _MOST best
    of their first images."""
    key = (meetings["a"].astype(np.uint64) << np.uint64(32)) | meetings["b"]
    order = np.argsort(key)
    key, place = key[order], meetings["place"][order]
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    most = np.maximum.reduceat(meetings["spare"][order], starts)
    pair = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(key)]))
    # Each point of the first image counts once, in whatever sizes and with whomever it meets.
    each = distinct((pair << 8) | place)
    pair, belongs = each >> 8, _BELONGS[each & 255]
    points = np.zeros(len(starts), np.int64)
    for flip in range(belongs.shape[1]):
        points = np.maximum(points, np.bincount(pair[belongs[:, flip]], minlength=len(starts)))
    chosen = (most >= _SURE) | (points >= _POINTS)
    found = key[starts[chosen]]
    pairs = np.stack([found >> np.uint64(32), found & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)
    ranked = np.lexsort((-most[chosen].astype(np.int64), -points[chosen], pairs[:, 0]))
    # Ranked within their first images, which stay in order.
    rank = np.empty(len(pairs), np.int64)
    rank[ranked] = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    return pairs, rank < _MOST


def _belonging() -> npt.NDArray[np.bool_]:
    """(256, 8): whether what a meeting says of mirrored sides belongs to each flip of the axes D, H and W."""
    table = np.zeros((256, 8), bool)
    for place, flip in itertools.product(range(256), range(8)):
        slab = place >> 6
        down, across = PLANES[3][slab - 1] if slab else PLANES[1][0]
        table[place, flip] = ((place >> 4) & 1, (place >> 5) & 1) == ((flip >> down) & 1, (flip >> across) & 1)
    return table


_BELONGS = _belonging()
