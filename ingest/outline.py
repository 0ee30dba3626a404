"""Raw images in an object store: discovery sees a folder that outlines them, tasks fetch what they read.

The outline is a folder of files that have the names, sizes and times of the objects, and no content: they take
no space but their names. Only what discovery opens is fetched, as tables are. So the rules for folders hold for
stores, and a changed object is seen as a changed file is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from catalog.errors import SetupError
from catalog.remote import local_folder
from catalog.store import Location, ObjectInfo, RemotePath, StoreError
from ingest.discover import existing_roots, files_opened
from ingest.overrides import overrides_file
from ingest.readers import name as name_of
from ingest.reasons import FailedImage
from ingest.source import ImageSource
from ingest.spec import DatasetSpec, own_file

_PREFIX = "outline-"
_HEADERS = (".mhd", ".nhdr", ".hdr", ".img")
"""Suffixes of files that are one of two."""
_HEADER_BYTES = 1 << 16
_DATA_FILE = re.compile(
    rb"^(?:ElementDataFile\s*=|data ?file:)\s*([^\r\n]+?)\s*$", re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True)
class RawFolder:
    """What discovery walks through."""

    folder: Path
    """The user's own, or the outline of `origin`."""
    origin: RemotePath | None = None
    tops: tuple[RemotePath, ...] = ()
    """What lies directly below `origin`."""
    _outlined: set[str] = field(default_factory=set)
    """Folders directly below `folder`, and ids of datasets, that are complete."""

    @property
    def place(self) -> Location:
        """What the user knows it by."""
        return self.folder if self.origin is None else self.origin

    def told(self, text: str) -> str:
        """A message in which paths of the outline are those of the place."""
        return text if self.origin is None else text.replace(str(self.folder), str(self.origin))

    def outline(self, spec: DatasetSpec) -> None:
        """Make the outline of a dataset. Of a folder, nothing is to be done.

        Raises SetupError if names of objects cannot be those of files, StoreError as the store does.
        """
        if self.origin is None or spec.id in self._outlined:
            return
        wanted = {name.split("/")[0].casefold() for name in (spec.id, spec.folder)}
        for top in self.tops:
            if top.name.casefold() in wanted and f"{top.name}/" not in self._outlined:
                self._outline(top)
                self._outlined.add(f"{top.name}/")
        for root in existing_roots(spec, self.folder):
            place = self.origin_of(root)
            files = files_opened(spec, root)
            if spec.one_copy:
                files += _of_one_size(root)
            for file in files:
                with _times_kept(file):
                    (place / file.relative_to(root).as_posix()).download(file)
        self._outlined.add(spec.id)

    def origin_of(self, root: Path) -> RemotePath:
        """Where the objects lie that a folder outlines."""
        if self.origin is None:
            raise ValueError(f"{root} is no outline")
        return self.origin / root.relative_to(self.folder).as_posix()

    def _outline(self, top: RemotePath) -> None:
        empty = []
        for item in top.walk():
            if item.size:
                self._add(f"{top.name}/{item.name}", item)
            else:
                empty.append(item)
        for item in empty:
            # Some tools make an empty object of the name of a folder.
            if not (self.folder / top.name / item.name).is_dir():
                self._add(f"{top.name}/{item.name}", item)

    def _add(self, name: str, item: ObjectInfo) -> None:
        parts = name.split("/")
        if {"", ".", ".."} & set(parts):
            raise SetupError(f"{self.origin}: the object {name!r} has no name that a file may have. Rename it.")
        file = self.folder.joinpath(*parts)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as stream:
                stream.truncate(item.size)
        except (FileExistsError, NotADirectoryError, ValueError) as error:
            raise SetupError(
                f"{self.origin}: {name!r} is an object, and so is a name above or below it. Rename one of them."
            ) from error
        # Stores tell seconds, and an object may be replaced within one: the etag tells it then.
        nanoseconds = int(item.modified.timestamp()) * 10**9 + zlib.crc32(item.etag.encode()) % 10**9
        os.utime(file, ns=(nanoseconds, nanoseconds))


@contextmanager
def raw_folder(place: Location) -> Iterator[RawFolder]:
    """The raw folder at a place, to discover in; of a store, an outline that goes when the block ends.

    Raises SetupError, or StoreError as the store does.
    """
    if isinstance(place, Path):
        yield RawFolder(place)
        return
    if place.is_web:
        raise SetupError(
            f"{place}: raw images cannot be found on a web server, which lists no folder. Give a folder or a "
            "store, such as s3://BUCKET/PREFIX; `inspect` takes the URL of one file."
        )
    home = local_folder(place, "XDG_CACHE_HOME", "~/.cache").absolute()
    _remove_dead(home)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=home)))
        lock = stack.enter_context((home / f"{folder.name}.lock").open("w"))
        stack.callback((home / f"{folder.name}.lock").unlink)
        fcntl.flock(lock, fcntl.LOCK_EX)
        raw = RawFolder(folder, place, tuple(place.iterdir()))
        with suppress(FileNotFoundError):
            (place / own_file(folder).name).download(own_file(folder))
        with suppress(FileNotFoundError):
            (place / overrides_file(folder).name).download(overrides_file(folder))
        try:
            yield raw
        except SetupError as error:
            raise type(error)(raw.told(str(error))) from error


@contextmanager
def at_hand(source: ImageSource, origin: RemotePath | None) -> Iterator[ImageSource]:
    """The source with its files on this machine, for as long as the block lasts.

    Args:
        origin: of the dataset's folder, if that is an outline; None if the files lie there.

    Raises FailedImage if objects have gone since they were listed, StoreError as the store does.
    """
    if origin is None or source.exclude is not None or source.overridden(None) is not None:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
        local = replace(source, root=Path(folder))
        try:
            _fetch(source, origin, local)
        except FileNotFoundError:
            raise FailedImage(
                "vanished", f"{name_of(source)}: it was there a moment ago. Put it back and repeat the command."
            ) from None
        except StoreError as error:
            if error.errno != errno.ESTALE:
                if source.alias is None:
                    raise
                # Messages reach logs, and the URL has a private name.
                raise StoreError(error.errno, error.strerror, name_of(source)) from None
            raise FailedImage(
                "vanished", f"{name_of(source)}: it was replaced while it was read. Repeat the command."
            ) from None
        yield local


def files_beside(header: Path, names: Iterable[str]) -> list[str]:
    """Those of the `names` beside a file that it needs: the voxels, if it is but their header."""
    if header.suffix.lower() not in _HEADERS:
        return []
    with header.open("rb") as stream:
        told = {name.decode(errors="replace") for name in _DATA_FILE.findall(stream.read(_HEADER_BYTES))}
    stem = header.name.partition(".")[0]
    return [name for name in names if name != header.name and (name in told or name.partition(".")[0] == stem)]


def _fetch(source: ImageSource, origin: RemotePath, local: ImageSource) -> None:
    """The store alone is asked: a worker on another machine has no outline."""

    def fetch(path: str) -> None:
        target = local.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (origin / path).download(target)

    try:
        fetch(source.path)
    except FileNotFoundError:
        names = (origin / source.path).files()
        if not names:
            raise
        for name in names:  # of a series, the files directly in its folder
            fetch(f"{source.path}/{name}")
        return
    path = PurePosixPath(source.path)
    if path.suffix.lower() in _HEADERS:
        for name in files_beside(local.file, _folder_of(origin, path).files()):
            fetch((path.parent / name).as_posix())


def _folder_of(origin: RemotePath, path: PurePosixPath) -> RemotePath:
    return origin if path.parent == PurePosixPath() else origin / path.parent.as_posix()


def _of_one_size(root: Path) -> list[Path]:
    """Files that may be copies of each other."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in root.rglob("*"):
        if file.is_file():
            by_size[file.stat().st_size].append(file)
    return [file for files in by_size.values() if len(files) > 1 for file in files]


@contextmanager
def _times_kept(file: Path) -> Iterator[None]:
    status = file.stat()
    yield
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _remove_dead(home: Path) -> None:
    """Delete outlines of processes that were killed."""
    for lock in home.glob(f"{_PREFIX}*.lock"):
        with suppress(FileNotFoundError, BlockingIOError), lock.open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
