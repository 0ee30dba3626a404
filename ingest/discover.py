"""From the folder of a dataset to its images: the rules of datasets.yaml applied to paths.

No file is opened but a dataset's own table; key, subject and modality come from the path alone. The result
does not depend on the order in which the file system lists names, nor on locale, case or Unicode form.
"""

from __future__ import annotations

import csv
import fnmatch
import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from glob import escape
from pathlib import Path, PurePosixPath

from catalog.errors import SetupError
from ingest.source import ImageSource
from ingest.spec import DatasetSpec, ImageGroup, Table

_log = logging.getLogger(__name__)

_VOLUME_KEY = re.compile(r"#\d{4,}$")
"""The ending that the volumes of one file get."""


def dataset_root(spec: DatasetSpec, raw: Path) -> Path:
    """The folder of a dataset under `raw`: named by its id or by its published name, in any case.

    Raises:
        SetupError: `raw` or the folder is missing, or the folder is empty, or both names exist.
    """
    found = _roots(spec, raw)
    names = spec.id if spec.id == spec.folder else f"{spec.id} or {spec.folder}"
    if not found:
        raise SetupError(f"{spec.id}: {raw} has no folder {names}. {_expected(spec)}")
    if len(found) > 1:
        both = " and ".join(sorted(map(str, found)))
        raise SetupError(f"{spec.id}: both {both} exist. Keep one.")
    (root,) = found
    if not any(_entries(root)):
        raise SetupError(f"{spec.id}: {root} is empty. {_expected(spec)}")
    return root


def why_left_out(spec: DatasetSpec, raw: Path) -> str | None:
    """Why an ingest of all datasets passes this one over; None if it does not.

    Raises:
        SetupError: `raw` is missing.
    """
    return None if _roots(spec, raw) else "no folder"


def _roots(spec: DatasetSpec, raw: Path) -> list[Path]:
    """The folders below `raw` that are called like the dataset. SetupError if `raw` is missing."""
    if not raw.is_dir():
        raise SetupError(f"The raw folder {raw} does not exist. Say where it is: --raw FOLDER.")
    found: dict[tuple[int, int], Path] = {}  # by identity: id and published name may be one folder
    for name in (spec.id, spec.folder):
        for path in _expand(raw.absolute(), tuple(escape(name).split("/")), folders=True):
            if path.is_dir():
                status = path.stat()
                found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def find_sources(spec: DatasetSpec, root: Path) -> list[ImageSource]:
    """All images of a dataset, sorted by key (by code point).

    Nothing is left out silently: names that match `exclusions` come with `exclude`; a link that leads out of
    `root`, or nowhere, is listed, and reading it fails with a reason. Absent folders are tolerated, for who
    downloads a part ingests a part.

    Raises:
        SetupError: nothing found; a path that the rules cannot describe; two images with one key; a table that
            is missing, malformed or lists a folder outside the dataset.
    """
    by_path: dict[str, tuple[int, ImageSource]] = {}
    for number, source in stream_sources(spec, root):
        group, _ = by_path.setdefault(source.path, (number, source))
        if group != number:
            raise found_twice(spec, source.path, number)
    by_key: dict[str, ImageSource] = {}
    for path in sorted(by_path):
        _, source = by_path[path]
        other = by_key.setdefault(source.key, source)
        if other is not source:
            raise same_key(spec, source.key, other.path, path)
    if not by_key:
        raise nothing_found(spec, root)
    return [by_key[key] for key in sorted(by_key)]


def stream_sources(spec: DatasetSpec, root: Path) -> Iterator[tuple[int, ImageSource]]:
    """Images of a dataset as they are met, each with the number of its `images` group; nothing is held.

    In no order; one that several globs of a group match comes several times. Whether paths and keys are
    unique is for the caller to see. Otherwise as `find_sources`.
    """
    ignored = [re.compile(pattern, re.IGNORECASE) for pattern in spec.ignore]
    for number, group in enumerate(spec.images):
        for path in _paths(spec, group, root):
            name = unicodedata.normalize("NFC", path)
            if not any(pattern.search(name) for pattern in ignored):
                yield number, _source(spec, group, root, path, name)


def found_twice(spec: DatasetSpec, path: str, group: int) -> SetupError:
    return SetupError(f"{spec.id}: {path} is found by two of the `images` groups, the last [{group}].")


def same_key(spec: DatasetSpec, key: str, path: str, other: str) -> SetupError:
    return SetupError(
        f"{spec.id}: {path} and {other} both have the key {key!r}. If one is a copy, move it away; else the "
        "`key` in datasets.yaml needs more of the path."
    )


def nothing_found(spec: DatasetSpec, root: Path) -> SetupError:
    return SetupError(f"{spec.id}: no image found in {root}. {_expected(spec)}")


def _source(spec: DatasetSpec, group: ImageGroup, root: Path, path: str, name: str) -> ImageSource:
    """Describe one path; `name` is its NFC form, which rules and keys go by."""
    match = re.fullmatch(group.path, name, re.IGNORECASE)
    if match is None:
        raise SetupError(
            f"{spec.id}: {path} looks like an image, but does not match `path` {group.path!r}. If it does not "
            "belong to the dataset, move it away; else extend `path` or `ignore` in datasets.yaml."
        )
    parts = match.groupdict(default="")
    key = group.key.format_map(parts)
    subject = key if group.subject is None else group.subject.format_map(parts)
    if not key or not subject or _VOLUME_KEY.search(key) or not name.isprintable():
        raise SetupError(
            f"{spec.id}: {path!r} gives the key {key!r} and the subject {subject!r}. Neither may be empty, "
            "the key may not end in '#' and digits, and names must be printable Unicode. Rename the file."
        )
    rule = next((rule for rule in group.modality if re.search(rule.match, name, re.IGNORECASE)), None)
    if rule is None:
        raise SetupError(f"{spec.id}: no `modality` rule in datasets.yaml matches {path}.")
    excluded = (rule for rule in spec.exclusions if re.search(rule.match, name, re.IGNORECASE))
    exclusion = next(excluded, None)
    return ImageSource(
        dataset=spec.id,
        key=key,
        subject=subject,
        path=path,
        root=root,
        format=group.format,
        dimension=group.dimension,
        modality=rule.modality,
        upstream_modality=rule.upstream_modality or group.upstream_modality or rule.modality,
        body_part=group.body_parts,
        depth_axis=group.depth_axis,
        weight=spec.sampling_weight,
        share_weight=group.share_weight,
        exclude=("declared", exclusion.reason) if exclusion else None,
    )


def _paths(spec: DatasetSpec, group: ImageGroup, root: Path) -> Iterator[str]:
    """What the globs or the table of a group find, relative to the root."""
    if group.table is not None:
        yield from _listed(spec, group.table, root)
    for glob in group.globs:
        for path in _glob(root, glob):
            yield path.relative_to(root).as_posix()


def _glob(root: Path, glob: str) -> Iterator[Path]:
    return _expand(root, PurePosixPath(glob).parts, folders=glob.endswith("/"))


def _expand(
    folder: Path, parts: tuple[str, ...], *, folders: bool, above: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Paths below `folder` that match the parts of a glob, regardless of case and Unicode form.

    Links are followed, except back to a folder of the same descent.

    Args:
        folders: whether folders or files are wanted.
        above: real paths of the folders that `**` has passed.
    """
    part, rest = parts[0], parts[1:]
    if part == "**":
        real = os.path.realpath(folder)
        if real in above:
            return
        yield from _expand(folder, rest, folders=folders)
        for entry in _entries(folder):
            if _is_folder(entry):
                yield from _expand(folder / entry.name, parts, folders=folders, above=(*above, real))
        return
    wanted = re.compile(fnmatch.translate(_folded(part)))
    for entry in _entries(folder):
        if not wanted.match(_folded(entry.name)):
            continue
        path = folder / entry.name
        dangling = entry.is_symlink() and not path.exists()
        if rest:
            if _is_folder(entry):
                yield from _expand(path, rest, folders=folders)
            elif dangling:
                _log.warning("%s is a link that leads nowhere; what it stood for is not found.", path)
        elif dangling or (_is_folder(entry) if folders else entry.is_file()):
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Names in a folder but hidden ones, as archives made on a Mac bring them along (`._x`, `__MACOSX`)."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith((".", "__MACOSX")))
    except OSError as error:
        raise SetupError(f"Cannot list the folder {folder}: {error.strerror}.") from error


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _listed(spec: DatasetSpec, table: Table, root: Path) -> Iterator[str]:
    """Folders that the rows of a dataset's table name and that are there."""
    files = sorted({file for glob in table.files for file in _glob(root, glob)})
    if not files:
        raise SetupError(f"{spec.id}: {root} has no {' or '.join(table.files)}. {_expected(spec)}")
    listed = missing = 0
    for file in files:
        for folder in _rows(spec, table, root, file):
            listed += 1
            if (root / folder).is_dir():
                yield folder
            else:
                missing += 1
    if missing:
        _log.warning("%s: %d of %d listed series are not there.", spec.id, missing, listed)


def _rows(spec: DatasetSpec, table: Table, root: Path, file: Path) -> Iterator[str]:
    """The folders that a table's wanted rows name, relative to the root."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream)
            names = {name.strip().casefold(): index for index, name in enumerate(next(lines, []))}
            for column in (table.folder_column, *table.where):
                if column.casefold() not in names:
                    raise SetupError(
                        f"{spec.id}: {file} has no column {column!r}, only: {', '.join(names) or 'nothing'}."
                    )
            wanted = {column.casefold(): value.casefold() for column, value in table.where.items()}
            for row in filter(None, lines):
                cells = row + [""] * (len(names) - len(row))
                values = {name: cells[index].strip() for name, index in names.items()}
                if any(values[column].casefold() != value for column, value in wanted.items()):
                    continue
                location = values[table.folder_column.casefold()]
                folder = _inside(file.parent.relative_to(root), location)
                if folder is None:
                    raise SetupError(
                        f"{spec.id}: {file}, line {lines.line_num}: {table.folder_column!r} must name a "
                        f"folder below that of the table, not {location!r}."
                    )
                yield folder
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SetupError(f"{spec.id}: {file} cannot be read as CSV: {error}.") from error


def _inside(start: Path, location: str) -> str | None:
    """A table's `./a/b` or `.\\a\\b` relative to the root; None where it leaves the table's folder."""
    path = PurePosixPath(location.replace("\\", "/"))
    if path.is_absolute() or not path.parts or ".." in path.parts or ":" in path.parts[0]:
        return None
    return (PurePosixPath(start.as_posix()) / path).as_posix()


def _expected(spec: DatasetSpec) -> str:
    """The layout in words, for who has none of it."""
    patterns: list[str] = []
    for group in spec.images:
        patterns += group.globs
        if group.table is not None:
            patterns.append(f"{' or '.join(group.table.files)} with the folders it lists")
    origin = f" It is offered at {spec.origin}." if spec.origin else ""
    return f"Expected below {spec.folder}/: {'; '.join(dict.fromkeys(patterns))}.{origin}"
