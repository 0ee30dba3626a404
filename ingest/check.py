"""A dataset's folder against the layout that its entry expects, before hours of ingest.

Discovery tells what ingest would find. One more walk of the folder tells what it would not: images in places
where no rule looks, archives that nobody unpacked, parts that are missing.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from catalog.errors import SetupError
from catalog.store import Location, RemotePath
from ingest.archives import is_archive, members
from ingest.discover import dataset_root, listed_folders
from ingest.found import find_sources
from ingest.glance import SUFFIXES, format_or_none, listing, suffix_of
from ingest.layout import Layout, Move
from ingest.source import ImageSource
from ingest.spec import DatasetSpec

_EXAMPLES = 3
_OPENED_IN_A_FOLDER = 3
"""Files without an ending that are opened, in each folder, to see whether they are DICOM."""
_SHARE_UNPACKED = 0.9
"""An archive counts as unpacked if so many of its files are there; labels may have been left out."""
_FOLDERS_KEPT = 1000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about the folder that the user should know."""

    kind: str
    """`no_folder`, `discovery`, `wrong_place`, `archive` ...: one word for scripts."""
    must_fix: bool
    """Ingest would stop, or would pass over images that are there. All else is a warning."""
    message: str
    """What is the case and what to do."""
    files: int = 0
    """How many files it is about."""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """A part as published, such as a split, and what of it is there."""

    name: str
    found: int
    published: int | None


@dataclass(frozen=True, kw_only=True)
class FolderCheck:
    """What is on disk of one dataset."""

    dataset: str
    folder: str | None
    files: int = 0
    """All files below the folder, hidden ones left out."""
    found: int = 0
    """Files and series that ingest would look at."""
    excluded: int = 0
    """Of these, the ones that the entry leaves out by name, or that are copies."""
    subjects: int | None = None
    """Null where discovery stopped."""
    published_images: int | None = None
    published_subjects: int | None = None
    parts: tuple[PartCount, ...] = ()
    findings: tuple[Finding, ...] = field(default=())

    @property
    def fine(self) -> bool:
        """Whether ingest can start: there may be warnings."""
        return not any(finding.must_fix for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fine": self.fine}


def check_dataset(spec: DatasetSpec, raw: Path, origin: RemotePath | None = None) -> FolderCheck:
    """Compare the folder of a dataset with its entry. Nothing is written, and no voxel is read.

    Args:
        origin: where the files lie, if `raw` only outlines them.

    Raises:
        SetupError: there is no raw folder, or a folder below it cannot be listed.
    """
    if origin is not None:
        return _told_of(_compared(spec, raw, origin), str(raw), str(origin))
    return _compared(spec, raw, raw)


def _told_of(check: FolderCheck, outline: str, origin: str) -> FolderCheck:
    """The check of an outline as one of what it outlines."""
    return replace(
        check,
        folder=None if check.folder is None else check.folder.replace(outline, origin),
        findings=tuple(
            replace(finding, message=finding.message.replace(outline, origin)) for finding in check.findings
        ),
    )


def _compared(spec: DatasetSpec, raw: Path, contents: Location) -> FolderCheck:
    """As `check_dataset`; `contents` holds the files that `raw` may only outline."""
    try:
        root = dataset_root(spec, raw)
    except SetupError as error:
        if not raw.is_dir():
            raise
        told = str(error).removeprefix(f"{spec.id}: ")
        message = " ".join(filter(None, [told, _elsewhere(spec, raw)]))
        return FolderCheck(
            dataset=spec.id,
            folder=None,
            findings=(Finding(kind="no_folder", must_fix=True, message=message),),
        )
    within = contents / root.relative_to(raw.absolute()).as_posix()
    stored = {unicodedata.normalize("NFC", path): path for path in listing(root)[0]}
    layout = Layout(spec)
    with _warnings_of_discovery() as warned:
        sources, problem = _discovered(spec, root)
    if sources is not None:
        found = [unicodedata.normalize("NFC", source.path) for source in sources]
        known = {*found, *listed_folders(spec, root)}
    else:
        # Discovery stops at the first fault; what it would have looked at is counted by the globs alone.
        found = list(dict.fromkeys(image for path in stored if (image := layout.image_at(path)) is not None))
        known = set(found)
    # Where nothing is in its place, `ignore` may match the images themselves.
    unexplained = _unexplained(within, stored, known, layout, heed_ignore=bool(found))
    misplaced, strays = _sorted_out(unexplained, layout, stored)
    archives = list(_archives(within, stored, layout))
    parts = tuple(_parts(spec, found))

    findings: list[Finding] = [*misplaced, *archives]
    if problem is not None and (found or not any(finding.must_fix for finding in findings)):
        findings.insert(0, Finding(kind="discovery", must_fix=True, message=problem))
    if sources is not None:
        findings += [Finding(kind="discovery", must_fix=False, message=message) for message in warned]
        findings += _counts(spec, sources, parts)
    findings += strays
    return FolderCheck(
        dataset=spec.id,
        folder=str(root),
        files=len(stored),
        found=len(found),
        excluded=sum(source.exclude is not None for source in sources or ()),
        subjects=len({source.subject for source in sources}) if sources is not None else None,
        published_images=spec.published.images,
        published_subjects=spec.published.subjects,
        parts=parts,
        findings=tuple(sorted(findings, key=lambda finding: not finding.must_fix)),
    )


def _discovered(spec: DatasetSpec, root: Path) -> tuple[list[ImageSource] | None, str | None]:
    try:
        return find_sources(spec, root), None
    except SetupError as error:
        return None, str(error).removeprefix(f"{spec.id}: ")


@contextmanager
def _warnings_of_discovery() -> Iterator[list[str]]:
    """Collect what discovery logs, such as series that a table lists and that are not there."""
    told: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log, collector = logging.getLogger("ingest.discover"), Collector(logging.WARNING)
    propagated, log.propagate = log.propagate, False
    log.addHandler(collector)
    try:
        yield told
    finally:
        log.removeHandler(collector)
        log.propagate = propagated


def _elsewhere(spec: DatasetSpec, raw: Path) -> str | None:
    """Advice for a dataset whose folder is not there: another folder that may be it."""
    layout = Layout(spec)
    names = sorted(entry.name for entry in raw.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    tops = {top.casefold() for top in layout.tops()}
    for name in names:
        if name.casefold() in tops:
            return f"{raw / name} looks like it: make the folder {raw / spec.folder} and move {name} into it."
    folded = {name.casefold(): name for name in names}
    for wanted in (spec.folder.split("/")[-1], spec.id):
        for close in difflib.get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.75):
            return f"Is it {raw / folded[close]}? Rename that to {spec.folder}."
    return None


def _unexplained(
    root: Location, stored: Mapping[str, str], known: set[str], layout: Layout, *, heed_ignore: bool
) -> Iterator[str]:
    """Image files, and tables in the wrong place, that are neither known nor declared to be no images.

    Args:
        stored: paths in Unicode NFC, to the file system's own spelling.
        known: files, and folders of series, that need no explanation.
        heed_ignore: whether to leave out what the entry ignores.
    """
    opened: Counter[str] = Counter()
    for path, own_spelling in stored.items():
        folder, _, name = path.rpartition("/")
        suffix = suffix_of(name).lower()
        if path in known or folder in known or (suffix and suffix not in SUFFIXES):
            if layout.is_companion(path) and not layout.fits(path):
                yield path
        elif not (heed_ignore and layout.is_ignored(path)):
            if suffix:
                yield path
            elif opened[folder] < _OPENED_IN_A_FOLDER:
                opened[folder] += 1
                if format_or_none(root / own_spelling) is not None:
                    yield path


@dataclass
class _Group:
    """Files of one kind in folders that differ in numbers only."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)

    def add(self, path: str, folder: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(path)
        if len(self.folders) < _FOLDERS_KEPT:
            self.folders.add(folder)


def _sorted_out(
    paths: Iterable[str], layout: Layout, files: Mapping[str, str]
) -> tuple[list[Finding], list[Finding]]:
    """Files that a move would bring to their place, and files that are simply not expected."""
    groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
    for path in paths:
        folder, _, name = path.rpartition("/")
        groups[_general(folder), suffix_of(name).lower()].add(path, folder)
    moves: dict[Move, _Group] = defaultdict(_Group)
    at_their_place: dict[Move, str] = {}
    strays: list[Finding] = []
    for (folder, suffix), group in sorted(groups.items(), key=lambda item: (-item[1].count, item[0])):
        mended = layout.mend(group.examples[0])
        if mended is not None and (mended[1] in files or not _far_fetched(mended[0], files)):
            move = _for_all(mended[0], group.folders)
            moves[move].count += group.count
            moves[move].examples += group.examples
            if mended[1] in files:
                at_their_place[move] = mended[1]
            continue
        if layout.is_ignored(group.examples[0]):
            continue
        kind = f"{suffix} files" if suffix else "DICOM files without an ending"
        strays.append(
            Finding(
                kind="unexpected",
                must_fix=False,
                message=f"{group.count} {kind} in {folder or 'the folder itself'} are not expected there: "
                "ingest passes over them. Move them away, or tell datasets.yaml what they are.",
                files=group.count,
                examples=tuple(group.examples),
            )
        )
    return [_misplaced(move, group, at_their_place.get(move)) for move, group in moves.items()], strays


def _far_fetched(move: Move, files: Iterable[str]) -> bool:
    """Whether the folder that files would go to is there, and they are hardly what it lacks.

    A logo beside `images/`, or a folder with thumbnails, would fit by name; it need not move for that.
    """
    loose = move.kind == "into" and move.source.rpartition("/")[2].startswith("*")
    if move.kind != "rename" and not loose:
        return False
    return any(path.startswith(f"{move.target}/") for path in files)


def _misplaced(move: Move, group: _Group, twin: str | None) -> Finding:
    if twin is not None:
        return Finding(
            kind="copy",
            must_fix=False,
            message=f"{group.count} files at {move.source} lie at their place as well, such as {twin}: ingest "
            "passes over these copies.",
            files=group.count,
            examples=tuple(group.examples[:_EXAMPLES]),
        )
    return Finding(
        kind="wrong_place",
        must_fix=True,
        message=f"{group.count} files lie where no rule looks. {move.told()}",
        files=group.count,
        examples=tuple(group.examples[:_EXAMPLES]),
    )


def _for_all(move: Move, folders: Iterable[str]) -> Move:
    """The same move for all folders of a group: its numbers become wildcards where they differ."""
    depth = len(move.source.split("/"))
    if len({"/".join(folder.split("/")[:depth]) for folder in folders}) == 1:
        return move
    return Move(move.kind, _general(move.source), _general(move.target))


def _general(folder: str) -> str:
    """`patient*/series` of `patient001/series`; a UID is one number."""
    return re.sub(r"\d+(?:\.\d+)*", "*", folder)


def _archives(root: Location, files: Iterable[str], layout: Layout) -> Iterator[Finding]:
    """Archives that hold images which are not there yet, and the others."""
    archives = []
    endings = set()
    for path in files:
        if is_archive(path):
            archives.append(path)
        else:
            endings.add(_ending(path))
    for archive in archives:
        names = [name for name in members(root / archive) if suffix_of(name).lower() in SUFFIXES]
        folder = archive.rpartition("/")[0]
        inside = [f"{folder}/{name}".removeprefix("/") for name in names]
        wanted = [path for path in inside if layout.fits(path) or layout.mend(path) is not None]
        there = sum(_ending(name) in endings for name in wanted)
        if wanted and there < _SHARE_UNPACKED * len(wanted):
            told = "is not unpacked" if there == 0 else "is unpacked only in part"
            yield Finding(
                kind="archive",
                must_fix=True,
                message=f"{archive} {told}. Unpack it where it lies.",
                files=1,
                examples=tuple(names[:_EXAMPLES]),
            )
        elif not wanted:
            unknown = "cannot be looked into" if not names else "holds nothing that ingest would find"
            yield Finding(
                kind="archive",
                must_fix=False,
                message=f"{archive} {unknown}. If you have unpacked it, it may be deleted.",
                files=1,
            )


def _ending(path: str) -> str:
    """The last folder and the name: what stays of a path wherever an archive is unpacked."""
    return "/".join(path.split("/")[-2:])


def _parts(spec: DatasetSpec, found: Sequence[str]) -> Iterator[PartCount]:
    for part in spec.published.parts:
        yield PartCount(name=part.name, found=sum(map(part.covers, found)), published=part.images)


def _counts(spec: DatasetSpec, sources: Sequence[ImageSource], parts: Sequence[PartCount]) -> Iterator[Finding]:
    """What differs from the published numbers; of the whole only where no part is to blame."""
    for part in parts:
        if part.found == 0:
            expected = f" It has {part.published} images." if part.published else ""
            message = f"The part {part.name} is missing.{expected} The others can be ingested without it."
            yield Finding(kind="missing_part", must_fix=False, message=message)
        elif part.published is not None and part.found != part.published:
            yield _differs(f"The part {part.name} has", part.found, part.published, "images")
    if all(part.found and part.found == (part.published or part.found) for part in parts):
        subjects = len({source.subject for source in sources})
        numbers = [
            (len(sources), spec.published.images, "images"),
            (subjects, spec.published.subjects, "subjects"),
        ]
        for found, published, what in numbers:
            if published is not None and found != published:
                yield _differs("There are", found, published, what)


def _differs(told: str, found: int, published: int, what: str) -> Finding:
    likely = "Is the download complete?" if found < published else "Another release, or copies?"
    return Finding(
        kind="fewer" if found < published else "more",
        must_fix=False,
        message=f"{told} {found} {what}; published are {published}. {likely}",
    )


def render(check: FolderCheck, console: Console) -> None:
    """Print what was found, what must be fixed, and what the user should know."""
    console.print(Text.assemble((check.dataset, "bold"), f": {check.folder or 'not there'}"))
    if check.folder is not None:
        console.print(Text(f"  {_summary(check)}"))
    for part in check.parts:
        console.print(Text(f"  {part.name}: {part.found}{_of(part.published)}"))
    for finding in check.findings:
        label, style = ("must be fixed", "red") if finding.must_fix else ("warning", "yellow")
        console.print(Text.assemble("  ", (label, style), f": {finding.message}"))
        for example in finding.examples:
            console.print(Text(f"      {example}"))
    if check.fine:
        console.print(Text(f"  Ready: pumit-data ingest {check.dataset}"))


def _summary(check: FolderCheck) -> str:
    told = [f"{check.found}{_of(check.published_images)} images found"]
    if check.subjects is not None:
        told.append(f"{check.subjects}{_of(check.published_subjects)} subjects")
    if check.excluded:
        told.append(f"{check.excluded} left out by name or as copies")
    return f"{', '.join(told)}; {check.files} files in all"


def _of(published: int | None) -> str:
    return f" of {published}" if published is not None else ""
