"""What a repack is going to do to the disk, and what it did, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ingest.repack import RepackEstimate, RepackReport
from ingest.runs import duration


def render_estimates(estimates: Sequence[RepackEstimate], console: Console) -> None:
    """Print what a dry run expects."""
    columns = ("dataset", "profile", "arrays", "to do", "now", "then", "meanwhile", "time on one core")
    table = _table("Dry run", *columns)
    for expected in estimates:
        table.add_row(
            *_counts(expected),
            decimal(expected.bytes_before),
            f"about {_size(expected)}",
            f"+ {decimal(expected.bytes_needed)}",
            duration(expected.cpu_seconds),
        )
    console.print(table)
    console.print(
        "Judged by a sample of each dataset. Old arrays stay until all new ones of their dataset are there.",
        markup=False,
    )
    largest = max(estimates, key=lambda expected: expected.bytes_needed)
    if largest.bytes_free is not None and largest.bytes_free < largest.bytes_needed:
        console.print(
            f"{largest.dataset} needs {decimal(largest.bytes_needed)} meanwhile, and "
            f"{decimal(largest.bytes_free)} are free.",
            markup=False,
        )


def render_repacks(reports: Sequence[RepackReport], console: Console) -> None:
    """Print what each dataset took before and takes now."""
    table = _table("Repack", "dataset", "profile", "arrays", "converted", "before", "after")
    for report in reports:
        table.add_row(*_counts(report), decimal(report.bytes_before), _size(report))
    console.print(table)


def _counts(report: RepackReport) -> tuple[str, str, str, str]:
    return report.dataset, report.profile, str(report.arrays), str(report.pending)


def _size(report: RepackReport) -> str:
    share = report.bytes_after / max(1, report.bytes_before)
    return f"{decimal(report.bytes_after)} ({share:.0%})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
