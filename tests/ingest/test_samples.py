"""The shipped images: what they are, that they are small, clean and documented, and how they were cut."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from ingest.discover import dataset_root
from ingest.found import find_sources
from ingest.source import ImageSource
from ingest.spec import get_spec
from tests.layouts import make_samples

MAX_BYTES = 12_000_000

MODALITIES = {
    "berens-retina": "fundus",
    "datalad-brain_T1": "MRI/T1",
    "dcm-qa-ct-head": "CT",
    "dcm-qa-sag-brain_fMRI": "MRI/fMRI",
    "elastix-chest": "CT",
    "ml-workgroup-0957ce54-chest": "XR",
    "ml-workgroup-1479fa94-chest": "XR",
    "ml-workgroup-88859dc1-chest": "XR",
    "monai-neck": "US",
    "nibabel-brain_fMRI": "MRI/fMRI",
    "niivue-brain_T2-FLAIR": "MRI/T2-FLAIR",
    "pydicom-echo-heart": "US",
    "pydicom-rg3-leg": "XR",
    "pyradiomics-brain1-brain": "MRI",
    "pyradiomics-lung1-chest": "CT",
    "scikit-image-retina": "fundus",
    "sct-testing-spine_fMRI": "MRI/fMRI",
    "sct-tutorial-spine_DWI": "MRI/DWI",
    "sct-tutorial-spine_T2": "MRI/T2",
    "totalsegmentator-chest": "CT",
}

PERSONAL = re.compile(
    "date|time|physician|operator|institution|station|address|birth|age$|weight|comment|accession"
)


@pytest.fixture(scope="module")
def sources(samples: Path) -> list[ImageSource]:
    return find_sources(get_spec("sample"), dataset_root(get_spec("sample"), samples.parent))


def paths(samples: Path, *endings: str) -> list[Path]:
    found = [path for path in sorted(samples.rglob("*")) if path.name.endswith(endings)]
    assert found
    return found


def test_all_are_discovered(sources: list[ImageSource]) -> None:
    assert {source.key: source.modality for source in sources} == MODALITIES
    for source in sources:
        assert source.key.startswith(f"{source.subject}-")
        assert source.path.split("/")[:2] == [source.modality.split("/")[0], source.subject]
        assert (source.dimension == 3) == (source.modality.split("/")[0] in ("CT", "MRI"))
        assert source.weight == 1
        assert source.exclude is None


def test_every_file_belongs_to_an_image_or_documents_them(samples: Path, sources: list[ImageSource]) -> None:
    files = {path.relative_to(samples).as_posix() for path in samples.rglob("*") if path.is_file()}
    images = {source.path for source in sources}
    rest = {file for file in files if file not in images and str(Path(file).parent) not in images}
    assert rest == {"README.md", "LICENSES.md"}


def test_every_image_is_documented(samples: Path, sources: list[ImageSource]) -> None:
    rows = [
        line.split(" | ") for line in (samples / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    documented = {row[0].strip("| /"): row for row in rows[1:]}
    assert set(documented) == {source.path for source in sources}
    assert {row[5] for row in documented.values()} == {
        *("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC BY 3.0", "CC0", "MIT", "PDDL-1.0")
    }


def test_every_modality_has_two_people(sources: list[ImageSource]) -> None:
    people = defaultdict(set)
    for source in sources:
        people[source.modality.split("/")[0]].add(source.subject)
    assert set(people) == {"CT", "MRI", "XR", "US", "fundus"}
    assert all(len(subjects) >= 2 for subjects in people.values())


def test_all_are_small(samples: Path) -> None:
    sizes = [path.stat().st_size for path in samples.rglob("*") if path.is_file()]
    assert sum(sizes) <= MAX_BYTES


def test_dicom_names_nobody(samples: Path) -> None:
    for path in paths(samples, ".dcm"):
        data = pydicom.dcmread(path)
        assert data.PatientName == data.PatientID == path.parts[-3]
        allowed = {"FrameTime", "PatientIdentityRemoved"}
        for element in data.iterall():
            assert not element.tag.is_private
            assert element.keyword in allowed or not PERSONAL.search(element.keyword.lower()), element
        assert not str(data.file_meta.get("SourceApplicationEntityTitle", ""))


def test_other_formats_carry_no_text(samples: Path) -> None:
    for path in paths(samples, ".nii", ".nii.gz"):
        header = nib.load(path).header
        assert not any(header[field].item() for field in ("descrip", "aux_file", "db_name", "intent_name"))
        assert not header.extensions
    for path in paths(samples, ".nrrd"):
        head = path.read_bytes().split(b"\n\n")[0].decode()
        assert not re.search(":=", head), "a free key of the NRRD header"
    for path in paths(samples, ".png", ".jpg"):
        with Image.open(path) as image:
            assert not image.getexif()
            assert not {"comment", "Comment", "Description", "icc_profile"} & set(image.info)


@pytest.mark.parametrize("name", sorted(make_samples.NIFTI))
def test_nifti_crops_keep_values_and_place(samples: Path, shared: Path, name: str) -> None:
    original_name, box = make_samples.NIFTI[name]
    original, crop = nib.load(shared / "data" / original_name), nib.load(samples / name)
    np.testing.assert_array_equal(np.asanyarray(crop.dataobj), np.asanyarray(original.dataobj)[tuple(box)])
    np.testing.assert_allclose(crop.affine @ [0, 0, 0, 1], original.affine @ [*start(box), 1], atol=1e-4)
    np.testing.assert_allclose(crop.affine[:3, :3], original.affine[:3, :3], atol=1e-5)
    assert crop.header.get_zooms()[:3] == original.header.get_zooms()[:3]
    assert crop.header.get_dim_info() == original.header.get_dim_info()
    assert crop.get_data_dtype() == original.get_data_dtype()


@pytest.mark.parametrize("name", sorted(make_samples.ITK))
def test_itk_crops_keep_values_and_place(samples: Path, shared: Path, name: str) -> None:
    original_name, box = make_samples.ITK[name]
    original, crop = (sitk.ReadImage(str(path)) for path in (shared / "data" / original_name, samples / name))
    values = sitk.GetArrayFromImage(original).transpose()[tuple(box)]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(crop).transpose(), values)
    np.testing.assert_allclose(crop.GetOrigin(), original.TransformIndexToPhysicalPoint(start(box)), atol=1e-9)
    assert crop.GetSpacing() == original.GetSpacing()
    assert crop.GetDirection() == original.GetDirection()


@pytest.mark.parametrize(
    ("crop", "original", "row", "column"),
    [
        ("CT/dcm-qa-ct/head/001.dcm", "ct_head_gantry_tilt/16.dcm", 128, 128),
        ("CT/dcm-qa-ct/head/010.dcm", "ct_head_gantry_tilt/25.dcm", 128, 128),
        ("MRI/datalad/brain_T1/001.dcm", "mr_t1_whole_head/N2D_0185.dcm", 168, 40),
        ("MRI/datalad/brain_T1/012.dcm", "mr_t1_whole_head/N2D_0196.dcm", 168, 40),
    ],
)
def test_dicom_crops_keep_values_and_place(
    samples: Path, shared: Path, crop: str, original: str, row: int, column: int
) -> None:
    cut, whole = pydicom.dcmread(samples / crop), pydicom.dcmread(shared / "data/dicom" / original)
    box = np.s_[row : row + cut.Rows, column : column + cut.Columns]
    np.testing.assert_array_equal(cut.pixel_array, whole.pixel_array[box])
    np.testing.assert_allclose(place(cut, 3, 5), place(whole, row + 3, column + 5), atol=1e-6)
    assert cut.PixelSpacing == whole.PixelSpacing
    assert cut.ImageOrientationPatient == whole.ImageOrientationPatient


def test_picture_crops_keep_values(samples: Path, shared: Path) -> None:
    leg = pydicom.dcmread(samples / "XR/pydicom-rg3/leg/001.dcm").pixel_array
    whole = pydicom.dcmread(shared / "data/dicom/xray_single_jpeg2000/RG3_J2KR.dcm").pixel_array
    np.testing.assert_array_equal(leg, whole[700:1700, 400:1400])
    echo = pydicom.dcmread(samples / "US/pydicom-echo/heart/001.dcm").pixel_array
    file = shared / "data/dicom/us_echo_multiframe_jpeg/color3d_jpeg_baseline.dcm"
    cine = pydicom.dcmread(file).pixel_array[::20, 31:415, 84:596]
    assert np.abs(echo.astype(int) - cine).mean() < 1
    for name, original in make_samples.UNCHANGED.items():
        assert (samples / name).read_bytes() == (shared / "data" / original).read_bytes()


def start(box: Sequence[slice]) -> list[int]:
    """First voxel of a crop along the three spatial axes."""
    return [part.start or 0 for part in box[:3]]


def place(data: pydicom.Dataset, row: int, column: int) -> Any:
    """Position in mm of a pixel (DICOM PS3.3, C.7.6.2.1.1)."""
    along_row, along_column = np.reshape(data.ImageOrientationPatient, (2, 3)).astype(float)
    between_rows, between_columns = map(float, data.PixelSpacing)
    origin = np.asarray(data.ImagePositionPatient, dtype=float)
    return origin + column * between_columns * along_row + row * between_rows * along_column
