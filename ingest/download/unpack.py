"""Archives unpacked with distrust: nothing outside the folder, nothing larger than announced."""

from __future__ import annotations

import logging
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from catalog.errors import SetupError

_log = logging.getLogger(__name__)

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


class DamagedArchiveError(SetupError):
    """What came is no whole archive."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked; `scan.nii.gz` is not."""
    return name.lower().endswith((".zip", *_TAR_ENDINGS))


def archive_stem(name: str) -> str:
    """The name without the ending of an archive."""
    lower = name.lower()
    ending = next(ending for ending in (".zip", *_TAR_ENDINGS) if lower.endswith(ending))
    return name[: -len(ending)]


def unpack(archive: Path, folder: Path, limit: int, members: str | None = None) -> None:
    """Unpack a zip or tar archive into an existing folder.

    Leftovers of a Mac (`__MACOSX`, `._x`) are left out; so are symbolic links of a zip.

    Args:
        limit: bytes that may come out.
        members: regular expression; only files whose path in the archive matches somewhere, in any case.

    Raises:
        DamagedArchiveError: cut off, wrong checksum, or no archive.
        SetupError: a path, link or device that leads out of the folder; more than `limit`; a password or a
            compression that we cannot read. What was unpacked before stays in the folder.
        OSError: the disk.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            _unzip(archive, folder, limit, members or "")
        else:
            _untar(archive, folder, limit, members or "")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamagedArchiveError(f"{archive}: damaged or no archive ({error}). Repeat the command.") from error


def _unzip(archive: Path, folder: Path, limit: int, wanted: str) -> None:
    with zipfile.ZipFile(archive) as content:
        members = [info for info in content.infolist() if _is_wanted(info.filename, wanted)]
        _check_limit(archive, sum(info.file_size for info in members), limit)
        for info in members:
            target = folder / _inside(archive, info.filename)
            if info.is_dir() or info.filename.endswith("\\"):
                target.mkdir(parents=True, exist_ok=True)
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                _log.warning("%s: %s is a link and is left out.", archive, info.filename)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Reads no more than the announced size, which is what the limit was held against.
                with content.open(info) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            except (NotImplementedError, RuntimeError) as error:  # compression, password
                raise SetupError(f"{archive}: {info.filename} cannot be unpacked: {error}.") from error


def _untar(archive: Path, folder: Path, limit: int, wanted: str) -> None:
    total = 0
    with tarfile.open(archive, mode="r|*") as content:
        for member in content:
            if not _is_wanted(member.name, wanted):
                continue
            total += member.size
            _check_limit(archive, total, limit)
            try:
                content.extract(member, folder, filter="data")
            except tarfile.FilterError as error:
                raise SetupError(f"{archive}: refused, for it would write elsewhere: {error}.") from error


def _check_limit(archive: Path, total: int, limit: int) -> None:
    if total > limit:
        raise SetupError(
            f"{archive}: {total / 1e9:.3g} GB would come out of it, and at most {limit / 1e9:.3g} GB are "
            "expected. If that is right, unpack it by hand."
        )


def _inside(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
        raise SetupError(f"{archive}: refused, for it would write elsewhere: {name!r}.")
    return path


def _is_wanted(name: str, wanted: str) -> bool:
    path = PurePosixPath(name)
    is_debris = "__MACOSX" in path.parts or path.name.startswith("._")
    return not is_debris and re.search(wanted, name, re.IGNORECASE) is not None
