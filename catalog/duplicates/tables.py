"""What a search for duplicates found, as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from catalog.duplicates.groups import Found, summary

_GROUPS_SHOWN, _LEAKS_SHOWN = 10, 40


def render(found: Found, console: Console) -> None:
    """Counts by pair of datasets, the first groups, and what straddles the split."""
    told = summary(found)
    console.print(
        f"{told['images']:,} images, {told['groups']:,} groups of duplicates with {told['in_groups']:,} "
        f"images: {told['groups_exact']:,} of equal values, {told['groups_with_near']:,} with near duplicates. "
        f"{told['superfluous']:,} images are superfluous."
    )
    _tell_crowds(told, console)
    if not found.groups:
        return
    datasets = Table(title="Groups by dataset", title_justify="left")
    for name in ("dataset", "other"):
        datasets.add_column(name)
    for name in ("groups", "images in them"):
        datasets.add_column(name, justify="right")
    for row in told["by_datasets"]:
        other = "itself" if row["other"] == row["dataset"] else row["other"]
        datasets.add_row(Text(row["dataset"]), Text(other), f"{row['groups']:,}", f"{row['images']:,}")
    console.print(datasets)
    shown = min(found.groups, _GROUPS_SHOWN)
    groups = Table(title=f"{shown} of {told['groups']:,} groups", title_justify="left")
    for name in ("group", "image", "kind", "split", ""):
        groups.add_column(name, overflow="fold")
    for number in range(shown):
        for place, row in enumerate(found.group(number)):
            cells = (
                str(number) if place == 0 else "",
                f"{row['dataset']}/{row['key']}",
                row["kind"],
                row["split"],
            )
            groups.add_row(*map(Text, (*cells, "kept" if row["kept"] else "")))
        groups.add_section()
    console.print(groups)
    if told["straddling"]:
        count = len(told["straddling"])
        console.print(
            f"{count:,} group{' has' if count == 1 else 's have'} images for training and for validation: the "
            "one for validation is kept, so that with --dedup none of the group is trained on."
        )


def render_leaks(told: dict[str, Any], console: Console) -> None:
    """What of an evaluation set is in the corpus; `told` as `ingest.leakage.Leakage.as_json` has it."""
    console.print(
        f"{told['evaluation_images_found']:,} of {told['evaluation_images']:,} evaluation images also occur "
        f"among {told['images']:,} images of the corpus."
    )
    if told["leaks"]:
        shown = told["leaks"][:_LEAKS_SHOWN]
        table = Table(title=f"{len(shown)} of {len(told['leaks']):,} pairs", title_justify="left")
        for name in ("evaluation image", "image of the corpus", "split", "kind", "agreement"):
            table.add_column(name, overflow="fold")
        for leak in shown:
            corpus_image = f"{leak['dataset']}/{leak['key']}"
            cells = (leak["evaluation"], corpus_image, leak["split"], leak["kind"], f"{leak['agreement']:.2f}")
            table.add_row(*map(Text, cells))
        console.print(table)
    _tell_crowds(told, console)
    if told["unread"]:
        console.print(f"{len(told['unread']):,} could not be compared, such as:")
        for message in told["unread"][:3]:
            console.print(Text(f"  {message}"))


def _tell_crowds(told: dict[str, Any], console: Console) -> None:
    """What a search passed over."""
    work = told["work"] or {"crowded": 0, "passed_over": 0}
    if work["crowded"] or work["passed_over"]:
        console.print(
            f"So many images are alike that {work['crowded']:,} of {work['codes']:,} codes were not compared "
            f"with all others of their bucket, and {work['passed_over']:,} pairs of images with likelier "
            "partners not at all."
        )
