"""The MetaImage and NRRD reader against SimpleITK's coordinates, and on headers that say too little."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from ingest.readers import read_volumes
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume


def read(file: Path, dimension: int = 3) -> list[Volume]:
    source = ImageSource(
        dataset="demo",
        key="case",
        subject="case",
        path=file.name,
        root=file.parent,
        format="itk",
        dimension=dimension,  # type: ignore[arg-type]
        modality="CT",
        upstream_modality="CT",
    )
    volumes = list(read_volumes(source))
    assert all(isinstance(volume, Volume) for volume in volumes)
    return volumes  # type: ignore[return-value]


def reason(file: Path, dimension: int = 3) -> str:
    with pytest.raises((ExcludedImage, FailedImage)) as outcome:
        read(file, dimension)
    assert outcome.value.message.startswith(f"demo/case ({file.name}): ")
    return str(outcome.value.reason)


def image(dtype: Any = np.int16, shape: tuple[int, ...] = (4, 5, 6)) -> Any:
    voxels = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    made = sitk.GetImageFromArray(voxels)
    if len(shape) == 3:
        made.SetSpacing((0.5, 0.75, 3.0))
        made.SetOrigin((10.0, -20.0, 30.0))
        angle = np.deg2rad(20)
        c, s = np.cos(angle), np.sin(angle)
        made.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
    return made


@pytest.mark.parametrize(
    "path",
    [
        "mha/prostatex_0000_adc.mha",
        "mha/elastix_3dct_lung.mha",
        "nrrd/pyradiomics_brain1.nrrd",
        "nrrd/stroke_flair_oblique.nrrd",
        "nrrd/pyradiomics_lung1_ct.nrrd",
    ],
)
def test_real_files_read_as_simpleitk_reads_them(shared: Path, path: str) -> None:
    file = shared / "data" / path
    expected = sitk.ReadImage(str(file))
    (volume,) = read(file)
    check_same(volume, expected)
    assert volume.source_hash == hashlib.sha256(file.read_bytes()).hexdigest()


def check_same(volume: Volume, expected: Any) -> None:
    np.testing.assert_array_equal(volume.voxels[0], sitk.GetArrayFromImage(expected))
    np.testing.assert_allclose(volume.spacing, expected.GetSpacing()[::-1])
    assert volume.affine is not None
    for kji in ((0, 0, 0), (3, 2, 1), (1, 4, 2)):
        lps = expected.TransformIndexToPhysicalPoint(kji[::-1])
        np.testing.assert_allclose(volume.affine @ (*kji, 1), (-lps[0], -lps[1], lps[2], 1), atol=1e-6)


@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd", "x.nhdr"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_all_forms(tmp_path: Path, name: str, compressed: bool, dtype: Any) -> None:
    made = image(dtype)
    sitk.WriteImage(made, str(tmp_path / name), compressed)
    (volume,) = read(tmp_path / name)
    check_same(volume, made)
    assert volume.voxels.dtype == dtype
    assert len(volume.source_hash) == 64


@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_unreadable(tmp_path: Path, name: str, compressed: bool) -> None:
    sitk.WriteImage(image(), str(tmp_path / name), compressed)
    data_file = next((file for file in tmp_path.iterdir() if file.suffix in (".raw", ".zraw")), tmp_path / name)
    data = data_file.read_bytes()
    data_file.write_bytes(data[:-20])
    assert reason(tmp_path / name) == "unreadable"
    if compressed:
        checksum = -1 if "mh" in name else -8  # last byte of Adler-32; first byte of CRC-32
        flipped = bytearray(data)
        flipped[checksum] ^= 1
        data_file.write_bytes(flipped)
        assert reason(tmp_path / name) == "unreadable"


def edited(file: Path, *changes: tuple[str, str]) -> Path:
    data = file.read_bytes()
    for old, new in changes:
        assert old.encode() in data
        data = data.replace(old.encode(), new.encode(), 1)
    file.write_bytes(data)
    return file


def test_metaimage_headers(tmp_path: Path) -> None:
    file = tmp_path / "x.mha"
    spacing = "ElementSpacing = 0.5 0.75 3\n"

    def fresh(*changes: tuple[str, str]) -> Path:
        sitk.WriteImage(image(), str(file))
        return edited(file, *changes)

    assert reason(fresh((spacing, ""))) == "spacing_missing"
    (flat,) = read(fresh((spacing, "ElementSize = 0.5 0.75 3\n")))
    assert flat.spacing == (3.0, 0.75, 0.5)
    assert reason(fresh(("0.75 3\n", "0 3\n"))) == "spacing_invalid"
    assert reason(fresh(("0.75 3\n", "nan 3\n"))) == "spacing_invalid"
    transform = next(line for line in fresh().read_bytes().split(b"\n") if line.startswith(b"TransformMatrix"))
    (volume,) = read(fresh((transform.decode() + "\n", "")))
    assert volume.affine is None
    assert reason(fresh(("DimSize = 6 5 4", "DimSize = 99999 99999 99999"))) == "too_large"


def test_nrrd_headers(tmp_path: Path) -> None:
    file = tmp_path / "x.nrrd"
    voxels = np.arange(120, dtype=np.uint8)

    def write(*lines: str) -> Path:
        head = ["NRRD0004", "type: uchar", "dimension: 3", "sizes: 6 5 4", "encoding: raw", *lines, "", ""]
        file.write_bytes("\n".join(head).encode() + voxels.tobytes())
        return file

    assert reason(write()) == "spacing_missing"
    assert reason(write("spacings: NaN NaN NaN")) == "spacing_missing"
    assert reason(write("spacings: 1 NaN 2")) == "spacing_missing"
    assert reason(write("spacings: 1 0 2")) == "spacing_invalid"
    (volume,) = read(write("spacings: 0.5 0.75 3"))
    assert volume.spacing == (3.0, 0.75, 0.5)
    assert volume.affine is None
    np.testing.assert_array_equal(volume.voxels[0], voxels.reshape(4, 5, 6))

    directions = "space directions: (0.5,0,0) (0,0.75,0) (0,0,3)"
    origin = "space origin: (1,2,3)"
    (ras,) = read(write("space: right-anterior-superior", directions, origin))
    assert ras.affine is not None
    np.testing.assert_allclose(ras.affine @ (0, 0, 0, 1), (1, 2, 3, 1))
    np.testing.assert_allclose(ras.affine @ (1, 1, 1, 1), (1.5, 2.75, 6, 1))
    (lps,) = read(write("space: left-posterior-superior", directions, origin))
    assert lps.affine is not None
    np.testing.assert_allclose(lps.affine @ (1, 1, 1, 1), (-1.5, -2.75, 6, 1))
    (las,) = read(write("space: LAS", directions, origin))
    assert las.affine is not None
    np.testing.assert_allclose(las.affine @ (1, 1, 1, 1), (-1.5, 2.75, 6, 1))
    (unknown,) = read(write("space: scanner-xyz", directions, origin))
    assert unknown.affine is None
    assert unknown.spacing == (3.0, 0.75, 0.5)


def test_several_volumes_in_a_file(tmp_path: Path) -> None:
    voxels = np.random.default_rng(1).integers(0, 100, (3, 4, 5, 6)).astype(np.int16)
    series = sitk.JoinSeries([sitk.GetImageFromArray(volume) for volume in voxels])
    vector = sitk.GetImageFromArray(np.moveaxis(voxels, 0, -1), isVector=True)
    files = {"time.mha": series, "time.nrrd": series, "vector.mha": vector, "vector.nrrd": vector}
    for name, made in files.items():
        sitk.WriteImage(made, str(tmp_path / name))
        volumes = read(tmp_path / name)
        assert [(volume.index, volume.count) for volume in volumes] == [(0, 3), (1, 3), (2, 3)]
        for volume, expected in zip(volumes, voxels, strict=True):
            np.testing.assert_array_equal(volume.voxels[0], expected)


def test_colours(tmp_path: Path) -> None:
    voxels = np.random.default_rng(1).integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=True), str(tmp_path / "x.mha"))
    assert reason(tmp_path / "x.mha") == "colour_volume"
    sitk.WriteImage(sitk.GetImageFromArray(voxels[0], isVector=True), str(tmp_path / "flat.mha"))
    (flat,) = read(tmp_path / "flat.mha", dimension=2)
    np.testing.assert_array_equal(flat.voxels[:, 0], voxels[0].transpose(2, 0, 1))


def test_layouts_that_make_no_image(tmp_path: Path) -> None:
    file = tmp_path / "x.mha"
    sitk.WriteImage(image(shape=(1, 5, 6)), str(file))
    assert reason(file) == "single_slice"
    (flat,) = read(file, dimension=2)
    assert flat.voxels.shape == (1, 1, 5, 6)
    np.testing.assert_array_equal(flat.spacing or (), (np.nan, 0.75, 0.5))
    sitk.WriteImage(image(), str(file))
    assert reason(file, dimension=2) == "unsupported_layout"
    complex_image = sitk.GetImageFromArray(np.ones((4, 5, 6), dtype=np.complex64))
    sitk.WriteImage(complex_image, str(tmp_path / "c.nrrd"))
    assert reason(tmp_path / "c.nrrd") == "unsupported_layout"
    (tmp_path / "text.mha").write_text("no image\n")
    assert reason(tmp_path / "text.mha") == "unreadable"
    assert reason(tmp_path / "gone.nrrd") == "vanished"


def test_voxels_outside_the_root_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    sitk.WriteImage(image(), str(root / "x.mhd"))
    (root / "x.raw").rename(tmp_path / "secret.raw")
    edited(root / "x.mhd", ("ElementDataFile = x.raw", "ElementDataFile = ../secret.raw"))
    assert reason(root / "x.mhd") == "outside_root"
    edited(root / "x.mhd", ("../secret.raw", "x%03d.raw 1 4 1"))
    assert reason(root / "x.mhd") == "unsupported_layout"
    (root / "link.mha").symlink_to(tmp_path / "secret.raw")
    assert reason(root / "link.mha") == "outside_root"


def test_voxels_outlive_the_image_they_came_from(tmp_path: Path) -> None:
    """A view of SimpleITK's memory would show what lies there after the image is gone."""
    made = image(shape=(40, 50, 60))
    sitk.WriteImage(made, str(tmp_path / "x.mha"))
    (volume,) = read(tmp_path / "x.mha")
    before = volume.voxels.copy()
    for value in range(1, 6):
        sitk.Image(60, 50, 40, sitk.sitkInt16) + value  # takes the freed memory, and fills it
    np.testing.assert_array_equal(volume.voxels, before)
    np.testing.assert_array_equal(volume.voxels[0], sitk.GetArrayFromImage(made))
