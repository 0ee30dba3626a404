"""Results as CSV, JSON or Parquet, batch by batch, so that a long one takes no more memory than a short one."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from rich.markup import escape
from rich.table import Table

from catalog.errors import SetupError

Batches = Iterable[pa.RecordBatch]
"""At least one batch, of no rows where there are none."""

SHOWN_ROWS = 200
"""Rows of a printed table; files hold all."""


def write_csv(batches: Batches, stream: BinaryIO) -> None:
    """Header and rows; nulls are empty, lists and structs are written as JSON."""
    first, rest = _peek(batches)
    header = _texts(first)
    with pacsv.CSVWriter(
        stream, header.schema, write_options=pacsv.WriteOptions(quoting_style="needed")
    ) as writer:
        writer.write_batch(header)
        for batch in rest:
            writer.write_batch(_texts(batch))


def write_json(batches: Batches, stream: BinaryIO) -> None:
    """One array of objects, a line each; NaN and infinities, which JSON cannot say, are null."""
    separator = b"[\n  "
    for batch in batches:
        for row in batch.to_pylist():
            stream.write(separator + json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).encode())
            separator = b",\n  "
    stream.write(b"[]\n" if separator[:1] == b"[" else b"\n]\n")


def write_parquet(batches: Batches, stream: BinaryIO) -> None:
    first, rest = _peek(batches)
    with pq.ParquetWriter(stream, first.schema, compression="zstd", write_page_checksum=True) as writer:
        for batch in itertools.chain([first], rest):
            if batch.num_rows:
                writer.write_batch(batch)


WRITERS: dict[str, Callable[[Batches, BinaryIO], None]] = {
    ".csv": write_csv,
    ".json": write_json,
    ".parquet": write_parquet,
}


def write_file(batches: Batches, path: Path) -> None:
    """Write in the format that the suffix names; a file that is there is replaced when all is written.

    Raises SetupError for another suffix; OSError where the file cannot be written.
    """
    if path.suffix.lower() not in WRITERS:
        raise SetupError(f"{path}: the suffix says the format; known are {', '.join(WRITERS)}.")
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as stream:
            WRITERS[path.suffix.lower()](batches, stream)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def printable(batches: Batches) -> Table:
    """The first SHOWN_ROWS rows; the caption says so where there are more."""
    first, rest = _peek(batches)
    numeric = [_is_number(kind) for kind in first.schema.types]
    table = Table()
    for name, right in zip(first.schema.names, numeric, strict=True):
        table.add_column(escape(name), justify="right" if right else "left", overflow="fold")
    rows = (row for batch in itertools.chain([first], rest) for row in _rows(batch))
    for row in itertools.islice(rows, SHOWN_ROWS):
        table.add_row(*(escape(_shown(value)) for value in row))
    if next(rows, None) is not None:
        table.caption = f"the first {SHOWN_ROWS} rows; --output FILE, --csv and --json give all"
    return table


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[bool]) -> str:
    """A table in Markdown; `right` says of each column whether it is aligned to the right."""
    lines = [list(header), ["---:" if column else "---" for column in right], *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def batches_of(table: pa.Table) -> list[pa.RecordBatch]:
    """A table as Batches."""
    return [pa.RecordBatch.from_pylist([], schema=table.schema), *table.to_batches()]


def _peek(batches: Batches) -> tuple[pa.RecordBatch, Iterator[pa.RecordBatch]]:
    iterator = iter(batches)
    return next(iterator), iterator


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    return zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _texts(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with what CSV has no form for as text."""
    columns = [
        pa.array(
            [
                None if value is None else json.dumps(_plain(value), ensure_ascii=False)
                for value in column.to_pylist()
            ],
            pa.string(),
        )
        if pa.types.is_nested(column.type)
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return "" if value is None else str(value)
