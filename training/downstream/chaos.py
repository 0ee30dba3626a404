"""CHAOS, task 5: liver, kidneys and spleen in abdominal MRI, and its format of submissions.

On disk: Train_Sets/MR/1/T1DUAL/DICOM_anon/{InPhase,OutPhase}/*.dcm with T1DUAL/Ground/*.png, and
T2SPIR/DICOM_anon/*.dcm with T2SPIR/Ground/*.png; Test_Sets is the same without Ground.

The challenge orders the slices of images and labels by the names of their files, and so does its evaluation
(emrekavur/CHAOS-evaluation): the i-th picture belongs to the i-th DICOM file. Two sequences of a person are two
cases of one subject. An image has two channels: T1 in phase and opposed, or T2 twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.orientations import aff2axcodes
from PIL import Image as Picture
from PIL import UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from catalog.errors import SetupError
from training.backbone import Spacing
from training.downstream.cases import Case, Image, LabelledData, Labels, Scan, first_folder, hold_out

CLASSES = ("liver", "right kidney", "left kidney", "spleen")
GREY_VALUES = (63, 126, 189, 252)
"""Of each class in the challenge's pictures, for submissions as well."""
GREY_RANGES = ((55, 70), (110, 135), (175, 200), (240, 255))
"""What the challenge takes for each class."""

SUBMITTED = {"Task3": (1,), "Task5": (1, 2, 3, 4)}
"""Tasks on MRI alone, and the classes that each wants: the liver, or all organs."""

_SEQUENCES = ("T1DUAL", "T2SPIR")
_PHASES = ("InPhase", "OutPhase")
_AXES = "SPL"


@dataclass(frozen=True)
class _Series:
    """Slices in the order of their files' names."""

    files: tuple[Path, ...]
    voxels: npt.NDArray[np.float32]
    """(slices, rows, columns)"""
    affine: npt.NDArray[np.float64]
    """From (slice, row, column) in the order of positions, to mm right, anterior, superior."""
    order: npt.NDArray[np.intp]
    """Of the files, by position."""


def open_chaos(raw: Path, held_out: float) -> LabelledData:
    """Both sequences of the subjects below `raw`, of whom the share `held_out` is kept for validation.

    The labels of Test_Sets are secret: who wants to measure without a submission holds out some of the others.
    Raises SetupError if the release is not there.
    """
    train, test = (
        [f"{before}{name}/MR" for before in ("", "CHAOS/", "chaos/") for name in (part, f"CHAOS_{part}/{part}")]
        for part in ("Train_Sets", "Test_Sets")
    )
    labelled = list(_cases(first_folder(raw, train, "CHAOS (Train_Sets/MR)"), labelled=True))
    hidden = next((raw / place for place in test if (raw / place).is_dir()), None)
    training, validation = hold_out(labelled, held_out)
    return LabelledData(
        classes=CLASSES,
        channels=2,
        training=training,
        validation=validation,
        test=() if hidden is None else tuple(_cases(hidden, labelled=False)),
        read=_read,
        write=write_submission,
    )


def write_submission(case: Case, labels_DHW: Labels, folder: Path) -> None:
    """Write Task3 and Task5/MR/<subject>/<sequence>/Results below `folder`: a PNG for every DICOM file.

    A picture has the name of its DICOM file, so that names sort as the challenge sorts the files.
    """
    subject, sequence = case.name.split("-")
    series = _series(_image_folders(case)[0])
    slices = labels_in_file_order(series, labels_DHW)
    for task, wanted in SUBMITTED.items():
        results = folder / task / "MR" / subject / sequence / "Results"
        results.mkdir(parents=True, exist_ok=True)
        grey = np.array([0, *(v if c in wanted else 0 for c, v in enumerate(GREY_VALUES, 1))], dtype=np.uint8)
        for file, labels in zip(series.files, slices, strict=True):
            Picture.fromarray(grey[labels]).save(results / f"{file.stem}.png")


def labels_in_file_order(series: _Series, labels_DHW: Labels) -> Labels:
    """Labels (D, H, W) back in the rows, columns and order of the DICOM files."""
    oriented = _oriented(series, series.voxels[None])
    codes = "".join(aff2axcodes(series.affine))
    back = Orientation(axcodes=codes, labels=None)(MetaTensor(labels_DHW[None], affine=oriented.affine))
    by_position = back.as_tensor().numpy()[0].astype(np.uint8)
    return by_position[np.argsort(series.order)]  # type: ignore[no-any-return]


def _cases(folder: Path, *, labelled: bool) -> Iterator[Case]:
    subjects = [place for place in folder.iterdir() if place.name.isdecimal()]
    for place in sorted(subjects, key=lambda place: int(place.name)):
        for sequence in _SEQUENCES:
            yield Case(
                name=f"{place.name}-{sequence}",
                subject=place.name,
                image=place / sequence / "DICOM_anon",
                label=place / sequence / "Ground" if labelled else None,
            )


def _image_folders(case: Case) -> tuple[Path, ...]:
    if case.name.endswith("T1DUAL"):
        return tuple(case.image / phase for phase in _PHASES)
    return (case.image,)


def _read(case: Case) -> Scan:
    first, *others = (_series(folder) for folder in _image_folders(case))
    for other in others:
        if other.voxels.shape != first.voxels.shape or np.abs(other.affine - first.affine).max() > 1:
            raise SetupError(
                f"{other.files[0].parent} and {first.files[0].parent} do not show the same slices "
                f"({_by(other.voxels.shape)} and {_by(first.voxels.shape)} voxels): take both from the "
                "archive again"
            )
    channels = np.stack([series.voxels for series in (first, *(others or [first]))])
    image = _oriented(first, channels)
    label = None
    if case.label is not None:
        slices = _ground(case.label, first)
        label = _oriented(first, slices[None]).as_tensor().numpy()[0].astype(np.uint8)
    depth, rows, columns = (float(step) for step in image.pixdim)
    spacing: Spacing = (depth, rows, columns)
    voxels: Image = np.ascontiguousarray(image.as_tensor().numpy(), dtype=np.float32)
    return Scan(image=voxels, label=label, spacing=spacing)


def _oriented(series: _Series, slices_CSHW: npt.NDArray[Any]) -> MetaTensor:
    """Slices in the order of their files, with the axes of the corpus."""
    by_position = slices_CSHW[:, series.order]
    return Orientation(axcodes=_AXES, labels=None)(MetaTensor(by_position, affine=series.affine))


def _ground(folder: Path, series: _Series) -> Labels:
    """The labels of the files of `series`, in their order."""
    files = sorted(folder.glob("*.png"), key=_natural)
    if len(files) != len(series.files):
        raise SetupError(
            f"{folder} holds {len(files)} pictures of labels for {len(series.files)} slices in "
            f"{series.files[0].parent}: unpack the archive again"
        )
    labels = np.zeros(series.voxels.shape, np.uint8)
    for number, file in enumerate(files):
        try:
            grey = np.asarray(Picture.open(file))
        except (UnidentifiedImageError, OSError) as error:
            raise SetupError(f"{file} cannot be read: {error}. Unpack the archive again.") from error
        if grey.shape != labels.shape[1:]:
            raise SetupError(
                f"{file} has {_by(grey.shape)} pixels, its slice {series.files[number]} "
                f"{_by(labels.shape[1:])}: unpack the archive again"
            )
        for label, (low, high) in enumerate(GREY_RANGES, 1):
            labels[number][(grey >= low) & (grey <= high)] = label
        strange = np.unique(grey[(labels[number] == 0) & (grey != 0)])
        if strange.size:
            raise SetupError(
                f"{file} has the grey values {strange[:5].tolist()}, which stand for no organ: liver, kidneys "
                "and spleen are 63, 126, 189 and 252. Take the pictures from the archive, not resized."
            )
    return labels


def _series(folder: Path) -> _Series:
    files = tuple(sorted(folder.glob("*.dcm"), key=_natural))
    if len(files) < 2:
        raise SetupError(
            f"{folder} holds {len(files)} DICOM files (*.dcm) of a series: unpack the archive again"
        )
    slices, positions = [], []
    for file in files:
        try:
            read = pydicom.dcmread(file)
            slices.append(read.pixel_array.astype(np.float32))
            positions.append([float(at) for at in read.ImagePositionPatient])
            directions = np.array(read.ImageOrientationPatient, dtype=np.float64)
            rows, columns = (float(step) for step in read.PixelSpacing)
        except (InvalidDicomError, AttributeError, TypeError, ValueError, OSError) as error:
            raise SetupError(f"{file} cannot be read as a slice with a position: {error}") from error
        if slices[-1].shape != slices[0].shape:
            raise SetupError(
                f"{file} has {_by(slices[-1].shape)} pixels, {files[0]} {_by(slices[0].shape)}: they are not "
                "of one series"
            )
    along_row, along_column = directions[:3], directions[3:]
    at = np.array(positions)
    heights = at @ np.cross(along_row, along_column)
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    if steps.min() <= 0 or steps.max() - steps.min() > 0.1 * np.median(steps):
        raise SetupError(
            f"the slices in {folder} lie {steps.min():.3g} to {steps.max():.3g} mm apart: some are missing or "
            "there twice. Unpack the archive again."
        )
    lps = np.eye(4)
    lps[:3, 0] = (at[order[-1]] - at[order[0]]) / (len(files) - 1)
    lps[:3, 1], lps[:3, 2] = along_column * rows, along_row * columns
    lps[:3, 3] = at[order[0]]
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    return _Series(files=files, voxels=np.stack(slices), affine=ras, order=order)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Names in the order that people give them: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", file.name)]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
