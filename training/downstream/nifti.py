"""Images and labels of NIfTI files, through MONAI, in the axes that the corpus has."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
from monai.data import MetaTensor, NibabelReader
from monai.transforms import Orientation
from nibabel.filebasedimages import ImageFileError

from catalog.errors import SetupError
from training.downstream.cases import Image, Labels, Scan, check_same_grid, checked_labels

_READER = NibabelReader()
_AXES = "SPL"
"""Superior, posterior, left: where the indices of depth, rows and columns grow."""


def read_nifti(image: Path, label: Path | None, classes: int) -> Scan:
    """A volume and its labels. Raises SetupError for files that are missing, damaged or of different scans."""
    for file in (image, label):
        if file is not None and not file.is_file():
            raise SetupError(f"{file} is missing: take it from the publisher's archive again")
    voxels, affine = _load(image)
    labels = None
    if label is not None:
        drawn, label_affine = _load(label)
        check_same_grid(voxels.shape, drawn.shape, affine, label_affine, image, label)
        labels = checked_labels(_array(_turned(drawn, label_affine))[0], classes, label)
    turned = _turned(voxels, affine)
    depth, rows, columns = (float(step) for step in turned.pixdim)
    return Scan(image=_array(turned), label=labels, spacing=(depth, rows, columns))


def write_nifti(image: Path, labels_DHW: Labels, file: Path) -> None:
    """Write labels on the grid of `read_nifti` with the axes and header geometry of the file `image`."""
    like = nibabel.load(image)
    affine = np.asarray(like.affine)
    codes = nibabel.aff2axcodes(affine)
    here = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(codes), nibabel.orientations.axcodes2ornt(_AXES)
    )
    turned = affine @ nibabel.orientations.inv_ornt_aff(here, like.shape[:3])
    back = Orientation(axcodes="".join(codes), labels=None)(MetaTensor(labels_DHW[None], affine=turned))
    nibabel.save(nibabel.Nifti1Image(_array(back)[0].astype(np.uint8), affine), file)


def _load(file: Path) -> tuple[Image, npt.NDArray[np.float64]]:
    """Voxels in the file's own order of axes, and its affine."""
    try:
        voxels, meta = _READER.get_data(_READER.read(file))
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).strip().splitlines()[0]
        raise SetupError(
            f"{file} cannot be read: {reason}. Take it from the publisher's archive again."
        ) from error
    if voxels.ndim != 3:
        raise SetupError(f"{file} has the shape {voxels.shape}: a volume of three axes is wanted")
    return voxels, np.asarray(meta["affine"], dtype=np.float64)


def _turned(voxels: Image, affine: npt.NDArray[np.float64]) -> MetaTensor:
    return Orientation(axcodes=_AXES, labels=None)(MetaTensor(voxels[None], affine=affine))


def _array(tensor: MetaTensor) -> Image:
    return np.ascontiguousarray(tensor.as_tensor().numpy(), dtype=np.float32)
