"""What frozen features of the ViT know, beside those of the same network untrained and of grey values alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from training.downstream.compare import Grid, run_grid
from training.downstream.report import write_report

SEEDS = 20
"""Of each comparison: draws of the subjects to learn from and to be tested on."""
_GREY = Path(__file__).with_name("grey.py")


def frozen_features(corpus: Path, vit: Path, cells: Path, out: Path) -> None:
    """Compare on the catalog's own columns, in `cells`; the table goes to `out`."""
    grid = Grid.model_validate(
        {
            "tasks": [
                {"task": f"catalog:{column}", "preset": "tiny", "data": str(corpus)}
                for column in ("modality", "body_part")
            ],
            "inits": [
                {"init": f"scratch:{vit}", "name": "untrained"},
                {"init": str(vit), "name": "pre-trained"},
                {"init": f"{_GREY}:grey", "name": "grey values"},
            ],
            "modes": ["linear", "knn-5"],
            "seeds": list(range(SEEDS)),
        }
    )
    write_report(grid, run_grid(grid, cells), cells)
    shutil.copy(cells / "report.md", out / "frozen-features.md")
