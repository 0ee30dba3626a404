"""The picture of a normalised image: true aspect, window, upright, and its letters where they belong."""

from __future__ import annotations

import numpy as np
import pytest

from ingest.montage import draw_image, draw_note, stack


def drawn(
    voxels: np.ndarray, spacing: tuple[float | None, float | None, float | None], codes: str | None
) -> np.ndarray:
    picture = draw_image(voxels, spacing=spacing, window=(0, 100), codes=codes, caption=["one", "two"])
    return np.asarray(picture)


def white_box(picture: np.ndarray) -> tuple[int, int]:
    """Height and width of the pure white region."""
    rows, columns = np.nonzero((picture == 255).all(-1))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


@pytest.mark.parametrize(("y", "x"), [(1.0, 1.0), (1.0, 2.0), (3.0, 1.0), (None, None)])
def test_picture_has_the_aspect_of_the_body(y: float | None, x: float | None) -> None:
    height, width = white_box(drawn(np.full((1, 1, 40, 60), 100, np.uint8), (None, y, x), None))
    expected = (40 * (y or 1)) / (60 * (x or 1))
    # A bar of length covers a little of the lower edge where the spacing is known.
    assert height / width == pytest.approx(expected, rel=0.03)


def test_window_maps_to_black_and_white() -> None:
    voxels = np.zeros((1, 1, 32, 32), np.int16)
    voxels[..., :16], voxels[..., 16:] = -50, 900
    picture = drawn(voxels, (None, None, None), None)
    assert (picture == 0).all(-1).sum() == pytest.approx((picture == 255).all(-1).sum(), rel=0.05)


@pytest.mark.parametrize("codes", ["SPL", "PIL", "LIP", None])
@pytest.mark.parametrize("depth", [2, 3, 8, 9, 40])
def test_every_depth_and_direction_can_be_drawn(codes: str | None, depth: int) -> None:
    voxels = np.random.default_rng(0).integers(0, 100, (1, depth, 20, 30), np.int16)
    assert drawn(voxels, (5.0, 1.0, 1.0), codes).shape[2] == 3


def test_superior_is_up_in_the_reformats() -> None:
    voxels = np.zeros((1, 30, 30, 30), np.int16)
    voxels[:, 20:] = 100  # D grows to superior
    picture = drawn(voxels, (1.0, 1.0, 1.0), "SPL")
    reformat = picture[:, picture.shape[1] * 3 // 4 :]
    rows = np.nonzero((reformat == 255).all(-1).sum(1) > 50)[0]
    assert rows.max() < picture.shape[0] * 0.6


def test_colour_stays_colour() -> None:
    voxels = np.zeros((3, 1, 20, 20), np.uint8)
    voxels[0] = 100
    picture = drawn(voxels, (None, None, None), None)
    assert (picture == (255, 0, 0)).all(-1).any()


def test_stacked_pictures_keep_their_height() -> None:
    notes = [draw_note(["excluded: constant", "All voxels have one value."]) for _ in range(3)]
    assert stack(notes).height == sum(note.height for note in notes)
