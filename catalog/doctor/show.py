"""What doctor found: for people, as JSON and as CSV."""

from __future__ import annotations

import csv
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from catalog.doctor.codes import CODES, SEVERITIES
from catalog.doctor.examine import KEPT, Diagnosis, Finding
from catalog.doctor.robust import LEAST

_SHOWN_FINDINGS, _SHOWN_KEYS = 60, 2
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """All findings, with what each code means."""
    codes = dict.fromkeys(finding.code for finding in diagnosis.findings)
    return {
        "images": diagnosis.images,
        "not_compared": {"groups": diagnosis.small_groups, "images": diagnosis.small_images},
        "codes": {code: asdict(CODES[code]) for code in codes},
        "findings": [asdict(finding) for finding in diagnosis.findings],
    }


def write_csv(diagnosis: Diagnosis, stream: TextIO) -> None:
    """A line for each suspect; of a finding that speaks of a group as a whole one without key."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["code", "severity", "dataset", "modality", "key", "value", "usual", "z"])
    for finding in diagnosis.findings:
        for suspect in finding.suspects or filter(None, [finding.summary]):
            z = "" if suspect.z is None else f"{suspect.z:.2f}"
            group = (finding.code, finding.severity, finding.dataset, finding.modality or "")
            writer.writerow([*group, suspect.key, suspect.value, suspect.usual or "", z])


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print a table with a row for each code, dataset and modality; then what the codes mean and what to do."""
    findings = diagnosis.findings
    if findings:
        table = Table(title="Doctor", title_justify="left")
        for column in ("severity", "code", "dataset", "modality"):
            table.add_column(column, overflow="fold")
        table.add_column("images", justify="right")
        table.add_column("worst of them", overflow="fold")
        for finding in findings[:_SHOWN_FINDINGS]:
            cells = (finding.code, finding.dataset, finding.modality or "unknown")
            colour = _COLOURS[finding.severity]
            table.add_row(
                f"[{colour}]{finding.severity}[/]",
                *map(escape, cells),
                f"{finding.images:,} of {finding.of:,}",
                escape(_worst(finding)),
            )
        console.print(table)
        if len(findings) > _SHOWN_FINDINGS:
            console.print(f"and {len(findings) - _SHOWN_FINDINGS} more: --json and --csv list them all")
        for code in dict.fromkeys(finding.code for finding in findings):
            console.print(f"\n[bold]{code}[/]: {escape(CODES[code].meaning)} {escape(CODES[code].advice)}")
        _next_steps(findings, console)
    counts = {name: sum(finding.severity == name for finding in findings) for name in SEVERITIES}
    told = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    console.print(f"{told} in {diagnosis.images:,} images.")
    if diagnosis.small_groups:
        console.print(
            f"Not compared with each other: {diagnosis.small_images:,} images of {diagnosis.small_groups:,} "
            f"modalities that have fewer than {LEAST} in their dataset."
        )


def _worst(finding: Finding) -> str:
    lines = []
    for suspect in finding.suspects[:_SHOWN_KEYS] or filter(None, [finding.summary]):
        usual = f" ({suspect.usual})" if suspect.usual else ""
        lines.append(f"{suspect.key}{': ' * bool(suspect.key)}{suspect.value}{usual}")
    return "\n".join(lines)


def _next_steps(findings: list[Finding], console: Console) -> None:
    first = next((finding for finding in findings if finding.suspects), None)
    if first is None:
        return
    console.print()
    key = f"{first.dataset}/{first.suspects[0].key}"
    console.print(f"To see one: pumit-data view '{key}'; all: --out suspects.html", markup=False)
    console.print(
        f"To leave them out: --exclude {first.code}:{first.dataset} --write-overrides RAW/overrides.yaml, then "
        f"pumit-data ingest {first.dataset}",
        markup=False,
    )
    if any(finding.images > len(finding.suspects) > 0 for finding in findings):
        console.print(f"Of a finding, the worst {KEPT:,} are told by key.")
