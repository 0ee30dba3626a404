"""The catalog as one table: filtered, checked, and with a fingerprint of its content."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA, SCHEMA_VERSION

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
            f"there is no catalog below {corpus.root / 'catalog'}. "
            "Type `make ingest DATASET=...` with the id of a dataset (`pumit-data list`), or give --data."
        )
    ids = present if wanted is None else sorted(set(wanted))
    if missing := [dataset for dataset in ids if dataset not in present]:
        commands = ", ".join(f"`make ingest DATASET={dataset}`" for dataset in missing)
        raise SetupError(f"{corpus.root} has no catalog of {', '.join(missing)}. Type {commands}.")
    return ids


def load_dataset(
    corpus: Corpus,
    dataset: str,
    columns: Sequence[str] | None = None,
    conditions: Sequence[pc.Expression] = (),
    dictionaries: Sequence[str] = (),
) -> pa.Table:
    """The rows of one dataset, sorted by key; arguments and errors as of `read_table`."""
    remedy = f"Restore it, or delete it and type `make ingest DATASET={dataset}`."
    return read_table(corpus.catalog_file(dataset), remedy, columns, conditions, dictionaries)


def read_table(
    path: Path,
    remedy: str,
    columns: Sequence[str] | None = None,
    conditions: Sequence[pc.Expression] = (),
    dictionaries: Sequence[str] = (),
) -> pa.Table:
    """Read a Parquet file of the corpus, comparing the checksum of every page.

    Columns of text named in `dictionaries` come as dictionary arrays, which are small and quick to group by;
    lists of texts cannot.
    Raises SetupError, with `remedy` at its end, if the file is damaged or of a newer version.
    """
    try:
        with pq.ParquetFile(path, read_dictionary=list(dictionaries), page_checksum_verification=True) as file:
            _refuse_newer(path, file.schema_arrow)
            if not conditions:
                # A third of the time of `read_table`, which goes through the machinery for many files.
                table = file.read(columns)
                return table if columns is None else table.select(columns)
        return pq.read_table(
            path,
            columns=None if columns is None else list(columns),
            filters=functools.reduce(operator.and_, conditions),
            partitioning=None,  # `dataset=...` in the path repeats a column that the file has
            read_dictionary=list(dictionaries),
            page_checksum_verification=True,
        )
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise SetupError(f"{path} is damaged: {error}. {remedy}") from error


def check_version(path: Path) -> None:
    """Raise SetupError if a Parquet file of the corpus is damaged at its end or of a newer version."""
    try:
        _refuse_newer(path, pq.read_schema(path))
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise SetupError(f"{path} is damaged: {error}. Restore it, or delete it and ingest again.") from error


def _refuse_newer(path: Path, schema: pa.Schema) -> None:
    version = int((schema.metadata or {}).get(b"pumit_schema_version", b"0"))
    if version > SCHEMA_VERSION:
        raise SetupError(
            f"{path} has version {version} of the catalog, this program knows versions up to {SCHEMA_VERSION}. "
            "Install the version of pumit-data that wrote it, or a later one."
        )


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
