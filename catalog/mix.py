"""Mixes: which images training draws, and how often, under a name.

A mix is a small YAML file, `mixes/NAME.yaml` below the corpus, or one that comes with PUMIT-data:

    format: 1
    description: what it is for
    where: modality <> 'US'                     # only images for which this holds, as in `stats --where`
    leave_out: [amos, busi]                     # whole datasets; with a reason each, a mapping
    weights:                                    # factors on the sampling weight; all that apply are multiplied
    - {where: spacing_z > 5, factor: 0.5}
    - {by: modality, factors: {CT: 0.2, MRI: 2}}   # MRI stands for MRI/T1 and the like as well
    dedup: true                                 # of images that show the same, only one

What a mix does depends on nothing but its fields; its fingerprint is their hash.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from catalog.conditions import Conditions, literal
from catalog.corpus import Corpus
from catalog.durable import replacing
from catalog.errors import SetupError

FORMAT = 1
"""Of the file; a later one is refused."""

DEFAULT = "all"

Column = Literal["modality", "dataset", "dimension", "da_level"]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Condition = Annotated[str, Field(min_length=1)]

_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_LONGEST_NAME = 64


class _Part(BaseModel):
    """Part of a mix: immutable, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class WhereFactor(_Part):
    """A factor for the images for which a condition holds."""

    where: Condition
    factor: Factor

    @property
    def cases(self) -> list[tuple[str, float]]:
        """Conditions, of which at most one holds, and their factors."""
        return [(self.where, self.factor)]


class ColumnFactors(_Part):
    """A factor for each of some values of a column."""

    by: Column
    factors: Annotated[dict[str | int, Factor], Field(min_length=1)]

    @model_validator(mode="after")
    def _apart(self) -> ColumnFactors:
        for value in self.factors:
            if isinstance(value, int) != (self.by in ("dimension", "da_level")):
                kind = "a number" if self.by in ("dimension", "da_level") else "a text"
                raise ValueError(f"{value!r}: a {self.by} is {kind}")
            for other in self.factors:
                if self.by == "modality" and str(value).startswith(f"{other}/"):
                    raise ValueError(f"{value} is contained in {other}: give one of them")
        return self

    @property
    def cases(self) -> list[tuple[str, float]]:
        """As of WhereFactor."""
        return [(is_of(self.by, value), factor) for value, factor in self.factors.items()]


def is_of(column: Column, value: str | int) -> str:
    """The condition that an image is of a value of a column; a modality contains its sequences."""
    condition = f"{column} = {literal(value)}"
    return (
        f"{condition} OR starts_with(modality, {literal(f'{value}/')})" if column == "modality" else condition
    )


def _with_reasons(leave_out: Any) -> Any:
    return dict.fromkeys(leave_out) if isinstance(leave_out, list | tuple) else leave_out


class Mix(_Part):
    """A selection of images with weights."""

    format: Literal[1] = 1
    """Version of the form of the file."""
    description: str | None = None
    """What it is for."""
    where: Condition | None = None
    """Only images for which this condition in SQL holds."""
    leave_out: Annotated[dict[str, str | None], BeforeValidator(_with_reasons)] = {}
    """Ids of datasets none of whose images are drawn, and why; or a list of ids."""
    weights: tuple[WhereFactor | ColumnFactors, ...] = ()
    """Factors on the sampling weight. Those of all entries that apply are multiplied; 0 leaves out."""
    dedup: bool = False
    """Of images that show the same, draw the one that `pumit-data duplicates` keeps."""

    @property
    def content(self) -> dict[str, Any]:
        """What decides which images are drawn how often, as plain data; what is not set is left out."""
        fields = self._fields()
        fields.pop("description", None)
        return fields | ({"leave_out": sorted(self.leave_out)} if self.leave_out else {})

    @property
    def fingerprint(self) -> str:
        """sha256 of `content`."""
        text = json.dumps({"format": self.format} | self.content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_yaml(self) -> str:
        """The file."""
        fields = {"format": self.format} | self._fields()
        if self.leave_out and not any(self.leave_out.values()):
            fields["leave_out"] = list(self.leave_out)
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)

    def _fields(self) -> dict[str, Any]:
        """What is not as by default, but for the format. Numbered values stay numbers, as not in JSON."""
        fields = self.model_dump(exclude_defaults=True, exclude={"format"})
        return fields | ({"weights": list(fields["weights"])} if self.weights else {})


def mix_names(corpus: Corpus) -> list[str]:
    """Names of the mixes there are: those that come with PUMIT-data, then those of the corpus, sorted."""
    own = (path.stem for path in corpus.mix_file("x").parent.glob("[!.]*.yaml"))
    return [*_shipped(), *sorted(set(own) - _shipped().keys())]


def is_shipped(name: str) -> bool:
    """Whether a mix comes with PUMIT-data."""
    return name in _shipped()


def load_mix(corpus: Corpus, name: str) -> Mix:
    """The mix of that name. Raises SetupError, which lists the mixes there are, or names what is wrong."""
    shipped = _shipped().get(name)
    file = shipped if shipped is not None else corpus.mix_file(checked_name(name))
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = mix_names(corpus)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SetupError(
            f"there is no mix {name!r} in {corpus.place}.{hint} Mixes: {', '.join(names)}. "
            f"`pumit-data mix write {name} ...` makes it."
        ) from None
    except UnicodeDecodeError as error:
        raise SetupError(f"{file} is no text: {error}. Write it anew with `pumit-data mix write`.") from error
    return parse_mix(text, str(file))


def parse_mix(text: str, origin: str) -> Mix:
    """The mix that a file holds. Raises SetupError that names `origin`, the field, and what is allowed."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SetupError(f"{origin} is no YAML: {' '.join(str(error).split())}. Mend it.") from error
    return make_mix(fields, origin)


def make_mix(fields: Any, origin: str) -> Mix:
    """A mix of plain data, its conditions checked; errors as of `parse_mix`."""
    if isinstance(fields, Mapping) and fields.get("format", FORMAT) != FORMAT:
        raise SetupError(
            f"{origin} has format {fields['format']!r} of a mix, this program knows format {FORMAT}. "
            "Install the version of pumit-data that wrote it, or a later one."
        )
    try:
        mix = Mix.model_validate(fields)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            # Which kind of factor was tried is not in the file, so it is not in the message.
            place = ".".join(
                str(part) for part in problem["loc"] if part not in ("WhereFactor", "ColumnFactors")
            )
            problems.append(f"{place or 'the whole'}: {problem['msg'].removeprefix('Value error, ')}")
        raise SetupError(
            f"{origin}: {'; '.join(dict.fromkeys(problems))}. Fields: {', '.join(Mix.model_fields)}."
        ) from None
    try:
        Conditions(conditions_of(mix))
    except SetupError as error:
        raise SetupError(f"{origin}: {error}") from error
    return mix


def parse_weight(text: str) -> WhereFactor:
    """Read "condition=factor", the factor behind the last equals sign. Raises SetupError if it is not so."""
    condition, equals, number = text.rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not equals or not condition.strip() or not 0 <= factor < math.inf:
        raise SetupError(
            f"--weight {text!r}: write a condition, an equals sign and a factor of 0 or more, as in "
            "\"modality = 'CT' = 0.5\"."
        )
    return WhereFactor(where=condition.strip(), factor=factor)


def conditions_of(mix: Mix) -> list[str]:
    """All conditions of a mix: `where`, then those of the weights in their order."""
    where = [mix.where] if mix.where is not None else []
    return where + [condition for rule in mix.weights for condition, _ in rule.cases]


def write_mix(corpus: Corpus, name: str, mix: Mix, *, force: bool = False) -> None:
    """Put a mix into the corpus, by one rename or one PUT.

    Raises SetupError if there is one of that name, unless `force`, or the name is that of a
    mix that comes with PUMIT-data.
    """
    if is_shipped(checked_name(name)):
        raise SetupError(f"{name!r} is a mix that comes with PUMIT-data. Choose another name.")
    file, content = corpus.mix_file(name), mix.as_yaml().encode()
    taken = SetupError(
        f"there is a mix {name!r} in {corpus.place}. --force replaces it; or choose another name."
    )
    if file.exists() and not force:
        raise taken
    if corpus.origin is not None:
        there = corpus.origin / corpus.name_of(file)
        if force:
            there.write(content)
        elif there.write_if(content, None) is None:
            raise taken
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def checked_name(name: str) -> str:
    """The name itself. Raises SetupError if it cannot be one."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise SetupError(
            f"{name!r} cannot be the name of a mix: lower-case letters, digits, and single . _ - between them, "
            f"{_LONGEST_NAME} characters at most."
        )
    return name


def _shipped() -> dict[str, Traversable]:
    files = {
        file.name.removesuffix(".yaml"): file
        for file in (importlib.resources.files("catalog") / "mixes").iterdir()
    }
    return dict(sorted(files.items()))
