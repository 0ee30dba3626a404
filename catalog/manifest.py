"""What a dataset's published files must hash to: catalog, previews, features and split, in one small file
beside them.

    # pumit-data manifest 1
    <sha256>  catalog/dataset=amos/features.parquet
    <sha256>  catalog/dataset=amos/images.parquet
    <sha256>  catalog/dataset=amos/previews.parquet
    <sha256>  splits/amos.parquet
    # sha256 of the lines above: <sha256>

Paths are relative to the corpus, so that `sha256sum -c` there reads it too. The hashes of the shards are a
column of the catalog: the manifest vouches for the catalog, the catalog for the voxels. So a manifest has
four lines for ten million images, and no rename can part a row from the hash of its voxels.

Several files cannot be replaced by one rename. `publish` therefore first writes down, as the next manifest,
what they are about to become. Until that takes the place of the manifest, a file may be as either says; what
is as neither is damaged.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from catalog.corpus import Corpus
from catalog.durable import remove_unfinished, replacing, sync, unfinished
from catalog.errors import SetupError
from catalog.merge import regrouped
from catalog.store import Location

MANIFEST_VERSION = 1

_HEADER = "# pumit-data manifest "
_FOOTER = "# sha256 of the lines above: "
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")

Digests = dict[str, str]
"""sha256 (hexadecimal) by path relative to the corpus."""


@dataclass(frozen=True)
class NewFile:
    """A Parquet file that is to be replaced."""

    path: Path
    tables: Iterable[pa.Table]
    """Its rows, in any pieces: row groups are cut at the same rows however they come."""
    schema: pa.Schema
    group_rows: int = 1 << 16
    compression: str = "zstd"


class DamagedManifestError(SetupError):
    """A manifest does not agree with its own checksum."""


def publish(corpus: Corpus, dataset: str, files: Sequence[NewFile]) -> None:
    """Replace files of a dataset, in the order given, and then its manifest.

    Each is replaced by one rename, after all have been written. Equal tables give equal bytes. Killed anywhere
    and called again with the same tables, it ends the same. Only one process may do this for a dataset.

    Raises SetupError if the manifest is damaged; OSError if the disk is full (nothing has changed then).
    """
    manifest, following = corpus.manifest_file(dataset), corpus.next_manifest_file(dataset)
    digests = read_manifest(manifest)
    temporaries = [unfinished(file.path) for file in files]
    for path in (manifest, following, *(file.path for file in files)):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path)
    try:
        for file, temporary in zip(files, temporaries, strict=True):
            digests[_name(corpus, file.path)] = _write_parquet(file, temporary)
            sync(temporary)
        _write_manifest(following, digests)
        for file, temporary in zip(files, temporaries, strict=True):
            temporary.replace(file.path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    for folder in {file.path.parent for file in files}:
        sync(folder)
    following.replace(manifest)
    sync(manifest.parent)


def settle(corpus: Corpus, dataset: str) -> None:
    """End what a killed `publish` left, where its files are all as they were before, or all as they should be.

    Where some are replaced and some not, the journal still holds what they are made of, and the next merge
    does it again. Only the one process that may write the dataset may call this.
    """
    manifest, following = corpus.manifest_file(dataset), corpus.next_manifest_file(dataset)
    if not following.is_file():
        return
    try:
        expected = read_manifest(following)
    except DamagedManifestError:
        following.unlink()  # it replaces nothing before its files have been replaced
        return
    found = {name: digest_of(corpus.root / name) for name in expected if (corpus.root / name).is_file()}
    if found == expected:
        following.replace(manifest)
        sync(manifest.parent)
    elif manifest.is_file() and found == read_manifest(manifest):
        following.unlink()
        sync(manifest.parent)


def accepted_digests(corpus: Corpus, dataset: str) -> dict[str, set[str]]:
    """The hashes that each file of a dataset may have: two only while a `publish` is under way or was killed.

    Raises DamagedManifestError.
    """
    accepted: dict[str, set[str]] = {}
    for path in (corpus.manifest_file(dataset), corpus.next_manifest_file(dataset)):
        for name, digest in read_manifest(path).items():
            accepted.setdefault(name, set()).add(digest)
    return accepted


def refuse_damaged(corpus: Corpus, dataset: str, path: Path, remedy: str) -> None:
    """Raise SetupError, with `remedy` at its end, if a file is there that the manifest knows otherwise."""
    accepted = accepted_digests(corpus, dataset).get(_name(corpus, path))
    if accepted is not None and path.is_file() and digest_of(path) not in accepted:
        raise SetupError(f"{path} is damaged: it is not the file that {dataset}'s manifest tells of. {remedy}")


def read_manifest(path: Path) -> Digests:
    """The lines of a manifest; none if there is no such file.

    Raises DamagedManifestError, or SetupError if a later version of this program wrote it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    head, separator, tail = content.rpartition(_FOOTER.encode())
    text = head.decode(errors="replace").splitlines()
    if not separator or tail != f"{hashlib.sha256(head).hexdigest()}\n".encode() or not text:
        raise DamagedManifestError(
            f"{path} is damaged: it does not agree with its own checksum. "
            "Type `pumit-data verify --repair`, which proves the files and writes it anew."
        )
    version = text[0].removeprefix(_HEADER)
    if version != str(MANIFEST_VERSION):
        raise SetupError(
            f"{path} has version {version} of the manifest, this program knows version {MANIFEST_VERSION}. "
            "Install the version of pumit-data that wrote it, or a later one."
        )
    return dict(_lines(text))


def surviving_digests(path: Path) -> set[str]:
    """All hashes that can still be read in a damaged manifest: a file that has one of them is proven."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return set()
    return {digest for _, digest in _lines(text.splitlines())}


def named_digests(manifest: bytes) -> Digests:
    """The lines of a manifest that can still be read, damaged or not."""
    return dict(_lines(manifest.decode(errors="replace").splitlines()))


def seal(corpus: Corpus, dataset: str, digests: Digests) -> None:
    """Write a dataset's manifest anew, for files that were proven some other way."""
    _write_manifest(corpus.manifest_file(dataset), digests)
    corpus.next_manifest_file(dataset).unlink(missing_ok=True)
    sync(corpus.manifest_file(dataset).parent)


def digest_of(path: Location) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_when_written(file: NewFile) -> str:
    """sha256 that `publish` would give a file, which is not written."""
    sink = _Digesting()
    _write_into(sink, file)
    return sink.digest.hexdigest()


def _lines(text: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in text:
        if match := _LINE.fullmatch(line):
            yield match[2], match[1]


def _name(corpus: Corpus, path: Path) -> str:
    return path.relative_to(corpus.root).as_posix()


def _write_manifest(path: Path, digests: Digests) -> None:
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    head = f"{_HEADER}{MANIFEST_VERSION}\n{lines}"
    with replacing(path) as temporary:
        temporary.write_text(f"{head}{_FOOTER}{hashlib.sha256(head.encode()).hexdigest()}\n", encoding="utf-8")


def _write_parquet(file: NewFile, target: Path) -> str:
    with target.open("wb") as handle:
        sink = _Digesting(handle.write)
        _write_into(sink, file)
    return sink.digest.hexdigest()


def _write_into(sink: _Digesting, file: NewFile) -> None:
    options = {"compression": file.compression, "write_page_checksum": True}
    with pq.ParquetWriter(sink, file.schema, **options) as writer:
        for group in regrouped(file.tables, file.group_rows):
            # Taken anew: neither chunks nor offsets must show in the pages.
            writer.write_table(group.take(pa.array(range(group.num_rows))), row_group_size=file.group_rows)


class _Digesting:
    """What a Parquet writer needs of a file, hashing all that is written, so that nothing is read again."""

    closed = False

    def __init__(self, write: Callable[[bytes], int] | None = None) -> None:
        self.digest = hashlib.sha256()
        self._write = write

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return len(data) if self._write is None else self._write(data)

    def flush(self) -> None:
        """Nothing is held back here."""
