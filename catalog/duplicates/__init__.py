"""Which images show the same, as `pumit-data duplicates` found it: groups, of which one member is kept."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.duplicates.pictures import FEATURES_VERSION
from catalog.durable import replacing
from catalog.errors import SetupError
from catalog.manifest import digest_of, read_manifest
from catalog.query import load_dataset, read_batches, read_table, remedy_of, row_count
from catalog.schema import DUPLICATES_SCHEMA
from catalog.write import write_table

__all__ = [
    "DUPLICATES_SCHEMA",
    "REMEDY",
    "changed_since",
    "load_groups",
    "missing_features",
    "recorded_digest",
    "state_of",
    "superfluous",
    "write_groups",
]

REMEDY = "Type `pumit-data duplicates`, which writes it anew."


def load_groups(corpus: Corpus) -> pa.Table | None:
    """The rows of DUPLICATES_SCHEMA; None where nobody has looked for duplicates.

    Raises SetupError if the file is damaged or of a later version.
    """
    path = corpus.duplicates_file
    if not path.is_file():
        return None
    table = read_table(path, REMEDY)
    if recorded_digest(corpus) not in (None, digest_of(path)):
        raise SetupError(f"{path} is damaged: it does not have the sha256 recorded beside it. {REMEDY}")
    return table


def superfluous(groups: pa.Table) -> pa.Table:
    """Dataset and key of the members that another of their group stands for."""
    return groups.filter(pc.invert(groups["kept"])).select(["dataset", "key"])


_STATE = b"pumit_features"


def state_of(corpus: Corpus) -> dict[bytes, bytes]:
    """Metadata of the file of duplicates: what was looked at, so that later images are not taken for compared.

    To be taken before the images are read. Raises SetupError if a manifest or a catalog is damaged.
    """
    return {_STATE: json.dumps(_looked_at(corpus), sort_keys=True).encode()}


def changed_since(corpus: Corpus, groups: pa.Table) -> list[str]:
    """Datasets whose images are not those among which `groups` were found, sorted.

    An empty list also where the file does not say which they were. Raises SetupError if a manifest is damaged.
    """
    state = (groups.schema.metadata or {}).get(_STATE)
    if state is None:
        return []
    then, now = json.loads(state), _looked_at(corpus)
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _looked_at(corpus: Corpus) -> dict[str, list[str | int | None]]:
    """By dataset: the sha256 of its features, which a repack or a new weight leaves alone, and its rows."""
    return {
        dataset: [
            read_manifest(corpus.manifest_file(dataset)).get(corpus.name_of(corpus.features_file(dataset))),
            row_count(corpus, dataset),
        ]
        for dataset in corpus.datasets()
    }


def write_groups(corpus: Corpus, groups: pa.Table, state: dict[bytes, bytes]) -> None:
    """Replace the file of duplicates and the checksum beside it; `groups` of DUPLICATES_SCHEMA.

    `state` is what `state_of` said before the images were read. Killed in between it leaves a file without a
    checksum, which `verify` tells of.
    """
    digest_file = corpus.duplicates_digest_file
    digest_file.unlink(missing_ok=True)
    schema = DUPLICATES_SCHEMA.with_metadata(DUPLICATES_SCHEMA.metadata | state)
    write_table(corpus.duplicates_file, groups.cast(schema), compression="zstd")
    line = f"{digest_of(corpus.duplicates_file)}  {corpus.name_of(corpus.duplicates_file)}\n"
    with replacing(digest_file) as temporary:
        temporary.write_text(line, encoding="utf-8")


def recorded_digest(corpus: Corpus) -> str | None:
    """The sha256 that the file of duplicates should have; None if nothing tells it."""
    try:
        text = corpus.duplicates_digest_file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    digest, _, name = text.rstrip("\n").partition("  ")
    return digest if name == corpus.name_of(corpus.duplicates_file) else "unreadable"


def missing_features(corpus: Corpus, dataset: str) -> int:
    """Number of ingested images whose features are not there, or of another version."""
    ingested = load_dataset(corpus, dataset, ["key"], [pc.field("status") == "ingested"]).num_rows
    file = corpus.features_file(dataset)
    versions = read_batches(file, remedy_of(dataset), ["features_version"]) if file.is_file() else ()
    there = (pc.sum(pc.equal(part["features_version"], FEATURES_VERSION)).as_py() or 0 for part in versions)
    return int(ingested - sum(there))
