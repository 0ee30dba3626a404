"""Replace a dataset's catalog as a whole: readers see the file before or the file after, nothing between."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.merge import SortedKeys, SortedRuns, merged, regrouped
from catalog.query import read_batches
from catalog.schema import CATALOG_SCHEMA, PREVIEW_SCHEMA
from catalog.scratch import NameSet

Rows: TypeAlias = "pa.Table | Sequence[Mapping[str, Any]]"

_GROUP_ROWS = 1 << 16
_PREVIEW_GROUP_ROWS = 1 << 10
_PREVIEWS_HELD = 1 << 13
_BATCH_ROWS = 1 << 13
_UNFINISHED = ".tmp-"

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
    merge_batches(corpus, dataset, [(rows, previews, reread)])


def merge_batches(corpus: Corpus, dataset: str, batches: Iterable[tuple[Rows, Rows, Collection[str]]]) -> None:
    """As `merge_dataset`, of (rows, previews, reread) in any number of parts: memory does not grow with it."""
    file, preview_file = corpus.catalog_file(dataset), corpus.preview_file(dataset)
    file.parent.mkdir(parents=True, exist_ok=True)
    for path in (file, preview_file):
        remove_unfinished(path)
    images = SortedRuns(CATALOG_SCHEMA, file.parent, _GROUP_ROWS)
    pictures = SortedRuns(PREVIEW_SCHEMA, file.parent, _PREVIEWS_HELD)
    new_keys, reread_paths = NameSet(), NameSet()
    for rows, previews, reread in batches:
        new = _conform(dataset, rows, CATALOG_SCHEMA)
        for name, words in _VOCABULARY.items():
            if unknown := set(pc.unique(new[name]).to_pylist()) - set(words):
                raise ValueError(f"{dataset}: {name} must be one of {words}, got {sorted(unknown)}")
        new_previews = _conform(dataset, previews, PREVIEW_SCHEMA)
        if strays := new_previews.filter(pc.invert(pc.is_in(new_previews["key"], new["key"])))[
            "key"
        ].to_pylist():
            raise ValueError(f"{dataset}: previews without a row: {strays[:5]}")
        images.add(new)
        pictures.add(new_previews)
        new_keys.add(new["key"].to_pylist())
        reread_paths.add(reread)

    remedy = f"Restore it, or delete it and type `make ingest DATASET={dataset}`."

    def earlier(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
        """What stays of a file: the rows that no new one replaces."""
        for table in read_batches(path, remedy, rows=_BATCH_ROWS) if path.is_file() else ():
            kept = table.select(schema.names).cast(schema)
            kept = kept.filter(pc.invert(new_keys.mask(kept["key"])))
            if "source_path" in schema.names:
                kept = kept.filter(pc.invert(reread_paths.mask(kept["source_path"])))
            yield kept

    def with_a_row(tables: Iterator[pa.Table], keys: SortedKeys) -> Iterator[pa.Table]:
        return (table.filter(keys.mask(table["key"])) for table in tables)

    rows_now = _without_repeats(dataset, merged([earlier(file, CATALOG_SCHEMA), images.sorted()]))
    with replacing(file) as unfinished:
        _write_groups(unfinished, rows_now, CATALOG_SCHEMA, _GROUP_ROWS, compression="zstd")
        keys_now = SortedKeys(read_batches(unfinished, remedy, ["key"]))
        pictures_now = with_a_row(merged([earlier(preview_file, PREVIEW_SCHEMA), pictures.sorted()]), keys_now)
        with replacing(preview_file) as unfinished_previews:
            _write_groups(
                unfinished_previews, pictures_now, PREVIEW_SCHEMA, _PREVIEW_GROUP_ROWS, compression="none"
            )


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Replace a Parquet file by one rename, with a checksum in every page; `options` as of ParquetWriter.

    The folder must be there. Equal tables give equal bytes.
    """
    with replacing(path) as unfinished:
        # One chunk a column: how a table was put together must not show in the pages.
        pq.write_table(table.combine_chunks(), unfinished, write_page_checksum=True, **options)


def write_sorted(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """As `write_table`, of a stream: row groups are cut at the same rows however the stream is cut."""
    with replacing(path) as unfinished:
        _write_groups(unfinished, tables, schema, _GROUP_ROWS, compression="zstd")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file name to write to, which takes the place of `path` at the end of the block, by one rename.

    Its name is its own: two processes that write one path, as a worker thought dead and its successor may,
    do not meet in it. Only a process that is killed leaves it behind: see `remove_unfinished`.
    """
    unfinished = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}-{path.name}")
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes left of `path`. Only for who alone may write it."""
    for leftover in path.parent.glob(f"{_UNFINISHED}*-{escape(path.name)}"):
        leftover.unlink(missing_ok=True)


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


def _without_repeats(dataset: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The sorted stream itself; ValueError where a key comes twice."""
    for table in tables:
        keys = table["key"].combine_chunks()
        if (twice := keys[1:].filter(pc.equal(keys[1:], keys[:-1]))).to_pylist():
            raise ValueError(f"{dataset}: keys given twice: {twice.unique().to_pylist()[:5]}")
        yield table


def _write_groups(
    path: Path, tables: Iterable[pa.Table], schema: pa.Schema, rows: int, compression: str
) -> None:
    with pq.ParquetWriter(path, schema, compression=compression, write_page_checksum=True) as writer:
        for group in regrouped(tables, rows):
            # Taken anew: neither chunks nor offsets must show in the pages.
            writer.write_table(group.take(pa.array(range(group.num_rows))), row_group_size=rows)
