"""One scan in an object store, brought to this machine for who wants to look at it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from catalog.errors import SetupError
from catalog.store import Location, RemotePath
from ingest.glance import format_or_none
from ingest.outline import files_beside

_MOST_BYTES = 2_000_000_000
"""Of a folder: as much as a series or a large volume with its neighbours may take."""


@contextmanager
def fetched(place: Location) -> Iterator[Path]:
    """The file or folder at a place, on this machine for as long as the block lasts; one in a folder, itself.

    With a file come those that belong to it: the voxels of a header, the other slices of a DICOM series. A web
    server cannot tell the latter: there, a slice stands for itself.

    Raises SetupError if nothing is there, or too much; StoreError as the store does.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="pumit-data-") as folder:
        # The folder's name may tell the modality, as in CT/scan.nii.gz.
        target = Path(folder, place.parent.name or "scan", place.name or place.bucket)
        target.parent.mkdir()
        if place.is_file():
            place.download(target)
            _fetch_companions(place, target)
        elif place.is_web:
            raise SetupError(f"There is no file {place}. A web server lists no folder: name one file.")
        else:
            _fetch_folder(place, target)
        try:
            yield target
        except SetupError as error:
            raise SetupError(str(error).replace(str(target), str(place))) from error


def _fetch_companions(place: RemotePath, target: Path) -> None:
    if place.is_web:
        return
    names = place.parent.files()
    for name in names if format_or_none(target) == "dicom" else files_beside(target, names):
        if name != place.name:
            (place.parent / name).download(target.with_name(name))


def _fetch_folder(place: RemotePath, target: Path) -> None:
    found = [item for item in place.walk() if item.size]
    if not found:
        raise SetupError(f"There is no file or folder {place}.")
    size = sum(item.size for item in found)
    if size > _MOST_BYTES:
        raise SetupError(f"{place} has {decimal(size)} in {len(found)} files. Name one file or series of it.")
    for item in found:
        if {"", ".", ".."} & set(item.name.split("/")):
            raise SetupError(f"{place}: the object {item.name!r} has no name that a file may have. Rename it.")
        (target / item.name).parent.mkdir(parents=True, exist_ok=True)
        (place / item.name).download(target / item.name)
