"""All rules over all datasets: findings, each with its suspects and a usual image to compare them with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.doctor.checks import CHECKS, COLUMNS, Suspects, Told
from catalog.doctor.codes import CODES, NEAR_GREY_MEAN, NEAR_GREY_P99, PREVIEWS_LOOKED_AT, SEVERITIES, Severity
from catalog.doctor.robust import LEAST, robust_z
from catalog.doctor.rows import Group, Images
from catalog.query import dataset_ids, load_dataset
from catalog.report.pictures import opened_preview, stored_previews
from catalog.survey import in_threads

KEPT = 2_000
"""Suspects of a finding that are told by key, the worst; the count tells of all."""

_DICTIONARIES = ("status", "modality", "original_orientation", "depth_axis", "depth_rule")


@dataclass(frozen=True)
class Suspect:
    """One image of a finding."""

    key: str
    value: str
    usual: str | None = None
    z: float | None = None
    """Robust z, where images were compared."""


@dataclass(frozen=True)
class Finding:
    """What one rule found in the images of one dataset and modality."""

    code: str
    severity: Severity
    dataset: str
    modality: str | None
    images: int
    """How many are suspect, ..."""
    of: int
    """... of how many of the dataset and modality."""
    suspects: tuple[Suspect, ...]
    """The worst KEPT of them; none where the group as a whole is meant."""
    summary: Suspect | None = None
    """What is said of the group as a whole; its key is empty."""
    typical: str | None = None
    """Key of a usual image of the group, to compare with."""


@dataclass
class Diagnosis:
    """What doctor found."""

    images: int = 0
    """Ingested images looked at."""
    findings: list[Finding] = field(default_factory=list)
    """Errors first, then by code, dataset and modality."""
    small_groups: int = 0
    """Datasets' modalities with fewer than LEAST images, which were not compared with each other, ..."""
    small_images: int = 0
    """... and their images."""

    def chosen(self, codes: Collection[str] | None, least: Severity) -> Diagnosis:
        """The same with findings of these codes (None: all) that are at least so severe."""
        severities = SEVERITIES[: SEVERITIES.index(least) + 1]
        kept = [
            finding
            for finding in self.findings
            if (codes is None or finding.code in codes) and finding.severity in severities
        ]
        return replace(self, findings=kept)


def diagnose(corpus: Corpus, datasets: Collection[str] | None = None, where: str | None = None) -> Diagnosis:
    """Look at all ingested images of the datasets (default: all); `where`, a condition in SQL, narrows them
    down.

    In memory are a few columns of as many datasets as there are cores. Raises SetupError as
    `catalog.query.load_dataset` and, for `where`, `catalog.sql.select`.
    """
    ids = dataset_ids(corpus, datasets)
    selected: pa.Table | None = None
    if where is not None:
        from catalog.sql import select

        selected = select(corpus, COLUMNS, where).sort_by([("dataset", "ascending"), ("key", "ascending")])

    def look(dataset: str) -> Diagnosis:
        if selected is None:
            return _examined(
                corpus,
                Images(
                    dataset,
                    lambda columns: load_dataset(
                        corpus,
                        dataset,
                        columns,
                        dictionaries=[name for name in columns if name in _DICTIONARIES],
                    ),
                ),
            )
        rows = selected.filter(pc.equal(selected["dataset"], dataset))
        return _examined(corpus, Images(dataset, lambda columns: rows.select(list(columns))))

    whole = Diagnosis()
    for part in in_threads(look, ids):
        whole.images += part.images
        whole.small_groups += part.small_groups
        whole.small_images += part.small_images
        whole.findings += part.findings
    order = list(CODES)
    whole.findings.sort(
        key=lambda finding: (
            SEVERITIES.index(finding.severity),
            order.index(finding.code),
            finding.dataset,
            finding.modality or "",
            finding.summary.value if finding.summary else "",
        )
    )
    return whole


def _examined(corpus: Corpus, images: Images) -> Diagnosis:
    small = [group for group in images.groups if len(group.rows) < LEAST]
    outcome = Diagnosis(len(images), [], len(small), sum(len(group.rows) for group in small))
    suspect = np.zeros(len(images), bool)
    for check in CHECKS:
        for found in check(images):
            if found.count:
                suspect[found.rows] = True
                outcome.findings += _findings(corpus, images, found)
    groups = {group.modality: group for group in images.groups}
    concerned = {finding.modality for finding in outcome.findings}
    usual = dict(_typical(images, [groups[modality] for modality in concerned], suspect))
    outcome.findings = [replace(finding, typical=usual.get(finding.modality)) for finding in outcome.findings]
    return outcome


def _findings(corpus: Corpus, images: Images, found: Suspects) -> Iterator[Finding]:
    code, group = found.code, found.group
    whole = Finding(
        code, CODES[code].severity, images.dataset, group.modality, found.count, len(group.rows), ()
    )
    if not len(found.rows):
        yield replace(whole, summary=_suspect("", found.tell(0)))
        return
    keys = images.keys(found.rows[:KEPT])
    suspects = tuple(_suspect(key, found.tell(number)) for number, key in enumerate(keys))
    if code != "colour_unexpected":
        yield replace(whole, suspects=suspects)
        return
    grey = _nearly_grey(corpus, images.dataset, keys[:PREVIEWS_LOOKED_AT])
    coloured = tuple(suspect for suspect in suspects if suspect.key not in grey)
    if whole.images > len(grey):
        yield replace(whole, suspects=coloured, images=whole.images - len(grey))
    if grey:
        nearly = tuple(replace(suspect, value=grey[suspect.key]) for suspect in suspects if suspect.key in grey)
        severity = CODES["grey_as_colour"].severity
        yield replace(whole, code="grey_as_colour", severity=severity, suspects=nearly, images=len(grey))


def _suspect(key: str, told: Told) -> Suspect:
    return Suspect(key, told.value, told.usual, told.z)


def _nearly_grey(corpus: Corpus, dataset: str, keys: Sequence[str]) -> Mapping[str, str]:
    """Of images whose preview is nearly grey, by how much its channels differ."""
    grey: dict[str, str] = {}
    for key, png in stored_previews(corpus, dataset, keys):
        pixels = np.asarray(opened_preview(dataset, key, png).convert("RGB"), np.int16)
        spread = pixels.max(axis=2) - pixels.min(axis=2)
        if spread.mean() <= NEAR_GREY_MEAN and np.quantile(spread, 0.99) <= NEAR_GREY_P99:
            grey[key] = f"3 channels that differ by {spread.mean():.1f} of 255 grey levels"
    return grey


def _typical(images: Images, groups: Sequence[Group], suspect: Any) -> Iterator[tuple[str | None, str]]:
    """Of each group the image that is nearest to the medians and nobody's suspect."""
    if not groups:
        return
    columns = [
        images.numbers(name) for name in ("spacing_z", "spacing_x", "shape_d", "shape_h", "intensity_mean")
    ]
    for group in groups:
        free = group.rows[~suspect[group.rows]]
        if not len(free):
            continue
        far = np.zeros(len(free))
        for values in columns:
            far = np.fmax(far, np.abs(robust_z(values[free], 1e-3)))
        yield group.modality, images.keys(free[[int(np.argmin(far))]])[0]
