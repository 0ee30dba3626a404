"""The contact sheet: right slice, right tokens hidden, a whole PNG."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from training.pictures import Row, contact_sheet, hide, middle_slice


def test_the_middle_slice_is_shown_channel_last_and_clipped():
    x = torch.zeros(3, 5, 4, 6)
    x[0, 2] = 2.0
    x[1, 2] = -1.0
    panel = middle_slice(x)
    assert panel.shape == (4, 6, 3)
    assert (panel == [1.0, 0.0, 0.0]).all()


def test_hidden_tokens_are_painted_over_and_visible_ones_kept():
    panel = np.ones((8, 12, 3), np.float32)
    hidden = hide(panel, torch.tensor([[True, False, True], [False, True, True]]))
    assert (hidden[:4, :4] == 1).all()
    assert (hidden[:4, 4:8] < 0.5).all()
    assert (hidden[4:, :4] < 0.5).all()
    assert (hidden[4:, 4:] == 1).all()


@pytest.mark.parametrize(
    "columns", [["input", "reconstruction"], ["input", "tokenizer", "masked", "predicted"]]
)
def test_a_sheet_has_a_panel_for_every_row_and_column(tmp_path, columns):
    colours = np.linspace(0.1, 0.9, 3 * len(columns)).reshape(3, len(columns))
    rows = [Row(f"CT, level {i}", [np.full((32, 32, 3), c, np.float32) for c in colours[i]]) for i in range(3)]
    contact_sheet(tmp_path / "sheet.png", "tokenizer, step 10", columns, rows)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    found = set(np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).ravel())
    for colour in colours.ravel():
        assert {int(colour * 255), round(colour * 255)} & found, "a panel is missing"
