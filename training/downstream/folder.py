"""Your own labelled images: images/ and labels/ with files of the same names.

    FOLDER/images/NAME.nii.gz  labels/NAME.nii.gz     volumes of three axes (NIfTI)
    FOLDER/images/NAME.png     labels/NAME.png        pictures, grey or colour; labels grey or with a palette
    FOLDER/classes.txt                                 names of the labels 1, 2, ..., one a line

All files are of one kind. What comes before the first `__` in a name is the subject, so several images of one
person are held out together. An image without a file in labels/ gets predictions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from catalog.errors import SetupError
from training.downstream.cases import (
    Case,
    LabelledData,
    Labels,
    Scan,
    check_same_shape,
    checked_labels,
    first_folder,
    hold_out,
)
from training.downstream.nifti import read_nifti, write_nifti

_SUFFIXES = (".nii.gz", ".nii", ".png")
_PICTURE = ".png"


def open_folder(raw: Path, held_out: float) -> LabelledData:
    """The labelled images below `raw`, of which the share `held_out` of the subjects is for validation.

    Raises SetupError for a layout other than that above, and for labels without an image.
    """
    images = _files(first_folder(raw, ["images"], "the folder of images"))
    labels = _files(first_folder(raw, ["labels"], "the folder of labels"))
    lost = sorted(labels.keys() - images.keys())
    if lost:
        raise SetupError(f"{labels[lost[0]]} has no image of its name in {raw / 'images'}: names must agree")
    if not labels:
        raise SetupError(
            f"{raw / 'labels'} holds no {', '.join(_SUFFIXES)}: give each image labels of its name"
        )
    kinds = {file.suffix == _PICTURE for file in (*images.values(), *labels.values())}
    if len(kinds) > 1:
        raise SetupError(f"{raw} mixes pictures and volumes: give each kind a folder and a training of its own")
    cases = [
        Case(name=name, subject=name.split("__")[0], image=file, label=labels.get(name))
        for name, file in sorted(images.items())
    ]
    classes = _classes(raw)
    flat = kinds == {True}
    training, validation = hold_out([case for case in cases if case.label], held_out)
    channels = max(_channels(case.image) for case in cases) if flat else 1
    read = (
        partial(_read_picture, classes=len(classes), channels=channels)
        if flat
        else partial(_read_volume, classes=len(classes))
    )
    return LabelledData(
        classes=classes,
        channels=channels,
        training=training,
        validation=validation,
        test=tuple(case for case in cases if case.label is None),
        read=read,
        write=_write_picture if flat else _write_volume,
    )


def _files(folder: Path) -> dict[str, Path]:
    """Files by name without suffix; those of other kinds and hidden ones are left alone."""
    return dict(_named(folder))


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.iterdir()):
        for suffix in _SUFFIXES:
            if file.name.endswith(suffix) and not file.name.startswith("."):
                yield file.name.removesuffix(suffix), file
                break


def _classes(raw: Path) -> tuple[str, ...]:
    file = raw / "classes.txt"
    if not file.is_file():
        raise SetupError(f"{file} is missing: write the names of the labels 1, 2, ... into it, one a line")
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not 0 < len(names) < 256 or len(set(names)) < len(names):
        raise SetupError(f"{file} must name 1 to 255 classes, each once, one a line")
    return names


def _read_volume(case: Case, classes: int) -> Scan:
    return read_nifti(case.image, case.label, classes)


def _write_volume(case: Case, labels_DHW: Labels, folder: Path) -> None:
    write_nifti(case.image, labels_DHW, folder / f"{case.name}.nii.gz")


def _channels(file: Path) -> int:
    return 1 if _picture(file).mode in ("L", "I", "I;16", "1", "F") else 3


def _read_picture(case: Case, classes: int, channels: int) -> Scan:
    picture = _picture(case.image)
    pixels = np.asarray(picture if channels == 1 else picture.convert("RGB"), dtype=np.float32)
    image_CDHW = np.atleast_3d(pixels).transpose(2, 0, 1)[:, None]
    label = None
    if case.label is not None:
        values: npt.NDArray[np.generic] = np.asarray(_picture(case.label))
        if values.ndim != 2:
            raise SetupError(f"{case.label} is in colour: write labels as a grey or palette picture")
        check_same_shape(pixels.shape[:2], values.shape, case.image, case.label)
        label = checked_labels(values, classes, case.label)[None]
    return Scan(image=np.ascontiguousarray(image_CDHW), label=label, spacing=(1.0, 1.0, 1.0))


def _write_picture(case: Case, labels_DHW: Labels, folder: Path) -> None:
    Picture.fromarray(labels_DHW[0]).save(folder / f"{case.name}.png")


def _picture(file: Path) -> Picture.Image:
    try:
        picture = Picture.open(file)
        picture.load()
    except (UnidentifiedImageError, OSError) as error:
        raise SetupError(f"{file} cannot be read: {error}") from error
    return picture
