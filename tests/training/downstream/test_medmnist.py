"""MedMNIST in 3-D: files of the published form are learnt from, and the rules of the paper hold."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from catalog.errors import SetupError
from tests.commands import run
from tests.training.downstream.labelled import COUNTS, QUICK, write_medmnist
from training.downstream.cells import run_cell, settings_of
from training.downstream.classification import Batch, Labelled, Rows, labelled_share
from training.downstream.medmnist import MD5, MedMNISTConfig, load
from training.downstream.report import paper_results
from training.downstream.task import Cell

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_medmnist(tmp_path_factory.mktemp("medmnist"))
    return write_medmnist(folder, "adrenal", mask=True)


def settings(files: Path, task: str = "medmnist3d:nodule", **changes: Any) -> MedMNISTConfig:
    overrides = [f"{name}={json.dumps(value)}" for name, value in {**QUICK, **changes}.items()]
    config: MedMNISTConfig = settings_of(task, "tiny", str(files), overrides)
    return config


@pytest.mark.parametrize("mode", ["full", "adapter-8", "linear", "knn-3"])
def test_training_beats_chance(mode: str, files: Path, tmp_path: Path) -> None:
    cell = Cell(task="medmnist3d:nodule", init="scratch:tiny", mode=mode, seed=1)
    # What random features of shapes are worth is less than what can be learnt.
    changes: dict[str, Any] = {"epochs": 30} if mode == "linear" else {"epochs": 7}
    result = run_cell(cell, settings(files, **changes, lr_drops=[100]), tmp_path / "run")
    assert result.metrics["AUC"] > (0.85 if mode == "full" else 0.65)
    assert result.data == {
        "file": "nodulemnist3d.npz",
        "md5": result.data["md5"],
        "published": False,
    }
    assert (result.trained_parameters == 0) == (mode == "knn-3")
    assert (result.trained_parameters < 250) == (mode in ("linear", "knn-3"))
    with (tmp_path / "run/predictions.csv").open() as stream:
        predictions = list(csv.DictReader(stream))
    assert len(predictions) == COUNTS["test"]
    right = sum((float(row["p malignant"]) > 0.5) == (row["class"] == "malignant") for row in predictions)
    assert result.metrics["ACC"] == right / COUNTS["test"]


def test_a_cell_is_reproducible_and_read_when_done(files: Path, tmp_path: Path) -> None:
    cell, config = Cell(task="medmnist3d:nodule", init="scratch:tiny"), settings(files, epochs=2)
    first, again = (run_cell(cell, config, tmp_path / name) for name in ("a", "b"))
    assert first.metrics == again.metrics
    assert first.chosen == again.chosen
    assert run_cell(cell, config, tmp_path / "a") == first  # with its seconds: it was read, not run
    with pytest.raises(SetupError, match=r"another run: seed was 0, is 1"):
        run_cell(cell.model_copy(update={"seed": 1}), config, tmp_path / "a")
    with pytest.raises(SetupError, match=r"another run: epochs was 2, is 3"):
        run_cell(cell, settings(files, epochs=3), tmp_path / "a")


def test_finished_rates_of_an_interrupted_run_are_taken_up(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(task="medmnist3d:nodule", init="scratch:tiny", mode="last-1")
    config = settings(files, epochs=2, learning_rates=[1e-4, 1e-3])
    whole = run_cell(cell, config, tmp_path / "whole")
    part = run_cell(cell, config, tmp_path / "part")
    (tmp_path / "part/result.json").unlink()
    (tmp_path / "part/trial-0.001.json").unlink()
    seen = (tmp_path / "part/trial-0.0001.json").stat().st_mtime_ns
    part = run_cell(cell, config, tmp_path / "part")
    assert part.metrics == whole.metrics
    assert part.chosen == whole.chosen
    assert (tmp_path / "part/trial-0.0001.json").stat().st_mtime_ns == seen


def images(data: Labelled, draw: torch.Generator | None) -> npt.NDArray[np.float32]:
    batches: Iterator[Batch] = data.cases.batches(data.training, 5, CPU, draw)
    found = list(batches)
    assert np.array_equal(np.concatenate([batch.rows for batch in found]), data.training)
    assert all(batch.image.shape[1:] == (3, 16, 16, 16) for batch in found)
    stacked: npt.NDArray[np.float32] = torch.cat([batch.image for batch in found]).numpy()
    return stacked


def test_masks_are_dimmed_at_random_in_training_and_by_half_in_evaluation(files: Path) -> None:
    data = load("medmnist3d:adrenal", settings(files, "medmnist3d:adrenal"))
    assert images(data, None).max(axis=(1, 2, 3, 4)) == pytest.approx(0.5)
    peaks = images(data, torch.Generator().manual_seed(0)).max(axis=(1, 2, 3, 4))
    assert len(np.unique(peaks)) == COUNTS["train"]
    assert 0 < peaks.min() < 0.3 < 0.7 < peaks.max() < 1
    plain = load("medmnist3d:nodule", settings(files))
    assert np.array_equal(images(plain, None), images(plain, torch.Generator()))
    assert images(plain, None).max() > 0.7


def test_a_share_of_labels_is_stratified_nested_and_of_whole_subjects() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 4])
    subjects = (np.arange(64) // 2).astype(np.str_)

    class Nothing:
        vary = False

        def __init__(self, labels: Rows) -> None:
            self.labels = labels

        def batches(self, *_: object) -> Iterator[Batch]:
            raise NotImplementedError

    rows = np.arange(64)
    data = Labelled(Nothing(labels), ("a", "b", "c"), subjects, rows, rows[:0], rows[:0], {})
    small, large = (set(labelled_share(data, fraction, 3).tolist()) for fraction in (0.1, 0.5))
    assert small < large
    assert [sum(labels[row] == k for row in large) for k in range(3)] == [20, 10, 2]
    assert [sum(labels[row] == k for row in small) for k in range(3)] == [4, 2, 2]
    assert all((row ^ 1) in small for row in small)
    assert set(labelled_share(data, 0.1, 4).tolist()) != small
    assert len(labelled_share(data, 1.0, 3)) == 64


def test_wrong_files_are_refused(files: Path, tmp_path: Path) -> None:
    cell = Cell(task="medmnist3d:organ", init="scratch:tiny")
    with pytest.raises(SetupError, match=MD5["organmnist3d.npz"]):
        run_cell(cell, settings(files), tmp_path / "a")
    with pytest.raises(SetupError, match="one of organ, nodule"):
        run_cell(cell.model_copy(update={"task": "medmnist3d:liver"}), settings(files), tmp_path / "b")
    with pytest.raises(SetupError, match="Tasks begin with"):
        settings_of("medmnist:organ", "tiny", None, [])
    with pytest.raises(SetupError, match="no medmnist3d preset"):
        settings_of("medmnist3d:organ", "small", None, [])

    bad = tmp_path / "bad"
    bad.mkdir()
    whole = dict(np.load(files / "nodulemnist3d.npz"))
    spoilt = {
        "val_labels": (None, "has no val_labels"),
        "train_images": (whole["train_images"].astype(np.float32), "not uint8"),
        "test_labels": (whole["test_labels"] + 5, "number from 0 to 1"),
    }
    for name, (array, message) in spoilt.items():
        arrays = {key: value for key, value in {**whole, name: array}.items() if value is not None}
        np.savez(bad / "nodulemnist3d.npz", **arrays)
        with pytest.raises(SetupError, match=message):
            load("medmnist3d:nodule", settings(bad))
    (bad / "nodulemnist3d.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(SetupError, match="not a readable npz"):
        load("medmnist3d:nodule", settings(bad))


def test_the_papers_figures_agree_with_the_means_it_prints() -> None:
    printed = {"UniMiSS": (87.8, 81.2), "EVA-02-B": (86.7, 80.2), "PUMIT": (92.2, 84.6)}
    for method, means in printed.items():
        rows = paper_results("medmnist3d")["rows"][method]
        assert set(rows) == {"organ", "nodule", "fracture", "adrenal", "vessel", "synapse"}
        for number, mean in enumerate(means):
            assert sum(row[number] for row in rows.values()) / 6 == pytest.approx(mean, abs=0.06)
    assert paper_results("catalog") == {}


@pytest.mark.slow
def test_the_command(files: Path, tmp_path: Path) -> None:
    places = ["--data", str(files), "--run", str(tmp_path / "run"), "--preset", "tiny"]
    small = [part for name, value in QUICK.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    what = ["--task", "medmnist3d:nodule", "--init", "scratch:tiny", "--mode", "linear"]
    done = run("pumit-train", "finetune", *what, *places, *small, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "run/result.json").read_text())
