"""Replace a dataset's catalog as a whole: readers see the file before or the file after, nothing between."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.durable import replacing
from catalog.manifest import NewFile, publish, refuse_damaged
from catalog.merge import SortedRuns, merged
from catalog.query import read_batches, remedy_of
from catalog.schema import CATALOG_SCHEMA, FEATURES_SCHEMA, PREVIEW_SCHEMA
from catalog.scratch import NameSet

Rows: TypeAlias = "pa.Table | Sequence[Mapping[str, Any]]"

_GROUP_ROWS = 1 << 16
_PREVIEW_GROUP_ROWS = 1 << 10
_FEATURES_GROUP_ROWS = 1 << 13
_PREVIEWS_HELD = 1 << 13
_BATCH_ROWS = 1 << 13

_VOCABULARY = {"status": ("ingested", "excluded", "failed"), "split": ("train", "validation")}


def merge_dataset(
    corpus: Corpus,
    dataset: str,
    rows: Rows,
    previews: Rows,
    features: Rows = (),
    *,
    reread: Collection[str] = (),
) -> None:
    """Put rows of CATALOG_SCHEMA, previews of PREVIEW_SCHEMA and features of FEATURES_SCHEMA into a catalog.

    A row replaces the earlier row of its key. Earlier rows whose source_path is in `reread` all go, whatever
    their keys: a file read again may hold fewer volumes than before, and a file that is gone holds none.
    Earlier previews and features go with their rows. Where `rows` are mappings, a column not given is null.

    The files are sorted by key, and equal content gives equal bytes. Only one process may write a dataset at
    a time. Previews and features are replaced first: a crash in between leaves a catalog whose every row is
    right, some beside a newer picture.

    Raises ValueError if a row breaks the schema, comes twice or is of another dataset, or a preview has no
    row; SetupError if the earlier file is damaged; OSError if the disk is full (the earlier files stay).
    """
    merge_batches(corpus, dataset, [(rows, previews, features, reread)])


def merge_batches(
    corpus: Corpus, dataset: str, batches: Iterable[tuple[Rows, Rows, Rows, Collection[str]]]
) -> None:
    """As `merge_dataset`, of (rows, previews, features, reread) in any number of parts.

    Memory does not grow with them.
    """
    file = corpus.catalog_file(dataset)
    siblings = ((preview_file, PREVIEW_SCHEMA), (features_file, FEATURES_SCHEMA))
    file.parent.mkdir(parents=True, exist_ok=True)
    images = SortedRuns(CATALOG_SCHEMA, file.parent, _GROUP_ROWS)
    runs = [SortedRuns(schema, file.parent, _PREVIEWS_HELD) for _, schema in siblings]
    new_keys, reread_paths = NameSet(), NameSet()
    for rows, previews, features, reread in batches:
        new = _conform(dataset, rows, CATALOG_SCHEMA)
        for name, words in _VOCABULARY.items():
            if unknown := set(pc.unique(new[name]).to_pylist()) - set(words):
                raise ValueError(f"{dataset}: {name} must be one of {words}, got {sorted(unknown)}")
        images.add(new)
        given = {"previews": previews, "features": features}
        for (name, some), (_, schema), run in zip(given.items(), siblings, runs, strict=True):
            beside = _conform(dataset, some, schema)
            if strays := beside.filter(pc.invert(pc.is_in(beside["key"], new["key"])))["key"].to_pylist():
                raise ValueError(f"{dataset}: {name} without a row: {strays[:5]}")
            run.add(beside)
        new_keys.add(new["key"].to_pylist())
        reread_paths.add(reread)

    def earlier(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
        """What stays of a file: the rows that no new one replaces."""
        batches = read_batches(path, remedy_of(dataset), rows=_BATCH_ROWS, schema=schema)
        for table in batches if path.is_file() else ():
            kept = table.select(schema.names).cast(schema)
            yield kept.filter(pc.invert(new_keys.mask(kept["key"])))

    def earlier_rows() -> Iterator[pa.Table]:
        for table in earlier(file, CATALOG_SCHEMA):
            yield table.filter(pc.invert(reread_paths.mask(table["source_path"])))

    gone = NameSet()
    identities = read_batches(file, remedy_of(dataset), ["key", "source_path"])
    for table in identities if file.is_file() else ():
        gone.add(table["key"].filter(reread_paths.mask(table["source_path"])).to_pylist())
    beside = [(form(corpus, dataset, ()).path, schema) for form, schema in siblings]
    for path in (file, *(path for path, _ in beside)):
        # A flipped bit must not enter the new file, whose hash would vouch for it.
        refuse_damaged(corpus, dataset, path, remedy_of(dataset))

    def earlier_beside(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
        return (table.filter(pc.invert(gone.mask(table["key"]))) for table in earlier(path, schema))

    rows_now = _without_repeats(dataset, merged([earlier_rows(), images.sorted()]))
    publish(
        corpus,
        dataset,
        [
            *(
                form(corpus, dataset, merged([earlier_beside(path, schema), run.sorted()]))
                for (form, _), (path, schema), run in zip(siblings, beside, runs, strict=True)
            ),
            catalog_file(corpus, dataset, rows_now),
        ],
    )


def catalog_file(corpus: Corpus, dataset: str, images: Iterable[pa.Table]) -> NewFile:
    """How a dataset's catalog is written; `images` sorted by key, in any pieces."""
    return NewFile(corpus.catalog_file(dataset), images, CATALOG_SCHEMA, _GROUP_ROWS)


def preview_file(corpus: Corpus, dataset: str, pictures: Iterable[pa.Table]) -> NewFile:
    """How a dataset's previews are written: PNG cannot be compressed again, and one is read at a time."""
    return NewFile(corpus.preview_file(dataset), pictures, PREVIEW_SCHEMA, _PREVIEW_GROUP_ROWS, "none")


def features_file(corpus: Corpus, dataset: str, features: Iterable[pa.Table]) -> NewFile:
    """How a dataset's features are written; `features` sorted by key, in any pieces."""
    return NewFile(corpus.features_file(dataset), features, FEATURES_SCHEMA, _FEATURES_GROUP_ROWS)


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Replace a Parquet file by one rename, with a checksum in every page; `options` as of ParquetWriter.

    The folder must be there. Equal tables give equal bytes. For files that are no part of the published
    corpus; those go through `catalog.manifest.publish`.
    """
    with replacing(path) as temporary:
        # One chunk a column: how a table was put together must not show in the pages.
        pq.write_table(table.combine_chunks(), temporary, write_page_checksum=True, **options)


def _conform(dataset: str, rows: Rows, schema: pa.Schema) -> pa.Table:
    """The rows as a table of `schema`; ValueError where they break it."""
    names = rows.column_names if isinstance(rows, pa.Table) else {name for row in rows for name in row}
    if unknown := set(names) - set(schema.names):
        raise ValueError(f"{dataset}: no such columns in the catalog: {sorted(unknown)}")
    if isinstance(rows, pa.Table):
        table = rows.select(schema.names).cast(schema)
    else:
        table = pa.Table.from_pylist(list(rows), schema=schema)
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"{dataset}: column {field.name} has no value in some row")
    if others := set(pc.unique(table["dataset"]).to_pylist()) - {dataset}:
        raise ValueError(f"{dataset}: rows of other datasets: {sorted(others)}")
    if pc.count_distinct(table["key"]).as_py() != table.num_rows:
        counts = pc.value_counts(table["key"].combine_chunks())
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
        raise ValueError(f"{dataset}: keys given twice: {twice[:5]}")
    return table


def _without_repeats(dataset: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The sorted stream itself; ValueError where a key comes twice."""
    for table in tables:
        keys = table["key"].combine_chunks()
        if (twice := keys[1:].filter(pc.equal(keys[1:], keys[:-1]))).to_pylist():
            raise ValueError(f"{dataset}: keys given twice: {twice.unique().to_pylist()[:5]}")
        yield table
