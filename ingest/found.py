"""The sources of a dataset as a call finds them, and which of them are left to do. However many: on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from pydantic import TypeAdapter

from catalog.corpus import Corpus
from catalog.scratch import scratch_database
from ingest.discover import found_twice, nothing_found, same_key, stream_sources
from ingest.journal import Journal, Stamp
from ingest.ledger import as_known_error, attached
from ingest.names import NameKey
from ingest.overrides import Overrides, as_text, declared_hash
from ingest.source import ImageSource
from ingest.spec import DatasetSpec
from ingest.task import Place

_log = logging.getLogger(__name__)

_ROWS = 1 << 12
_LOT_BYTES = 512 << 20
_Row = tuple[int | None, str, str, str, int, str | None, int, str | None, str | None, int]
"""Pack, the columns of a place, bytes."""
_ROWS_OF = "SELECT pack, path, key, subject, kind, alias, sharing, copy_of, override, bytes FROM source "

_KINDS = TypeAdapter(ImageSource)
_SCHEMA = """
CREATE TABLE kind (id INTEGER PRIMARY KEY, source TEXT UNIQUE, format TEXT, flat INTEGER, left_out INTEGER);
CREATE TABLE kind_modality (kind INTEGER, modality TEXT);
CREATE TABLE source (
    id INTEGER PRIMARY KEY, path TEXT, key TEXT, subject TEXT, kind INTEGER,
    alias TEXT, name TEXT AS (coalesce(alias, path)), images_group INTEGER, glob INTEGER,
    share TEXT, sharing INTEGER DEFAULT 1, copy_of TEXT,
    override TEXT, declared TEXT,
    selected INTEGER DEFAULT 0, -- 2: not asked for, but its pack is written again
    bytes INTEGER, mtime_ns INTEGER, files INTEGER, pending INTEGER DEFAULT 0,
    pack INTEGER
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

    def __init__(
        self,
        spec: DatasetSpec,
        root: Path,
        names: NameKey | None = None,
        overrides: Overrides = Overrides(),  # noqa: B008 - frozen
    ) -> None:
        """Walk through the folder.

        Nothing is left out silently: names that match `exclusions`, and copies, come with `exclude`; a link
        that leads out of `root`, or nowhere, is listed, and reading it fails with a reason. Absent folders
        are tolerated, for who downloads a part ingests a part.

        Args:
            names: makes the ids of a dataset whose names are private.
            overrides: what the user leaves out.

        Raises:
            SetupError: nothing found; a path that the rules cannot describe; two images with one key; a table
                or dataset.json that is missing or malformed.
        """
        self.spec = spec
        self.root = root
        self._database = scratch_database()
        try:
            self._database.executescript(_SCHEMA)
            self._fill(names)
            self._refuse_ambiguous()
            if spec.one_copy:
                self._mark_copies()
            self._count_sharing()
            self._note_overrides(overrides)
        except sqlite3.Error as error:
            raise as_known_error(error) from error

    def __iter__(self) -> Iterator[ImageSource]:
        """All sources, sorted by key (by code point)."""
        yield from self._sources(_ROWS_OF + "ORDER BY key")

    def still_to_do(self) -> Iterator[ImageSource]:
        """Those that are pending, sorted by key."""
        yield from self._sources(_ROWS_OF + "WHERE pending ORDER BY key")

    def select(self, only: re.Pattern[str], limit: int | None = None) -> None:
        """Choose the sources whose key `only` finds, of those at most `limit`, the first by key."""
        self._database.create_function("wanted", 1, lambda key: only.search(key) is not None)
        self._database.execute("UPDATE source SET pending = 0, selected = wanted(key)")
        if limit is not None:
            self._database.execute(
                "UPDATE source SET selected = 0 WHERE selected AND key NOT IN "
                "(SELECT key FROM source WHERE selected ORDER BY key LIMIT ?)",
                (limit,),
            )
        self._look_at_selected()

    def select_paths(self, paths: Collection[str]) -> int:
        """Choose the sources that the catalog knows by these paths; returns how many there are."""
        self._database.execute("DROP TABLE IF EXISTS chosen")
        self._database.execute("CREATE TABLE chosen (name TEXT PRIMARY KEY)")
        self._database.executemany("INSERT OR IGNORE INTO chosen VALUES (?)", ((path,) for path in paths))
        self._database.execute("UPDATE source SET pending = 0, selected = name IN (SELECT name FROM chosen)")
        self._look_at_selected()
        return self.selected

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
        """Per modality the subjects of all sources found that no rule leaves out, with repetitions."""
        modalities = [
            name for (name,) in self._database.execute("SELECT DISTINCT modality FROM kind_modality ORDER BY 1")
        ]
        return {modality: self._subjects_of(modality) for modality in modalities}

    def compare(
        self, journal: Journal, corpus: Corpus, normalisation_version: int, *, lossless: bool = False
    ) -> None:
        """Find out what is pending: selected, and not done by an earlier run, or changed since, or damaged.

        A 2-D image whose override changed brings along what shares its pack, selected or not: so the voxels of
        an excluded image leave the corpus, and one taken back finds its old place.
        """
        entry = self.spec.entry_hash(lossless=lossless)
        self._database.execute("UPDATE source SET selected = 0 WHERE selected = 2")
        with attached(self._database, journal.ledger_file):
            if self._number("SELECT EXISTS (SELECT 1 FROM ledger.done)"):
                self._look_at_stored(corpus)
            self._database.execute(
                """
                UPDATE source SET pending = selected AND NOT EXISTS (
                    SELECT 1 FROM ledger.done JOIN stored USING (path)
                    WHERE done.path = source.name AND whole AND NOT failed
                        AND stamp_bytes = bytes AND stamp_mtime_ns = mtime_ns AND stamp_files = files
                        AND entry_hash = :entry || coalesce(declared, '') AND normalisation_version = :version
                )
                """,
                {"entry": entry, "version": normalisation_version},
            )
            self._database.execute(
                """
                UPDATE source SET pending = 1, selected = 2 WHERE NOT pending
                    AND name IN (SELECT path FROM ledger.done)
                    AND name IN (SELECT path FROM ledger.pack WHERE pack IN (
                        SELECT pack.pack FROM source AS changed
                        JOIN ledger.pack ON pack.path = changed.name
                        JOIN ledger.done ON done.path = changed.name
                        WHERE changed.pending AND entry_hash <> :entry || coalesce(changed.declared, '')
                            AND (changed.declared IS NOT NULL OR entry_hash LIKE :entry || '+%')
                    ))
                """,
                {"entry": entry},
            )

    def note_aliases(self, journal: Journal) -> None:
        """Keep what private names stand for where nobody exports it."""
        if not self._number("SELECT EXISTS (SELECT 1 FROM source WHERE alias IS NOT NULL)"):
            return
        journal.ensure_ledger()
        with attached(self._database, journal.ledger_file):
            self._database.execute(
                "INSERT OR REPLACE INTO ledger.name SELECT alias, path FROM source WHERE alias IS NOT NULL"
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
                SELECT name, (SELECT coalesce(max(pack), -1) + 1 FROM ledger.pack)
                    + (row_number() OVER (ORDER BY name) - 1) / ?
                FROM source JOIN kind ON kind.id = kind
                WHERE flat AND name NOT IN (SELECT path FROM ledger.pack)
                """,
                (pack_size,),
            )
            self._database.execute(
                "UPDATE source SET pack = "
                "(SELECT pack FROM ledger.pack AS known WHERE known.path = source.name) "
                "WHERE pending AND kind IN (SELECT id FROM kind WHERE flat)"
            )

    def groups(self, volumes_at_once: int = 1) -> Iterator[Group]:
        """What is pending, as tasks take it: volumes by key, then packs. Read as it is asked for.

        Args:
            volumes_at_once: so many small volumes make one task, for each task costs the driver some time.
        """
        self._database.execute("DROP INDEX IF EXISTS todo")
        self._database.execute("CREATE INDEX todo ON source (pack, key) WHERE pending")
        rows = self._database.execute(_ROWS_OF + "WHERE pending ORDER BY pack, key")
        for pack, members in groupby(rows, key=lambda row: row[0]):
            if pack is None:
                for lot in _lots(members, volumes_at_once):
                    yield self._group(None, lot)
            else:
                yield self._group(pack, list(members))

    def _fill(self, names: NameKey | None) -> None:
        kind_of = functools.lru_cache(maxsize=1024)(self._kind)
        rows = (
            (
                source.path,
                source.key,
                source.subject,
                kind_of(replace(source, path="", key="", subject="", alias=None, root=Path())),
                source.alias,
                group,
                glob,
                share,
            )
            for group, glob, share, source in stream_sources(self.spec, self.root, names)
        )
        self._database.executemany(
            "INSERT INTO source (path, key, subject, kind, alias, images_group, glob, share) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    def _kind(self, source: ImageSource) -> int:
        text = _KINDS.dump_json(source).decode()
        known = self._database.execute("SELECT id FROM kind WHERE source = ?", (text,)).fetchone()
        if known is not None:
            return int(known[0])
        left_out = source.exclude is not None or source.failure is not None
        number = self._database.execute(
            "INSERT INTO kind (source, format, flat, left_out) VALUES (?, ?, ?, ?)",
            (text, source.format, source.dimension == 2, left_out),
        ).lastrowid
        self._database.executemany(
            "INSERT INTO kind_modality VALUES (?, ?)",
            ((number, name) for name in dict.fromkeys(source.modalities)),
        )
        return int(number or 0)

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
                # Of the globs of a group that match a path the first counts.
                "DELETE FROM source WHERE id NOT IN (SELECT id FROM (SELECT id, row_number() "
                "OVER (PARTITION BY path ORDER BY glob, id) AS place FROM source) WHERE place = 1)"
            )
        # Some unpackers make a folder x.nii with x.nii in it: no image but the one inside. '0' comes after '/'.
        self._database.execute(
            "DELETE FROM source WHERE EXISTS (SELECT 1 FROM source AS inside "
            "WHERE inside.path > source.path || '/' AND inside.path < source.path || '0')"
        )
        self._database.execute("CREATE INDEX by_key ON source (key)")
        same = "SELECT key, min(path), max(path) FROM source GROUP BY key HAVING count(*) > 1 LIMIT 1"
        for key, path, other in self._database.execute(same):
            raise same_key(self.spec, key, path, other)
        if not self.found:
            raise nothing_found(self.spec, self.root)

    def _mark_copies(self) -> None:
        """Leave out every file with the bytes of an earlier one: by group, then glob, then path."""
        sizes = (
            (self._size(path), number) for path, number in self._database.execute("SELECT path, id FROM source")
        )
        self._database.execute("CREATE TABLE size (bytes INTEGER, file INTEGER)")
        self._database.executemany("INSERT INTO size VALUES (?, ?)", sizes)
        alike = (
            "SELECT path, name, source.id FROM source JOIN size ON file = source.id "
            "JOIN kind ON kind.id = source.kind "
            "WHERE NOT left_out AND size.bytes = ? ORDER BY images_group, glob, path"
        )
        for (size,) in self._database.execute(
            "SELECT bytes FROM size WHERE bytes >= 0 GROUP BY bytes HAVING count(*) > 1 ORDER BY bytes"
        ).fetchall():
            first: dict[str, str] = {}
            for path, name, number in self._database.execute(alike, (size,)).fetchall():
                with suppress(OSError), (self.root / path).open("rb") as stream:  # reading it will tell why
                    original = first.setdefault(hashlib.file_digest(stream, "sha256").hexdigest(), name)
                    if original != name:
                        self._database.execute("UPDATE source SET copy_of = ? WHERE id = ?", (original, number))

    def _size(self, path: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except OSError:
            return -1

    def _count_sharing(self) -> None:
        """How many files share the weight of each; copies have none."""
        self._database.execute("CREATE INDEX by_share ON source (share) WHERE share IS NOT NULL")
        self._database.execute(
            "UPDATE source SET sharing = (SELECT count(*) FROM source AS other "
            "WHERE other.share = source.share AND other.copy_of IS NULL) "
            "WHERE share IS NOT NULL AND copy_of IS NULL"
        )

    def _note_overrides(self, overrides: Overrides) -> None:
        """Write down what the user says of each source; tells of entries that speak of none."""
        if not overrides:
            return
        if overrides.has_globs:
            keys = (key for (key,) in self._database.execute("SELECT key FROM source"))
        else:
            there = (
                (key, self._number("SELECT count(*) FROM source WHERE key = ?", key)) for key in overrides.keys
            )
            keys = (key for key, number in there if number)
        verdicts = {key: text for key in keys if (text := as_text(overrides.of(key))) is not None}
        self._database.executemany(
            "UPDATE source SET override = ?, declared = ? WHERE key = ?",
            ((text, declared_hash("", text), key) for key, text in verdicts.items()),
        )
        for idle in overrides.idle(verdicts):
            _log.warning(
                "overrides.yaml: %s has no image %s; the entry does nothing.", self.spec.id, idle.named
            )

    def _look_at_selected(self) -> None:
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
        from catalog.query import read_batches, remedy_of
        from shards.check import arrays_there

        self._database.execute("DELETE FROM stored")
        file = corpus.catalog_file(self.spec.id)
        if not file.exists():
            return
        stored = functools.lru_cache(maxsize=1024)(arrays_there(corpus.shards, self.spec.id))
        for table in read_batches(file, remedy_of(self.spec.id), ["source_path", "shard_path"]):
            paths, shards = table["source_path"].to_pylist(), table["shard_path"].to_pylist()
            self._database.executemany(
                "INSERT INTO stored VALUES (?, ?) ON CONFLICT DO UPDATE SET whole = min(whole, excluded.whole)",
                ((path, shard is None or stored(shard)) for path, shard in zip(paths, shards, strict=True)),
            )

    def _group(self, pack: int | None, rows: list[_Row]) -> Group:
        numbers = sorted({row[4] for row in rows})
        kinds = tuple(map(self._source_of_kind, numbers))
        places = (Place(*row[1:-1])._replace(kind=numbers.index(row[4])) for row in rows)
        return Group(pack, kinds, tuple(places))

    def _sources(self, query: str) -> Iterator[ImageSource]:
        for row in self._database.execute(query):
            place = Place(*row[1:-1])
            yield place.source(self._source_of_kind(place.kind), self.root)

    def _source_of_kind(self, number: int) -> ImageSource:
        (text,) = self._database.execute("SELECT source FROM kind WHERE id = ?", (number,)).fetchone()
        return _parsed(text)

    def _subjects_of(self, modality: str) -> Iterator[str]:
        members = (
            "SELECT subject FROM source WHERE copy_of IS NULL AND kind IN "
            "(SELECT kind FROM kind_modality JOIN kind ON kind.id = kind WHERE modality = ? AND NOT left_out)"
        )
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


def find_sources(spec: DatasetSpec, root: Path, names: NameKey | None = None) -> list[ImageSource]:
    """All images of a dataset, sorted by key, as `FoundSources` finds them; for who can hold them in memory."""
    return list(FoundSources(spec, root, names))
