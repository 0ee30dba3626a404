"""What frozen features of the ViT know, beside those of the same network untrained and of grey values alone.

A linear classifier learns from training subjects of the corpus and is tested on the held-out ones, which
neither ViT nor tokenizer has seen. They are few, so it is done again with other subjects to choose its settings
by. In a second comparison the subjects to be tested on are drawn anew as well; the ViT has then seen some,
without labels.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catalog.corpus import Corpus
from catalog.query import load_catalog
from training.downstream.compare import Grid, run_grid
from training.downstream.report import write_report

COLUMNS = ("modality", "body_part")
STARTS = ("grey values", "untrained", "pre-trained")
DRAWS = 10
"""Draws of the training subjects that settings are chosen by."""
SEEDS = 20
"""Draws of all subjects."""
_GREY = Path(__file__).with_name("grey.py")


def frozen_features(corpus: Path, vit: Path, work: Path, out: Path) -> None:
    """Both comparisons; runs and labels lie in `work`, tables go to `out`."""
    work.mkdir(exist_ok=True)
    images = load_catalog(Corpus(corpus), ["dataset", "key", "subject", "split", *COLUMNS]).to_pylist()
    held_out = [
        {
            "task": f"catalog:{name}",
            "set": {"labels": str(_write_labels(images, column, draw, work / f"{name}.csv"))},
        }
        for column in COLUMNS
        for draw in range(DRAWS)
        for name in (f"{column}-{draw}",)
    ]
    drawn = [{"task": f"catalog:{column}"} for column in COLUMNS]
    lines = [f"| test subjects | label | mode | {' | '.join(STARTS)} |", "|---" * (3 + len(STARTS)) + "|"]
    lines += _compared("held out", held_out, ["linear"], [0], corpus, vit, work / "held-out")
    lines += _compared("drawn", drawn, ["linear", "knn-5"], range(SEEDS), corpus, vit, work / "drawn")
    (out / "frozen-features.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _compared(
    name: str,
    tasks: Sequence[Mapping[str, Any]],
    modes: Sequence[str],
    seeds: Sequence[int],
    corpus: Path,
    vit: Path,
    cells: Path,
) -> list[str]:
    """Lines of the table: AUC in per cent, mean and standard deviation. Tests are in the report in `cells`."""
    places = (f"{_GREY}:grey", f"scratch:{vit}", str(vit))
    grid = Grid.model_validate(
        {
            "tasks": [{"preset": "tiny", "data": str(corpus), **task} for task in tasks],
            "inits": [{"init": init, "name": name} for init, name in zip(places, STARTS, strict=True)],
            "modes": modes,
            "seeds": list(seeds),
            "baseline": STARTS[1],
        }
    )
    outcome = run_grid(grid, cells)
    write_report(grid, outcome, cells)
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in outcome.results:
        column = cell.cell.task.partition(":")[2].partition("-")[0]
        found[column, cell.cell.mode][cell.name].append(100 * result.metrics["AUC"])
    return [
        f"| {name} | {column.replace('_', ' ')} | {mode} | "
        + " | ".join(f"{np.mean(of[start]):.1f} ± {np.std(of[start], ddof=1):.1f}" for start in STARTS)
        + " |"
        for (column, mode), of in sorted(found.items(), reverse=True)
    ]


def _write_labels(images: Sequence[Mapping[str, Any]], column: str, draw: int, file: Path) -> Path:
    """Labels of classes that all parts have: tested on held-out subjects, chosen by a quarter of the others."""
    labelled = [image | {"label": _label(image[column])} for image in images if image[column]]
    subjects = defaultdict(set)
    for image in labelled:
        if image["split"] == "train":
            subjects[image["label"]].add(image["subject"])
    rng = np.random.default_rng(draw)
    chosen_by = set()
    for _, of_class in sorted(subjects.items()):
        if len(of_class) > 1:
            chosen_by |= set(rng.permutation(sorted(of_class))[: max(1, len(of_class) // 4)].tolist())
    for image in labelled:
        seen = "validation" if image["subject"] in chosen_by else "train"
        image["part"] = "test" if image["split"] == "validation" else seen
    parts = {part: {image["label"] for image in labelled if image["part"] == part} for part in _PARTS}
    everywhere = set.intersection(*parts.values())
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["dataset", "key", file.stem, "split"])
        table.writerows(
            (image["dataset"], image["key"], image["label"], image["part"])
            for image in labelled
            if image["label"] in everywhere
        )
    return file


_PARTS = ("train", "validation", "test")


def _label(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else value[0]
