"""The images of one split as planning and reading need them: 10 million in memory that all workers map.

Numbers lie in one record an image, so that a draw touches one place; keys and paths are Arrow strings. Only
what is drawn becomes Python objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catalog.errors import SetupError
from catalog.sampling import LEVELS, Reals
from training.shared import ArrayWriter, SharedArray

IMAGE_COLUMNS = (
    *("dataset", "key", "split", "status", "sampling_weight", "da_level"),
    *("shape_c", "shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"),
    *("stored_dtype", "slope", "intercept", "window_low", "window_high"),
    *("shard_path", "shard_shape", "shard_index"),
)
"""Columns of the catalog that planners need."""

CODED_COLUMNS = ("dataset", "split", "status", "stored_dtype")
"""Those of them that may come as dictionary arrays: few different texts."""

_PIECE_ROWS = 1 << 16

_RECORD = np.dtype(
    [
        ("dataset", np.int32),
        ("dtype", np.int16),
        ("level", np.int8),
        ("weight", np.float64),
        ("shape", np.int32, 4),
        ("spacing", np.float64, 3),
        ("slope", np.float64),
        ("intercept", np.float64),
        ("window", np.float64, 2),
        ("shard_shape", np.int32, 4),
        ("shard_index", np.int32),
    ]
)
"""Names by number; NaN for a spacing, and -1 for an index, that is null."""

_TAKEN = ("dataset", "dtype", "shape", "spacing", "slope", "intercept", "window", "shard_shape", "shard_index")
"""Fields of a record that make a StoredImage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """Where an image's voxels lie and what they mean: the columns of the catalog that training needs."""

    dataset: str
    key: str
    shape: tuple[int, int, int, int]
    """(C, D, H, W)"""
    spacing: tuple[float | None, float | None, float | None]
    """mm along z, y, x; None where unknown, along z for 2-D."""
    dtype: str
    slope: float
    intercept: float
    window: tuple[float, float]
    """Real values that become 0 and 1."""
    shard_path: str
    shard_shape: tuple[int, ...]
    shard_index: int | None


class Images:
    """N images of one split in the order of (dataset, key). Sent to a worker, it weighs a few kilobytes."""

    def __init__(self, tables: Iterable[pa.Table], split: str) -> None:
        """Args: tables: rows with IMAGE_COLUMNS. Several tables come in order, the rows of each in any order.

        Raises SetupError, naming the image, if a row cannot be trained on: of another split, not ingested, or
        without a usable window, spacing, DA level or place of its voxels; and if tables are out of order.
        """
        records, keys, paths = ArrayWriter(_RECORD), _TextWriter(), _TextWriter()
        datasets, dtypes = _Names(), _Names()
        last = ("", "")
        for table in tables:
            ordered = _ordered(table.select(list(IMAGE_COLUMNS)))
            if not ordered.num_rows:
                continue
            first, end = (_name(ordered, row) for row in (0, ordered.num_rows - 1))
            if first < last:
                raise SetupError(
                    f"{first[0]}/{first[1]} comes after {last[0]}/{last[1]}, but a catalog is sorted by key: "
                    f"type `pumit-data verify {first[0]} --repair`, or ingest it again"
                )
            last = end
            for start in range(0, ordered.num_rows, _PIECE_ROWS):
                piece = ordered.slice(start, _PIECE_ROWS).combine_chunks()
                _check(piece, split)
                records.append(_records(piece, datasets, dtypes))
                keys.append(piece["key"])
                paths.append(piece["shard_path"])
        self._records = records.finish()
        self._keys, self._paths = keys.finish(), paths.finish()
        self._datasets, self._dtypes = datasets.in_order, dtypes.in_order

    def __len__(self) -> int:
        return len(self._records)

    @property
    def levels(self) -> npt.NDArray[np.int8]:
        """(N,): DA level without scaling."""
        return self._records.values["level"]

    def weights(self, rows: slice) -> Reals:
        """Sampling weights of n rows, (n,).

        Raises SetupError, naming the image, if one of them is no number >= 0.
        """
        weights: Reals = self._records.values["weight"][rows]
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if bad.size:
            image = self.take((rows.start or 0) + bad[:1])[0]
            raise SetupError(
                f"{image.dataset}/{image.key} has no usable sampling weight (a number >= 0): "
                f"ingest its dataset again, or check the mix{_others(bad.size)}"
            )
        return weights

    def geometry(self, rows: npt.NDArray[Any] | slice) -> tuple[npt.NDArray[np.int64], Reals]:
        """Of n rows, (D, H, W) in voxels (n, 3) and the spacings z, y, x in mm (n, 3), NaN where unknown."""
        records = self._records.values[rows]
        return records["shape"][:, 1:].astype(np.int64), records["spacing"]

    def take(self, rows: npt.NDArray[np.int64]) -> list[StoredImage]:
        """The images at some rows, in that order."""
        records = self._records.values[rows]
        numbers = (records[name].tolist() for name in _TAKEN)
        return [
            StoredImage(
                dataset=self._datasets[dataset],
                key=key,
                shape=(c, d, h, w),
                spacing=(_known(z), _known(y), _known(x)),
                dtype=self._dtypes[dtype],
                slope=slope,
                intercept=intercept,
                window=(low, high),
                shard_path=path,
                shard_shape=tuple(shard_shape),
                shard_index=None if index < 0 else index,
            )
            for key, path, dataset, dtype, (c, d, h, w), (z, y, x), slope, intercept, (
                low,
                high,
            ), *shard in zip(self._keys.take(rows), self._paths.take(rows), *numbers, strict=True)
            for shard_shape, index in [shard]
        ]


class _Texts:
    """Strings in shared memory, read as an Arrow array."""

    def __init__(self, offsets: SharedArray, content: SharedArray) -> None:
        self._offsets, self._content = offsets, content

    def take(self, rows: npt.NDArray[np.int64]) -> list[str]:
        buffers = [None, pa.py_buffer(self._offsets.values), pa.py_buffer(self._content.values)]
        texts = pa.Array.from_buffers(pa.large_string(), len(self._offsets) - 1, buffers, null_count=0)
        found: list[str] = texts.take(pa.array(rows)).to_pylist()
        return found


class _TextWriter:
    def __init__(self) -> None:
        self._offsets, self._content = ArrayWriter(np.int64), ArrayWriter(np.uint8)
        self._size = 0
        self._offsets.append(np.zeros(1, np.int64))

    def append(self, column: pa.ChunkedArray) -> None:
        texts = pa.concat_arrays(column.chunks).cast(pa.large_string())
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        content = texts.buffers()[2]
        if content is not None:
            self._content.append(np.frombuffer(content, np.uint8)[offsets[0] : offsets[-1]])
        self._offsets.append(offsets[1:] - offsets[0] + self._size)
        self._size += int(offsets[-1] - offsets[0])

    def finish(self) -> _Texts:
        return _Texts(self._offsets.finish(), self._content.finish())


class _Names:
    """Numbers for texts of which there are few, given as they come."""

    def __init__(self) -> None:
        self.in_order: list[str] = []

    def codes(self, column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """(n,): the number of each text of a column without nulls."""
        coded = pa.concat_arrays(_coded(column).unify_dictionaries().chunks)
        texts = coded.dictionary.to_pylist()
        self.in_order += [text for text in texts if text not in self.in_order]
        numbers = np.array([self.in_order.index(text) for text in texts], np.int64)
        codes: npt.NDArray[np.int64] = numbers[coded.indices.to_numpy(zero_copy_only=False)]
        return codes


def _known(mm: float) -> float | None:
    return None if math.isnan(mm) else mm


def _coded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_dictionary(column.type) else column.dictionary_encode()


def _ordered(table: pa.Table) -> pa.Table:
    """The rows in the order of (dataset, key). Those of a catalog file have it already: it is only checked."""
    dataset, key = table["dataset"], table["key"]
    before, after = slice(None, -1), slice(1, None)
    ascending = pc.less_equal(key[before], key[after])
    if len(dataset.unique()) > 1:
        dataset = dataset.cast(pa.string())
        same = pc.equal(dataset[before], dataset[after])
        ascending = pc.or_(pc.less(dataset[before], dataset[after]), pc.and_(same, ascending))
    if pc.all(ascending).as_py() is not False:
        return table
    order = pc.sort_indices(
        pa.table({"dataset": dataset, "key": key}), [("dataset", "ascending"), ("key", "ascending")]
    )
    return table.take(order)


def _name(table: pa.Table, row: int) -> tuple[str, str]:
    return table["dataset"][row].as_py(), table["key"][row].as_py()


def _check(table: pa.Table, split: str) -> None:
    """Raise SetupError for the first row that cannot be trained on."""
    _require(
        table,
        is_text(table["split"], split) & is_text(table["status"], "ingested"),
        f"is not an ingested image of the {split} split: give the planner the rows of that split only",
    )
    _require(
        table,
        _reals(table, "window_low") < _reals(table, "window_high"),
        "has no usable intensity window (window_low < window_high): ingest it again, or leave it out",
    )
    spacing = np.stack([_reals(table, f"spacing_{axis}") for axis in "zyx"], axis=1)
    _require(
        table,
        np.isnan(spacing[:, 0]) | ((spacing[:, 0] > 0) & (spacing[:, 1] > 0) & (spacing[:, 2] > 0)),
        "is 3-D and lacks a positive spacing: ingest it again, or leave it out",
    )
    _require(
        table,
        (_integers(table, "da_level") >= 0) & (_integers(table, "da_level") < LEVELS),
        "has no DA level from 0 to 5: ingest it again, or leave it out",
    )
    stored = np.ones(table.num_rows, np.bool_)
    for name in ("shape_c", "shape_d", "shape_h", "shape_w"):
        stored &= _integers(table, name) > 0
    for name in ("slope", "intercept", "stored_dtype", "shard_path"):
        stored &= pc.is_valid(table[name]).to_numpy()
    stored &= pc.fill_null(pc.equal(pc.list_value_length(table["shard_shape"]), 4), False).to_numpy()
    _require(
        table,
        stored,
        "lacks the shape, the type or the place of its voxels: ingest it again, or leave it out",
    )


def _require(table: pa.Table, good: npt.NDArray[np.bool_], problem: str) -> None:
    bad = np.flatnonzero(~good)
    if bad.size:
        dataset, key = _name(table, int(bad[0]))
        raise SetupError(f"{dataset}/{key} {problem}{_others(bad.size)}")


def _others(bad: int) -> str:
    return f" (at least {bad - 1} more like it)" if bad > 1 else ""


def _records(table: pa.Table, datasets: _Names, dtypes: _Names) -> npt.NDArray[np.void]:
    records = np.empty(table.num_rows, _RECORD)
    records["dataset"] = datasets.codes(table["dataset"])
    records["dtype"] = dtypes.codes(table["stored_dtype"])
    records["weight"] = _reals(table, "sampling_weight")
    records["level"] = _integers(table, "da_level")
    for number, axis in enumerate("cdhw"):
        records["shape"][:, number] = _integers(table, f"shape_{axis}")
    for number, axis in enumerate("zyx"):
        records["spacing"][:, number] = _reals(table, f"spacing_{axis}")
    for name in ("slope", "intercept"):
        records[name] = _reals(table, name)
    for number, end in enumerate(("low", "high")):
        records["window"][:, number] = _reals(table, f"window_{end}")
    records["shard_shape"] = pc.list_flatten(table["shard_shape"]).to_numpy().reshape(-1, 4)
    records["shard_index"] = _integers(table, "shard_index")
    return records


def is_text(column: pa.ChunkedArray, text: str) -> npt.NDArray[np.bool_]:
    """(n,): whether each value is a text; null is not. Dictionary arrays are not decoded for that."""
    coded = _coded(column)
    known = [
        np.append(np.asarray(chunk.dictionary.to_pylist(), object) == text, False)[  # the last one is for null
            chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        ]
        for chunk in coded.chunks
    ]
    return np.concatenate([np.empty(0, np.bool_), *known])


def _integers(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of integers; -1 for null."""
    return np.asarray(pc.fill_null(table[name], -1).to_numpy())


def _reals(table: pa.Table, name: str) -> Reals:
    """A column of numbers; NaN for null."""
    return np.asarray(table[name].to_numpy()).astype(np.float64, copy=False)
