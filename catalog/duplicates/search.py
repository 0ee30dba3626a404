"""Pairs and groups of duplicates among images of which only the features are known."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.duplicates.align import agreement, threshold
from catalog.duplicates.candidates import Candidates
from catalog.duplicates.codes import described
from catalog.duplicates.pictures import PACKED_BYTES, unpack
from catalog.duplicates.points import Points, most_alike

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is, out of how much)."""
Pairs = dict[tuple[int, int], float]
"""Agreement of two images that show the same, by their numbers, the smaller first."""

_CODED_AT_ONCE, _COMPARED_AT_ONCE = 512, 128
_FEATURES = np.dtype(
    [("hash", "<u8", 2), ("pictures", "<u8"), ("source", "<u8"), ("count", "u1"), ("place", "<u4")]
)


class Images:
    """Features of images, numbered as they come: 40 bytes of each in memory, the pictures in files without a
    name."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where pictures lie meanwhile, up to 1.5 kB an image; by default that of temporary files."""
        self._files = {count: tempfile.TemporaryFile(dir=folder) for count in PACKED_BYTES}  # noqa: SIM115
        self._written = dict.fromkeys(PACKED_BYTES, 0)
        self._parts: list[npt.NDArray[np.void]] = []

    def __enter__(self) -> Images:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

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
        for number, packed in enumerate(pictures):
            count = next((count for count, size in PACKED_BYTES.items() if size == len(packed)), None)
            if count is None:
                raise ValueError(f"pictures of {len(packed)} bytes")
            rows["pictures"][number], rows["count"][number] = _digest(packed), count
            rows["place"][number] = self._written[count]
            self._files[count].write(packed)
            self._written[count] += 1
        self._parts.append(rows)

    def table(self) -> npt.NDArray[np.void]:
        """Rows of the features that are in memory."""
        self._parts = [np.concatenate([np.empty(0, _FEATURES), *self._parts])]
        return self._parts[0]

    def levels(self, count: int, places: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """Pictures (n, count, side, side) of images that have `count` of them, by their places."""
        file, size = self._files[count], PACKED_BYTES[count]
        file.flush()
        packed = [os.pread(file.fileno(), size, int(place) * size) for place in places]
        return unpack(np.frombuffer(b"".join(packed), np.uint8).reshape(-1, size))


def exact_groups(images: Images) -> list[npt.NDArray[np.int64]]:
    """Numbers of images of equal voxels, two or more to a group, each in order."""
    return _equal(images.table()["hash"])


def near_pairs(
    images: Images,
    progress: Progress,
    side: npt.NDArray[np.bool_] | None = None,
    folder: Path | None = None,
) -> Pairs:
    """Images that show the same and are not of one source.

    Of the images of one source only that pairs with an image which agrees with it best, and it with no other of
    that source: of two files with a time series each, volumes pair off instead of all with all.

    Args:
        side: by image; if given, only pairs of both sides are wanted.
        folder: for what is on disk meanwhile; by default that of temporary files.
    """
    table = images.table()
    found: Pairs = {}
    with Candidates(folder) as candidates, Points(len(table), folder) as points:
        alike = _equal(np.stack([table["pictures"], table["count"].astype(np.uint64)], axis=1))
        standing = np.ones(len(table), bool)
        for group in alike:
            # One stands for all; on each side, if there are two.
            kept = [group[:1]] if side is None else [group[side[group] == value][:1] for value in (False, True)]
            standing[group] = False
            standing[np.concatenate(kept)] = True
        structured = _add_codes(images, np.flatnonzero(standing), candidates, points, progress)
        for group in alike:
            if structured[group].any():
                found |= dict.fromkeys(_star(group, table["source"], side), 1.0)
        pairs, alike_points = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
        for some in candidates.pairs(table["source"], side):
            for count in PACKED_BYTES:
                of_kind = some[table["count"][some[:, 0]] == count]
                number = points.alike(count, of_kind)
                pairs.append(of_kind[number > 0])
                alike_points.append(number[number > 0])
    compared = np.concatenate(pairs)
    compared = compared[most_alike(compared, np.concatenate(alike_points), len(table))]
    agreeing = _agreeing(images, compared, progress, united=side is None)
    found |= agreeing if side is None else _with_those_alike(agreeing, alike, side)
    return _best_of_sources(images, found)


class Sets:
    """Which images are connected, by pairs."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, image: int) -> int:
        """The first image of the set that an image is in."""
        parent = self._parent
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    def unite(self, first: int, second: int) -> None:
        low, high = sorted((self.root(first), self.root(second)))
        self._parent[high] = low

    def groups(self) -> list[list[int]]:
        """All sets, each sorted, in the order of their first images."""
        members: dict[int, list[int]] = defaultdict(list)
        for image in sorted(self._parent):
            members[self.root(image)].append(image)
        return [members[first] for first in sorted(members)]


def united(exact: Iterable[npt.NDArray[np.int64]], near: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of images that are connected by pairs, each sorted, in the order of their first member."""
    sets = Sets()
    for group in exact:
        for image in group[1:].tolist():
            sets.unite(int(group[0]), image)
    for first, second in near:
        sets.unite(first, second)
    return sets.groups()


def _add_codes(
    images: Images,
    standing: npt.NDArray[np.int64],
    candidates: Candidates,
    points: Points,
    progress: Progress,
) -> npt.NDArray[np.bool_]:
    """Give the codes of some images to `candidates` and `points`; returns, by image, whether it has any."""
    table = images.table()
    structured = np.zeros(len(table), bool)
    done = 0
    for count in PACKED_BYTES:
        chosen = standing[table["count"][standing] == count]
        for start in range(0, len(chosen), _CODED_AT_ONCE):
            numbers = chosen[start : start + _CODED_AT_ONCE]
            made, signs = described(images.levels(count, table["place"][numbers]))
            structured[numbers[made.image]] = True
            candidates.add(made._replace(image=numbers[made.image]))
            points.add(count, numbers, signs)
            done += len(numbers)
            progress("codes", done, len(standing))
    return structured


def _agreeing(images: Images, pairs: npt.NDArray[np.int64], progress: Progress, united: bool) -> Pairs:
    """The pairs whose pictures agree, when they are laid over each other.

    With `united`, a pair that others have connected already is passed over where its images are the only ones
    of their sources: a group of n takes about n comparisons.
    """
    table = images.table()
    _, which, sizes = np.unique(table["source"], return_inverse=True, return_counts=True)
    alone = sizes[which] == 1
    sets = Sets()
    found: Pairs = {}
    done = 0

    def compare(members: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        first, second = (images.levels(count, table["place"][members[:, side]]) for side in (0, 1))
        return agreement(first, second)

    workers = len(os.sched_getaffinity(0))
    at_once = workers * _COMPARED_AT_ONCE
    with ThreadPoolExecutor(workers) as pool:
        for count in PACKED_BYTES:
            of_kind = pairs[table["count"][pairs[:, 0]] == count]
            for start in range(0, len(of_kind), at_once):
                some = of_kind[start : start + at_once]
                done += len(some)
                if united:
                    open_ = [
                        not (alone[a] and alone[b] and sets.root(a) == sets.root(b)) for a, b in some.tolist()
                    ]
                    some = some[open_]
                shares = [share for share in np.array_split(some, workers) if len(share)]
                scores = np.concatenate([np.empty(0, np.float32), *pool.map(compare, shares)])
                for (first, second), score in zip(some.tolist(), scores.tolist(), strict=True):
                    if score >= threshold(count):
                        found[first, second] = round(score, 3)
                        sets.unite(first, second)
                progress("comparisons", done, len(pairs))
    return found


def _best_of_sources(images: Images, pairs: Pairs) -> Pairs:
    """The pairs of images each of which is the best partner of the other in its source."""
    table = images.table()
    sources = table["source"]
    exact: dict[int, set[int]] = {}
    for group in exact_groups(images):
        shared = set(sources[group].tolist())
        exact |= dict.fromkeys(group.tolist(), shared)
    best: dict[tuple[int, int], tuple[float, int, int]] = {}
    for (first, second), score in pairs.items():
        for image, other in ((first, second), (second, first)):
            rank = (-score, other, image)
            place = (image, int(sources[other]))
            best[place] = min(best.get(place, rank), rank)

    def is_mutual(image: int, other: int) -> bool:
        same = (table["hash"][image] == table["hash"][other]).all()
        if not same and int(sources[other]) in exact.get(image, ()):
            return False
        return best[image, int(sources[other])][1] == other

    return {
        (first, second): score
        for (first, second), score in sorted(pairs.items())
        if is_mutual(first, second) and is_mutual(second, first)
    }


def _with_those_alike(
    pairs: Pairs, alike: Iterable[npt.NDArray[np.int64]], side: npt.NDArray[np.bool_]
) -> Pairs:
    """Also the pairs of images for which another of their side stood: each with the partner of that one."""
    stood_for = {
        int(members[0]): members[1:].tolist()
        for group in alike
        for members in (group[side[group]], group[~side[group]])
        if len(members) > 1
    }
    found = dict(pairs)
    for (first, second), score in pairs.items():
        for image, other in ((first, second), (second, first)):
            for twin in stood_for.get(image, ()):
                found[min(twin, other), max(twin, other)] = score
    return found


def _star(
    group: npt.NDArray[np.int64], sources: npt.NDArray[np.uint64], side: npt.NDArray[np.bool_] | None
) -> Iterator[tuple[int, int]]:
    """Pairs of the first image with all others that are of another source, or side."""
    if side is None:
        for other in group[1:]:
            if sources[other] != sources[group[0]]:
                yield int(group[0]), int(other)
        return
    here, there = group[side[group]], group[~side[group]]
    for image in here:
        for other in there[:1]:
            yield min(int(image), int(other)), max(int(image), int(other))
    for other in there[1:]:
        for image in here[:1]:
            yield min(int(image), int(other)), max(int(image), int(other))


def _equal(values: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.int64]]:
    """Numbers of the rows of (n, 2) that are equal to others, group by group."""
    order = np.lexsort((np.arange(len(values)), values[:, 1], values[:, 0]))
    new = np.ones(len(values), bool)
    new[1:] = (values[order[1:]] != values[order[:-1]]).any(axis=1)
    starts = np.flatnonzero(new)
    sizes = np.diff([*starts, len(values)])
    return [
        order[start : start + size] for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True)
    ]


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
