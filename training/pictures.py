"""What a network sees and makes of it, a row an image, a column a stage; and how it uses its codebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Panel = npt.NDArray[np.float32]
"""One slice for display, (H, W, 3) in [0, 1]."""

IN_USE = 0.1
"""A code is in use if its mean probability is above this share of the uniform one."""
_PANEL_INCHES = 1.7
_CAPTION_INCHES = 0.26
_TITLE_INCHES = 0.5
_HIDDEN_GREY = 0.35
_CAPTION_CHARACTERS_PER_INCH = 15


class CodebookUse(NamedTuple):
    """How some images use a codebook."""

    usage: Tensor
    """(K,): mean token distribution."""
    entropies: npt.NDArray[np.float32]
    """Of every token, in nats."""


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
    return f"{modality}  ·  DA level {level}  ·  {key}"


def shortened(text: str, characters: int) -> str:
    """`text`, or its beginning and an ellipsis: `characters` at most."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


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
        text = shortened(row.caption, int(width * _CAPTION_CHARACTERS_PER_INCH))
        figure.text(0.06 / width, top - 0.14 / height, text, fontsize=7, color="0.25", va="center")
        for number, panel in enumerate(row.panels):
            left, bottom = (number * _PANEL_INCHES + gap) / width, top - (pitch - gap) / height
            axes = figure.add_axes((left, bottom, side / width, side / height))
            axes.imshow(panel, vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
    temporary = file.with_name(f".{file.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(file)


def codebook_use(file: Path, title: str, uses: Mapping[str, CodebookUse]) -> None:
    """Draw how often each code is meant (sorted), and how undecided tokens are: a line for each of `uses`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    usage, entropy = figure.subplots(1, 2)
    size = len(next(iter(uses.values())).usage)
    for (name, use), style in zip(uses.items(), _styles(), strict=False):
        share_K = use.usage.float().cpu().sort(descending=True).values
        usage.plot(range(1, size + 1), share_K.clamp_min(1e-9).numpy() * size, label=name, **style)
        ends = np.linspace(0, math.log(size), 41)
        density, _ = np.histogram(use.entropies, ends, density=True)
        entropy.stairs(density, ends, label=name, **style)
    usage.axhline(1, color="0.6", linewidth=0.8)
    usage.axhline(IN_USE, color="0.6", linewidth=0.8, linestyle=":")
    usage.set(yscale="log", xlabel="codes, most used first", ylabel="mean probability / uniform")
    usage.set_ylim(bottom=1e-3)
    usage.set_title(title, fontsize=10)
    entropy.set(xlabel=f"entropy of a token, nats (at most ln {size} = {math.log(size):.2f})", ylabel="density")
    entropy.set_title("how undecided tokens are", fontsize=10)
    usage.legend(fontsize=7, frameon=False)
    temporary = file.with_name(f".{file.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(file)


def _styles() -> Iterator[dict[str, Any]]:
    """Colours and dashes that differ for more modalities than there are colours."""
    for dashes in ("-", "--", ":", "-."):
        for colour in range(10):
            yield {"color": f"C{colour}", "linestyle": dashes, "linewidth": 1.3}
