"""datasets.yaml, validated: what is declared of each dataset, and nothing that needs code.

An entry describes how the files of a dataset are found and what their paths say of them. Paths are relative to
the dataset's folder, with forward slashes and in Unicode NFC; globs and regular expressions ignore case.

A user's own entries lie in `datasets.yaml` of the raw folder, beside the images, and add to the shipped ones.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from catalog.errors import SetupError
from ingest.access import Access, Download, Folder
from ingest.citation import Citation
from ingest.declared import Declared, Regex, Text, checked_relative, not_empty, path_parts
from ingest.source import DepthAxis, Format

_Item = TypeVar("_Item")

Kind = Literal["CT", "MRI", "PET", "XR", "US", "OCT", "fundus"]
"""What stands before the first slash of a modality; the sequence follows, as in MRI/T2-FLAIR."""


def _checked_glob(glob: str) -> str:
    *folders, last = path_parts(checked_relative(glob))
    if "**" in last or any("**" in part and part != "**" for part in folders):
        raise ValueError(f"{glob!r}: '**' must stand alone between slashes, and not at the end")
    return glob


def checked_modality(modality: str) -> str:
    """The modality itself; ValueError if it does not begin with a known kind."""
    kinds = get_args(Kind)
    if modality.split("/")[0] not in kinds:
        raise ValueError(f"{modality!r} must be one of {', '.join(kinds)}, with the sequence after a slash")
    return modality


Glob = Annotated[str, AfterValidator(_checked_glob)]
Modality = Annotated[str, AfterValidator(checked_modality)]
FieldName = Annotated[str, Field(pattern=r"^[a-z_]+$")]


class ModalityRule(Declared):
    """Modality of the files whose path, or one field of it, matches."""

    match: Regex
    """Searched in the path; the first rule that matches decides."""
    field: Text | None = None
    """Search in this named group of `path`, or in this of the table's `columns`, instead of the whole path."""
    modality: Modality
    upstream_modality: Text | None = None
    """The same in the words of the reference implementation, where they differ."""


class Exclusion(Declared):
    """Images that are left out by name: they get a catalog row with the reason `declared`."""

    match: Regex
    """Searched in the path."""
    field: Text | None = None
    """As in a modality rule. Images of a group without the field are not affected."""
    reason: Text


class Table(Declared):
    """A CSV file that comes with the dataset and lists one folder a row, as TCIA's metadata.csv does."""

    files: Annotated[tuple[Glob, ...], AfterValidator(not_empty)]
    """Globs of the CSV files; several files are read as one table."""
    folder_column: Text
    """Column with the folder of a series, relative to the folder of the CSV file."""
    where: Mapping[Text, str | tuple[str, ...]] = Field(default_factory=dict)
    """Column to value, or to several: only rows that have one of them, in every column named. Case and outer
    blanks are ignored."""
    columns: Mapping[FieldName, Text] = Field(default_factory=dict)
    """Name to column: cells that templates and rules use beside the named groups of `path`."""
    unique: Text | None = None
    """Column whose values name a series once: of several rows with one value, the last counts."""


class ChannelNames(Declared):
    """A dataset.json, as the Decathlon and nnU-Net have it, names what the volumes of a 4-D file are.

    Its `modality` (or `channel_names`) maps the position of a volume, from "0" on, to a name. A file with one
    channel is an ordinary 3-D file.
    """

    file: Glob
    names: Mapping[Text, Modality]
    """Name in dataset.json, in any case, to modality here."""


def _constant_as_rule(modality: Any) -> Any:
    return [{"match": "", "modality": modality}] if isinstance(modality, str) else modality


class ImageGroup(Declared):
    """Files of one dataset that are found and described by the same rule."""

    globs: tuple[Glob, ...] = ()
    """What is an image: files; or folders, where the glob ends in a slash (a DICOM series is a folder).
    `**` stands for any number of folders. Names that begin with a dot are never matched."""
    table: Table | None = None
    """Instead of globs: the folders that a table lists."""
    format: Format
    dimension: Literal[2, 3]
    path: Regex
    """Must match the whole path of every image; its named groups fill the templates below."""
    key: Text
    """Template of the key, such as `{patient}-{study}`."""
    subject: Text | None = None
    """Template of the subject; without it every image counts as a person of its own."""
    modality: Annotated[tuple[ModalityRule, ...], BeforeValidator(_constant_as_rule)] = ()
    """A constant, or rules on the path. A path that no rule matches is an error."""
    volumes: tuple[Modality, ...] = ()
    """Instead of `modality`: those of the volumes of a 4-D file, in their order. A file with more or fewer is
    excluded."""
    channels: ChannelNames | None = None
    """Instead of `modality`: what the dataset's own dataset.json says of the volumes of each file."""
    upstream_modality: Text | None = None
    """For all images whose rule names none; by default the modality itself."""
    body_parts: tuple[Text, ...] = ()
    depth_axis: DepthAxis | None = None
    """How the images were scanned, if the dataset's official description says so."""
    share_weight: bool | Literal["after-first"] = False
    """The n volumes of a 4-D file share its weight: (2n - 1) / n^2 of it each. `after-first`: the first, as the
    b = 0 image of a diffusion series, keeps the whole weight, and the others share it."""
    share_among: Text | None = None
    """Template: the n files of this group that it gives one value share the weight, (2n - 1) / n^2 each, as the
    volumes of one file do with `share_weight`."""

    @property
    def modalities(self) -> list[str]:
        """All modalities the rules can give, in their order."""
        named = self.channels.names.values() if self.channels is not None else ()
        return _distinct([*(rule.modality for rule in self.modality), *self.volumes, *named])

    @property
    def fields(self) -> list[str]:
        """Names that templates and rules may use."""
        return [*re.compile(self.path).groupindex, *(self.table.columns if self.table is not None else ())]

    @model_validator(mode="after")
    def _consistent(self) -> ImageGroup:
        if bool(self.globs) == (self.table is not None):
            raise ValueError("needs either `globs` or `table`")
        if bool(self.modality) + bool(self.volumes) + (self.channels is not None) != 1:
            raise ValueError("needs one of `modality`, `volumes` and `channels`")
        if self.format != "dicom" and any(glob.endswith("/") for glob in self.globs):
            raise ValueError("a glob that ends in a slash names folders: only format 'dicom' has them")
        if len(set(self.fields)) != len(self.fields):
            raise ValueError("a named group of `path` and one of the table's `columns` have the same name")
        for name in ("key", "subject", "share_among"):
            _check_template(name, getattr(self, name) or "", self.fields)
        for rule in self.modality:
            if rule.field is not None and rule.field not in self.fields:
                raise ValueError(f"`modality` uses the field {rule.field!r}; {_allowed(self.fields)}")
        return self


def _check_template(name: str, template: str, fields: list[str]) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name} {template!r} is no template: {error}") from error
    for _, field, form, conversion in parts:
        if field is not None and (field not in fields or form or conversion):
            raise ValueError(f"{name} {template!r} uses {{{field}}}; {_allowed(fields)}")


def _allowed(fields: list[str]) -> str:
    names = ", ".join(f"{{{known}}}" for known in fields)
    return f"allowed: {names or 'none, `path` has no named group'}"


DatasetId = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class Part(Declared):
    """A split or an archive of a dataset, which may be missing on disk."""

    name: Text
    match: Regex
    """Searched in the path of an image: does it belong to this part?"""
    images: Annotated[int, Field(gt=0)] | None = None
    """Number of files or series in this part, as published."""

    def covers(self, path: str) -> bool:
        """Whether an image belongs to this part, by its path in Unicode NFC."""
        return re.search(self.match, path, re.IGNORECASE) is not None


class Published(Declared):
    """How large the dataset is according to its publisher. Null is unknown."""

    images: Annotated[int, Field(gt=0)] | None = None
    """Number of files or series that ingest should find."""
    subjects: Annotated[int, Field(gt=0)] | None = None
    gigabytes: Annotated[float, Field(gt=0)] | None = None
    """Size on disk after unpacking, in 10^9 bytes."""
    parts: tuple[Part, ...] = ()
    note: Text | None = None
    """What the numbers count, and what is uncertain about them."""


class DatasetSpec(Declared):
    """One entry of datasets.yaml."""

    id: DatasetId
    title: Text
    folder: Folder
    """Published name: how the folder is called where the id is not used. May have several levels."""
    images: Annotated[tuple[ImageGroup, ...], AfterValidator(not_empty)]
    ignore: tuple[Regex, ...] = ()
    """Searched in the path: files that are no images (labels, masks), whether a glob matches them or not."""
    exclusions: tuple[Exclusion, ...] = ()
    one_copy: bool = False
    """Of files with the same bytes only the first is an image: groups in their order, then globs in theirs,
    then paths. The others are excluded as `duplicate`."""
    sampling_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the dataset: factor on the weight of each of its images."""
    private_names: bool = False
    """Names of files and folders may identify people: key, subject and path enter catalog, shards and logs as
    keyed ids. A user's own entry has it unless it says false."""
    left_out: Text | None = None
    """Why `--all` leaves this dataset out; it can still be asked for by name. The mixes that come with
    PUMIT-data leave out those of the entries that come with it."""
    published: Published = Published()
    notes: tuple[Text, ...] = ()
    """What a user should know of the dataset that no other field says."""
    licence: Text | None = None
    """As the publisher states it; null where none is stated."""
    access: Access | None = None
    """How the publisher offers it."""
    download: Download | None = None
    """How `pumit-data download` gets it, where anybody may have it without an account."""
    citation: tuple[Citation, ...] = ()

    @model_validator(mode="after")
    def _known_fields(self) -> DatasetSpec:
        fields = _distinct(field for group in self.images for field in group.fields)
        for rule in self.exclusions:
            if rule.field is not None and rule.field not in fields:
                raise ValueError(f"`exclusions` uses the field {rule.field!r}; {_allowed(fields)}")
        return self

    @property
    def modalities(self) -> list[str]:
        """All modalities the rules can give, in their order."""
        return _distinct(modality for group in self.images for modality in group.modalities)

    @property
    def body_parts(self) -> list[str]:
        return _distinct(part for group in self.images for part in group.body_parts)

    @property
    def dimensions(self) -> list[int]:
        return sorted({group.dimension for group in self.images})

    @property
    def formats(self) -> list[str]:
        return _distinct(group.format for group in self.images)

    def entry_hash(self, *, lossless: bool = False) -> str:
        """sha256 (hexadecimal) of what shapes catalog rows and voxels: fields, and how floats are stored.

        Title, licence, access, download and citation do not; nor does `ignore`, which only keeps files out.
        Fields at their default are left out, so that a new optional field changes no hash.
        """
        shaping = self.model_dump(
            mode="json",
            include={"id", "images", "exclusions", "one_copy", "private_names", "sampling_weight"},
            exclude_defaults=True,
        )
        if lossless:
            shaping["lossless"] = True
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def _distinct(items: Iterable[_Item]) -> list[_Item]:
    return list(dict.fromkeys(items))


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that does not let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def load_specs(path: Path | None = None, *, raw: Path | None = None) -> dict[str, DatasetSpec]:
    """All entries of datasets.yaml by id, in the file's order.

    Args:
        path: another file of the same form; by default the one that belongs to this installation.
        raw: folder whose own `datasets.yaml`, if it has one, adds a user's entries to the shipped ones.
            `pumit-data add --write` puts them there, and there they travel with the images.

    Raises:
        SetupError: a file cannot be read or parsed, an entry is wrong, or an own entry has the id of a
            shipped one. The message has a line for each problem, with file, entry, field and what is allowed.
    """
    specs = dict(_shipped_specs()) if path is None else _load(path)
    own = own_file(raw) if raw is not None else None
    if own is None or not own.exists():
        return specs
    for spec in _load(own, private_names=True).values():
        # An equal entry is no clash: a checkout may be the raw folder, for it holds the samples.
        known = specs.setdefault(spec.id, spec)
        if known != spec.model_copy(update={"private_names": known.private_names}):
            raise SetupError(
                f"{own}: entry {spec.id!r}: a dataset that comes with PUMIT-data has this id. Choose another."
            )
    return specs


def own_file(raw: Path) -> Path:
    """Where a user's own entries lie: `datasets.yaml` in the raw folder."""
    return raw / "datasets.yaml"


def get_spec(dataset: str, raw: Path | None = None) -> DatasetSpec:
    """The entry of one dataset, shipped or in `raw`'s own file.

    Raises:
        SetupError: no such id; the message names the closest and all ids. Or as `load_specs`.
    """
    specs = load_specs(raw=raw)
    if dataset not in specs:
        known = {name.casefold(): spec.id for spec in specs.values() for name in (spec.folder, spec.id)}
        close = difflib.get_close_matches(dataset.casefold(), known, n=1)
        hint = f" Did you mean {known[close[0]]!r}?" if close else ""
        raise SetupError(f"There is no dataset {dataset!r}.{hint} Known: {', '.join(sorted(specs))}.")
    return specs[dataset]


def shipped_file() -> Path:
    """The datasets.yaml of this installation: inside the package in a wheel, one folder up in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "datasets.yaml"
    return inside if inside.exists() else package.parent / "datasets.yaml"


@functools.cache
def _shipped_specs() -> dict[str, DatasetSpec]:
    return _load(shipped_file())


def _load(path: Path, *, private_names: bool = False) -> dict[str, DatasetSpec]:
    specs: dict[str, DatasetSpec] = {}
    problems: list[str] = []
    for number, entry in enumerate(parse_entries(path, "- id: ..."), start=1):
        name = repr(entry["id"]) if isinstance(entry, dict) and "id" in entry else f"number {number}"
        try:
            spec = DatasetSpec.model_validate(
                {"private_names": private_names} | entry if isinstance(entry, dict) else entry
            )
        except ValidationError as error:
            problems += [f"{path}: entry {name}{problem}" for problem in problems_of(error)]
            continue
        if spec.id in specs:
            problems.append(f"{path}: entry {name}: the id is used twice.")
        specs[spec.id] = spec
    if problems:
        raise SetupError("\n".join(problems))
    return specs


def parse_entries(path: Path, beginning: str) -> list[Any]:
    """The items of a YAML file that is a list; no key may stand twice in one of them.

    Raises SetupError if it cannot be read, is no YAML or no list; `beginning` is how an item begins.
    """
    entries = _parse(path)
    if not isinstance(entries, list):
        raise SetupError(f"{path}: must be a list of entries, each beginning with `{beginning}`.")
    return entries


def _parse(path: Path) -> Any:
    try:
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SetupError(f"{path}{line}: {getattr(error, 'problem', None) or error}.") from error


def problems_of(error: ValidationError) -> Iterator[str]:
    """`, field: what is wrong` for each problem of an entry."""
    for problem in error.errors(include_url=False):
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        ours = problem["type"] == "value_error"  # our own messages name the value already
        shown = f", not {given!r}" if isinstance(given, str | int | float) and not ours else ""
        yield f"{', ' if field else ''}{field.removeprefix('.')}: {message}{shown}."
