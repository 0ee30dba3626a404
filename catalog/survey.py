"""A catalog reduced to what statistics need: plain arrays, one dataset at a time, sorted into cells.

A cell is all ingested images of a dataset that are alike in every column one wants to group by, and in their DA
level. Any group is a union of cells, so counts and sums of cells are added; only people and order statistics
look at single images again. Nobody belongs to two datasets, so people are counted dataset by dataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.query import dataset_ids, load_dataset
from catalog.spacing import MAX_DA_LEVEL

GroupColumn = Literal["dataset", "modality", "body_part", "dimension", "da_level", "split"]
Measure = Literal["spacing_z", "spacing_in_plane", "shape_d", "shape_h", "shape_w"]
Label = str | int | None

MEASURES: tuple[Measure, ...] = get_args(Measure)
LEVELS = range(MAX_DA_LEVEL + 1)

_TEXT_COLUMNS = ("dataset", "modality", "split", "subject", "status", "reason")
_NUMBER_COLUMNS = (
    *("dimension", "da_level", "shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"),
    *("stored_bytes", "sampling_weight"),
)
SURVEY_COLUMNS = [*_TEXT_COLUMNS, *_NUMBER_COLUMNS, "body_part"]
"""Columns of the catalog that a survey may read."""

_Result = TypeVar("_Result")
_Argument = TypeVar("_Argument")
_Codes = npt.NDArray[np.int64] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class Cells:
    """One dataset: N ingested images in C cells, the images of a cell side by side."""

    dataset: str
    outcomes: dict[tuple[str, str | None], int]
    """Rows, ingested or not, by status and reason."""
    labels: list[dict[GroupColumn, tuple[Label, ...]]]
    """What the images of each cell have in common (C entries); several labels where they show several parts."""
    bounds: npt.NDArray[np.int64]
    """(C + 1,): images bounds[c] to bounds[c + 1] are of cell c."""
    sums: dict[str, npt.NDArray[Any]]
    """(C,) each: images, slices, voxels, stored_bytes, and weight, which counts images of training only."""
    values: dict[Measure, npt.NDArray[Any]]
    """(N,) each: spacings in mm as float64, NaN where unknown; shapes in voxels as int32, 0 where unknown."""
    person: _Codes
    """(N,): number of the subject, below `people`."""
    people: int

    def runs(self, cells: Sequence[int]) -> list[slice]:
        return [slice(self.bounds[cell], self.bounds[cell + 1]) for cell in cells]


def survey_corpus(
    corpus: Corpus,
    by: Collection[GroupColumn],
    measures: Collection[Measure] = MEASURES,
    where: str | None = None,
) -> list[Cells]:
    """Read what `by` and `measures` need of every dataset, checksums compared; `where` is a condition in SQL.

    Raises SetupError as `catalog.query.load_catalog` and, for `where`, `catalog.sql.select`.
    """
    if where is not None:
        return survey_table(load_survey_table(corpus, by, where), by, measures)
    columns = [name for name in _needed(by) if name != "dataset"]

    def read(dataset: str) -> Cells:
        return _cells(dataset, load_dataset(corpus, dataset, columns, dictionaries=_TEXT_COLUMNS), by, measures)

    return in_threads(read, dataset_ids(corpus))


def load_survey_table(corpus: Corpus, by: Collection[GroupColumn], where: str | None = None) -> pa.Table:
    """Those of SURVEY_COLUMNS that a survey by `by` needs, of all rows or those for which `where` holds.

    Columns of text may be dictionaries. Raises SetupError as `survey_corpus`.
    """
    if where is not None:
        from catalog.sql import select

        return select(corpus, _needed(by), where)

    def read(dataset: str) -> pa.Table:
        return load_dataset(corpus, dataset, _needed(by), dictionaries=_TEXT_COLUMNS)

    return pa.concat_tables(in_threads(read, dataset_ids(corpus)))


def _needed(by: Collection[GroupColumn]) -> list[str]:
    return [name for name in SURVEY_COLUMNS if name not in {"body_part", "dimension"} - set(by)]


def survey_table(
    table: pa.Table, by: Collection[GroupColumn], measures: Collection[Measure] = MEASURES
) -> list[Cells]:
    """The same of a table with SURVEY_COLUMNS, rows in any order."""
    code, names = _named_codes(table["dataset"])
    order = np.argsort(code, kind="stable")
    bounds = np.searchsorted(code[order], np.arange(len(names)))
    datasets = []
    for number, name in enumerate(names[:-1]):
        rows = order[bounds[number] : bounds[number + 1]]
        if rows[-1] - rows[0] + 1 == len(rows):
            datasets.append((str(name), table.slice(rows[0], len(rows))))
        else:
            datasets.append((str(name), table.take(pa.array(rows))))
    datasets.sort(key=lambda pair: pair[0])
    return in_threads(lambda pair: _cells(*pair, by, measures), datasets)


def in_threads(function: Callable[[_Argument], _Result], arguments: Iterable[_Argument]) -> list[_Result]:
    """The results in order. Reading, sorting and copying release Python's lock, and so use all cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(function, arguments))


def _cells(dataset: str, table: pa.Table, by: Collection[GroupColumn], measures: Collection[Measure]) -> Cells:
    status, statuses = _named_codes(table["status"])
    ingested = status == (*statuses, "ingested").index("ingested")
    others = np.flatnonzero(~ingested)
    reason, reasons = _named_codes(table["reason"])
    outcomes: dict[tuple[str, str | None], int] = {("ingested", None): table.num_rows - len(others)}
    for kind, count in zip(
        *np.unique(status[others] * len(reasons) + reason[others], return_counts=True), strict=True
    ):
        outcomes[str(statuses[kind // len(reasons)]), _text(reasons[kind % len(reasons)])] = int(count)

    columns = {name: _group_codes(table[name]) for name in sorted({*by, "da_level"} - {"dataset"})}
    code, cells = _combined([(codes, len(found)) for codes, found in columns.values()], table.num_rows)
    rows, bounds = _rows_by_cell(code, cells, ingested)
    labels: list[dict[GroupColumn, tuple[Label, ...]]] = [
        {"dataset": (dataset,)} | {name: found[codes[row]] for name, (codes, found) in columns.items()}
        for row in rows[bounds[:-1]]
    ]

    def numbers(name: str, missing: float | None) -> npt.NDArray[Any]:
        column = table[name] if missing is None else pc.fill_null(table[name], missing)
        return column.to_numpy()[rows]  # type: ignore[no-any-return]

    depth, height, width = (numbers(f"shape_{axis}", 0) for axis in "dhw")
    split, splits = _named_codes(table["split"])
    weight = numbers("sampling_weight", 0.0)
    if len(splits) > 2 or splits[0] != "train":
        weight = weight * np.array([name == "train" for name in splits])[split[rows]]
    summed = {
        "slices": depth.astype(np.int64),
        "voxels": depth.astype(np.int64) * height * width,
        "stored_bytes": numbers("stored_bytes", 0),
        "weight": weight,
    }
    sums = {name: np.add.reduceat(one, bounds[:-1]) if len(bounds) > 1 else one for name, one in summed.items()}
    sums["images"] = np.diff(bounds)
    values: dict[Measure, npt.NDArray[Any]] = {"shape_d": depth, "shape_h": height, "shape_w": width}
    if "spacing_z" in measures:
        values["spacing_z"] = numbers("spacing_z", None)
    if "spacing_in_plane" in measures:
        # As min, but a NaN or a null yields to the number beside it.
        values["spacing_in_plane"] = np.fmin(numbers("spacing_y", None), numbers("spacing_x", None))
    person, people = _codes(table["subject"])
    return Cells(
        dataset=dataset,
        outcomes=outcomes,
        labels=labels,
        bounds=bounds,
        sums=sums,
        values={name: one for name, one in values.items() if name in measures},
        person=person[rows],
        people=len(people) + 1,
    )


def _rows_by_cell(
    code: npt.NDArray[np.int64], cells: int, wanted: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The wanted rows, sorted by their code and else in order, and where each code that occurs begins."""
    small = np.uint16 if cells < 2**16 else np.int64  # two bytes are sorted by counting
    keys = np.where(wanted, code, cells).astype(small)
    rows = np.argsort(keys, kind="stable")[: np.count_nonzero(wanted)]
    ordered = keys[rows]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(rows) else rows
    return rows, np.append(starts, len(rows)).astype(np.int64)


def _combined(columns: Sequence[tuple[_Codes, int]], rows: int) -> tuple[npt.NDArray[np.int64], int]:
    """One number for every combination of codes that occurs, and how many there are; (codes, range) each."""
    code, size = np.zeros(rows, np.int64), 1
    for codes, found in columns:
        code = code * found + codes
        seen = np.zeros(size * found, bool)
        seen[code] = True
        # Numbered anew after each column, so that many columns cannot overflow.
        code, size = (np.cumsum(seen) - 1)[code], int(np.count_nonzero(seen))
    return code, size


def _first_rows(code: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    first = np.empty(size, np.int64)
    first[code[::-1]] = np.arange(len(code) - 1, -1, -1)
    return first


def _codes(column: pa.ChunkedArray) -> tuple[_Codes, pa.Array]:
    """A number for every row and the values that the numbers stand for; a null is numbered behind the last."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = column.unify_dictionaries().chunks
    values = chunks[0].dictionary if chunks else pa.array([], pa.null())
    codes = [pc.fill_null(chunk.indices, len(values)).to_numpy() for chunk in chunks]
    return codes[0] if len(codes) == 1 else np.concatenate([np.zeros(0, np.int32), *codes]), values


def _named_codes(column: pa.ChunkedArray) -> tuple[_Codes, list[Any]]:
    """The same with the values as a list, null the last."""
    codes, values = _codes(column)
    return codes, [*values.to_pylist(), None]


def _group_codes(column: pa.ChunkedArray) -> tuple[_Codes, list[tuple[Label, ...]]]:
    """As `_codes`, with the labels under which a row is counted: its value, or those of its list."""
    if not pa.types.is_list(column.type):
        codes, values = _named_codes(column)
        return codes, [(value,) for value in values]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    parts, names = _named_codes(pc.list_flatten(column))
    starts = np.cumsum(lengths) - lengths
    nothing = len(names)
    positions = []
    for position in range(lengths.max(initial=0)):
        at = np.full(len(lengths), nothing, np.int64)
        at[lengths > position] = parts[(starts + position)[lengths > position]]
        positions.append(at)
    code, size = _combined([(at, nothing + 1) for at in positions], len(lengths))
    labels = [
        tuple(sorted({names[at[row]] for at in positions if at[row] != nothing}, key=str)) or (None,)
        for row in _first_rows(code, size)
    ]
    return code, labels


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
