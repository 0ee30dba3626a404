"""Archives that lie in a dataset's folder: what they hold, without unpacking them."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import islice

from catalog.store import Location, StoreError

_SUFFIX = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz)|7z|rar|z\d\d)(\.\d{3})?$", re.IGNORECASE)
_LOOKED_AT = 200
_LOOKED_AT_IN_A_STREAM = 40
"""A compressed tar has no table of contents: to see more of it is to inflate it."""


def is_archive(name: str) -> bool:
    """By its name: zip, tar (compressed or not), 7z, rar, and their parts."""
    return _SUFFIX.search(name) is not None


def members(archive: Location) -> list[str]:
    """Names of some files of an archive; none where it cannot be looked into (7z, rar, a part, damaged)."""
    try:
        with archive.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as packed:
                    names = [entry.filename for entry in packed.infolist() if not entry.is_dir()]
                return names[:: max(1, len(names) // _LOOKED_AT)]
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r|*") as stream:
                return list(islice(_files_of(stream), _LOOKED_AT_IN_A_STREAM))
    except StoreError:
        raise  # it says nothing about the archive
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def _files_of(stream: tarfile.TarFile) -> Iterator[str]:
    return (member.name.removeprefix("./") for member in stream if member.isfile())
