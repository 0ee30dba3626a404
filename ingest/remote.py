"""Ingest into an object store: the dataset's catalog is made on this machine, shards go where they belong.

The working copy lies below `$XDG_STATE_HOME`: a corpus without shards, with the journal. Workers send arrays
to the store as they finish them. At the end of a run, whatever ended it, the files of the catalog follow, in
the order that readers need, and a copy of the journal, so that another machine can go on.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from catalog.corpus import Corpus
from catalog.durable import replacing
from catalog.errors import SetupError
from catalog.index import write_index
from catalog.manifest import digest_of, read_manifest, seal
from catalog.remote import local_folder
from catalog.scratch import NameSet
from catalog.store import Location, RemotePath, StoreError
from ingest.journal import Journal
from ingest.lease import Lease, lease
from ingest.ledger import copy_without_names
from ingest.names import copy_key, fingerprint_file, write_fingerprint
from shards.layout import METADATA_FILE, dataset_folder


@contextmanager
def working_copy(
    place: Location, datasets: Collection[str], *, write: bool, whole: bool = False
) -> Iterator[Corpus]:
    """The corpus that an ingest of some datasets works on; of one in a folder, that itself.

    Args:
        write: hold the leases of the datasets, and publish what has been done when the block ends. Otherwise
            the copy is one to look at.
        whole: publish all files of the datasets, also those that should be there as they are: a repair.

    Raises SetupError if another process writes one of the datasets, or the place cannot be written, StoreError
    as the store does.
    """
    if isinstance(place, Path):
        yield Corpus(place)
        return
    if place.is_web:
        raise SetupError(
            f"{place}: a corpus on a web server is only read from. Ingest into a folder or a store that the "
            "server publishes."
        )
    if not write:
        with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
            corpus = Corpus(Path(folder), origin=place)
            copy_key(kept_copy(place), corpus)
            _fetch_file(corpus, place, fingerprint_file(corpus))
            for dataset in datasets:
                _fetch(corpus, place, dataset)
            yield corpus
        return
    corpus = kept_copy(place)
    _fetch_file(corpus, place, fingerprint_file(corpus))
    with ExitStack() as stack:
        for dataset in sorted(set(datasets)):
            held = stack.enter_context(lease(place, dataset, corpus.private / "leases"))
            stack.enter_context(_published(corpus, place, dataset, held, whole))
        yield corpus


def kept_copy(place: Location) -> Corpus:
    """This machine's working copy between runs, with their logs; of a corpus in a folder, that itself."""
    if isinstance(place, Path):
        return Corpus(place)
    return Corpus(local_folder(place, "XDG_STATE_HOME", "~/.local/state"), origin=place)


@contextmanager
def _published(corpus: Corpus, place: RemotePath, dataset: str, held: Lease, whole: bool) -> Iterator[None]:
    """Begin with what the store has, and bring it there in the end."""
    there, here = _manifest_bytes(place, corpus, dataset), _bytes(corpus.manifest_file(dataset))
    if here is None or there not in (_base(corpus, dataset), here):
        _discard(corpus, dataset)  # another machine went on
        if there is None and (place / corpus.name_of(corpus.next_manifest_file(dataset))).is_file():
            _fetch_split(corpus, place, dataset)
        else:
            _fetch(corpus, place, dataset)
        _remember(corpus, dataset, there)
    try:
        yield
    except StoreError:
        raise  # it has been asked often enough
    except BaseException:
        _publish(corpus, place, dataset, held, whole)
        raise
    _publish(corpus, place, dataset, held, whole)


def _publish(corpus: Corpus, place: RemotePath, dataset: str, held: Lease, whole: bool) -> None:
    """Replace the dataset's files in the store by those of this machine, each by one PUT.

    Killed anywhere and called again, it ends the same; see `catalog.manifest` for what readers make of it
    meanwhile.
    """
    manifest, following = corpus.manifest_file(dataset), corpus.next_manifest_file(dataset)
    catalog = corpus.catalog_file(dataset)
    if not manifest.is_file() or following.is_file():
        return  # nothing yet, or a merge that the next run has to end
    digests = read_manifest(manifest)
    unfinished = place / corpus.name_of(following)
    there = _manifest_bytes(place, corpus, dataset)
    if there not in (_base(corpus, dataset), _bytes(manifest)):
        raise SetupError(
            f"{dataset}: another ingest has published it in {place} meanwhile, which nothing may overwrite. "
            "Repeat the command: it begins with what is there now."
        )
    everything = whole or unfinished.is_file()  # left by a run that was killed: any file may be its
    if there != _bytes(manifest) or everything:
        known = {} if everything else read_manifest(_base_file(corpus, dataset))
        beside = (corpus.split_file(dataset), corpus.preview_file(dataset), corpus.features_file(dataset))
        names = map(corpus.name_of, (*beside, catalog))
        changed = [name for name in names if name in digests and (digests[name] != known.get(name))]
        steps = [(manifest, unfinished)]
        steps += [(corpus.root / name, place / name) for name in changed]
        steps.append((manifest, place / corpus.name_of(manifest)))
        for file, target in steps:
            held.check()
            target.write(file)
        unfinished.unlink()
    _remember(corpus, dataset, _bytes(manifest))
    held.check()
    write_index(place)
    _remove_unreferenced(corpus, place, dataset)
    write_fingerprint(corpus)
    if fingerprint_file(corpus).is_file():
        (place / corpus.name_of(fingerprint_file(corpus))).write(fingerprint_file(corpus))
    ledger = Journal(corpus, dataset).ledger_file
    if ledger.is_file():
        with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
            copy_without_names(ledger, Path(folder) / ledger.name)
            (place / corpus.name_of(ledger)).write(Path(folder) / ledger.name)


def _fetch(corpus: Corpus, place: RemotePath, dataset: str) -> None:
    """Copy the dataset's published files and journal from the store."""
    published = [
        corpus.catalog_file(dataset),
        corpus.preview_file(dataset),
        corpus.features_file(dataset),
        corpus.split_file(dataset),
        corpus.next_manifest_file(dataset),
    ]
    for file in (*published, Journal(corpus, dataset).ledger_file, corpus.manifest_file(dataset)):
        _fetch_file(corpus, place, file)


def _fetch_split(corpus: Corpus, place: RemotePath, dataset: str) -> None:
    """Begin anew where a first run was killed while it published: only who is held out must stay so."""
    split = corpus.split_file(dataset)
    _fetch_file(corpus, place, split)
    corpus.manifest_file(dataset).parent.mkdir(parents=True, exist_ok=True)
    if split.is_file():
        seal(corpus, dataset, {corpus.name_of(split): digest_of(split)})


def _fetch_file(corpus: Corpus, place: RemotePath, file: Path) -> None:
    """Copy one file, if the store has it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileNotFoundError), replacing(file) as temporary:
        (place / corpus.name_of(file)).download(temporary)


def _discard(corpus: Corpus, dataset: str) -> None:
    shutil.rmtree(corpus.catalog_file(dataset).parent, ignore_errors=True)
    shutil.rmtree(Journal(corpus, dataset).folder, ignore_errors=True)
    corpus.split_file(dataset).unlink(missing_ok=True)


def _remove_unreferenced(corpus: Corpus, place: RemotePath, dataset: str) -> None:
    """Delete arrays that no row of the published catalog names: left by a killed run or replaced."""
    from catalog.query import read_batches, remedy_of

    if not corpus.catalog_file(dataset).is_file():
        return
    referenced = NameSet()
    for table in read_batches(corpus.catalog_file(dataset), remedy_of(dataset), ["shard_path"]):
        referenced.add(table["shard_path"].drop_null().to_pylist())
    folder = place / "shards" / dataset_folder(dataset)
    for item in folder.walk():
        array, _, name = item.name.rpartition("/")
        if f"{folder.name}/{array}" not in referenced:
            if name != METADATA_FILE:
                (folder / array / METADATA_FILE).unlink()  # without which it is no array
            (folder / item.name).unlink()


def _base_file(corpus: Corpus, dataset: str) -> Path:
    return corpus.private / "published" / f"{dataset}.sha256"


def _base(corpus: Corpus, dataset: str) -> bytes | None:
    """The manifest of the store when this machine last knew it."""
    return _bytes(_base_file(corpus, dataset))


def _remember(corpus: Corpus, dataset: str, manifest: bytes | None) -> None:
    if manifest is None:
        _base_file(corpus, dataset).unlink(missing_ok=True)
        return
    _base_file(corpus, dataset).parent.mkdir(parents=True, exist_ok=True)
    with replacing(_base_file(corpus, dataset)) as temporary:
        temporary.write_bytes(manifest)


def _manifest_bytes(place: RemotePath, corpus: Corpus, dataset: str) -> bytes | None:
    try:
        return (place / corpus.name_of(corpus.manifest_file(dataset))).read_bytes()
    except FileNotFoundError:
        return None


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
