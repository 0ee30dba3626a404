"""`inspect`: the decisions of ingest itself, on any file or folder, and a picture that shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from rich.console import Console

from catalog.errors import SetupError
from ingest.found import find_sources
from ingest.image import normalise
from ingest.inspect import Inspection, as_json, inspect_path, montage_of, render
from ingest.readers import read_volumes
from ingest.spec import get_spec
from ingest.volume import Volume

KINDS = {
    "CT/totalsegmentator/chest.nii.gz": ("nifti", 3, "CT"),
    "CT/elastix/chest.mha": ("itk", 3, "CT"),
    "CT/pyradiomics-lung1/chest.nrrd": ("itk", 3, "CT"),
    "CT/dcm-qa-ct/head": ("dicom", 3, "CT"),
    "MRI/sct-tutorial/spine_T2.nii.gz": ("nifti", 3, "MRI/T2"),
    "MRI/sct-tutorial/spine_DWI.nii.gz": ("nifti", 3, "MRI/DWI"),
    "XR/pydicom-rg3/leg": ("dicom", 2, "XR"),
    "XR/ml-workgroup-0957ce54/chest.png": ("raster", 2, "XR"),
    "US/pydicom-echo/heart": ("dicom", 2, "US"),
}
GUESSED_ELSEWHERE = {"key", "source_path", "modality"}
"""Columns that an entry of datasets.yaml gives."""


def rows(inspection: Inspection) -> list[dict[str, Any]]:
    return [image.row for source in inspection.sources for image in source.images]


def printed(inspection: Inspection) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    render(inspection, console)
    return console.export_text()


@pytest.mark.parametrize(("path", "expected"), KINDS.items())
def test_guesses_and_decisions_are_those_of_ingest(
    path: str, expected: tuple[str, int, str], samples: Path
) -> None:
    inspection = inspect_path(samples / path, modality=expected[2])
    source = inspection.sources[0].source
    assert (source.format, source.dimension) == expected[:2]
    declared = next(s for s in find_sources(get_spec("sample"), samples) if path.startswith(s.path))
    declared_rows = [normalise(v, declared).row for v in read_volumes(declared) if isinstance(v, Volume)]
    assert len(rows(inspection)) == len(declared_rows)
    for mine, theirs in zip(rows(inspection), declared_rows, strict=True):
        for name in mine.keys() - GUESSED_ELSEWHERE:
            assert mine[name] == theirs[name], name


@pytest.mark.parametrize(
    "path", ["CT/dcm-qa-ct/head", "MRI/sct-tutorial/spine_DWI.nii.gz", "US/monai/neck.png"]
)
def test_everything_is_printed_and_drawn(path: str, samples: Path) -> None:
    inspection = inspect_path(samples / path)
    text = printed(inspection)
    row = rows(inspection)[0]
    for word in (f"level {row['da_level']}", row["stored_dtype"], "crop box", "window", "ingested"):
        assert word in text
    picture = montage_of(inspection)
    assert picture is not None
    assert picture.width > 300
    assert len(picture.getcolors(1 << 24) or ()) > 50
    assert json.loads(json.dumps(as_json(inspection)))["sources"][0]["images"][0]["status"] == "ingested"


def test_a_slice_stands_for_its_series(samples: Path) -> None:
    series = samples / "CT/dcm-qa-ct/head"
    slice_file = sorted(series.iterdir())[2]
    assert rows(inspect_path(slice_file)) == rows(inspect_path(series))


def test_declared_depth_axis_and_modality_reach_ingest(samples: Path) -> None:
    file = samples / "CT/totalsegmentator/chest.nii.gz"
    assert rows(inspect_path(file))[0]["depth_axis"] == "SI"
    (row,) = rows(inspect_path(file, modality="MRI/T1", depth_axis="AP"))
    assert (row["modality"], row["depth_axis"], row["depth_rule"]) == ("MRI/T1", "AP", "declared")


def test_modality_of_a_nameless_volume_goes_by_its_values(tmp_path: Path, samples: Path) -> None:
    shutil.copy(samples / "CT/totalsegmentator/chest.nii.gz", tmp_path / "a.nii.gz")
    shutil.copy(samples / "MRI/sct-tutorial/spine_T2.nii.gz", tmp_path / "b.nii.gz")
    shutil.copy(samples / "fundus/berens/retina.jpg", tmp_path / "c.jpg")
    shutil.copy(samples / "XR/ml-workgroup-0957ce54/chest.png", tmp_path / "d.png")
    inspection = inspect_path(tmp_path)
    assert [seen.source.modality for seen in inspection.sources] == ["CT", "MRI", "fundus", "XR"]
    assert all("guess" in seen.grounds["modality"] for seen in inspection.sources)


def test_excluded_image_says_why_and_what_to_do(tmp_path: Path) -> None:
    affine = np.diag([1, 1.3, 1.6, 1])
    voxels = np.random.default_rng(0).integers(0, 100, (8, 9, 10), np.int16)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "odd.nii.gz")
    inspection = inspect_path(tmp_path / "odd.nii.gz")
    (row,) = rows(inspection)
    assert (row["status"], row["reason"]) == ("excluded", "in_plane_spacing")
    assert row["original_shape"] == [8, 9, 10]
    assert "depth_axis" in row["message"]
    assert "in_plane_spacing" in printed(inspection)
    assert montage_of(inspection) is None


def test_damaged_file_is_one_failure(tmp_path: Path, samples: Path) -> None:
    whole = (samples / "MRI/sct-tutorial/spine_DWI.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) * 3 // 4])
    inspection = inspect_path(tmp_path / "cut.nii.gz")
    assert [row["status"] for row in rows(inspection)] == ["failed"]


def test_masks_are_passed_over_unless_named(tmp_path: Path, samples: Path) -> None:
    for name in ("p1_t1.nii.gz", "p1_seg.nii.gz"):
        shutil.copy(samples / "MRI/sct-tutorial/spine_T2.nii.gz", tmp_path / name)
    inspection = inspect_path(tmp_path)
    assert [row["key"] for row in rows(inspection)] == ["p1_t1.nii.gz"]
    assert inspection.labels == 1
    assert rows(inspect_path(tmp_path / "p1_seg.nii.gz"))[0]["status"] == "ingested"


def test_of_many_volumes_some_are_shown_and_all_are_counted(samples: Path) -> None:
    inspection = inspect_path(samples / "US/pydicom-echo/heart")
    images = inspection.sources[0].images
    assert len(images) > 4
    assert sum(image.is_shown for image in images) == 3
    assert f"All {len(images)} volumes" in printed(inspection)


def test_no_patient_data_in_output_or_picture(tmp_path: Path, samples: Path) -> None:
    for file in (samples / "CT/dcm-qa-ct/head").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Doe^Jane", "HN4711", "19700101"
        dataset.save_as(tmp_path / file.name)
    inspection = inspect_path(tmp_path)
    text = printed(inspection) + json.dumps(as_json(inspection)) + repr(inspection)
    for secret in ("Doe", "Jane", "HN4711", "19700101"):
        assert secret not in text


def test_nothing_to_inspect_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for path, words in (
        (tmp_path / "none", "no file or folder"),
        (tmp_path / "notes.txt", "is no NIfTI"),
        (tmp_path, "no image"),
    ):
        with pytest.raises(SetupError, match=words):
            inspect_path(path)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(SetupError, match="--modality"):
        inspect_path(tmp_path, modality="Sonogram")
