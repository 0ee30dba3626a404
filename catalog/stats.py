"""What the corpus holds: counts, spacings and what training will really see, per any grouping."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from catalog.errors import SetupError

GroupColumn = Literal["dataset", "modality", "body_part", "dimension", "da_level", "split"]

QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
AUDIT_COLUMNS = [
    *get_args(GroupColumn),
    *("key", "subject", "status", "reason", "shape_d", "shape_h", "shape_w", "stored_bytes"),
    *("spacing_z", "spacing_y", "spacing_x", "sampling_weight"),
]
"""Columns of the catalog that this module and the audit picture read."""


def grouping(by: str) -> list[GroupColumn]:
    """The columns named in `by`, separated by commas. Raises SetupError for one that is no grouping."""
    columns = [name.strip() for name in by.split(",")]
    allowed: tuple[GroupColumn, ...] = get_args(GroupColumn)
    for name in columns:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SetupError(f"cannot group by {name!r}.{hint} Possible: {', '.join(allowed)}.")
    return [column for name in dict.fromkeys(columns) for column in allowed if column == name]


def summarise(table: pa.Table, by: Sequence[GroupColumn] = ()) -> pa.Table:
    """Return one row per group of the *ingested* images in `table`, sorted by the columns `by`.

    Columns: those of `by`; images; subjects (of all datasets together, told apart by dataset); slices;
    voxels (positions: a colour voxel counts once); stored_bytes; sampling_share, the probability that an image
    drawn in training is of the group (0 for validation images); and in mm, null where no image of the group
    has a spacing: spacing_z_min, _p5, _p25, _median, _p75, _p95, _max, and the same of spacing_in_plane,
    the smaller of spacing_y and spacing_x. Quantiles are exact, by linear interpolation.

    An image that shows several body parts counts in each of them, so that their shares may add up to more
    than 1. Raises ValueError for a column that is no grouping.
    """
    if unknown := set(by) - set(get_args(GroupColumn)):
        raise ValueError(f"cannot group by {sorted(unknown)}; possible are {', '.join(get_args(GroupColumn))}")
    images = table.filter(pc.equal(table["status"], "ingested"))
    measured = _measured(images)
    total_weight = pc.sum(measured["weight"]).as_py() or 0.0
    if "body_part" in by:
        measured = _one_row_per_body_part(measured)
    group, first = _group(measured, by)
    measured = measured.append_column("group", pa.array(group))

    sums = ["images", "slices", "voxels", "stored_bytes", "weight"]
    aggregations = [("person", "count_distinct"), *((name, "sum") for name in sums)]
    # One thread: the order of additions, and so the last digit of the shares, must not change between calls.
    totals = measured.group_by("group", use_threads=False).aggregate(aggregations).sort_by("group")

    columns: dict[str, pa.Array] = {name: measured[name].take(pa.array(first)) for name in by}
    columns["images"] = totals["images_sum"]
    columns["subjects"] = totals["person_count_distinct"]
    columns |= {name: totals[f"{name}_sum"] for name in ("slices", "voxels", "stored_bytes")}
    columns["sampling_share"] = pc.divide(totals["weight_sum"], total_weight or 1.0)
    for name in ("spacing_z", "spacing_in_plane"):
        quantiles = _quantiles(measured[name].to_numpy(), group, len(first))
        columns |= {
            f"{name}_{label}": pa.array(values, from_pandas=True)
            for label, values in zip(QUANTILES, quantiles, strict=True)
        }
    return pa.table(columns)


def audit(table: pa.Table) -> dict[str, Any]:
    """Return the overall summary as plain dicts, lists and numbers, ready for JSON.

    `table` holds AUDIT_COLUMNS of all rows, whatever their status. Keys: `totals`; `datasets` (what was
    discovered and what became of it, with the counts of each reason); `by_modality`, `by_dataset`,
    `by_da_level` (rows of `summarise`).
    """
    datasets = _outcomes(table)
    outcomes = ("discovered", "ingested", "excluded", "failed")
    totals = {name: sum(dataset[name] for dataset in datasets) for name in outcomes}
    whole = summarise(table).to_pylist()
    names = ("subjects", "slices", "voxels", "stored_bytes")
    totals |= {name: whole[0][name] if whole else 0 for name in names}
    return {
        "totals": totals,
        "datasets": datasets,
        "by_modality": summarise(table, ["modality"]).to_pylist(),
        "by_dataset": summarise(table, ["dataset"]).to_pylist(),
        "by_da_level": summarise(table, ["da_level"]).to_pylist(),
    }


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
    for title, column in (("Modality", "modality"), ("Dataset", "dataset"), ("DA level", "da_level")):
        console.print(render_groups(summary[f"by_{column}"], [column], title))


def render_groups(rows: Sequence[dict[str, Any]], by: Sequence[str], title: str | None = None) -> Table:
    """The rows of `summarise(table, by)` (as `to_pylist` gives them) as one printable table."""
    table = Table(*by, title=title, title_justify="left", caption="spacings in mm: p5 / median / p95")
    for name in ("images", "subjects", "slices", "voxels", "on disk", "drawn", "spacing z", "in-plane"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *("" if row[name] is None else escape(str(row[name])) for name in by),
            *(f"{row[name]:,}" for name in ("images", "subjects", "slices")),
            f"{row['voxels'] / 1e6:,.1f} M",
            decimal(row["stored_bytes"]),
            f"{row['sampling_share']:.1%}",
            *(_spread(row, name) for name in ("spacing_z", "spacing_in_plane")),
        )
    return table


def _spread(row: dict[str, Any], name: str) -> str:
    values = [row[f"{name}_{label}"] for label in ("p5", "median", "p95")]
    return "-" if values[0] is None else " / ".join(f"{value:.3g}" for value in values)


def _measured(images: pa.Table) -> pa.Table:
    """The grouping columns and what is added up or measured, one row per image."""
    slices, height, width = (pc.cast(images[f"shape_{axis}"], pa.int64()) for axis in "dhw")
    drawn = pc.equal(images["split"], "train")
    columns: dict[str, pa.ChunkedArray] = {name: images[name] for name in get_args(GroupColumn)}
    columns |= {
        "images": pa.chunked_array([pa.array(np.ones(images.num_rows, np.int64))]),
        "person": pc.binary_join_element_wise(images["dataset"], images["subject"], "\0"),
        "slices": slices,
        "voxels": pc.multiply(pc.multiply(slices, height), width),
        "stored_bytes": pc.fill_null(images["stored_bytes"], 0),
        "weight": pc.if_else(drawn, pc.fill_null(images["sampling_weight"], 0.0), 0.0),
        "spacing_z": images["spacing_z"],
        "spacing_in_plane": pc.min_element_wise(images["spacing_y"], images["spacing_x"]),
    }
    return pa.table(columns)


def _one_row_per_body_part(measured: pa.Table) -> pa.Table:
    parts = measured["body_part"].combine_chunks()
    unnamed = pc.equal(pc.fill_null(pc.list_value_length(parts), 0), 0)
    # An image without a body part still counts, in a group without a name.
    parts = pc.if_else(unnamed, pa.scalar([None], parts.type), parts)
    rows = measured.drop_columns("body_part").take(pc.list_parent_indices(parts))
    return rows.append_column("body_part", pc.list_flatten(parts))


def _group(table: pa.Table, by: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number of each row's group, in the sort order of `by` (nulls last), and one row of each group."""
    code = np.zeros(table.num_rows, np.int64)
    for name in by:
        # Ranks are numbers that sort as the values do.
        column = table[name].combine_chunks()
        rank = pc.rank(column, tiebreaker="dense").to_numpy()
        code = code * (table.num_rows + 1) + rank
        # Numbered anew after each column, so that many columns cannot overflow.
        code = np.unique(code, return_inverse=True)[1].astype(np.int64)
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    return group.astype(np.int64), first.astype(np.int64)


def _quantiles(
    values: npt.NDArray[np.float64], group: npt.NDArray[np.int64], groups: int
) -> npt.NDArray[np.float64]:
    """QUANTILES of the values of each group, shape (quantiles, groups); NaN counts as no value."""
    known = ~np.isnan(values)
    values, group = values[known], group[known]
    ordered = values[np.lexsort((values, group))]
    counts = np.bincount(group, minlength=groups)
    starts = np.cumsum(counts) - counts
    position = np.array(list(QUANTILES.values()))[:, None] * np.maximum(counts - 1, 0)
    low = np.floor(position).astype(np.int64)
    result = np.full(position.shape, np.nan)
    filled = counts > 0
    below = ordered[(starts + low)[:, filled]]
    above = ordered[(starts + np.minimum(low + 1, np.maximum(counts - 1, 0)))[:, filled]]
    result[:, filled] = below + (position - low)[:, filled] * (above - below)
    return result


def _outcomes(table: pa.Table) -> list[dict[str, Any]]:
    counts = table.group_by(["dataset", "status", "reason"], use_threads=False).aggregate([("key", "count")])
    datasets: dict[str, dict[str, Any]] = {}
    for row in counts.sort_by([("dataset", "ascending"), ("reason", "ascending")]).to_pylist():
        empty = {"dataset": row["dataset"], "discovered": 0, "ingested": 0, "excluded": 0, "failed": 0}
        outcome = datasets.setdefault(row["dataset"], {**empty, "reasons": {}})
        outcome["discovered"] += row["key_count"]
        outcome[row["status"]] += row["key_count"]
        if row["reason"] is not None:
            outcome["reasons"][row["reason"]] = outcome["reasons"].get(row["reason"], 0) + row["key_count"]
    return list(datasets.values())
