"""Replace a dataset's catalog as a whole: readers see the file before or the file after, nothing between."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.query import read_table
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

    remedy = f"Restore it, or delete it and type `make ingest DATASET={dataset}`."
    old = _earlier(corpus.catalog_file(dataset), CATALOG_SCHEMA, remedy)
    old_previews = _earlier(corpus.preview_file(dataset), PREVIEW_SCHEMA, remedy)
    gone = pc.or_(_is_in(old["source_path"], list(reread)), _is_in(old["key"], new["key"]))
    kept = old.filter(pc.invert(gone))
    kept_previews = old_previews.filter(_is_in(old_previews["key"], kept["key"]))

    images = pa.concat_tables([kept, new])
    pictures = pa.concat_tables([kept_previews, new_previews])
    if strays := pictures.filter(pc.invert(_is_in(pictures["key"], images["key"])))["key"].to_pylist():
        raise ValueError(f"{dataset}: previews without a row: {strays[:5]}")
    write_table(corpus.preview_file(dataset), pictures.sort_by("key"), compression="none", row_group_size=1024)
    write_table(corpus.catalog_file(dataset), images.sort_by("key"), compression="zstd")


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Replace a Parquet file by one rename, with a checksum in every page; `options` as of ParquetWriter.

    Equal tables give equal bytes. Only one process may write a path at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        # One chunk a column: how a table was put together must not show in the pages.
        pq.write_table(table.combine_chunks(), temporary, write_page_checksum=True, **options)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file or a folder to disk, so that after a power cut no name leads to half a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _earlier(path: Path, schema: pa.Schema, remedy: str) -> pa.Table:
    if not path.is_file():
        return schema.empty_table()
    return read_table(path, remedy).select(schema.names).cast(schema)


def _is_in(column: pa.ChunkedArray, values: pa.ChunkedArray | list[str]) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(values, pa.string()) if isinstance(values, list) else values)
