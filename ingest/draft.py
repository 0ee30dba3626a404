"""The inference behind `pumit-data add`: from the names and headers of a folder to the text of an entry."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import escape as literal_glob
from pathlib import Path

import yaml

from ingest.glance import (
    LABEL_WORDS,
    MODALITY_WORDS,
    Glance,
    Survey,
    guess_modality,
    modality_in,
    stem_of,
    suffix_of,
    whole_word,
)

_GROUP_WORDS = re.compile(
    "(images?|imgs?|scans?|data|dataset|raw|dicoms?|dcm|nii|nifti|png|jpe?g|volumes?|pictures?|anat|func|dwi|fmap|"
    "all|train|training|test|testing|val|valid|validation|imagest[rs]|imagesva|normal|abnormal|benign|malignant|"
    "positive|negative|healthy|patients?|controls?|cases?|subjects?|left|right|od|os|ap|pa|lat|"
    + "|".join(words for _, words in MODALITY_WORDS)
    + ")",
    re.IGNORECASE,
)
"""Folder names that sort images and name no person."""
_CLASS_SIZE = {2: 5, 3: 20}
"""By dimension: folders without a digit in their names and with more images on average count as classes."""


@dataclass
class _Group:
    """Images that one rule can find and describe: of one format and dimension, at one depth."""

    images: list[Glance]
    globs: list[str] = field(default_factory=list)
    path: str = ""
    keys: list[str] = field(default_factory=list)
    """Templates, the shortest first; the last one is surely unique."""
    subject: str | None = None
    subject_reason: str = ""
    modality: str | list[dict[str, str]] = ""
    modality_reason: str = ""

    @property
    def first(self) -> Glance:
        return self.images[0]

    @property
    def parts(self) -> list[list[str]]:
        return [image.name.split("/") for image in self.images]


class Draft:
    """An entry in the making: all images of a folder, in groups that one rule can describe."""

    def __init__(self, root: Path, seen: Survey) -> None:
        self._root = root
        self._seen = seen
        self.warnings: list[str] = []
        by_kind: dict[tuple[str, bool, int], list[Glance]] = defaultdict(list)
        for image in seen.images:
            by_kind[image.format, image.is_folder, image.path.count("/")].append(image)
        self._groups = [_Group(images) for _, images in sorted(by_kind.items())]
        for group in self._groups:
            self._describe_paths(group)
            self._describe_modality(group)
        self._warn_of_mixtures()
        self._key_rank = self._shortest_unique_key()
        self._ignore = self._ignored()

    def _describe_paths(self, group: _Group) -> None:
        """Globs, `path`, `key` and `subject` of a group."""
        first, parts = group.first, group.parts
        folders = len(parts[0]) - (0 if first.is_folder else 1)
        columns = [[part[level] for part in parts] for level in range(folders)]
        level, group.subject_reason = self._subject_level(group, columns)
        patterns, globs, names = [], [], []
        for number, column in enumerate(columns):
            is_constant = len(set(column)) == 1 and number != level
            is_series = first.is_folder and number == folders - 1
            if is_constant and _GROUP_WORDS.fullmatch(column[0]):
                patterns.append(re.escape(column[0]))
                globs.append(literal_glob(column[0]))
                continue
            globs.append("*")
            # A name that is the same everywhere tells nothing, unless it looks like a number to come.
            if is_constant and not is_series and not re.search(r"\d", column[0]):
                patterns.append("[^/]+")
                continue
            names.append("subject" if number == level else "series" if is_series else f"folder{number + 1}")
            patterns.append(f"(?P<{names[-1]}>[^/]+)")
        if level is not None:
            group.subject = self._subject_template(columns, level, names)

        if first.is_folder:
            group.globs = ["/".join(globs) + "/"]
        else:
            suffixes = sorted({suffix_of(part[-1]).lower() for part in parts})
            name = "(?P<name>[^/]+?)"
            if level is None:
                name, group.subject, group.subject_reason = _subject_in_names(group)
            patterns.append(f"{name}(?P<ending>{'|'.join(map(re.escape, suffixes))})")
            endings = [""] if "" in suffixes else suffixes
            group.globs = ["/".join([*globs, "*" + literal_glob(ending)]) for ending in endings]
            names.append("name")
            series = {image.name for image in self._seen.images if image.is_folder}
            if any(place.count("/") == folders - 1 for place in series):
                # Beside folders of slices, a general glob would find each slice: name the folders instead.
                places = sorted({image.name.rpartition("/")[0] for image in group.images})
                group.globs = [f"{literal_glob(place)}/*" for place in places]
        group.path = "/".join(patterns)
        group.keys = _key_templates(group, names)

    def _subject_level(self, group: _Group, columns: list[list[str]]) -> tuple[int | None, str]:
        """Which folder level stands for the person, and why; null if none does."""
        persons = [next(iter(image.persons), "") for image in group.images]
        if any(len(image.persons) > 1 for image in group.images):
            self.warnings.append(
                "some DICOM folders hold the scans of several patients: give each patient a folder."
            )
        elif all(persons) and len(set(persons)) > 1:
            for level in range(len(columns)):
                prefixes = list(zip(*columns[: level + 1], strict=True))
                pairs = set(zip(prefixes, persons, strict=True))
                if len(pairs) == len(set(prefixes)):
                    if len(pairs) > len(set(persons)):
                        self.warnings.append(
                            "some patients have several of the folders taken for subjects: merge them, or "
                            "training may see a patient who is held out for validation."
                        )
                    return level, "the folders that are told apart as DICOM's patients are"
            self.warnings.append("DICOM names several patients whom the paths do not tell apart.")
        for level, column in enumerate(columns):
            names = set(column)
            if all(_GROUP_WORDS.fullmatch(name) for name in names):
                continue
            with_digit = sum(bool(re.search(r"\d", name)) for name in names)
            if 2 * with_digit >= len(names) or (
                len(names) > 1 and len(column) <= _CLASS_SIZE[group.first.dimension] * len(names)
            ):
                return level, f"the folders of level {level + 1}, such as {column[0]}"
        return None, ""

    def _warn_of_mixtures(self) -> None:
        formats = {group.first.format for group in self._groups}
        if "raster" in formats and len(formats) > 1:
            self.warnings.append("pictures lie beside scans: if they are screenshots, delete their group.")
        for group in self._groups:
            flat = [image.name for image in group.images if image.dimension == 2]
            if flat and len(flat) < len(group.images):
                self.warnings.append(
                    f"{len(flat)} files such as {flat[0]} are 2-D among volumes: ingest will exclude them."
                )

    @staticmethod
    def _subject_template(columns: list[list[str]], level: int, names: Sequence[str]) -> str:
        """`{subject}`, with the levels above it where these repeat its names and do not just sort images."""
        prefixes = set(zip(*columns[: level + 1], strict=True))
        above = [f"folder{number + 1}" for number in range(level) if f"folder{number + 1}" in names]
        sorting = all(_GROUP_WORDS.fullmatch(name) for number in range(level) for name in set(columns[number]))
        if len(prefixes) == len(set(columns[level])) or sorting:
            return "{subject}"
        return "-".join(f"{{{name}}}" for name in [*above, "subject"])

    def _describe_modality(self, group: _Group) -> None:
        fallback: tuple[str, str] | None = None
        guesses: list[tuple[str, str]] = []
        for image in group.images:
            if image.modality is None and (words := modality_in(image.name)) is not None:
                guesses.append((words, "path"))
            elif image.modality is not None:
                guesses.append(guess_modality(self._root, image))
            else:
                # Values are read of the first image without a word; the others will be like it.
                fallback = fallback or guess_modality(self._root, image)
                guesses.append(fallback)
        kinds = [kind for kind, _ in guesses]
        grounds = ", ".join(dict.fromkeys(ground for _, ground in guesses))
        if group.first.format == "dicom":
            group.modality = kinds[0] if len(set(kinds)) == 1 else _rules_by_names(group, kinds)
            group.modality_reason = grounds
        elif fallback is not None and len(set(kinds)) == 1:
            group.modality, group.modality_reason = kinds[0], grounds
        else:
            rest = [{"match": "", "modality": fallback[0]}] if fallback is not None else []
            group.modality = [*_rules_by_words(group), *rest]
            group.modality_reason = "words of the paths" + (f"; else, {fallback[1]}" if fallback else "")
        if fallback is not None:
            self.warnings.append(f"the modality {fallback[0]} of {group.globs[0]} goes by {fallback[1]}.")
            group.modality_reason = f"PLEASE CHECK: {group.modality_reason}"

    def _shortest_unique_key(self) -> int:
        """Which of the key templates is the first to give every image of the entry a key of its own."""
        ranks = len(self._groups[0].keys)  # the same for all
        for rank in range(ranks):
            keys = [key for group in self._groups for key in _filled(group, group.keys[rank])]
            if (
                all(keys)
                and len(set(keys)) == len(keys)
                and not any(re.search(r"#\d{4,}$", key) for key in keys)
            ):
                return rank
        return ranks - 1

    def _ignored(self) -> list[tuple[str, str]]:
        """Patterns for what the globs find beside the images, and what they stand for."""
        wanted = {image.name for image in self._seen.images}
        found = {
            path
            for group in self._groups
            for path in (self._seen.folders if group.first.is_folder else self._seen.files)
            if any(_is_matched(glob, path) for glob in group.globs)
        }
        ignored: list[tuple[str, str]] = []
        rest = found - wanted
        parents = {name.rpartition("/")[0] for name in wanted}
        for words in LABEL_WORDS:
            pattern = whole_word(words)
            hit = [path for path in rest if re.search(pattern, path, re.IGNORECASE)]
            if hit:
                ignored.append((pattern, f"{len(hit)} masks or annotations, such as {min(hit)}"))
                rest.difference_update(hit)
        last_parts = {path.rpartition("/")[2].lower() for path in wanted}
        endings = {suffix_of(path).lower() for path in wanted}
        series = {image.name for image in self._seen.images if image.is_folder}
        for path in sorted(rest):
            place, _, last = path.rpartition("/")
            if place in series:
                pattern, what = f"^{re.escape(place)}/[^/]+$", "files of a series"
            elif suffix_of(last) and suffix_of(last).lower() not in endings:
                pattern, what = re.escape(suffix_of(last)) + "$", "no images"
            elif last.lower() not in last_parts and path not in parents:
                pattern, what = f"(^|/){re.escape(last)}$", "no images"
            else:
                what = "a folder of images, not of slices" if path in parents else "no images"
                pattern = f"^{re.escape(path)}$"
            if pattern not in (known for known, _ in ignored):
                ignored.append((pattern, what))
        return ignored

    def entry(self, name: str, title: str, place: str) -> str:
        """The entry as YAML, with comments."""
        counts = Counter(image.format for image in self._seen.images)
        told = ", ".join(f"{count} {form}" for form, count in counts.items())
        lines = [
            f"# Guessed by `pumit-data add` from names and headers ({told}). Check every line.",
            f"- id: {_quoted(name)}",
            f"  title: {_quoted(title)}",
            f"  folder: {_quoted(place)}",
            "  # Names of folders and files stay out of catalog and logs; ids stand for them. Say false",
            "  # only if none holds a person's name, a birth date or a hospital number.",
            "  private_names: true",
            "  images:",
        ]
        for group in self._groups:
            lines += self._group_lines(group)
        if self._ignore:
            lines.append("  ignore:")
            lines += [f"    - {_quoted(pattern)}  # {what}" for pattern, what in self._ignore]
        return "\n".join(lines) + "\n"

    def _group_lines(self, group: _Group) -> Iterable[str]:
        first = group.first
        deepest = max(group.images, key=lambda image: image.dimension)
        globs = ", ".join(map(_quoted, group.globs))
        yield f"    - globs: [{globs}]  # {len(group.images)} found"
        yield f"      format: {first.format}"
        yield f"      dimension: {deepest.dimension}  # {deepest.dimension_reason}"
        key = group.keys[self._key_rank]
        path = group.path if "{ending}" in key else _without_ending(group.path)
        yield f"      path: {_quoted(path)}"
        yield f"      key: {_quoted(key)}"
        if group.subject:
            yield f"      subject: {_quoted(group.subject)}  # {group.subject_reason}"
        else:
            yield "      # no subject: nothing tells who is who, so every image counts as a person of its own"
        if isinstance(group.modality, str):
            yield f"      modality: {group.modality}  # {group.modality_reason}"
        else:
            yield f"      modality:  # {group.modality_reason}"
            for rule in group.modality:
                yield f"        - {{match: {_quoted(rule['match'])}, modality: {rule['modality']}}}"
        if first.is_folder or any(image.several for image in group.images):
            yield "      share_weight: true  # the volumes or frames of one file or series share its weight"


def _subject_in_names(group: _Group) -> tuple[str, str | None, str]:
    """Pattern of the file's name, template of the subject, why: where names say who is who."""
    stems = [stem_of(part[-1]) for part in group.parts]
    if all(re.match("sub-[a-z0-9]", stem, re.IGNORECASE) for stem in stems):
        return "(?P<name>(?P<subject>sub-[^/_.]+)[^/]*?)", "{subject}", "sub-... as BIDS names subjects"
    split = [re.fullmatch(r"(.*\d.*)[_-]([^_-]+)", stem) for stem in stems]
    ends = [match[2] for match in split if match]
    heads = {match[1] for match in split if match}
    numbered = all(re.fullmatch(r"\d{1,4}|ap|pa|lat|l|r|left|right|od|os", end, re.IGNORECASE) for end in ends)
    worded = all(modality_in(end) is not None for end in ends)
    if len(ends) == len(stems) and (worded or (numbered and len(heads) > 1)):
        pattern = "(?P<name>(?P<subject>[^/]+)[_-][^/_-]+?)"
        return pattern, "{subject}", f"what stands before the last _ or -, such as {min(heads)}"
    return "(?P<name>[^/]+?)", None, ""


def _key_templates(group: _Group, names: list[str]) -> list[str]:
    fields = [f"{{{name}}}" for name in names]
    everything = "/".join(fields) + ("" if group.first.is_folder else "{ending}")
    # A name that already says whose it is needs no folder before it.
    values = [re.fullmatch(group.path, image.name, re.IGNORECASE) for image in group.images]
    named = (
        "name" in names
        and "subject" in names
        and all(match and match["subject"].lower() in match["name"].lower() for match in values)
    )
    usual = "-".join(fields) if fields else everything
    return ["{name}" if named else usual, usual, "_".join(fields) or everything, everything]


def _without_ending(path: str) -> str:
    """The pattern with a plain group in place of the named one that only the longest key needs."""
    head, _, tail = path.rpartition("(?P<ending>")
    if not head:
        return path
    return head + (f"(?:{tail}" if "|" in tail else tail.removesuffix(")"))


def _filled(group: _Group, template: str) -> list[str]:
    matches = (re.fullmatch(group.path, image.name, re.IGNORECASE) for image in group.images)
    return [template.format_map(match.groupdict(default="")) if match else "" for match in matches]


def _finds(words: str, path: str) -> bool:
    return re.search(whole_word(words), path, re.IGNORECASE) is not None


def _rules_by_words(group: _Group) -> list[dict[str, str]]:
    """Rules of the words that occur, in the order of MODALITY_WORDS, so that they decide as the guess did."""
    rules = []
    for kind, words in MODALITY_WORDS:
        decided = [image.name for image in group.images if modality_in(image.name) == kind]
        if decided:
            there = [word for word in words.split("|") if any(_finds(word, name) for name in decided)]
            rules.append({"match": whole_word("|".join(there)), "modality": kind})
    return rules


def _rules_by_names(group: _Group, kinds: Sequence[str]) -> list[dict[str, str]]:
    """Rules for images whose modality is known by other means: by a word of theirs, else by their folders."""
    names = [image.name for image in group.images]
    words = [set(re.split("[^a-z0-9]+", name.lower())) - {""} for name in names]
    rules = []
    for kind in sorted(set(kinds)):
        own = [found for found, other in zip(words, kinds, strict=True) if other == kind]
        others = [found for found, other in zip(words, kinds, strict=True) if other != kind]
        # A word that a single image has is more likely its number.
        telling = sorted(set.intersection(*own) - set.union(*others)) if len(own) > 1 else []
        match = whole_word(re.escape(telling[0])) if telling else _places(names, kinds, kind)
        rules.append({"match": match, "modality": kind})
    return rules


def _places(names: Sequence[str], kinds: Sequence[str], kind: str) -> str:
    """Pattern of the highest folders below which all images are of one kind, for those of `kind`."""
    for level in range(1, names[0].count("/") + 2):
        prefixes = ["/".join(name.split("/")[:level]) for name in names]
        if len(set(prefixes)) == len(set(zip(prefixes, kinds, strict=True))):
            break
    own = sorted({prefix for prefix, other in zip(prefixes, kinds, strict=True) if other == kind})
    return f"^(?:{'|'.join(map(re.escape, own))})(?:/|$)"


def _is_matched(glob: str, path: str) -> bool:
    parts, patterns = path.split("/"), glob.removesuffix("/").split("/")
    return len(parts) == len(patterns) and all(
        fnmatch.fnmatchcase(part.casefold(), pattern.casefold())
        for part, pattern in zip(parts, patterns, strict=True)
    )


def _quoted(text: str) -> str:
    """A YAML scalar: plain where nothing can be mistaken, else in single quotes."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", text) and isinstance(yaml.safe_load(text), str):
        return text
    return "'" + text.replace("'", "''") + "'"
