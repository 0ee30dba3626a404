"""The DICOM reader against pydicom and SimpleITK on real series, and on series made to be difficult."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ingest.readers import read_volumes
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume

SECRETS = ("Doe^Jane", "PATIENT-4711", "19610203", "1.2.826.0.99")


def source(path: Path, root: Path, dimension: int) -> ImageSource:
    return ImageSource(
        dataset="demo",
        key="case",
        subject="case",
        path=str(path.relative_to(root)),
        root=root,
        format="dicom",
        dimension=dimension,  # type: ignore[arg-type]
        modality="CT",
        upstream_modality="CT",
    )


def read_all(path: Path, root: Path | None = None, dimension: int = 3) -> list[Volume | ExcludedImage]:
    return list(read_volumes(source(path, root or path.parent, dimension)))


def read(path: Path, root: Path | None = None, dimension: int = 3) -> list[Volume]:
    volumes = read_all(path, root, dimension)
    assert all(isinstance(volume, Volume) for volume in volumes)
    return volumes  # type: ignore[return-value]


def reason(path: Path, dimension: int = 3) -> str:
    with pytest.raises((ExcludedImage, FailedImage)) as outcome:
        read_all(path, dimension=dimension)
    assert outcome.value.message.startswith(f"demo/case ({path.name})")
    assert not any(secret in outcome.value.message for secret in SECRETS)
    return str(outcome.value.reason)


# --- real series


@pytest.mark.parametrize(
    "folder",
    [
        "ct_chest_jpeg_lossless",
        "mr_t1_whole_head",
        "mr_prostate_t2_axial",
        "mr_t1_vestibular_schwannoma_3_slices",
    ],
)
def test_real_series_read_as_simpleitk_and_pydicom_read_them(shared: Path, folder: str) -> None:
    path = shared / "data" / "dicom" / folder
    (volume,) = read(path, root=shared / "data")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
    datasets = [pydicom.dcmread(name) for name in names]
    normal = np.cross(*np.array(datasets[0].ImageOrientationPatient, dtype=float).reshape(2, 3))
    datasets.sort(key=lambda dataset: float(np.dot(dataset.ImagePositionPatient, normal)))
    real = [sitk.GetArrayFromImage(sitk.ReadImage(str(dataset.filename)))[0] for dataset in datasets]
    np.testing.assert_array_equal(volume.voxels[0] * volume.slope + volume.intercept, real)
    assert volume.voxels.dtype == (np.int16 if datasets[0].PixelRepresentation else np.uint16)
    assert (volume.slope, volume.intercept) == (
        float(datasets[0].get("RescaleSlope", 1)),
        float(datasets[0].get("RescaleIntercept", 0)),
    )

    image = sitk.ReadImage(names)
    np.testing.assert_allclose(volume.spacing, image.GetSpacing()[::-1], rtol=1e-3)
    assert volume.affine is not None
    for k in (0, 1, len(datasets) - 1):
        x, y, z = datasets[k].ImagePositionPatient
        np.testing.assert_allclose(volume.affine @ (k, 0, 0, 1), (-x, -y, z, 1), atol=0.01)
    # One step along rows and columns goes where SimpleITK says.
    origin = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    step = np.array(image.TransformIndexToPhysicalPoint((7, 11, 0))) - origin
    np.testing.assert_allclose(volume.affine[:3, :3] @ (0, 11, 7), step * (-1, -1, 1), atol=1e-4)
    assert volume.slice_axis == 0
    assert (volume.index, volume.count, volume.flags) == (0, 1, ())
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir())
    assert volume.source_hash == hashlib.sha256("".join(digests).encode()).hexdigest()


def test_b_values_of_one_series_are_volumes_in_their_order(shared: Path) -> None:
    path = shared / "data" / "dicom" / "mr_prostate_dwi_3_bvalues"
    volumes = read(path, root=shared / "data")
    datasets = [pydicom.dcmread(file) for file in path.iterdir()]
    assert [(volume.index, volume.count) for volume in volumes] == [(0, 3), (1, 3), (2, 3)]
    for volume, b_value in zip(volumes, (b"50", b"400", b"800"), strict=True):
        slices = [d for d in datasets if d[0x0019, 0x100C].value.strip() == b_value]
        slices.sort(key=lambda d: float(d.ImagePositionPatient[2]))
        np.testing.assert_array_equal(volume.voxels[0], [d.pixel_array for d in slices])


def test_an_enhanced_multi_frame_file(shared: Path) -> None:
    (file,) = (shared / "data" / "dicom" / "mr_t1_enhanced_multiframe").iterdir()
    (volume,) = read(file, root=shared / "data")
    dataset = pydicom.dcmread(file)
    groups = dataset.PerFrameFunctionalGroupsSequence
    positions = [group.PlanePositionSequence[0].ImagePositionPatient for group in groups]
    orientation = groups[0].PlaneOrientationSequence[0].ImageOrientationPatient
    normal = np.cross(*np.array(orientation, dtype=float).reshape(2, 3))
    order = np.argsort(np.array(positions, dtype=float) @ normal)
    np.testing.assert_array_equal(volume.voxels[0], dataset.pixel_array[order])
    np.testing.assert_allclose(volume.spacing, (2, 2, 2))
    assert volume.affine is not None
    x, y, z = positions[order[0]]
    np.testing.assert_allclose(volume.affine[:3, 3], (-x, -y, z))


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("ct_head_gantry_tilt", "uneven_slices"), ("mr_abdomen_three_plane_localizer", "mixed_orientation")],
)
def test_real_series_that_are_no_volumes(shared: Path, folder: str, expected: str) -> None:
    assert reason(shared / "data" / "dicom" / folder) == expected


def test_a_tilted_gantry_keeps_the_distance_along_the_normal(shared: Path, tmp_path: Path) -> None:
    """The evenly spaced part of a tilted head scan."""
    folder = tmp_path / "series"
    folder.mkdir()
    files = sorted((shared / "data" / "dicom" / "ct_head_gantry_tilt").iterdir())
    headers = {file: pydicom.dcmread(file, stop_before_pixels=True) for file in files}
    normal = np.cross(*np.array(headers[files[0]].ImageOrientationPatient, dtype=float).reshape(2, 3))
    files.sort(key=lambda file: float(np.dot(headers[file].ImagePositionPatient, normal)))
    for file in files[-8:]:
        shutil.copy(file, folder)
    (volume,) = read(folder)
    assert volume.flags == ("gantry_tilt",)
    assert volume.padding_value == -1500
    assert volume.spacing is not None
    assert volume.affine is not None
    np.testing.assert_allclose(volume.spacing[1:], 0.4882812)
    axes = volume.affine[:3, :3] / volume.spacing
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)


def test_ultrasound_frames_are_colour_pictures(shared: Path) -> None:
    (file,) = (shared / "data" / "dicom" / "us_echo_multiframe_jpeg").iterdir()
    dataset = pydicom.dcmread(file)
    frames = iter(read_volumes(source(file, shared / "data", 2)))
    for index in range(3):
        volume = next(frames)
        assert isinstance(volume, Volume)
        assert (volume.index, volume.count, volume.spacing, volume.affine) == (index, 120, None, None)
        assert volume.voxels.shape == (3, 1, 480, 640)
        expected = pixel_array(dataset, index=index).transpose(2, 0, 1).astype(int)
        assert np.abs(volume.voxels[:, 0] - expected).max() <= 3  # decoders round JPEG differently


def test_a_radiograph_in_monochrome1_is_inverted(shared: Path) -> None:
    (file,) = (shared / "data" / "dicom" / "xray_single_jpeg2000").iterdir()
    (volume,) = read(file, dimension=2)
    np.testing.assert_array_equal(volume.voxels[0, 0], 1023 - pydicom.dcmread(file).pixel_array)
    assert volume.flags == ("inverted",)


# --- series made here

Change = Callable[[int, Dataset], None]
SHAPE = (6, 8, 10)
STORED = np.random.default_rng(0).integers(0, 4096, SHAPE, dtype=np.uint16)


def slice_dataset(k: int, z_mm: float | None = None) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SOPInstanceUID = f"1.2.826.0.99.1.{k + 1}"
    dataset.SeriesInstanceUID = "1.2.826.0.99.2"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = SECRETS[:3]
    dataset.SeriesNumber, dataset.InstanceNumber = 1, k + 1
    dataset.Rows, dataset.Columns = SHAPE[1:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-10.0, -20.0, 2.5 * k if z_mm is None else z_mm]
    dataset.PixelSpacing = [0.75, 0.5]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = STORED[k % SHAPE[0]].tobytes()
    return dataset


@pytest.fixture
def series(tmp_path: Path) -> Callable[..., Path]:
    """Write a series of slices, each changed by `change(k, dataset)`; names run against the slice order."""

    def write(*changes: Change, slices: Sequence[int] = range(SHAPE[0]), **tags: Any) -> Path:
        folder = tmp_path / "series"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, k in enumerate(slices):
            dataset = slice_dataset(k)
            for keyword, value in tags.items():
                setattr(dataset, keyword, value)
            for change in changes:
                change(number, dataset)
            save(dataset, folder / f"{len(slices) - number:03d}")
        return folder

    return write


def save(dataset: Dataset, file: Path) -> None:
    dataset.save_as(file, enforce_file_format=True)


def test_a_plain_series(series: Callable[..., Path]) -> None:
    (volume,) = read(series())
    np.testing.assert_array_equal(volume.voxels[0], STORED)
    assert volume.spacing == (2.5, 0.75, 0.5)
    assert (volume.slope, volume.intercept, volume.padding_value, volume.flags) == (1, -1024, None, ())
    assert volume.affine is not None
    np.testing.assert_allclose(volume.affine @ (1, 1, 1, 1), (9.5, 19.25, 2.5, 1))
    assert not any(secret in repr(volume) for secret in SECRETS)


def test_file_names_and_foreign_files_do_not_matter(series: Callable[..., Path]) -> None:
    folder = series()
    (expected,) = read(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"renamed{(number * 7) % 5}{number}")
    (folder / "readme.txt").write_text("a note\n" * 40)
    (folder / "table.csv").write_text("a,b\n1,2\n" * 100)
    (folder / "empty").touch()
    (folder / "._001.dcm").write_bytes(b"\0\5\26\7" + bytes(200))
    (folder / "below").mkdir()
    (volume,) = read(folder)
    np.testing.assert_array_equal(volume.voxels, expected.voxels)
    assert volume.source_hash == expected.source_hash


def test_files_without_preamble_are_dicom_too(series: Callable[..., Path]) -> None:
    folder = series()
    for file in sorted(folder.iterdir()):
        dataset = pydicom.dcmread(file)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(file, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read(folder)[0].voxels[0], STORED)


def test_odd_values_give_no_warning(series: Callable[..., Path], recwarn: pytest.WarningsRecorder) -> None:
    """Warnings may quote what they are about, and some come only when a value is looked at."""
    folder = series(lambda _, dataset: dataset.add_new(0x00190010, "LO", "SIEMENS_MR_HEADER"))
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"SIEMENS_MR", b"SIEMENS\x1bMR"))
    recwarn.clear()
    assert len(read(folder)) == 1
    assert not recwarn.list


def test_several_series_are_ordered_by_number_not_by_name(series: Callable[..., Path]) -> None:
    def second_series(number: int, dataset: Dataset) -> None:
        if number >= 6:
            dataset.SeriesInstanceUID, dataset.SeriesNumber = "1.2.826.0.99.0", 2

    volumes = read_all(series(second_series, slices=[*range(6), 3, 2, 1]))
    assert [volume.voxels.shape[1] for volume in volumes if isinstance(volume, Volume)] == [6, 3]

    first, outcome = read_all(series(second_series, slices=[*range(6), 3]))
    assert isinstance(first, Volume)
    assert (first.index, first.count) == (0, 2)
    assert isinstance(outcome, ExcludedImage)
    assert outcome.reason == "single_slice"
    assert "series 2 of 2" in outcome.message


def move(step: Callable[[int], tuple[float, float, float]]) -> Change:
    def change(number: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = list(step(number))

    return change


def only(number: int, **tags: Any) -> Change:
    def change(n: int, dataset: Dataset) -> None:
        if n == number:
            for keyword, value in tags.items():
                setattr(dataset, keyword, value)

    return change


def without(keyword: str) -> Change:
    return lambda _, dataset: delattr(dataset, keyword)


@pytest.mark.parametrize(
    ("changes", "slices", "expected"),
    [
        ([], [0], "single_slice"),
        ([], [0, 1, 2, 4, 5], "missing_slices"),
        ([], [0, 1, 2, 3, 3, 4, 5], "duplicate_slices"),
        ([], [*range(6), *range(6)], "duplicate_slices"),
        ([move(lambda k: (0, 0, 2.5 * k + (1.2 if k > 3 else 0)))], range(6), "uneven_slices"),
        ([move(lambda k: (0, 9 * (k == 2), 2.5 * k))], range(6), "uneven_slices"),
        ([move(lambda k: (0, 1.6 * k, 2.5 * k))], range(6), "gantry_tilt"),
        ([move(lambda k: (0, 0, 5))], range(6), "single_slice"),
        ([move(lambda k: (0, 0, float("nan")))], range(6), "spacing_invalid"),
        ([only(2, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])], range(6), "mixed_orientation"),
        ([only(2, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], Rows=4)], range(6), "mixed_orientation"),
        ([only(2, Rows=4)], range(6), "mixed_shapes"),
        ([only(2, PixelSpacing=[0.8, 0.5])], range(6), "mixed_shapes"),
        ([lambda _, d: setattr(d, "PixelSpacing", [0, 0.5])], range(6), "spacing_invalid"),
        (
            [lambda _, d: setattr(d, "ImageOrientationPatient", [1, 0, 0, 0.5, 0.8, 0])],
            range(6),
            "sheared_affine",
        ),
        ([without("PixelSpacing")], range(6), "spacing_missing"),
        ([without("ImagePositionPatient")], range(6), "spacing_missing"),
        ([without("PixelData")], range(6), "no_pixels"),
        ([only(2, RescaleSlope=0)], range(6), "constant"),
        ([lambda _, d: setattr(d, "SamplesPerPixel", 3)], range(6), "colour_volume"),
        ([only(2, PixelData=b"\0" * 100)], range(6), "unreadable"),
        (
            [lambda _, d: setattr(d, "Rows", 65535), lambda _, d: setattr(d, "Columns", 65535)],
            range(6),
            "too_large",
        ),
    ],
)
def test_series_that_make_no_volume(
    series: Callable[..., Path], changes: list[Change], slices: Sequence[int], expected: str
) -> None:
    assert reason(series(*changes, slices=slices)) == expected


def test_rounding_and_slight_tilt_are_allowed(series: Callable[..., Path]) -> None:
    (volume,) = read(series(move(lambda k: (0, 0.5 * k, 2.5 * k + 0.02 * (-1) ** k))))
    assert volume.flags == ("gantry_tilt",)
    assert volume.spacing is not None
    assert volume.spacing[0] == pytest.approx(2.5, abs=0.1)
    (volume,) = read(series(move(lambda k: (0, 0.01 * k, 2.5 * k))))
    assert volume.flags == ()


def repeated(label: Change) -> tuple[list[Change], list[int]]:
    """Three volumes of four slices, of which the files lie interleaved by position."""

    def apart(number: int, dataset: Dataset) -> None:
        dataset.SOPInstanceUID = f"1.2.826.0.99.3.{number}"
        dataset.InstanceNumber = 99 - number
        dataset.PixelData = np.full(SHAPE[1:], number % 3, dtype=np.uint16).tobytes()

    return [apart, label], [k for k in range(4) for _ in range(3)]


@pytest.mark.parametrize(
    "label",
    [
        lambda n, d: setattr(d, "TemporalPositionIdentifier", n % 3 + 1),
        lambda n, d: setattr(d, "TriggerTime", 40.0 * (n % 3)),
        lambda n, d: setattr(d, "AcquisitionTime", f"1200{n % 3:02d}"),
        lambda n, d: setattr(d, "DiffusionBValue", (0.0, 90.0, 800.0)[n % 3]),
        lambda n, d: d.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(
            0x39, "IS", [1000000000 + (0, 90, 800)[n % 3], 0]
        ),
        lambda n, d: setattr(d, "EchoTime", 10.0 + n % 3),
        # The clock runs on from slice to slice: at each position the order still counts.
        lambda n, d: setattr(d, "AcquisitionTime", f"12{n % 3:02d}{n // 3:02d}"),
    ],
)
def test_repeated_positions_are_volumes_in_order_of_their_label(
    series: Callable[..., Path], label: Change
) -> None:
    changes, slices = repeated(label)
    volumes = read(series(*changes, slices=slices))
    assert [int(volume.voxels.max()) for volume in volumes] == [0, 1, 2]
    assert [int(volume.voxels.min()) for volume in volumes] == [0, 1, 2]
    assert [volume.index for volume in volumes] == [0, 1, 2]


def test_without_label_instance_numbers_decide(series: Callable[..., Path]) -> None:
    changes, slices = repeated(lambda n, d: None)
    assert [int(volume.voxels.max()) for volume in read(series(*changes, slices=slices))] == [2, 1, 0]


def test_rescale_that_differs_per_slice_is_applied(series: Callable[..., Path]) -> None:
    def rescale(number: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + number / 4, 10 * number
        dataset.PixelPaddingValue = int(STORED[0, 0, 0])

    (volume,) = read(series(rescale))
    k = np.arange(6)[:, None, None]
    expected = STORED * (1 + k / 4) + 10.0 * k
    expected[STORED[0, 0, 0] == STORED] = expected[STORED[0, 0, 0] != STORED].min()
    assert volume.voxels.dtype == np.float32
    np.testing.assert_allclose(volume.voxels[0], expected, rtol=1e-6)
    assert (volume.slope, volume.intercept, volume.padding_value) == (1, 0, None)


def test_bits_and_signs(series: Callable[..., Path]) -> None:
    def signed(_: int, dataset: Dataset) -> None:
        """12 bits in the upper part of each word, overlay bits below."""
        values = np.frombuffer(dataset.PixelData, np.uint16)
        dataset.PixelRepresentation, dataset.HighBit = 1, 15
        dataset.PixelData = (values << 4 | 5).astype("<u2").tobytes()

    (volume,) = read(series(signed))
    assert volume.voxels.dtype == np.int16
    values = STORED.astype(int)
    np.testing.assert_array_equal(volume.voxels[0], np.where(values < 2048, values, values - 4096))

    def overlaid(_: int, dataset: Dataset) -> None:
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.uint16) | 0x7000).tobytes()

    np.testing.assert_array_equal(read(series(overlaid))[0].voxels[0], STORED)


def test_padding_written_without_its_sign(series: Callable[..., Path]) -> None:
    def change(_: int, dataset: Dataset) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
        dataset.add_new(0x00280120, "US", 63536)

    (volume,) = read(series(change))
    assert volume.padding_value == -2000


def test_float_pixels(series: Callable[..., Path]) -> None:
    def change(number: int, dataset: Dataset) -> None:
        del dataset.PixelData
        dataset.BitsAllocated = 32
        dataset.FloatPixelData = (STORED[number] / np.float32(7)).tobytes()

    (volume,) = read(series(change))
    np.testing.assert_array_equal(volume.voxels[0], STORED / np.float32(7))


def compress(syntax: str, encode: Callable[[np.ndarray], bytes]) -> Change:
    def change(number: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([encode(STORED[number])])
        dataset["PixelData"].is_undefined_length = True

    return change


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        ("1.2.840.10008.1.2.4.70", lambda a: imagecodecs.ljpeg_encode(a, bitspersample=12)),
        ("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode),
        (
            "1.2.840.10008.1.2.4.90",
            lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k", reversible=True),
        ),
    ],
)
def test_lossless_transfer_syntaxes(series: Callable[..., Path], syntax: str, encode: Any) -> None:
    folder = series(compress(syntax, encode))
    np.testing.assert_array_equal(read(folder)[0].voxels[0], STORED)
    broken = sorted(folder.iterdir())[2]
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) * 3 // 4])
    assert reason(folder) == "unreadable"


def test_run_length_deflated_and_big_endian(series: Callable[..., Path]) -> None:
    folder = series()
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.compress(pydicom.uid.RLELossless)
        save(dataset, file)
    np.testing.assert_array_equal(read(folder)[0].voxels[0], STORED)
    folder = series(lambda _, d: setattr(d.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.1.99"))
    np.testing.assert_array_equal(read(folder)[0].voxels[0], STORED)

    def swap(number: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        dataset.PixelData = STORED[number].astype(">u2").tobytes()

    (volume,) = read(series(swap))
    np.testing.assert_array_equal(volume.voxels[0], STORED)
    assert volume.voxels.dtype.isnative
    folder = series(lambda _, d: setattr(d.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))
    np.testing.assert_array_equal(read(folder)[0].voxels[0], STORED)


def test_enhanced_frames_with_volumes_and_scales_of_their_own(tmp_path: Path) -> None:
    """Two times of three slices, frames in the order of slices, geometry in functional groups."""

    def group(**tags: Any) -> Items:
        item = Dataset()
        for keyword, value in tags.items():
            setattr(item, keyword, value)
        return Items([item])

    dataset = slice_dataset(0)
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "RescaleSlope"):
        delattr(dataset, keyword)
    dataset.NumberOfFrames = 6
    dataset.PixelData = STORED.tobytes()
    dataset.SharedFunctionalGroupsSequence = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=group(PixelSpacing=[0.75, 0.5]),
        PixelValueTransformationSequence=group(RescaleSlope=2, RescaleIntercept=-7),
    )
    dataset.PerFrameFunctionalGroupsSequence = Items(
        group(
            PlanePositionSequence=group(ImagePositionPatient=[0, 0, -3.0 * (frame // 2)]),
            FrameContentSequence=group(TemporalPositionIndex=2 - frame % 2),
        )[0]
        for frame in range(6)
    )
    save(dataset, tmp_path / "x.dcm")
    first, second = read(tmp_path / "x.dcm")
    np.testing.assert_array_equal(first.voxels[0], STORED[[5, 3, 1]])
    np.testing.assert_array_equal(second.voxels[0], STORED[[4, 2, 0]])
    assert (first.slope, first.intercept, first.spacing) == (2, -7, (3.0, 0.75, 0.5))
    assert first.affine is not None
    np.testing.assert_allclose(first.affine[:3, 3], (0, 0, -6))


def picture(tmp_path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    dataset = slice_dataset(0)
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = pixels.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PlanarConfiguration = 0
    dataset.PixelData = pixels.tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    save(dataset, tmp_path / "x.dcm")
    return tmp_path / "x.dcm"


def test_pictures(tmp_path: Path) -> None:
    grey = STORED[0].astype(np.uint8)
    (volume,) = read(picture(tmp_path, grey), dimension=2)
    np.testing.assert_array_equal(volume.voxels[0, 0], grey)
    np.testing.assert_array_equal(volume.spacing or (), (np.nan, 0.75, 0.5))
    assert volume.dimension == 2

    signed = STORED[0].astype(np.int16) - 2000
    inverted = picture(
        tmp_path,
        signed,
        PhotometricInterpretation="MONOCHROME1",
        PixelRepresentation=1,
        PixelPaddingValue=-2000,
    )
    (volume,) = read(inverted, dimension=2)
    np.testing.assert_array_equal(volume.voxels[0, 0], -1 - signed)
    assert (volume.padding_value, volume.flags) == (1999, ("inverted",))

    colour = np.random.default_rng(3).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    (volume,) = read(picture(tmp_path, colour, PhotometricInterpretation="RGB"), dimension=2)
    np.testing.assert_array_equal(volume.voxels[:, 0], colour.transpose(2, 0, 1))
    planar = np.ascontiguousarray(colour.transpose(2, 0, 1)).tobytes()
    file = picture(tmp_path, colour, PhotometricInterpretation="RGB", PlanarConfiguration=1, PixelData=planar)
    np.testing.assert_array_equal(read(file, dimension=2)[0].voxels[:, 0], colour.transpose(2, 0, 1))

    equal = np.repeat(grey[..., np.newaxis], 3, axis=2)
    (volume,) = read(picture(tmp_path, equal, PhotometricInterpretation="RGB"), dimension=2)
    assert volume.voxels.shape == (1, 1, 8, 10)
    assert volume.flags == ("equal_channels",)

    bare = picture(tmp_path, grey, PixelSpacing=None, ImagerPixelSpacing=[0.1, 0.1])
    assert read(bare, dimension=2)[0].spacing is None


def test_pictures_of_a_folder_in_order(series: Callable[..., Path]) -> None:
    def strip(number: int, dataset: Dataset) -> None:
        if number == 1:
            del dataset.PixelData

    outcomes = read_all(series(strip, slices=[0, 1, 2]), dimension=2)
    assert isinstance(outcomes[1], ExcludedImage)
    assert outcomes[1].reason == "no_pixels"
    for index in (0, 2):
        volume = outcomes[index]
        assert isinstance(volume, Volume)
        assert (volume.index, volume.count) == (index, 3)
        np.testing.assert_array_equal(volume.voxels[0, 0], STORED[index])


def test_palette_colours(tmp_path: Path) -> None:
    index = np.arange(80, dtype=np.uint8).reshape(8, 10)
    tags: dict[str, Any] = {}
    for number, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        tags[f"{name}PaletteColorLookupTableData"] = np.roll(np.arange(256), number).astype(np.uint8).tobytes()
    (volume,) = read(picture(tmp_path, index, PhotometricInterpretation="PALETTE COLOR", **tags), dimension=2)
    np.testing.assert_array_equal(volume.voxels[:, 0], [(index.astype(int) - n) % 256 for n in range(3)])


def test_files_that_cannot_be_read(series: Callable[..., Path], tmp_path: Path) -> None:
    folder = series()
    (folder / "cut.dcm").touch()
    assert reason(folder) == "unreadable"

    folder = series()
    (folder / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "gone").write_bytes(b"secret")
    assert len(read(folder, root=tmp_path)) == 1
    with pytest.raises(FailedImage) as outcome:
        read_all(folder, root=folder)
    assert outcome.value.reason == "outside_root"
    (tmp_path / "gone").unlink()
    assert reason(folder) == "vanished"

    empty = tmp_path / "empty"
    empty.mkdir()
    assert reason(empty) == "no_pixels"
    assert reason(tmp_path / "nowhere") == "vanished"
