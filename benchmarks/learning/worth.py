"""What frozen features of the ViT know, beside those of the same network untrained and of grey values alone.

A linear classifier learns from some subjects of the corpus and is tested on others. In the first comparison
these were never seen by ViT or tokenizer: subjects are dealt to folds, and for each fold a tokenizer and a ViT
are trained without its subjects. In the second, subjects are drawn many times for one ViT, which has then seen
most of them, without labels.
"""

from __future__ import annotations

import csv
import json
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from catalog.conditions import literal
from catalog.corpus import Corpus
from catalog.query import load_catalog
from training import train_mim, train_tokenizer
from training.config import load_preset
from training.downstream.compare import Grid, run_grid
from training.downstream.report import write_report

COLUMNS = ("modality", "body_part")
STARTS = ("grey values", "untrained", "pre-trained")
FOLDS = 4
"""As many as there are chest CTs, so that most classes are in all."""
TOKENIZER_STEPS = 2000
"""Of the tokenizer of a fold: five minutes instead of 37."""
DRAWS = 5
"""For each fold, of the subjects that settings are chosen by."""
SEEDS = 20
"""Draws of all subjects."""
_GREY = Path(__file__).with_name("grey.py")

Subject = tuple[str, str]
Scores = dict[tuple[str, str], dict[str, list[float]]]
"""AUC in per cent by (column, mode) and start."""


def unseen_subjects(corpus: Path, work: Path, out: Path, deals: int) -> None:
    """The first comparison, so many times; runs and labels lie in `work`, the table goes to `out`."""
    work.mkdir(exist_ok=True)
    images = _images(corpus)
    means: Scores = defaultdict(lambda: defaultdict(list))
    for deal, fold in product(range(deals), range(FOLDS)):
        subjects = _folds(images, deal)[fold]
        folder = work / f"fold-{deal}-{fold}"
        folder.mkdir(exist_ok=True)
        vit = _pretrained(corpus, folder, subjects)
        tasks = [
            {
                "task": f"catalog:{name}",
                "set": {"labels": str(_write_labels(images, column, subjects, draw, folder / f"{name}.csv"))},
            }
            for column in COLUMNS
            for draw in range(DRAWS)
            for name in (f"{column}-{draw}",)
        ]
        for case, of_start in _scores(tasks, ["linear"], [0], corpus, vit, folder / "compared").items():
            for start, scores in of_start.items():
                means[case][start].append(float(np.mean(scores)))
    lines = _table("never seen", means)
    for (column, _), of_start in means.items():
        for baseline in STARTS[:-1]:
            gains = np.subtract(of_start[STARTS[-1]], of_start[baseline])
            lines.append(
                f"\n{column}: {STARTS[-1]} - {baseline} by fold: {' '.join(f'{gain:+.1f}' for gain in gains)}, "
                f"mean {gains.mean():+.1f}, p = {_p_of_folds(gains):.2f}"
            )
    (out / "unseen-subjects.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def drawn_subjects(corpus: Path, vit: Path, work: Path, out: Path) -> None:
    """The second comparison, of the ViT of the run folder `vit`."""
    work.mkdir(exist_ok=True)
    tasks = [{"task": f"catalog:{column}"} for column in COLUMNS]
    scores = _scores(tasks, ["linear", "knn-5"], range(SEEDS), corpus, vit, work / "drawn")
    lines = _table("drawn", scores)
    (out / "drawn-subjects.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _images(corpus: Path) -> list[dict[str, Any]]:
    columns = ["dataset", "key", "subject", *COLUMNS]
    images: list[dict[str, Any]] = load_catalog(Corpus(corpus), columns).to_pylist()
    for image in images:
        image["body_part"] = image["body_part"][0] if image["body_part"] else None
    return images


def _folds(images: Sequence[Mapping[str, Any]], deal: int) -> list[set[Subject]]:
    """Subjects dealt out one after the other, those of one modality and body part at a time."""
    of_kind = defaultdict(set)
    for image in images:
        of_kind[tuple(str(image[column]) for column in COLUMNS)].add((image["dataset"], image["subject"]))
    rng = np.random.default_rng(deal)
    # The largest kinds first, so that the small ones fill up.
    kinds = sorted(of_kind.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    dealt = list(chain.from_iterable(rng.permutation(sorted(subjects)).tolist() for _, subjects in kinds))
    return [{(dataset, subject) for dataset, subject in dealt[fold::FOLDS]} for fold in range(FOLDS)]


def _pretrained(corpus: Path, folder: Path, without: AbstractSet[Subject]) -> Path:
    """Run folder of a ViT whose pre-training, and whose tokenizer's, some subjects had no part in."""
    names = ", ".join(literal("/".join(subject)) for subject in sorted(without))
    where = f"dataset || '/' || subject NOT IN ({names})"
    mix = ["mix", "write", folder.name, "--where", where, "--force", "--data", str(corpus)]
    subprocess.run(["pumit-data", *mix], check=True, stdout=subprocess.DEVNULL)
    tokenizer, vit = folder / "tokenizer", folder / "vit"
    if not (tokenizer / "summary.json").exists():
        settings = [f"data.mix={folder.name}", f"steps={TOKENIZER_STEPS}"]
        config = load_preset("tokenizer", "small", settings)
        train_tokenizer.train(config, corpus, tokenizer, resume=tokenizer.exists())
    if not (vit / "summary.json").exists():
        settings = [f"data.mix={folder.name}", f"tokenizer={json.dumps(str(tokenizer))}"]
        train_mim.train(load_preset("mim", "small", settings), corpus, vit, resume=vit.exists())
    return vit


def _scores(
    tasks: Sequence[Mapping[str, Any]],
    modes: Sequence[str],
    seeds: Sequence[int],
    corpus: Path,
    vit: Path,
    cells: Path,
) -> Scores:
    """Of every task, mode and seed. Tests are in the report in `cells`."""
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
    found: Scores = defaultdict(lambda: defaultdict(list))
    for cell, result in outcome.results:
        column = cell.cell.task.partition(":")[2].partition("-")[0]
        found[column, cell.cell.mode][cell.name].append(100 * result.metrics["AUC"])
    return found


def _p_of_folds(gains: NDArray[np.float64]) -> float:
    """Two-sided, of folds whose training subjects overlap (Nadeau and Bengio, Machine Learning 52, 2003)."""
    tested_per_trained = 1 / (FOLDS - 1)
    variance = (1 / len(gains) + tested_per_trained) * gains.var(ddof=1)
    return float(2 * stats.t.sf(abs(gains.mean()) / np.sqrt(variance), len(gains) - 1))


def _table(name: str, scores: Scores) -> list[str]:
    """Means and standard deviations."""
    head = [f"| test subjects | label | mode | {' | '.join(STARTS)} |", "|---" * (3 + len(STARTS)) + "|"]
    return head + [
        f"| {name} | {column.replace('_', ' ')} | {mode} | "
        + " | ".join(f"{np.mean(of[start]):.1f} ± {np.std(of[start], ddof=1):.1f}" for start in STARTS)
        + " |"
        for (column, mode), of in sorted(scores.items(), reverse=True)
    ]


def _write_labels(
    images: Sequence[Mapping[str, Any]], column: str, tested: AbstractSet[Subject], draw: int, file: Path
) -> Path:
    """Labels of classes that all parts have: settings are chosen by a quarter of the subjects not tested on."""
    labelled = [{**image, "person": (image["dataset"], image["subject"])} for image in images if image[column]]
    subjects = defaultdict(set)
    for image in labelled:
        if image["person"] not in tested:
            subjects[image[column]].add(image["person"])
    rng = np.random.default_rng(draw)
    chosen_by: set[Subject] = set()
    for _, of_class in sorted(subjects.items()):
        if len(of_class) > 1:
            drawn = rng.permutation(sorted(of_class))[: max(1, len(of_class) // 4)].tolist()
            chosen_by |= {(dataset, subject) for dataset, subject in drawn}
    for image in labelled:
        person = image["person"]
        image["part"] = "test" if person in tested else "validation" if person in chosen_by else "train"
    parts = {part: {image[column] for image in labelled if image["part"] == part} for part in _PARTS}
    everywhere = set.intersection(*parts.values())
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["dataset", "key", file.stem, "split"])
        table.writerows(
            (image["dataset"], image["key"], image[column], image["part"])
            for image in labelled
            if image[column] in everywhere
        )
    return file


_PARTS = ("train", "validation", "test")
