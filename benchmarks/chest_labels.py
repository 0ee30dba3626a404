"""Labels of chest CT by a fixed rule, so that segmentation can be tried on real scans that nobody has drawn on.

    python benchmarks/chest_labels.py --out chest samples/CT/elastix/chest.mha samples/CT/*/chest.n*
    pumit-train finetune --task folder:chest --preset tiny --data chest --init scratch:tiny --run runs/chest

writes images/, labels/ and classes.txt, the layout of the task `folder`. Two scans of one person are given as
NAME=FILE NAME=FILE, so that they are held out together. The rule, in Hounsfield units (HU):

    1 lung     below -400 HU, opened in the plane by a disc of 2 mm, in connected parts of 10 ml or more,
               without those that reach the front of the image with a mean below -950: air around the body
    2 dense    above 250 HU, in connected parts of 1 ml or more: bone, and vessels full of contrast agent

So the labels are functions of the intensities and their connections: a network that does well has learnt these,
not anatomy. They compare a pre-trained with an untrained network; they say nothing of either in a clinic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name

LUNG_HU, LUNG_ML, OPENING_MM, ROOM_HU = -400, 10.0, 2.0, -950
DENSE_HU, DENSE_ML = 250, 1.0
CLASSES = ("lung", "dense")
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")


def label(image: sitk.Image) -> sitk.Image:
    """Labels (uint8) on the grid of a CT in HU, with axes (x, y, z) to left, posterior, superior."""
    disc = [max(round(OPENING_MM / step), 1) for step in image.GetSpacing()[:2]]
    air = _large(sitk.BinaryMorphologicalOpening(image < LUNG_HU, [*disc, 0]), LUNG_ML)
    parts = sitk.ConnectedComponent(air)
    values = sitk.LabelIntensityStatisticsImageFilter()
    values.Execute(parts, image)
    in_front = set(np.unique(sitk.GetArrayViewFromImage(parts)[:, 0]).tolist())
    room = {part: 0 for part in values.GetLabels() if part in in_front and values.GetMean(part) < ROOM_HU}
    lung = sitk.Cast(sitk.ChangeLabel(parts, room) > 0, sitk.sitkUInt8)
    return lung + 2 * _large(image > DENSE_HU, DENSE_ML)


def _large(mask: sitk.Image, millilitres: float) -> sitk.Image:
    """The connected parts of a mask (1 inside) that have so much volume."""
    voxel_mm3 = 1.0
    for step in mask.GetSpacing():
        voxel_mm3 *= step
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(mask), max(round(millilitres * 1000 / voxel_mm3), 1))
    return sitk.Cast(parts > 0, sitk.sitkUInt8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE", help="CT in HU: NIfTI, MHA or NRRD")
    parser.add_argument("--out", type=Path, required=True, help="new folder for images/, labels/, classes.txt")
    arguments = parser.parse_args()
    for kind in ("images", "labels"):
        (arguments.out / kind).mkdir(parents=True)
    (arguments.out / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    for number, given in enumerate(arguments.files):
        person, _, place = given.rpartition("=")
        file = Path(place)
        image = sitk.DICOMOrient(sitk.Cast(sitk.ReadImage(file), sitk.sitkInt16), "LPS")
        labels = label(image)
        stem = next(file.name.removesuffix(end) for end in _SUFFIXES if file.name.endswith(end))
        name = f"{person or f'{file.parent.name}-{stem}'}__{number}.nii.gz"
        sitk.WriteImage(image, arguments.out / "images" / name)
        sitk.WriteImage(labels, arguments.out / "labels" / name)
        counts = sitk.GetArrayViewFromImage(labels)
        print(name, *(f"{of} {(counts == value).mean():.1%}" for value, of in enumerate(CLASSES, 1)))


if __name__ == "__main__":
    main()
