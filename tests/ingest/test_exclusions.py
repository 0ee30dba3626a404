"""Every reason why an image is not in the corpus, each with a file that is broken that way."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from isal import igzip
from PIL import Image
from pydicom.dataset import Dataset

import ingest.image
from catalog.corpus import Corpus
from catalog.query import load_catalog
from ingest.reasons import EXCLUSIONS, FAILURES, GEOMETRY_FLAGS
from tests.commands import command, published_files, run
from tests.demo import ingest_demo

SHAPE = (12, 11, 10)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE, dtype=np.int16)
DIM, DATATYPE, PIXDIM, UNITS, QFORM_CODE, SFORM_CODE = 40, 70, 76, 123, 252, 254  # offsets in a NIfTI-1 header


def nifti(path: Path, voxels: np.ndarray = VOXELS, affine: Any = None) -> Path:
    nib.Nifti1Image(voxels, np.diag([0.5, 0.5, 2.0, 1.0]) if affine is None else affine).to_filename(path)
    return path


def patch(path: Path, fields: dict[int, bytes]) -> None:
    data = bytearray(path.read_bytes())
    for offset, content in fields.items():
        data[offset : offset + len(content)] = content
    path.write_bytes(data)


def without_orientation(path: Path, *pixdim: float) -> None:
    codes = dict.fromkeys((QFORM_CODE, SFORM_CODE), struct.pack("<h", 0))
    patch(nifti(path), codes | {PIXDIM + 4: struct.pack("<3f", *pixdim)})


def sheared(path: Path, row: int, column: int, tangent: float) -> None:
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    affine[row, column] = tangent * affine[column, column]
    nifti(path, affine=affine)


Change = Callable[[list[Dataset]], Sequence[Dataset]]


def series(root: Path, samples: Path, change: Change, sample: str = "MRI/datalad/brain_T1") -> None:
    """A real series, its slices in order of position changed by `change`."""
    slices = [pydicom.dcmread(file) for file in sorted((samples / sample).iterdir())]
    normal = np.cross(*np.array(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3))
    slices.sort(key=lambda dataset: float(np.dot(dataset.ImagePositionPatient, normal)))
    folder = root / "series"
    folder.mkdir()
    for number, dataset in enumerate(change(slices)):
        dataset.save_as(folder / f"{number:03d}.dcm")


def shift_slice(slices: list[Dataset]) -> list[Dataset]:
    step = np.subtract(slices[6].ImagePositionPatient, slices[5].ImagePositionPatient)
    slices[5].ImagePositionPatient = list(np.add(slices[5].ImagePositionPatient, 0.4 * step).round(4))
    return slices


def turn_slice(slices: list[Dataset]) -> list[Dataset]:
    turned = np.roll(np.array(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3), 1, axis=1)
    slices[0].ImageOrientationPatient = list(turned.ravel())
    return slices


def shrink_slice(slices: list[Dataset]) -> list[Dataset]:
    """A localizer of another size that shares the UID of the series."""
    localizer = slices[0]
    pixels = localizer.pixel_array[::2, ::2]
    localizer.Rows, localizer.Columns = pixels.shape
    localizer.PixelData = np.ascontiguousarray(pixels).tobytes()
    return slices


def burned_in(slices: list[Dataset]) -> list[Dataset]:
    for dataset in slices:
        dataset.BurnedInAnnotation = "YES"
    return slices


def tilt(slices: list[Dataset]) -> list[Dataset]:
    along_rows = np.array(slices[0].ImageOrientationPatient[:3], dtype=float)
    first = np.array(slices[0].ImagePositionPatient, dtype=float)
    for dataset in slices:
        height = float(np.linalg.norm(np.array(dataset.ImagePositionPatient, dtype=float) - first))
        shifted = np.array(dataset.ImagePositionPatient, dtype=float) + height * along_rows
        dataset.ImagePositionPatient = list(shifted.round(4))
    return slices


def without_pixels(slices: list[Dataset]) -> list[Dataset]:
    for dataset in slices:
        del dataset.PixelData
    return slices


def colours(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 255, (*shape, 3), dtype=np.uint8)


def only_red(root: Path, _: Path) -> None:
    Image.fromarray(colours((30, 40)) * np.array([1, 0, 0], np.uint8)).save(root / "case.png")


def transparent(root: Path, _: Path) -> None:
    alpha = np.full((30, 40, 1), 255, np.uint8)
    alpha[:5] = 0
    Image.fromarray(np.concatenate([colours((30, 40)), alpha], axis=2)).save(root / "case.png")


def colour_volume(root: Path, _: Path) -> None:
    image = sitk.GetImageFromArray(colours((4, 5, 6)), isVector=True)
    image.SetSpacing((0.5, 0.5, 2.0))
    sitk.WriteImage(image, str(root / "case.mha"))


def pages(root: Path, _: Path) -> None:
    first, second = (Image.fromarray(colours((30, 40))) for _ in range(2))
    first.save(root / "case.tif", save_all=True, append_images=[second])


def not_a_number(root: Path, _: Path) -> None:
    voxels = VOXELS.astype(np.float32) / 7
    voxels[3, 3, 3] = np.nan
    nifti(root / "case.nii.gz", voxels)


def half(root: Path, samples: Path) -> None:
    data = (samples / "CT/totalsegmentator/chest.nii.gz").read_bytes()
    (root / "case.nii.gz").write_bytes(data[: len(data) // 2])


def link_outside(root: Path, samples: Path) -> None:
    outside = root.parent / "elsewhere.nii.gz"
    shutil.copy(samples / "CT/totalsegmentator/chest.nii.gz", outside)
    (root / "case.nii.gz").symlink_to(outside)


def huge_header(root: Path, _: Path) -> None:
    patch(nifti(root / "case.nii"), {DIM: struct.pack("<4h", 3, 32767, 32767, 32767)})


Writer = Callable[[Path, Path], object]
CASES: dict[str, tuple[str, Writer, str]] = {
    # code: key, what writes the file into (root, samples), what the message advises
    "declared": ("left_out", lambda root, _: nifti(root / "left_out.nii.gz"), "remove its line"),
    "spacing_missing": ("case", lambda root, _: without_orientation(root / "case.nii", 0, 0, 0), "header"),
    "spacing_invalid": (
        "case",
        lambda root, _: without_orientation(root / "case.nii", 0.5, np.nan, 2),
        "header",
    ),
    "in_plane_spacing": (
        "case",
        lambda root, _: nifti(root / "case.nii.gz", affine=np.diag([1, 1.5, 5, 1])),
        "set `depth_axis`",
    ),
    "uneven_slices": ("series", lambda root, samples: series(root, samples, shift_slice), "Download"),
    "missing_slices": (
        "series",
        lambda root, samples: series(root, samples, lambda slices: slices[:4] + slices[5:]),
        "1 slices are missing. Download",
    ),
    "duplicate_slices": (
        "series",
        lambda root, samples: series(root, samples, lambda slices: [*slices, slices[4]]),
        "Remove the copies",
    ),
    "mixed_orientation": ("series", lambda root, samples: series(root, samples, turn_slice), "localizer out"),
    "mixed_shapes": ("series", lambda root, samples: series(root, samples, shrink_slice), "localizer out"),
    "single_slice": (
        "series",
        lambda root, samples: series(root, samples, lambda slices: slices[:1]),
        "declare `dimension: 2`",
    ),
    "gantry_tilt": ("series", lambda root, samples: series(root, samples, tilt), "Resample"),
    "sheared_affine": ("case", lambda root, _: sheared(root / "case.nii.gz", 0, 1, 0.2), "Take the original"),
    "colour_volume": ("case", colour_volume, "Find the grey original"),
    "no_pixels": ("series", lambda root, samples: series(root, samples, without_pixels), "Compare its size"),
    "constant": ("case", lambda root, _: nifti(root / "case.nii.gz", np.zeros_like(VOXELS)), "Look at it"),
    "empty_crop": ("case", only_red, "Look at it"),
    "not_finite": ("case", not_a_number, "Take the original"),
    "burned_in_annotation": ("series", lambda root, samples: series(root, samples, burned_in), "Blacken it"),
    "transparent": ("case", transparent, "Compose it on a background"),
    "unsupported_layout": ("case", pages, "Store one image a file"),
    "unreadable": ("case", half, "download it again"),
    "vanished": ("case", lambda root, _: (root / "case.nii.gz").symlink_to("gone.nii.gz"), "Restore it"),
    "outside_root": ("case", link_outside, "Copy the file into it"),
    "not_a_file": ("case", lambda root, _: os.mkfifo(root / "case.nii.gz"), "Move it away"),
    "unusable_name": (r"ca\nse.nii.gz", lambda root, _: nifti(root / "ca\nse.nii.gz"), "Rename it"),
    "too_large": ("case", huge_header, "split or crop it"),
    "internal": ("fault", lambda root, _: nifti(root / "fault.nii.gz"), "Please report it"),
}
BY_COMMAND = {"no_permission", "worker_lost"}
"""Need a process of their own; see the tests at the end."""
BY_ENTRY = {"duplicate", "volume_count", "excluded_by_user"}
"""Need an entry that asks for it; see test_discover_rules.py and test_overrides.py."""


@pytest.fixture
def root(tmp_path: Path, samples: Path) -> Path:
    """The folder of a dataset with a good volume file of two volumes and a good picture."""
    folder = tmp_path / "raw" / "demo"
    folder.mkdir(parents=True)
    shutil.copy(samples / "MRI/nibabel/brain_fMRI.nii", folder / "good.nii")
    Image.fromarray(colours((50, 60))).save(folder / "neighbour.png")
    return folder


GOOD = {"good#0000", "good#0001", "neighbour"}


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program that one image meets."""
    reorder = ingest.image.reorder

    def faulty(voxels: Any, layout: Any) -> Any:
        if voxels.shape[1:] == SHAPE:
            raise IndexError("Doe^Jane")
        return reorder(voxels, layout)

    monkeypatch.setattr(ingest.image, "reorder", faulty)


def test_every_code_has_a_case() -> None:
    assert CASES.keys() | BY_COMMAND | BY_ENTRY == EXCLUSIONS.keys() | FAILURES.keys()


@pytest.mark.parametrize("code", CASES)
def test_a_file_broken_that_way_gets_a_row_and_stops_nothing(
    code: str, root: Path, tmp_path: Path, samples: Path, request: pytest.FixtureRequest
) -> None:
    if code == "internal":
        request.getfixturevalue("fault")
    key, write, advice = CASES[code]
    write(root, samples)
    report, rows = ingest_demo(root.parent, tmp_path / "data", request.getfixturevalue("monkeypatch"))

    row = rows[key]
    status = "excluded" if code in EXCLUSIONS else "failed"
    assert (row["status"], row["reason"]) == (status, code)
    assert f"demo/{key}" in row["message"]
    assert advice in row["message"]
    assert str(tmp_path) not in row["message"]
    assert "Doe" not in row["message"]
    assert row["shard_path"] is None
    assert set(row["geometry_flags"] or ()) <= GEOMETRY_FLAGS.keys()
    assert {other for other, good in rows.items() if good["status"] == "ingested"} == GOOD
    assert rows.keys() == GOOD | {key}
    assert report.run == report.total
    assert report.total[(status, code)] == 1
    assert report.messages == ([row["message"]] if status == "failed" else [])

    again, _ = ingest_demo(root.parent, tmp_path / "data", request.getfixturevalue("monkeypatch"))
    assert again.sources_skipped == (3 if status == "excluded" else 2)
    assert again.total == report.total


def test_an_unfit_volume_of_several_is_left_out_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = np.stack([VOXELS, np.zeros_like(VOXELS), VOXELS + 1], axis=-1)
    nifti(root / "case.nii.gz", voxels)
    _, rows = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    found = {key: rows[key]["reason"] for key in rows if key.startswith("case")}
    assert found == {"case#0000": None, "case#0001": "constant", "case#0002": None}


def cut(data: bytes) -> bytes:
    return data[: int(len(data) * 0.7)]


def flip_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("spoil", [cut, flip_checksum])
def test_a_file_that_breaks_off_between_its_volumes_fails_as_a_whole_until_it_is_mended(
    suffix: str, spoil: Callable[[bytes], bytes], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (suffix, spoil) == ("nii", flip_checksum):
        return  # there is none
    data = tmp_path / "data"
    file = nifti(root / f"case.{suffix}", np.stack([VOXELS, VOXELS // 2, VOXELS // 3], axis=-1))
    whole = file.read_bytes()
    volumes = {f"case#{index:04d}" for index in range(3)}

    file.write_bytes(spoil(whole))
    _, rows = ingest_demo(root.parent, data, monkeypatch)
    assert rows.keys() == GOOD | {"case"}
    assert (rows["case"]["status"], rows["case"]["reason"]) == ("failed", "unreadable")
    assert {path.name for path in (data / "shards" / "demo").iterdir()} == {
        Path(rows[key]["shard_path"]).name for key in GOOD
    }

    file.write_bytes(whole)
    _, rows = ingest_demo(root.parent, data, monkeypatch)
    assert rows.keys() == GOOD | volumes
    assert {row["status"] for row in rows.values()} == {"ingested"}
    _, fresh = ingest_demo(root.parent, tmp_path / "fresh", monkeypatch)
    assert fresh == rows
    assert published_files(data) == published_files(tmp_path / "fresh")

    file.write_bytes(spoil(whole))
    _, rows = ingest_demo(root.parent, data, monkeypatch)
    assert rows.keys() == GOOD | {"case"}


def test_a_picture_series_that_breaks_off_fails_as_a_whole(
    root: Path, tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "picture"
    shutil.copytree(samples / "US/pydicom-echo/heart", folder)
    (file,) = folder.iterdir()
    dataset = pydicom.dcmread(file)
    dataset.NumberOfFrames = int(dataset.NumberOfFrames) + 1  # one more than there are
    dataset.save_as(file)
    _, rows = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    assert rows.keys() == GOOD | {"picture"}
    assert rows["picture"]["reason"] == "unreadable"
    assert rows["neighbour"]["shard_shape"][0] == 1


def test_a_fault_while_a_shard_is_written_fails_its_images_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("shards.write.write_pack", faulty)
    report, rows = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    assert (rows["neighbour"]["status"], rows["neighbour"]["reason"]) == ("failed", "too_large")
    assert report.total[("ingested", "")] == 2


def test_voxels_beside_their_header_are_watched(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = sitk.GetImageFromArray(VOXELS)
    sitk.WriteImage(image, str(root / "case.mhd"))
    _, before = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    (root / "case.raw").write_bytes((VOXELS // 2).tobytes())
    report, after = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    assert report.sources_skipped == 2
    assert after["case"]["source_hash"] != before["case"]["source_hash"]


def test_an_older_slice_of_equal_size_is_noticed(
    root: Path, tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(root, samples, lambda slices: slices)
    ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    file = root / "series" / "004.dcm"
    dataset = pydicom.dcmread(file)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(file)
    os.utime(file, (1e9, 1e9))
    report, _ = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    assert report.sources_skipped == 2


# --- flags


def lookup_table(slices: list[Dataset]) -> list[Dataset]:
    table = Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table.ModalityLUTType = "US"
    table.add_new("LUTData", "OW", bytes(8))
    for dataset in slices:
        dataset.ModalityLUTSequence = [table]
    return slices


def radiograph(root: Path, samples: Path, **tags: Any) -> None:
    shutil.copytree(samples / "XR/pydicom-rg3/leg", root / "picture")
    (file,) = (root / "picture").iterdir()
    dataset = pydicom.dcmread(file)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file)


def in_metres(root: Path, _: Path) -> None:
    file = nifti(root / "case.nii", affine=np.diag([5e-4, 5e-4, 2e-3, 1]))
    patch(file, {UNITS: b"\x01"})


def turned_photograph(root: Path, _: Path) -> None:
    image = Image.fromarray(colours((30, 40)))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "case.jpg", exif=exif)


def negative_slope(root: Path, _: Path) -> None:
    image = nib.Nifti1Image(VOXELS, np.diag([0.5, 0.5, 2.0, 1.0]))
    image.header.set_slope_inter(-2.0, 5.0)
    image.to_filename(root / "case.nii.gz")


FLAGGED: dict[str, tuple[str, Writer]] = {
    "unit_converted": ("case", in_metres),
    "pixdim_disagrees": (
        "case",
        lambda root, _: patch(nifti(root / "case.nii"), {PIXDIM + 12: struct.pack("<f", 2.5)}),
    ),
    "gantry_tilt": (
        "series",
        lambda root, samples: series(root, samples, lambda slices: slices, "CT/dcm-qa-ct/head"),
    ),
    "orthonormalised": ("case", lambda root, _: sheared(root / "case.nii.gz", 0, 1, 5e-4)),
    "in_plane_anisotropic": (
        "case",
        lambda root, _: nifti(root / "case.nii.gz", affine=np.diag([1, 1.05, 5, 1])),
    ),
    "invalid_spacing_dropped": (
        "picture",
        lambda root, samples: radiograph(root, samples, PixelSpacing=[0, 0]),
    ),
    "modality_lut_ignored": ("series", lambda root, samples: series(root, samples, lookup_table)),
    "negative_slope": ("case", negative_slope),
    "inverted": ("picture", radiograph),
    "banner_possible": ("picture", lambda root, samples: radiograph(root, samples, Modality="US")),
    "equal_channels": (
        "case",
        lambda root, _: Image.fromarray(np.repeat(colours((30, 40))[..., :1], 3, axis=2)).save(
            root / "case.png"
        ),
    ),
    "exif_rotated": ("case", turned_photograph),
}


def test_every_flag_has_a_case() -> None:
    assert FLAGGED.keys() == GEOMETRY_FLAGS.keys()


@pytest.mark.parametrize("flag", FLAGGED)
def test_what_was_repaired_or_noticed_is_flagged(
    flag: str, root: Path, tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, write = FLAGGED[flag]
    write(root, samples)
    _, rows = ingest_demo(root.parent, tmp_path / "data", monkeypatch)
    assert rows[key]["status"] == "ingested", rows[key]["message"]
    assert flag in rows[key]["geometry_flags"]
    assert {name for row in rows.values() for name in row["geometry_flags"]} <= GEOMETRY_FLAGS.keys()


# --- with processes of their own


def test_no_permission(tmp_path: Path, samples: Path) -> None:
    folder = tmp_path / "raw" / "samples" / "XR"
    for name in ("ml-workgroup-0957ce54", "ml-workgroup-1479fa94"):
        shutil.copytree(samples / "XR" / name, folder / name)
    (folder / "ml-workgroup-0957ce54" / "chest.png").chmod(0)
    data = tmp_path / "data"
    result = run("pumit-data", "ingest", "sample", "--raw", tmp_path / "raw", "--data", data, unprivileged=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    rows = {row["key"]: row for row in load_catalog(Corpus(data), status=None).to_pylist()}
    bad, good = rows["ml-workgroup-0957ce54-chest"], rows["ml-workgroup-1479fa94-chest"]
    assert (bad["status"], bad["reason"]) == ("failed", "no_permission")
    assert "sample/ml-workgroup-0957ce54-chest" in bad["message"]
    assert "Check owner and mode" in bad["message"]
    assert good["status"] == "ingested"


@pytest.mark.slow
def test_images_that_exhaust_the_memory_are_lost_alone(tmp_path: Path, samples: Path) -> None:
    """A worker that dies takes neither the tasks that wait for it nor the other pictures of a pack along."""
    raw, data = tmp_path / "raw" / "samples", tmp_path / "data"
    for name in ("XR/ml-workgroup-0957ce54", "XR/ml-workgroup-1479fa94", "XR/ml-workgroup-88859dc1"):
        shutil.copytree(samples / name, raw / name)
    for name in ("MRI/nibabel", "CT/pyradiomics-lung1"):
        shutil.copytree(samples / name, raw / name)
    picture = raw / "XR" / "large" / "chest.png"
    picture.parent.mkdir()
    pixels = np.full((12000, 12000, 3), 9, np.uint8)
    # Not so small a file that it would be taken for a bomb.
    pixels[::50] = np.random.default_rng(0).integers(0, 256, pixels[::50].shape, np.uint8)
    Image.fromarray(pixels).save(picture, compress_level=1)
    volume = raw / "CT" / "huge" / "chest.nii.gz"
    volume.parent.mkdir()
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((700, 700, 900))
    header.set_sform(np.eye(4), code=1)
    with igzip.open(volume, "wb", compresslevel=0) as stream:
        stream.write(header.binaryblock + bytes(4))
        for _ in range(900):
            stream.write(bytes(2 * 700 * 700))

    limit = 640 << 20  # of resident memory: a worker's supervisor heeds it. Imports alone take 300.
    ingest_sample = command(
        "pumit-data", "ingest", "sample", "--raw", raw.parent, "--data", data, "--workers", "1"
    )
    result = subprocess.run(
        ["prlimit", f"--rss={limit}:{limit}", *ingest_sample], capture_output=True, text=True, check=False
    )
    rows = {row["key"]: row for row in load_catalog(Corpus(data), status=None).to_pylist()}
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lost = {key for key, row in rows.items() if row["reason"] == "worker_lost"}
    assert lost == {"huge-chest", "large-chest"}
    for key in lost:
        assert rows[key]["status"] == "failed"
        assert f"sample/{key}" in rows[key]["message"]
        assert "fewer --workers" in rows[key]["message"]
    assert {row["status"] for key, row in rows.items() if key not in lost} == {"ingested"}
