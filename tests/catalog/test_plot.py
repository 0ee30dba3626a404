"""The audit picture is drawn for any corpus, in the same bytes each time."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from catalog.errors import SetupError
from catalog.plot import audit_picture
from catalog.schema import CATALOG_SCHEMA
from catalog.spacing import da_level

FLAT = {"dimension": 2, "da_level": 5, "shape_d": 1, "spacing_z": None, "spacing_y": None, "spacing_x": None}


def row(number: int, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    thickness, pixel = float(rng.uniform(0.8, 6)), float(rng.uniform(0.4, 1.2))
    return {
        "dataset": "demo",
        "key": f"k{number}",
        "subject": f"s{number}",
        "status": "ingested",
        "modality": "CT",
        "dimension": 3,
        "da_level": da_level(thickness / pixel),
        "shape_d": int(rng.integers(20, 400)),
        "shape_h": 512,
        "shape_w": int(rng.integers(300, 512)),
        "spacing_z": thickness,
        "spacing_y": pixel,
        "spacing_x": pixel,
        "stored_bytes": 10**6,
        "sampling_weight": 1.0,
        "split": "train",
        "source_path": "p",
        "entry_hash": "e",
        "normalisation_version": 1,
        **changes,
    }


def picture(tmp_path: Path, rows: list[dict[str, Any]]) -> bytes:
    path = tmp_path / "audit.png"
    audit_picture(pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        [row(0)],
        [row(0, **FLAT, modality="XR")],
        [row(number, split="validation") for number in range(3)],
        [row(number, sampling_weight=None, modality=None) for number in range(3)],
        [row(number, modality=f"family {number}/x") for number in range(30)],
        [row(0), row(1, status="excluded", reason="constant", shape_d=None, spacing_z=None, modality=None)],
        [row(0, spacing_z=1.0, spacing_y=1.0, spacing_x=1.0, shape_d=1, shape_h=1, shape_w=1)],
    ],
    ids=["one", "only 2-D", "no training", "nothing known", "many families", "some excluded", "smallest"],
)
def test_any_corpus_gives_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    image = Image.open(io.BytesIO(picture(tmp_path, rows)))
    assert image.size == (1800, 1248)
    assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_the_same_corpus_gives_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    import matplotlib

    rows = [row(number) for number in range(50)] + [row(99, **FLAT, modality="XR")]
    plain = picture(tmp_path, rows)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "savefig.dpi": 40}):
        assert picture(tmp_path, rows) == plain


def test_without_an_image_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no ingested image"):
        picture(tmp_path, [row(0, status="failed", reason="unreadable")])
    assert not list(tmp_path.iterdir())


def test_neither_numbers_nor_pictures_load_matplotlib_before_they_are_drawn() -> None:
    code = "import sys, catalog.plot, catalog.stats; sys.exit('matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
    )
