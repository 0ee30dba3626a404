"""Features of images that an earlier version of PUMIT-data ingested: from the shards, no raw image is
needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.duplicates import missing_features
from catalog.duplicates.pictures import FEATURES_VERSION
from catalog.errors import SetupError
from catalog.manifest import publish, refuse_damaged, settle
from catalog.merge import SortedRuns, merged
from catalog.query import dataset_ids, load_dataset, read_batches, remedy_of
from catalog.schema import FEATURES_SCHEMA
from catalog.scratch import NameSet
from catalog.write import features_file
from ingest.features import features
from ingest.journal import Journal
from shards.chunks import Wanted
from shards.remote import open_reader, read_box

Progress = Callable[[int, int], None]
"""Called with (images done, images to do)."""

_COLUMNS = [
    *("key", "shape_d", "shape_h", "shape_w", "slope", "intercept", "window_low", "window_high"),
    *("shard_path", "shard_shape", "stored_dtype", "shard_index"),
]
_HELD = 1 << 13


def add_features(
    corpus: Corpus,
    dataset: str,
    progress: Progress = lambda done, total: None,
    *,
    but: Collection[str] = (),
) -> None:
    """Add the features that a dataset's ingested images lack. Nothing is written where none do.

    Only one process may do this for a dataset at a time: call it under the lock of the dataset's journal.

    Args:
        but: keys of images to pass over.

    Raises:
        SetupError: a shard or a file of the catalog is damaged.
    """
    file = corpus.features_file(dataset)
    refuse_damaged(corpus, dataset, file, remedy_of(dataset))
    images = load_dataset(corpus, dataset, _COLUMNS, [pc.field("status") == "ingested"])
    there = NameSet()
    there.add(but)
    for part in _current(corpus, dataset):
        there.add(part["key"].to_pylist())
    lacking = images.filter(pc.invert(there.mask(images["key"])))
    if lacking.num_rows == 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    added = SortedRuns(FEATURES_SCHEMA, file.parent, _HELD)
    reader = open_reader(corpus.shards)
    # In the order of arrays, each of which is then opened once.
    ordered = lacking.take(pc.sort_indices(lacking, [("shard_path", "ascending"), ("key", "ascending")]))
    done = 0
    for batch in ordered.to_batches(max_chunksize=64):
        rows = []
        for row in batch.to_pylist():
            box = ((0, row["shape_d"]), (0, row["shape_h"]), (0, row["shape_w"]))
            shape = tuple(row["shard_shape"])
            wanted = Wanted(row["shard_path"], shape, row["stored_dtype"], row["shard_index"], box)
            voxels = read_box(reader, wanted)
            rows.append({"dataset": dataset, "key": row["key"]} | features(voxels, row).columns())
            done += 1
            progress(done, lacking.num_rows)
        added.add(pa.Table.from_pylist(rows, schema=FEATURES_SCHEMA))
    publish(
        corpus, dataset, [features_file(corpus, dataset, merged([_current(corpus, dataset), added.sorted()]))]
    )


def ensure_features(corpus: Corpus, progress: Callable[[str, int, int], None]) -> None:
    """Add what features any dataset of a corpus lacks.

    Raises SetupError if an ingest is running, or the corpus lies in an object store.
    """
    for dataset in dataset_ids(corpus):
        if not (count := missing_features(corpus, dataset)):
            continue
        if corpus.origin is not None:
            file = corpus.name_of(corpus.features_file(dataset))
            raise SetupError(
                f"{dataset}: {count} images in {corpus.place} have no features, for an earlier version of "
                "PUMIT-data ingested them. Copy the corpus to a folder, type `pumit-data duplicates` there, "
                f"and copy {file} and then the manifest beside it back."
            )
        with Journal(corpus, dataset).lock():
            settle(corpus, dataset)
            add_features(corpus, dataset, lambda done, total: progress("features", done, total))


def _current(corpus: Corpus, dataset: str) -> Iterator[pa.Table]:
    """The features of this version that are there."""
    file = corpus.features_file(dataset)
    parts = read_batches(file, remedy_of(dataset), rows=_HELD) if file.is_file() else ()
    for part in parts:
        kept = part.filter(pc.equal(part["features_version"], FEATURES_VERSION))
        yield kept.select(FEATURES_SCHEMA.names).cast(FEATURES_SCHEMA)
