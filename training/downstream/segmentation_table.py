"""The figures of a segmentation run as a page: each class, and the paper's methods at the same share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from catalog.output import markdown_table
from training.downstream.report import paper_results
from training.downstream.task import Cell, prefix_of

_FIGURES = ("Dice", "ASSD", "HD")


def page(cell: Cell, summary: Mapping[str, Any]) -> str:
    """Markdown: what `measures.summarise` found for a cell, in per cent and mm."""
    head = ("class", "Dice %", "ASSD mm", "HD mm", "cases", "missed", "invented")
    classes = [
        (name, *(_shown(of[figure]) for figure in _FIGURES), *(str(of[n]) for n in head[4:]))
        for name, of in summary["classes"].items()
    ]
    mean = ("mean", *(_shown(summary[figure]) for figure in _FIGURES), "", "", "")
    text = f"# {cell.task} from {cell.init}, {cell.mode}, {cell.fraction:.0%} of the training subjects\n\n"
    text += markdown_table(head, [*classes, mean], [False, *[True] * 6])
    paper = published(cell)
    if paper:
        rows = [(f"{method} (paper)", *map(_shown, figures)) for method, figures in paper.items()]
        text += "\nBeside the paper, whose figures are those of its settings (preset paper):\n\n"
        text += markdown_table(head[:4], [*rows, mean[:4]], [False, *[True] * 3])
    return text


def published(cell: Cell) -> dict[str, Sequence[float]]:
    """The paper's Dice, ASSD and HD by method, for the share of the data that the cell has; or nothing."""
    paper = paper_results(prefix_of(cell.task))
    if cell.fraction == 1:
        return {method: figures[""] for method, figures in paper.get("rows", {}).items()}
    of_share: dict[str, Sequence[float]] = paper.get("shares", {}).get(cell.fraction, {})
    return of_share


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"
