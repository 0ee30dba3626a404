"""The catalog as one table: filtered, checked, and with a fingerprint of its content."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA, SCHEMA_VERSION
from catalog.store import Location, RemotePath, StoreError

Status = Literal["ingested", "excluded", "failed"]
Split = Literal["train", "validation"]


_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, MemoryError)
"""What reading a file with a flipped bit may raise."""


_ABOUT_STORAGE = {"shard_path", "shard_sha256", "stored_bytes"}
"""Columns that tell how voxels are stored, not which."""


class _Digest(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def load_catalog(
    corpus: Corpus,
    columns: Sequence[str] | None = None,
    datasets: Collection[str] | None = None,
    status: Status | None = "ingested",
    split: Split | None = None,
) -> pa.Table:
    """Return the catalog's rows, sorted by dataset and key.

    `columns` (default: all of CATALOG_SCHEMA), `datasets` (default: all), `status` and `split` (None: any)
    narrow it down. Raises SetupError if nothing has been ingested, a dataset is not there, or a file is
    damaged or newer than this program.
    """
    wanted = dataset_ids(corpus, datasets)
    conditions = [
        pc.field(name) == value for name, value in (("status", status), ("split", split)) if value is not None
    ]
    tables = [load_dataset(corpus, dataset, columns, conditions) for dataset in wanted]
    return pa.concat_tables(tables or [CATALOG_SCHEMA.empty_table().select(columns or CATALOG_SCHEMA.names)])


def dataset_ids(corpus: Corpus, wanted: Collection[str] | None = None) -> list[str]:
    """Ids of the datasets in the catalog, sorted; with `wanted`, only these.

    Raises SetupError if nothing has been ingested, or one of them is not there.
    """
    present = corpus.datasets()
    if not present:
        raise SetupError(
            f"there is no catalog below {corpus.place / 'catalog'}. "
            "Type `make ingest DATASET=...` with the id of a dataset (`pumit-data list`), or give --data."
        )
    ids = present if wanted is None else sorted(set(wanted))
    if missing := [dataset for dataset in ids if dataset not in present]:
        commands = ", ".join(f"`make ingest DATASET={dataset}`" for dataset in missing)
        raise SetupError(f"{corpus.place} has no catalog of {', '.join(missing)}. Type {commands}.")
    return ids


def load_dataset(
    corpus: Corpus,
    dataset: str,
    columns: Sequence[str] | None = None,
    conditions: Sequence[pc.Expression] = (),
    dictionaries: Sequence[str] = (),
) -> pa.Table:
    """The rows of one dataset, sorted by key; arguments and errors as of `read_table`."""
    return read_table(
        corpus.catalog_file(dataset), remedy_of(dataset), columns, conditions, CATALOG_SCHEMA, dictionaries
    )


def remedy_of(dataset: str) -> str:
    """What to do about a damaged catalog."""
    return (
        f"Type `pumit-data verify {dataset} --repair`, or restore it, or delete it and type "
        f"`make ingest DATASET={dataset}`."
    )


def read_table(
    path: Location,
    remedy: str,
    columns: Sequence[str] | None = None,
    conditions: Sequence[pc.Expression] = (),
    schema: pa.Schema | None = None,
    dictionaries: Sequence[str] = (),
) -> pa.Table:
    """Read a Parquet file of the corpus, comparing the checksum of every page.

    Columns of `schema` that a file of an older version does not have come back null, in the place they have
    there. Columns of text named in `dictionaries` come as dictionary arrays, which are small and quick to group
    by; lists of texts cannot. Raises SetupError, with `remedy` at its end, if the file is damaged or of a newer
    version.
    """
    with _naming_damage(path, remedy):
        source = path.open() if isinstance(path, RemotePath) else path
        with pq.ParquetFile(
            source, read_dictionary=list(dictionaries), page_checksum_verification=True
        ) as file:
            found = file.schema_arrow
            wanted, added = _wanted(found, _version(path, found, remedy), columns, schema)
            names = None if wanted is None else [name for name in wanted if name in found.names]
            if not conditions:
                # A third of the time of `read_table`, which goes through the machinery for many files.
                table = file.read(names)
                return _completed(table if names is None else table.select(names), wanted, added)
        table = pq.read_table(
            source,
            columns=names,
            filters=functools.reduce(operator.and_, conditions),
            partitioning=None,  # `dataset=...` in the path repeats a column that the file has
            read_dictionary=list(dictionaries),
            page_checksum_verification=True,
        )
    return _completed(table, wanted, added)


def read_batches(
    path: Path,
    remedy: str,
    columns: Sequence[str] | None = None,
    rows: int = 1 << 16,
    schema: pa.Schema | None = None,
    dictionaries: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """The rows of a Parquet file of the corpus in order, at most `rows` at a time; else as `read_table`."""
    with (
        _naming_damage(path, remedy),
        pq.ParquetFile(
            path,
            read_dictionary=list(dictionaries),
            page_checksum_verification=True,
            pre_buffer=False,
        ) as file,
    ):
        found = file.schema_arrow
        wanted, added = _wanted(found, _version(path, found, remedy), columns, schema)
        names = None if wanted is None else [name for name in wanted if name in found.names]
        for batch in file.iter_batches(batch_size=rows, columns=names):
            yield _completed(pa.Table.from_batches([batch]), wanted, added)


def row_count(corpus: Corpus, dataset: str) -> int:
    """Rows of a dataset's catalog, ingested or not; only its end is read. Raises SetupError if damaged."""
    path = corpus.catalog_file(dataset)
    with _naming_damage(path, remedy_of(dataset)):
        return int(pq.read_metadata(path).num_rows)


def check_version(path: Path) -> None:
    """Raise SetupError if a Parquet file of the corpus is damaged at its end or of a newer version."""
    remedy = "Restore it, or type `pumit-data verify --repair`."
    with _naming_damage(path, remedy):
        _version(path, pq.read_schema(path), remedy)


@contextlib.contextmanager
def _naming_damage(path: Location, remedy: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into a SetupError that names it."""
    try:
        yield
    except (FileNotFoundError, PermissionError, StoreError):
        raise
    except _DAMAGE as error:
        raise SetupError(f"{path} is damaged: {error}. {remedy}") from error


def _wanted(
    found: pa.Schema, version: int, columns: Sequence[str] | None, schema: pa.Schema | None
) -> tuple[list[str] | None, list[pa.Field]]:
    """Names of the columns to return, None for all that are there; and those that an older file lacks."""
    wanted = None if columns is None else list(columns)
    if schema is None or version >= SCHEMA_VERSION:
        return wanted, []
    wanted = schema.names if wanted is None else wanted
    return wanted, [field for field in schema if field.name in wanted and field.name not in found.names]


def _completed(table: pa.Table, wanted: list[str] | None, added: Sequence[pa.Field]) -> pa.Table:
    for field in added:
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(wanted) if added else table


def _version(path: Location, schema: pa.Schema, remedy: str) -> int:
    text = (schema.metadata or {}).get(b"pumit_schema_version", b"")
    if not text.isdigit() or int(text) < 1:
        raise SetupError(f"{path} does not say of which version of the catalog it is. {remedy}")
    version = int(text)
    if version > SCHEMA_VERSION:
        raise SetupError(
            f"{path} has version {version} of the catalog, this program knows versions up to {SCHEMA_VERSION}. "
            "Install the version of pumit-data that wrote it, or a later one."
        )
    return version


def fingerprint(table: pa.Table) -> str:
    """sha256 of the values of a table with the columns dataset and key, whatever the order of rows and columns.

    How voxels are stored does not count, for `repack` changes that and no image: a run goes on after it.
    Equal values give equal fingerprints on every machine and with every version of pyarrow. The catalog holds
    no times, so the same images ingested again give the same fingerprint.
    """
    ordered = table.sort_by([("dataset", "ascending"), ("key", "ascending")])
    names = sorted(set(ordered.column_names) - _ABOUT_STORAGE)
    return _fingerprint((name, ordered[name].chunks) for name in names)


@dataclass(frozen=True)
class CatalogDigest:
    """What a dataset's catalog comes to: hashes of its values, and what became of its images."""

    fingerprint: str
    """`fingerprint` of the ingested images."""
    parts: dict[str, str]
    """sha256 of single columns of the ingested images: those of DIGEST_PARTS."""
    others: str
    """`fingerprint` of what is known of the images that were not ingested, and why."""
    outcomes: dict[str, dict[str, int]]
    """Number of images by status, then by reason; the reason of ingested ones is empty."""
    entry_hashes: list[str]
    """Entries of datasets.yaml that the rows were made by, sorted."""
    normalisation_versions: list[int]
    """Likewise."""


DIGEST_PARTS = ("source_hash", "shard_sha256", "sampling_weight")

_OF_OTHERS = ("dataset", "key", "status", "reason", "source_hash", "entry_hash", "normalisation_version")


def catalog_fingerprint(corpus: Corpus) -> str:
    """sha256 of all ingested images of a corpus: see `united_fingerprint`. Errors as of `catalog_digests`."""
    return united_fingerprint(catalog_digests(corpus))


def united_fingerprint(digests: Mapping[str, CatalogDigest]) -> str:
    """sha256 of the fingerprints of datasets, by id; those without an ingested image make no difference."""
    united = hashlib.sha256()
    for dataset in sorted(digests):
        if "ingested" in digests[dataset].outcomes:
            united.update(f"{dataset} {digests[dataset].fingerprint}\n".encode())
    return united.hexdigest()


def catalog_digests(corpus: Corpus) -> dict[str, CatalogDigest]:
    """The digest of every dataset by id, with two columns of the catalog in memory at a time.

    All columns of a file are read from the file that was there at the start. Raises SetupError as
    `load_catalog` does.
    """
    with (
        contextlib.ExitStack() as open_files,
        ThreadPoolExecutor(1) as ahead,
        ThreadPoolExecutor(os.cpu_count()) as readers,
    ):
        files = {
            dataset: open_files.enter_context(_CatalogFile(corpus.catalog_file(dataset), remedy_of(dataset)))
            for dataset in dataset_ids(corpus)
        }
        sums = [_Sums(file) for file in files.values()]

        def column(name: str) -> list[list[pa.Array]]:
            return list(readers.map(lambda file: file.column(name).chunks, files.values()))

        # One column is read while the one before it is hashed.
        names = sorted(CATALOG_SCHEMA.names)
        coming = ahead.submit(column, names[0])
        for name, following in zip(names, [*names[1:], None], strict=True):
            columns = coming.result()
            if following is not None:
                coming = ahead.submit(column, following)
            list(readers.map(lambda one, chunks, name=name: one.add(name, chunks), sums, columns))
            del columns
        return {dataset: one.finish() for dataset, one in zip(files, sums, strict=True)}


class _Sums:
    """The digest of one dataset, of which one column comes after the other."""

    def __init__(self, file: _CatalogFile) -> None:
        self._file = file
        self._whole = hashlib.sha256()
        self._parts: dict[str, str] = {}
        self._seen: dict[str, set[Any]] = {"entry_hash": set(), "normalisation_version": set()}
        self._rows = 0

    def add(self, name: str, chunks: list[pa.Array]) -> None:
        if name not in _ABOUT_STORAGE:
            _digest_column(self._whole, name, chunks)
        if name in DIGEST_PARTS:
            part = hashlib.sha256()
            _digest_values(part, chunks)
            self._parts[name] = part.hexdigest()
        if name in self._seen:
            self._seen[name] |= {value for chunk in chunks for value in pc.unique(chunk).to_pylist()}
        self._rows = sum(map(len, chunks))

    def finish(self) -> CatalogDigest:
        others = pa.table(self._file.others)
        outcomes: dict[str, dict[str, int]] = {"ingested": {"": self._rows}} if self._rows else {}
        for row in others.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist():
            outcomes.setdefault(row["status"], {})[row["reason"] or ""] = row["count_all"]
        seen = {
            name: sorted(found | set(others[name].unique().to_pylist())) for name, found in self._seen.items()
        }
        return CatalogDigest(
            fingerprint=self._whole.hexdigest(),
            parts=self._parts,
            others=fingerprint(others),
            outcomes=outcomes,
            entry_hashes=seen["entry_hash"],
            normalisation_versions=seen["normalisation_version"],
        )


class _CatalogFile:
    """The ingested images of one dataset in the order of their keys, column by column."""

    others: dict[str, pa.ChunkedArray]
    """Of the columns of _OF_OTHERS that have been read, the values of the other rows, in no order."""

    def __init__(self, path: Path, remedy: str) -> None:
        self._path, self._remedy = path, remedy
        self.others = {}

    def __enter__(self) -> _CatalogFile:
        with _naming_damage(self._path, self._remedy):
            self._file = pq.ParquetFile(self._path, page_checksum_verification=True)
            self._version = _version(self._path, self._file.schema_arrow, self._remedy)
            table = self._read(["key", "status"])
        ingested = np.asarray(pc.equal(table["status"], "ingested"))
        key = table["key"]
        if pc.any(pc.greater(key[:-1], key[1:])).as_py():
            order = np.asarray(pc.sort_indices(key))
            self._order: pa.Array | None = pa.array(order[ingested[order]])
        else:
            self._order = None
        self._ingested = None if ingested.all() else pa.array(ingested)
        self._other = pa.array(~ingested)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def column(self, name: str) -> pa.ChunkedArray:
        with _naming_damage(self._path, self._remedy):
            values = self._read([name])[name]
        if name in _OF_OTHERS:
            self.others[name] = values.slice(0, 0) if self._ingested is None else values.filter(self._other)
        if self._order is not None:
            return values.take(self._order)
        return values if self._ingested is None else values.filter(self._ingested)

    def _read(self, names: list[str]) -> pa.Table:
        wanted, added = _wanted(self._file.schema_arrow, self._version, names, CATALOG_SCHEMA)
        table = self._file.read([name for name in names if name in self._file.schema_arrow.names])
        if not table.num_columns:
            return pa.table({field.name: pa.nulls(self._file.metadata.num_rows, field.type) for field in added})
        return _completed(table, wanted, added)


def _fingerprint(columns: Iterable[tuple[str, list[pa.Array]]]) -> str:
    """Of columns in the order of their names, with rows in the order of dataset and key, in any chunks."""
    digest = hashlib.sha256()
    for name, chunks in columns:
        _digest_column(digest, name, chunks)
    return digest.hexdigest()


def _digest_column(digest: _Digest, name: str, chunks: Sequence[pa.Array]) -> None:
    digest.update(f"{name}\0".encode())
    _digest_values(digest, chunks)


def _digest_values(digest: _Digest, chunks: Sequence[pa.Array]) -> None:
    # Arrow's own bytes may differ for equal values: offsets, padding, what lies below a null.
    valid = [pc.is_valid(chunk).to_numpy(zero_copy_only=False) for chunk in chunks]
    digest.update(np.packbits(np.concatenate([np.empty(0, np.bool_), *valid])).tobytes())
    dense = [chunk if chunk.null_count == 0 else pc.drop_null(chunk) for chunk in chunks]
    kinds = {chunk.type for chunk in chunks}
    if any(pa.types.is_list(kind) for kind in kinds):
        _digest_values(digest, [pc.list_value_length(chunk) for chunk in dense])
        _digest_values(digest, [pc.list_flatten(chunk) for chunk in dense])
    elif any(pa.types.is_string(kind) for kind in kinds):
        _digest_values(digest, [pc.binary_length(chunk) for chunk in dense])
        for chunk in dense:
            if len(chunk):
                offsets = np.frombuffer(chunk.buffers()[1], np.int32)[
                    chunk.offset : chunk.offset + len(chunk) + 1
                ]
                digest.update(memoryview(chunk.buffers()[2])[offsets[0] : offsets[-1]])
    else:
        for chunk in dense:
            values = chunk.to_numpy(zero_copy_only=False)
            digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
