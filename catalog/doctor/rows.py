"""The ingested images of one dataset as plain arrays, a column at a time, so that no table is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_TEXTS = ("status", "modality", "original_orientation", "depth_axis", "depth_rule")

Load = Callable[[Sequence[str]], pa.Table]
"""Gives these columns of all rows, always in the same order."""
Rows = npt.NDArray[np.int64]
"""Numbers of images among the ingested ones."""


@dataclass(frozen=True)
class Group:
    """The images of one modality."""

    modality: str | None
    rows: Rows

    @property
    def kind(self) -> str:
        """What stands before the slash of the modality."""
        return (self.modality or "").partition("/")[0]


class Images:
    """N ingested images of a dataset, in the order of the catalog."""

    def __init__(self, dataset: str, load: Load) -> None:
        self.dataset = dataset
        self._load = load
        status, names = _codes(load(["status"])["status"])
        self._ingested = np.flatnonzero(status == (*names, "ingested").index("ingested"))
        modality, modalities = _codes(load(["modality"])["modality"])
        here = modality[self._ingested]
        self.groups = [
            Group(name, rows)
            for number, name in enumerate(modalities)
            if len(rows := np.flatnonzero(here == number))
        ]

    def __len__(self) -> int:
        return len(self._ingested)

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """(N,): a column of numbers, NaN for nulls."""
        column = self._load([name])[name].cast(pa.float64())
        values: npt.NDArray[np.float64] = column.to_numpy()[self._ingested]
        return values

    def texts(self, name: str) -> tuple[npt.NDArray[Any], list[str | None]]:
        """(N,) numbers, and the texts (or null) that they stand for."""
        codes, names = _codes(self._load([name])[name])
        return codes[self._ingested], names

    def lengths(self, name: str) -> npt.NDArray[np.float64]:
        """(N,): product of a list of sides; of a box of three ranges, its volume. NaN for nulls."""
        column = self._whole(name)
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.float64)
        starts = np.cumsum(counts) - counts
        product = np.ones(len(counts))
        is_box = name == "crop_box"
        for position in range(0, int(counts.max(initial=0)), 2 if is_box else 1):
            there = counts > position
            at = starts[there] + position
            product[there] *= flat[at + 1] - flat[at] if is_box else flat[at]
        product[counts == 0] = np.nan
        return product[self._ingested]

    def flagged(self, flag: str) -> npt.NDArray[np.bool_]:
        """(N,): whether `geometry_flags` has a flag."""
        column = self._whole("geometry_flags")
        with_flag = np.zeros(len(column), bool)
        parents = pc.list_parent_indices(column).to_numpy()
        with_flag[parents[pc.equal(pc.list_flatten(column), flag).to_numpy(zero_copy_only=False)]] = True
        return with_flag[self._ingested]

    def _whole(self, name: str) -> pa.Array:
        column = self._load([name])[name]
        return pa.concat_arrays(column.chunks or [pa.array([], column.type)])

    def keys(self, rows: Rows) -> list[str]:
        return self._load(["key"])["key"].take(pa.array(self._ingested[rows])).to_pylist()  # type: ignore[no-any-return]


def _codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], list[str | None]]:
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = column.unify_dictionaries().chunks
    names = chunks[0].dictionary.to_pylist() if chunks else []
    codes = [pc.fill_null(chunk.indices, len(names)).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int32), *codes]), [*names, None]
