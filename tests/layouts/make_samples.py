"""How the images in samples/ were cut from their originals. Documentation that runs:

    python tests/layouts/make_samples.py ORIGINALS SAMPLES

Nothing is resampled: images are cropped along their axes and positions are moved to match. Files are written
without times and without any tag that could name a person; the same originals give the same bytes with the
same versions of nibabel, SimpleITK, pydicom and imagecodecs. Origins and licences: samples/README.md.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk  # noqa: N813 - its usual name
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, generate_uid
from pydicom.valuerep import format_number_as_ds

Box = Sequence[slice]

UNCHANGED = {
    "XR/ml-workgroup-88859dc1/chest.png": "xray/chest_ml_88859dc1.png",
    "XR/ml-workgroup-1479fa94/chest.png": "xray/chest_ml_1479fa94.png",
    "XR/ml-workgroup-0957ce54/chest.png": "xray/chest_ml_0957ce54.png",
    "US/monai/neck.png": "ultrasound/monai_neck.png",
    "fundus/scikit-image/retina.jpg": "fundus/skimage_retina.jpg",
    "fundus/berens/retina.jpg": "fundus/berens_fundus1.jpg",
}

NIFTI: dict[str, tuple[str, Box]] = {
    "CT/totalsegmentator/chest.nii.gz": (
        "ct/totalsegmentator_aorta_ct_cropped.nii.gz",
        np.s_[:, :, 60:112],
    ),
    "MRI/sct-tutorial/spine_DWI.nii.gz": ("mri/spinal_cord_dwi_4d.nii.gz", np.s_[:, :, :, :4]),
    "MRI/sct-tutorial/spine_T2.nii.gz": ("mri/spinal_cord_t2_ms.nii.gz", np.s_[80:240, 32:192, :]),
    "MRI/sct-testing/spine_fMRI.nii.gz": ("mri/spinal_cord_fmri_4d.nii.gz", np.s_[:, :, :, :3]),
    "MRI/dcm-qa-sag/brain_fMRI.nii.gz": ("mri/brain_fmri_sagittal_4d.nii", np.s_[:, :, :, :2]),
    "MRI/nibabel/brain_fMRI.nii": ("mri/nibabel_functional.nii", np.s_[:, :, :, :2]),
}

ITK: dict[str, tuple[str, Box]] = {
    "CT/elastix/chest.mha": ("mha/elastix_3dct_lung.mha", np.s_[:, :, 40:88]),
    "CT/pyradiomics-lung1/chest.nrrd": ("nrrd/pyradiomics_lung1_ct.nrrd", np.s_[16:192, 60:240, 8:36]),
    "MRI/pyradiomics-brain1/brain.nrrd": ("nrrd/pyradiomics_brain1.nrrd", np.s_[44:212, 24:232, 4:22]),
    "MRI/niivue/brain_T2-FLAIR.nrrd": ("nrrd/stroke_flair_oblique.nrrd", np.s_[:, 16:144, 30:94]),
}

PIXEL_TAGS = [
    "SOPClassUID",
    "Modality",
    "PatientPosition",
    "SliceThickness",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "WindowCenter",
    "WindowWidth",
    "FrameTime",
    "FrameIncrementPointer",
    "LossyImageCompression",
]
"""The only tags that are copied; all others, private ones included, stay behind."""


def make_nifti(original: Path, box: Box, target: Path) -> None:
    """Crop a NIfTI file: stored numbers and scale stay, the affine follows, free-text fields are emptied."""
    image = nib.load(original)
    stored = np.asanyarray(image.dataobj.get_unscaled())[tuple(box)]
    affine = image.slicer[tuple(box)].affine
    header = image.header.copy()
    header.set_data_shape(stored.shape)
    cropped = nib.Nifti1Image(stored, affine, header)
    for set_form, code in ((cropped.set_sform, "sform_code"), (cropped.set_qform, "qform_code")):
        set_form(affine, int(header[code]))
    cropped.header["pixdim"] = image.header["pixdim"]
    cropped.header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        cropped.header[field] = b""
    content = cropped.to_bytes()
    target.write_bytes(gzip.compress(content, mtime=0) if target.suffix == ".gz" else content)


def make_itk(original: Path, box: Box, target: Path) -> None:
    """Crop an MHA or NRRD file; the origin follows, free metadata is dropped."""
    image = sitk.ReadImage(str(original))[tuple(box)]
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    sitk.WriteImage(image, str(target), useCompression=True)


def deidentified(original: Dataset, name: str, instance: int) -> Dataset:
    """A new data set with the tags that pixels and geometry need, fresh UIDs and no person."""
    dataset = Dataset()
    for keyword in PIXEL_TAGS:
        if keyword in original:
            dataset[keyword] = original[keyword]
    dataset.PatientName = name
    dataset.PatientID = name
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "only tags of pixels and geometry kept"
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[name, "study"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
    if "ImagePositionPatient" in original:
        dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[name, "frame"])
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(instance)])
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = instance
    return dataset


def save_dicom(dataset: Dataset, transfer_syntax: str, target: Path) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = transfer_syntax
    dataset.file_meta = meta
    target.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(target, enforce_file_format=True)


def set_size(dataset: Dataset, pixels: npt.NDArray[np.generic]) -> None:
    dataset.Rows, dataset.Columns = pixels.shape[:2]


def make_series(originals: Sequence[Path], rows: slice, columns: slice, target: Path, name: str) -> None:
    """Crop every slice of a series in plane, uncompressed; ImagePositionPatient follows."""
    for number, path in enumerate(originals, start=1):
        original = pydicom.dcmread(path)
        dataset = deidentified(original, name, number)
        pixels = original.pixel_array[rows, columns]
        along_row, along_column = np.reshape(original.ImageOrientationPatient, (2, 3)).astype(float)
        row_spacing, column_spacing = map(float, original.PixelSpacing)
        position = (
            np.asarray(original.ImagePositionPatient, dtype=float)
            + columns.start * column_spacing * along_row
            + rows.start * row_spacing * along_column
        )
        dataset.ImagePositionPatient = [format_number_as_ds(value) for value in position.tolist()]
        set_size(dataset, pixels)
        dataset.PixelData = pixels.tobytes()
        dataset["PixelData"].VR = "OW"
        save_dicom(dataset, ExplicitVRLittleEndian, target / f"{number:03d}.dcm")


def make_radiograph(original: Path, target: Path, name: str) -> None:
    """The radiograph's lower half, JPEG 2000 without loss as the original."""
    source = pydicom.dcmread(original)
    dataset = deidentified(source, name, 1)
    pixels = np.ascontiguousarray(source.pixel_array[700:1700, 400:1400])
    set_size(dataset, pixels)
    coded = imagecodecs.jpeg2k_encode(pixels, reversible=True, level=0, codecformat="j2k", bitspersample=10)
    if not np.array_equal(imagecodecs.jpeg2k_decode(coded), pixels):
        raise ValueError("the JPEG 2000 encoder lost something")
    dataset.PixelData = encapsulate([coded])
    dataset["PixelData"].is_undefined_length = True
    save_dicom(dataset, JPEG2000Lossless, target / "001.dcm")


def make_cine(original: Path, frames: Sequence[int], target: Path, name: str) -> None:
    """Some frames of the cine, cropped to the ultrasound region: outside it stands the patient's name.

    JPEG blocks cannot be cropped there without decoding, so the frames are encoded again, at high quality.
    """
    source = pydicom.dcmread(original)
    dataset = deidentified(source, name, 1)
    region = source.SequenceOfUltrasoundRegions[0]
    rows = slice(region.RegionLocationMinY0, region.RegionLocationMaxY1 + 1)
    columns = slice(region.RegionLocationMinX0, region.RegionLocationMaxX1 + 1)
    coded_frames = list(generate_frames(source.PixelData, number_of_frames=source.NumberOfFrames))
    pictures = [imagecodecs.jpeg8_decode(coded_frames[frame])[rows, columns] for frame in frames]
    set_size(dataset, pictures[0])
    dataset.NumberOfFrames = len(frames)
    dataset.LossyImageCompression = "01"
    coded = [
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(picture), level=95, colorspace="RGB", outcolorspace="YCbCr", subsampling="422"
        )
        for picture in pictures
    ]
    dataset.PixelData = encapsulate(coded)
    dataset["PixelData"].is_undefined_length = True
    save_dicom(dataset, JPEGBaseline8Bit, target / "001.dcm")


def make_samples(originals: Path, samples: Path) -> None:
    """Write every image of samples/ anew from the folder of originals."""
    for name, original in UNCHANGED.items():
        (samples / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(originals / original, samples / name)
    for name, (original, box) in NIFTI.items():
        (samples / name).parent.mkdir(parents=True, exist_ok=True)
        make_nifti(originals / original, box, samples / name)
    for name, (original, box) in ITK.items():
        (samples / name).parent.mkdir(parents=True, exist_ok=True)
        make_itk(originals / original, box, samples / name)
    # The vault of the skull: no face, and the part of the series that has one slice step (7 mm).
    head = [originals / f"dicom/ct_head_gantry_tilt/{number:02d}.dcm" for number in range(16, 26)]
    make_series(head, slice(128, 384), slice(128, 384), samples / "CT/dcm-qa-ct/head", "dcm-qa-ct")
    brain = sorted((originals / "dicom/mr_t1_whole_head").glob("*.dcm"))[8:20]
    make_series(brain, slice(168, 376), slice(40, 236), samples / "MRI/datalad/brain_T1", "datalad")
    make_radiograph(
        originals / "dicom/xray_single_jpeg2000/RG3_J2KR.dcm", samples / "XR/pydicom-rg3/leg", "pydicom-rg3"
    )
    echo = originals / "dicom/us_echo_multiframe_jpeg/color3d_jpeg_baseline.dcm"
    make_cine(echo, range(0, 120, 20), samples / "US/pydicom-echo/heart", "pydicom-echo")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_samples.py ORIGINALS SAMPLES")
    make_samples(Path(sys.argv[1]), Path(sys.argv[2]))
