"""The datasets of a corpus, one id a line, beside their catalogs: for readers who cannot list a folder.

A web server tells nobody what it has. `catalog/datasets.txt` names the datasets, each dataset's manifest its
files. Several ingests may write the index of a store at the same time, each after it has published its dataset.
So whoever writes looks again whether that is still what is there: the last to write sees all that came before.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from catalog.corpus import INDEX_NAME, Corpus
from catalog.durable import remove_unfinished, replacing
from catalog.errors import SetupError
from catalog.store import Location, RemotePath


def write_index(place: Location) -> None:
    """Let the index of a corpus name the datasets that are there. Nothing is written if it does so already."""
    with _alone(place):
        written = _content(place)
        while (wanted := "".join(f"{dataset}\n" for dataset in _datasets(place)).encode()) != written:
            if isinstance(place, RemotePath):
                (place / INDEX_NAME).write(wanted)
            else:
                (place / INDEX_NAME).parent.mkdir(parents=True, exist_ok=True)
                remove_unfinished(place / INDEX_NAME)
                with replacing(place / INDEX_NAME) as temporary:
                    temporary.write_bytes(wanted)
            written = wanted


def read_index(place: Location) -> list[str]:
    """Ids of the datasets; SetupError if the corpus has no index."""
    content = _content(place)
    if content is None:
        raise SetupError(
            f"there is no corpus at {place}, or its {INDEX_NAME} is missing, without which it cannot be read "
            "from a web server. Ingest and `verify --repair` write that file."
        )
    return content.decode(errors="replace").split()


def is_listed(place: Location, dataset: str) -> bool:
    """Whether the index names a dataset, to the last bit; True where there is none, as earlier versions had."""
    content = _content(place)
    return content is None or dataset.encode() in content.split(b"\n")[:-1]


@contextmanager
def _alone(place: Location) -> Iterator[None]:
    """One writer at a time, in a folder: so that it may remove what a killed one has left."""
    if isinstance(place, RemotePath):
        yield
        return
    private = Corpus(place).private
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (private / "index.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _content(place: Location) -> bytes | None:
    try:
        return (place / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        return None


def _datasets(place: Location) -> list[str]:
    if isinstance(place, Path):
        return Corpus(place).datasets()
    folders = (path for path in (place / "catalog").iterdir() if path.name.startswith("dataset="))
    return sorted(path.name.removeprefix("dataset=") for path in folders if (path / "images.parquet").is_file())
