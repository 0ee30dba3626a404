"""From the folder of a dataset to its images: the rules of datasets.yaml applied to paths.

Key, subject and modality come from the path, or from a table that the dataset brings along. No other file is
opened. What is said of a path does not depend on the order in which the file system lists names, nor on locale,
case or Unicode form.
"""

from __future__ import annotations

import csv
import fnmatch
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from catalog.errors import SetupError
from ingest.names import NameKey
from ingest.source import ImageSource
from ingest.spec import ChannelNames, DatasetSpec, Exclusion, ImageGroup, ModalityRule, Table

_log = logging.getLogger(__name__)

_IF_WRONG = "If you know better, remove its line from `exclusions` in datasets.yaml."
_VOLUME_KEY = re.compile(r"#\d{4,}$")
"""The ending that the volumes of one file get."""
_RENAME_ODD = (
    "the name has control characters or is no valid Unicode, spelled out here with backslashes. Rename it."
)
_RENAME_VOLUME = "the name ends in '#' and digits, as only the keys of a file's volumes do. Rename it."
_MEND_TABLE = (
    "the table that lists it leads out of the dataset's folder. Correct that line; nothing there was read."
)


def dataset_root(spec: DatasetSpec, raw: Path) -> Path:
    """The folder of a dataset under `raw`: named by its id or by its published name, in any case.

    Raises:
        SetupError: `raw` or the folder is missing, or the folder is empty, or both names exist.
    """
    if not raw.is_dir():
        raise SetupError(f"The raw folder {raw} does not exist. Say where it is: --raw FOLDER.")
    found = existing_roots(spec, raw)
    names = spec.id if spec.id == spec.folder else f"{spec.id} or {spec.folder}"
    if not found:
        raise SetupError(f"{spec.id}: {raw} has no folder {names}. {_expected(spec)}")
    if len(found) > 1:
        both = " and ".join(sorted(map(str, found)))
        raise SetupError(f"{spec.id}: both {both} exist. Keep one.")
    root = found[0]
    if not any(_entries(root)):
        raise SetupError(f"{spec.id}: {root} is empty. {_expected(spec)}")
    return root


def why_left_out(spec: DatasetSpec, raw: Path) -> str | None:
    """Why an ingest of all datasets passes this one over; None if it does not.

    Raises:
        SetupError: `raw` is missing.
    """
    if not raw.is_dir():
        raise SetupError(f"The raw folder {raw} does not exist. Say where it is: --raw FOLDER.")
    return spec.left_out if existing_roots(spec, raw) else "no folder"


def existing_roots(spec: DatasetSpec, raw: Path) -> list[Path]:
    """Folders under an existing `raw` that go by the id or the published name of a dataset, empty or not."""
    found: dict[tuple[int, int], Path] = {}  # by identity: id and published name may be one folder
    for name in (spec.id, spec.folder):
        for path in _expand(raw.absolute(), tuple(escape(name).split("/")), folders=True):
            if path.is_dir():
                status = path.stat()
                found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


class Found(NamedTuple):
    """A source as discovery meets it."""

    group: int
    """Number of its `images` group, ..."""
    glob: int
    """... and of the glob in it: which of two copies is kept."""
    share: str | None
    """Files that have it in common share one weight."""
    source: ImageSource


def stream_sources(spec: DatasetSpec, root: Path, names: NameKey | None = None) -> Iterator[Found]:
    """Images of a dataset as they are met; nothing is held.

    In no order; one that several globs of a group match comes several times. Whether paths and keys are
    unique, which are copies and how many share a weight is for the caller to see.

    With `names`, key and subject of a dataset whose names are private are ids, and its paths have an alias.

    Raises:
        SetupError: a path that the rules cannot describe; a table or dataset.json that is missing or malformed.
    """
    ignored = [re.compile(pattern, re.IGNORECASE) for pattern in spec.ignore]
    for number, group in enumerate(spec.images):
        channels = _channels(spec, group.channels, root) if group.channels is not None else ()
        for glob, path, cells in _paths(spec, group, root):
            name = unicodedata.normalize("NFC", path)
            if any(pattern.search(name) for pattern in ignored):
                continue
            source = _source(spec, group, root, path, name, cells, channels)
            share = None
            if group.share_among is not None and source.failure is None and source.exclude is None:
                fields = _fields(spec, group, path, name) | dict(cells)
                share = f"{number}/{group.share_among.format_map(fields)}"
            if spec.private_names and names is not None:
                source = _renamed(source, name, names)
            yield Found(number, glob, share, source)


def found_twice(spec: DatasetSpec, path: str, group: int) -> SetupError:
    return SetupError(f"{spec.id}: {path} is found by two of the `images` groups, the last [{group}].")


def same_key(spec: DatasetSpec, key: str, path: str, other: str) -> SetupError:
    return SetupError(
        f"{spec.id}: {path} and {other} both have the key {key!r}. If one is a copy, move it away; else the "
        "`key` in datasets.yaml needs more of the path."
    )


def nothing_found(spec: DatasetSpec, root: Path) -> SetupError:
    return SetupError(f"{spec.id}: no image found in {root}. {_expected(spec)}")


def _source(
    spec: DatasetSpec,
    group: ImageGroup,
    root: Path,
    path: str,
    name: str,
    cells: Mapping[str, str],
    channels: tuple[str, ...],
) -> ImageSource:
    """Describe one path. One that cannot be used gets a source that fails, so that it stops none of the others.

    Args:
        name: its NFC form, which rules and keys go by.
        cells: what a table says of it.
        channels: modalities of the volumes of every file, if dataset.json names them.
    """
    if not f"{name}{''.join(cells.values())}".isprintable():
        # A row needs text: what is none is spelled out, and there is no need to find the file again.
        path = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
        return _unusable(spec, group, root, path, "unusable_name", _RENAME_ODD)
    if _leads_out(name):
        return _unusable(spec, group, root, path, "outside_root", _MEND_TABLE)
    fields = _fields(spec, group, path, name) | dict(cells)
    key = group.key.format_map(fields)
    subject = key if group.subject is None else group.subject.format_map(fields)
    if not key or not subject:
        raise SetupError(
            f"{spec.id}: {path!r} gives the key {key!r} and the subject {subject!r}. Neither may be empty: "
            "rename the file, or extend `key` or `subject` in datasets.yaml."
        )
    if _VOLUME_KEY.search(key):
        return _unusable(spec, group, root, path, "unusable_name", _RENAME_VOLUME)
    volumes = channels or group.volumes
    rule = next((rule for rule in group.modality if _matches(rule, name, fields)), None)
    upstream: str | None
    if rule is not None:
        modality, upstream = rule.modality, rule.upstream_modality or group.upstream_modality or rule.modality
    elif volumes:
        modality, upstream = volumes[0], group.upstream_modality
    else:
        raise SetupError(
            f"{spec.id}: no `modality` rule in datasets.yaml matches {path}{_told(group, fields)}."
        )
    exclusion = next((rule for rule in spec.exclusions if _matches(rule, name, fields)), None)
    return ImageSource(
        dataset=spec.id,
        key=key,
        subject=subject,
        path=path,
        root=root,
        format=group.format,
        dimension=group.dimension,
        modality=modality,
        upstream_modality=upstream,
        volume_modalities=volumes,
        body_part=group.body_parts,
        depth_axis=group.depth_axis,
        weight=spec.sampling_weight,
        share_weight=group.share_weight,
        exclude=("declared", f"{exclusion.reason}. {_IF_WRONG}") if exclusion else None,
    )


def _unusable(
    spec: DatasetSpec, group: ImageGroup, root: Path, path: str, reason: str, message: str
) -> ImageSource:
    """A source that fails with a reason. Its path is its key, for the rules may not be able to tell one."""
    return ImageSource(
        dataset=spec.id,
        key=path,
        subject=path,
        path=path,
        root=root,
        format=group.format,
        dimension=group.dimension,
        modality=group.modalities[0],
        failure=(reason, message),
    )


def _fields(spec: DatasetSpec, group: ImageGroup, path: str, name: str) -> dict[str, str]:
    """What the named groups of `path` say."""
    match = re.fullmatch(group.path, name, re.IGNORECASE)
    if match is None:
        raise SetupError(
            f"{spec.id}: {path} looks like an image, but does not match `path` {group.path!r}. If it does not "
            "belong to the dataset, move it away; else extend `path` or `ignore` in datasets.yaml."
        )
    return match.groupdict(default="")


def _renamed(source: ImageSource, name: str, names: NameKey) -> ImageSource:
    """The source under ids; `name` is its path as rules and keys go by it."""
    return replace(
        source,
        key=names.id(source.dataset, "key", source.key),
        subject=names.id(source.dataset, "subject", source.subject),
        alias=names.id(source.dataset, "path", name),
    )


def _matches(rule: ModalityRule | Exclusion, name: str, fields: Mapping[str, str]) -> bool:
    text = name if rule.field is None else fields.get(rule.field)
    return text is not None and re.search(rule.match, text, re.IGNORECASE) is not None


def _told(group: ImageGroup, fields: Mapping[str, str]) -> str:
    """The fields that the modality rules of a group look at, as ` (description 'AX')`."""
    looked_at = dict.fromkeys(rule.field for rule in group.modality if rule.field is not None)
    return f" ({', '.join(f'{field} {fields[field]!r}' for field in looked_at)})" if looked_at else ""


def _channels(spec: DatasetSpec, channels: ChannelNames, root: Path) -> tuple[str, ...]:
    """Modalities of the volumes of each file, as the dataset's dataset.json names them.

    Raises:
        SetupError: no such file, or one that cannot be read, has no names or one that the entry does not know.
    """
    files = sorted(_glob(root, channels.file))
    if not files:
        raise SetupError(
            f"{spec.id}: {root} has no {channels.file}, which names the channels. {_expected(spec)}"
        )
    try:
        told = json.loads(files[0].read_text(encoding="utf-8-sig"))
        names = told.get("channel_names", told.get("modality"))
        ordered = [str(names[str(position)]).strip() for position in range(len(names))]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise SetupError(
            f"{spec.id}: {files[0]} must be JSON with `modality` or `channel_names`, as in "
            f'{{"modality": {{"0": "CT"}}}}. Take the original of the download. ({type(error).__name__})'
        ) from error
    known = {name.casefold(): modality for name, modality in channels.names.items()}
    unknown = [name for name in ordered if name.casefold() not in known]
    if unknown or not ordered:
        problem = f"names the channel {unknown[0]!r}" if unknown else "names no channel"
        raise SetupError(
            f"{spec.id}: {files[0]} {problem}; known: {', '.join(channels.names)}. Extend `names` of "
            "`channels` in datasets.yaml."
        )
    return tuple(known[name.casefold()] for name in ordered)


def _paths(spec: DatasetSpec, group: ImageGroup, root: Path) -> Iterator[tuple[int, str, Mapping[str, str]]]:
    """What globs or table of a group find: number of the glob, path below the root, cells of the table."""
    if group.table is not None:
        yield from ((0, path, cells) for path, cells in _listed(spec, group.table, root))
    for number, glob in enumerate(group.globs):
        for path in _glob(root, glob):
            yield number, path.relative_to(root).as_posix(), {}


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
        elif dangling or (_is_folder(entry) if folders else not _is_folder(entry) or "." in part):
            yield path  # pipes, and folders named as files, too: reading them fails with a reason


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


def _listed(spec: DatasetSpec, table: Table, root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Folders that the rows of a dataset's table name and that are there, each with its cells."""
    files = sorted({file for glob in table.files for file in _glob(root, glob)})
    if not files:
        raise SetupError(f"{spec.id}: {root} has no {' or '.join(table.files)}. {_expected(spec)}")
    # A table has a row a series, far fewer than there are files.
    listed: dict[str, dict[str, str]] = {}
    folder_of: dict[str, str] = {}
    for file in files:
        for folder, cells, series in _rows(spec, table, root, file):
            earlier = folder_of.get(series) if series else None
            if earlier is not None:
                listed.pop(earlier, None)
            folder_of[series] = folder
            listed[folder] = cells
    missing = 0
    for folder, cells in listed.items():
        if _leads_out(folder) or (root / folder).is_dir():
            yield folder, cells
        else:
            missing += 1
    if missing:
        _log.warning("%s: %d of %d listed series are not there.", spec.id, missing, len(listed))


def _rows(spec: DatasetSpec, table: Table, root: Path, file: Path) -> Iterator[tuple[str, dict[str, str], str]]:
    """Of a table's wanted rows: folder relative to the root, cells by name, what the series is known by."""
    wanted = {
        column.casefold(): {value.casefold() for value in ([values] if isinstance(values, str) else values)}
        for column, values in table.where.items()
    }
    for number, values in _lines(spec, table, file):
        if any(values[column].casefold() not in allowed for column, allowed in wanted.items()):
            continue
        location = values[table.folder_column.casefold()]
        folder = _placed(file.parent.relative_to(root), location)
        if folder is None:
            raise SetupError(
                f"{spec.id}: {file}, line {number}: {table.folder_column!r} must name a folder below that of "
                f"the table, not {location!r}."
            )
        yield (
            folder,
            {name: values[column.casefold()] for name, column in table.columns.items()},
            "" if table.unique is None else values[table.unique.casefold()],
        )


def _lines(spec: DatasetSpec, table: Table, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row of a table: the number of its line, and its cells by the column's name in lower case."""
    named = (table.folder_column, *table.where, *table.columns.values(), *filter(None, [table.unique]))
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream)
            names = {name.strip().casefold(): index for index, name in enumerate(next(lines, []))}
            for column in named:
                if column.casefold() not in names:
                    raise SetupError(
                        f"{spec.id}: {file} has no column {column!r}, only: {', '.join(names) or 'nothing'}."
                    )
            for row in filter(None, lines):
                cells = row + [""] * (len(names) - len(row))
                yield lines.line_num, {name: cells[index].strip() for name, index in names.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SetupError(f"{spec.id}: {file} cannot be read as CSV: {error}.") from error


def files_opened(spec: DatasetSpec, root: Path) -> list[Path]:
    """The files that `find_sources` reads: tables, and lists of channels."""
    globs = [glob for group in spec.images if group.table is not None for glob in group.table.files]
    globs += [group.channels.file for group in spec.images if group.channels is not None]
    return sorted({file for glob in globs for file in _glob(root, glob)})


def listed_folders(spec: DatasetSpec, root: Path) -> set[str]:
    """All folders that the tables of a dataset list, wanted or not, relative to the root.

    Raises:
        SetupError: a table is missing or malformed.
    """
    listed: set[str] = set()
    for table in (group.table for group in spec.images if group.table is not None):
        for file in {file for glob in table.files for file in _glob(root, glob)}:
            for _, values in _lines(spec, table, file):
                folder = _placed(file.parent.relative_to(root), values[table.folder_column.casefold()])
                if folder is not None and not _leads_out(folder):
                    listed.add(folder)
    return listed


def _placed(start: Path, location: str) -> str | None:
    """A table's `./a/b` or `.\\a\\b` relative to the root; as it is where it leads out; None if empty."""
    path = PurePosixPath(location.replace("\\", "/"))
    if not path.parts:
        return None
    return (
        path.as_posix() if _leads_out(path.as_posix()) else (PurePosixPath(start.as_posix()) / path).as_posix()
    )


def _leads_out(path: str) -> bool:
    return path.startswith("/") or ".." in PurePosixPath(path).parts


def expected_layout(spec: DatasetSpec) -> str:
    """The layout in words, for who has none of it."""
    patterns: list[str] = []
    for group in spec.images:
        patterns += group.globs
        if group.table is not None:
            patterns.append(f"{' or '.join(group.table.files)} with the folders it lists")
    return f"Expected below {spec.folder}/: {'; '.join(dict.fromkeys(patterns))}."


def _expected(spec: DatasetSpec) -> str:
    address = spec.access.address if spec.access is not None else None
    offered = f" It is offered at {address}." if address else ""
    if spec.download is not None or (spec.access is not None and spec.access.steps):
        offered += f" `pumit-data download {spec.id}` gets it, or says how to."
    return f"{expected_layout(spec)}{offered}"
