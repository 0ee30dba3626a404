"""The picture of a comparison: the first metric over the share of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.downstream.paired import mean_and_deviation
from training.downstream.rows import Row, headed
from training.downstream.task import task_of

_COLOURS = ("#2d4b6e", "#e07b39", "#3f9b6b", "#8f63b8", "#c8453b", "#4fa8b8", "#c99a1c", "#7c6a58")


def draw_curves(rows: Sequence[Row], file: Path) -> None:
    """The first metric of each task over the share of labels: a panel a task and mode, a line a start.

    Points are means over seeds, bars their standard deviation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(
        figsize=(3.4 * len(modes) + 0.8, 2.9 * len(tasks) + 0.7),
        dpi=120,
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(modes), squeeze=False, sharey="row")
    shares = sorted({row.fraction for row in rows})
    for task, panel_row in zip(tasks, panels, strict=True):
        metric = task_of(task).METRICS[0]
        for mode, axes in zip(modes, panel_row, strict=True):
            for number, name in enumerate(names):
                here = [row for row in rows if (row.task, row.mode, row.name) == (task, mode, name)]
                here = [row for row in here if row.values(metric)]
                if not here:
                    continue
                spreads = [mean_and_deviation(list(row.values(metric).values())) for row in here]
                axes.errorbar(
                    # Side by side, so that bars of equal shares do not hide each other.
                    [100 * row.fraction * 1.02 ** (number - (len(names) - 1) / 2) for row in here],
                    [mean for mean, _ in spreads],
                    yerr=[0 if math.isnan(deviation) else deviation for _, deviation in spreads],
                    label=name,
                    color=_COLOURS[number % len(_COLOURS)],
                    linestyle=("-", "--", ":")[number // len(_COLOURS) % 3],
                    marker="o",
                    markersize=4.5,
                    linewidth=1.5,
                    capsize=2.5,
                )
            axes.set_xscale("log")
            axes.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
            axes.minorticks_off()
            if len(shares) == 1:
                axes.set_xlim(80 * shares[0], 125 * shares[0])
            axes.grid(color="#ececec", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{task}, {mode}", fontsize=9.5, loc="left", weight="bold")
            axes.tick_params(labelsize=8)
        panel_row[0].set_ylabel(headed(metric), fontsize=8.5)
    for axes in panels[-1]:
        axes.set_xlabel("labels used, %", fontsize=8.5)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=min(len(handles), 4),
        fontsize=8,
        frameon=False,
    )
    temporary = file.with_name(f".{file.name}.partial")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(file)
