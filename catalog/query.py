"""The catalog as one table: filtered, checked, and with a fingerprint of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Literal, Protocol

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
    present = corpus.datasets()
    if not present:
        raise SetupError(
            f"there is no catalog below {corpus.place / 'catalog'}. "
            "Type `make ingest DATASET=...` with the id of a dataset (`pumit-data list`), or give --data."
        )
    wanted = present if datasets is None else sorted(set(datasets))
    if missing := [dataset for dataset in wanted if dataset not in present]:
        commands = ", ".join(f"`make ingest DATASET={dataset}`" for dataset in missing)
        raise SetupError(f"{corpus.place} has no catalog of {', '.join(missing)}. Type {commands}.")
    conditions = [
        pc.field(name) == value for name, value in (("status", status), ("split", split)) if value is not None
    ]
    tables = [
        read_table(
            corpus.catalog_file(dataset),
            remedy=remedy_of(dataset),
            columns=columns,
            conditions=conditions,
            schema=CATALOG_SCHEMA,
        )
        for dataset in wanted
    ]
    return pa.concat_tables(tables or [CATALOG_SCHEMA.empty_table().select(columns or CATALOG_SCHEMA.names)])


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
) -> pa.Table:
    """Read a Parquet file of the corpus, comparing the checksum of every page.

    Columns of `schema` that a file of an older version does not have come back null, in the place they have
    there. Raises SetupError, with `remedy` at its end, if the file is damaged or of a newer version.
    """
    try:
        file = path.open() if isinstance(path, RemotePath) else path
        found = pq.read_schema(file)
        version = _version(path, found, remedy)
        wanted = None if columns is None else list(columns)
        added: list[pa.Field] = []
        if schema is not None and version < SCHEMA_VERSION:
            wanted = schema.names if wanted is None else wanted
            added = [field for field in schema if field.name in wanted and field.name not in found.names]
        condition = None
        for term in conditions:
            condition = term if condition is None else condition & term
        table = pq.read_table(
            file,
            columns=None
            if wanted is None
            else [name for name in wanted if name not in {field.name for field in added}],
            filters=condition,
            partitioning=None,  # `dataset=...` in the path repeats a column that the file has
            page_checksum_verification=True,
        )
    except (FileNotFoundError, PermissionError, StoreError):
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # as a flipped bit may have it
        raise SetupError(f"{path} is damaged: {error}. {remedy}") from error
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

    Equal values give equal fingerprints on every machine and with every version of pyarrow. The catalog holds
    no times, so the same images ingested again give the same fingerprint.
    """
    ordered = table.sort_by([("dataset", "ascending"), ("key", "ascending")])
    digest = hashlib.sha256()
    for name in sorted(ordered.column_names):
        digest.update(f"{name}\0".encode())
        _digest_values(digest, pa.concat_arrays(ordered[name].chunks or [pa.nulls(0, ordered[name].type)]))
    return digest.hexdigest()


def _digest_values(digest: _Digest, array: pa.Array) -> None:
    # Arrow's own bytes may differ for equal values: offsets, padding, what lies below a null.
    digest.update(np.packbits(pc.is_valid(array).to_numpy(zero_copy_only=False)).tobytes())
    dense = pc.drop_null(array)
    if pa.types.is_list(array.type):
        _digest_values(digest, pc.list_value_length(dense))
        _digest_values(digest, pc.list_flatten(dense))
    elif pa.types.is_string(array.type):
        _digest_values(digest, pc.binary_length(dense))
        if len(dense):
            offsets = np.frombuffer(dense.buffers()[1], np.int32)[dense.offset : dense.offset + len(dense) + 1]
            digest.update(memoryview(dense.buffers()[2])[offsets[0] : offsets[-1]])
    else:
        values = dense.to_numpy(zero_copy_only=False)
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
