"""The picture of an image: size, aspect, orientation, window."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ingest.geometry import DISPLAY_CODES
from ingest.preview import LONGEST_SIDE, render_preview
from ingest.source import DepthAxis


def decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def planes(png: bytes, widths: tuple[int, ...]) -> list[np.ndarray]:
    picture, left, found = decoded(png), 0, []
    for width in widths:
        found.append(picture[:, left : left + width])
        left += width + 2
    assert left - 2 == picture.shape[1]
    return found


def test_volume_shows_three_planes_with_true_aspect() -> None:
    voxels = np.full((1, 10, 40, 20), 100, dtype=np.int16)
    png = render_preview(voxels, spacing=(5.0, 1.0, 1.0), window=(0, 100), codes="SPL")
    # axial 40 x 20 mm; coronal 50 x 20 mm; sagittal 50 x 40 mm; each longest side 96 px
    axial, coronal, sagittal = planes(png, (48, 38, 77))
    heights = [int((plane > 0).any(axis=1).sum()) for plane in (axial, coronal, sagittal)]
    assert heights == [96, 96, 96]
    assert png == render_preview(voxels, spacing=(5.0, 1.0, 1.0), window=(0, 100), codes="SPL")


@pytest.mark.parametrize("depth_axis", ["SI", "AP", "LR"])
def test_head_is_up_and_right_is_left_whatever_the_depth_axis(depth_axis: DepthAxis) -> None:
    codes = DISPLAY_CODES[depth_axis]
    # A ramp towards superior plus weaker ones towards anterior and right, in voxels of (D, H, W).
    ramps = {"S": 100, "I": -100, "A": 10, "P": -10, "R": 1, "L": -1}
    index = np.indices((16, 16, 16))
    voxels = sum(ramps[code] * axis for code, axis in zip(codes, index, strict=True))[None].astype(np.int32)
    png = render_preview(
        voxels, spacing=(1.0, 1.0, 1.0), window=(float(voxels.min()), float(voxels.max())), codes=codes
    )
    for plane in planes(png, (96, 96, 96)):
        smooth = plane.astype(float)
        assert smooth[0].mean() >= smooth[-1].mean(), "superior, else anterior, is up"
        assert smooth[:, 0].mean() >= smooth[:, -1].mean(), "right, else anterior, is left"


def test_volume_without_orientation_is_shown_as_stored() -> None:
    voxels = np.zeros((1, 8, 8, 8), dtype=np.uint8)
    voxels[0, 4:] = 255
    _, second, third = planes(
        render_preview(voxels, spacing=(1.0, 1.0, 1.0), window=(0, 255), codes=None), (96, 96, 96)
    )
    for plane in (second, third):
        assert plane[:30].max() == 0
        assert plane[-30:].min() == 255


def test_window_is_applied_and_clipped() -> None:
    voxels = np.repeat(np.array([-2000, 0, 50, 200, 3000], dtype=np.int16), 20).reshape(1, 1, 1, 100)
    voxels = np.repeat(voxels, 100, axis=2)
    picture = decoded(render_preview(voxels, spacing=(None, None, None), window=(0, 200), codes=None))
    assert picture.shape == (LONGEST_SIDE, LONGEST_SIDE)
    assert picture[48, [5, 30, 48, 66, 90]].tolist() == [0, 0, 64, 255, 255]


def test_colour_and_pixel_size_of_2d_images() -> None:
    voxels = np.zeros((3, 1, 50, 50), dtype=np.uint8)
    voxels[1] = 200
    picture = decoded(render_preview(voxels, spacing=(None, 0.5, 1.0), window=(0, 255), codes=None))
    assert picture.shape == (48, 96, 3)
    assert picture[20, 20].tolist() == [0, 200, 0]


def test_thin_images_keep_at_least_one_pixel() -> None:
    voxels = np.arange(1000, dtype=np.int16).reshape(1, 1, 1, 1000)
    assert decoded(render_preview(voxels, spacing=(None, None, None), window=(0, 999), codes=None)).shape == (
        1,
        96,
    )
