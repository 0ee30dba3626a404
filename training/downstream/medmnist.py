"""MedMNIST v2/v3, the six sets in 3-D: classify small volumes, as the paper does (its table 2).

On disk: organmnist3d.npz, or organmnist3d_64.npz, and so on, as https://medmnist.com publishes them: uint8
volumes {train,val,test}_images (N, S, S, S) and {train,val,test}_labels (N, 1), with the official split.
Nothing is downloaded here.

The paper: input 160 x 160 x 160 by trilinear interpolation, three equal channels, a linear layer on the class
token; 100 epochs of batches of 32, AdamW with decay 1e-2, rate times 0.1 at epochs 50 and 75, of nine rates the
one with the best validation AUC. Adrenal and Vessel are masks: they train times U(0, 1), and are measured
times 0.5, so that a network learns shape.

Shape suffixes: N cases, D, H, W voxels.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from catalog.errors import SetupError
from training.backbone import Spacing
from training.config import Positive
from training.downstream.classification import (
    METRICS as METRICS,
)
from training.downstream.classification import (
    Batch,
    ClassificationConfig,
    Labelled,
    Rows,
    check_mode,
    classify,
)
from training.downstream.task import Cell, Result

SETS: dict[str, tuple[str, ...]] = {
    "organ": (
        "liver",
        "right kidney",
        "left kidney",
        "right femur",
        "left femur",
        "bladder",
        "heart",
        "right lung",
        "left lung",
        "spleen",
        "pancreas",
    ),
    "nodule": ("benign", "malignant"),
    "fracture": ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
    "adrenal": ("normal", "hyperplasia"),
    "vessel": ("vessel", "aneurysm"),
    "synapse": ("inhibitory", "excitatory"),
}
"""Set -> its classes, by label."""

MD5 = {
    "organmnist3d.npz": "a0c5a1ff56af4f155c46d46fbb45a2fe",
    "nodulemnist3d.npz": "8755a7e9e05a4d9ce80a24c3e7a256f3",
    "fracturemnist3d.npz": "6aa7b0143a6b42da40027a9dda61302f",
    "adrenalmnist3d.npz": "bbd3c5a5576322bc4cdfea780653b1ce",
    "vesselmnist3d.npz": "b41fd4f7e7e2feedddb201585ecafa1b",
    "synapsemnist3d.npz": "1235b78a3cd6280881dd7850a78eadb6",
    "organmnist3d_64.npz": "58a2205adf14a9d0a189cb06dc78bf10",
    "nodulemnist3d_64.npz": "c47c5b7d457bf6332200d2ea6d64ecd8",
    "fracturemnist3d_64.npz": "f01d7e6316aedf4210da0da5b7437b42",
    "adrenalmnist3d_64.npz": "17721accfe9fb005146a47d33bc54b2f",
    "vesselmnist3d_64.npz": "6bb274a8846e1097066dcd64e2c4520f",
    "synapsemnist3d_64.npz": "43bd14ebf3af9d3dd072446fedc14d5e",
}
"""Of the published files (MedMNIST v3, CC BY 4.0)."""

MASKS = ("adrenal", "vessel")
"""Sets whose volumes are masks, without intensities."""

_PARTS = ("train", "val", "test")
_SPACING: Spacing = (1.0, 1.0, 1.0)
"""Cubes of isotropic voxels; their size in mm is not published."""


class MedMNISTConfig(ClassificationConfig):
    """Settings of medmnist3d:NAME."""

    data: Path | None = None
    """Folder with the files of MedMNIST."""
    resolution: Literal[28, 64]
    """Of the published volumes: 28 is the benchmark's."""
    size: tuple[Positive, Positive, Positive]
    """Voxels (D, H, W) that the network sees, by trilinear interpolation."""


CONFIG = MedMNISTConfig


def check(cell: Cell, config: MedMNISTConfig) -> None:
    """Raise SetupError if there is no such set, file or mode."""
    _file(cell.task, config)
    check_mode(cell.mode)


def run(cell: Cell, config: MedMNISTConfig, folder: Path) -> Result:
    """Train and measure on one of SETS; see `training.downstream.task.Task`."""
    return classify(load(cell.task, config), cell, config, folder)


def load(task: str, config: MedMNISTConfig) -> Labelled:
    """One of SETS with its official split. Raises SetupError where the file is not of the published form."""
    name, file = _name(task), _file(task, config)
    arrays = _read(file)
    classes = SETS[name]
    images, labels = [], []
    for part in _PARTS:
        images_NDHW, labels_N1 = (_array(arrays, f"{part}_{what}", file) for what in ("images", "labels"))
        if images_NDHW.dtype != np.uint8 or images_NDHW.ndim != 4:
            raise SetupError(
                f"{file}: {part}_images are {images_NDHW.dtype} {images_NDHW.shape}, not uint8 "
                "volumes (N, S, S, S)"
            )
        flat = labels_N1.reshape(len(labels_N1), -1)
        fits = flat.shape == (len(images_NDHW), 1) and flat.dtype.kind in "iu"
        if not fits or not ((flat >= 0) & (flat < len(classes))).all():
            raise SetupError(
                f"{file}: {part}_labels are not a number from 0 to {len(classes) - 1} for each volume"
            )
        images.append(images_NDHW)
        labels.append(flat[:, 0].astype(np.int64))
    ends = np.cumsum([len(part) for part in labels])
    rows = np.split(np.arange(ends[-1]), ends[:-1])
    md5 = _md5(file)
    return Labelled(
        cases=_Volumes(np.concatenate(images), np.concatenate(labels), config.size, is_mask=name in MASKS),
        classes=classes,
        subjects=np.arange(ends[-1]).astype(np.str_),  # who they are of is not published
        training=rows[0],
        validation=rows[1],
        test=rows[2],
        facts={"file": file.name, "md5": md5, "published": MD5.get(file.name) == md5},
    )


class _Volumes:
    """All volumes of a set in memory; those asked for are brought to size on the device."""

    def __init__(
        self, images_NDHW: npt.NDArray[np.uint8], labels: Rows, size: tuple[int, int, int], *, is_mask: bool
    ) -> None:
        self._images_NDHW = images_NDHW
        self._size = size
        self.labels = labels
        self.vary = is_mask

    def batches(
        self, rows: Rows, size: int, device: torch.device, draw: torch.Generator | None
    ) -> Iterator[Batch]:
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            factor_B = None
            if self.vary:
                factor_B = (
                    torch.full((len(part),), 0.5) if draw is None else torch.rand(len(part), generator=draw)
                )
            yield Batch(part, self._image(part, factor_B, device), _SPACING)

    def _image(self, rows: Rows, factor_B: Tensor | None, device: torch.device) -> Tensor:
        stored_BDHW = torch.from_numpy(self._images_NDHW[rows]).to(device).float() / 255
        if factor_B is not None:
            stored_BDHW *= factor_B.to(device).view(-1, 1, 1, 1)
        image_B1DHW = F.interpolate(
            stored_BDHW[:, None], size=self._size, mode="trilinear", align_corners=False
        )
        return image_B1DHW.expand(-1, 3, -1, -1, -1)


def _name(task: str) -> str:
    name = task.partition(":")[2]
    if name not in SETS:
        raise SetupError(f"there is no task {task!r}: write medmnist3d: and one of {', '.join(SETS)}")
    return name


def _file(task: str, config: MedMNISTConfig) -> Path:
    suffix = "" if config.resolution == 28 else f"_{config.resolution}"
    name = f"{_name(task)}mnist3d{suffix}.npz"
    if config.data is None or not (config.data / name).is_file():
        where = "no folder was given with --data" if config.data is None else f"it is not in {config.data}"
        raise SetupError(
            f"{task} needs {name} (md5 {MD5[name]}), and {where}. Fetch it from https://medmnist.com yourself."
        )
    return config.data / name


def _read(file: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SetupError(f"{file} is not a readable npz file: {error}. Fetch it again.") from error


def _array(arrays: Any, name: str, file: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = arrays[name]
        return array
    except KeyError:
        raise SetupError(f"{file} has no {name}: it is not one of MedMNIST's") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SetupError(f"{file}: {name} cannot be read: {error}. Fetch it again.") from error


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
