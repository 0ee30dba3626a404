"""Which images show the same, as `pumit-data duplicates` found it: groups, of which one member is kept."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.manifest import read_manifest
from catalog.query import read_table
from catalog.schema import SCHEMA_VERSION

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False, metadata={"description": "number of the group, from 0"}),
        pa.field("dataset", pa.string(), nullable=False, metadata={"description": "id of the dataset"}),
        pa.field(
            "key", pa.string(), nullable=False, metadata={"description": "key of the image in the catalog"}
        ),
        pa.field("kind", pa.string(), nullable=False, metadata={"description": "exact | near"}),
        pa.field("kept", pa.bool_(), nullable=False, metadata={"description": "the one member that trains"}),
    ],
    metadata={"pumit_schema_version": str(SCHEMA_VERSION)},
)
"""One row per image that has a duplicate, sorted by group, dataset and key."""

_REMEDY = "Type `pumit-data duplicates`, which writes it anew."


def load_groups(corpus: Corpus) -> pa.Table | None:
    """The rows of DUPLICATES_SCHEMA; None where nobody has looked for duplicates.

    Raises SetupError if the file is damaged or of a later version.
    """
    path = corpus.duplicates_file
    return read_table(path, _REMEDY) if path.is_file() else None


def superfluous(groups: pa.Table) -> pa.Table:
    """Dataset and key of the members that another of their group stands for."""
    return groups.filter(pc.invert(groups["kept"])).select(["dataset", "key"])


_STATE = b"pumit_catalogs"


def state_of(corpus: Corpus) -> dict[bytes, bytes]:
    """Metadata of the file of duplicates: which catalogs were looked at, by the sha256 in their manifests.

    To be taken before the catalogs are read. Raises SetupError if a manifest is damaged.
    """
    return {_STATE: json.dumps(_catalogs(corpus), sort_keys=True).encode()}


def changed_since(corpus: Corpus, groups: pa.Table) -> list[str]:
    """Datasets whose catalogs are not those in which `groups` were found, sorted.

    An empty list also where the file does not say which they were. Raises SetupError if a manifest is damaged.
    """
    state = (groups.schema.metadata or {}).get(_STATE)
    if state is None:
        return []
    then, now = json.loads(state), _catalogs(corpus)
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _catalogs(corpus: Corpus) -> dict[str, str | None]:
    return {
        dataset: read_manifest(corpus.manifest_file(dataset)).get(corpus.name_of(corpus.catalog_file(dataset)))
        for dataset in corpus.datasets()
    }
