"""Tiny releases of the supported datasets, laid out as their publishers do, from real images.

Everything that stands beside the images in a real download is there too: masks, labels, tables, archive debris.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

TCIA_COLUMNS = [
    "Series UID",
    "Collection",
    "Subject ID",
    "Study UID",
    "Study Date",
    "Series Description",
    "Modality",
    "Number of Images",
    "File Location",
]


def write_layout(dataset_id: str, folder: Path, images_root: Path) -> Path:
    """Write a release of `dataset_id` into the raw folder `folder`, under its published name.

    Args:
        images_root: the folder samples/. Images of the dataset itself are used where `../shared/data` beside
            the checkout has them.

    Returns:
        The folder of the dataset.
    """
    return LAYOUTS[dataset_id](folder, images_root)


def write_amos(folder: Path, images_root: Path) -> Path:
    root = folder / "AMOS22"
    release = root / "amos22"
    ct = images_root / "CT/totalsegmentator/chest.nii.gz"
    mri = images_root / "MRI/sct-tutorial/spine_T2.nii.gz"
    for name, image in {
        "imagesTr/amos_0001": ct,
        "imagesTr/amos_0500": ct,
        "imagesTr/amos_0507": mri,
        "imagesVa/amos_0600": mri,
        "imagesTs/amos_5001": ct,
        "imagesTs/amos_5437": ct,
    }.items():
        copy(image, release / f"{name}.nii.gz")
    image = nib.load(ct)
    bone = nib.Nifti1Image((np.asanyarray(image.dataobj) > 300).astype(np.uint8), image.affine)
    (release / "labelsTr").mkdir()
    nib.save(bone, release / "labelsTr/amos_0001.nii.gz")
    (release / "dataset.json").write_text('{"name": "AMOS"}')
    (release / "imagesTr/._amos_0001.nii.gz").write_bytes(b"\0\5\x16\7 resource fork of a Mac")
    return root


def write_busi(folder: Path, images_root: Path) -> Path:
    root = folder / "BUSI"
    release = root / "Dataset_BUSI_with_GT"
    for name, own in {
        "benign/benign (1)": "busi_benign_10.png",
        "benign/benign (100)": "busi_benign_10.png",
        "malignant/malignant (1)": "busi_malignant_1.png",
        "normal/normal (1)": "busi_normal_1.png",
    }.items():
        image = first_existing(own_images(images_root) / "ultrasound" / own, images_root / "US/monai/neck.png")
        copy(image, release / f"{name}.png")
        mask = Image.open(image).convert("L").point(lambda value: 255 * (value > 100)).convert("1")
        mask.save(release / f"{name}_mask.png")
    shutil.copyfile(release / "benign/benign (100)_mask.png", release / "benign/benign (100)_mask_1.png")
    return root


def write_lidc_idri(folder: Path, images_root: Path) -> Path:
    root = folder / "LIDC-IDRI"
    release = root / "TCIA_LIDC-IDRI_20200921"
    ct = first_existing(
        own_images(images_root) / "dicom/ct_chest_jpeg_lossless", images_root / "CT/dcm-qa-ct/head"
    )
    radiograph = images_root / "XR/pydicom-rg3/leg"
    rows: list[list[str]] = []
    for modality, location, series in [
        ("CT", "./LIDC-IDRI/LIDC-IDRI-0001/01-01-2000-NA-NA-30178/3000566.000000-NA-03192", ct),
        ("DX", "./LIDC-IDRI/LIDC-IDRI-0001/01-01-2000-NA-NA-35511/3000923.000000-NA-62357", radiograph),
        ("CT", r".\LIDC-IDRI\LIDC-IDRI-0002\01-01-2000-NA-NA-98329\3000522.000000-NA-04919", ct),
        ("CT", "LIDC-IDRI/LIDC-IDRI-0002/01-01-2000-NA-NA-98329/3000523.000000-NA-04920", ct),
        ("CR", "./LIDC-IDRI/LIDC-IDRI-0002/01-01-2000-NA-NA-26697/31.000000-NA-12345", radiograph),
        ("CT", "./LIDC-IDRI/LIDC-IDRI-0003/01-01-2000-NA-NA-94866/3000611.000000-NA-03264", None),
    ]:
        folder_of_series = release / location.replace("\\", "/")
        for number, slice_file in enumerate(sorted(series.iterdir()) if series else [], start=1):
            copy(slice_file, folder_of_series / f"1-{number:03d}.dcm")
        patient = folder_of_series.parts[-3]
        rows.append(
            [f"1.3.6.1.4.1.14519.{len(rows)}", "LIDC-IDRI", patient, "", "", "", modality, "3", location]
        )
    write_tcia_table(release / "metadata.csv", rows)
    (release / "LICENSE").write_text("CC BY 3.0")
    return root


def write_nih_chestxray(folder: Path, images_root: Path) -> Path:
    root = folder / "NIHChestX-ray"
    images = root / "CXR8/images/images"
    xray = own_images(images_root) / "xray"
    for name, own, sample in [
        ("00000001_000", "nih_00000001_000.png", "ml-workgroup-88859dc1"),
        ("00000001_001", "nih_00000001_000.png", "ml-workgroup-1479fa94"),
        ("00000002_000", "nih_00000002_000_rgb_128.png", "ml-workgroup-0957ce54"),
    ]:
        copy(first_existing(xray / own, images_root / "XR" / sample / "chest.png"), images / f"{name}.png")
    # Some files of the release have an alpha channel that is opaque throughout.
    Image.open(images / "00000001_001.png").convert("RGBA").save(images / "00000003_000.png")
    (root / "CXR8/Data_Entry_2017_v2020.csv").write_text(
        "Image Index,Finding Labels\n00000001_000.png,No Finding\n"
    )
    (root / "CXR8/images/LongTailCXR.png.txt").write_text("no image")
    return root


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "amos": write_amos,
    "busi": write_busi,
    "lidc-idri": write_lidc_idri,
    "nih-chestxray": write_nih_chestxray,
}


def write_tcia_table(file: Path, rows: Iterable[list[str]]) -> None:
    """A metadata.csv as TCIA's downloader writes it, byte order mark included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([TCIA_COLUMNS, *rows])


def own_images(images_root: Path) -> Path:
    """Folder with further real images, which lies beside some checkouts."""
    return images_root.resolve().parent.parent / "shared" / "data"


def first_existing(*paths: Path) -> Path:
    return next(path for path in paths if path.exists())


def copy(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image, target)
