"""Pairs of duplicates among images of which only the features are known.

What grows with the images lies in arrays, and on disk what grows with the pairs that are looked at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from catalog.duplicates.align import Placement, agreement, threshold
from catalog.duplicates.candidates import Candidates, Progress
from catalog.duplicates.codes import described
from catalog.duplicates.equal import Numbers, Sets, Side, equal_pairs, first_equal
from catalog.duplicates.pictures import PACKED_BYTES, unpack
from catalog.duplicates.points import PointStore, most_alike
from catalog.duplicates.rows import RowFile

_CODED_AT_ONCE, _COMPARED_AT_ONCE = 512, 128
_READ_AT_ONCE = 1 << 16
_FEATURES = np.dtype(
    [("hash", "<u8", 2), ("pictures", "<u8"), ("source", "<u8"), ("count", "u1"), ("place", "<u4")]
)
_LIKELY = np.dtype(
    [("pair", "<u4", 2), ("points", "u1"), ("flip", "?", 3), ("shift", "<f2", 3), ("scale", "<f2", 3)]
)
"""A pair with enough points alike, and how these lay the second image on the first."""


class Pairs(NamedTuple):
    """Images that show the same."""

    images: Numbers
    """(n, 2) by their numbers, the smaller first, in order."""
    agreement: npt.NDArray[np.float32]
    """(n,) to three decimals."""


class Work(NamedTuple):
    """What a search looked at."""

    codes: int
    crowded: int
    """Codes in buckets so full that they were not compared with all others there: what only these tell is lost.
    """
    meetings: int
    """Two codes of one bucket that are alike in the rest as well."""
    passed_over: int
    """Pairs of images whose codes meet, but of which one has many other lookalikes with more codes that do."""
    candidates: int
    """Pairs of images of which all points were looked at, ..."""
    likely: int
    """... with enough of them alike, ..."""
    compared: int
    """... and whose pictures were compared."""


class Near(NamedTuple):
    """What a search found, and what it took."""

    pairs: Pairs
    work: Work


class Images:
    """Features of images, numbered as they come: 37 bytes of each in memory, the pictures in files without a
    name."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where pictures lie meanwhile, up to 1.5 kB an image; by default that of temporary files."""
        self._files = {count: RowFile(("u1", (size,)), folder) for count, size in PACKED_BYTES.items()}
        self._parts: list[npt.NDArray[np.void]] = []

    def __enter__(self) -> Images:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, voxel_hashes: Sequence[bytes], pictures: Sequence[bytes], sources: Iterable[str]) -> None:
        """Append images.

        Args:
            voxel_hashes: 16 bytes each.
            pictures: as `catalog.duplicates.pictures.pack` made them.
            sources: names of the files or series they come from; images of one are no near duplicates.

        Raises:
            ValueError: pictures of another size.
        """
        rows = np.empty(len(pictures), _FEATURES)
        rows["hash"] = np.frombuffer(b"".join(voxel_hashes), "<u8").reshape(-1, 2)
        rows["source"] = [_digest(name.encode(errors="surrogatepass")) for name in sources]
        rows["pictures"] = [_digest(packed) for packed in pictures]
        sizes = np.array([len(packed) for packed in pictures], np.int64)
        known = np.zeros(len(pictures), bool)
        for count, file in self._files.items():
            chosen = np.flatnonzero(sizes == PACKED_BYTES[count])
            known[chosen] = True
            rows["count"][chosen] = count
            rows["place"][chosen] = np.arange(len(file), len(file) + len(chosen))
            packed = b"".join(pictures[number] for number in chosen.tolist())
            file.append(np.frombuffer(packed, np.uint8).reshape(len(chosen), PACKED_BYTES[count]))
        if not known.all():
            raise ValueError(f"pictures of {sizes[~known][0]} bytes")
        self._parts.append(rows)

    def table(self) -> npt.NDArray[np.void]:
        """Rows of the features that are in memory."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty(0, _FEATURES), *self._parts])]
        return self._parts[0]

    def levels(self, numbers: Numbers) -> npt.NDArray[np.uint8]:
        """Pictures (n, count, side, side) of images that have equally many of them."""
        rows = self.table()[numbers]
        return unpack(self._files[int(rows["count"][0])].at(rows["place"]))


def exact_pairs(images: Images, side: Side | None = None) -> Numbers:
    """Pairs (n, 2) that connect all images of equal voxels, as `equal_pairs` has them."""
    return equal_pairs(images.table()["hash"], side)


def near_pairs(
    images: Images, progress: Progress, side: Side | None = None, folder: Path | None = None
) -> Near:
    """Images that show the same and are not of one source.

    Of the images of one source only that pairs with an image which agrees with it best, and it with no other of
    that source: of two files with a time series each, volumes pair off instead of all with all.

    Args:
        side: by image; if given, only pairs of both sides are wanted.
        folder: for what is on disk meanwhile; by default that of temporary files.
    """
    table = images.table()
    source = first_equal(table["source"])
    shown = table["pictures"]
    # One stands for all that are alike; on each side, if there are two.
    stand_in = first_equal(shown if side is None else np.stack([shown, side.astype(np.uint64)], axis=1))
    standing = np.flatnonzero(stand_in == np.arange(len(table)))
    alike = equal_pairs(shown, side)
    with RowFile(_LIKELY, folder) as likely:
        structured, best, work = _likely_pairs(images, standing, source, side, likely, progress, folder)
        agreeing, compared = _agreeing(images, likely, best, source, progress, united=side is None)
    if side is not None:
        agreeing = _with_those_alike(agreeing, stand_in)
    alike = alike[structured[stand_in[alike[:, 0]]] & (source[alike[:, 0]] != source[alike[:, 1]])]
    ones = np.ones(len(alike), np.float32)
    both = Pairs(np.concatenate([agreeing.images, alike]), np.concatenate([agreeing.agreement, ones]))
    _, chosen = np.unique(both.images[:, 0] << 32 | both.images[:, 1], return_index=True)
    found = Pairs(both.images[chosen], both.agreement[chosen])
    return Near(best_of_sources(found, source, first_equal(table["hash"])), work._replace(compared=compared))


def best_of_sources(pairs: Pairs, source: Numbers, exact: Numbers) -> Pairs:
    """The pairs of images each of which is the best partner of the other in its source.

    That of an image of which a source has one with equal voxels is no other one.

    Args:
        source: by image, a number of its source below 2^32.
        exact: by image, the first that has equal voxels.
    """
    image = np.concatenate([pairs.images[:, 0], pairs.images[:, 1]])
    other = np.concatenate([pairs.images[:, 1], pairs.images[:, 0]])
    order = np.lexsort((other, -np.tile(pairs.agreement, 2), source[other], image))
    place = image[order] << 32 | source[other[order]]
    run = np.r_[True, place[1:] != place[:-1]][: len(place)].cumsum() - 1
    is_best = np.zeros(len(image), bool)
    is_best[order[np.unique(run, return_index=True)[1]]] = True
    twins = np.flatnonzero(np.bincount(exact, minlength=len(exact))[exact] > 1)
    has_exact = np.isin(exact[image] << 32 | source[other], exact[twins] << 32 | source[twins])
    fit = is_best & ((exact[image] == exact[other]) | ~has_exact)
    mutual = fit[: len(pairs.images)] & fit[len(pairs.images) :]
    return Pairs(pairs.images[mutual], pairs.agreement[mutual])


def _likely_pairs(
    images: Images,
    standing: Numbers,
    source: Numbers,
    side: Side | None,
    likely: RowFile,
    progress: Progress,
    folder: Path | None,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8], Work]:
    """Fill `likely`. Returns, by image, whether it has any code and the most points of a pair; and the work."""
    counts = images.table()["count"]
    structured = np.zeros(len(counts), bool)
    best = np.zeros(len(counts), np.uint8)
    done = looked_at = 0
    with Candidates(len(counts), folder) as candidates, PointStore(len(counts), folder) as points:
        for count in PACKED_BYTES:
            chosen = standing[counts[standing] == count]
            for start in range(0, len(chosen), _CODED_AT_ONCE):
                numbers = chosen[start : start + _CODED_AT_ONCE]
                codes, found = described(images.levels(numbers))
                structured[numbers[codes.image]] = True
                candidates.add(codes._replace(image=numbers[codes.image]))
                points.add(count, numbers, found)
                done += len(numbers)
                progress("codes", done, len(standing))
        for some in candidates.pairs(source, progress, side):
            looked_at += len(some)
            for count in PACKED_BYTES:
                pairs = some[counts[some[:, 0]] == count]
                if not len(pairs):
                    continue
                alike, placement = points.likeness(count, pairs)
                enough = alike > 0
                rows = np.empty(np.count_nonzero(enough), _LIKELY)
                rows["pair"], rows["points"] = pairs[enough], alike[enough]
                rows["flip"], rows["shift"], rows["scale"] = placement.of(enough)
                likely.append(rows)
                for image in rows["pair"].T:
                    np.maximum.at(best, image, rows["points"])
    work = Work(
        codes=candidates.codes,
        crowded=candidates.crowded,
        meetings=candidates.meetings,
        passed_over=candidates.passed_over,
        candidates=looked_at,
        likely=len(likely),
        compared=0,
    )
    return structured, best, work


def _agreeing(
    images: Images,
    likely: RowFile,
    best: npt.NDArray[np.uint8],
    source: Numbers,
    progress: Progress,
    united: bool,
) -> tuple[Pairs, int]:
    """The pairs whose pictures agree, when they are laid over each other; and how many were.

    With `united`, a pair that others have connected already is passed over where its images are the only ones
    of their sources: a group of n takes about n comparisons.
    """
    counts = images.table()["count"]
    alone = np.bincount(source, minlength=len(source))[source] == 1
    sets = Sets(len(source))
    found = [Pairs(np.empty((0, 2), np.int64), np.empty(0, np.float32))]
    done = compared = 0

    def compare(rows: npt.NDArray[np.void]) -> npt.NDArray[np.float32]:
        first, second = (images.levels(rows["pair"][:, place]) for place in (0, 1))
        shift, scale = (rows[name].astype(np.float32) for name in ("shift", "scale"))
        return agreement(first, second, Placement(rows["flip"], shift, scale))

    workers = len(os.sched_getaffinity(0))
    at_once = workers * _COMPARED_AT_ONCE
    with ThreadPoolExecutor(workers) as pool:
        for part in likely.parts(_READ_AT_ONCE):
            chosen = part[most_alike(part["pair"], part["points"], best)]
            for count in PACKED_BYTES:
                of_kind = chosen[counts[chosen["pair"][:, 0]] == count]
                for start in range(0, len(of_kind), at_once):
                    some = of_kind[start : start + at_once]
                    if united:
                        first, second = some["pair"].T
                        one = alone[first] & alone[second] & (sets.roots(first) == sets.roots(second))
                        some = some[~one]
                    compared += len(some)
                    shares = [share for share in np.array_split(some, workers) if len(share)]
                    scores = np.concatenate([np.empty(0, np.float32), *pool.map(compare, shares)])
                    agree = scores >= threshold(count)
                    pairs = some["pair"][agree].astype(np.int64)
                    found.append(Pairs(pairs, np.round(scores[agree], 3)))
                    sets.unite(pairs)
            done += len(part)
            progress("comparisons", done, len(likely))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True))), compared


def _with_those_alike(pairs: Pairs, stand_in: Numbers) -> Pairs:
    """Also the pairs of images for which another of their side stood: each with the partner of that one."""
    followers = np.flatnonzero(stand_in != np.arange(len(stand_in)))
    followers = followers[np.argsort(stand_in[followers], kind="stable")]
    found = [pairs]
    for image, other in (pairs.images.T, pairs.images.T[::-1]):
        begin, end = (np.searchsorted(stand_in[followers], image, side) for side in ("left", "right"))
        times = end - begin
        each = np.arange(times.sum()) - np.repeat(times.cumsum() - times, times)
        more = np.stack([followers[np.repeat(begin, times) + each], np.repeat(other, times)], axis=1)
        found.append(Pairs(np.sort(more, axis=1), np.repeat(pairs.agreement, times)))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
