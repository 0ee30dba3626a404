"""Every finding of doctor on a catalog that has it, and on one that nearly has it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from catalog.corpus import Corpus
from catalog.doctor.codes import CODES, page
from catalog.doctor.examine import Diagnosis, diagnose
from catalog.doctor.robust import BEYOND, LEAST, is_mixture, odd_ones, robust_z
from catalog.doctor.sheet import MOST_SUSPECTS, picture_sheet, write_sheet
from catalog.errors import SetupError
from catalog.write import merge_dataset
from tests.browser import browser
from tests.conftest import REPOSITORY

CT = {"min": -1024.0, "p0_5": -990.0, "median": -300.0, "mean": -200.0, "p99_5": 900.0, "max": 1500.0}
FLAT = {
    "dimension": 2,
    "da_level": 5,
    "shape_d": 1,
    "spacing_z": None,
    "depth_axis": None,
    "depth_rule": None,
    "modality": "XR",
    "original_orientation": None,
    "original_shape": [512, 512],
    "crop_box": [0, 1, 0, 512, 0, 512],
}
PICTURE = {"min": 0.0, "p0_5": 5.0, "median": 90.0, "mean": 100.0, "p99_5": 240.0, "max": 255.0}
SIBLINGS = 20


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A chest CT as it should be, each a little different; `intensity` changes some of its statistics."""
    intensity = CT | changes.pop("intensity", {})
    return {
        "dataset": "chest",
        "key": f"case-{number:02}",
        "subject": f"s{number}",
        "status": "ingested",
        "modality": "CT",
        "dimension": 3,
        "da_level": 2,
        "shape_c": 1,
        "shape_d": 60 + number,
        "shape_h": 512,
        "shape_w": 512 - number,
        "spacing_z": 5.0 + 0.02 * number,
        "spacing_y": 0.7,
        "spacing_x": 0.7,
        "slope": 1.0,
        "original_orientation": "LPS",
        "depth_axis": "SI",
        "depth_rule": "metadata",
        "original_shape": [512, 512, 60],
        "crop_box": [0, 60, 0, 500, 0, 500],
        "geometry_flags": [],
        "split": "train",
        "source_path": "p",
        "entry_hash": "e",
        **{f"intensity_{name}": value + number for name, value in intensity.items()},
        "normalisation_version": 1,
        **changes,
    }


def flat(number: int, **changes: Any) -> dict[str, Any]:
    return row(number, **(FLAT | {"intensity": PICTURE} | changes))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def corpus_of(folder: Path, rows: list[dict[str, Any]], colour: np.ndarray | None = None) -> Corpus:
    corpus = Corpus(folder)
    grey = np.tile(np.arange(96, dtype=np.uint8), (96, 1))
    for dataset in {one["dataset"] for one in rows}:
        here = [one for one in rows if one["dataset"] == dataset]
        previews = [
            {
                "dataset": dataset,
                "key": one["key"],
                "preview": png(grey if one["shape_c"] == 1 or colour is None else colour),
            }
            for one in here
            if one["status"] == "ingested"
        ]
        merge_dataset(corpus, dataset, here, previews)
    return corpus


def told(found: Diagnosis) -> set[tuple[str, str]]:
    return {(finding.code, suspect.key) for finding in found.findings for suspect in finding.suspects}


def of_one(tmp_path: Path, make: Any, changes: dict[str, Any], colour: np.ndarray | None = None) -> set[str]:
    """Codes that one image has which differs from SIBLINGS usual ones by `changes`; the others have none."""
    rows = [make(number) for number in range(SIBLINGS)] + [make(SIBLINGS, key="odd", **changes)]
    found = told(diagnose(corpus_of(tmp_path, rows, colour)))
    assert {key for _, key in found} <= {"odd"}
    return {code for code, _ in found}


def shifted(by: float) -> dict[str, float]:
    return {name: value + by for name, value in CT.items()}


@pytest.mark.parametrize(
    ("code", "make", "changes", "near_miss"),
    [
        ("ct_intercept", row, {"intensity": shifted(1024)}, {"intensity": shifted(200)}),
        ("ct_intercept", row, {"intensity": {"p99_5": -200.0}}, {"intensity": {"p99_5": 0.0}}),
        ("ct_outside_hu", row, {"intensity": {"p0_5": -1400.0}}, {"intensity": {"p0_5": -1250.0}}),
        ("ct_outside_hu", row, {"intensity": {"p99_5": 5000.0}}, {"intensity": {"p99_5": 3000.0}}),
        ("ct_narrow", row, {"intensity": PICTURE}, {"intensity": PICTURE | {"max": 400.0}}),
        (
            "ct_masked",
            row,
            {"intensity": {"min": -90.0, "p0_5": -80.0, "mean": 40.0, "median": -60.0}},
            {"intensity": {"min": -150.0, "p0_5": -80.0, "mean": 40.0, "median": -60.0}},
        ),
        (
            "near_constant",
            flat,
            {"intensity": {"p0_5": 1.0, "p99_5": 8.0}},
            {"intensity": PICTURE | {"p0_5": 9.0}},
        ),
        (
            "near_constant",
            row,
            {"slope": 0.001, "intensity": {"min": 0.0, "p0_5": 0.1, "p99_5": 0.105, "max": 0.11}},
            {"slope": 0.001, "intensity": {"min": 0.0, "p0_5": 0.1, "p99_5": 0.15, "max": 0.16}},
        ),
        (
            "mostly_empty",
            flat,
            {"intensity": PICTURE | {"median": 0.0, "mean": 2.0}},
            {"intensity": PICTURE | {"median": 0.0, "mean": 20.0}},
        ),
        ("mostly_empty", row, {"crop_box": [0, 20, 0, 90, 0, 90]}, {"crop_box": [0, 50, 0, 150, 0, 150]}),
        ("impossible_extent", row, {"spacing_z": 50.0}, {"spacing_z": 25.0}),
        (
            "impossible_extent",
            row,
            {"spacing_z": 0.005, "spacing_y": 0.0007, "spacing_x": 0.0007},
            {"spacing_z": 0.5, "spacing_y": 0.07, "spacing_x": 0.07},
        ),
        ("spacing_outlier", row, {"spacing_z": 10.0}, {"spacing_z": 6.0}),
        ("spacing_outlier", row, {"spacing_y": 0.07, "spacing_x": 0.07}, {"spacing_y": 0.6, "spacing_x": 0.6}),
        ("shape_outlier", row, {"shape_h": 128}, {"shape_h": 400}),
        ("intensity_outlier", row, {"intensity": {"mean": 200.0}}, {"intensity": {"mean": -100.0}}),
        ("depth_rule_disagrees", row, {"depth_rule": "overridden"}, {"depth_rule": "declared"}),
        (
            "depth_rule_disagrees",
            row,
            {"spacing_z": 0.7, "spacing_y": 0.7, "spacing_x": 0.76},
            {"spacing_z": 0.7, "spacing_y": 0.7, "spacing_x": 0.705},
        ),
        ("depth_axis_unlike_siblings", row, {"depth_axis": "LR"}, {"depth_axis": None}),
        ("orientation_unlike_siblings", row, {"original_orientation": "RAS"}, {"original_orientation": None}),
        ("orientation_missing", row, {"original_orientation": None}, {"original_orientation": "RAS"}),
        ("in_plane_anisotropy", row, {"spacing_x": 0.74}, {"spacing_x": 0.705}),
        ("in_plane_anisotropy", flat, {"spacing_x": 0.9}, {"spacing_x": 0.74}),
        ("equal_channels", flat, {"geometry_flags": ["equal_channels"]}, {"geometry_flags": ["inverted"]}),
        ("channels_unlike_siblings", flat, {"modality": "fundus"}, {}),
    ],
)
def test_each_code_and_what_nearly_has_it(
    tmp_path: Path, code: str, make: Any, changes: dict[str, Any], near_miss: dict[str, Any]
) -> None:
    if code == "channels_unlike_siblings":  # colour is usual in a fundus

        def make(number: int, **changes: Any) -> dict[str, Any]:
            return flat(number, modality="fundus", **({"shape_c": 3} | changes))

        changes, near_miss = {"shape_c": 1}, {"shape_c": 3}
    assert code in of_one(tmp_path / "it", make, changes)
    assert code not in of_one(tmp_path / "near", make, near_miss)


@pytest.mark.parametrize(("noise", "code"), [(3, "grey_as_colour"), (40, "colour_unexpected")])
def test_colour_is_judged_by_the_preview(tmp_path: Path, noise: int, code: str) -> None:
    pixels = np.full((96, 96, 3), 100) + np.random.default_rng(0).integers(0, noise + 1, (96, 96, 3))
    codes = of_one(tmp_path, flat, {"shape_c": 3}, pixels.astype(np.uint8))
    assert codes == {code}


def test_every_code_is_tried() -> None:
    (marks,) = (mark for mark in test_each_code_and_what_nearly_has_it.pytestmark if mark.name == "parametrize")
    tried = {case[0] for case in marks.args[1]} | {"grey_as_colour", "colour_unexpected", "mixed_group"}
    assert tried == CODES.keys()


def test_a_second_protocol_is_told_of_once(tmp_path: Path) -> None:
    rows = [row(number) for number in range(40)] + [row(number, spacing_z=1.0) for number in range(40, 50)]
    found = diagnose(corpus_of(tmp_path, rows))
    assert not told(found)
    (finding,) = found.findings
    assert (finding.code, finding.images, finding.of) == ("mixed_group", 10, 50)
    assert finding.summary is not None
    assert "between slices: 10 of 50" in finding.summary.value


def test_groups_are_datasets_and_modalities(tmp_path: Path) -> None:
    """What is usual elsewhere is unusual here, and small groups and images that are not there say nothing."""
    rows = [row(number) for number in range(SIBLINGS)]
    rows += [row(number, modality="MRI/T1", spacing_z=1.0) for number in range(20, 20 + LEAST - 1)]
    rows += [row(40, status="excluded", reason="constant", message="m", spacing_z=99.0)]
    others = [row(number, dataset="brain", spacing_z=1.0) for number in range(SIBLINGS)]
    found = diagnose(corpus_of(tmp_path, rows + others))
    assert not found.findings
    assert (found.images, found.small_groups, found.small_images) == (49, 1, 9)
    odd = [row(50, spacing_z=1.0)]
    merged = diagnose(corpus_of(tmp_path, [*rows, *odd]), ["chest"])
    assert told(merged) == {("spacing_outlier", "case-50")}
    assert merged.findings[0].typical in {one["key"] for one in rows[:SIBLINGS]}
    narrowed = diagnose(Corpus(tmp_path), where="dataset = 'brain'")
    assert (narrowed.images, narrowed.findings) == (20, [])


def test_nothing_known_is_nothing_found(tmp_path: Path) -> None:
    required = ("dataset", "subject", "status", "split", "source_path", "entry_hash", "normalisation_version")
    bare = [{"key": f"k{number}"} | {name: row(0)[name] for name in required} for number in range(20)]
    found = diagnose(corpus_of(tmp_path, [one | {"shape_c": None} for one in bare]))
    assert (found.images, found.findings) == (20, [])


@settings(deadline=None)
@given(
    values=arrays(np.float64, st.integers(LEAST, 60), elements=st.floats(0.1, 1000)),
    factor=st.floats(0.01, 100),
)
def test_z_does_not_depend_on_the_unit(values: np.ndarray, factor: float) -> None:
    z = robust_z(np.log(values), 0.05)
    np.testing.assert_allclose(robust_z(np.log(values * factor), 0.05), z, atol=1e-6)
    np.testing.assert_allclose(robust_z(-np.log(values), 0.05), -z, atol=1e-9)


@settings(deadline=None)
@given(value=st.floats(-1e6, 1e6), count=st.integers(0, 50))
def test_equal_values_are_never_unusual(value: float, count: int) -> None:
    z = robust_z(np.full(count, value), 0.05)
    assert not np.any(np.abs(np.nan_to_num(z)) > 0)
    assert not odd_ones(np.full(count, 3))[0].any()


@settings(deadline=None)
@given(st.integers(LEAST, 1000))
def test_outliers_are_few(count: int) -> None:
    codes = np.zeros(count, int)
    codes[: max(1, count // 20)] = 1
    assert odd_ones(codes)[0].sum() == max(1, count // 20)
    codes[: max(1, count // 20) + 1] = 1
    assert not odd_ones(codes)[0].any()
    assert is_mixture(max(1, count // 20) + 1, count)


def test_normal_values_have_normal_scores() -> None:
    values = np.random.default_rng(0).normal(50, 7, 100_000)
    z = robust_z(values, 0.0)
    np.testing.assert_allclose(z, (values - 50) / 7, atol=0.1, rtol=0.03)
    assert not (np.abs(z) > BEYOND).any()


def test_the_page_of_codes_is_up_to_date() -> None:
    file = REPOSITORY / "docs/doctor.md"
    assert file.read_text(encoding="utf-8") == page(), "run `python -m catalog.doctor.codes > docs/doctor.md`"


def test_pictures_are_bounded_and_the_page_is_harmless(tmp_path: Path) -> None:
    hostile = "\"'><script>alert(1)</script>{{ 7*7 }}"
    corpus = Corpus(tmp_path / "corpus")
    for number in range(4):
        rows = [row(n, dataset=f"d{number}", intensity=shifted(1100)) for n in range(300)]
        rows[0]["key"] = hostile
        noise = np.random.default_rng(0).integers(0, 256, (96, 292), np.uint8)
        previews = [{"dataset": f"d{number}", "key": one["key"], "preview": png(noise)} for one in rows]
        merge_dataset(corpus, f"d{number}", rows, previews)
    found = diagnose(corpus)
    assert {finding.images for finding in found.findings if finding.code == "ct_intercept"} == {300}
    sheet = picture_sheet(corpus, found)
    assert sheet["shown"] <= MOST_SUSPECTS
    assert sheet["suspects"] >= 1200
    file = tmp_path / "page.html"
    assert write_sheet(corpus, found, file) == file.stat().st_size < 5_000_000
    text = file.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    assert "49" not in {part.partition("<")[0] for part in text.split("{{ 7*7 }}")}
    write_sheet(corpus, found, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == file.read_bytes()
    with browser(tmp_path / "profile") as tab:
        tab.open(file)
        assert tab.run("[...document.images].every((image) => image.naturalWidth > 0)")
        assert not tab.troubles()
        assert len(tab.requested()) == 1
        tab.run(
            "const field = document.querySelector('#find'); field.value = 'd1';"
            "field.dispatchEvent(new Event('input'))"
        )
        shown = tab.run("[...document.querySelectorAll('.group')].filter((group) => !group.hidden).length")
        assert 0 < shown < tab.run("document.querySelectorAll('.group').length")


def test_a_damaged_preview_is_named(tmp_path: Path) -> None:
    rows = [flat(number, shape_c=3) for number in range(3)]
    corpus = Corpus(tmp_path)
    merge_dataset(
        corpus, "chest", rows, [{"dataset": "chest", "key": one["key"], "preview": b"no PNG"} for one in rows]
    )
    with pytest.raises(SetupError, match="chest/case-0"):
        diagnose(corpus)
