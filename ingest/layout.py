"""The layout that an entry expects, by paths alone: what belongs where, and which single move mends a path.

Nothing here looks at a disk. Paths are relative to the dataset's folder, with forward slashes.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal

from ingest.glance import is_label, suffix_of
from ingest.spec import DatasetSpec, ImageGroup

_DEEPEST_WRAPPING = 3
"""So many folders around a release are taken for what an archive tool made of it."""


@dataclass(frozen=True, order=True)
class Move:
    """What to move so that files lie where the entry expects them."""

    kind: Literal["up", "into", "rename"]
    source: str
    """Folder whose content goes up, or file or folder that goes elsewhere; empty: the dataset's own content."""
    target: str
    """Folder that the content goes to; or, for `rename`, the new name in full."""

    def told(self) -> str:
        """As an advice, one sentence."""
        if self.kind == "up":
            return f"Move what is in {self.source}/ up to {self.target or 'the folder of the dataset'}."
        if self.kind == "into":
            return f"Make the folder {self.target}/ and move {self.source} into it."
        return f"Rename {self.source} to {self.target}."


class Layout:
    """The globs, tables and rules of one entry."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._ignored = [re.compile(pattern, re.IGNORECASE) for pattern in spec.ignore]
        self._companions = [glob for group in spec.images for glob in _companions(group)]
        self._literal_runs = _distinct_runs(spec)
        self._names = {_folded(name) for run in self._literal_runs for name in run} | {_folded(spec.folder)}

    def is_ignored(self, path: str) -> bool:
        """Whether the entry says that a file, or a folder above it, is no image."""
        return any(pattern.search(path) for pattern in self._ignored)

    def is_companion(self, path: str) -> bool:
        """Whether a file has the name of a table or dataset.json that the entry reads, wherever it lies."""
        name = path.rpartition("/")[2]
        return any(_matches(glob.rpartition("/")[2], name) for glob in self._companions)

    def image_at(self, path: str) -> str | None:
        """The image that discovery would take a file for, or for a slice of: the file itself or its folder."""
        name = unicodedata.normalize("NFC", path)
        if self.is_ignored(name):
            return None
        return next(filter(None, (_image_of(group, name) for group in self._spec.images)), None)

    def fits(self, path: str) -> bool:
        """Whether discovery looks at a file here: as an image, as a slice of a series, or as a table."""
        return any(_matches(glob, path) for glob in self._companions) or self.image_at(path) is not None

    def mend(self, path: str) -> tuple[Move, str] | None:
        """The move after which a file fits, and its path then, if one move will do. Labels are never moved."""
        *folders, name = path.split("/")
        for move, parts, touched in self._moves(folders, name):
            # Names that the layout itself has, such as Dataset_BUSI_with_GT, say nothing of labels.
            own_names = (part for part in touched if _folded(part) not in self._names)
            if self.fits("/".join(parts)) and not is_label("/".join(own_names)):
                return move, "/".join(parts)
        return None

    def _moves(self, folders: list[str], name: str) -> Iterator[tuple[Move, list[str], list[str]]]:
        """Moves that may help a file, the likely ones first: each with the new path, and the names it moves."""
        yield from (_lifted(folders, name, start, 1) for start in _doubled(folders))
        for depth in range(1, min(_DEEPEST_WRAPPING, len(folders)) + 1):
            yield _lifted(folders, name, 0, depth)
        yield from (_lifted(folders, name, start, 1) for start in range(1, len(folders)))
        for position in range(len(folders) + 1):
            before, after = folders[:position], [*folders[position:], name]
            moved = after[0] if len(after) > 1 else f"*{suffix_of(name)}"
            for run in self._literal_runs:
                target = [*before, *run]
                move = Move("into", "/".join([*before, moved]), "/".join(target))
                yield move, [*target, *after], [after[0]]
        for position, folder in enumerate(folders):
            for run in self._literal_runs:
                renamed = [*folders[:position], run[0]]
                move = Move("rename", "/".join(folders[: position + 1]), "/".join(renamed))
                yield move, [*renamed, *folders[position + 1 :], name], [folder]

    def tree(self) -> dict[str, dict]:  # type: ignore[type-arg]
        """What is expected, as nested names; a leaf has no names below it.

        Every branch is enough by itself: an entry accepts several ways to unpack a release, and parts of it.
        A leaf that ends in a slash is the folder of a DICOM series; `<File Location>/` stands for the folders
        that this column of a table names.
        """
        root: dict[str, dict] = {}  # type: ignore[type-arg]
        for path in dict.fromkeys(self._expected()):
            *folders, last = path.removesuffix("/").split("/")
            place = root
            for folder in folders:
                place = place.setdefault(folder, {})
            place.setdefault(f"{last}/" if path.endswith("/") else last, {})
        return root

    def _expected(self) -> Iterator[str]:
        for group in self._spec.images:
            yield from _companions(group)
            yield from group.globs
            if group.table is not None:
                for file in group.table.files:
                    place = file.rpartition("/")[0]
                    yield f"{place}/<{group.table.folder_column}>/".removeprefix("/")

    def tops(self) -> list[str]:
        """Names that the dataset's folder may hold, as far as they are fixed."""
        return [
            top.removesuffix("/") for top in self.tree() if not any(character in top for character in "*?[<")
        ]


def _companions(group: ImageGroup) -> tuple[str, ...]:
    tables = group.table.files if group.table is not None else ()
    return (*tables, *((group.channels.file,) if group.channels is not None else ()))


def _image_of(group: ImageGroup, path: str) -> str | None:
    folder = path.rpartition("/")[0]
    for glob in group.globs:
        image = folder if glob.endswith("/") else path
        if _matches(glob, image) and re.fullmatch(group.path, image, re.IGNORECASE):
            return image
    return None


def _matches(glob: str, path: str) -> bool:
    """Whether discovery would find `path` by `glob`."""
    return _match_parts(tuple(glob.removesuffix("/").split("/")), tuple(_folded(path).split("/")))


def _match_parts(glob: tuple[str, ...], path: tuple[str, ...]) -> bool:
    if not glob or not path:
        return not glob and not path
    if glob[0] == "**":
        return any(_match_parts(glob[1:], path[start:]) for start in range(len(path)))
    return bool(_pattern(glob[0]).match(path[0])) and _match_parts(glob[1:], path[1:])


@functools.cache
def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(translate(_folded(part)))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _distinct_runs(spec: DatasetSpec) -> list[tuple[str, ...]]:
    """Neighbouring folders of the globs that have no wildcards, longer runs first."""
    runs: dict[tuple[str, ...], None] = {}
    for glob in (glob for group in spec.images for glob in (*group.globs, *_companions(group))):
        folders = glob.removesuffix("/").split("/")[:-1]
        for start in range(len(folders)):
            for end in range(start + 1, len(folders) + 1):
                if any(character in part for part in folders[start:end] for character in "*?["):
                    break
                runs[tuple(folders[start:end])] = None
    return sorted(runs, key=len, reverse=True)


def _doubled(folders: list[str]) -> list[int]:
    """Where a folder has the name of the one above it: what unpacking into a folder of that name makes."""
    return [at for at in range(1, len(folders)) if _folded(folders[at]) == _folded(folders[at - 1])]


def _lifted(folders: list[str], name: str, start: int, depth: int) -> tuple[Move, list[str], list[str]]:
    end = start + depth
    move = Move("up", "/".join(folders[:end]), "/".join(folders[:start]))
    return move, [*folders[:start], *folders[end:], name], folders[start:end]
