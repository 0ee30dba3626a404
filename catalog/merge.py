"""Sorting and joining tables by `key`, a few batches in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_BATCHES_OF_A_RUN = 64
"""A run is read in so many pieces: of each run, one piece is in memory."""


class SortedRuns:
    """Takes rows in any order and gives them back sorted by key.

    Up to `rows` of them are held; each further lot waits in a file, sorted, until all are merged.
    """

    def __init__(self, schema: pa.Schema, folder: Path, rows: int) -> None:
        """`folder`: where files without a name may lie."""
        self._schema = schema
        self._folder = folder
        self._rows = rows
        self._held: list[pa.Table] = []
        self._runs: list[Iterator[pa.Table]] = []

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        if sum(held.num_rows for held in self._held) >= self._rows:
            self._runs.append(self._spilled(self._sorted()))
            self._held = []

    def sorted(self) -> Iterator[pa.Table]:
        """All rows in order of the key. To be called once, after the last `add`."""
        return merged([*self._runs, iter([self._sorted()])])

    def _sorted(self) -> pa.Table:
        return pa.concat_tables([self._schema.empty_table(), *self._held]).sort_by("key")

    def _spilled(self, table: pa.Table) -> Iterator[pa.Table]:
        piece = -(-table.num_rows // _BATCHES_OF_A_RUN)
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - read back later, by the generator
        pq.write_table(table, file, row_group_size=piece, compression="none")

        def pieces() -> Iterator[pa.Table]:
            with file, pq.ParquetFile(file, pre_buffer=False) as run:
                for number in range(run.num_row_groups):
                    yield run.read_row_group(number)

        return pieces()


def merged(streams: Iterable[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """One stream sorted by key out of several that are. Rows of equal key come in the same table."""
    heads = [(head, stream) for stream in streams if (head := _next(stream)) is not None]
    while heads:
        # Up to here every stream has shown all it has.
        bound = min(head["key"][-1].as_py() for head, _ in heads)
        ready = []
        following = []
        for head, stream in heads:
            number = pc.sum(pc.less_equal(head["key"], bound)).as_py()
            ready.append(head.slice(0, number))
            rest = head.slice(number) if number < head.num_rows else _next(stream)
            if rest is not None:
                following.append((rest, stream))
        heads = following
        yield pa.concat_tables(ready).sort_by("key")


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each, the last one shorter: however they came, in the same cuts."""
    waiting: list[pa.Table] = []
    number = 0
    for table in tables:
        waiting.append(table)
        number += table.num_rows
        if number < rows:
            continue
        whole = pa.concat_tables(waiting)
        cut = number - number % rows
        yield from (whole.slice(start, rows) for start in range(0, cut, rows))
        waiting, number = [whole.slice(cut)], number - cut
    if number:
        yield pa.concat_tables(waiting)


def _next(stream: Iterator[pa.Table]) -> pa.Table | None:
    """The next table that has rows."""
    return next((table for table in stream if table.num_rows), None)
