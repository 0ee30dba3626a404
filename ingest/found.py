"""The sources of a dataset as a call finds them, and which of them are left to do. However many: on disk."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from pydantic import TypeAdapter

from catalog.corpus import Corpus
from catalog.scratch import scratch_database
from ingest.discover import found_twice, nothing_found, same_key, stream_sources
from ingest.journal import Journal, Stamp
from ingest.ledger import as_known_error, attached
from ingest.source import ImageSource
from ingest.spec import DatasetSpec
from ingest.task import Place

_ROWS = 1 << 12
_LOT_BYTES = 512 << 20
_Row = tuple[int | None, str, str, str, int, int]
"""Pack, path, key, subject, kind, bytes."""

_KINDS = TypeAdapter(ImageSource)
_SCHEMA = """
CREATE TABLE kind (id INTEGER PRIMARY KEY, source TEXT UNIQUE, format TEXT, modality TEXT, flat INTEGER);
CREATE TABLE source (
    id INTEGER PRIMARY KEY, path TEXT, key TEXT, subject TEXT, kind INTEGER, images_group INTEGER,
    selected INTEGER, bytes INTEGER, mtime_ns INTEGER, files INTEGER, pending INTEGER DEFAULT 0, pack INTEGER
);
CREATE TABLE stored (path TEXT PRIMARY KEY, whole INTEGER) WITHOUT ROWID;
BEGIN;
"""


@dataclass(frozen=True)
class Group:
    """Sources that one task takes: volume files or series, or what is pending of a pack."""

    pack: int | None
    kinds: tuple[ImageSource, ...]
    """Sources without path, key and subject: all that many sources share."""
    places: tuple[Place, ...]


class FoundSources:
    """All sources of a dataset below its root."""

    def __init__(self, spec: DatasetSpec, root: Path, only: re.Pattern[str], limit: int | None) -> None:
        """Walk through the folder, and look at the size and time of what is selected.

        Args:
            only: sources whose key it finds are selected.
            limit: of those at most so many, the first by key.

        Raises:
            SetupError: as `find_sources`.
        """
        self.spec = spec
        self.root = root
        self._database = scratch_database()
        try:
            self._database.executescript(_SCHEMA)
            self._fill(only)
            self._refuse_ambiguous()
            self._select(limit)
        except sqlite3.Error as error:
            raise as_known_error(error) from error

    @property
    def found(self) -> int:
        return self._number("SELECT count(*) FROM source")

    @property
    def selected(self) -> int:
        return self._number("SELECT count(*) FROM source WHERE selected")

    @property
    def pending(self) -> int:
        return self._number("SELECT count(*) FROM source WHERE pending")

    @property
    def pending_bytes(self) -> int:
        """Size of the pending files; one that is gone counts nothing, its task will say so."""
        return sum(self.pending_bytes_by_format().values())

    @property
    def largest_bytes(self) -> int:
        """Size of the largest pending source."""
        return self._number("SELECT coalesce(max(bytes), 0) FROM source WHERE pending")

    def pending_bytes_by_format(self) -> dict[str, int]:
        sums = (
            "SELECT format, sum(max(bytes, 0)) FROM source JOIN kind ON kind.id = kind WHERE pending GROUP BY 1"
        )
        return dict(self._database.execute(sums))

    def subjects(self) -> dict[str, Iterable[str]]:
        """Per modality the subjects of all sources found, with repetitions."""
        modalities = [
            name for (name,) in self._database.execute("SELECT DISTINCT modality FROM kind ORDER BY 1")
        ]
        return {modality: self._subjects_of(modality) for modality in modalities}

    def compare(self, journal: Journal, corpus: Corpus, normalisation_version: int) -> None:
        """Find out what is pending: selected, and not done by an earlier run, or changed since, or damaged."""
        with attached(self._database, journal.ledger_file):
            if self._number("SELECT EXISTS (SELECT 1 FROM ledger.done)"):
                self._look_at_stored(corpus)
            self._database.execute(
                """
                UPDATE source SET pending = selected AND NOT EXISTS (
                    SELECT 1 FROM ledger.done JOIN stored USING (path)
                    WHERE done.path = source.path AND whole AND NOT failed
                        AND stamp_bytes = bytes AND stamp_mtime_ns = mtime_ns AND stamp_files = files
                        AND entry_hash = ? AND normalisation_version = ?
                )
                """,
                (self.spec.entry_hash(), normalisation_version),
            )

    def assign_packs(self, journal: Journal, pack_size: int) -> None:
        """Give every 2-D source its pack, fixed when it is first discovered.

        Membership follows the sorted list of discovered sources, whatever part of it a call ingests, so
        that a killed run ends with the same packs. Sources discovered later open new packs.
        """
        if not self._number("SELECT EXISTS (SELECT 1 FROM kind WHERE flat)"):
            return
        journal.ensure_ledger()
        with attached(self._database, journal.ledger_file):
            self._database.execute(
                """
                INSERT INTO ledger.pack
                SELECT path, (SELECT coalesce(max(pack), -1) + 1 FROM ledger.pack)
                    + (row_number() OVER (ORDER BY path) - 1) / ?
                FROM source JOIN kind ON kind.id = kind
                WHERE flat AND path NOT IN (SELECT path FROM ledger.pack)
                """,
                (pack_size,),
            )
            self._database.execute(
                "UPDATE source SET pack = "
                "(SELECT pack FROM ledger.pack AS known WHERE known.path = source.path) "
                "WHERE pending AND kind IN (SELECT id FROM kind WHERE flat)"
            )

    def groups(self, volumes_at_once: int = 1) -> Iterator[Group]:
        """What is pending, as tasks take it: volumes by key, then packs. Read as it is asked for.

        Args:
            volumes_at_once: so many small volumes make one task, for each task costs the driver some time.
        """
        self._database.execute("DROP INDEX IF EXISTS todo")
        self._database.execute("CREATE INDEX todo ON source (pack, key) WHERE pending")
        rows = self._database.execute(
            "SELECT pack, path, key, subject, kind, bytes FROM source WHERE pending ORDER BY pack, key"
        )
        for pack, members in groupby(rows, key=lambda row: row[0]):
            if pack is None:
                for lot in _lots(members, volumes_at_once):
                    yield self._group(None, lot)
            else:
                yield self._group(pack, list(members))

    def _fill(self, only: re.Pattern[str]) -> None:
        kind_of = functools.lru_cache(maxsize=1024)(self._kind)
        rows = (
            (
                source.path,
                source.key,
                source.subject,
                kind_of(replace(source, path="", key="", subject="", root=Path())),
                number,
                only.search(source.key) is not None,
            )
            for number, source in stream_sources(self.spec, self.root)
        )
        self._database.executemany(
            "INSERT INTO source (path, key, subject, kind, images_group, selected) VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )

    def _kind(self, source: ImageSource) -> int:
        text = _KINDS.dump_json(source).decode()
        self._database.execute(
            "INSERT OR IGNORE INTO kind (source, format, modality, flat) VALUES (?, ?, ?, ?)",
            (text, source.format, source.modality, source.dimension == 2),
        )
        return self._number("SELECT id FROM kind WHERE source = ?", text)

    def _refuse_ambiguous(self) -> None:
        # Indexes come after the rows: sorting once is far quicker than inserting in place.
        self._database.execute("CREATE INDEX by_path ON source (path)")
        twice = (
            "SELECT path, min(images_group), max(images_group) FROM source GROUP BY path HAVING count(*) > 1"
        )
        repeated = False
        for path, first, last in self._database.execute(twice):
            if first != last:
                raise found_twice(self.spec, path, last)
            repeated = True
        if repeated:
            self._database.execute(
                "DELETE FROM source WHERE id NOT IN (SELECT min(id) FROM source GROUP BY path)"
            )
        self._database.execute("CREATE INDEX by_key ON source (key)")
        same = "SELECT key, min(path), max(path) FROM source GROUP BY key HAVING count(*) > 1 LIMIT 1"
        for key, path, other in self._database.execute(same):
            raise same_key(self.spec, key, path, other)
        if not self.found:
            raise nothing_found(self.spec, self.root)

    def _select(self, limit: int | None) -> None:
        if limit is not None:
            self._database.execute(
                "UPDATE source SET selected = 0 WHERE selected AND key NOT IN "
                "(SELECT key FROM source WHERE selected ORDER BY key LIMIT ?)",
                (limit,),
            )
        last = 0
        page = "SELECT id, path FROM source WHERE selected AND id > ? ORDER BY id LIMIT ?"
        while rows := self._database.execute(page, (last, _ROWS)).fetchall():
            stamps = ((Stamp.if_any(self.root / path), number) for number, path in rows)
            self._database.executemany(
                "UPDATE source SET bytes = ?, mtime_ns = ?, files = ? WHERE id = ?",
                ((stamp.size, stamp.mtime_ns, stamp.files, number) for stamp, number in stamps),
            )
            last = rows[-1][0]

    def _look_at_stored(self, corpus: Corpus) -> None:
        """Note the source paths that have rows in the catalog, and whether their shards, if any, are on disk.

        A user may have deleted a damaged one so that ingest writes it anew.
        """
        from catalog.query import read_batches

        self._database.execute("DELETE FROM stored")
        file = corpus.catalog_file(self.spec.id)
        if not file.exists():
            return
        there = functools.lru_cache(maxsize=1024)(
            lambda shard: shard is None or (corpus.shards / shard).is_dir()
        )
        remedy = f"Restore it, or delete it and type `make ingest DATASET={self.spec.id}`."
        for table in read_batches(file, remedy, ["source_path", "shard_path"]):
            paths, shards = table["source_path"].to_pylist(), table["shard_path"].to_pylist()
            self._database.executemany(
                "INSERT INTO stored VALUES (?, ?) ON CONFLICT DO UPDATE SET whole = min(whole, excluded.whole)",
                ((path, there(shard)) for path, shard in zip(paths, shards, strict=True)),
            )

    def _group(self, pack: int | None, rows: list[_Row]) -> Group:
        numbers = sorted({row[4] for row in rows})
        kinds = tuple(map(self._source_of_kind, numbers))
        places = (Place(path, key, subject, numbers.index(kind)) for _, path, key, subject, kind, _ in rows)
        return Group(pack, kinds, tuple(places))

    def _source_of_kind(self, number: int) -> ImageSource:
        (text,) = self._database.execute("SELECT source FROM kind WHERE id = ?", (number,)).fetchone()
        return _parsed(text)

    def _subjects_of(self, modality: str) -> Iterator[str]:
        members = "SELECT subject FROM source WHERE kind IN (SELECT id FROM kind WHERE modality = ?)"
        return (subject for (subject,) in self._database.execute(members, (modality,)))

    def _number(self, query: str, *values: str) -> int:
        (number,) = self._database.execute(query, values).fetchone()
        return int(number)


def _lots(rows: Iterator[_Row], number: int) -> Iterator[list[_Row]]:
    """Neighbours in lots of at most `number`, and of no more bytes than take some seconds."""
    lot: list[_Row] = []
    size = 0
    for row in rows:
        if lot and (len(lot) == number or size + row[-1] > _LOT_BYTES):
            yield lot
            lot, size = [], 0
        lot.append(row)
        size += row[-1]
    if lot:
        yield lot


@functools.lru_cache(maxsize=1024)
def _parsed(source: str) -> ImageSource:
    return _KINDS.validate_json(source)
