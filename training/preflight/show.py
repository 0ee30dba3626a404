"""What the doctor of a run found: for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.preflight.codes import CODES, SEVERITIES, Finding
from training.preflight.examine import Examination
from training.preflight.measure import LevelSpeed

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def as_json(found: Examination) -> dict[str, Any]:
    """Every figure, and each finding with what to do."""
    return asdict(found) | {
        "refused": found.refused(),
        "findings": [
            {"code": one.code, "severity": one.severity, "text": one.text, "advice": CODES[one.code].advice}
            for one in _in_order(found.findings)
        ],
    }


def render(found: Examination, console: Console) -> None:
    """Findings, the steps of each level, and the forecast."""
    console.print(
        f"{found.kind} {found.preset}: {found.steps:,} steps of {found.batch_size} crops, {found.processes} "
        f"process{'es' * (found.processes > 1)}, {found.device}",
        markup=False,
    )
    if found.findings:
        table = Table(title="Findings", title_justify="left")
        for column in ("severity", "code", "what", "what to do"):
            table.add_column(column, overflow="fold")
        for one in _in_order(found.findings):
            severity = f"[{_COLOURS[one.severity]}]{one.severity}[/]"
            table.add_row(severity, one.code, escape(one.text), escape(CODES[one.code].advice))
        console.print(table)
    if found.levels:
        console.print(_levels(found))
    for line in _forecast(found):
        console.print(line, markup=False)
    console.print(
        "[red]Refused: this run cannot end well.[/]" if found.refused() else "[green]It can be started.[/]"
    )


def _in_order(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda one: SEVERITIES.index(one.severity))


def _levels(found: Examination) -> Table:
    table = Table(title="Steps by DA level", title_justify="left")
    for column in ("level", "share", "crops", "passes", "seconds", "images/s", "TFLOP/s", "of peak", "memory"):
        table.add_column(column, justify="right")
    for one in found.levels:
        rate = one.flops / one.seconds
        table.add_row(
            "2-D" if one.level == 5 else str(one.level),
            f"{one.share:.1%}",
            _crops(one),
            str(one.accumulate),
            _number(one.seconds),
            _number(one.of_crops / one.seconds),
            _number(rate / 1e12),
            "" if found.peak_flops is None else f"{rate / found.peak_flops:.1%}",
            "" if one.memory_bytes is None else f"{one.memory_bytes / 1e9:.1f} GB",
        )
    return table


def _crops(one: LevelSpeed) -> str:
    if not one.crops:
        return "estimated"
    return str(one.crops) if one.crops == one.of_crops else f"{one.crops} of {one.of_crops}"


def _forecast(found: Examination) -> Iterator[str]:
    plan, loader = found.forecast, found.loader
    if plan is None or loader is None:
        return
    devices = f", {_time(plan.device_hours)} of all processes together" if found.processes > 1 else ""
    yield (
        f"Loader: {loader.stored_rate:.1f} crops/s from the {'store' if loader.remote else 'disk'}, "
        f"{loader.memory_rate:.1f} from memory, {loader.workers} workers, {loader.cores} cores."
    )
    yield (
        f"Step: {_number(plan.step_seconds)} s ({_number(plan.compute_seconds)} s of computing, "
        f"{_number(plan.loader_seconds)} s of loading), {_number(plan.images_per_second)} images/s. "
        f"Limit: {plan.limit}."
    )
    yield (
        f"Whole run: {_time(plan.hours)}{devices}; "
        f"{plan.disk_bytes / 1e9:.2f} GB of checkpoints ({plan.checkpoint_bytes / 1e9:.2f} GB each). "
        "Validation comes on top."
    )
    if plan.most_crops is not None:
        yield f"Memory holds passes of up to {plan.most_crops} crops."
    if plan.settings:
        yield "Proposed: " + " ".join(f"--set {name}={value}" for name, value in plan.settings.items())
    yield from (f"  - {change}" for change in plan.changes)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} minutes"
