"""`view`: one row and its preview, found by key, without a shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA
from catalog.view import find_image, picture_name, render
from catalog.write import merge_dataset
from tests.commands import run

PREVIEW = b"\x89PNG preview"


def row(dataset: str, key: str, **columns: Any) -> dict[str, Any]:
    required = {"subject": "s1", "status": "ingested", "split": "train", "source_path": f"{key}.nii.gz"}
    return {"dataset": dataset, "key": key, "entry_hash": "e", "normalisation_version": 1, **required} | columns


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path / "data")
    for dataset, keys in (
        ("first", ["p1-t1", "p1-t2", "x/y"]),
        ("second", ["p1-t1", "scan#0000", "scan#0001"]),
    ):
        rows = [row(dataset, key, spacing_z=2.5, body_part=["brain"]) for key in keys]
        previews = [{"dataset": dataset, "key": key, "preview": PREVIEW + key.encode()} for key in keys]
        merge_dataset(corpus, dataset, rows, previews)
    merge_dataset(
        corpus, "third", [row("third", "bad", status="excluded", reason="constant", message="one value")], []
    )
    return corpus


def test_row_and_preview_of_one_image(corpus: Corpus) -> None:
    image = find_image(corpus, "p1-t2")
    assert image.row.keys() == set(CATALOG_SCHEMA.names)
    assert (image.row["dataset"], image.row["spacing_z"]) == ("first", 2.5)
    assert image.preview == PREVIEW + b"p1-t2"


@pytest.mark.parametrize(
    ("key", "dataset", "expected"),
    [
        ("p1-t1", "second", ("second", "p1-t1")),
        ("second/p1-t1", None, ("second", "p1-t1")),
        ("x/y", None, ("first", "x/y")),
        ("first/x/y", None, ("first", "x/y")),
        ("scan#0001", None, ("second", "scan#0001")),
    ],
)
def test_ways_to_name_an_image(
    key: str, dataset: str | None, expected: tuple[str, str], corpus: Corpus
) -> None:
    image = find_image(corpus, key, dataset)
    assert (image.row["dataset"], image.row["key"]) == expected


def test_key_of_several_datasets_asks_which(corpus: Corpus) -> None:
    with pytest.raises(SetupError, match=r"first, second.*--dataset first"):
        find_image(corpus, "p1-t1")


@pytest.mark.parametrize(
    ("key", "dataset", "closest"),
    [
        ("scan", None, "second/scan#0000, second/scan#0001"),
        ("p1-t3", "first", "first/p1-t"),
        ("P1_T2", None, "first/p1-t2"),
        ("first/p1-t7", None, "first/p1-t"),
    ],
)
def test_unknown_key_names_the_closest(key: str, dataset: str | None, closest: str, corpus: Corpus) -> None:
    with pytest.raises(SetupError, match=f"no image '{key}'.*{closest}"):
        find_image(corpus, key, dataset)


def test_unknown_dataset_and_empty_corpus(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no catalog of fourth"):
        find_image(corpus, "p1-t1", "fourth")
    with pytest.raises(SetupError, match="no catalog"):
        find_image(Corpus(tmp_path / "none"), "p1-t1")


def test_printed_row_has_units_and_leaves_out_what_is_null(corpus: Corpus) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    render(find_image(corpus, "p1-t2"), console)
    text = console.export_text()
    assert "2.5 mm" in text
    assert "brain" in text
    assert "window_low" not in text


def test_command_saves_the_preview(corpus: Corpus, tmp_path: Path) -> None:
    shown = run("pumit-data", "view", "first/x/y", "--data", corpus.root, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    name = picture_name(find_image(corpus, "x/y"))
    assert name == "first-x_y.png"
    assert name in shown.stdout
    assert (tmp_path / name).read_bytes() == PREVIEW + b"x/y"


def test_command_with_json_writes_only_on_demand(corpus: Corpus, tmp_path: Path) -> None:
    shown = run("pumit-data", "view", "x/y", "--data", corpus.root, "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["key"] == "x/y"
    assert json.loads(shown.stdout)["preview"] is None
    shown = run("pumit-data", "view", "x/y", "--data", corpus.root, "--json", "--save", "p.png", cwd=tmp_path)
    assert json.loads(shown.stdout)["preview"] == "p.png"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "p.png"}


def test_excluded_image_has_a_row_and_no_preview(corpus: Corpus, tmp_path: Path) -> None:
    shown = run("pumit-data", "view", "bad", "--data", corpus.root, cwd=tmp_path)
    assert shown.returncode == 0
    assert "constant" in shown.stdout
    assert "No preview" in shown.stdout
    refused = run("pumit-data", "view", "bad", "--data", corpus.root, "--save", "p.png", cwd=tmp_path)
    assert refused.returncode == 2
    assert "no preview" in refused.stderr
