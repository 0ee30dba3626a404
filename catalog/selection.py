"""What a mix makes of each image: the factor on its sampling weight, 0 for an image that is left out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catalog.conditions import Conditions
from catalog.corpus import Corpus
from catalog.duplicates import changed_since, load_groups, superfluous
from catalog.errors import SetupError
from catalog.mix import Mix, conditions_of
from catalog.query import fingerprint
from catalog.sampling import Reals


class CopiesUnknownError(SetupError):
    """Nobody looked for duplicates, or not in the catalog as it is."""


class Selection:
    """A mix on a corpus, applied to its catalog piece by piece."""

    columns: list[str]
    """Columns of the catalog that `factors` looks at; texts may be dictionary arrays."""
    fingerprints: dict[str, str]
    """What the factors depend on besides the catalog: the mix and, where only one of several copies is kept,
    the duplicates found."""

    def __init__(self, corpus: Corpus, mix: Mix, *, dedup: bool = False) -> None:
        """With `dedup`, as if the mix said so.

        Raises CopiesUnknownError if duplicates are needed that nobody looked for, or that were looked for in
        another state of the catalog; SetupError if a condition of the mix is wrong.
        """
        self._mix = mix
        self._conditions = Conditions(conditions_of(mix))
        self._copies: dict[str, pa.Array] = {}
        self.fingerprints = {"mix": mix.fingerprint}
        if dedup or mix.dedup:
            copies = _superfluous(corpus)
            self._copies = _keys_by_dataset(copies)
            self.fingerprints["duplicates"] = fingerprint(copies)
        needed = ["dataset", *(["key"] if self._copies else []), *self._conditions.columns]
        self.columns = list(dict.fromkeys(needed))

    def leaves_out(self, dataset: str) -> bool:
        """Whether no image of a dataset is drawn, so that it need not be read."""
        return dataset in self._mix.leave_out

    def factors(self, table: pa.Table) -> Reals:
        """(n,): the factor of each row, which has `columns`."""
        factors = np.ones(table.num_rows)
        answers = iter(self._conditions.of(table))
        if self._mix.where is not None:
            factors *= next(answers)
        for rule in self._mix.weights:
            for _, factor in rule.cases:
                factors[next(answers)] *= factor
        for dataset in pc.unique(table["dataset"]).to_pylist():
            if self.leaves_out(dataset):
                factors[_is(table["dataset"], dataset)] = 0
            elif dataset in self._copies:
                factors[_is(table["dataset"], dataset) & _among(table["key"], self._copies[dataset])] = 0
        return factors


def _superfluous(corpus: Corpus) -> pa.Table:
    remedy = f"Type `pumit-data duplicates --data {corpus.place}`"
    groups = load_groups(corpus)
    if groups is None:
        raise CopiesUnknownError(
            f"nobody has looked for duplicates in {corpus.place}. {remedy}, or do without --dedup and "
            "a mix that says dedup."
        )
    if changed := changed_since(corpus, groups):
        raise CopiesUnknownError(
            f"the duplicates in {corpus.place} were looked for before the catalog of {', '.join(changed)} "
            f"became what it is, so there may be images that were not compared. {remedy}, which looks again."
        )
    return superfluous(groups)


def _keys_by_dataset(table: pa.Table) -> dict[str, pa.Array]:
    """Keys of each dataset, sorted."""
    ordered = table.sort_by([("dataset", "ascending"), ("key", "ascending")])
    counts = pc.value_counts(ordered["dataset"])
    keys, start, found = ordered["key"].combine_chunks(), 0, {}
    for dataset, count in zip(
        counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True
    ):
        found[dataset] = keys[start : start + count]
        start += count
    return found


def _is(column: pa.ChunkedArray, text: str) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.equal(column.cast(pa.string()), text))


def _among(column: pa.ChunkedArray, keys: pa.Array) -> npt.NDArray[np.bool_]:
    """Which texts are among sorted keys, of which only those in between the texts are looked at."""
    ends = pc.min_max(column)
    first, last = (_place(keys, ends[end].as_py(), after) for end, after in (("min", False), ("max", True)))
    return np.asarray(pc.is_in(column, keys[first:last]))


def _place(keys: pa.Array, text: str, after: bool) -> int:
    """How many sorted keys come before a text, or with `after` up to it, in the order of their bytes."""
    low, high, wanted = 0, len(keys), text.encode()
    while low < high:
        middle = (low + high) // 2
        key = keys[middle].as_py().encode()
        if key < wanted or (after and key == wanted):
            low = middle + 1
        else:
            high = middle
    return low
