"""What an ingest is going to do, and what it did: for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ingest.run import IngestPlan, IngestReport, Outcomes

_SHOWN_FAILURES = 10


def plans_as_json(plans: Sequence[IngestPlan]) -> list[dict[str, Any]]:
    """Counts of sources (files and series) and bytes, one entry a dataset."""
    return [
        {
            "dataset": plan.spec.id,
            "folder": str(plan.origin or plan.root),
            "found": len(plan.found),
            "selected": len(plan.selected),
            "pending": len(plan.pending),
            "pending_bytes": plan.pending_bytes,
        }
        for plan in plans
    ]


def render_plans(plans: Sequence[IngestPlan], console: Console) -> None:
    """Print what a dry run found."""
    table = _table(
        "Dry run", "dataset", "folder", "files or series", "selected", "done before", "to do", "size"
    )
    for row in plans_as_json(plans):
        counts = (row["found"], row["selected"], row["selected"] - row["pending"], row["pending"])
        table.add_row(row["dataset"], escape(row["folder"]), *map(str, counts), decimal(row["pending_bytes"]))
    console.print(table)


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
            console.print(f"  and {len(report.messages) - _SHOWN_FAILURES} more: --json lists them all")


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
