"""Labels of the user's own: from a column of the catalog or a table, split by subject."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from catalog.errors import SetupError
from tests.training.conftest import write_corpus
from training.downstream.catalog_labels import CatalogConfig, load
from training.downstream.cells import run_cell, settings_of
from training.downstream.classification import Labelled
from training.downstream.task import Cell

CPU = torch.device("cpu")
QUICK = {"tokens_z": 1, "tokens_x": 2, "epochs": 10, "learning_rates": [1e-3], "head_learning_rates": [1e-2]}
PER_CLASS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of volumes of different slice distance, one of pictures, and a kind of one subject."""
    kinds = {"CT": ((1, 18, 40, 40), 1.0), "MRI": ((1, 8, 40, 40), 5.0), "fundus": ((3, 1, 40, 48), None)}
    images: list[tuple[Any, ...]] = [
        (f"{kind[0]}{number}", kind, shape, z)
        for kind, (shape, z) in kinds.items()
        for number in range(PER_CLASS)
    ]
    return write_corpus(
        tmp_path_factory.mktemp("labels") / "corpus", [*images, ("x", "XR", (1, 1, 40, 40), None)]
    )


def settings(corpus: Path, task: str = "catalog:modality", **changes: Any) -> CatalogConfig:
    overrides = [f"{name}={json.dumps(value)}" for name, value in {**QUICK, **changes}.items()]
    config: CatalogConfig = settings_of(task, "tiny", str(corpus), overrides)
    return config


def parts(data: Labelled) -> list[set[str]]:
    return [set(data.subjects[rows].tolist()) for rows in (data.training, data.validation, data.test)]


def test_a_column_of_the_catalog_is_learnt_from_frozen_features(corpus: Path, tmp_path: Path) -> None:
    for mode in ("linear", "knn-3", "adaptformer-8"):
        cell = Cell(task="catalog:modality", init="scratch:tiny", mode=mode)
        result = run_cell(cell, settings(corpus), tmp_path / mode)
        assert result.metrics["AUC"] > 0.7, mode
        assert set(result.data["classes"]) == {"CT", "MRI", "fundus"}
        assert result.data["classes"]["CT"] == {"train": 3, "validation": 2, "test": 3}
        assert result.data["left_out"] == 1


def test_parts_hold_whole_subjects_of_every_class_and_follow_from_the_seed(corpus: Path) -> None:
    data = load("catalog:modality", settings(corpus), 0)
    training, validation, test = parts(data)
    assert not training & validation | training & test | validation & test
    assert len(training | validation | test) == 3 * PER_CLASS
    for rows in (data.training, data.validation, data.test):
        assert len(set(data.cases.labels[rows].tolist())) == 3
    assert parts(load("catalog:modality", settings(corpus), 0)) == parts(data)
    assert parts(load("catalog:modality", settings(corpus), 1)) != parts(data)


def test_a_batch_has_one_size_and_spacing_and_every_image_comes_once(corpus: Path) -> None:
    data = load("catalog:modality", settings(corpus), 0)
    rows = np.arange(3 * PER_CLASS)[::-1]
    seen = []
    for batch in data.cases.batches(rows, 5, CPU, None):
        labels = {data.classes[label] for label in data.cases.labels[batch.rows]}
        assert len(labels) == 1  # each kind has a slice distance of its own
        depth, z = {"CT": (16, 1.0), "MRI": (4, 5.0), "fundus": (1, None)}[labels.pop()]
        assert batch.image.shape == (len(batch.rows), 3, depth, 32, 32)
        assert np.isnan(batch.spacing[0]) if z is None else batch.spacing[0] == z
        seen += batch.rows.tolist()
    assert sorted(seen) == sorted(rows.tolist())


def write_labels(file: Path, head: list[str], rows: list[list[str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([head, *rows])
    return file


def test_a_table_of_labels_with_its_own_split(corpus: Path, tmp_path: Path) -> None:
    split = ["train", "train", "validation", "test"]
    rows = [
        ["toy", f"{kind}{number}", "yes" if kind == "C" else "no", split[number]]
        for kind in "CM"
        for number in range(4)
    ]
    rows.append(["toy", "f0", "", "train"])  # no label
    file = write_labels(tmp_path / "labels.csv", ["dataset", "key", "finding", "split"], rows)
    data = load("catalog:finding", settings(corpus, "catalog:finding", labels=str(file)), 5)
    assert data.classes == ("no", "yes")
    assert parts(data) == [
        {"toy/C0", "toy/C1", "toy/M0", "toy/M1"},
        {"toy/C2", "toy/M2"},
        {"toy/C3", "toy/M3"},
    ]
    narrowed = settings(corpus, "catalog:finding", labels=str(file), where="key <> 'C1'")
    assert parts(load("catalog:finding", narrowed, 5))[0] == {"toy/C0", "toy/M0", "toy/M1"}


def test_labels_that_cannot_be_used_are_refused(corpus: Path, tmp_path: Path) -> None:
    good = [["toy", f"{kind}{number}", kind] for kind in "CM" for number in range(4)]
    wrong = {
        "no ingested image": (["dataset", "key", "finding"], [*good, ["toy", "nobody", "C"]]),
        "has no column finding": (["dataset", "key", "label"], good),
        "named before": (["dataset", "key", "finding"], [*good, good[0]]),
        "split is 'dev'": (["dataset", "key", "finding", "split"], [[*row, "dev"] for row in good]),
        "fewer than two classes": (["dataset", "key", "finding"], good[:4]),
    }
    for message, (head, rows) in wrong.items():
        file = write_labels(tmp_path / "labels.csv", head, rows)
        with pytest.raises(SetupError, match=message):
            load("catalog:finding", settings(corpus, "catalog:finding", labels=str(file)), 0)
    with pytest.raises(SetupError, match="cannot read the labels"):
        load("catalog:finding", settings(corpus, "catalog:finding", labels=str(tmp_path / "none.csv")), 0)
    cell = Cell(task="catalog:colour", init="scratch:tiny")
    with pytest.raises(SetupError, match="no column colour"):
        run_cell(cell, settings(corpus, "catalog:colour"), tmp_path / "run")


def test_a_person_in_two_parts_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.downstream import catalog_labels

    head = ["dataset", "key", "finding", "split"]
    rows = [["toy", f"{kind}{number}", kind, "train"] for kind in "CM" for number in range(3)]
    file = write_labels(tmp_path / "labels.csv", head, [*rows, ["toy", "C3", "C", "test"]])
    whole = catalog_labels.load_catalog

    def of_one_person(*arguments: Any) -> Any:
        table = whole(*arguments)
        people = ["C2" if key == "C3" else key for key in table["key"].to_pylist()]
        return table.set_column(table.schema.get_field_index("subject"), "subject", [people])

    monkeypatch.setattr(catalog_labels, "load_catalog", of_one_person)
    with pytest.raises(SetupError, match="subject toy/C2 into train and test"):
        load("catalog:finding", settings(corpus, "catalog:finding", labels=str(file)), 0)
