"""Your own labels: a class for each image of a corpus, from a column of its catalog or from a table of yours.

    catalog:modality                      a column of the catalog (docs/catalog.md); null is no label
    catalog:finding, labels=findings.csv  the column `finding` of a CSV file with the columns dataset, key and,
                                          where you want to decide it, split (train, validation or test)

Without a split of yours, subjects are drawn for the three parts anew with every seed, of each class alike. No
subject is in two parts. What is seen of an image is its middle: a crop of the size of pre-training, at its own
resolution.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from catalog.conditions import Conditions
from catalog.errors import SetupError
from catalog.query import catalog_fingerprint, load_catalog
from catalog.remote import open_corpus
from catalog.sampling import CropGeometry
from catalog.schema import CATALOG_SCHEMA
from catalog.store import location
from shards.remote import Reader, open_reader
from training.augment import render
from training.backbone import Spacing
from training.config import Positive
from training.downstream.classification import METRICS as METRICS
from training.downstream.classification import (
    Batch,
    ClassificationConfig,
    Labelled,
    Rows,
    check_mode,
    classify,
)
from training.downstream.task import Cell, Result
from training.images import IMAGE_COLUMNS
from training.loader import RawBatch, read_batch
from training.plan import ValidationPlanner

PARTS = ("train", "validation", "test")

_KEPT_BYTES = 2 << 30
"""Of crops as stored that stay in memory between epochs."""
_SHARES = 3

Share = Annotated[float, Field(gt=0, lt=1)]
Name = tuple[str, str]
"""Data set and key of an image."""


class CatalogConfig(ClassificationConfig):
    """Settings of catalog:COLUMN."""

    data: str | None = None
    """The prepared corpus: a folder or URL."""
    labels: Path | None = None
    """CSV file that has the labels; without it they are a column of the catalog."""
    where: str | None = None
    """Only images for which this condition in SQL holds."""
    validation_share: Share
    """Share of each class's subjects on which learning rate and epoch are chosen."""
    test_share: Share
    """Share of each class's subjects that are measured on."""
    tokens_z: Positive
    """Size of a crop along depth in tokens of 16 >> level slices."""
    tokens_x: Positive
    """Size of a crop along height and along width in tokens of 16 voxels."""


CONFIG = CatalogConfig


def check(cell: Cell, config: CatalogConfig) -> None:
    """Raise SetupError if no corpus was given, or there is no such column or mode."""
    if config.data is None:
        raise SetupError(f"{cell.task} needs a prepared corpus: give it with --data")
    if config.labels is None and _column(cell.task) not in CATALOG_SCHEMA.names:
        raise SetupError(
            f"{cell.task}: the catalog has no column {_column(cell.task)} (docs/catalog.md lists them). For "
            "labels of your own give --set labels=FILE.csv with the columns dataset, key and that one."
        )
    if config.validation_share + config.test_share >= 1:
        raise SetupError(
            "validation_share and test_share leave no subject to train on: their sum must be below 1"
        )
    check_mode(cell.mode)


def run(cell: Cell, config: CatalogConfig, folder: Path) -> Result:
    """Train and measure on the labels that the task names; see `training.downstream.task.Task`."""
    return classify(load(cell.task, config, cell.seed), cell, config, folder)


def load(task: str, config: CatalogConfig, seed: int) -> Labelled:
    """The labelled images of the corpus at `config.data` in three parts.

    Classes with fewer than three subjects are left out. Raises SetupError if fewer than two are left, or a row
    of the labels names no ingested image.
    """
    corpus = open_corpus(location(str(config.data)))
    column = _column(task)
    taken = [*IMAGE_COLUMNS, "subject", *([column] if config.labels is None else [])]
    condition = None if config.where is None else Conditions([config.where])
    table = load_catalog(corpus, list(dict.fromkeys(taken + (condition.columns if condition else []))))
    if condition is not None:
        table = table.filter(pa.array(condition.of(table)[0]))
    names = list(zip(table["dataset"].to_pylist(), table["key"].to_pylist(), strict=True))
    if config.labels is None:
        given = {name: (_text(value), "") for name, value in zip(names, table[column].to_pylist(), strict=True)}
    else:
        given = _read_labels(config.labels, column)
        if config.where is None and (unknown := [name for name in given if name not in set(names)]):
            raise SetupError(
                f"{config.labels}: {'/'.join(unknown[0])} is no ingested image of {config.data}"
                f"{f' ({len(unknown) - 1} more like it)' if len(unknown) > 1 else ''}"
            )
    subjects = dict(zip(names, (f"{d}/{s}" for d, s in _columns(table, "dataset", "subject")), strict=True))
    labelled = {name: given[name] for name in names if given.get(name, (None, ""))[0] is not None}
    classes = _classes(labelled, subjects)
    if len(classes) < 2:
        raise SetupError(
            f"{task}: fewer than two classes have {_SHARES} subjects or more. Classes: "
            f"{', '.join(sorted({str(label) for label, _ in labelled.values()})) or 'none'}"
        )
    kept = [name for name in names if name in labelled and labelled[name][0] in classes]
    rows = [row for row, name in enumerate(names) if name in set(kept)]
    labels = np.array([classes.index(str(labelled[name][0])) for name in kept], np.int64)
    of_subject = [subjects[name] for name in kept]
    parts = _parts([labelled[name][1] for name in kept], of_subject, labels, config, seed)
    crop = CropGeometry(tokens_z=config.tokens_z, tokens_x=config.tokens_x)
    return Labelled(
        cases=_Images(open_reader(corpus.shards), table.take(rows), kept, labels, crop),
        classes=tuple(classes),
        subjects=np.array(of_subject),
        training=np.flatnonzero(parts == 0),
        validation=np.flatnonzero(parts == 1),
        test=np.flatnonzero(parts == 2),
        facts={
            "catalog": catalog_fingerprint(corpus),
            "classes": {
                name: {part: int(((labels == k) & (parts == p)).sum()) for p, part in enumerate(PARTS)}
                for k, name in enumerate(classes)
            },
            "left_out": len(labelled) - len(kept),
        },
    )


class _Images:
    """The middles of images, read when they are asked for; images of one batch have one DA level."""

    vary = False

    def __init__(
        self, reader: Reader, table: pa.Table, names: Sequence[Name], labels: Rows, crop: CropGeometry
    ) -> None:
        """Args: table: rows of the catalog, `names` in their order."""
        self._reader = reader
        self.labels = labels
        at = table.schema.get_field_index("split")
        held_out = pa.array(["validation"] * table.num_rows, pa.string())
        # The planner of crops that nothing is random about takes rows of the validation split.
        self._planner = ValidationPlanner(table.set_column(at, "split", held_out), crop, 1)
        row_of = {name: row for row, name in enumerate(names)}
        self._step_of: dict[int, int] = {}
        self._level_of: dict[int, int] = {}
        for step in range(len(self._planner)):
            plan = self._planner.plan(step)
            row = row_of[plan.samples[0].image.dataset, plan.samples[0].image.key]
            self._step_of[row], self._level_of[row] = step, plan.level
        self._kept: dict[int, RawBatch] = {}
        self._kept_bytes = 0

    def batches(
        self, rows: Rows, size: int, device: torch.device, draw: torch.Generator | None
    ) -> Iterator[Batch]:
        """Batches fill level by level, in the order of `rows`; their spacing is that of the first image."""
        waiting: dict[int, list[int]] = defaultdict(list)
        for row in rows.tolist():
            level = self._level_of[row]
            waiting[level].append(row)
            if len(waiting[level]) == size:
                yield self._batch(waiting.pop(level), device)
        for left in waiting.values():
            yield self._batch(left, device)

    def _batch(self, rows: list[int], device: torch.device) -> Batch:
        read = [self._read(row) for row in rows]
        image_BCDHW = torch.cat([render(one, device).voxels for one in read])
        z, y, x = read[0].plan.samples[0].image.spacing
        return Batch(np.array(rows, np.int64), image_BCDHW, _known(z, y, x))

    def _read(self, row: int) -> RawBatch:
        if row in self._kept:
            return self._kept[row]
        read = read_batch(self._reader, self._planner.plan(self._step_of[row]))
        size = sum(box.nbytes for box in read.boxes)
        if self._kept_bytes + size <= _KEPT_BYTES:
            self._kept[row] = read
            self._kept_bytes += size
        return read


def _known(z: float | None, y: float | None, x: float | None) -> Spacing:
    return tuple(math.nan if mm is None else mm for mm in (z, y, x))  # type: ignore[return-value]


def _column(task: str) -> str:
    return task.partition(":")[2]


def _columns(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def _text(value: Any) -> str | None:
    """A value of the catalog as the name of a class; lists by their members, in order of the alphabet."""
    if isinstance(value, list):
        return "+".join(sorted(map(str, value))) or None
    return None if value is None else str(value)


def _read_labels(file: Path, column: str) -> dict[Name, tuple[str | None, str]]:
    """Label and part (empty where the file does not say) of each image that a CSV file names."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            head = table.fieldnames or []
            if missing := [name for name in ("dataset", "key", column) if name not in head]:
                raise SetupError(
                    f"{file} has no column {', '.join(missing)}; it has {', '.join(head) or 'none'}"
                )
            found: dict[Name, tuple[str | None, str]] = {}
            for number, row in enumerate(table, 2):
                name, part = (row["dataset"], row["key"]), row.get("split") or ""
                if name in found:
                    raise SetupError(f"{file}, line {number}: {'/'.join(name)} was named before")
                if ("split" in head) != (part in PARTS):
                    raise SetupError(f"{file}, line {number}: split is {part!r}, not one of {', '.join(PARTS)}")
                found[name] = (row[column] or None, part)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SetupError(f"cannot read the labels {file}: {error}") from error
    return found


def _classes(labelled: Mapping[Name, tuple[str | None, str]], subjects: Mapping[Name, str]) -> list[str]:
    """Names of the classes that can be in all three parts, sorted."""
    of_class: dict[str, set[str]] = defaultdict(set)
    for name, (label, _) in labelled.items():
        of_class[str(label)].add(subjects[name])
    return sorted(label for label, who in of_class.items() if len(who) >= _SHARES)


def _parts(
    given: Sequence[str], subjects: Sequence[str], labels: Rows, config: CatalogConfig, seed: int
) -> Rows:
    """(N,): 0 to train on, 1 to choose by, 2 to measure on. A subject counts for its first class."""
    part_of: dict[str, int] = {}
    if any(given):
        for part, subject in zip(given, subjects, strict=True):
            if part_of.setdefault(subject, PARTS.index(part)) != PARTS.index(part):
                raise SetupError(
                    f"the labels put images of subject {subject} into {PARTS[part_of[subject]]} and {part}: "
                    "all images of a person belong into one part"
                )
    else:
        first: dict[str, int] = {}
        for subject, label in zip(subjects, labels.tolist(), strict=True):
            first.setdefault(subject, label)
        draw = np.random.default_rng(seed)
        for label in range(int(labels.max()) + 1):
            shuffled = draw.permutation(sorted(who for who, which in first.items() if which == label)).tolist()
            chosen = max(round(config.validation_share * len(shuffled)), 1)
            measured = max(round(config.test_share * len(shuffled)), 1)
            for number, subject in enumerate(shuffled):
                part_of[subject] = 1 if number < chosen else 2 if number < chosen + measured else 0
    return np.array([part_of[subject] for subject in subjects], np.int64)
