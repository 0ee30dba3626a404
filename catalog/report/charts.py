"""Where the marks of the charts lie, in the units of their SVG: arithmetic only, the template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from catalog.survey import LEVELS

LEVEL_NAMES = ("DA < 2", "2 to 4", "4 to 8", "8 to 16", "16 to 32", "2-D, or DA ≥ 32")
FAMILY_COLOURS = 10
"""Colours that the style sheet has for modality families; the last one is shared by all further ones."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 44.0, 22.0, 46.0


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` at `start` to `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels at 1, 2 and 5 times the powers of ten, and at some more on a short axis."""
        digits = (1, 1.5, 2, 3, 5, 7) if self.high / self.low < 30 else (1, 2, 5)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [digit * 10.0**power for power in powers for digit in digits]
        return [(self.at(value), f"{value:.6g}") for value in values if self.low <= value <= self.high]


def spacing_chart(spacings: dict[str, Any], width: float = 860, height: float = 520) -> dict[str, Any]:
    """Circles by family, ticks, and the diagonals of DA 1 to 32; `spacings` as `facts.spacing_marks` has it.

    A circle is (number of its mark, x, y, radius); its area grows with the images of the mark.
    """
    marks = spacings["marks"]
    across = _axis([mark["in_plane"] for mark in marks], _LEFT, width - _RIGHT)
    deep = _axis([mark["between"] for mark in marks], height - _BOTTOM, _TOP)
    most = max(mark["images"] for mark in marks)
    largest = 10 - 5 * min(1.0, len(marks) / 1000)  # many marks lie close together
    images: dict[str, int] = {}
    circles: dict[str, list[tuple[int, float, float, float]]] = {}
    for number, mark in enumerate(marks):
        images[mark["family"]] = images.get(mark["family"], 0) + mark["images"]
        radius = round(2 + largest * math.sqrt(mark["images"] / most), 1)
        place = (number, across.at(mark["in_plane"]), deep.at(mark["between"]), radius)
        circles.setdefault(mark["family"], []).append(place)
    families = sorted(images, key=lambda name: (-images[name], name))
    return {
        "width": width,
        "height": height,
        "left": _LEFT,
        "right": width - _RIGHT,
        "top": _TOP,
        "bottom": height - _BOTTOM,
        "x_ticks": across.ticks(),
        "y_ticks": deep.ticks(),
        "diagonals": [line for line in (_diagonal(across, deep, 2**level) for level in LEVELS) if line],
        "families": [
            {
                "name": name,
                "colour": min(rank, FAMILY_COLOURS - 1),
                "images": images[name],
                "circles": circles[name],
            }
            for rank, name in enumerate(families)
        ],
    }


def level_chart(
    levels: Sequence[dict[str, Any]], images: int, width: float = 860, height: float = 260
) -> dict[str, Any]:
    """Two columns for each DA level, its share of the images and of the draws; `levels` as of `stats.audit`."""
    rows = {row["da_level"]: row for row in levels}
    shares = [
        (rows[level]["images"], rows[level]["images"] / images, rows[level]["sampling_share"])
        if level in rows
        else (0, 0.0, 0.0)
        for level in LEVELS
    ]
    most = max(max(of_images, of_draws) for _, of_images, of_draws in shares) or 1.0
    room, bottom = (width - 20) / len(LEVELS), height - 46
    columns = []
    for level, (count, of_images, of_draws) in enumerate(shares):
        tall, drawn = (bottom - 24) * of_images / most, (bottom - 24) * of_draws / most
        columns.append(
            {
                "level": level,
                "name": LEVEL_NAMES[level],
                "images": count,
                "share": of_images,
                "drawn": of_draws,
                "middle": round(10 + room * (level + 0.5), 1),
                "bars": [
                    (round(bottom - tall, 1), round(tall, 1)),
                    (round(bottom - drawn, 1), round(drawn, 1)),
                ],
            }
        )
    return {
        "width": width,
        "height": height,
        "bottom": bottom,
        "bar": round(room * 0.32, 1),
        "columns": columns,
    }


def size_scale(datasets: Sequence[dict[str, Any]], names: Sequence[str], width: float = 150) -> Axis:
    """The axis that the shapes of all datasets share."""
    ends = [
        row["shapes"][f"{name}_{end}"]
        for row in datasets
        if row["shapes"]
        for name in names
        for end in ("p5", "p95")
    ]
    return _axis([end for end in ends if end] or [1.0], 2, width - 2)


def intensity_scale(rows: Sequence[dict[str, Any]], names: Sequence[str], width: float = 240) -> SignedAxis:
    """The axis that the intensities of all groups share."""
    values = [abs(value) for row in rows for name in names for value in row[name] if math.isfinite(value)]
    signed = any(value < 0 for row in rows for name in names for value in row[name])
    return SignedAxis(max([*values, 1.0]), signed, width)


@dataclass(frozen=True)
class SignedAxis:
    """An axis in sign(v) log(1 + |v|), from -`most`, or 0 where nothing is negative, to `most`."""

    most: float
    signed: bool
    width: float

    def at(self, value: float) -> float:
        place = math.copysign(math.log1p(abs(value)), value) / math.log1p(self.most)
        share = (place + 1) / 2 if self.signed else place
        return round(2 + share * (self.width - 4), 1)


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Some air at both ends, which are at least a factor of four apart."""
    low, high = min(values) / 1.25, max(values) * 1.25
    air = max(4 / (high / low), 1) ** 0.5
    return Axis(low / air, high * air, start, end)


def _diagonal(across: Axis, deep: Axis, anisotropy: int) -> dict[str, Any] | None:
    """The part of the line between = anisotropy x in-plane that lies in the chart."""
    low, high = max(across.low, deep.low / anisotropy), min(across.high, deep.high / anisotropy)
    if high <= low * 1.02:
        return None
    return {
        "x1": across.at(low),
        "y1": deep.at(low * anisotropy),
        "x2": across.at(high),
        "y2": deep.at(high * anisotropy),
        "at_right": high == across.high,
        "label": f"DA {anisotropy}",
    }
