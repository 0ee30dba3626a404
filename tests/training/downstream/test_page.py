"""The page on downstream tasks is true: its network runs, its grid is one, its settings exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.training.downstream.labelled import QUICK, write_medmnist
from training.downstream.adaptation import adapt
from training.downstream.cells import run_cell, settings_of
from training.downstream.classification import check_mode
from training.downstream.compare import cells_of, load_grid
from training.downstream.initialisations import load_backbone
from training.downstream.medmnist import SETS
from training.downstream.task import Cell, prefix_of

PAGE = (REPOSITORY / "docs/downstream.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def my_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the page's network and weights for it."""
    (tmp_path / "my_networks.py").write_text(block("python"))
    namespace: dict[str, object] = {}
    exec(block("python"), namespace)
    torch.save(namespace["Mine"]().state_dict(), tmp_path / "mine.pt")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_network_of_the_page_is_short_and_can_be_compared(my_networks: Path) -> None:
    assert len(block("python").splitlines()) <= 25
    backbone = load_backbone("my_networks.py:mine")
    features = backbone.forward_features(torch.rand(2, 3, 16, 16, 16), (1.0, 1.0, 1.0))
    assert features.whole.shape == (2, backbone.channels)
    assert tuple(stage.shape[1] for stage in features.stages) == backbone.stage_channels
    adapt(backbone, "linear")
    data = write_medmnist(my_networks / "data")
    settings = settings_of("medmnist3d:nodule", "tiny", str(data), [f"{k}={v}" for k, v in QUICK.items()])
    cell = Cell(task="medmnist3d:nodule", init="my_networks.py:mine")
    assert run_cell(cell, settings, my_networks / "run").metrics.keys() == {"AUC", "ACC"}


def test_the_grid_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(block("yaml"))
    assert len(list(cells_of(load_grid(tmp_path / "grid.yaml")))) == 2 * 2 * 2 * 3 * 6


def test_tasks_and_modes_of_the_page_exist() -> None:
    assert set(re.findall(r"`medmnist3d:(\w+)`", PAGE)) == {"organ"}
    row = next(line for line in PAGE.splitlines() if line.startswith("| `medmnist3d:organ`"))
    assert set(re.findall(r"`(\w+)`", row.split("|")[1])) | {"organ"} == set(SETS)
    for task in re.findall(r"--task (\S+)", PAGE):
        prefix_of(task)
    modes = re.findall(
        r"^\| `(?:[a-z]+`, `)?([a-z]+(?:-[A-Z])?)` \|", PAGE.partition("## Modes")[2], re.MULTILINE
    )
    assert len(modes) == 7
    for mode in modes:
        check_mode(re.sub("[A-Z]", "3", mode))
