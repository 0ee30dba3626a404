"""Small sound files in every format and coding that the readers know: what hostile files are made from."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ingest.source import Format

AFFINE = np.diag([0.5, 0.5, 2.0, 1.0])


@dataclass(frozen=True)
class Seed:
    """One image as the files of a folder."""

    name: str
    format: Format
    dimension: int
    files: dict[str, bytes]
    path: str
    """The file, or `.` for the folder of a series."""


def numbers(*shape: int, dtype: Any = np.int16) -> np.ndarray:
    """Voxels that no rule excludes, the same ones each time."""
    return np.random.default_rng(0).integers(1, 250, shape).astype(dtype)


def nifti(voxels: np.ndarray, version: int = 1, **fields: Any) -> bytes:
    """Bytes of an uncompressed NIfTI file; `fields` are written into its header unchecked."""
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(voxels, AFFINE)
    data = image.to_bytes()
    header = type(image.header)(data[: image.header.sizeof_hdr], check=False)
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock + data[image.header.sizeof_hdr :])


def slice_of(
    number: int, pixels: np.ndarray | None, syntax: str = ExplicitVRLittleEndian, **tags: Any
) -> Dataset:
    """A DICOM slice of a CT series at 2 mm steps, with the tags given added, changed or, if None, left out."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"1.2.3.{number + 1}"
    dataset.SeriesInstanceUID = "1.2.3"
    dataset.Modality = "CT"
    dataset.SeriesNumber, dataset.InstanceNumber = 1, number + 1
    dataset.ImagePositionPatient = [0, 0, 2 * number]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.5, 0.5]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    if pixels is not None:
        frames = pixels if pixels.ndim > 2 and pixels.shape[-1] != 3 else pixels[np.newaxis]
        bits = 8 * pixels.dtype.itemsize
        dataset.Rows, dataset.Columns = frames.shape[1:3]
        dataset.SamplesPerPixel = 3 if frames.ndim == 4 else 1
        dataset.PhotometricInterpretation = "RGB" if frames.ndim == 4 else "MONOCHROME2"
        if frames.ndim == 4:
            dataset.PlanarConfiguration = 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        if len(frames) > 1:
            dataset.NumberOfFrames = len(frames)
        dataset.PixelData = _pixel_data(frames, syntax)
        dataset["PixelData"].VR = "OB" if syntax in _ENCODERS else "OW"
    for keyword, value in tags.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def dicom(dataset: Dataset) -> bytes:
    """The file of a data set, without any check of its values."""
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _pixel_data(frames: np.ndarray, syntax: str) -> bytes:
    if syntax in _ENCODERS:
        return bytes(encapsulate([_ENCODERS[syntax](frame) for frame in frames]))
    data: bytes = frames.astype(
        frames.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
    ).tobytes()
    return data + b"\0" * (len(data) % 2)


def _run_lengths(frame: np.ndarray) -> bytes:
    """PackBits without runs: one segment a byte of a pixel, the most significant first."""
    segments = []
    for byte in reversed(range(frame.dtype.itemsize)):
        plane = (frame >> (8 * byte) & 0xFF).astype(np.uint8).tobytes()
        parts = [plane[start : start + 128] for start in range(0, len(plane), 128)]
        segment = b"".join(bytes([len(part) - 1]) + part for part in parts)
        segments.append(segment + b"\0" * (len(segment) % 2))
    starts = np.cumsum([64, *map(len, segments[:-1])])
    header = np.array([len(segments), *starts, *[0] * (15 - len(segments))], dtype="<u4")
    return header.tobytes() + b"".join(segments)


_ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    RLELossless: _run_lengths,
    JPEGBaseline8Bit: imagecodecs.jpeg8_encode,
    JPEGLosslessSV1: lambda frame: imagecodecs.jpeg8_encode(frame, lossless=True, predictor=1),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEG2000Lossless: lambda frame: imagecodecs.jpeg2k_encode(
        frame, level=0, reversible=True, codecformat="j2k"
    ),
}


def picture(pixels: np.ndarray, kind: str, mode: str | None = None, **options: Any) -> bytes:
    """A PNG, JPEG, BMP, TIFF or GIF of (H, W) or (H, W, 3)."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def itk(voxels: np.ndarray, name: str, compress: bool = False, colour: bool = False) -> dict[str, bytes]:
    """The file, or files, that SimpleITK writes under a name."""
    image = sitk.GetImageFromArray(voxels, isVector=colour)
    image.SetSpacing([0.5, 0.5, 2.0, 1.0][: image.GetDimension()])
    with TemporaryDirectory() as folder:
        sitk.WriteImage(image, str(Path(folder, name)), compress)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def seeds() -> list[Seed]:
    """All of them, in a fixed order."""
    return [*_nifti_seeds(), *_itk_seeds(), *_dicom_seeds(), *_picture_seeds()]


def _nifti_seeds() -> Iterator[Seed]:
    from isal import igzip

    def seed(name: str, data: bytes, dimension: int = 3, *, compress: bool = False) -> Seed:
        file = "case.nii.gz" if compress else "case.nii"
        content = igzip.compress(data, 1) if compress else data
        return Seed(f"nifti-{name}", "nifti", dimension, {file: content}, file)

    yield seed("int16", nifti(numbers(8, 7, 6)))
    yield seed("float32", nifti(numbers(8, 7, 6, dtype=np.float32) / 7))
    yield seed("float64-scaled", nifti(numbers(8, 7, 6, dtype=np.float64), scl_slope=-2.0, scl_inter=3.0))
    yield seed("4d", nifti(numbers(5, 6, 4, 3, dtype=np.uint8)))
    yield seed("qform", nifti(numbers(8, 7, 6), sform_code=0, qform_code=1))
    yield seed("plain", nifti(numbers(8, 7, 6), sform_code=0, qform_code=0))
    yield seed("version-2", nifti(numbers(8, 7, 6, dtype=np.int32), version=2))
    yield seed("big-endian", _big_endian_nifti())
    yield seed("gz", nifti(numbers(8, 7, 6)), compress=True)
    yield seed("4d-gz", nifti(numbers(5, 6, 4, 3)), compress=True)
    yield seed("2d", nifti(numbers(20, 30, 1, dtype=np.uint8)), 2)


def _big_endian_nifti() -> bytes:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    return bytes(nib.Nifti1Image(numbers(8, 7, 6), AFFINE, header).to_bytes())


def _itk_seeds() -> Iterator[Seed]:
    def seed(name: str, files: dict[str, bytes], dimension: int = 3) -> Seed:
        header = next(file for file in files if not file.endswith("raw") and not file.endswith("raw.gz"))
        return Seed(f"itk-{name}", "itk", dimension, files, header)

    voxels = numbers(6, 7, 8)
    yield seed("mha", itk(voxels, "case.mha"))
    yield seed("mha-zlib", itk(voxels, "case.mha", compress=True))
    yield seed("mhd", itk(voxels, "case.mhd"))
    yield seed("mhd-zlib", itk(voxels, "case.mhd", compress=True))
    yield seed("mha-4d", itk(numbers(3, 4, 5, 6, dtype=np.float32), "case.mha"))
    yield seed("mha-colour", itk(numbers(1, 20, 30, 3, dtype=np.uint8)[0], "case.mha", colour=True), 2)
    yield seed("nrrd", itk(voxels, "case.nrrd"))
    yield seed("nrrd-gzip", itk(voxels, "case.nrrd", compress=True))
    yield seed("nhdr", itk(voxels, "case.nhdr"))


def _dicom_seeds() -> Iterator[Seed]:
    def series(name: str, *datasets: Dataset) -> Seed:
        files = {f"{number}.dcm": dicom(dataset) for number, dataset in enumerate(datasets)}
        return Seed(f"dicom-{name}", "dicom", 3, files, ".")

    def single(name: str, dataset: Dataset) -> Seed:
        return Seed(f"dicom-{name}", "dicom", 2, {"case.dcm": dicom(dataset)}, ".")

    stack = numbers(3, 10, 12, dtype=np.uint16)
    for name, syntax in (
        ("explicit", ExplicitVRLittleEndian),
        ("implicit", ImplicitVRLittleEndian),
        ("big-endian", ExplicitVRBigEndian),
        ("deflated", DeflatedExplicitVRLittleEndian),
        ("rle", RLELossless),
        ("jpeg-lossless", JPEGLosslessSV1),
        ("jpeg-ls", JPEGLSLossless),
        ("jpeg-2000", JPEG2000Lossless),
    ):
        yield series(name, *(slice_of(number, pixels, syntax) for number, pixels in enumerate(stack)))
    yield series(
        "signed", *(slice_of(n, p.astype(np.int16), BitsStored=12, HighBit=11) for n, p in enumerate(stack))
    )
    yield series("enhanced", _enhanced(stack))
    colour = numbers(16, 20, 3, dtype=np.uint8)
    yield single("picture-jpeg", slice_of(0, colour, JPEGBaseline8Bit))
    yield single("picture-jpeg-2000", slice_of(0, colour, JPEG2000Lossless))
    yield single("picture-colour", slice_of(0, colour))
    yield single("picture-frames", slice_of(0, numbers(4, 16, 20, dtype=np.uint8)))
    palette = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")}
    palette |= {f"{c}PaletteColorLookupTableData": bytes(range(256)) * 2 for c in ("Red", "Green", "Blue")}
    grey = numbers(16, 20, dtype=np.uint8)
    yield single("picture-palette", slice_of(0, grey, PhotometricInterpretation="PALETTE COLOR", **palette))
    yield single(
        "picture-inverted", slice_of(0, grey, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=3)
    )


def _enhanced(stack: np.ndarray) -> Dataset:
    """One multi-frame object with functional groups."""

    def item(**values: Any) -> Dataset:
        dataset = Dataset()
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        return dataset

    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.5])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=0)],
    )
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2 * number])],
            FrameContentSequence=[item(TemporalPositionIndex=1, DimensionIndexValues=[1, number + 1])],
        )
        for number in range(len(stack))
    ]
    return slice_of(
        0,
        stack,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
        DimensionIndexSequence=[
            item(DimensionIndexPointer=0x00209056),
            item(DimensionIndexPointer=0x00209057),
        ],
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        PixelSpacing=None,
    )


def _picture_seeds() -> Iterator[Seed]:
    def seed(name: str, suffix: str, data: bytes) -> Seed:
        return Seed(f"picture-{name}", "raster", 2, {f"case.{suffix}": data}, f"case.{suffix}")

    colour, grey = numbers(24, 30, 3, dtype=np.uint8), numbers(24, 30, dtype=np.uint8)
    deep = numbers(24, 30, 3, dtype=np.uint16) * 100
    exif = Image.Exif()
    exif[0x0112] = 6
    yield seed("png-grey", "png", picture(grey, "PNG"))
    yield seed("png-colour", "png", picture(colour, "PNG"))
    yield seed("png-palette", "png", picture(colour, "PNG", "P"))
    yield seed("png-alpha", "png", picture(colour, "PNG", "RGBA"))
    yield seed("png-1-bit", "png", picture(grey, "PNG", "1"))
    yield seed("png-16-bit", "png", picture(deep[..., 0], "PNG"))
    yield seed("png-deep-colour", "png", imagecodecs.png_encode(deep))
    yield seed("jpeg-colour", "jpg", picture(colour, "JPEG", exif=exif.tobytes()))
    yield seed("jpeg-progressive", "jpg", picture(grey, "JPEG", progressive=True))
    yield seed("bmp", "bmp", picture(colour, "BMP"))
    yield seed("bmp-palette", "bmp", picture(grey, "BMP"))
    yield seed("tiff-raw", "tif", picture(colour, "TIFF"))
    yield seed("tiff-16-bit", "tif", picture(deep[..., 0], "TIFF"))
    yield seed("tiff-float", "tif", picture(grey.astype(np.float32), "TIFF"))
    yield seed("tiff-lzw", "tif", picture(grey, "TIFF", compression="tiff_lzw"))
    yield seed("tiff-deflate", "tif", picture(colour, "TIFF", compression="tiff_adobe_deflate"))
    yield seed("tiff-jpeg", "tif", picture(colour, "TIFF", compression="jpeg"))
    yield seed("tiff-fax", "tif", picture(grey, "TIFF", "1", compression="group4"))
    yield seed("tiff-deep-colour", "tif", deep_colour_tiff(deep))


def deep_colour_tiff(pixels: np.ndarray) -> bytes:
    """A 16-bit colour TIFF, which Pillow does not write."""
    import cv2

    return bytes(cv2.imencode(".tif", pixels[..., ::-1])[1])
