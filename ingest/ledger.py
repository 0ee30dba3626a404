"""What is known of every source of a dataset from earlier runs: when it was done, and its pack. An SQLite file.

Also what the user chose for the whole dataset: how its voxels are stored.

A rollback journal, full synchronisation and one writer (the ingest that holds the dataset's lock) make every
change whole, whatever is killed. Times may stand here; the catalog has none.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from catalog.errors import SetupError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS done (
    path TEXT PRIMARY KEY,
    stamp_bytes INTEGER NOT NULL,
    stamp_mtime_ns INTEGER NOT NULL,
    stamp_files INTEGER NOT NULL,
    entry_hash TEXT NOT NULL,
    normalisation_version INTEGER NOT NULL,
    failed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pack (path TEXT PRIMARY KEY, pack INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS name (alias TEXT PRIMARY KEY, path TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS choice (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_BUSY_SECONDS = 30

DoneRow = tuple[str, int, int, int, str, int, bool]
"""A row of the table `done`."""


def update_ledger(file: Path, done: Iterable[DoneRow]) -> None:
    """Record what was done, all or nothing; makes the file if there is none."""
    with _explained(file), closing(sqlite3.connect(file, timeout=_BUSY_SECONDS)) as database:
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(_SCHEMA)
        with database:
            database.executemany("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?, ?, ?)", done)


def choose(file: Path, name: str, value: str) -> None:
    """Record what later runs are to follow; makes the file if there is none."""
    update_ledger(file, [])
    with _explained(file), closing(sqlite3.connect(file, timeout=_BUSY_SECONDS)) as database:
        database.execute("PRAGMA synchronous=FULL")
        with database:
            database.execute("INSERT OR REPLACE INTO choice VALUES (?, ?)", (name, value))


def chosen(file: Path, name: str) -> str | None:
    """What `choose` recorded last."""
    if not file.exists():
        return None
    with _explained(file), closing(sqlite3.connect(file, timeout=_BUSY_SECONDS)) as database:
        try:
            row = database.execute("SELECT value FROM choice WHERE name = ?", (name,)).fetchone()
        except sqlite3.OperationalError:
            if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'choice'").fetchone():
                raise
            return None  # a ledger of an earlier version, or one that may not be written
    return None if row is None else str(row[0])


def path_behind(file: Path, alias: str) -> str | None:
    """The path that an alias stands for; None where this ledger, if there is one, does not know it.

    Raises OSError when it cannot be read, SetupError when it is damaged.
    """
    if not file.exists():
        return None
    with _explained(file), closing(sqlite3.connect(file, timeout=_BUSY_SECONDS)) as database:
        database.executescript(_SCHEMA)
        row = database.execute("SELECT path FROM name WHERE alias = ?", (alias,)).fetchone()
    return None if row is None else str(row[0])


def copy_without_names(file: Path, target: Path) -> None:
    """Make a ledger that knows all that another does but the paths behind aliases: for others to read."""
    for ledger in (file, target):
        update_ledger(ledger, [])
    with _explained(file), closing(sqlite3.connect(target, isolation_level=None)) as database:
        database.execute("ATTACH ? AS known", (str(file),))
        for table in ("done", "pack", "choice"):
            database.execute(f"INSERT INTO {table} SELECT * FROM known.{table}")  # noqa: S608 - constants


def done_paths(file: Path) -> set[str]:
    """Source paths of all that was done, as the catalog has them; none where there is no ledger."""
    if not file.exists():
        return set()
    with _explained(file), closing(sqlite3.connect(file, timeout=_BUSY_SECONDS)) as database:
        return {path for (path,) in database.execute("SELECT path FROM done")}


@contextmanager
def attached(database: sqlite3.Connection, file: Path) -> Iterator[None]:
    """Give a database the ledger's tables, as `ledger.done` and `ledger.pack`, for one transaction.

    Where there is no file the tables are empty. Raises SetupError when the ledger is damaged, OSError when it
    cannot be read or written.
    """
    with _explained(file):
        if database.in_transaction:  # a database can only be attached between transactions
            database.execute("COMMIT")
        database.execute("ATTACH ? AS ledger", (str(file) if file.exists() else ":memory:",))
        try:
            if not file.exists():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    database.execute(statement.replace("EXISTS ", "EXISTS ledger."))
            database.execute("BEGIN")
            yield
            database.execute("COMMIT")
        finally:
            if database.in_transaction:
                database.execute("ROLLBACK")
            database.execute("DETACH ledger")


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise as_known_error(error, file) from error


def as_known_error(error: sqlite3.Error, file: Path | None = None) -> Exception:
    """An error of SQLite as the OSError it stands for; a damaged file as a SetupError."""
    # Extended codes have the primary one in their lower byte.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return SetupError(
            f"{file} is damaged: {error}. Restore it, or delete it: then every image is read again, and 2-D "
            "images may change their packs."
        )
    number = {
        sqlite3.SQLITE_FULL: errno.ENOSPC,
        sqlite3.SQLITE_READONLY: errno.EACCES,
        sqlite3.SQLITE_PERM: errno.EACCES,
        sqlite3.SQLITE_CANTOPEN: errno.EACCES,
        sqlite3.SQLITE_IOERR: errno.EIO,
        sqlite3.SQLITE_BUSY: errno.EAGAIN,
    }.get(code)
    if number is None:
        return error
    return OSError(number, os.strerror(number), str(file or "the folder for temporary files"))
