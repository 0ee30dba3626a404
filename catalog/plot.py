"""The audit picture: what the corpus holds and what training will see of it, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.filesize import decimal

from catalog.errors import SetupError
from catalog.stats import AUDITED, SPACINGS, audit, summarise_cells
from catalog.survey import Cells, GroupColumn, survey_table

_FAMILIES = {
    "CT": "#3b6fb6",
    "MRI": "#e07b39",
    "US": "#3f9b6b",
    "XR": "#8f63b8",
    "fundus": "#c8453b",
    "OCT": "#c99a1c",
    "PET": "#4fa8b8",
}
"""Colours of the modality families that most corpora hold; others take from _SPARE in order."""
_SPARE = ("#d56fa6", "#7c6a58", "#6f7f2f", "#2d4b6e")
_REST = "#9a9a9a"
_IMAGES, _DRAWS = "#b9c3cf", "#2d4b6e"
_INK, _FAINT = "#2b2b2b", "#8a8a8a"

PICTURED: tuple[GroupColumn, ...] = (*AUDITED, "dimension")
"""What the table of `audit_picture` must be loaded for."""
_DRAWN = [
    *("modality", "dimension", "split", "sampling_weight"),
    *("shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"),
]

_MODALITY_ROWS = 15
_SCATTER_POINTS = 50_000

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}


def audit_picture(table: pa.Table, path: Path) -> None:
    """Draw the ingested images of `table` (`load_survey_table` by PICTURED) as a PNG at `path`.

    Modality mix and DA levels, each as share of images and as share of what training draws; spacing through
    the slices against spacing in-plane, with the DA levels as diagonals; slices and sides of the images. The
    same table and matplotlib give the same bytes. Raises SetupError if no image was ingested.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images = table.select(_DRAWN).filter(pc.equal(table["status"], "ingested"))
    if images.num_rows == 0:
        raise SetupError("there is no ingested image to draw. Leave --plot out, or ingest something first.")
    survey = survey_table(table, AUDITED, SPACINGS)
    families, names = _families(images["modality"])
    colours = _family_colours(names)
    with style.context(["default", _STYLE], after_reset=True):
        figure = Figure(figsize=(15, 10.4), dpi=120)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2,
            2,
            left=0.105,
            right=0.975,
            top=0.865,
            bottom=0.095,
            hspace=0.33,
            wspace=0.16,
            height_ratios=(1, 1.25),
        )
        right = grid[1, 1].subgridspec(2, 1, hspace=0.55)
        _title(figure, survey)
        _draw_modalities(figure.add_subplot(grid[0, 0]), survey)
        _draw_levels(figure.add_subplot(grid[0, 1]), survey)
        _draw_spacings(figure.add_subplot(grid[1, 0]), images, families, colours)
        _draw_slices(figure.add_subplot(right[0]), images, families, colours)
        _draw_sides(figure.add_subplot(right[1]), images, families, colours)
        _family_legend(figure, colours)
        figure.savefig(path, format="png", metadata={"Software": None})


def _families(modality: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Number of each image's family, which is what stands before the slash, and their names by frequency."""
    modality = modality.cast(pa.string())
    names = pc.unique(modality)
    family = [(name or "?").partition("/")[0] for name in names.to_pylist()]
    kinds = sorted(set(family))
    kind = np.array([kinds.index(name) for name in family])[pc.index_in(modality, names).to_numpy()]
    order = np.argsort(-np.bincount(kind, minlength=len(kinds)), kind="stable")
    return np.argsort(order)[kind], [kinds[number] for number in order]


def _family_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour of every family, in their order."""
    spare = iter(_SPARE)
    return {name: _FAMILIES.get(name) or next(spare, _REST) for name in names}


def _title(figure: Any, survey: Sequence[Cells]) -> None:
    totals = audit(survey)["totals"]
    figure.text(
        0.03, 0.955, f"{_count(totals['ingested'], 'image')}", fontsize=21, fontweight="bold", va="center"
    )
    facts = [
        _count(totals["subjects"], "subject"),
        _count(len(survey), "dataset"),
        _count(totals["slices"], "slice"),
        f"{totals['voxels'] / 1e6:,.0f} million voxels",
        f"{decimal(totals['stored_bytes'])} on disk",
        f"{totals['excluded']:,} excluded, {totals['failed']:,} failed",
    ]
    figure.text(0.03, 0.92, "   ·   ".join(facts), fontsize=11, color=_FAINT, va="center")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _draw_modalities(axes: Any, survey: Sequence[Cells]) -> None:
    rows = summarise_cells(survey, ["modality"], ()).to_pylist()
    images = sum(row["images"] for row in rows)
    rows.sort(key=lambda row: (-max(row["images"] / images, row["sampling_share"]), str(row["modality"])))
    cut = len(rows) if len(rows) <= _MODALITY_ROWS else _MODALITY_ROWS - 1
    shown, rest = rows[:cut], rows[cut:]
    names = [str(row["modality"] or "unknown") for row in shown]
    counts = [row["images"] for row in shown]
    draws = [row["sampling_share"] for row in shown]
    if rest:
        names.append(f"{len(rest)} others")
        counts.append(sum(row["images"] for row in rest))
        draws.append(sum(row["sampling_share"] for row in rest))
    y = np.arange(len(names))
    shares = np.array(counts) / images
    axes.barh(y - 0.19, 100 * shares, 0.36, color=_IMAGES, label="of the images")
    axes.barh(y + 0.19, 100 * np.array(draws), 0.36, color=_DRAWS, label="of what training draws")
    end = 100 * max(shares.max(), max(draws))
    for position, count, share, draw in zip(y, counts, shares, draws, strict=True):
        axes.text(
            100 * max(share, draw) + end * 0.012,
            position,
            f"{count:,}",
            va="center",
            fontsize=8.5,
            color=_FAINT,
        )
    axes.set_yticks(y, names)
    axes.set_ylim(max(len(names), 5) - 0.4, -0.6)
    axes.set_xlim(0, end * 1.1)
    axes.set_xlabel("share in %   (number: images)")
    axes.grid(axis="x")
    axes.legend(loc="lower right")
    axes.set_title("Modality")


def _draw_levels(axes: Any, survey: Sequence[Cells]) -> None:
    rows = {row["da_level"]: row for row in summarise_cells(survey, ["da_level"], ()).to_pylist()}
    levels = np.arange(6)
    counts = np.array([rows[level]["images"] if level in rows else 0 for level in levels])
    draws = np.array([rows[level]["sampling_share"] if level in rows else 0.0 for level in levels])
    shares = counts / sum(row["images"] for row in rows.values())
    axes.bar(levels - 0.19, 100 * shares, 0.36, color=_IMAGES, label="of the images")
    axes.bar(levels + 0.19, 100 * draws, 0.36, color=_DRAWS, label="of what training draws")
    end = 100 * max(shares.max(), draws.max())
    for level in levels:
        height = 100 * max(shares[level], draws[level]) + end * 0.015
        axes.text(level, height, f"{counts[level]:,}", ha="center", va="bottom", fontsize=8.5, color=_FAINT)
    bounds = ["DA < 2", "2 to 4", "4 to 8", "8 to 16", "16 to 32", "2-D, or DA ≥ 32"]
    axes.set_xticks(levels, [f"{level}\n{bound}" for level, bound in zip(levels, bounds, strict=True)])
    axes.set_ylim(0, end * 1.12)
    axes.set_ylabel("share in %   (number: images)")
    axes.grid(axis="y")
    axes.legend(loc="upper center")
    axes.set_title("Level of anisotropy, before random scaling")


def _draw_spacings(
    axes: Any, images: pa.Table, families: npt.NDArray[np.int64], colours: dict[str, str]
) -> None:
    z = images["spacing_z"].to_numpy()
    x = pc.min_element_wise(images["spacing_y"], images["spacing_x"]).to_numpy()
    known = np.flatnonzero(~np.isnan(z) & ~np.isnan(x))
    axes.set_title("Spacing of the 3-D images", pad=24)
    axes.set_xlabel("in-plane, mm")
    axes.set_ylabel("between slices, mm")
    if len(known) == 0:
        _say_empty(axes, "no 3-D image")
        return
    # Drawn in random order, so that no family hides another, and thinned where dots would only pile up.
    order = np.random.default_rng(0).permutation(known)[:_SCATTER_POINTS]
    strength = np.clip(len(order) / 2000, 0.0, 1.0)
    axes.scatter(
        x[order],
        z[order],
        s=40 - 32 * strength,
        c=np.array(list(colours.values()))[families[order]],
        alpha=0.85 - 0.5 * strength,
        linewidths=0,
        zorder=3,
    )
    x_low, x_high = _log_limits(x[known])
    z_low, z_high = _log_limits(z[known])
    _log_axis(axes.xaxis, axes.set_xscale, axes.set_xlim, x_low, x_high)
    _log_axis(axes.yaxis, axes.set_yscale, axes.set_ylim, z_low, z_high)
    ends = np.array([x_low, x_high])
    for power in range(6):
        da = 2**power
        axes.plot(ends, da * ends, color="#c4c4c4", linewidth=0.9, linestyle=(0, (5, 3)), zorder=2)
        at = min(x_high, z_high / da)
        if at > x_low * 1.02 and da * at > z_low * 1.02:
            at_right = at == x_high
            axes.annotate(
                f"DA {da}",
                (at, da * at),
                xytext=(4, 0) if at_right else (0, 3),
                textcoords="offset points",
                ha="left" if at_right else "center",
                va="center" if at_right else "bottom",
                fontsize=8.5,
                color=_FAINT,
                annotation_clip=False,
            )


def _draw_slices(axes: Any, images: pa.Table, families: npt.NDArray[np.int64], colours: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    volumes = pc.equal(images["dimension"], 3).to_numpy()
    axes.set_title("Slices of the 3-D images")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    slices = images["shape_d"].to_numpy()[volumes]
    _draw_sizes(axes, slices, np.ones(len(slices)), families[volumes], colours, if_empty="no 3-D image")


def _draw_sides(axes: Any, images: pa.Table, families: npt.NDArray[np.int64], colours: dict[str, str]) -> None:
    sides = pc.min_element_wise(images["shape_h"], images["shape_w"]).to_numpy()
    # By draws: large 2-D collections of one size would hide all else if images were counted.
    weights = (
        pc.fill_null(images["sampling_weight"], 0.0).to_numpy() * pc.equal(images["split"], "train").to_numpy()
    )
    drawn = weights > 0
    axes.set_title("Shorter side in-plane")
    axes.set_xlabel("voxels")
    axes.set_ylabel("share of draws in %")
    shares = 100 * weights[drawn] / (weights.sum() or 1.0)
    _draw_sizes(axes, sides[drawn], shares, families[drawn], colours, if_empty="no image to train on")


def _draw_sizes(
    axes: Any,
    sizes: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    families: npt.NDArray[np.int64],
    colours: dict[str, str],
    if_empty: str,
) -> None:
    """Stacked histogram of whole numbers over a logarithmic axis."""
    if len(sizes) == 0:
        _say_empty(axes, if_empty)
        return
    low, high = _log_limits(sizes)
    # Bins end between whole numbers: otherwise some hold one number, others two, and the shape lies.
    bins = np.unique(np.floor(np.geomspace(low, high, 45)) + 0.5)
    # Counted here: a histogram of millions of values, one of each family, costs gigabytes.
    counts = np.zeros((len(colours), len(bins) - 1))
    np.add.at(counts, (families, np.searchsorted(bins, sizes) - 1), weights)
    there = np.flatnonzero(np.bincount(families, minlength=len(colours)))
    middles = (bins[:-1] + bins[1:]) / 2
    axes.hist(
        [middles] * len(there),
        bins=bins,
        weights=[counts[number] for number in there],
        stacked=True,
        color=[list(colours.values())[number] for number in there],
        linewidth=0.4,
        edgecolor="white",
    )
    _log_axis(axes.xaxis, axes.set_xscale, axes.set_xlim, low, high)
    axes.yaxis.set_major_formatter("{x:,.6g}")
    axes.grid(axis="y")


def _log_limits(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Limits of a logarithmic axis: some air, and at least a factor of four apart."""
    low, high = float(values.min()) / 1.25, float(values.max()) * 1.25
    air = max(4 / (high / low), 1) ** 0.5
    return low / air, high * air


def _log_axis(axis: Any, set_scale: Any, set_limits: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log", base=10)
    set_limits(low, high)
    narrow = high / low < 30
    axis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5), numticks=50))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
    )
    axis.set_minor_formatter(NullFormatter())


def _family_legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    names = {name: colour for name, colour in colours.items() if colour != _REST}
    if len(names) < len(colours):
        names["other"] = _REST
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=7, color=colour, label=name)
        for name, colour in names.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), handletextpad=0.2, columnspacing=1.6)


def _say_empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_FAINT, fontsize=12)
    axes.set_xticks([])
    axes.set_yticks([])
