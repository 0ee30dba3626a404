"""Groups of duplicates of a corpus: who is in them, who is kept, and what they mean for training and
validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.duplicates import missing_features
from catalog.duplicates.pictures import FEATURES_VERSION
from catalog.duplicates.search import Images, Progress, exact_groups, near_pairs, united
from catalog.errors import SetupError
from catalog.query import dataset_ids, load_dataset, read_batches, remedy_of
from catalog.schema import DUPLICATES_SCHEMA

Row = dict[str, Any]

_DESCRIBED = [
    *("dataset", "key", "subject", "modality", "split", "stored_dtype", "source_path"),
    *("shape_c", "shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"),
]
_FINEST = {"float64": 0, "float32": 1}
_READ_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Member:
    """An image in a group."""

    row: Row
    """dataset, key and what else of the catalog describes it."""
    kind: str
    """exact, if another of the group has the same values; else near."""
    kept: bool


@dataclass(frozen=True)
class Found:
    """What a search of a corpus found."""

    images: int
    """Number of images that were compared."""
    groups: list[list[Member]]
    """In the order of their first members; members by dataset and key."""

    @property
    def straddling(self) -> list[int]:
        """Numbers of the groups with images both for training and for validation."""
        splits = ({member.row["split"] for member in group} for group in self.groups)
        return [number for number, of_group in enumerate(splits) if len(of_group) > 1]

    def table(self) -> pa.Table:
        """Rows of DUPLICATES_SCHEMA."""
        rows = [
            {
                "group": number,
                "dataset": member.row["dataset"],
                "key": member.row["key"],
                "kind": member.kind,
                "kept": member.kept,
            }
            for number, group in enumerate(self.groups)
            for member in group
        ]
        return pa.Table.from_pylist(rows, schema=DUPLICATES_SCHEMA)


class CorpusImages:
    """Features of the ingested images of a corpus in `Images`, and the way from a number back to the row."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._spans: list[tuple[Corpus, str, int, int]] = []

    def add(self, corpus: Corpus, datasets: Collection[str] | None = None) -> None:
        """Append the images of all datasets, or of some, in the order of dataset and key.

        Raises SetupError if images have no features, a file is damaged, or a dataset is not there.
        """
        for dataset in dataset_ids(corpus, datasets):
            first = len(self._images)
            told = load_dataset(corpus, dataset, ["key", "source_path"])
            sources = dict(zip(told["key"].to_pylist(), told["source_path"].to_pylist(), strict=True))
            for part in feature_batches(corpus, dataset):
                keys = part["key"].to_pylist()
                named = (f"{corpus.place}\0{dataset}\0{sources[key]}" for key in keys)
                self._images.add(part["voxel_hash"].to_pylist(), part["pictures"].to_pylist(), named)
            self._spans.append((corpus, dataset, first, len(self._images)))

    def rows(self, numbers: Collection[int]) -> dict[int, Row]:
        """What the catalog has of some images."""
        wanted = np.array(sorted(numbers), np.int64)
        found: dict[int, Row] = {}
        for corpus, dataset, first, last in self._spans:
            here = wanted[(wanted >= first) & (wanted < last)]
            if not len(here):
                continue
            keys = pa.concat_tables(feature_batches(corpus, dataset, ["key"]))["key"]
            chosen = keys.take(pa.array(here - first))
            table = load_dataset(corpus, dataset, _DESCRIBED)
            rows = table.take(pc.index_in(chosen, table["key"])).to_pylist()
            found |= dict(zip(here.tolist(), rows, strict=True))
        return found


def feature_batches(
    corpus: Corpus, dataset: str, columns: Sequence[str] = ("key", "voxel_hash", "pictures")
) -> Iterator[pa.Table]:
    """The features of this version, in pieces and in the order of keys.

    Raises SetupError if the file is damaged, or images lack features.
    """
    file = corpus.features_file(dataset)
    if lacking := missing_features(corpus, dataset):
        raise SetupError(
            f"{dataset}: {lacking} images of {corpus.place} have no features, for an earlier version of "
            f"PUMIT-data ingested them. Type `pumit-data duplicates --data {corpus.place}`, which adds them "
            "from the shards."
        )
    if not file.is_file():
        return
    for part in read_batches(file, remedy_of(dataset), [*columns, "features_version"], _READ_AT_ONCE):
        yield part.filter(pc.equal(part["features_version"], FEATURES_VERSION))


def find_groups(
    corpus: Corpus, progress: Progress, *, exact_only: bool = False, folder: Path | None = None
) -> Found:
    """Find all groups of duplicates in a corpus. The same corpus gives the same groups.

    Args:
        exact_only: no near duplicates.
        folder: for what is on disk meanwhile, some 5 kB an image; by default that of temporary files.

    Raises:
        SetupError: nothing is ingested, images have no features, or a file is damaged.
    """
    with Images(folder) as images:
        known = CorpusImages(images)
        known.add(corpus)
        exact = exact_groups(images)
        near = {} if exact_only else near_pairs(images, progress, folder=folder)
        groups = united(exact, near)
        twin = {image for group in exact for image in group.tolist()}
        rows = known.rows({image for group in groups for image in group})
        return Found(len(images), [_members(group, rows, twin) for group in groups])


def kept_member(rows: Sequence[Row]) -> int:
    """Index of the one member of a group that stands for it.

    One for validation if there is any: then none of the group is trained on, and the validation stays honest.
    Else the one with most voxels, of the least reduced type, and of these the first by dataset and key.
    """

    def rank(index: int) -> tuple[Any, ...]:
        row = rows[index]
        voxels = row["shape_c"] * row["shape_d"] * row["shape_h"] * row["shape_w"]
        finest = _FINEST.get(row["stored_dtype"], 2), -np.dtype(row["stored_dtype"]).itemsize
        return (row["split"] != "validation", -voxels, *finest, row["dataset"], row["key"])

    return min(range(len(rows)), key=rank)


def summary(found: Found) -> dict[str, Any]:
    """Counts: images, groups by kind, superfluous images, images by pair of datasets, straddling groups.

    `by_datasets` has a row for each two datasets (or one) that share groups: groups, and the images of either
    in them.
    """
    between: Counter[tuple[str, str]] = Counter()
    members: Counter[tuple[str, str]] = Counter()
    for group in found.groups:
        counts = Counter(member.row["dataset"] for member in group)
        names = sorted(counts)
        for number, first in enumerate(names):
            for second in names[number:]:
                if first != second or counts[first] > 1:
                    between[first, second] += 1
                    members[first, second] += counts[first] + (counts[second] if second != first else 0)
    exact = sum(all(member.kind == "exact" for member in group) for group in found.groups)
    in_groups = sum(map(len, found.groups))
    return {
        "images": found.images,
        "groups": len(found.groups),
        "groups_exact": exact,
        "groups_with_near": len(found.groups) - exact,
        "in_groups": in_groups,
        "superfluous": in_groups - len(found.groups),
        "straddling": found.straddling,
        "by_datasets": [
            {
                "dataset": first,
                "other": second,
                "groups": between[first, second],
                "images": members[first, second],
            }
            for first, second in sorted(between)
        ],
    }


def as_json(found: Found) -> dict[str, Any]:
    """The summary, and all groups with what describes their members."""
    described = ("dataset", "key", "subject", "modality", "split")
    return summary(found) | {
        "members": [
            {"group": number, "kind": member.kind, "kept": member.kept}
            | {name: member.row[name] for name in described}
            | {"shape": [member.row[f"shape_{axis}"] for axis in "cdhw"]}
            for number, group in enumerate(found.groups)
            for member in group
        ]
    }


def _members(group: Sequence[int], rows: Mapping[int, Row], twin: Collection[int]) -> list[Member]:
    described = [rows[image] for image in group]
    kept = kept_member(described)
    return [
        Member(row, "exact" if image in twin else "near", number == kept)
        for number, (image, row) in enumerate(zip(group, described, strict=True))
    ]
