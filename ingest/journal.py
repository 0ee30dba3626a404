"""What ingest has done, kept outside the catalog: tasks write records, and a run merges them.

A worker finishes a task by renaming one record into place, after its shards are complete. Merging moves the
records into the catalog. Both steps can be repeated, so a run may be killed anywhere and started again.
The journal may hold times (a rerun skips by size and mtime); the catalog may not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA, PREVIEW_SCHEMA
from catalog.write import merge_dataset, write_table
from shards.layout import dataset_folder

_DETACHED = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz", ".raw.bz2")}
"""Suffix of a header -> usual suffixes of its voxels' file."""
_STAMP_FIELDS = [
    pa.field("stamp_bytes", pa.int64(), nullable=False),
    pa.field("stamp_mtime_ns", pa.int64(), nullable=False),
    pa.field("stamp_files", pa.int64(), nullable=False),
]
_RECORD_SCHEMA = pa.schema([*CATALOG_SCHEMA, pa.field("preview", pa.binary()), *_STAMP_FIELDS])
_DONE_SCHEMA = pa.schema(
    [
        *(CATALOG_SCHEMA.field(name) for name in ("source_path", "entry_hash", "normalisation_version")),
        pa.field("failed", pa.bool_(), nullable=False),
        *_STAMP_FIELDS,
    ]
)
_PACK_SCHEMA = pa.schema([pa.field("source_path", pa.string()), pa.field("pack", pa.int32())])


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


@dataclass(frozen=True)
class Done:
    """An earlier result for one source."""

    stamp: Stamp
    entry_hash: str
    normalisation_version: int
    failed: bool


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
        self._tasks.mkdir(parents=True, exist_ok=True)
        corpus_private.chmod(0o700)
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SetupError(
                    f"{self.dataset}: another ingest into {self.corpus.place}, or a `verify`, is running. "
                    "Wait for it to end."
                ) from error
            yield

    def record(self, task: str, rows: Sequence[Mapping[str, Any]], stamps: Mapping[str, Stamp]) -> None:
        """Write the outcome of a task whole or not at all.

        Args:
            task: name of the task; the same task overwrites its own record.
            rows: catalog rows, each with a `preview` (PNG bytes or None).
            stamps: per source path, taken before the source was read.
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
        write_table(self._tasks / f"{task}.parquet", pa.Table.from_pylist(complete, schema=_RECORD_SCHEMA))

    def merge(self) -> None:
        """Move all records into previews, catalog and the list of what is done, then delete them."""
        # Half-written records begin with a dot; the same task will overwrite them.
        files = sorted(self._tasks.glob("[!.]*.parquet"))
        if not files:
            return
        records = pa.concat_tables([pq.read_table(file, schema=_RECORD_SCHEMA) for file in files])
        previews = records.filter(pc.is_valid(records["preview"])).select(PREVIEW_SCHEMA.names)
        merge_dataset(
            self.corpus,
            self.dataset,
            records.select(CATALOG_SCHEMA.names),
            previews,
            reread=set(records["source_path"].to_pylist()),
        )

        latest = {row["source_path"]: row for row in self._done_rows()}
        failed: set[str] = set()
        for row in records.select([*_DONE_SCHEMA.names[:3], "status", *_DONE_SCHEMA.names[4:]]).to_pylist():
            if row.pop("status") == "failed":
                failed.add(row["source_path"])
            latest[row["source_path"]] = row | {"failed": row["source_path"] in failed}
        done = [latest[path] for path in sorted(latest)]
        write_table(self._done_file, pa.Table.from_pylist(done, schema=_DONE_SCHEMA))
        for file in files:
            file.unlink()

    def unmerged(self) -> int:
        """Number of records that wait for a merge, which only a stopped run leaves."""
        return sum(1 for _ in self._tasks.glob("[!.]*.parquet"))

    def done(self) -> dict[str, Done]:
        """Earlier results by source path."""
        return {
            row["source_path"]: Done(
                Stamp(row["stamp_bytes"], row["stamp_mtime_ns"], row["stamp_files"]),
                row["entry_hash"],
                row["normalisation_version"],
                row["failed"],
            )
            for row in self._done_rows()
        }

    def packs(self, paths: Sequence[str], pack_size: int) -> dict[str, int]:
        """Pack number of every 2-D source, fixed when it is first discovered.

        Membership follows the sorted list of discovered sources, whatever part of it a call ingests, so
        that a killed run ends with the same packs. Sources discovered later open new packs.
        """
        file = self._packs_file
        known: dict[str, int] = {}
        if file.exists():
            table = pq.read_table(file, schema=_PACK_SCHEMA)
            known = dict(zip(table["source_path"].to_pylist(), table["pack"].to_pylist(), strict=True))
        new = sorted(set(paths) - known.keys())
        if new:
            first = max(known.values(), default=-1) + 1
            known |= {path: first + position // pack_size for position, path in enumerate(new)}
            columns = {"source_path": list(known), "pack": list(known.values())}
            write_table(file, pa.table(columns, schema=_PACK_SCHEMA))
        return known

    def remove_unreferenced_shards(self, referenced: set[str]) -> None:
        """Delete arrays of this dataset that no catalog row names: left by a killed run or replaced.

        Args:
            referenced: shard paths relative to `shards/`.
        """
        folder = self.corpus.shards_folder / dataset_folder(self.dataset)
        if not folder.is_dir():
            return
        for array in folder.iterdir():
            if f"{folder.name}/{array.name}" not in referenced:
                shutil.rmtree(array) if array.is_dir() else array.unlink()

    def kept_files(self) -> list[Path]:
        """What a run needs to know of earlier ones, between runs."""
        return [self._done_file, self._packs_file]

    @property
    def _packs_file(self) -> Path:
        return self.folder / "packs.parquet"

    @property
    def _tasks(self) -> Path:
        return self.folder / "tasks"

    @property
    def _done_file(self) -> Path:
        return self.folder / "done.parquet"

    def _done_rows(self) -> list[dict[str, Any]]:
        if not self._done_file.exists():
            return []
        return pq.read_table(self._done_file, schema=_DONE_SCHEMA).to_pylist()  # type: ignore[no-any-return]
