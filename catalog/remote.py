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
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from catalog.corpus import Corpus
from catalog.durable import replacing
from catalog.errors import SetupError
from catalog.index import read_index
from catalog.store import Location, RemotePath, StoreError

MIRRORED = ("catalog", "splits", "mixes")
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
    identity = hashlib.sha256(f"{place.provider.endpoint or ''}\0{place}".encode()).hexdigest()[:12]
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

    A web server, which lists nothing, has those that the index of the corpus and the manifests name.

    Args:
        wanted: told each name relative to the corpus.

    Raises StoreError as the store does; also if a writer replaces files all the time. SetupError if a corpus on
    a web server has no index.
    """
    told: dict[str, str] = {}
    for _ in range(_ROUNDS):
        before, told = told, {name: state for name, state in _told(origin) if wanted(name)}
        etags = _etags(folder)
        changed = [name for name, state in told.items() if etags.get(name) != state]
        if origin.is_web and told == before:
            return  # what is still not as its manifest tells is damaged, or has been replaced without it
        gone = etags.keys() - told.keys()
        try:
            for name in changed:
                _inside(folder, name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    with replacing(_inside(folder, name)) as temporary:
                        (origin / name).download(temporary)
                except FileNotFoundError:
                    gone.add(name)  # the next listing knows
                    etags.setdefault(name, "")
                    continue
                etags[name] = _digest(_inside(folder, name)) if origin.is_web else told[name]
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


def _told(origin: RemotePath) -> Iterator[tuple[str, str]]:
    """Names of the files that are to be copied, and what tells each from earlier ones: etag, or sha256."""
    if not origin.is_web:
        for part in MIRRORED:
            for item in (origin / part).walk():
                yield f"{part}/{item.name}", item.etag
        return
    from catalog.manifest import named_digests

    there, datasets = Corpus(Path()), read_index(origin)
    manifests = [there.manifest_file(dataset) for dataset in datasets]
    following = [there.next_manifest_file(dataset) for dataset in datasets]
    for file in (there.index_file, there.duplicates_file, *manifests, *following):
        with suppress(FileNotFoundError):
            content = (origin / file.as_posix()).read_bytes()
            yield file.as_posix(), hashlib.sha256(content).hexdigest()
            if file not in (there.index_file, there.duplicates_file):
                yield from named_digests(content).items()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
