"""A small picture of an image: its mid-planes as a human reader expects them, window applied, as PNG."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ingest.volume import Voxels

LONGEST_SIDE = 96
"""Pixels of the longest side of each plane."""

_GAP = 2
_DOWN_BEFORE_ACROSS = "ISPALR"
_PLANES = ((1, 2), (0, 2), (0, 1))


def render_preview(
    voxels: Voxels,
    *,
    spacing: tuple[float | None, float | None, float | None],
    window: tuple[float, float],
    codes: str | None,
) -> bytes:
    """PNG of the three mid-planes of a volume side by side, or of a 2-D image. Same input, same bytes.

    Args:
        voxels: (C, D, H, W), C = 1, or 3 for 2-D colour.
        spacing: (z, y, x) in mm, for the true aspect; z is null for 2-D, y and x where unknown (then equal).
        window: stored values that become black and white.
        codes: directions in which D, H and W grow, one of geometry.DISPLAY_CODES: superior, else anterior, is
            shown at the top, and right, else anterior, at the left. Null: as stored.
    """
    if spacing[0] is None:
        pictures = [_picture(voxels[:, 0], (spacing[1] or 1.0, spacing[2] or 1.0), window)]
    else:
        pictures = []
        for shown in _PLANES:
            plane, down, across = upright_plane(voxels, shown, codes)
            pictures.append(_picture(plane, (spacing[down] or 1.0, spacing[across] or 1.0), window))
    return _png(_side_by_side(pictures))


def upright_plane(voxels: Voxels, shown: tuple[int, int], codes: str | None) -> tuple[Voxels, int, int]:
    """The mid-plane that two axes span, as a human reader expects it.

    Args:
        voxels: (C, D, H, W).
        shown: the two axes, 0, 1, 2 for D, H, W.
        codes: as of `render_preview`.

    Returns:
        (C, h, w), the axis that runs down (reversed where its code is S), and the axis that runs across.
    """
    down, across = shown
    hidden = 3 - down - across
    # Not by take(), which first copies an array that is not contiguous.
    plane: Voxels = voxels[*(slice(None),) * (hidden + 1), voxels.shape[hidden + 1] // 2]
    if codes and _DOWN_BEFORE_ACROSS.index(codes[down]) > _DOWN_BEFORE_ACROSS.index(codes[across]):
        plane, down, across = plane.swapaxes(1, 2), across, down
    if codes and codes[down] == "S":
        plane = plane[:, ::-1]
    return plane, down, across


def windowed(plane: Voxels, window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Stored values as grey levels: `window` becomes 0 and 255."""
    low, high = window
    return np.rint(np.clip((plane.astype(np.float64) - low) * (255 / (high - low)), 0, 255)).astype(np.uint8)


def _picture(
    plane: Voxels, sides_mm: tuple[float, float], window: tuple[float, float]
) -> npt.NDArray[np.uint8]:
    """`plane` (C, h, w) with pixels of `sides_mm` as (h, w) or (h, w, 3), its longest side LONGEST_SIDE."""
    from PIL import Image  # 0.1 s that --help need not pay

    grey = windowed(plane, window)
    picture = Image.fromarray(np.ascontiguousarray(grey[0] if len(grey) == 1 else grey.transpose(1, 2, 0)))
    height_mm, width_mm = plane.shape[1] * sides_mm[0], plane.shape[2] * sides_mm[1]
    scale = LONGEST_SIDE / max(height_mm, width_mm)
    size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def _side_by_side(pictures: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas = np.zeros((height, width, *pictures[0].shape[2:]), dtype=np.uint8)
    left = 0
    for picture in pictures:
        top = (height - picture.shape[0]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + _GAP
    return canvas


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    from imagecodecs import PNG, png_encode  # as above

    # Pillow tries every filter on every row and looks for matches far back: four times slower, hardly smaller.
    return bytes(png_encode(pixels, level=1, strategy=PNG.STRATEGY.RLE, filter=PNG.FILTER.PAETH))
