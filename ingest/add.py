"""A first entry of datasets.yaml for a user's own folder: guessed from names and headers, and said so.

Nothing is asked and nothing is ingested. The entry is checked by finding the images with it: it must find just
those that were seen.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from catalog.errors import SetupError
from ingest.discover import dataset_root
from ingest.draft import Draft
from ingest.found import find_sources
from ingest.glance import survey
from ingest.source import ImageSource
from ingest.spec import DatasetSpec, load_specs, own_file, problems_of, shipped_file

_SAMPLES = 6
_HEADER = (
    "# Own datasets in this folder, one entry each; `pumit-data add` writes them, and you may edit them.\n"
)


@dataclass(frozen=True)
class Proposal:
    """An entry that finds what is in the folder."""

    spec: DatasetSpec
    text: str
    """The entry as YAML with comments."""
    raw: Path
    """The folder to give as --raw."""
    sources: list[ImageSource]
    """What the entry finds."""
    warnings: list[str]
    """What the user must look at."""
    labels: list[str]
    others: list[str]

    @property
    def file(self) -> Path:
        """Where `write_entry` puts the entry."""
        return own_file(self.raw)


def propose(
    folder: Path, raw: Path | None = None, dataset: str | None = None, title: str | None = None
) -> Proposal:
    """Look at a folder and propose an entry for it.

    Args:
        raw: the raw folder that holds it, at any depth; by default the folder above it.
        dataset: id of the entry; by default made from the folder's name.
        title: by default the folder's name.

    Raises:
        SetupError: the folder or its images are not there; `raw` does not hold it; the id is taken or no id;
            DICOM slices lie in `folder` itself.
    """
    root = _absolute(folder)
    if not root.is_dir():
        raise SetupError(f"There is no folder {folder}.")
    home = root.parent if raw is None else _absolute(raw)
    if root == home or not root.is_relative_to(home):
        raise SetupError(
            f"{folder} does not lie in the raw folder {home}. Move it there or link it "
            f"(`ln -s {root} {home}/`), or leave --raw out: then {root.parent} is taken."
        )
    place = root.relative_to(home).as_posix()
    if any(part.startswith((".", "__MACOSX")) for part in place.split("/")):
        raise SetupError(f"{folder}: names that begin with a dot are never looked at. Rename the folder.")
    name = dataset or _identifier(root.name)
    _check_free(name, home)

    seen = survey(root)
    if not seen.images:
        raise SetupError(
            f"{folder} holds no image that ingest reads: {len(seen.files)} files, {len(seen.labels)} of them "
            "masks by name. NIfTI, DICOM, MHA, NRRD, PNG, JPEG, BMP and TIFF are read."
        )
    if any(image.path == "." for image in seen.images):
        raise SetupError(
            f"{folder} itself holds the slices of a DICOM series. A dataset has a folder for each series: move "
            "them into one, named after the patient (and one more below for the series, if there are several)."
        )
    draft = Draft(root, seen)
    text = draft.entry(name, title or root.name, place)
    try:
        spec = DatasetSpec.model_validate(yaml.safe_load(text)[0])
    except ValidationError as error:
        raise SetupError("\n".join(f"{name}{problem}" for problem in problems_of(error))) from error
    if not dataset_root(spec, home).samefile(root):
        raise SetupError(f"{home} has another folder {name} or {place}. Choose another --id.")
    sources = find_sources(spec, root)
    wanted = {image.path for image in seen.images}
    if differing := sorted(wanted ^ {source.path for source in sources}):
        raise SetupError(
            f"{folder} is laid out in a way that no simple rule describes: {len(differing)} files or folders "
            f"are not told apart, such as {differing[0]}. Sort them, or write the entry by hand, from this "
            f"draft:\n{text}"
        )
    return Proposal(
        spec, text, home, sources, draft.warnings, [label.path for label in seen.labels], seen.others
    )


def write_entry(proposal: Proposal) -> Path:
    """Append the entry to `datasets.yaml` in the raw folder, which is made if need be; returns its path.

    Raises:
        SetupError: the file is the one that comes with PUMIT-data, is no list of entries, or cannot be written.
    """
    file = proposal.file
    if file.exists() and file.samefile(shipped_file()):
        raise SetupError(
            f"{file} comes with PUMIT-data; own entries do not go there. Put the dataset into another raw "
            "folder, or copy the entry yourself."
        )
    try:
        earlier = file.read_text(encoding="utf-8") if file.exists() else _HEADER
        merged = f"{earlier.rstrip()}\n\n{proposal.text}"
        temporary = file.with_name(f".tmp-{file.name}")
        try:
            temporary.write_text(merged, encoding="utf-8")
            if load_specs(temporary).get(proposal.spec.id) != proposal.spec:
                raise SetupError(f"{file}: its form does not allow adding to its end. Copy the entry into it.")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"{file} cannot be written: {error.strerror or error}. Copy the entry into it."
        ) from error
    return file


def render(proposal: Proposal, console: Console) -> None:
    """Print what the entry finds and what to look at."""
    sources = proposal.sources
    subjects = {source.subject for source in sources}
    modalities = Counter(source.modality for source in sources)
    counts = ", ".join(f"{count} {modality}" for modality, count in sorted(modalities.items()))
    console.print(Text(f"Finds {len(sources)} files or series of {len(subjects)} subjects: {counts}."))
    table = Table("key", "subject", "modality", "path", title="Some of them", title_justify="left")
    step = max(1, len(sources) // _SAMPLES)
    for source in sources[::step][:_SAMPLES]:
        table.add_row(*map(Text, (source.key, source.subject, source.modality, source.path)))
    console.print(table)
    for paths, what in ((proposal.labels, "masks or annotations, by name"), (proposal.others, "no image")):
        if paths:
            console.print(Text(f"Left out as {what}: {len(paths)}, such as {paths[0]}."))
    for warning in dict.fromkeys(proposal.warnings):
        console.print(Text(f"Check: {warning}"))
    console.print(
        "Check: folder and file names go into the catalog. If they hold persons' names, birth dates or "
        "hospital numbers, rename them first."
    )


def _identifier(name: str) -> str:
    found = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not found:
        raise SetupError(f"No id can be made of the folder's name {name!r}. Give one: --id my-scans.")
    return found


def _check_free(name: str, raw: Path) -> None:
    known = load_specs(raw=raw).get(name)
    if known is not None:
        raise SetupError(
            f"The id {name!r} is taken by {known.title!r}. If this folder is that dataset, it has its entry: "
            f"`pumit-data ingest {name} --raw {raw}`. Else choose another id: --id NAME."
        )


def _absolute(path: Path) -> Path:
    """Links stay as they are: a dataset may be a link in the raw folder."""
    return path.resolve() if ".." in path.parts else path.absolute()
