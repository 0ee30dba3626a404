"""What is too large for memory while it is sorted, joined or looked up: SQLite in a file without a name.

The operating system deletes the file when the process ends, however it ends. It lies where SQLite puts
temporary files: in `TMPDIR`, else in `/var/tmp`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import pyarrow as pa

_CACHE_KIB = 32 << 10
_LOOKED_UP_AT_ONCE = 1 << 14  # SQLite takes 32,766 values in one statement


def scratch_database() -> sqlite3.Connection:
    """An empty database of this process alone: fast to fill, gone when closed. Memory does not grow with it."""
    connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    connection.executescript(
        "PRAGMA temp_store=FILE; PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; "
        f"PRAGMA locking_mode=EXCLUSIVE; PRAGMA cache_size=-{_CACHE_KIB};"
    )
    return connection


class NameSet:
    """A set of strings on disk."""

    def __init__(self) -> None:
        self._database = scratch_database()
        self._database.execute("CREATE TABLE member (name TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, names: Iterable[str]) -> None:
        self._database.executemany("INSERT OR IGNORE INTO member VALUES (?)", ((name,) for name in names))

    def __contains__(self, name: str) -> bool:
        return self._database.execute("SELECT 1 FROM member WHERE name = ?", (name,)).fetchone() is not None

    def mask(self, column: pa.ChunkedArray) -> pa.Array:
        """For each string of a column whether it is in the set; null is not."""
        found: list[bool] = []
        for start in range(0, len(column), _LOOKED_UP_AT_ONCE):
            names = column.slice(start, _LOOKED_UP_AT_ONCE).to_pylist()
            asked = [name for name in names if name is not None]
            marks = ",".join("?" * len(asked))
            rows = self._database.execute(f"SELECT name FROM member WHERE name IN ({marks})", asked)  # noqa: S608
            there = {name for (name,) in rows}
            found += [name in there for name in names]
        return pa.array(found, pa.bool_())
