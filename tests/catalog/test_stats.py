"""Summaries of the catalog against plain Python over the same rows, and their tables."""

from __future__ import annotations

import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from catalog.corpus import Corpus
from catalog.schema import CATALOG_SCHEMA
from catalog.stats import AUDITED, PAPER, QUANTILES, SPACINGS, audit, summarise, summarise_cells
from catalog.stats_tables import markdown_groups, markdown_paper, render, render_groups
from catalog.survey import SURVEY_COLUMNS, load_survey_table, survey_corpus, survey_table
from catalog.write import write_table

DEFAULTS = {"split": "train", "source_path": "p", "entry_hash": "e", "normalisation_version": 1}


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        **DEFAULTS,
        "dataset": "amos",
        "key": f"k{number}",
        "subject": f"s{number}",
        "status": "ingested",
        "modality": "CT",
        "body_part": ["abdomen"],
        "dimension": 3,
        "da_level": 2,
        "shape_d": 10,
        "shape_h": 20,
        "shape_w": 30,
        "stored_bytes": 1000,
        "spacing_z": 5.0,
        "spacing_y": 1.0,
        "spacing_x": 1.0,
        "sampling_weight": 1.0,
        **changes,
    }


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA).select(SURVEY_COLUMNS)


spacing = st.none() | st.just(math.nan) | st.sampled_from([0.5, 5.0]) | st.floats(0.1, 12)
changes = st.fixed_dictionaries(
    {
        "dataset": st.sampled_from(["amos", "brats"]),
        "subject": st.sampled_from("abc"),
        "status": st.sampled_from(["ingested", "ingested", "excluded"]),
        "modality": st.sampled_from(["CT", "MRI/T1", None]),
        "body_part": st.lists(st.sampled_from(["head", "neck"]), unique=True) | st.none(),
        "dimension": st.sampled_from([2, 3]),
        "da_level": st.integers(0, 5),
        "split": st.sampled_from(["train", "validation"]),
        "shape_d": st.integers(1, 500),
        "shape_w": st.sampled_from([30, 31, 512]),
        "spacing_z": spacing,
        "spacing_y": spacing,
        "spacing_x": spacing,
        "stored_bytes": st.none() | st.integers(0, 10**9),
        "sampling_weight": st.none() | st.floats(0.01, 4),
    }
)
columns = st.lists(
    st.sampled_from(["dataset", "modality", "body_part", "dimension", "da_level", "split"]),
    unique=True,
    max_size=3,
)


def known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


@settings(max_examples=120, deadline=None)
@given(given_changes=st.lists(changes, max_size=12), by=columns)
def test_every_number_is_that_of_plain_python(given_changes: list[dict[str, Any]], by: list[Any]) -> None:
    rows = [row(number, **one) for number, one in enumerate(given_changes)]
    images = [one for one in rows if one["status"] == "ingested"]
    total = sum(one["sampling_weight"] or 0 for one in images if one["split"] == "train")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in images:
        for part in (one["body_part"] or [None]) if "body_part" in by else [None]:
            name = tuple(part if column == "body_part" else one[column] for column in by)
            groups.setdefault(name, []).append(one)

    summary = summarise(table_of(rows), by).to_pylist()

    def sort_key(name: tuple[Any, ...]) -> list[tuple[bool, Any]]:
        return [(value is None, 0 if value is None else value) for value in name]

    assert [tuple(found[column] for column in by) for found in summary] == sorted(groups, key=sort_key)
    for found in summary:
        members = groups[tuple(found[column] for column in by)]
        drawn = sum(one["sampling_weight"] or 0 for one in members if one["split"] == "train")
        assert found["images"] == len(members)
        assert found["subjects"] == len({(one["dataset"], one["subject"]) for one in members})
        assert found["slices"] == sum(one["shape_d"] for one in members)
        assert found["voxels"] == sum(one["shape_d"] * 20 * one["shape_w"] for one in members)
        assert found["stored_bytes"] == sum(one["stored_bytes"] or 0 for one in members)
        assert found["sampling_share"] == pytest.approx(drawn / total if total else 0.0)
        levels = [found[f"da_{level}"] for level in range(6)]
        assert levels == [sum(one["da_level"] == level for one in members) for level in range(6)]
        measures = {
            name: known([one[name] for one in members])
            for name in ("spacing_z", "shape_d", "shape_h", "shape_w")
        }
        measures["spacing_in_plane"] = [
            min(pair) for one in members if (pair := known([one["spacing_y"], one["spacing_x"]]))
        ]
        for name, values in measures.items():
            for label, quantile in QUANTILES.items():
                expected = np.quantile(values, quantile) if values else None
                assert found[f"{name}_{label}"] == (None if expected is None else pytest.approx(expected))


@settings(max_examples=15, deadline=None)
@given(given_changes=st.lists(changes, min_size=1, max_size=12), by=columns, row_group=st.integers(1, 5))
def test_files_give_what_their_rows_give(given_changes: list[Any], by: list[Any], row_group: int) -> None:
    """Of several row groups, each with dictionaries of its own; a condition keeps what a filter keeps."""
    rows = [row(number, **one) for number, one in enumerate(given_changes)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder))
        for dataset in {one["dataset"] for one in rows}:
            table = pa.Table.from_pylist([one for one in rows if one["dataset"] == dataset], CATALOG_SCHEMA)
            corpus.catalog_file(dataset).parent.mkdir(parents=True, exist_ok=True)
            write_table(corpus.catalog_file(dataset), table, row_group_size=row_group)
        assert close(summarise_cells(survey_corpus(corpus, by), by), summarise(table_of(rows), by))
        audited = audit(survey_corpus(corpus, AUDITED, SPACINGS))
        assert audited["datasets"] == audit(survey_table(table_of(rows), AUDITED))["datasets"]

        thick = [one for one in rows if one["shape_d"] > 100 and one["spacing_z"] is not None]
        found = survey_corpus(corpus, by, where="shape_d > 100 AND spacing_z IS NOT NULL")
        assert close(summarise_cells(found, by), summarise(table_of(thick), by))
        assert close(summarise(load_survey_table(corpus, by), by), summarise(table_of(rows), by))


def close(one: pa.Table, other: pa.Table) -> bool:
    """Equal, but for the rounding of sums whose terms come in another order."""
    share = "sampling_share"
    return bool(
        one.drop_columns(share).equals(other.drop_columns(share))
        and np.allclose(one[share].to_numpy(), other[share].to_numpy(), rtol=1e-12)
    )


@settings(max_examples=25, deadline=None)
@given(given_changes=st.lists(changes, max_size=12), by=columns, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(given_changes: list[Any], by: list[Any], order: Any) -> None:
    rows = [row(number, **one) for number, one in enumerate(given_changes)]
    shuffled = order.sample(rows, len(rows))
    assert close(summarise(table_of(shuffled), by), summarise(table_of(rows), by))


def test_many_cells_are_told_apart() -> None:
    """More of them than two bytes can number."""
    modalities = [f"m{number}" for number in range(70_000)]
    table = pa.table(
        {
            name: pa.array(modalities if name == "modality" else [row(0).get(name)] * 70_000, field.type)
            for name, field in ((name, CATALOG_SCHEMA.field(name)) for name in SURVEY_COLUMNS)
        }
    )
    summary = summarise(table, ["modality"], ())
    assert summary["modality"].to_pylist() == sorted(modalities)
    assert set(summary["images"].to_pylist()) == {1}


def test_a_column_that_is_no_grouping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot group by.*key.*modality"):
        summarise(table_of([row(0)]), ["key"])  # type: ignore[list-item]


def test_the_audit_accounts_for_every_row() -> None:
    rows = [
        row(0),
        row(1, status="excluded", reason="constant"),
        row(2, status="excluded", reason="constant"),
        row(3, status="failed", reason="unreadable"),
        row(4, dataset="brats", status="excluded", reason="uneven_slices"),
    ]
    summary = audit(survey_table(table_of(rows), AUDITED))
    assert summary["datasets"] == [
        {
            "dataset": "amos",
            "discovered": 4,
            "ingested": 1,
            "excluded": 2,
            "failed": 1,
            "reasons": {"constant": 2, "unreadable": 1},
        },
        {
            "dataset": "brats",
            "discovered": 1,
            "ingested": 0,
            "excluded": 1,
            "failed": 0,
            "reasons": {"uneven_slices": 1},
        },
    ]
    assert summary["totals"] == {
        "discovered": 5,
        "ingested": 1,
        "excluded": 3,
        "failed": 1,
        "subjects": 1,
        "slices": 10,
        "voxels": 6000,
        "stored_bytes": 1000,
    }
    assert [group["modality"] for group in summary["by_modality"]] == ["CT"]


@pytest.mark.parametrize("rows", [[], [row(0, status="failed", reason="unreadable")], [row(0), row(1)]])
def test_the_audit_is_json_and_can_be_printed(rows: list[dict[str, Any]]) -> None:
    summary = audit(survey_table(table_of(rows), AUDITED))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    console = Console(width=160, record=True, file=io.StringIO())
    render(summary, console)
    assert "Discovered" in console.export_text()


def test_printed_tables_show_names_numbers_and_unknown_spacings() -> None:
    flat = row(
        1, modality="XR", dimension=2, spacing_z=None, spacing_y=None, spacing_x=None, stored_bytes=2_000_000
    )
    groups = summarise(table_of([row(0), flat]), ["modality", "dimension"]).to_pylist()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_groups(groups, ["modality", "dimension"]))
    lines = console.export_text().splitlines()
    volume = next(line for line in lines if "CT" in line)
    radiograph = next(line for line in lines if "XR" in line)
    assert "50.0%" in volume
    assert "5/5/5" in volume
    assert "0 0 100 0 0 0" in volume
    assert "10x20x30" in volume
    assert "2.0 MB" in radiograph
    assert " - " in radiograph


def test_keys_that_look_like_markup_are_printed_as_they_are() -> None:
    summary = audit(survey_table(table_of([row(0, dataset="[red]x[/]", modality="[/b]")]), AUDITED))
    console = Console(width=160, record=True, file=io.StringIO())
    render(summary, console)
    printed = console.export_text()
    assert "[red]x[/]" in printed
    assert "[/b]" in printed


def test_the_tables_of_a_paper() -> None:
    rows = [
        row(0),
        row(1, modality="MRI/T1", body_part=["head", "neck"]),
        row(2, dataset="chestxray", modality="XR", dimension=2, shape_d=1, split="validation"),
        row(3, dataset="chestxray", status="failed", reason="unreadable", modality="US"),
    ]
    text = markdown_paper(survey_table(table_of(rows), PAPER, ()))
    datasets, methods = text.split("\n\n")
    assert datasets.splitlines()[2:] == [
        "| amos | CT, MRI/T1 | abdomen, head, neck | 2 | 0 | 20 | 2 | 100.0% |",
        "| chestxray | XR | abdomen | 0 | 1 | 1 | 1 | 0.0% |",
        "| **Total** |  |  | **2** | **1** | **21** | **3** |  |",
    ]
    assert methods.splitlines()[-2:] == ["| PUMIT (paper) | 48,344 | 348,991 |", "| this corpus | 2 | 1 |"]


def test_markdown_of_groups_has_one_cell_for_every_column() -> None:
    groups = summarise(table_of([row(0, modality="a|b"), row(1, modality=None)]), ["modality"]).to_pylist()
    head, rule, *lines = markdown_groups(groups, ["modality"]).split("\n\n")[0].splitlines()
    assert "a\\|b" in lines[0]
    assert {line.replace("\\|", "").count("|") for line in (head, rule, *lines)} == {14}
    assert "10/10/10" in lines[0]
