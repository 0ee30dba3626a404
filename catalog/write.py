"""Replace a dataset's catalog as a whole: readers see the file before or the file after, nothing between."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.durable import replacing
from catalog.manifest import NewFile, publish, refuse_damaged
from catalog.query import read_table, remedy_of
from catalog.schema import CATALOG_SCHEMA, PREVIEW_SCHEMA

Rows: TypeAlias = "pa.Table | Sequence[Mapping[str, Any]]"

_VOCABULARY = {"status": ("ingested", "excluded", "failed"), "split": ("train", "validation")}


def merge_dataset(
    corpus: Corpus, dataset: str, rows: Rows, previews: Rows, *, reread: Collection[str] = ()
) -> None:
    """Put rows of CATALOG_SCHEMA and previews of PREVIEW_SCHEMA into a dataset's catalog.

    A row replaces the earlier row of its key. Earlier rows whose source_path is in `reread` all go, whatever
    their keys: a file read again may hold fewer volumes than before, and a file that is gone holds none.
    Earlier previews go with their rows. Where `rows` are mappings, a column not given is null.

    The files are sorted by key, and equal content gives equal bytes. Only one process may write a dataset at
    a time. The previews are replaced first: a crash in between leaves a catalog whose every row is right,
    some beside a newer picture.

    Raises ValueError if a row breaks the schema, comes twice or is of another dataset, or a preview has no
    row; SetupError if the earlier file is damaged; OSError if the disk is full (the earlier files stay).
    """
    new = _conform(dataset, rows, CATALOG_SCHEMA)
    new_previews = _conform(dataset, previews, PREVIEW_SCHEMA)
    for name, words in _VOCABULARY.items():
        if unknown := set(pc.unique(new[name]).to_pylist()) - set(words):
            raise ValueError(f"{dataset}: {name} must be one of {words}, got {sorted(unknown)}")

    old = _earlier(corpus, dataset, corpus.catalog_file(dataset), CATALOG_SCHEMA)
    old_previews = _earlier(corpus, dataset, corpus.preview_file(dataset), PREVIEW_SCHEMA)
    gone = pc.or_(_is_in(old["source_path"], list(reread)), _is_in(old["key"], new["key"]))
    kept = old.filter(pc.invert(gone))
    kept_previews = old_previews.filter(_is_in(old_previews["key"], kept["key"]))

    images = pa.concat_tables([kept, new])
    pictures = pa.concat_tables([kept_previews, new_previews])
    if strays := pictures.filter(pc.invert(_is_in(pictures["key"], images["key"])))["key"].to_pylist():
        raise ValueError(f"{dataset}: previews without a row: {strays[:5]}")
    publish(
        corpus,
        dataset,
        [
            preview_file(corpus, dataset, pictures.sort_by("key")),
            catalog_file(corpus, dataset, images.sort_by("key")),
        ],
    )


def catalog_file(corpus: Corpus, dataset: str, images: pa.Table) -> NewFile:
    """How a dataset's catalog is written."""
    return NewFile(corpus.catalog_file(dataset), images, {"compression": "zstd"})


def preview_file(corpus: Corpus, dataset: str, pictures: pa.Table) -> NewFile:
    """How a dataset's previews are written: PNG cannot be compressed again, and one is read at a time."""
    return NewFile(corpus.preview_file(dataset), pictures, {"compression": "none", "row_group_size": 1024})


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Replace a Parquet file by one rename, with a checksum in every page; `options` as of ParquetWriter.

    Equal tables give equal bytes. Only one process may write a path at a time. For files that are no part of
    the published corpus; those go through `catalog.manifest.publish`.
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


def _earlier(corpus: Corpus, dataset: str, path: Path, schema: pa.Schema) -> pa.Table:
    if not path.is_file():
        return schema.empty_table()
    table = read_table(path, remedy_of(dataset), schema=schema).select(schema.names).cast(schema)
    # A flipped bit must not enter the new file, whose hash would vouch for it.
    refuse_damaged(corpus, dataset, path, remedy_of(dataset))
    return table


def _is_in(column: pa.ChunkedArray, values: pa.ChunkedArray | list[str]) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(values, pa.string()) if isinstance(values, list) else values)
