"""Tiny valid image files of every format that a release may hold: deterministic noise that ingest accepts.

The same seed and arguments give the same bytes.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - its usual name
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SegmentationStorage,
    generate_uid,
)

Array = npt.NDArray[Any]

_DICOM_OF_KIND = {
    "CT": ("CT", CTImageStorage),
    "MRI": ("MR", MRImageStorage),
    "PET": ("PT", PositronEmissionTomographyImageStorage),
}
_AXIAL = [1, 0, 0, 0, 1, 0]
_CORONAL = [1, 0, 0, 0, 0, -1]
_SAGITTAL = [0, 1, 0, 0, 0, -1]


def noise(seed: int, shape: Sequence[int], *, label: bool = False) -> Array:
    """Integers from 1 to 1000, int16; as a label, 0 to 2, uint8."""
    values = np.random.default_rng(seed)
    if label:
        return values.integers(0, 3, size=shape, dtype=np.uint8)
    return values.integers(1, 1001, size=shape, dtype=np.int16)


def write_nifti(file: Path, voxels: Array, spacing: Sequence[float], orientation: str) -> None:
    """Voxels (i, j, k) or (i, j, k, volume) with the axis codes `orientation`."""
    to_ras = inv_ornt_aff(axcodes2ornt(orientation), voxels.shape[:3])
    image = nib.Nifti1Image(voxels, to_ras @ np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    content = image.to_bytes()
    file.write_bytes(gzip.compress(content, 1, mtime=0) if file.name.lower().endswith(".gz") else content)


def write_itk(file: Path, voxels: Array, spacing: Sequence[float]) -> None:
    """Voxels (x, y, z) as MHA or NRRD."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)))
    image.SetSpacing([float(step) for step in spacing])
    lowered = file.with_suffix(file.suffix.lower())  # SimpleITK knows no other endings
    sitk.WriteImage(image, str(lowered))
    lowered.rename(file)


def _colour(seed: int, size: Sequence[int]) -> Image.Image:
    values = np.random.default_rng(seed).integers(1, 256, size=(*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _grey(seed: int, size: Sequence[int]) -> Image.Image:
    return _colour(seed, size).getchannel(0)


def _grey_16_bit(seed: int, size: Sequence[int]) -> Image.Image:
    return Image.fromarray(noise(seed, size).astype(np.uint16))


PICTURES: dict[str, Callable[[int, Sequence[int]], Image.Image]] = {
    "L": _grey,
    "RGB": _colour,
    "RGBA": lambda seed, size: _colour(seed, size).convert("RGBA"),
    "L16": _grey_16_bit,
    "grey-as-RGB": lambda seed, size: _grey(seed, size).convert("RGB"),
    "label": lambda seed, size: Image.fromarray(noise(seed, size, label=True)),
}
"""How the pixels of a picture are made, by mode; an alpha channel is opaque."""


def write_picture(file: Path, seed: int, size: Sequence[int], mode: str) -> None:
    """A picture of (height, width) pixels in the format that the suffix names."""
    PICTURES[mode](seed, size).save(file)


def write_series(
    folder: Path,
    seed: int,
    kind: str,
    *,
    slices: int,
    volumes: int,
    spacing: Sequence[float],
    names: str,
    tags: Mapping[str, Any],
) -> None:
    """A DICOM series of axial CT, MR or PET slices; several volumes differ in their time.

    Args:
        kind: `CT`, `MRI` or `PET`.
        spacing: between rows, columns and slices, in mm.
        names: template of the file names, filled with the number of the slice from 1 on.
        tags: further DICOM attributes by keyword, over those made here.
    """
    modality, storage = _DICOM_OF_KIND[kind]
    folder.mkdir(parents=True, exist_ok=True)
    voxels = noise(seed, (volumes, slices, 12, 11))
    for number in range(volumes * slices):
        volume, height = divmod(number, slices)
        ds = _object(seed, number + 1, modality, storage)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        if volumes > 1:
            ds.TemporalPositionIdentifier = volume + 1
        _put_plane(ds, voxels[volume, height], _AXIAL, [0, 0, height * spacing[2]], spacing)
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        _save(ds, folder / names.format(number + 1))


def write_localizer(folder: Path, seed: int, kind: str) -> None:
    """A series of three planes that are not parallel."""
    modality, storage = _DICOM_OF_KIND[kind]
    folder.mkdir(parents=True, exist_ok=True)
    for number, orientation in enumerate([_AXIAL, _CORONAL, _SAGITTAL], start=1):
        ds = _object(seed, number, modality, storage)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        _put_plane(ds, noise(seed + number, (12, 11)), orientation, [0, 0, 0], [2, 2, 10])
        _save(ds, folder / f"{number}.dcm")


def write_segmentation(folder: Path, seed: int) -> None:
    """A series of one segmentation object with two frames."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = _object(seed, 1, "SEG", SegmentationStorage)
    ds.NumberOfFrames = 2
    pixels = noise(seed, (2, 12, 11), label=True)
    _put_pixels(ds, pixels)
    _save(ds, folder / "1-1.dcm")


def _object(seed: int, number: int, modality: str, storage: str) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = storage
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(seed), str(number)])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[str(seed), "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[str(seed), "series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(seed), "frame of reference"])
    ds.Modality = modality
    ds.PatientID = ds.PatientName = "made for a test"
    ds.SeriesNumber = 1
    ds.InstanceNumber = number
    if modality == "CT":
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -500, 1, "HU"
    return ds


def _put_plane(
    ds: Dataset,
    pixels: Array,
    orientation: Sequence[float],
    position: Sequence[float],
    spacing: Sequence[float],
) -> None:
    ds.ImageOrientationPatient = list(orientation)
    ds.ImagePositionPatient = list(position)
    ds.PixelSpacing = list(spacing[:2])
    ds.SliceThickness = spacing[2]
    _put_pixels(ds, pixels)


def _put_pixels(ds: Dataset, pixels: Array) -> None:
    bits = 8 * pixels.dtype.itemsize
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.add_new("PixelData", "OW", pixels.tobytes())


def _save(ds: Dataset, file: Path) -> None:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(file, enforce_file_format=True)
