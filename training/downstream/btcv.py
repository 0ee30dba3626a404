"""BTCV: 13 organs in abdominal CT, as Synapse publishes it, with the split of SMIT.

On disk: Abdomen/RawData/Training/img/img0001.nii.gz and Training/label/label0001.nii.gz, 30 scans with labels.
The ids and their split are those of SMIT (dataset/dataset_0.json of its repository), which PUMIT uses.
"""

from __future__ import annotations

from pathlib import Path

from training.downstream.cases import Case, LabelledData, Labels, Scan, first_folder
from training.downstream.nifti import read_nifti, write_nifti

CLASSES = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
TRAINING_IDS = (*range(1, 11), *range(21, 29), 33, 35, 38)
VALIDATION_IDS = (*range(29, 33), 34, 36, 37, 39, 40)

_PLACES = tuple(
    f"{before}{folder}Training"
    for before in ("", "BCV/", "BTCV/", "bcv-abdomen/")
    for folder in ("Abdomen/RawData/", "RawData/", "")
)


def open_btcv(raw: Path) -> LabelledData:
    """The 21 training and 9 validation scans below `raw`, whose files are looked for when they are read.

    Raises SetupError if the release is not there.
    """
    folder = first_folder(raw, _PLACES, "BTCV (Abdomen/RawData/Training)")
    return LabelledData(
        classes=CLASSES,
        channels=1,
        training=tuple(_case(folder, number) for number in TRAINING_IDS),
        validation=tuple(_case(folder, number) for number in VALIDATION_IDS),
        test=(),
        read=_read,
        write=_write,
    )


def _case(folder: Path, number: int) -> Case:
    return Case(
        name=f"img{number:04d}",
        subject=f"{number:04d}",
        image=folder / "img" / f"img{number:04d}.nii.gz",
        label=folder / "label" / f"label{number:04d}.nii.gz",
    )


def _read(case: Case) -> Scan:
    return read_nifti(case.image, case.label, len(CLASSES))


def _write(case: Case, labels_DHW: Labels, folder: Path) -> None:
    write_nifti(case.image, labels_DHW, folder / f"{case.name}.nii.gz")
