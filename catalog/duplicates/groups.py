"""Groups of duplicates of a corpus: who is in them, who is kept, and what they mean for training and
validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.duplicates import missing_features
from catalog.duplicates.candidates import Progress
from catalog.duplicates.equal import Numbers, connected, distinct
from catalog.duplicates.pictures import FEATURES_VERSION
from catalog.duplicates.search import Images, Work, exact_pairs, near_pairs
from catalog.errors import SetupError
from catalog.query import dataset_ids, load_dataset, read_batches, remedy_of
from catalog.schema import CATALOG_SCHEMA, DUPLICATES_SCHEMA

Row = dict[str, Any]

_DESCRIBED = [
    *("dataset", "key", "subject", "modality", "split", "stored_dtype", "source_path"),
    *("shape_c", "shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"),
]
_FINEST = {"float64": 0, "float32": 1}
_READ_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Found:
    """What a search of a corpus found."""

    images: int
    """Number of images that were compared."""
    members: pa.Table
    """A row for each image in a group, by group, dataset and key: the columns of DUPLICATES_SCHEMA and what
    else of the catalog describes it. Groups are numbered from 0, in the order of their first members."""
    work: Work | None
    """What the search for near duplicates looked at, if there was one."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.members["group"][-1].as_py()) + 1 if len(self.members) else 0

    @property
    def straddling(self) -> list[int]:
        """Numbers of the groups with images both for training and for validation, in order."""
        splits = self.members.group_by("group").aggregate([("split", "count_distinct")])
        return sorted(splits.filter(pc.greater(splits["split_count_distinct"], 1))["group"].to_pylist())

    def group(self, number: int) -> list[Row]:
        """The members of a group."""
        numbers = self.members["group"].to_numpy()
        start, end = (int(np.searchsorted(numbers, number, side)) for side in ("left", "right"))
        return list(self.members.slice(start, end - start).to_pylist())

    def table(self) -> pa.Table:
        """Rows of DUPLICATES_SCHEMA."""
        return self.members.select(DUPLICATES_SCHEMA.names).cast(DUPLICATES_SCHEMA)


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
            first = done = len(self._images)
            keys = _column([part["key"] for part in feature_batches(corpus, dataset, ["key"])])
            told = load_dataset(corpus, dataset, ["key", "source_path"])
            sources = told["source_path"].take(pc.index_in(keys, told["key"]))
            for part in feature_batches(corpus, dataset, ["voxel_hash", "pictures"]):
                paths = sources.slice(done - first, len(part)).to_pylist()
                named = (f"{corpus.place}\0{dataset}\0{path}" for path in paths)
                self._images.add(part["voxel_hash"].to_pylist(), part["pictures"].to_pylist(), named)
                done += len(part)
            self._spans.append((corpus, dataset, first, done))

    def rows(self, numbers: Numbers) -> pa.Table:
        """What the catalog has of images of a corpus, whose numbers are in order."""
        found = []
        for corpus, dataset, first, last in self._spans:
            here = numbers[(numbers >= first) & (numbers < last)] - first
            if not len(here):
                continue
            keys, done = [], 0
            for part in feature_batches(corpus, dataset, ["key"]):
                begin, end = np.searchsorted(here, (done, done + len(part)))
                keys.append(part["key"].take(here[begin:end] - done))
                done += len(part)
            wanted = _column(keys)
            described = pa.concat_tables(
                part.filter(pc.is_in(part["key"], wanted))
                for part in read_batches(
                    corpus.catalog_file(dataset), remedy_of(dataset), _DESCRIBED, schema=CATALOG_SCHEMA
                )
            )
            found.append(described.take(pc.index_in(wanted, described["key"])))
        return pa.concat_tables(found or [CATALOG_SCHEMA.empty_table().select(_DESCRIBED)])


def _column(parts: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())


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
        pairs, work = exact_pairs(images), None
        equal = distinct(pairs.reshape(-1))
        if not exact_only:
            near, work = near_pairs(images, progress, folder=folder)
            pairs = np.concatenate([pairs, near.images])
        members, groups = connected(pairs, len(images))
        order = np.argsort(members)
        rows = known.rows(members[order])
        rows = rows.take(np.argsort(order))
        kinds = np.where(np.isin(members, equal), "exact", "near")
        rows = rows.append_column("group", pa.array(groups)).append_column("kind", pa.array(kinds, pa.string()))
        return Found(len(images), rows.append_column("kept", pa.array(kept_members(rows))), work)


def kept_members(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows stand for their groups: (n,). Rows are by group, dataset and key.

    One for validation if there is any: then none of the group is trained on, and the validation stays honest.
    Else the one with most voxels, of the least reduced type, and of these the first by dataset and key.
    """
    voxels = np.prod([rows[f"shape_{axis}"].to_numpy() for axis in "cdhw"], axis=0)
    dtypes = rows["stored_dtype"].combine_chunks().dictionary_encode()
    names, each = dtypes.dictionary.to_pylist(), dtypes.indices.to_numpy()
    finest = np.array([_FINEST.get(name, 2) for name in names], np.int64)[each]
    itemsize = np.array([np.dtype(name).itemsize for name in names], np.int64)[each]
    trained_on = pc.not_equal(rows["split"], "validation").to_numpy()
    group = rows["group"].to_numpy()
    order = np.lexsort((-itemsize, finest, -voxels, trained_on, group))
    kept = np.zeros(len(rows), bool)
    kept[order[np.unique(group[order], return_index=True)[1]]] = True
    return kept


def summary(found: Found) -> dict[str, Any]:
    """Counts: images, groups by kind, superfluous images, images by pair of datasets, straddling groups, and
    what the search looked at (`Work`).

    `by_datasets` has a row for each two datasets (or one) that share groups: groups, and the images of either
    in them.
    """
    between: Counter[tuple[str, str]] = Counter()
    members: Counter[tuple[str, str]] = Counter()
    shares = found.members.group_by(["group", "dataset"]).aggregate([([], "count_all")])
    shares = shares.sort_by([("group", "ascending"), ("dataset", "ascending")])
    each = zip(*(shares[name].to_pylist() for name in ("group", "dataset", "count_all")), strict=True)
    for _, of_group in groupby(each, key=lambda share: share[0]):
        counts = [(name, count) for _, name, count in of_group]
        for number, (first, mine) in enumerate(counts):
            for second, theirs in counts[number:]:
                if first != second or mine > 1:
                    between[first, second] += 1
                    members[first, second] += mine + (theirs if second != first else 0)
    near = found.members.filter(pc.equal(found.members["kind"], "near"))["group"]
    with_near = len(near.unique())
    in_groups = len(found.members)
    return {
        "images": found.images,
        "groups": found.groups,
        "groups_exact": found.groups - with_near,
        "groups_with_near": with_near,
        "in_groups": in_groups,
        "superfluous": in_groups - found.groups,
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
        "work": found.work._asdict() if found.work else None,
    }


def as_json(found: Found) -> dict[str, Any]:
    """The summary, and all groups with what describes their members."""
    described = ("group", "kind", "kept", "dataset", "key", "subject", "modality", "split")
    return summary(found) | {
        "members": [
            {name: row[name] for name in described} | {"shape": [row[f"shape_{axis}"] for axis in "cdhw"]}
            for row in found.members.to_pylist()
        ]
    }
