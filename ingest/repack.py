"""Store the voxels of a dataset in another codec profile: the same images, smaller or faster to read.

New arrays are written beside those in use, under names of their own. When all are there, the catalog that
names them is published by one rename, and only then do the old ones go. So the corpus is whole at any moment,
and a call that was stopped is repeated: what lies there complete is kept. The dataset remembers its profile,
and later ingests follow it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.manifest import publish, refuse_damaged, settle
from catalog.query import read_batches, remedy_of
from catalog.schema import CATALOG_SCHEMA
from catalog.scratch import NameSet, scratch_database
from catalog.store import Location
from catalog.write import catalog_file
from ingest.journal import Journal
from ingest.run import explained
from ingest.verify import worker_pool
from shards.layout import Profile, in_profile
from shards.recode import ArrayRecord, recode, sample
from shards.write import StoredArray, remove_leftovers

_SAMPLED_ARRAYS = 32
_SAMPLED_BYTES = 6 << 20
"""Decoded, of each array of the sample."""
_ARRAYS_IN_FLIGHT = 4
"""For each worker."""
_ROWS = 1 << 13
_SCHEMA = """
CREATE TABLE array (
    path TEXT PRIMARY KEY, shape TEXT, dtype TEXT, is_pack INTEGER, sha256 TEXT, bytes INTEGER,
    target TEXT, target_sha256 TEXT, target_bytes TEXT
) WITHOUT ROWID;
BEGIN;
"""

Progress = Callable[[int, int], None]
"""Called with (stored bytes converted, stored bytes to convert)."""


@dataclass(frozen=True, kw_only=True)
class RepackReport:
    """What a dataset's voxels take, before and after."""

    dataset: str
    profile: Profile
    arrays: int
    """Of the dataset."""
    pending: int
    """Of those, in another profile before."""
    bytes_before: int
    """Compressed bytes of all images."""
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class RepackEstimate(RepackReport):
    """What a repack would do, judged by re-encoding a sample."""

    bytes_needed: int
    """Disk that the new arrays take while the old ones are still there."""
    bytes_free: int | None
    """On the disk of a corpus in a folder."""
    cpu_seconds: float
    """On one core."""


def estimate_repack(corpus: Corpus, dataset: str, profile: Profile) -> RepackEstimate:
    """Say what `repack_dataset` would do. Nothing is written.

    Arrays are drawn with a probability that follows their size, and a part of each is re-encoded. Raises
    SetupError if the catalog or an array of the sample is damaged or missing.
    """
    with closing(_arrays_of(corpus, dataset, profile)) as database, explained(dataset, corpus):
        arrays, pending, before, to_do = _amounts(database)
        with _naming_damage(dataset):
            drawn = [
                (times, sample(corpus.shards, array, profile, _SAMPLED_BYTES))
                for times, array in _drawn(database, to_do)
            ]
    # Each time an array is drawn it stands for an equal share of the bytes.
    shares = [(times / _SAMPLED_ARRAYS / found.before, found) for times, found in drawn]
    needed = round(to_do * sum(share * found.after for share, found in shares))
    return RepackEstimate(
        dataset=dataset,
        profile=profile,
        arrays=arrays,
        pending=pending,
        bytes_before=before,
        bytes_after=before - to_do + needed,
        bytes_needed=needed,
        bytes_free=shutil.disk_usage(corpus.root).free if isinstance(corpus.shards, Path) else None,
        cpu_seconds=to_do * sum(share * found.seconds for share, found in shares),
    )


def repack_dataset(
    corpus: Corpus, dataset: str, profile: Profile, workers: int | None, progress: Progress
) -> RepackReport:
    """Bring all arrays of a dataset into a codec profile. Call it again after an interruption.

    Voxels stay the same bit by bit, and the catalog ends as an ingest in that profile writes it.

    Args:
        workers: processes; by default one per core.
        progress: told after every array.

    Raises:
        SetupError: an ingest, a repack or a verification of the dataset is running, something is damaged, or
            the disk is full; what the catalog names is there as before.
    """
    journal = Journal(corpus, dataset)
    with explained(dataset, corpus), journal.lock():
        settle(corpus, dataset)
        # A stopped ingest may have left rows that wait for the catalog.
        journal.close_runs()
        journal.merge()
        remove_leftovers(corpus.shards_folder, dataset)
        refuse_damaged(corpus, dataset, corpus.catalog_file(dataset), remedy_of(dataset))
        with closing(_arrays_of(corpus, dataset, profile)) as database:
            arrays, pending, before, to_do = _amounts(database)
            done = 0
            count = min(workers or len(os.sched_getaffinity(0)), max(1, pending))
            for path, size, stored in _converted(corpus, dataset, profile, database, count):
                database.execute(
                    "UPDATE array SET target = ?, target_sha256 = ?, target_bytes = ? WHERE path = ?",
                    (stored.path, stored.sha256, json.dumps(stored.stored_bytes), path),
                )
                done += size
                progress(done, to_do)
            journal.choose_profile(profile)
            if pending:
                refuse_damaged(corpus, dataset, corpus.catalog_file(dataset), remedy_of(dataset))
                rows = _rows(corpus, dataset, database)
                publish(corpus, dataset, [catalog_file(corpus, dataset, rows)])
        after = _remove_replaced(corpus, dataset, journal)
    return RepackReport(
        dataset=dataset,
        profile=profile,
        arrays=arrays,
        pending=pending,
        bytes_before=before,
        bytes_after=after,
    )


def _arrays_of(corpus: Corpus, dataset: str, profile: Profile) -> sqlite3.Connection:
    """All arrays that the catalog of a dataset names; `target` is null where one is in another profile."""
    columns = ["shard_path", "shard_shape", "shard_index", "stored_dtype", "shard_sha256", "stored_bytes"]
    database = scratch_database()
    database.executescript(_SCHEMA)
    file = corpus.catalog_file(dataset)
    for table in read_batches(file, remedy_of(dataset), columns, schema=CATALOG_SCHEMA):
        stored = table.filter(pc.is_valid(table["shard_path"]))
        database.executemany(
            "INSERT INTO array VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL) "
            "ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes",
            (
                (path, json.dumps(shape), dtype, index is not None, sha256, size,
                 path if in_profile(path, profile) == path else None)
                for path, shape, index, dtype, sha256, size in zip(
                    *(stored[name].to_pylist() for name in columns), strict=True
                )
            ),
        )  # fmt: skip
    return database


def _amounts(database: sqlite3.Connection) -> tuple[int, int, int, int]:
    """(arrays, those in another profile, stored bytes of all, of those in another profile)."""
    (amounts,) = database.execute(
        "SELECT count(*), coalesce(sum(target IS NULL), 0), coalesce(sum(bytes), 0), "
        "coalesce(sum(bytes * (target IS NULL)), 0) FROM array"
    )
    return amounts  # type: ignore[no-any-return]


def _pending(database: sqlite3.Connection) -> Iterator[tuple[int, ArrayRecord]]:
    """Arrays in another profile, by path, with their stored bytes; the table may be written meanwhile."""
    page = (
        "SELECT path, shape, dtype, is_pack, sha256, bytes FROM array "
        "WHERE target IS NULL AND path > ? ORDER BY path LIMIT ?"
    )
    last = ""
    while rows := database.execute(page, (last, _ROWS)).fetchall():
        for path, shape, dtype, is_pack, sha256, size in rows:
            array = ArrayRecord(
                path=path, shape=tuple(json.loads(shape)), dtype=dtype, is_pack=bool(is_pack), sha256=sha256
            )
            yield size, array
        last = rows[-1][0]


def _drawn(database: sqlite3.Connection, total: int) -> Iterator[tuple[int, ArrayRecord]]:
    """Arrays that hold the bytes at equal distances in all that is to be converted, and how many each holds."""
    passed = before = 0
    for size, array in _pending(database):
        passed += size
        reached = passed * _SAMPLED_ARRAYS // total
        if reached > before:
            yield reached - before, array
        before = reached


def _converted(
    corpus: Corpus, dataset: str, profile: Profile, database: sqlite3.Connection, workers: int
) -> Iterator[tuple[str, int, StoredArray]]:
    """Every pending array once it lies there in its new profile: (old path, old bytes, what lies there now)."""
    running: dict[Future[StoredArray], tuple[str, int]] = {}

    def ended() -> Iterator[tuple[str, int, StoredArray]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            path, size = running.pop(future)
            yield path, size, future.result()

    with worker_pool(workers, processes=True) as pool:
        try:
            for size, array in _pending(database):
                running[pool.submit(_recoded, dataset, corpus.shards, array, profile)] = array.path, size
                if len(running) >= _ARRAYS_IN_FLIGHT * workers:
                    yield from ended()
            while running:
                yield from ended()
        except BrokenProcessPool as error:
            raise SetupError(
                f"{dataset}: a process that wrote arrays died, most likely for lack of memory. What was done "
                "is kept: repeat the command with fewer --workers."
            ) from error
        finally:
            for future in running:
                future.cancel()


def _recoded(dataset: str, shards: Location, array: ArrayRecord, profile: Profile) -> StoredArray:
    """Runs in a worker."""
    with _naming_damage(dataset):
        return recode(shards, array, profile)


@contextmanager
def _naming_damage(dataset: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        problem = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise SetupError(
            f"{dataset}: {problem}. Nothing that the catalog names has changed. Type `pumit-data verify "
            f"{dataset} --repair --raw ...`, which makes it anew, and repeat the command."
        ) from error


def _rows(corpus: Corpus, dataset: str, database: sqlite3.Connection) -> Iterator[pa.Table]:
    """The catalog with the new arrays in the place of the old ones."""
    moved = "SELECT target, target_sha256, target_bytes FROM array WHERE path = ? AND target_bytes IS NOT NULL"
    told = ("shard_path", "shard_sha256", "stored_bytes")
    file = corpus.catalog_file(dataset)
    for table in read_batches(file, remedy_of(dataset), rows=_ROWS, schema=CATALOG_SCHEMA):
        kept = table.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA)
        columns: dict[str, list[Any]] = {name: kept[name].to_pylist() for name in told}
        found: dict[str, tuple[str, str, list[int]]] = {}
        for number, (path, index) in enumerate(
            zip(columns["shard_path"], kept["shard_index"].to_pylist(), strict=True)
        ):
            if path is None:
                continue
            if path not in found and (row := database.execute(moved, (path,)).fetchone()):
                found[path] = row[0], row[1], json.loads(row[2])
            if path in found:
                target, sha256, stored = found[path]
                new = target, sha256, stored[index or 0]
                for name, value in zip(told, new, strict=True):
                    columns[name][number] = value
        for name, values in columns.items():
            field = CATALOG_SCHEMA.field(name)
            kept = kept.set_column(kept.schema.get_field_index(name), field, pa.array(values, field.type))
        yield kept


def _remove_replaced(corpus: Corpus, dataset: str, journal: Journal) -> int:
    """Delete the arrays that the published catalog no longer names; returns the bytes of those it names."""
    referenced, total = NameSet(), 0
    columns = ["shard_path", "stored_bytes"]
    for table in read_batches(corpus.catalog_file(dataset), remedy_of(dataset), columns, schema=CATALOG_SCHEMA):
        referenced.add(table["shard_path"].drop_null().to_pylist())
        total += pc.sum(table["stored_bytes"]).as_py() or 0
    journal.remove_unreferenced_shards(referenced)
    return total
