"""How often training draws what: exact shares by modality, dataset and DA level, before and after a mix.

The probability that a crop shows an image is its weight over all weights; at which DA level it is seen under
random scaling is known in closed form (`catalog.sampling`). So nothing is drawn to find out.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import dataset_ids, read_batches, remedy_of
from catalog.sampling import LEVELS, CropGeometry, Reals, ScaleRules, image_scales, level_probabilities
from catalog.schema import CATALOG_SCHEMA
from catalog.selection import Selection

CROP = CropGeometry(tokens_z=4, tokens_x=8)
"""Crops of the paper's tokenizer, for which shares of DA levels are told; other sizes move them a little."""

_TEXTS = ("dataset", "status", "split", "modality")
_NUMBERS = ("dimension", "da_level", "sampling_weight", "shape_h", "shape_w")
_SPACINGS = ("spacing_z", "spacing_y", "spacing_x")


class Labels(NamedTuple):
    """What the images of a cell have in common."""

    dataset: str
    modality: str | None
    dimension: int | None
    da_level: int | None


@dataclass
class Cell:
    """Training images that are alike in their labels; first without the mix, then with it."""

    images: npt.NDArray[np.int64]
    """(2,): how many can be drawn."""
    masses: Reals
    """(2, 6): summed weight x probability of each DA level."""

    def __iadd__(self, other: Cell) -> Cell:
        self.images, self.masses = self.images + other.images, self.masses + other.masses
        return self


@dataclass
class Tally:
    """All training images of a corpus, counted by cell."""

    cells: dict[Labels, Cell]
    subjects: tuple[int, int]
    """People with images that can be drawn, without the mix and with it."""

    @property
    def images(self) -> tuple[int, int]:
        """Images that can be drawn, without the mix and with it."""
        before, after = sum((cell.images for cell in self.cells.values()), np.zeros(2, np.int64))
        return int(before), int(after)

    @property
    def masses(self) -> Reals:
        """(2, 6): summed weight x probability of each DA level."""
        return sum((cell.masses for cell in self.cells.values()), np.zeros((2, LEVELS)))

    def levels(self) -> list[dict[str, Any]]:
        """Share of the crops at each DA level: rows of da_level, before, after."""
        before, after = map(_shares, self.masses)
        return [
            {"da_level": level, "before": float(before[level]), "after": float(after[level])}
            for level in range(LEVELS)
        ]

    def groups(self, column: str) -> list[dict[str, Any]]:
        """Share of the crops of each value of a column of Labels: rows of it, images and shares."""
        united: dict[Any, Cell] = {}
        for labels, cell in self.cells.items():
            united.setdefault(getattr(labels, column), _no_images()).__iadd__(cell)
        names = sorted(united, key=lambda name: (name is None, str(name)))
        masses = np.array([united[name].masses.sum(axis=1) for name in names]).reshape(-1, 2)
        before, after = _shares(masses[:, 0]), _shares(masses[:, 1])
        return [
            {
                column: name,
                "images_before": int(united[name].images[0]),
                "images_after": int(united[name].images[1]),
                "before": float(before[row]),
                "after": float(after[row]),
            }
            for row, name in enumerate(names)
        ]


def tally(corpus: Corpus, selection: Selection) -> Tally:
    """Count the training images of a corpus, some ten thousand in memory at a time.

    Raises SetupError if nothing has been ingested, a file is damaged, or a row cannot be trained on.
    """
    cells: dict[Labels, Cell] = {}
    subjects = np.zeros(2, np.int64)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for dataset in dataset_ids(corpus):
            people: tuple[list[pa.Array], list[pa.Array]] = ([], [])
            pieces = ((table, selection.factors(table)) for table in _training_rows(corpus, dataset, selection))
            for found, subjects_found in _in_order(pool, lambda piece: _counted(*piece), pieces):
                for labels, cell in found.items():
                    cells.setdefault(labels, _no_images()).__iadd__(cell)
                for one, several in zip(subjects_found, people, strict=True):
                    several.append(one)
            subjects += [len(pc.unique(pa.chunked_array(several, pa.string()))) for several in people]
    return Tally(cells, (int(subjects[0]), int(subjects[1])))


def _training_rows(corpus: Corpus, dataset: str, selection: Selection) -> Iterator[pa.Table]:
    columns = list(dict.fromkeys([*_TEXTS, "subject", *_NUMBERS, *_SPACINGS, *selection.columns]))
    path, remedy = corpus.catalog_file(dataset), remedy_of(dataset)
    for table in read_batches(path, remedy, columns, schema=CATALOG_SCHEMA, dictionaries=_TEXTS):
        wanted = pc.and_(pc.equal(table["status"], "ingested"), pc.equal(table["split"], "train"))
        rows = table if pc.all(wanted).as_py() else table.filter(wanted)
        if rows.num_rows:
            yield rows


def _counted(table: pa.Table, factors: Reals) -> tuple[dict[Labels, Cell], list[pa.Array]]:
    """The cells of some images of one dataset, and the subjects among them without and with the mix."""
    weight = pc.fill_null(table["sampling_weight"], 0.0).to_numpy()
    masses = weight[:, None] * _probabilities(table)
    modality = table["modality"].unify_dictionaries().combine_chunks()
    names = [*modality.dictionary.to_pylist(), None]
    columns = [modality.indices, *(table[name].combine_chunks() for name in ("dimension", "da_level"))]
    sizes = (len(names), 5, LEVELS + 1)
    parts = [
        pc.fill_null(column, size - 1).to_numpy().astype(np.int64)
        for column, size in zip(columns, sizes, strict=True)
    ]
    code = np.ravel_multi_index(parts, sizes)
    drawn = np.stack([weight > 0, weight * factors > 0])
    images = [np.bincount(code[row]) for row in drawn]
    dataset = table["dataset"][0].as_py()
    cells = {}
    for number in np.flatnonzero(np.bincount(code)):
        part, dimension, level = (int(at) for at in np.unravel_index(number, sizes))
        rows = np.flatnonzero(code == number)
        labels = Labels(
            dataset,
            names[part],
            dimension if dimension < sizes[1] - 1 else None,
            level if level < LEVELS else None,
        )
        cells[labels] = Cell(
            np.array([count[number] if number < len(count) else 0 for count in images], np.int64),
            np.stack([masses[rows].sum(axis=0), factors[rows] @ masses[rows]]),
        )
    subjects = table["subject"].combine_chunks()
    people = [pc.unique(subjects.filter(pa.array(row))) for row in drawn]
    return cells, people


def _probabilities(table: pa.Table) -> Reals:
    """Probability of each DA level under random scaling, (n, 6)."""
    spacing = np.stack([table[name].to_numpy() for name in _SPACINGS], axis=1).astype(np.float64)
    sides = np.minimum(*(pc.fill_null(table[name], 0).to_numpy() for name in ("shape_h", "shape_w")))
    try:
        return level_probabilities(image_scales(spacing, sides, CROP, ScaleRules()))
    except ValueError as error:
        dataset = table["dataset"][0].as_py()
        raise SetupError(f"{dataset}: {error}. {remedy_of(dataset)}") from error


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], arguments: Iterable[Any]
) -> Iterator[Any]:
    """The results in order, of which some few are under way at a time."""
    waiting: deque[Future[Any]] = deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) > 4:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _no_images() -> Cell:
    return Cell(np.zeros(2, np.int64), np.zeros((2, LEVELS)))


def _shares(masses: Reals) -> Reals:
    """Of a whole, which may be nothing."""
    whole = masses.sum()
    return masses / whole if whole > 0 else masses
