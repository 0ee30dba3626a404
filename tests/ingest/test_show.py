"""`pumit-data list` and `show`: complete, filtered, and readable in terminals of any width."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ingest.citation import Citation, bibliography
from ingest.spec import load_specs
from tests.commands import run

WIDTHS = [80, 100, 120, 160, 200]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_fits_the_terminal(width: int, tmp_path: Path) -> None:
    shown = run("pumit-data", "list", "--data", tmp_path, env={"COLUMNS": str(width)})
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= width
    cells = [[cell.strip() for cell in line.split("│")] for line in lines if line.startswith("│")]
    assert [row[1] for row in cells if row[1]] == list(load_specs())
    assert ("title" in shown.stdout) == (width >= 150)
    assert ("T2-FLAIR" in shown.stdout) == (width >= 110)


def test_the_list_is_filtered_by_modality_and_body_part(tmp_path: Path) -> None:
    def ids(*options: str) -> set[str]:
        listed = json.loads(run("pumit-data", "list", "--data", tmp_path, "--json", *options).stdout)
        return {row["id"] for row in listed}

    assert {"amos", "lidc-idri", "sample"} <= ids("--modality", "ct")
    assert "busi" not in ids("--modality", "ct")
    assert "sample" in ids("--modality", "MRI/T2-FLAIR")
    assert "lidc-idri" in ids("--modality", "CT", "--body-part", "Chest")
    assert "amos" not in ids("--modality", "CT", "--body-part", "Chest")
    wrong = run("pumit-data", "list", "--modality", "CAT")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: No dataset here has the modality 'CAT'. There are: CT, ")


@pytest.mark.parametrize("dataset", load_specs())
def test_show_tells_all_of_an_entry(dataset: str, tmp_path: Path) -> None:
    from rich.console import Console

    from ingest.show import as_json, render

    spec = load_specs()[dataset]
    console = Console(width=90, record=True, soft_wrap=True, highlight=False)
    render(spec, False, console)
    shown = console.export_text()
    words = re.sub(r"\s+", " ", shown)
    for told in (
        spec.id,
        spec.title,
        *spec.body_parts,
        *spec.notes,
        *(rule.reason for rule in spec.exclusions),
    ):
        assert re.sub(r"\s+", " ", told) in words
    for citation in spec.citation:
        assert f"title = {{{{{citation.title}}}}}" in shown
    told_in_json = as_json(spec, False)
    assert json.loads(json.dumps(told_in_json))["id"] == dataset
    assert told_in_json["layout"]


def test_show_draws_the_layout_and_says_where_to_get_it(tmp_path: Path) -> None:
    shown = run("pumit-data", "show", "amos", "--data", tmp_path).stdout
    assert "├── amos22/images*/*.nii.gz" in shown
    assert "└── images*/*.nii.gz" in shown
    assert "zenodo.7262581" in shown
    assert "CC BY 4.0" in shown
    assert "@inproceedings{ji2022amos," in shown
    told = json.loads(run("pumit-data", "show", "amos", "--data", tmp_path, "--json").stdout)
    assert told["layout"] == {"amos22": {"images*": {"*.nii.gz": {}}}, "images*": {"*.nii.gz": {}}}
    assert told["ingested"] is False
    assert "<File Location>/" in run("pumit-data", "show", "lidc-idri", "--data", tmp_path).stdout
    assert "MRI (T1, T2" in run("pumit-data", "show", "sample", "--data", tmp_path).stdout
    wrong = run("pumit-data", "show", "amoss")
    assert wrong.returncode == 2
    assert "'amos'" in wrong.stderr


def test_references_with_one_key_are_told_apart() -> None:
    paper = Citation(authors="Porwal, Prasanna and others", title="Indian Images", year=2018)
    other = Citation(authors="Armato III, Samuel G.", title="The Lung", year=2011)
    keys = [entry.partition(",")[0] for entry in bibliography([paper, other, paper])]
    assert keys == ["@article{porwal2018indiana", "@article{armato2011lung", "@article{porwal2018indianb"]
