"""The picture reader against Pillow on real files, and on every kind of pixel."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ingest.readers import read_volumes
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume


def read(file: Path, dimension: int = 2) -> Volume:
    source = ImageSource(
        dataset="demo",
        key="case",
        subject="case",
        path=file.name,
        root=file.parent,
        format="raster",
        dimension=dimension,  # type: ignore[arg-type]
        modality="XR",
        upstream_modality="XR",
    )
    (volume,) = read_volumes(source)
    assert isinstance(volume, Volume)
    assert volume.dimension == 2
    assert volume.spacing is None
    assert volume.affine is None
    return volume


def reason(file: Path, dimension: int = 2) -> str:
    with pytest.raises((ExcludedImage, FailedImage)) as outcome:
        read(file, dimension)
    assert outcome.value.message.startswith(f"demo/case ({file.name}): ")
    return str(outcome.value.reason)


REAL = {
    "xray/chest_ml_88859dc1.png": 1,
    "xray/chest_pneumocystis_1.jpg": 1,
    "xray/chest_ards_rgb.png": 3,
    "xray/tbx11k_h0001_rgb.png": 1,
    "xray/figure1_covid_00001_rgb.jpg": 1,
    "ultrasound/busi_benign_10.png": 1,
    "ultrasound/hc18_test_000.png": 1,
    "fundus/drive_21_training.tif": 3,
    "fundus/drive_22_training.png": 3,
    "fundus/chasedb1_01L.jpg": 3,
}


@pytest.mark.parametrize(("path", "channels"), REAL.items())
def test_real_pictures_read_as_pillow_reads_them(shared: Path, path: str, channels: int) -> None:
    file = shared / "data" / path
    volume = read(file)
    expected = np.asarray(Image.open(file))
    assert volume.voxels.shape == (channels, 1, *expected.shape[:2])
    assert volume.voxels.dtype == np.uint8
    assert volume.source_hash == hashlib.sha256(file.read_bytes()).hexdigest()
    if expected.ndim == 2:
        np.testing.assert_array_equal(volume.voxels[0, 0], expected)
        assert volume.flags == ()
    else:
        np.testing.assert_array_equal(volume.voxels[:, 0], expected.transpose(2, 0, 1)[:channels])
        assert volume.flags == (("equal_channels",) if channels == 1 else ())


@pytest.fixture
def colour() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "TIF"])
def test_upper_case_names(tmp_path: Path, colour: np.ndarray, suffix: str) -> None:
    Image.fromarray(colour).save(tmp_path / f"A.{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"A.{suffix}").voxels[:, 0], colour.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    grey = np.random.default_rng(1).integers(0, 65536, (7, 9), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
    volume = read(tmp_path / f"grey.{suffix}")
    assert volume.voxels.dtype == np.uint16
    np.testing.assert_array_equal(volume.voxels[0, 0], grey)

    deep = np.random.default_rng(2).integers(0, 65536, (7, 9, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"deep.{suffix}"), deep[..., ::-1])
    volume = read(tmp_path / f"deep.{suffix}")
    assert volume.voxels.dtype == np.uint16
    np.testing.assert_array_equal(volume.voxels[:, 0], deep.transpose(2, 0, 1))


def test_float_tiff(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 63, dtype=np.float32).reshape(7, 9)
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read(tmp_path / "x.tif").voxels[0, 0], values)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_only_opaque_alpha_is_dropped(tmp_path: Path, colour: np.ndarray, mode: str) -> None:
    image = Image.fromarray(colour).convert(mode)
    image.save(tmp_path / "opaque.png")
    expected = np.atleast_3d(np.asarray(image.convert(mode[:-1])))
    np.testing.assert_array_equal(read(tmp_path / "opaque.png").voxels[:, 0], expected.transpose(2, 0, 1))
    image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 254))  # type: ignore[index]
    image.save(tmp_path / "transparent.png")
    assert reason(tmp_path / "transparent.png") == "transparent"


def test_deep_transparency(tmp_path: Path) -> None:
    deep = np.full((4, 4, 4), 65535, dtype=np.uint16)
    deep[..., 0] = 7
    cv2.imwrite(str(tmp_path / "opaque.png"), deep)
    assert read(tmp_path / "opaque.png").voxels[:, 0, 0, 0].tolist() == [65535, 65535, 7]
    deep[0, 0, 3] = 65534
    cv2.imwrite(str(tmp_path / "clear.png"), deep)
    assert reason(tmp_path / "clear.png") == "transparent"


def test_a_transparent_colour_counts_only_where_it_occurs(tmp_path: Path) -> None:
    grey = np.arange(63, dtype=np.uint8).reshape(7, 9)
    Image.fromarray(grey).save(tmp_path / "unused.png", transparency=200)
    np.testing.assert_array_equal(read(tmp_path / "unused.png").voxels[0, 0], grey)
    Image.fromarray(grey).save(tmp_path / "used.png", transparency=5)
    assert reason(tmp_path / "used.png") == "transparent"


def test_palette_and_one_bit(tmp_path: Path, colour: np.ndarray) -> None:
    palette = Image.fromarray(colour).convert("P")
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(
        read(tmp_path / "p.png").voxels[:, 0], np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    bits = np.eye(8, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "b.png").voxels[0, 0], bits * np.uint8(255))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    picture = np.zeros((16, 24), dtype=np.uint8)
    picture[:4, :8] = 200  # one marked corner, and unequal sides, tell all eight cases apart
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(picture).save(file, exif=exif)
    moves: dict[int, Any] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }
    expected = moves[orientation](picture)
    voxels = read(file).voxels[0, 0]
    assert voxels.shape == expected.shape
    assert np.abs(voxels.astype(int) - expected).max() < 20  # JPEG is lossy


def test_what_makes_no_image(tmp_path: Path, colour: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.png"
    Image.fromarray(colour).save(file)
    assert reason(file, dimension=3) == "single_slice"

    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:-30])
    assert reason(tmp_path / "cut.png") == "unreadable"
    (tmp_path / "text.jpg").write_text("no picture")
    assert reason(tmp_path / "text.jpg") == "unreadable"
    assert reason(tmp_path / "gone.png") == "vanished"

    page = Image.fromarray(colour)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    assert reason(tmp_path / "pages.tif") == "unsupported_layout"
    page.convert("CMYK").save(tmp_path / "print.jpg")
    assert reason(tmp_path / "print.jpg") == "unsupported_layout"

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert reason(file) == "too_large"


def test_links_out_of_the_root_are_refused(tmp_path: Path, colour: np.ndarray) -> None:
    Image.fromarray(colour).save(tmp_path / "secret.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x.png").symlink_to(tmp_path / "secret.png")
    assert reason(tmp_path / "root" / "x.png") == "outside_root"
