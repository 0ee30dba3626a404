"""Which subjects stay out of training: drawn once per dataset and modality, then frozen."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing

import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.manifest import NewFile, publish, refuse_damaged
from catalog.query import read_batches
from catalog.schema import SCHEMA_VERSION
from catalog.scratch import scratch_database

_BATCH_ROWS = 1 << 14

_PUBLIC_KEY = b"PUMIT-data validation split, version 1"
"""Not a secret: it makes the draw independent of any other use of the same hash."""

_REMEDY = (
    "Restore it from a copy, or type `pumit-data verify --repair`. To delete it draws a new split, which may "
    "hold out subjects that earlier models were trained on."
)

SPLIT_SCHEMA = pa.schema(
    [
        pa.field(
            "subject_hash",
            pa.string(),
            nullable=False,
            metadata={"description": "keyed hash of dataset and subject"},
        ),
        pa.field(
            "held_out_for",
            pa.list_(pa.string()),
            nullable=False,
            metadata={"description": "modalities this subject validates; empty: it may be trained on"},
        ),
    ],
    metadata={"pumit_schema_version": str(SCHEMA_VERSION)},
)
"""One row per subject ever discovered, sorted by hash."""


def hold_out(corpus: Corpus, dataset: str, subjects: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """Return the subjects of a dataset whose images, of every modality, are for validation.

    `subjects` maps each modality to its *discovered* subjects, in any order and as often as they come; memory
    does not grow with them. Per modality the one of minimal keyed hash is held out, or the next that leaves
    every modality a subject to train on; a modality without such a subject has none.
    `splits/<dataset>.parquet` records the choice and every subject seen. What it says stays: a
    modality that comes later (or had no choice before) chooses only among subjects never discovered before,
    because a model may already have been trained on the others. If it shows nobody but subjects held out
    before, it has nothing to train on.

    Raises SetupError if the recorded split is damaged. Only one process may do this for a dataset at a time.
    """
    refuse_damaged(corpus, dataset, corpus.split_file(dataset), _REMEDY)
    with closing(_gathered(corpus, dataset, subjects)) as database:
        held_out = {
            hashed: set(modalities.split("\0"))
            for hashed, modalities in database.execute("SELECT hash, held FROM recorded WHERE held IS NOT NULL")
        }
        drawn = {modality for modalities in held_out.values() for modality in modalities}
        for modality in sorted(subjects.keys() - drawn):
            candidate = _candidate(database, modality, held_out.keys())
            if candidate is not None:
                held_out.setdefault(candidate, set()).add(modality)
        _write(corpus, dataset, database, held_out)
        found = {
            subject
            for hashed in held_out
            for (subject,) in database.execute("SELECT subject FROM member WHERE hash = ?", (hashed,))
        }
    return frozenset(subject.decode(errors="surrogatepass") for subject in found)


def _gathered(corpus: Corpus, dataset: str, subjects: Mapping[str, Iterable[str]]) -> sqlite3.Connection:
    """Tables of who is recorded, with the modalities they validate or null, and of who is there."""
    database = scratch_database()
    database.execute("CREATE TABLE recorded (hash TEXT PRIMARY KEY, held TEXT) WITHOUT ROWID")
    database.execute(
        "CREATE TABLE member (modality TEXT, hash TEXT, subject BLOB, PRIMARY KEY (modality, hash)) "
        "WITHOUT ROWID"
    )
    database.execute("BEGIN")
    for table in _recorded(corpus, dataset):
        held = ("\0".join(modalities) or None for modalities in table["held_out_for"].to_pylist())
        rows = zip(table["subject_hash"].to_pylist(), held, strict=True)
        database.executemany("INSERT INTO recorded VALUES (?, ?)", rows)
    for modality, members in subjects.items():
        # Folder names that are no valid UTF-8 reach Python as lone surrogates.
        encoded = (
            (modality, _subject_hash(dataset, subject), subject.encode(errors="surrogatepass"))
            for subject in members
        )
        database.executemany("INSERT OR IGNORE INTO member VALUES (?, ?, ?)", encoded)
    database.execute("CREATE INDEX of_subject ON member (hash)")
    return database


def _candidate(database: sqlite3.Connection, modality: str, held_out: Collection[str]) -> str | None:
    """The first subject by hash, never seen before, that leaves all its modalities one to train on."""
    unseen = database.execute(
        "SELECT hash FROM member WHERE modality = ? AND hash NOT IN (SELECT hash FROM recorded) ORDER BY hash",
        (modality,),
    )
    for (candidate,) in unseen:
        taken = [*held_out, candidate]
        remaining = database.execute(
            "SELECT EXISTS (SELECT 1 FROM member AS other WHERE other.modality = own.modality "
            "AND other.hash NOT IN (SELECT value FROM json_each(?))) FROM member AS own WHERE own.hash = ?",
            (json.dumps(taken), candidate),
        )
        if all(exists for (exists,) in remaining):
            return str(candidate)
    return None


def _write(
    corpus: Corpus, dataset: str, database: sqlite3.Connection, held_out: Mapping[str, Collection[str]]
) -> None:
    """Record the split, unless it says so already."""
    new = "SELECT 1 FROM member WHERE hash NOT IN (SELECT hash FROM recorded) LIMIT 1"
    if database.execute(new).fetchone() is None:  # who is held out now was unseen before
        return
    known = database.execute("SELECT hash FROM recorded UNION SELECT hash FROM member ORDER BY 1")

    def tables() -> Iterator[pa.Table]:
        while hashes := [hashed for (hashed,) in known.fetchmany(_BATCH_ROWS)]:
            modalities = [sorted(held_out.get(hashed, ())) for hashed in hashes]
            yield pa.table([hashes, modalities], schema=SPLIT_SCHEMA)

    publish(corpus, dataset, [split_file(corpus, dataset, tables())])


def split_file(corpus: Corpus, dataset: str, split: Iterable[pa.Table]) -> NewFile:
    """How a dataset's split is written; `split` sorted by hash, in any pieces."""
    return NewFile(corpus.split_file(dataset), split, SPLIT_SCHEMA)


def split_fingerprint(corpus: Corpus, datasets: Collection[str] | None = None) -> str:
    """sha256 of who is held out, in `datasets` or in all that have a split.

    Subjects that come later without being held out do not change it. Raises SetupError if a recorded split
    is damaged.
    """
    if datasets is None:
        datasets = [path.stem for path in corpus.split_file("*").parent.glob("[!.]*.parquet")]
    return split_fingerprints(corpus, datasets)[0]


def split_fingerprints(corpus: Corpus, datasets: Collection[str]) -> tuple[str, dict[str, str]]:
    """`split_fingerprint` of datasets together and of each by id, reading each split once."""
    together, single = hashlib.sha256(), {}
    for dataset in sorted(set(datasets)):
        alone = hashlib.sha256()
        for table in _recorded(corpus, dataset):
            held_out = table.filter(pc.greater(pc.list_value_length(table["held_out_for"]), 0))
            for subject in held_out["subject_hash"].to_pylist():
                for digest in (together, alone):
                    digest.update(f"{dataset}\0{subject}\n".encode())
        single[dataset] = alone.hexdigest()
    return together.hexdigest(), single


def _subject_hash(dataset: str, subject: str) -> str:
    # Folder names that are no valid UTF-8 reach Python as lone surrogates.
    text = f"{dataset}\0{subject}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, key=_PUBLIC_KEY, digest_size=16).hexdigest()


def _recorded(corpus: Corpus, dataset: str) -> Iterator[pa.Table]:
    """The rows of SPLIT_SCHEMA; none where nothing is recorded."""
    path = corpus.split_file(dataset)
    if path.is_file():
        yield from read_batches(path, _REMEDY)
