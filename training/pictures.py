"""What a network sees and makes of it, as one PNG: a row an image, a column a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

Panel = npt.NDArray[np.float32]
"""One slice for display, (H, W, 3) in [0, 1]."""

_PANEL_INCHES = 1.7
_CAPTION_INCHES = 0.26
_TITLE_INCHES = 0.5
_HIDDEN_GREY = 0.35


@dataclass(frozen=True)
class Row:
    """One image at every stage."""

    caption: str
    panels: Sequence[Panel]


def middle_slice(x_CDHW: Tensor) -> Panel:
    """The slice at D // 2 of a crop (3, D, H, W) in [0, 1]; values outside are clipped."""
    x_HWC = x_CDHW[:, x_CDHW.shape[1] // 2].permute(1, 2, 0)
    return x_HWC.detach().float().cpu().clamp(0, 1).numpy()


def hide(panel: Panel, visible_hw: Tensor) -> Panel:
    """`panel` with the tokens that are not visible (h, w, bool) painted over in grey."""
    rows = panel.shape[0] // visible_hw.shape[0]
    columns = panel.shape[1] // visible_hw.shape[1]
    visible_HW = visible_hw.cpu().numpy().repeat(rows, axis=0).repeat(columns, axis=1)
    return np.where(visible_HW[..., None], panel, np.float32(_HIDDEN_GREY))


def caption(modality: str, key: str, level: int) -> str:
    """What a row shows: `key` is `dataset/key`, `level` the DA level."""
    return f"{modality}  ·  {key}  ·  DA level {level}"


def contact_sheet(file: Path, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write `rows` under the headings `columns` as the PNG `file`, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pitch = _PANEL_INCHES + _CAPTION_INCHES
    width, height = _PANEL_INCHES * len(columns), _TITLE_INCHES + pitch * len(rows)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.06 / width, 1 - 0.17 / height, title, fontsize=9, weight="bold", va="center")
    for number, heading in enumerate(columns):
        centre = (number + 0.5) / len(columns)
        figure.text(centre, 1 - 0.4 / height, heading, fontsize=8, ha="center", va="center")
    for row_number, row in enumerate(rows):
        top = 1 - (_TITLE_INCHES + row_number * pitch) / height
        # No image touches its neighbour, but slices of one row stay close enough to compare.
        side, gap = (_PANEL_INCHES - 0.06), 0.03
        figure.text(0.06 / width, top - 0.14 / height, row.caption, fontsize=7, color="0.25", va="center")
        for number, panel in enumerate(row.panels):
            left, bottom = (number * _PANEL_INCHES + gap) / width, top - (pitch - gap) / height
            axes = figure.add_axes((left, bottom, side / width, side / height))
            axes.imshow(panel, vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
    temporary = file.with_name(f".{file.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(file)
