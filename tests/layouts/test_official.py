"""The descriptions of official layouts are checked, and give the same files every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ingest.glance import glance_file, series_folder
from tests.commands import published_files
from tests.layouts.official import Release

CT = {"subject": "s", "modality": "CT"}
FILES: dict[str, Any] = {
    "a/volume.nii.gz": {"key": "1", **CT, "orientation": "LPS"},
    "a/cine.nii": {"key": "2", **CT, "shape": [8, 9, 4, 3], "volumes": 3},
    "a/volume.MHA": {"key": "3", **CT},
    "a/volume.nrrd": {"key": "4", **CT},
    "a/series/": {"key": "5", **CT, "volumes": 2, "dicom": {"SeriesDescription": "lung"}},
    "b/grey.png": {"key": "6", **CT, "mode": "L16"},
    "b/colour.JPG": {"key": "7", **CT, "mode": "grey-as-RGB"},
    "b/copy.png": {"key": "8", **CT, "same_as": "b/grey.png", "excluded": "duplicate"},
}
BESIDE = {
    "a/label.nii.gz": "label",
    "a/segmentation/": "label",
    "a/scout/": "localizer",
    "a/mask.nrrd": "label",
    "b/mask.tif": "label",
    "b/._x.png": "debris",
    "readme.txt": "text",
}


def release(**changes: Any) -> Release:
    return Release.model_validate({"found": FILES, "beside": BESIDE} | changes)


def test_every_file_is_written_in_its_format_and_always_the_same(tmp_path: Path) -> None:
    root = release(tables={"t.csv": "a,b\n"}).write(tmp_path / "one")
    release(tables={"t.csv": "a,b\n"}).write(tmp_path / "two")
    assert published_files(tmp_path / "one") == published_files(tmp_path / "two")
    assert len(list((root / "a/series").iterdir())) == 8
    assert (root / "t.csv").read_text() == "a,b\n"
    for path in FILES:
        seen = series_folder(root / path / "1-001.dcm") if path.endswith("/") else glance_file(root / path)
        assert seen is not None, path
        assert seen.several == path.endswith("cine.nii")
    assert (root / "b/copy.png").read_bytes() == (root / "b/grey.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"founds": {}}, "unknown field 'founds'; did you mean 'found'"),
        ({"found": {"a.png": {"key": "1", **CT, "modus": "L"}}}, "unknown field 'modus'"),
        ({"found": {"a.png": {"key": "1", **CT, "excluded": "declred"}}}, "reason code"),
        ({"found": {"a.nii": {"key": "1", **CT, "shape": [4, 4, 4, 2]}}}, "2 volumes"),
        ({"found": {"a.nii": {"key": "1", **CT, "volumes": 2, "weight": [1.0]}}}, "1 items for 2"),
        ({"found": {"a.dat": {"key": "1", **CT}}}, "no image file"),
        ({"found": {"a.png": {"key": "1", **CT}, "b.png": {"key": "1", **CT}}}, "one key"),
        ({"found": {"a.png": {"key": "1", **CT, "same_as": "c.png"}}}, "same_as"),
        ({"beside": {"b/grey.png": "label"}}, "described twice"),
        ({"beside": {"b/x.png": "lable"}}, "label"),
        ({"variants": {"flat": {"a/": "", "b/": "", "c/": ""}}}, "no path begins with 'c/'"),
        ({"variants": {"flat": {"a/volume.nrrd": "a/volume.MHA"}}}, "one path"),
    ],
)
def test_a_wrong_description_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        release(**changes)


def test_a_copy_whose_original_is_missing_is_the_image() -> None:
    kept = release().only(lambda path: path == "b/copy.png").found["b/copy.png"]
    assert (kept.same_as, kept.excluded) == (None, None)
