"""What an ingest is going to do, and what it did: for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ingest.estimate import Estimate
from ingest.run import IngestPlan, IngestReport
from ingest.runs import duration
from ingest.task import Outcomes

_SHOWN_FAILURES = 10


def plans_as_json(plans: Sequence[IngestPlan], estimates: Sequence[Estimate]) -> list[dict[str, Any]]:
    """Counts of sources (files and series), bytes and estimated time and disk, one entry a dataset."""
    return [
        {
            "dataset": plan.spec.id,
            "folder": str(plan.origin or plan.root),
            "found": plan.found,
            "selected": plan.selected,
            "pending": plan.pending,
            "pending_bytes": plan.pending_bytes,
            "estimated_seconds": expected.seconds,
            "estimated_bytes": expected.stored_bytes,
            "estimate_basis": expected.basis,
        }
        for plan, expected in zip(plans, estimates, strict=True)
    ]


def render_plans(plans: Sequence[IngestPlan], estimates: Sequence[Estimate], console: Console) -> None:
    """Print what a dry run found, and what it expects."""
    columns = (
        "dataset",
        "folder",
        "files or series",
        "selected",
        "done before",
        "to do",
        "size",
        "time",
        "disk",
    )
    table = _table("Dry run", *columns)
    for row in plans_as_json(plans, estimates):
        counts = (row["found"], row["selected"], row["selected"] - row["pending"], row["pending"])
        table.add_row(
            row["dataset"],
            escape(row["folder"]),
            *map(str, counts),
            decimal(row["pending_bytes"]),
            duration(row["estimated_seconds"]),
            decimal(round(row["estimated_bytes"])),
        )
    console.print(table)
    for basis in dict.fromkeys(expected.basis for expected in estimates):
        ids = ", ".join(
            plan.spec.id for plan, expected in zip(plans, estimates, strict=True) if expected.basis == basis
        )
        console.print(f"Time and disk of {ids} are estimated from {basis}.", markup=False)


def reports_as_json(reports: Sequence[IngestReport]) -> list[dict[str, Any]]:
    """Number of images by status and reason, of the run and of the dataset after it."""
    return [
        {
            "dataset": report.dataset,
            "sources_found": report.sources_found,
            "sources_skipped": report.sources_skipped,
            "run": _nested(report.run),
            "total": _nested(report.total),
            "failures": report.messages,
        }
        for report in reports
    ]


def render_reports(reports: Sequence[IngestReport], console: Console) -> None:
    """Print the summary of an ingest, then each reason with its count, then what failed."""
    table = _table(
        "Ingest", "dataset", "files or series", "done before", "images", "ingested", "excluded", "failed"
    )
    for report in reports:
        counts = by_status(report.total)
        table.add_row(
            report.dataset,
            str(report.sources_found),
            str(report.sources_skipped),
            str(sum(counts.values())),
            *(str(counts.get(status, 0)) for status in ("ingested", "excluded", "failed")),
        )
    console.print(table)
    for report in reports:
        for status in ("excluded", "failed"):
            for reason, number in _nested(report.total).get(status, {}).items():
                console.print(f"{report.dataset}: {number} {status} as {reason} (docs/exclusions.md)")
        for message in report.messages[:_SHOWN_FAILURES]:
            console.print(f"  {message}", markup=False)
        if len(report.messages) > _SHOWN_FAILURES:
            failed = by_status(report.total)["failed"]
            console.print(f"  and {failed - _SHOWN_FAILURES} more: --json lists the first 1,000 by key")


def by_status(outcomes: Outcomes) -> dict[str, int]:
    """Number of images by status."""
    return {status: sum(reasons.values()) for status, reasons in _nested(outcomes).items()}


def _nested(outcomes: Outcomes) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (status, reason), number in sorted(outcomes.items()):
        nested.setdefault(status, {})[reason] = number
    return nested


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
