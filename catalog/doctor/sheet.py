"""Suspects in pictures: each beside a usual image of its dataset and modality, in a bound of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalog.corpus import Corpus
from catalog.doctor.codes import CODES, SEVERITIES
from catalog.doctor.examine import Diagnosis, Finding, Suspect
from catalog.durable import replacing
from catalog.report.pictures import pictures_of
from catalog.survey import in_threads

MOST_FINDINGS, MOST_SUSPECTS, MOST_OF_A_FINDING = 300, 240, 8
"""On the page of `doctor`; the report shows fewer."""
BYTES_OF_ONE = 8_000


def picture_sheet(
    corpus: Corpus,
    diagnosis: Diagnosis,
    findings: int = MOST_FINDINGS,
    most: int = MOST_SUSPECTS,
    each: int = MOST_OF_A_FINDING,
    limit: int = BYTES_OF_ONE,
) -> dict[str, Any]:
    """The findings as plain dicts, with pictures of the worst suspects.

    Args:
        findings: so many are listed, the most severe.
        most: suspects shown in all, spread over the findings: the worst of each, then the second, ...
        each: of one finding.
        limit: bytes of one picture.

    Returns `images`; `counts` (findings and images by severity); `unlisted`, the number of findings that are
    not; `shown` and `suspects` (how many of how many), and
    `codes`: code, severity, title, meaning, advice and findings, each with dataset, modality, images, of, usual
    (a picture, or null), summary and `shown`: suspects with a picture (or null), key, value and usual.

    Raises SetupError if a preview is damaged.
    """
    listed = diagnosis.findings[:findings]
    chosen = _chosen(listed, most, each)
    wanted: dict[str, set[str]] = {}
    for finding, suspects in zip(listed, chosen, strict=True):
        keys = wanted.setdefault(finding.dataset, set())
        keys |= {suspect.key for suspect in suspects}
        if suspects and finding.typical is not None:
            keys.add(finding.typical)
    found = dict(
        zip(
            wanted,
            in_threads(lambda name: pictures_of(corpus, name, sorted(wanted[name]), limit), wanted),
            strict=True,
        )
    )
    codes: dict[str, dict[str, Any]] = {}
    for finding, suspects in zip(listed, chosen, strict=True):
        code = CODES[finding.code]
        about = {
            "code": finding.code,
            "severity": code.severity,
            "title": code.title,
            "meaning": code.meaning,
            "advice": code.advice,
            "findings": [],
        }
        pictures = found[finding.dataset]
        codes.setdefault(finding.code, about)["findings"].append(
            {
                "dataset": finding.dataset,
                "modality": finding.modality,
                "images": finding.images,
                "of": finding.of,
                "summary": _described(finding.summary) if finding.summary else None,
                "typical": _typical(finding, pictures) if suspects else None,
                "shown": [_described(suspect) | {"picture": pictures.get(suspect.key)} for suspect in suspects],
            }
        )
    return {
        "images": diagnosis.images,
        "counts": [
            (
                severity,
                sum(finding.severity == severity for finding in diagnosis.findings),
                sum(finding.images for finding in diagnosis.findings if finding.severity == severity),
            )
            for severity in SEVERITIES
        ],
        "unlisted": len(diagnosis.findings) - len(listed),
        "shown": sum(len(suspects) for suspects in chosen),
        "suspects": sum(finding.images for finding in diagnosis.findings if finding.suspects),
        "codes": list(codes.values()),
    }


def write_sheet(corpus: Corpus, diagnosis: Diagnosis, path: Path) -> int:
    """Write the page of suspects, by one rename. Returns its bytes. Raises SetupError as `picture_sheet`."""
    from catalog.report.page import render_template

    page = render_template("doctor.html", {"doctor": picture_sheet(corpus, diagnosis)}).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return len(page)


def _chosen(findings: Sequence[Finding], most: int, each: int) -> list[list[Suspect]]:
    chosen: list[list[Suspect]] = [[] for _ in findings]
    left = most
    for rank in range(each):
        for finding, suspects in zip(findings, chosen, strict=True):
            if left and rank < len(finding.suspects):
                suspects.append(finding.suspects[rank])
                left -= 1
    return chosen


def _typical(finding: Finding, pictures: dict[str, Any]) -> dict[str, Any] | None:
    picture = pictures.get(finding.typical or "")
    return None if picture is None else {"key": finding.typical, "picture": picture}


def _described(suspect: Suspect) -> dict[str, Any]:
    return {"key": suspect.key, "value": suspect.value, "usual": suspect.usual}
