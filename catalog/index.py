"""The datasets of a corpus, one id a line, beside their catalogs: for readers who cannot list a folder.

A web server tells nobody what it has. `catalog/datasets.txt` names the datasets, each dataset's manifest its
files. Several ingests may write the index at the same time, each after it has published its dataset. So whoever
writes looks again whether that is still what is there: the last one to write sees all that came before.
"""

from __future__ import annotations

from pathlib import Path

from catalog.corpus import INDEX_NAME, Corpus
from catalog.durable import replacing
from catalog.errors import SetupError
from catalog.store import Location, RemotePath


def write_index(place: Location) -> None:
    """Let the index of a corpus name the datasets that are there. Nothing is written if it does so already."""
    written = _read(place)
    while (found := _datasets(place)) != written:
        content = "".join(f"{dataset}\n" for dataset in found).encode()
        if isinstance(place, RemotePath):
            (place / INDEX_NAME).write(content)
        else:
            (place / INDEX_NAME).parent.mkdir(parents=True, exist_ok=True)
            with replacing(place / INDEX_NAME) as temporary:
                temporary.write_bytes(content)
        written = found


def read_index(place: Location) -> list[str]:
    """Ids of the datasets; SetupError if the corpus has no index."""
    found = _read(place)
    if found is None:
        raise SetupError(
            f"there is no corpus at {place}, or its {INDEX_NAME} is missing, without which it cannot be read "
            "from a web server. Ingest and `verify --repair` write that file."
        )
    return found


def _read(place: Location) -> list[str] | None:
    try:
        return (place / INDEX_NAME).read_bytes().decode().split()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _datasets(place: Location) -> list[str]:
    if isinstance(place, Path):
        return Corpus(place).datasets()
    folders = (path for path in (place / "catalog").iterdir() if path.name.startswith("dataset="))
    return sorted(path.name.removeprefix("dataset=") for path in folders if (path / "images.parquet").is_file())
