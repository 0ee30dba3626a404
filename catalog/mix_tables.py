"""Mixes for people and as JSON: the list of them, and what one does to the shares of draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from catalog.mix import ColumnFactors, Mix, WhereFactor, is_shipped
from catalog.shares import CROP, Tally

_GROUPS = ("modality", "dataset")


def list_as_json(mixes: Mapping[str, Mix]) -> list[dict[str, Any]]:
    """Name, whether it comes with PUMIT-data, fingerprint, description and content of each mix."""
    return [{"name": name, "shipped": is_shipped(name)} | _as_json(mix) for name, mix in mixes.items()]


def list_table(mixes: Mapping[str, Mix]) -> Table:
    """One line a mix."""
    table = Table("mix", "from", "fingerprint", "what for")
    for name, mix in mixes.items():
        where = "PUMIT-data" if is_shipped(name) else "this corpus"
        table.add_row(name, where, mix.fingerprint[:12], escape(mix.description or ""))
    return table


def mix_as_json(name: str, mix: Mix, tally: Tally) -> dict[str, Any]:
    """A mix and what it does: images and subjects that can be drawn, and shares of draws, before and after."""
    counts = {"images": tally.images, "subjects": tally.subjects}
    return (
        {"name": name}
        | _as_json(mix)
        | {what: {"before": before, "after": after} for what, (before, after) in counts.items()}
        | {f"by_{column}": tally.groups(column) for column in _GROUPS}
        | {"by_da_level": tally.levels()}
    )


def render_mix(name: str, mix: Mix, tally: Tally, console: Console) -> None:
    """Print what `mix_as_json` tells."""
    title = f": {mix.description}" if mix.description else ""
    console.print(f"[bold]{name}[/]{escape(title)} (fingerprint {mix.fingerprint[:12]})")
    if mix.where is not None:
        console.print(f"  where      {mix.where}", markup=False)
    here = {labels.dataset for labels in tally.cells}
    for dataset in sorted(mix.leave_out.keys() & here):
        reason = mix.leave_out[dataset]
        console.print(f"  leaves out {dataset}{f': {reason}' if reason else ''}", markup=False)
    if elsewhere := sorted(mix.leave_out.keys() - here):
        console.print(f"  leaves out {', '.join(elsewhere)}, none of whose images are here", markup=False)
    for rule in mix.weights:
        for whom, factor in _told(rule):
            console.print(f"  x {factor:<8.6g} {whom}", markup=False)
    if mix.dedup:
        console.print("  dedup      of images that show the same, one")
    (images, left), (subjects, people) = tally.images, tally.subjects
    console.print(
        f"{left:,} of {images:,} training images are left, of {people:,} of {subjects:,} subjects.",
        markup=False,
    )
    for column in _GROUPS:
        table = _shares_table(column, "images", "with mix", "drawn", "with mix")
        for row in tally.groups(column):
            counts = (f"{row[name]:,}" for name in ("images_before", "images_after"))
            table.add_row(escape(str(row[column] or "")), *counts, *_drawn(row))
        console.print(table)
    table = _shares_table("DA level", "drawn", "with mix")
    for row in tally.levels():
        table.add_row(str(row["da_level"]), *_drawn(row))
    console.print(table)
    console.print(
        f"Drawn: share of crops of {CROP.side} x {CROP.side} pixels, at the DA level after random scaling."
    )


def _told(rule: WhereFactor | ColumnFactors) -> list[tuple[str, float]]:
    if isinstance(rule, WhereFactor):
        return rule.cases
    return [(f"{rule.by} {value}", factor) for value, factor in rule.factors.items()]


def _as_json(mix: Mix) -> dict[str, Any]:
    return {
        "fingerprint": mix.fingerprint,
        "description": mix.description,
        "where": mix.where,
        "leave_out": mix.leave_out,
        "weights": [rule.model_dump() for rule in mix.weights],
        "dedup": mix.dedup,
    }


def _shares_table(column: str, *numbers: str) -> Table:
    table = Table()
    table.add_column(column, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _drawn(row: dict[str, Any]) -> list[str]:
    return [f"{row[when]:.1%}" for when in ("before", "after")]
