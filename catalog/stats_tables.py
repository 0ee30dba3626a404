"""The summaries of `catalog.stats` for people: tables on the screen, and in Markdown for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from catalog.output import markdown_table
from catalog.stats import AUDITED, summarise_cells
from catalog.survey import LEVELS, Cells

_TITLES = {"modality": "Modality", "dataset": "Dataset", "da_level": "DA level"}
_COUNTS = ["images", "subjects", "slices", "voxels", "on disk", "drawn", "DA 0-5"]
_SPACINGS = {"spacing_z": "spacing z", "spacing_in_plane": "in-plane"}
_SHAPES = {"shape_d": "depth", "shape_h": "height", "shape_w": "width"}
_PUBLISHED = [
    ("Swin UNETR", 5_050, 0),
    ("SMIT", 3_643, 0),
    ("Nguyen et al.", 3_694, 108_948),
    ("UniMiSS", 5_022, 108_948),
    ("PUMIT (paper)", 48_344, 348_991),
]
"""3-D and 2-D images that methods were pre-trained on, as the paper counts them."""
_CAPTION = "DA 0-5: images of each level in %; p5/median/p95, spacings in mm"


def render(summary: dict[str, Any], console: Console) -> None:
    """Print what `audit` returned as tables."""
    totals = summary["totals"]
    console.print(
        f"[bold]{totals['ingested']:,} images[/] of {totals['subjects']:,} subjects: "
        f"{totals['slices']:,} slices, {totals['voxels'] / 1e6:,.1f} M voxels, "
        f"{decimal(totals['stored_bytes'])} on disk.\n"
        f"Discovered {totals['discovered']:,}, excluded {totals['excluded']:,}, failed {totals['failed']:,}."
    )
    outcomes = Table("dataset", title="Outcome of ingest", title_justify="left")
    for name in ("discovered", "ingested", "excluded", "failed"):
        outcomes.add_column(name, justify="right")
    outcomes.add_column("reasons")
    for row in summary["datasets"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in row["reasons"].items())
        counts = (f"{row[name]:,}" for name in ("discovered", "ingested", "excluded", "failed"))
        outcomes.add_row(escape(row["dataset"]), *counts, escape(reasons))
    console.print(outcomes)
    for column in AUDITED:
        console.print(render_groups(summary[f"by_{column}"], [column], _TITLES[column]))


def render_groups(rows: Sequence[dict[str, Any]], by: Sequence[str], title: str | None = None) -> Table:
    """The rows of `summarise` (as `to_pylist` gives them) as one printable table."""
    shapes = bool(rows) and "shape_d_median" in rows[0]
    table = Table(title=title, title_justify="left", caption=_CAPTION + "; median shapes in voxels" * shapes)
    for name in by:
        table.add_column(name, no_wrap=True)
    for name in (*_COUNTS, *_SPACINGS.values(), *["DxHxW"] * shapes):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [*_labels(row, by), *_counts(row), *(_spread(row, name) for name in _SPACINGS)]
        if shapes:
            cells.append("x".join(f"{row[f'{name}_median'] or 0:.3g}" for name in _SHAPES))
        table.add_row(*map(escape, cells))
    return table


def markdown_groups(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> str:
    """The rows of `summarise` in Markdown."""
    spreads = _SPACINGS | _SHAPES
    lines = [[*_labels(row, by), *_counts(row), *(_spread(row, name) for name in spreads)] for row in rows]
    header = [*by, *_COUNTS, *spreads.values()]
    table = markdown_table(header, lines, [name not in by for name in header])
    return f"{table}\n{_CAPTION}; shapes in voxels.\n"


def markdown_paper(survey: Sequence[Cells]) -> str:
    """Two tables as the paper has them: the images of each dataset, and all beside those of other methods.

    `survey` was made for `catalog.stats.PAPER`. A dataset's modalities and body parts are those of its images.
    """
    volumes, pictures = (
        {row["dataset"]: row["images"] for row in rows if row["dimension"] == dimension}
        for rows in [summarise_cells(survey, ["dataset", "dimension"], ()).to_pylist()]
        for dimension in (3, 2)
    )
    words = {
        column: _words(summarise_cells(survey, ["dataset", column], ()).to_pylist(), column)
        for column in ("modality", "body_part")
    }
    datasets = summarise_cells(survey, ["dataset"], ()).to_pylist()
    lines = [
        [
            row["dataset"],
            words["modality"].get(row["dataset"], ""),
            words["body_part"].get(row["dataset"], ""),
            *(f"{counts.get(row['dataset'], 0):,}" for counts in (volumes, pictures)),
            *(f"{row[name]:,}" for name in ("slices", "subjects")),
            f"{row['sampling_share']:.1%}",
        ]
        for row in datasets
    ]
    in_3d, in_2d = sum(volumes.values()), sum(pictures.values())
    slices, subjects = (sum(row[name] for row in datasets) for name in ("slices", "subjects"))
    lines.append(["**Total**", "", "", *(f"**{n:,}**" for n in (in_3d, in_2d, slices, subjects)), ""])
    header = ["Dataset", "Modality", "Body part", "3-D images", "2-D images", "Slices", "Subjects", "Drawn"]
    corpora = [*_PUBLISHED, ("this corpus", in_3d, in_2d)]
    overall = markdown_table(
        ["Pre-training data of", "3-D images", "2-D images"],
        [[name, f"{of_3d:,}", f"{of_2d:,}"] for name, of_3d, of_2d in corpora],
        [False, True, True],
    )
    return markdown_table(header, lines, [False] * 3 + [True] * 5) + "\n" + overall


def _words(rows: Sequence[dict[str, Any]], column: str) -> dict[str, str]:
    """What each dataset has in `column`, joined."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row[column] is not None:
            found.setdefault(row["dataset"], []).append(row[column])
    return {dataset: ", ".join(names) for dataset, names in found.items()}


def _labels(row: dict[str, Any], by: Sequence[str]) -> list[str]:
    return ["" if row[name] is None else str(row[name]) for name in by]


def _counts(row: dict[str, Any]) -> list[str]:
    """What stands below _COUNTS."""
    return [
        *(f"{row[name]:,}" for name in ("images", "subjects", "slices")),
        f"{row['voxels'] / 1e6:,.1f} M",
        decimal(row["stored_bytes"]),
        f"{row['sampling_share']:.1%}",
        " ".join(f"{100 * row[f'da_{level}'] / row['images']:.0f}" for level in LEVELS),
    ]


def _spread(row: dict[str, Any], name: str) -> str:
    values = [row[f"{name}_{label}"] for label in ("p5", "median", "p95")]
    return "-" if values[0] is None else "/".join(f"{value:.3g}" for value in values)
