"""Which subjects stay out of training: drawn once per dataset and modality, then frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import pyarrow as pa

from catalog.corpus import Corpus
from catalog.manifest import NewFile, publish, refuse_damaged
from catalog.query import read_table
from catalog.schema import SCHEMA_VERSION

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


def hold_out(corpus: Corpus, dataset: str, subjects: Mapping[str, Collection[str]]) -> frozenset[str]:
    """Return the subjects of a dataset whose images, of every modality, are for validation.

    `subjects` maps each modality to its *discovered* subjects. Per modality the one of minimal keyed hash is
    held out, or the next that leaves every modality a subject to train on; a modality without such a subject
    has none. `splits/<dataset>.parquet` records the choice and every subject seen. What it says stays: a
    modality that comes later (or had no choice before) chooses only among subjects never discovered before,
    because a model may already have been trained on the others. If it shows nobody but subjects held out
    before, it has nothing to train on.

    Raises SetupError if the recorded split is damaged. Only one process may do this for a dataset at a time.
    """
    hash_of = {subject: _subject_hash(dataset, subject) for members in subjects.values() for subject in members}
    groups = {modality: {hash_of[subject] for subject in members} for modality, members in subjects.items()}
    recorded = _recorded(corpus, dataset)
    refuse_damaged(corpus, dataset, corpus.split_file(dataset), _REMEDY)
    held_out = {subject: set(modalities) for subject, modalities in recorded.items() if modalities}
    decided = set().union(*held_out.values())
    for modality in sorted(groups.keys() - decided):
        for candidate in sorted(groups[modality] - recorded.keys()):
            taken = held_out.keys() | {candidate}
            if all(group - taken for group in groups.values() if candidate in group):
                held_out.setdefault(candidate, set()).add(modality)
                break
    known = recorded.keys() | set(hash_of.values())
    split = {subject: sorted(held_out.get(subject, ())) for subject in sorted(known)}
    if split != recorded:
        columns = [list(split.keys()), list(split.values())]
        publish(corpus, dataset, [split_file(corpus, dataset, pa.table(columns, schema=SPLIT_SCHEMA))])
    return frozenset(subject for subject, hashed in hash_of.items() if hashed in held_out)


def split_file(corpus: Corpus, dataset: str, split: pa.Table) -> NewFile:
    """How a dataset's split is written."""
    return NewFile(corpus.split_file(dataset), split, {"compression": "zstd"})


def split_fingerprint(corpus: Corpus, datasets: Collection[str] | None = None) -> str:
    """sha256 of who is held out, in `datasets` or in all that have a split.

    Subjects that come later without being held out do not change it. Raises SetupError if a recorded split
    is damaged.
    """
    if datasets is None:
        datasets = [path.stem for path in corpus.split_file("*").parent.glob("[!.]*.parquet")]
    digest = hashlib.sha256()
    for dataset in sorted(set(datasets)):
        for subject, modalities in _recorded(corpus, dataset).items():
            if modalities:
                digest.update(f"{dataset}\0{subject}\n".encode())
    return digest.hexdigest()


def _subject_hash(dataset: str, subject: str) -> str:
    # Folder names that are no valid UTF-8 reach Python as lone surrogates.
    text = f"{dataset}\0{subject}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, key=_PUBLIC_KEY, digest_size=16).hexdigest()


def _recorded(corpus: Corpus, dataset: str) -> dict[str, list[str]]:
    path = corpus.split_file(dataset)
    if not path.is_file():
        return {}
    table = read_table(path, _REMEDY)
    return dict(zip(table["subject_hash"].to_pylist(), table["held_out_for"].to_pylist(), strict=True))
