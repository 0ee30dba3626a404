"""Summaries of the catalog against plain Python over the same rows."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from catalog.schema import CATALOG_SCHEMA
from catalog.stats import AUDITED, QUANTILES, audit, summarise
from catalog.stats_tables import render, render_groups
from catalog.survey import SURVEY_COLUMNS, survey_table

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


spacing = st.none() | st.floats(0.1, 12)
changes = st.fixed_dictionaries(
    {
        "dataset": st.sampled_from(["amos", "brats"]),
        "subject": st.sampled_from("abc"),
        "status": st.sampled_from(["ingested", "ingested", "excluded"]),
        "modality": st.sampled_from(["CT", "MRI/T1", None]),
        "body_part": st.lists(st.sampled_from(["head", "neck"]), unique=True) | st.none(),
        "dimension": st.sampled_from([2, 3]),
        "da_level": st.sampled_from([0, 3, 5]),
        "split": st.sampled_from(["train", "validation"]),
        "shape_d": st.integers(1, 500),
        "spacing_z": spacing,
        "spacing_y": spacing,
        "spacing_x": spacing,
        "stored_bytes": st.integers(0, 10**9),
        "sampling_weight": st.floats(0.01, 4),
    }
)
columns = st.lists(
    st.sampled_from(["dataset", "modality", "body_part", "dimension", "da_level", "split"]),
    unique=True,
    max_size=3,
)


@settings(max_examples=120, deadline=None)
@given(given_changes=st.lists(changes, max_size=12), by=columns)
def test_every_number_is_that_of_plain_python(given_changes: list[dict[str, Any]], by: list[Any]) -> None:
    rows = [row(number, **one) for number, one in enumerate(given_changes)]
    images = [one for one in rows if one["status"] == "ingested"]
    total = sum(one["sampling_weight"] for one in images if one["split"] == "train")
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
        drawn = sum(one["sampling_weight"] for one in members if one["split"] == "train")
        assert found["images"] == len(members)
        assert found["subjects"] == len({(one["dataset"], one["subject"]) for one in members})
        assert found["slices"] == sum(one["shape_d"] for one in members)
        assert found["voxels"] == sum(one["shape_d"] * 20 * 30 for one in members)
        assert found["stored_bytes"] == sum(one["stored_bytes"] for one in members)
        assert found["sampling_share"] == pytest.approx(drawn / total if total else 0.0)
        in_plane = [min(filter(None, (one["spacing_y"], one["spacing_x"])), default=None) for one in members]
        spacings = {"spacing_z": [one["spacing_z"] for one in members], "spacing_in_plane": in_plane}
        for name, values in spacings.items():
            known = [value for value in values if value is not None]
            for label, quantile in QUANTILES.items():
                expected = np.quantile(known, quantile) if known else None
                assert found[f"{name}_{label}"] == (None if expected is None else pytest.approx(expected))


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
    assert "5 / 5 / 5" in volume
    assert "2.0 MB" in radiograph
    assert " - " in radiograph


def test_keys_that_look_like_markup_are_printed_as_they_are() -> None:
    summary = audit(survey_table(table_of([row(0, dataset="[red]x[/]", modality="[/b]")]), AUDITED))
    console = Console(width=160, record=True, file=io.StringIO())
    render(summary, console)
    printed = console.export_text()
    assert "[red]x[/]" in printed
    assert "[/b]" in printed
