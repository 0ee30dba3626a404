"""Files that are there whole or not at all, and still after a power cut."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

_UNFINISHED = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file name to write to, which takes the place of `path` at the end of the block, by one rename.

    The folder must be there. The name is its own: two processes that write one path, as a worker thought dead
    and its successor may, do not meet in it. Only a process that is killed leaves it behind: see
    `remove_unfinished`.
    """
    temporary = unfinished(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def unfinished(path: Path) -> Path:
    """A new name beside `path`, for what is to become it."""
    return path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}-{path.name}")


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes left of `path`. Only for who alone may write it."""
    for leftover in path.parent.glob(f"{_UNFINISHED}*{escape(path.name)}"):
        leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or a folder to disk, so that after a power cut no name leads to half a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
