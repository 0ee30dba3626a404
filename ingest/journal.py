"""What ingest has done, kept outside the catalog: tasks write records, and a run merges them.

A worker finishes a task by renaming one record into the folder of its run, after its shards are complete.
Merging moves the records into the catalog. Both steps can be repeated, so a run may be killed anywhere and
started again. The next run moves the folder away first: a worker that outlived its run finds no place to
write to, and stops.
The journal may hold times (a rerun skips by size and mtime); the catalog may not.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA, FEATURES_SCHEMA, PREVIEW_SCHEMA
from catalog.scratch import NameSet, scratch_database
from catalog.write import merge_batches, write_table
from ingest.ledger import choose, chosen, update_ledger
from shards.layout import PROFILES, Profile, dataset_folder

_log = logging.getLogger(__name__)

_DETACHED = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz", ".raw.bz2")}
"""Suffix of a header -> usual suffixes of its voxels' file."""
_STAMP_FIELDS = [
    pa.field("stamp_bytes", pa.int64(), nullable=False),
    pa.field("stamp_mtime_ns", pa.int64(), nullable=False),
    pa.field("stamp_files", pa.int64(), nullable=False),
]
_BESIDE = [field for schema in (PREVIEW_SCHEMA, FEATURES_SCHEMA) for field in list(schema)[2:]]
"""Columns of the catalog's siblings; null for an image that is not ingested."""
_RECORD_SCHEMA = pa.schema([*CATALOG_SCHEMA, *(field.with_nullable(True) for field in _BESIDE), *_STAMP_FIELDS])
_DONE_COLUMNS = [
    "source_path",
    *(field.name for field in _STAMP_FIELDS),
    "entry_hash",
    "normalisation_version",
    "status",
]
_PRESENCE = ".running"
"""File in the folder of a run that every task in progress holds locked."""
_ROWS_AT_ONCE = 1 << 12
_DRAIN_SECONDS = 120
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Stamp:
    """Size and time of a source: what tells a rerun, without reading it, that nothing changed."""

    size: int
    mtime_ns: int
    files: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Stamp of a file, or of all files directly in a folder. OSError as the file system raises it.

        A header with its voxels in a second file, as MetaImage and NRRD have it, is stamped with that file.
        """
        if path.is_dir():
            stats = [entry.stat() for entry in os.scandir(path) if entry.is_file()]
        else:
            beside = (path.with_suffix(suffix) for suffix in _DETACHED.get(path.suffix.lower(), ()))
            stats = [path.stat(), *(file.stat() for file in beside if file.is_file())]
        # Times are added up: a file may be replaced by one that is older than its neighbours.
        times = sum(status.st_mtime_ns for status in stats) % (1 << 63)
        return cls(sum(status.st_size for status in stats), times, len(stats))

    @classmethod
    def if_any(cls, path: Path) -> Stamp:
        """Stamp of a source; of one that cannot be listed, a stamp that equals no real one."""
        try:
            return cls.of(path)
        except OSError:
            return cls(-1, 0, 0)


class RunEndedError(OSError):
    """The folder of a task's run is gone: the run has ended, or this machine does not see the corpus."""


class Journal:
    """Records of one dataset in `private/journal/<dataset>/`."""

    def __init__(self, corpus: Corpus, dataset: str) -> None:
        self.corpus = corpus
        self.dataset = dataset
        self.folder = corpus.private / "journal" / dataset

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One ingest of a dataset at a time; the kernel frees the lock when the process dies.

        Raises SetupError when another process holds it.
        """
        corpus_private = self.corpus.private
        self.folder.mkdir(parents=True, exist_ok=True)
        corpus_private.chmod(0o700)
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SetupError(
                    f"{self.dataset}: another ingest into {self.corpus.place}, or a `verify` or `repack`, is "
                    "running. Wait for it to end."
                ) from error
            yield

    @contextmanager
    def run(self) -> Iterator[str]:
        """The name of a new run, whose tasks may record until the block ends. To be entered under the lock.

        What an earlier run left is closed to its workers before, and merged.
        """
        self.close_runs()
        self.merge()
        run = secrets.token_hex(4)
        (self._runs / run).mkdir(parents=True)
        (self._runs / run / _PRESENCE).touch()
        try:
            yield run
        finally:
            self.close_runs(wait=False)
            self.merge()

    def close_runs(self, wait: bool = True) -> None:
        """Take the folders of all runs out of reach of their workers.

        Args:
            wait: until the tasks in progress have noticed and stopped, but no longer than two minutes: what a
                worker that hangs may still write is harmless, an array without a row.
        """
        self._closed.mkdir(parents=True, exist_ok=True)
        for folder in self._folders(self._runs):
            folder.rename(self._closed / folder.name)
        for folder in self._folders(self._closed) if wait else ():
            _wait_until_free(folder / _PRESENCE, f"{self.dataset}: waiting for workers of an earlier run")

    @contextmanager
    def taking_part(self, run: str) -> Iterator[None]:
        """A task in progress: what `close_runs` waits for. RunEndedError if the run is closed."""
        self.check_open(run)
        with (self._runs / run / _PRESENCE).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            self.check_open(run)
            yield

    def check_open(self, run: str) -> None:
        """Raises RunEndedError if the run is closed."""
        if not (self._runs / run).is_dir():
            raise RunEndedError(errno.ENOENT, "the run has ended", str(self._runs / run))

    def record(
        self, run: str, task: str, rows: Sequence[Mapping[str, Any]], stamps: Mapping[str, Stamp]
    ) -> None:
        """Write the outcome of a task whole or not at all.

        Args:
            run: name of the run.
            task: name of the task; the same task overwrites its own record.
            rows: catalog rows, those of ingested images with their preview and features.
            stamps: per source path, taken before the source was read.

        Raises:
            RunEndedError: the run is closed; nothing is written.
        """
        complete = [
            dict(row)
            | {
                "stamp_bytes": stamps[row["source_path"]].size,
                "stamp_mtime_ns": stamps[row["source_path"]].mtime_ns,
                "stamp_files": stamps[row["source_path"]].files,
            }
            for row in rows
        ]
        try:
            write_table(
                self._runs / run / f"{task}.parquet", pa.Table.from_pylist(complete, schema=_RECORD_SCHEMA)
            )
        except FileNotFoundError:
            self.check_open(run)
            raise

    def merge(self) -> None:
        """Move all records into previews, catalog and the ledger of what is done, then delete them."""
        with closing(scratch_database()) as database:
            # Half-written records begin with a dot.
            database.executescript(
                "CREATE TABLE record (file TEXT PRIMARY KEY); BEGIN;"
                "CREATE TABLE done (path TEXT PRIMARY KEY, stamp_bytes, stamp_mtime_ns, stamp_files,"
                " entry_hash, normalisation_version, failed) WITHOUT ROWID;"
            )
            database.executemany("INSERT INTO record VALUES (?)", ((file,) for file in self._records()))
            if database.execute("SELECT EXISTS (SELECT 1 FROM record)").fetchone() == (1,):
                merge_batches(self.corpus, self.dataset, self._batches(database))
                update_ledger(self.ledger_file, database.execute("SELECT * FROM done"))
                for (file,) in database.execute("SELECT file FROM record"):
                    Path(file).unlink()
        for folder in self._folders(self._closed):
            shutil.rmtree(folder)

    def unmerged(self) -> int:
        """Number of records that wait for a merge, which only a stopped run leaves."""
        return sum(1 for _ in self._records())

    def _records(self) -> Iterator[str]:
        return (
            entry.path
            for above in (self._closed, self._runs)
            for folder in self._folders(above)
            for entry in os.scandir(folder)
            if entry.name.endswith(".parquet") and not entry.name.startswith(".")
        )

    def _batches(
        self, database: sqlite3.Connection
    ) -> Iterator[tuple[pa.Table, pa.Table, pa.Table, list[str]]]:
        """Rows, previews, features and source paths of the records, some at a time.

        Where two records speak of one source, as those of a pack and of its half can, the later by name does.
        """
        held: list[pa.Table] = []
        for (file,) in database.execute("SELECT file FROM record ORDER BY file DESC"):
            table = pq.read_table(file, schema=_RECORD_SCHEMA)
            told: dict[str, tuple[Any, ...]] = {}
            for path, *facts, status in zip(*(table[name].to_pylist() for name in _DONE_COLUMNS), strict=True):
                failed = status == "failed" or (path in told and told[path][-1])
                told[path] = (path, *facts, failed)
            new = {
                path
                for path, row in told.items()
                if database.execute("INSERT OR IGNORE INTO done VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount
            }
            if len(new) < len(told):
                table = table.filter(pc.is_in(table["source_path"], pa.array(new, pa.string())))
            held.append(table)
            if sum(map(len, held)) >= _ROWS_AT_ONCE:
                yield _parts(held)
                held = []
        yield _parts(held)

    def ensure_ledger(self) -> None:
        """Make an empty ledger where there is none, and the tables that an earlier one lacks."""
        update_ledger(self.ledger_file, [])

    @property
    def profile(self) -> Profile:
        """The codec profile of the dataset: `fast`, until it is repacked."""
        found = chosen(self.ledger_file, "profile")
        if found is None:
            return "fast"
        if found not in PROFILES:
            raise SetupError(
                f"{self.ledger_file} names the codec profile {found!r}, which this program does not know. "
                "Install the version of pumit-data that wrote it, or a later one."
            )
        return found

    def choose_profile(self, profile: Profile) -> None:
        """Have later runs write their arrays in a codec profile."""
        choose(self.ledger_file, "profile", profile)

    @property
    def lossless(self) -> bool:
        """Whether the dataset keeps true floats as they are: not, until an ingest asks for it."""
        return chosen(self.ledger_file, "floats") == "lossless"

    def choose_lossless(self, lossless: bool) -> None:
        """Have later runs keep true floats as they are, or not."""
        choose(self.ledger_file, "floats", "lossless" if lossless else "16-bit")

    @property
    def ledger_file(self) -> Path:
        return self.folder / "ledger.sqlite"

    def remove_unreferenced_shards(self, referenced: NameSet) -> None:
        """Delete arrays of this dataset that no catalog row names: left by a killed run or replaced.

        Args:
            referenced: shard paths relative to `shards/`.
        """
        folder = self.corpus.shards_folder / dataset_folder(self.dataset)
        if not folder.is_dir():
            return
        with os.scandir(folder) as arrays:
            for array in arrays:
                if f"{folder.name}/{array.name}" not in referenced:
                    shutil.rmtree(array.path) if array.is_dir() else Path(array.path).unlink()

    @property
    def _runs(self) -> Path:
        return self.folder / "tasks"

    @property
    def _closed(self) -> Path:
        return self.folder / "closed"

    @staticmethod
    def _folders(above: Path) -> list[Path]:
        return sorted(path for path in above.iterdir() if path.is_dir()) if above.is_dir() else []


def _parts(records: list[pa.Table]) -> tuple[pa.Table, pa.Table, pa.Table, list[str]]:
    table = pa.concat_tables([_RECORD_SCHEMA.empty_table(), *records])
    previews = table.filter(pc.is_valid(table["preview"])).select(PREVIEW_SCHEMA.names)
    features = table.filter(pc.is_valid(table["pictures"])).select(FEATURES_SCHEMA.names)
    return table.select(CATALOG_SCHEMA.names), previews, features, table["source_path"].unique().to_pylist()


def _wait_until_free(file: Path, message: str) -> None:
    """Wait until nobody holds a file locked, for a while; the kernel frees the lock of who dies."""
    if not file.exists():
        return
    deadline = time.monotonic() + _DRAIN_SECONDS
    told = False
    with file.open("a") as handle:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    _log.warning(message)
                    told = True
                time.sleep(_POLL_SECONDS)
            else:
                return
