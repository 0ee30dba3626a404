"""A corpus in an object store: catalog and splits are copied to this machine, shards stay where they are.

So all that reads a catalog reads files, and only who reads voxels knows of the store. A file is copied again
when its etag has changed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from catalog.corpus import Corpus
from catalog.durable import replacing
from catalog.errors import SetupError
from catalog.store import Location, RemotePath, StoreError, endpoint

MIRRORED = ("catalog", "splits")
"""Folders of a corpus that are copied."""

_LEFT_THERE = ("/previews.parquet", "/features.parquet")
_ETAGS_FILE = ".etags.json"
_ROUNDS = 5
"""So often a copy is begun anew because a writer was faster."""


def open_corpus(place: Location) -> Corpus:
    """The corpus in a folder or an object store, to read from.

    Previews and features are not copied: who wants them reads them where they lie. Copies lie below
    `$XDG_CACHE_HOME`, in a folder for each URL, and may be deleted at any time.

    Raises StoreError if the store does not answer or denies access, SetupError if the copies have no place.
    """
    if isinstance(place, Path):
        return Corpus(place)
    folder = local_folder(place, "XDG_CACHE_HOME", "~/.cache")
    with _alone(folder):
        update_copy(place, folder, lambda name: not name.endswith(_LEFT_THERE))
    return Corpus(folder, origin=place)


@contextmanager
def whole_copy(place: Location) -> Iterator[Corpus]:
    """As `open_corpus`, of all files but the shards, as they are now: for who wants to prove every byte."""
    if isinstance(place, Path):
        yield Corpus(place)
        return
    with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
        update_copy(place, Path(folder), lambda name: True)
        yield Corpus(Path(folder), origin=place)


@contextmanager
def features_copy(place: Location) -> Iterator[Corpus]:
    """As `open_corpus`, with all features at hand; what is recorded of duplicates goes back to the store."""
    if isinstance(place, Path):
        yield Corpus(place)
        return
    with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
        update_copy(place, Path(folder), lambda name: not name.endswith("/previews.parquet"))
        corpus = Corpus(Path(folder), origin=place)
        recorded = (corpus.duplicates_file, corpus.duplicates_digest_file)
        before = [file.stat().st_mtime_ns if file.is_file() else None for file in recorded]
        yield corpus
        after = [file.stat().st_mtime_ns if file.is_file() else None for file in recorded]
        if after != before:
            (place / corpus.name_of(recorded[1])).unlink()
            for file in recorded:
                (place / corpus.name_of(file)).write(file)


def local_folder(place: RemotePath, variable: str, default: str) -> Path:
    """This machine's folder for a URL, below that of an XDG variable."""
    base = Path(os.environ.get(variable) or default).expanduser() / "pumit-data"
    # One bucket name at two endpoints is two buckets.
    identity = hashlib.sha256(f"{endpoint() or ''}\0{place}".encode()).hexdigest()[:12]
    folder = base / f"{quote(place.bucket, safe='')}-{identity}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SetupError(
            f"{place}: its catalog is copied to {folder}, which cannot be made: {error.strerror}. "
            f"Name another place: {variable}=FOLDER."
        ) from error
    return folder


def update_copy(origin: RemotePath, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Make the files below `folder` those of the store: MIRRORED, and of these the `wanted`.

    Args:
        wanted: told each name relative to the corpus.

    Raises StoreError as the store does; also if a writer replaces files all the time.
    """
    for _ in range(_ROUNDS):
        told = {
            f"{part}/{item.name}": item
            for part in MIRRORED
            for item in (origin / part).walk()
            if wanted(f"{part}/{item.name}")
        }
        etags = _etags(folder)
        changed = [name for name, item in told.items() if etags.get(name) != item.etag]
        gone = etags.keys() - told.keys()
        try:
            for name in changed:
                _inside(folder, name).parent.mkdir(parents=True, exist_ok=True)
                with replacing(_inside(folder, name)) as temporary:
                    (origin / name).download(temporary)
                etags[name] = told[name].etag
        except FileNotFoundError:
            continue  # the next listing knows
        except StoreError as error:
            if error.errno != errno.ESTALE:
                raise
            continue
        finally:
            for name in gone:
                _inside(folder, name).unlink(missing_ok=True)
                del etags[name]
            with replacing(folder / _ETAGS_FILE) as temporary:
                temporary.write_text(json.dumps(etags), encoding="utf-8")
        if not changed:
            return
    raise StoreError(
        errno.ESTALE,
        "its catalog is being replaced faster than it can be copied; repeat the command",
        str(origin),
    )


def _inside(folder: Path, name: str) -> Path:
    """The file for an object; a name of the store must not lead out of the folder."""
    if {"", ".", ".."} & set(name.split("/")):
        raise SetupError(f"{name!r} is no name of a corpus's object. Delete it from the store.")
    return folder / name


def _etags(folder: Path) -> dict[str, str]:
    """Of the files that were copied and are still there."""
    try:
        told = json.loads((folder / _ETAGS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {name: etag for name, etag in told.items() if _inside(folder, name).is_file()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, as the ranks of a training start together."""
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
