"""overrides.yaml, validated: images that a user leaves out after having looked at them.

The file lies in the raw folder, beside the user's own datasets.yaml, and travels with the images. It names
images as the catalog does, by dataset and key, so that what `pumit-data doctor` found can be copied into it;
keys of datasets whose names are private are ids there as well. An image that it names becomes an excluded row.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError, model_validator

from catalog.durable import replacing
from catalog.errors import SetupError
from ingest.declared import Declared, Text
from ingest.spec import DatasetId, parse_entries, problems_of

REASON = "excluded_by_user"
"""Reason code of the rows of images that the file leaves out."""

_VOLUME = re.compile(r"(?P<source>.+)#(?P<number>\d{4,})", re.DOTALL)
_HEADER = """\
# Images that `pumit-data ingest` leaves out of the corpus. To take them back, delete the entry and ingest.
"""


class Override(Declared):
    """One entry: which images, and why."""

    dataset: DatasetId
    key: Text | None = None
    """Key of one image. That of a file with several volumes stands for all of them, `KEY#0003` for one."""
    glob: Text | None = None
    """Instead of `key`: a pattern with *, ? and [...], to match the whole key; may end in #0003, too."""
    action: Literal["exclude"] = "exclude"
    reason: Text
    """Why; it goes into the catalog's `message`."""
    finding: Text | None = None
    """Code of the finding of `pumit-data doctor` behind it."""

    @model_validator(mode="after")
    def _one_selector(self) -> Override:
        if (self.key is None) == (self.glob is None):
            raise ValueError("needs either `key` or `glob`")
        return self

    @property
    def volume(self) -> int | None:
        """The one volume of a file that it speaks of; null: all."""
        found = _VOLUME.fullmatch(self.named)
        return int(found["number"]) if found else None

    @property
    def source(self) -> str:
        """Key, or pattern, of the file."""
        return source_key(self.named)

    @property
    def named(self) -> str:
        """The key or the pattern."""
        return self.key or self.glob or ""

    @property
    def text(self) -> str:
        finding = f" ({self.finding})" if self.finding else ""
        return f"{self.reason.removesuffix('.')}{finding}"


Verdict = tuple[tuple[int | None, str], ...]
"""What the file says of one source: number of a volume, or null for all, and the reason; the first counts."""


@dataclass(frozen=True)
class Overrides:
    """The entries of one dataset."""

    entries: tuple[Override, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def keys(self) -> list[str]:
        """Keys of the sources that entries with `key` speak of."""
        return list(dict.fromkeys(entry.source for entry in self.entries if entry.key is not None))

    @property
    def has_globs(self) -> bool:
        return any(entry.glob is not None for entry in self.entries)

    def of(self, key: str) -> Verdict:
        """What is said of the source with this key, in the order of the file."""
        return tuple((entry.volume, entry.text) for entry in self.entries if _names(entry, key))

    def idle(self, keys: Collection[str]) -> list[Override]:
        """Entries that speak of none of the sources, of which those that any entry names are given."""
        return [entry for entry in self.entries if not any(_names(entry, key) for key in keys)]


def _names(entry: Override, key: str) -> bool:
    return fnmatch.fnmatchcase(key, entry.source) if entry.key is None else key == entry.source


def source_key(key: str) -> str:
    """Key of the file or series of an image."""
    found = _VOLUME.fullmatch(key)
    return found["source"] if found else key


def as_text(verdict: Verdict) -> str | None:
    """The verdict as JSON, for a column of a table; null where nothing is said."""
    return json.dumps(verdict, ensure_ascii=False) if verdict else None


def from_text(text: str | None) -> Verdict:
    return () if text is None else tuple((volume, reason) for volume, reason in json.loads(text))


def declared_hash(entry_hash: str, verdict: str | None) -> str:
    """Hash of all that is declared of a source: that of its entry, and behind a + that of its verdict as text.

    It stands in catalog and journal, so that a changed overrides.yaml makes just the images new that it names.
    """
    if verdict is None:
        return entry_hash
    return f"{entry_hash}+{hashlib.sha256(verdict.encode()).hexdigest()[:16]}"


def overrides_file(raw: Path) -> Path:
    """Where the file lies: in the raw folder."""
    return raw / "overrides.yaml"


def load_overrides(file: Path, known: Collection[str] | None = None) -> dict[str, Overrides]:
    """The entries by dataset; none if there is no such file.

    Args:
        known: ids of all datasets; an entry for another one is an error.

    Raises:
        SetupError: the file cannot be read or parsed, or an entry is wrong. The message has a line for each
            problem, with file, entry, field and what is allowed.
    """
    if not file.exists():
        return {}
    found: dict[str, list[Override]] = {}
    problems: list[str] = []
    for number, entry in enumerate(parse_entries(file, "- dataset: ..."), start=1):
        try:
            override = Override.model_validate(entry)
        except ValidationError as error:
            problems += [f"{file}: entry {number}{problem}" for problem in problems_of(error)]
            continue
        if known is not None and override.dataset not in known:
            close = difflib.get_close_matches(override.dataset, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"{file}: entry {number}, dataset: there is no dataset {override.dataset!r}.{hint}")
        found.setdefault(override.dataset, []).append(override)
    if problems:
        raise SetupError("\n".join(problems))
    return {dataset: Overrides(tuple(entries)) for dataset, entries in found.items()}


def overrides_of(dataset: str, raw: Path) -> Overrides:
    """What the user says of one dataset; SetupError as `load_overrides`."""
    return load_overrides(overrides_file(raw)).get(dataset, Overrides())


def append_overrides(file: Path, proposed: Iterable[tuple[Override, str]]) -> tuple[int, int]:
    """Append entries, each with a comment above it; what stands in the file stays as it is.

    Returns how many were appended, and how many were left out, for the file names their image already.
    Raises SetupError as `load_overrides`; the file is then as it was. OSError where it cannot be written.
    """
    known = {(entry.dataset, entry.key) for own in load_overrides(file).values() for entry in own.entries}
    new: list[tuple[Override, str]] = []
    present = 0
    for entry, comment in proposed:
        if (entry.dataset, entry.key) in known:
            present += 1
        else:
            known.add((entry.dataset, entry.key))
            new.append((entry, comment))
    if new:
        before = file.read_text(encoding="utf-8") if file.exists() else _HEADER
        before += "" if before.endswith("\n") else "\n"
        with replacing(file) as temporary:
            temporary.write_text(before + _as_yaml(new), encoding="utf-8")
            load_overrides(temporary)  # what was there may leave no room for a list, as `[]` does
    return len(new), present


def _as_yaml(entries: Sequence[tuple[Override, str]]) -> str:
    blocks = []
    for entry, comment in entries:
        # One line of what YAML lets stand in a comment, whatever it quotes.
        above = " ".join("".join(c if c.isprintable() else " " for c in comment).split())
        fields = entry.model_dump(exclude_none=True)
        text = yaml.safe_dump([fields], sort_keys=False, allow_unicode=True, width=10**6)
        blocks.append(f"\n# {above}\n{text}")
    return "".join(blocks)
