"""The NIfTI reader against nibabel on real files, and on files made to be difficult."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ingest.readers import read_volumes
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume


def source(file: Path, root: Path | None = None, dimension: int = 3) -> ImageSource:
    root = root or file.parent
    return ImageSource(
        dataset="demo",
        key="case",
        subject="case",
        path=str(file.relative_to(root)),
        root=root,
        format="nifti",
        dimension=dimension,  # type: ignore[arg-type]
        modality="CT",
        upstream_modality="CT",
    )


def read(file: Path, root: Path | None = None, dimension: int = 3) -> list[Volume]:
    volumes = list(read_volumes(source(file, root, dimension)))
    assert all(isinstance(volume, Volume) for volume in volumes)
    return volumes  # type: ignore[return-value]


def save(path: Path, voxels: np.ndarray, kind: Any = nib.Nifti1Image) -> Path:
    kind(voxels, np.diag([0.5, 0.75, 2.0, 1.0])).to_filename(path)
    return path


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4), dtype=np.int16)


REAL = [
    "ct/totalsegmentator_aorta_ct_cropped.nii.gz",
    "ct/lidc_0314_chest_ct_axes_PIR.nii.gz",
    "ct/head_ct_sheared_uint8.nii.gz",
    "mri/tcga_fg_6692_t1.nii.gz",
    "mri/spinal_cord_dwi_4d.nii.gz",
    "mri/brain_fmri_sagittal_4d.nii",
    "mri/nibabel_anatomical.nii",
    "mri/nibabel_functional.nii",
]


@pytest.mark.parametrize("path", REAL)
def test_real_files_read_as_nibabel_reads_them(shared: Path, path: str) -> None:
    file = shared / "data" / path
    image = nib.load(file)
    expected = image.get_fdata()
    expected = expected.reshape(*expected.shape[:3], -1)
    volumes = read(file)
    assert [volume.index for volume in volumes] == list(range(expected.shape[3]))
    for volume in volumes:
        assert volume.voxels.dtype.isnative
        assert volume.voxels.dtype == image.get_data_dtype().newbyteorder("=")
        real = volume.voxels[0] * volume.slope + volume.intercept
        np.testing.assert_allclose(real, expected[..., volume.index], rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(volume.affine, image.affine)
        np.testing.assert_allclose(volume.spacing, nib.affines.voxel_sizes(image.affine))
        assert volume.slice_axis == image.header.get_dim_info()[2]
        assert volume.count == expected.shape[3]
        assert volume.source_hash == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("ct/ct_perfusion_rgb.nii.gz", "colour_volume"),
        ("mri/spinal_cord_venc_single_slice_4d.nii.gz", "single_slice"),
    ],
)
def test_real_files_that_are_no_volumes(shared: Path, path: str, reason: str) -> None:
    with pytest.raises(ExcludedImage) as outcome:
        read(shared / "data" / path)
    assert outcome.value.reason == reason
    assert "demo/case" in outcome.value.message


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f8", "<i8", ">u4", "u1"])
def test_versions_byte_orders_and_dtypes(tmp_path: Path, voxels: np.ndarray, kind: Any, dtype: str) -> None:
    header = kind.header_class(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(dtype)
    stored = np.abs(voxels % 200).astype(dtype)
    kind(stored, np.eye(4), header).to_filename(tmp_path / "x.nii.gz")
    (volume,) = read(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(volume.voxels[0], stored)
    assert volume.voxels.dtype.str.lstrip("<>|=") == dtype.lstrip("<>")
    assert volume.voxels.dtype.isnative


def test_compressed_members_and_padding(tmp_path: Path, voxels: np.ndarray) -> None:
    data = save(tmp_path / "x.nii", voxels).read_bytes()
    file = tmp_path / "many.nii.gz"
    file.write_bytes(gzip.compress(data[:400]) + gzip.compress(data[400:]) + bytes(512))
    (volume,) = read(file)
    np.testing.assert_array_equal(volume.voxels[0], voxels)


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, -9, -4])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_files_are_unreadable(tmp_path: Path, voxels: np.ndarray, suffix: str, keep: float) -> None:
    data = save(tmp_path / f"x{suffix}", voxels).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(FailedImage) as outcome:
        read(cut)
    assert outcome.value.reason == "unreadable"


def test_a_flipped_bit_in_compressed_data_is_noticed(tmp_path: Path, voxels: np.ndarray) -> None:
    file = save(tmp_path / "x.nii.gz", voxels)
    data = bytearray(file.read_bytes())
    data[-6] ^= 1  # the checksum
    file.write_bytes(data)
    with pytest.raises(FailedImage, match="demo/case"):
        read(file)


def test_a_sibling_file_is_never_read(tmp_path: Path, voxels: np.ndarray) -> None:
    save(tmp_path / "x.nii", voxels)
    save(tmp_path / "x.nii.gz", voxels + 1)
    np.testing.assert_array_equal(read(tmp_path / "x.nii.gz")[0].voxels[0], voxels + 1)
    np.testing.assert_array_equal(read(tmp_path / "x.nii")[0].voxels[0], voxels)
    save(tmp_path / "pair.img", voxels, kind=nib.Nifti1Pair)
    with pytest.raises(FailedImage) as outcome:
        read(tmp_path / "pair.hdr")
    assert outcome.value.reason == "unreadable"


def test_five_axes_give_one_volume_each_with_time_slowest(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 99, (4, 3, 2, 3, 2), dtype=np.int16)
    volumes = read(save(tmp_path / "x.nii.gz", data))
    assert sorted(volume.index for volume in volumes) == list(range(6))
    for volume in volumes:
        np.testing.assert_array_equal(volume.voxels[0], data[..., volume.index // 2, volume.index % 2])
    vectors = read(save(tmp_path / "vector.nii.gz", data[:, :, :, :1]))
    assert [volume.index for volume in vectors] == [0, 1]


def test_a_two_dimensional_source_gives_rows_and_columns(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.uint8).reshape(4, 3, 1)
    (volume,) = read(save(tmp_path / "x.nii", data), dimension=2)
    np.testing.assert_array_equal(volume.voxels[0, 0], data[:, :, 0].T)
    assert volume.spacing is not None
    np.testing.assert_array_equal(volume.spacing, (np.nan, 0.75, 0.5))
    assert volume.affine is None


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(2.0, -5.0, (2.0, -5.0)), (0.0, 7.0, (1.0, 0.0)), (np.nan, 1.0, (1.0, 0.0)), (-1.0, 0.0, (-1.0, 0.0))],
)
def test_scaling(tmp_path: Path, voxels: np.ndarray, slope: float, intercept: float, expected: Any) -> None:
    file = patched(save(tmp_path / "x.nii", voxels), scl_slope=slope, scl_inter=intercept)
    (volume,) = read(file)
    assert (volume.slope, volume.intercept) == expected
    np.testing.assert_array_equal(volume.voxels[0], voxels)


def patched(file: Path, **fields: Any) -> Path:
    """Write header fields behind nibabel's back."""
    data = bytearray(file.read_bytes())
    block = np.frombuffer(data, dtype=nib.Nifti1Header.template_dtype, count=1)
    for field, value in fields.items():
        block[field] = value
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sform_code": 0, "qform_code": 0, "pixdim": 0}, "spacing_missing"),
        ({"sform_code": 0, "qform_code": 0, "pixdim": [1, 1, 0, 1, 0, 0, 0, 0]}, "spacing_invalid"),
        ({"sform_code": 0, "qform_code": 0, "pixdim": [1, 1, np.nan, 1, 0, 0, 0, 0]}, "spacing_invalid"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 1, -1, 1, 0, 0, 0, 0]}, "spacing_invalid"),
        ({"sform_code": 1, "srow_x": 0}, "spacing_invalid"),
        ({"sform_code": 1, "srow_y": np.nan}, "spacing_invalid"),
        ({"dim": [3, 6, 0, 4, 1, 1, 1, 1]}, "no_pixels"),
        ({"dim": [3, 30, 4, 1, 1, 1, 1, 1]}, "single_slice"),
        ({"datatype": 32, "bitpix": 64}, "unsupported_layout"),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "too_large"),
        ({"dim": [9, 6, 5, 4, 1, 1, 1, 1]}, "unreadable"),
        ({"vox_offset": 100}, "unreadable"),
        ({"datatype": 1}, "unreadable"),
    ],
)
def test_headers_that_make_no_image(tmp_path: Path, voxels: np.ndarray, fields: Any, reason: str) -> None:
    with pytest.raises((ExcludedImage, FailedImage)) as outcome:
        read(patched(save(tmp_path / "x.nii", voxels), **fields))
    assert outcome.value.reason == reason
    assert outcome.value.message.startswith("demo/case (x.nii): ")


def test_geometry_without_orientation_and_with_other_units(tmp_path: Path, voxels: np.ndarray) -> None:
    file = patched(save(tmp_path / "x.nii", voxels), sform_code=0, qform_code=0)
    (volume,) = read(file)
    assert volume.affine is None
    assert volume.spacing == (0.5, 0.75, 2.0)
    (volume,) = read(patched(file, xyzt_units=3))
    np.testing.assert_allclose(volume.spacing, (0.0005, 0.00075, 0.002))
    assert volume.flags == ("unit_converted",)


def test_the_affine_wins_over_pixdim(tmp_path: Path, voxels: np.ndarray) -> None:
    (volume,) = read(patched(save(tmp_path / "x.nii", voxels), pixdim=[1, 9, 9, 9, 0, 0, 0, 0], sform_code=1))
    assert volume.spacing == (0.5, 0.75, 2.0)
    assert volume.flags == ("pixdim_disagrees",)


def test_links_out_of_the_root_are_refused(tmp_path: Path, voxels: np.ndarray) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save(tmp_path / "secret.nii", voxels)
    (root / "x.nii").symlink_to(tmp_path / "secret.nii")
    with pytest.raises(FailedImage) as outcome:
        read(root / "x.nii")
    assert outcome.value.reason == "outside_root"
    assert "secret" not in outcome.value.message
    save(root / "real.nii", voxels)
    (root / "inner.nii").symlink_to(root / "real.nii")
    assert len(read(root / "inner.nii")) == 1


def test_a_missing_file_has_vanished(tmp_path: Path) -> None:
    with pytest.raises(FailedImage) as outcome:
        read(tmp_path / "gone.nii.gz")
    assert outcome.value.reason == "vanished"


_AS_NOBODY = """
import os, sys
from pathlib import Path
import ingest.readers.nifti
from ingest.reasons import FailedImage
from ingest.source import ImageSource
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
root = Path(sys.argv[1])
source = ImageSource(dataset="demo", key="case", subject="case", path="x.nii", root=root, format="nifti",
                     dimension=3, modality="CT", upstream_modality="CT")
try:
    list(ingest.readers.read_volumes(source))
except FailedImage as outcome:
    print(outcome.reason)
"""


def test_a_file_without_read_permission(tmp_path: Path, voxels: np.ndarray) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    save(tmp_path / "x.nii", voxels).chmod(0)
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(tmp_path)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "no_permission"


def test_importing_the_readers_loads_no_library() -> None:
    code = (
        "import sys, ingest.readers; "
        "print({'pydicom', 'SimpleITK', 'cv2', 'nibabel', 'PIL', 'imagecodecs'} & set(sys.modules))"
    )
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
