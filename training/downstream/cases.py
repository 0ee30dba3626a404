"""Images with labels of every voxel: what a segmentation task consists of, whatever its files look like.

Arrays are (C, D, H, W) as everywhere: depth first, inferior to superior, anterior to posterior, right to left.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from training.backbone import Spacing

Image = npt.NDArray[np.float32]
"""(C, D, H, W) in the units of the file."""
Labels = npt.NDArray[np.uint8]
"""(D, H, W): 0 is the background, i the i-th class."""

_AXES_TOLERANCE_MM = 0.1


@dataclass(frozen=True)
class Case:
    """One image of a task, where it lies."""

    name: str
    """Unique in its task, and fit for a file name."""
    subject: str
    """Who was scanned: cases of one subject are held out together, and are in a share of the data together."""
    image: Path
    """File of the image, or the folder that its files lie in."""
    label: Path | None
    """File or folder of the labels; None where they are not published."""


@dataclass(frozen=True)
class Scan:
    """One image of a task, in memory."""

    image: Image
    label: Labels | None
    spacing: Spacing


@dataclass(frozen=True)
class LabelledData:
    """A task's data as its publisher, or the user, laid it out."""

    classes: tuple[str, ...]
    """Names of the labels 1, 2, ..."""
    channels: int
    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    """Cases without published labels, for which predictions are written."""
    read: Callable[[Case], Scan]
    """Raises SetupError, which names the file and what to do."""
    write: Callable[[Case, Labels, Path], None]
    """Write labels of a case, on the grid of its `Scan`, below a folder, in the format of the task."""


def hold_out(cases: Sequence[Case], share: float) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Cases to train on and cases to measure on: a share of the subjects, but one at least and not all.

    Who is held out follows from the subjects' names alone, not from a seed, so that all runs measure the same.
    Raises SetupError where there is nobody to hold out.
    """
    if share == 0:
        return tuple(cases), ()
    subjects = sorted({case.subject for case in cases}, key=_shuffled)
    if len(subjects) < 2:
        raise SetupError(
            "there is only one subject, so none can be held out to measure on: --set images.held_out=0 "
            "trains on all"
        )
    held = set(subjects[: min(max(round(share * len(subjects)), 1), len(subjects) - 1)])
    return (
        tuple(case for case in cases if case.subject not in held),
        tuple(case for case in cases if case.subject in held),
    )


def share_of(cases: Sequence[Case], share: float, seed: int) -> tuple[Case, ...]:
    """The cases of a share of the subjects, at least one; with one seed, smaller shares lie in larger ones."""
    if not 0 < share <= 1:
        raise SetupError(f"the share of the training data is {share}: it must be above 0 and at most 1")
    subjects = sorted({case.subject for case in cases})
    order = np.random.default_rng([seed]).permutation(len(subjects))
    # 0.6 of 5 is 2.9999... in floating point.
    chosen = {subjects[at] for at in order[: max(math.floor(share * len(subjects) + 1e-9), 1)]}
    return tuple(case for case in cases if case.subject in chosen)


def checked_labels(values: npt.NDArray[np.generic], classes: int, origin: Path) -> Labels:
    """Label values as bytes. Raises SetupError where one is not of 0 ... `classes`."""
    found = np.unique(values)
    strange = [float(value) for value in found if value not in range(classes + 1)]
    if strange:
        told = ", ".join(f"{value:g}" for value in strange[:5])
        raise SetupError(
            f"{origin} holds the labels {told}, but the task has {classes} classes, so 0 to {classes} "
            "are allowed. Is it the label file of this task, without interpolation?"
        )
    return values.astype(np.uint8)


def check_same_shape(image_shape: Sequence[int], label_shape: Sequence[int], image: Path, label: Path) -> None:
    """Raise SetupError unless there is a label for each voxel."""
    if tuple(image_shape) != tuple(label_shape):
        raise SetupError(
            f"{label} has {_by(label_shape)} voxels, its image {image} {_by(image_shape)}: they are not of one "
            "scan, or one of them was resampled. Take both from the publisher again."
        )


def check_same_grid(
    image_shape: Sequence[int],
    label_shape: Sequence[int],
    image_affine: npt.NDArray[np.float64],
    label_affine: npt.NDArray[np.float64],
    image: Path,
    label: Path,
) -> None:
    """Raise SetupError unless labels lie on the voxels of their image, to a tenth of a millimetre."""
    check_same_shape(image_shape, label_shape, image, label)
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
    corners[:, :3] *= np.array(image_shape[:3]) - 1
    off = float(np.abs(corners @ (image_affine - label_affine).T).max())
    if not off <= _AXES_TOLERANCE_MM:
        raise SetupError(
            f"{label} lies {off:.3g} mm away from its image {image}, by what their headers say of position and "
            "axes (affine): they are not of one scan, or a program changed one of the headers. Take both from "
            "the publisher again, or copy the header of the image to the labels if you know that they fit."
        )


def first_folder(raw: Path, places: Sequence[str], what: str) -> Path:
    """The first of `places` below `raw` that is a folder; SetupError, which names them, if there is none."""
    for place in places:
        if (raw / place).is_dir():
            return raw / place
    tried = ", ".join(str(raw / place) for place in places)
    raise SetupError(f"{what} is not in {raw}: none of these folders is there: {tried}")


def _shuffled(subject: str) -> str:
    return hashlib.sha256(subject.encode()).hexdigest()


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
