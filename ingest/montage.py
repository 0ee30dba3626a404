"""A picture of normalised images to judge by eye: slices along the depth axis and two reformats, labelled.

It shows the voxels that training would read, with the window it would apply. Voxels are enlarged as blocks, so
that thick slices look thick. No name and no path is written into the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ingest.preview import upright_plane, windowed
from ingest.volume import Voxels

_CELL = 224
"""Pixels of the longest side of a slice."""
_COLUMNS, _ROWS = 4, 2
_PICTURE = 640
"""Pixels of the longest side of a 2-D image."""
_GAP, _MARGIN, _LINE, _TICK = 8, 14, 20, 12
_PAPER, _INK, _FAINT, _MARK = (24, 25, 28), (238, 238, 238), (160, 164, 170), (255, 196, 60)
_OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
_BARS_MM = (200, 100, 50, 20, 10, 5, 2, 1)


@dataclass(frozen=True)
class _Plane:
    pixels: Voxels
    """(C, h, w), stored values."""
    sides: tuple[float, float]
    """mm (or, without spacing, 1) from row to row and from column to column."""
    letters: tuple[str, str, str, str] | None
    """What lies at the top, bottom, left, right; null if unknown."""

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width, in the unit of `sides`."""
        return self.pixels.shape[1] * self.sides[0], self.pixels.shape[2] * self.sides[1]

    def fit(self, box: tuple[int, int]) -> float:
        """Pixels a unit, so that the plane just fits into `box` (height, width)."""
        return min(box[0] / self.extent[0], box[1] / self.extent[1])


def draw_image(
    voxels: Voxels,
    *,
    spacing: tuple[float | None, float | None, float | None],
    window: tuple[float, float],
    codes: str | None,
    caption: Sequence[str],
) -> Image.Image:
    """Draw one normalised image.

    Args:
        voxels: (C, D, H, W) as `normalise` returns them.
        spacing: (z, y, x) in mm; z is null for 2-D, y and x where unknown (then square pixels).
        window: stored values that become black and white.
        codes: directions in which D, H and W grow (geometry.DISPLAY_CODES); null: as stored, no letters.
        caption: lines above the picture; the first is its heading.
    """
    z, y, x = spacing
    if z is None or y is None or x is None:
        plane = _Plane(voxels[:, 0], (y or 1.0, x or 1.0), None)
        return _framed(_draw(plane, window, plane.fit((_PICTURE, _PICTURE)), has_unit=y is not None), caption)

    sides = (z, y, x)
    shown = _slices(voxels.shape[1])
    grid = _grid(voxels, shown, sides, window, codes)
    return _framed(_beside([grid, _reformats(voxels, shown, sides, window, codes, grid.height)]), caption)


def draw_note(caption: Sequence[str]) -> Image.Image:
    """Lines of text alone, for an image of which there is no picture."""
    return _framed(Image.new("RGB", (_PICTURE, 1), _PAPER), caption)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, with a line between."""
    width = max(picture.width for picture in pictures)
    canvas = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        if top:
            draw.line((_MARGIN, top, width - _MARGIN, top), fill=_FAINT)
        top += picture.height
    return canvas


def _slices(depth: int) -> list[int]:
    """Indices of the slices to show: all, or the middles of as many equal parts."""
    count = min(depth, _COLUMNS * _ROWS)
    return [int((part + 0.5) * depth / count) for part in range(count)]


def _grid(
    voxels: Voxels,
    shown: Sequence[int],
    sides: tuple[float, float, float],
    window: tuple[float, float],
    codes: str | None,
) -> Image.Image:
    cells = []
    for index in shown:
        # A volume of this one slice, whose mid-plane it is.
        pixels, down, across = upright_plane(voxels[:, index : index + 1], (1, 2), codes)
        letters = _letters(codes, down, across) if index == shown[0] else None
        plane = _Plane(pixels, (sides[down], sides[across]), letters)
        picture = _draw(plane, window, plane.fit((_CELL, _CELL)), has_unit=index == shown[0])
        cells.append(_titled(picture, f"z {index}  ({index * sides[0]:.4g} mm)"))
    columns = min(_COLUMNS, len(cells))
    width, height = (max(getattr(cell, side) for cell in cells) + _GAP for side in ("width", "height"))
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), _PAPER)
    for number, cell in enumerate(cells):
        canvas.paste(cell, (number % columns * width, number // columns * height))
    return canvas


def _reformats(
    voxels: Voxels,
    shown: Sequence[int],
    sides: tuple[float, float, float],
    window: tuple[float, float],
    codes: str | None,
    height: int,
) -> Image.Image:
    """The two planes through the middle that hold the depth axis, in one scale; `shown` slices are marked."""
    planes = []
    for hidden in (1, 2):
        pixels, down, across = upright_plane(voxels, (0, 3 - hidden), codes)
        planes.append((_Plane(pixels, (sides[down], sides[across]), _letters(codes, down, across)), down == 0))
    # Flat planes are larger below each other.
    beside = (height - _LINE - _TICK, 2 * _CELL)
    below = ((height - _GAP) // 2 - _LINE - _TICK, 3 * _CELL)
    scales = {box: min(plane.fit(box) for plane, _ in planes) for box in (beside, below)}
    box = max(scales, key=lambda box: scales[box])

    places = [(index + 0.5) / voxels.shape[1] for index in shown]
    pictures = []
    for (plane, is_depth_down), name, hidden in zip(planes, "yx", (1, 2), strict=True):
        picture = _draw(plane, window, scales[box], has_unit=True)
        is_reversed = is_depth_down and codes is not None and codes[0] == "S"
        marked = _ticked(picture, [1 - place for place in places] if is_reversed else places, is_depth_down)
        pictures.append(_titled(marked, f"reformat at {name} {voxels.shape[hidden + 1] // 2}"))
    return _beside(pictures) if box == beside else _below(pictures)


def _letters(codes: str | None, down: int, across: int) -> tuple[str, str, str, str] | None:
    if codes is None:
        return None
    top, bottom = _OPPOSITE[codes[down]], codes[down]
    if bottom == "S":  # upright_plane has turned it over
        top, bottom = bottom, top
    return top, bottom, _OPPOSITE[codes[across]], codes[across]


def _draw(plane: _Plane, window: tuple[float, float], scale: float, *, has_unit: bool) -> Image.Image:
    """The plane in true aspect, `scale` pixels a unit, with letters and a bar of length."""
    height, width = plane.extent
    grey = windowed(plane.pixels, window)
    pixels = np.ascontiguousarray(grey[0] if len(grey) == 1 else grey.transpose(1, 2, 0))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # BOX enlarges voxels to blocks and averages them where there are more than pixels.
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BOX).convert("RGB")
    draw = ImageDraw.Draw(picture)
    if plane.letters is not None and size[1] > 3 * _LINE:
        middle_x, middle_y = size[0] / 2, size[1] / 2
        ends = (
            (middle_x, 3, "mt"),
            (middle_x, size[1] - 3, "mb"),
            (4, middle_y, "lm"),
            (size[0] - 4, middle_y, "rm"),
        )
        for letter, (left, top, anchor) in zip(plane.letters, ends, strict=True):
            _write(draw, (left, top), letter, 15, _MARK, anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    if has_unit:
        _bar(draw, size, scale)
    return picture


def _bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], scale: float) -> None:
    """A bar of a round number of mm at the lower left."""
    length = next((mm for mm in _BARS_MM if mm * scale <= 0.4 * size[0]), None)
    if length is None or size[1] < 3 * _LINE:
        return
    left, top = 8, size[1] - 9
    draw.rectangle((left - 1, top - 1, left + length * scale + 1, top + 3), fill=(0, 0, 0))
    draw.rectangle((left, top, left + length * scale, top + 2), fill=_MARK)
    _write(draw, (left, top - 4), f"{length} mm", 12, _MARK, anchor="lb", stroke_width=2, stroke_fill=(0, 0, 0))


def _ticked(picture: Image.Image, places: Sequence[float], down: bool) -> Image.Image:
    """The picture with marks at `places` (0 to 1) outside its left edge, or, not `down`, above it."""
    strip = (_TICK, 0) if down else (0, _TICK)
    canvas = Image.new("RGB", (picture.width + strip[0], picture.height + strip[1]), _PAPER)
    canvas.paste(picture, strip)
    draw = ImageDraw.Draw(canvas)
    for place in places:
        at = place * (picture.height if down else picture.width)
        draw.line((0, at, _TICK - 4, at) if down else (at, 0, at, _TICK - 4), fill=_MARK, width=2)
    return canvas


def _titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture under a small title, which may be wider than it."""
    width = max(picture.width, int(_font(13).getlength(title)) + 2)
    canvas = Image.new("RGB", (width, picture.height + _LINE), _PAPER)
    _write(ImageDraw.Draw(canvas), (1, _LINE - 5), title, 13, _FAINT, anchor="ls")
    canvas.paste(picture, (0, _LINE))
    return canvas


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + 2 * _GAP * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + 2 * _GAP
    return canvas


def _below(pictures: Sequence[Image.Image]) -> Image.Image:
    height = sum(picture.height for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas = Image.new("RGB", (max(picture.width for picture in pictures), height), _PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + _GAP
    return canvas


def _framed(picture: Image.Image, caption: Sequence[str]) -> Image.Image:
    """The picture with a margin and its caption above."""
    fonts = [17] + [14] * (len(caption) - 1)
    text = max(int(_font(size).getlength(line)) for size, line in zip(fonts, caption, strict=True))
    top = _MARGIN + sum(size + 7 for size in fonts) + 4
    width = max(picture.width, text) + 2 * _MARGIN
    canvas = Image.new("RGB", (width, top + picture.height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    line_top = _MARGIN
    for size, line in zip(fonts, caption, strict=True):
        _write(draw, (_MARGIN, line_top), line, size, _INK if size == fonts[0] else _FAINT)
        line_top += size + 7
    canvas.paste(picture, (_MARGIN, top))
    return canvas


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: Any, **options: Any
) -> None:
    draw.text(place, text, fill=colour, font=_font(size), **options)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
