"""Crops to train a segmentation on: where they lie, and how they are varied.

Crop number i of a run is a function of the seed and i alone, so any number of worker processes gives the same
crops, and a resumed run the ones that were due.

Augmentation follows the code of PUMIT by MONAI's transforms: rotation about the depth axis, scale, flips,
noise, blur, brightness, contrast and gamma. Its simulation of low resolution is left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.transforms import (
    Affine,
    CenterSpatialCropd,
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandomizableTransform,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
)
from monai.transforms.utils import generate_label_classes_crop_centers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.downstream.decoder import Size
from training.downstream.prepared import Prepared

_KEYS = ("image", "label")
_TURNS, _SCALES = 0.2, 0.2
"""Chances that a crop is rotated, and that it is scaled."""
_ZOOM = (0.7, 1.4)
"""How much of the image a scaled crop shows, in sides of the crop."""
_REACH = 2**0.5
"""A square turned by any angle lies in one of so many times its side, and nearly so one scaled by _ZOOM."""


class Crop(NamedTuple):
    """One crop, or with a leading axis a batch of them."""

    image: Tensor
    """(C, D, H, W) as a network is shown it."""
    label: Tensor
    """(1, D, H, W) as floats, which MONAI's losses shrink."""
    names: tuple[str, ...]
    """Of the cases that were cropped."""


class CropDataset(Dataset[Crop]):
    """Crop i, for any i from 0: every case once in each round of so many crops, in a new order."""

    def __init__(
        self, cases: Sequence[Prepared], crop: Size, classes: int, random_share: float, seed: int
    ) -> None:
        """Crops of so many voxels; `classes` includes the background.

        The share `random_share` of them lies anywhere, the others around a voxel of a class, each as often.
        """
        self._cases, self._seed = tuple(cases), seed
        self._places = [case.places() for case in cases]
        reach = tuple(side if side == 1 else _grown(side) for side in crop)
        self._vary = Compose(
            [
                CropAroundd(crop, reach, classes, random_share),
                RandTurnAndScaled(),
                CenterSpatialCropd(_KEYS, crop),
                *(RandFlipd(_KEYS, 0.5, axis) for axis, side in enumerate(crop) if side > 1),
                RandGaussianNoised("image", prob=0.1),
                RandGaussianSmoothd("image", (0.8, 1.2), (0.8, 1.2), (0.8, 1.2), prob=0.1),
                RandScaleIntensityd("image", 0.25, prob=0.15),
                RandScaleIntensityFixedMeand("image", 0.25, preserve_range=True, prob=0.15),
                RandAdjustContrastd("image", prob=3 / 13, gamma=(0.7, 1.5)),
                RandAdjustContrastd("image", prob=1 / 13, gamma=(0.7, 1.5), invert_image=True),
            ]
        )

    def __getitem__(self, index: int) -> Crop:
        turn, position = divmod(index, len(self._cases))
        at = int(np.random.default_rng([self._seed, 0, turn]).permutation(len(self._cases))[position])
        case = self._cases[at]
        self._vary.set_random_state(int(np.random.default_rng([self._seed, 1, index]).integers(2**32)))
        varied = self._vary({"image": case.image(), "label": case.label()[None], "places": self._places[at]})
        image, label = (varied[key].as_subclass(Tensor) for key in _KEYS)
        return Crop(case.shown(image), label.float(), (case.case.name,))


def crop_batches(
    dataset: CropDataset, batch_size: int, first_step: int, steps: int, workers: int
) -> Iterator[Crop]:
    """The batches of the steps first_step ... steps - 1, made ahead by worker processes if there are any."""
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=range(first_step * batch_size, steps * batch_size),
        num_workers=workers,
        collate_fn=_together,
    )
    return iter(loader)


class CropAroundd(Randomizable, MapTransform):  # type: ignore[misc]
    """A region of `reach` voxels around the place of a crop, filled with 0 outside of the image.

    The region is what a crop may show once it is turned. The crop itself lies inside the image where that is
    large enough, as with MONAI's RandCropByLabelClassesd, whose rule for centres is used.
    """

    def __init__(self, crop: Size, reach: Sequence[int], classes: int, random_share: float) -> None:
        super().__init__(_KEYS)
        self._crop, self._reach = crop, tuple(reach)
        self._ratios = [0, *(1 for _ in range(classes - 1))]
        self._random_share = random_share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        cropped = dict(data)
        places = cropped.pop("places")
        centre = self._centre(places, cropped["label"].shape[1:])
        for key in _KEYS:
            cropped[key] = _region(cropped[key], centre, self._reach)
        return cropped

    def _centre(self, places: Sequence[npt.NDArray[np.int64]], shape: Sequence[int]) -> list[int]:
        anywhere = self.R.uniform() < self._random_share
        if anywhere or not any(len(of_class) for of_class in places[1:]):
            places, ratios = [np.array([self.R.randint(int(np.prod(shape)))])], [1]
        else:
            ratios = self._ratios
        (centre,) = generate_label_classes_crop_centers(
            self._crop, 1, shape, places, ratios, self.R, allow_smaller=True, warn=False
        )
        return [
            at if size >= side else size // 2 for at, size, side in zip(centre, shape, self._crop, strict=True)
        ]


class RandTurnAndScaled(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """Rotation about the depth axis by up to a right angle, and one scale for all axes, each by its own chance.

    MONAI's RandAffined draws both or neither, and a scale for every axis.
    """

    def __init__(self) -> None:
        MapTransform.__init__(self, _KEYS)
        RandomizableTransform.__init__(self, 1.0)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        turned = dict(data)
        turns, scales = self.R.uniform() < _TURNS, self.R.uniform() < _SCALES
        angle, scale = self.R.uniform(-np.pi / 2, np.pi / 2), self.R.uniform(*_ZOOM)
        if turns or scales:
            for key, mode in zip(_KEYS, ("bilinear", "nearest"), strict=True):
                move = Affine(
                    rotate_params=(angle if turns else 0.0, 0.0, 0.0),
                    scale_params=(scale if scales else 1.0,) * 3,
                    mode=mode,
                    padding_mode="zeros",
                    image_only=True,
                )
                turned[key] = move(turned[key])
        return turned


def _grown(side: int) -> int:
    """So much more that what is added is the same on both sides."""
    return side + 2 * int(np.ceil((_REACH - 1) * side / 2))


def _region(array_CDHW: npt.NDArray[Any], centre: Sequence[int], size: Sequence[int]) -> Tensor:
    """`size` voxels around `centre` as floats, with 0 outside of the array."""
    starts = [at - side // 2 for at, side in zip(centre, size, strict=True)]
    inside = tuple(
        slice(max(start, 0), max(min(start + side, whole), 0))
        for start, side, whole in zip(starts, size, array_CDHW.shape[1:], strict=True)
    )
    part = torch.from_numpy(array_CDHW)[(slice(None), *inside)].float()
    pads = [
        (cut.start - start, start + side - cut.stop)
        for cut, start, side in zip(inside, starts, size, strict=True)
    ]
    return F.pad(part, [pad for pair in reversed(pads) for pad in pair])


def _together(crops: Sequence[Crop]) -> Crop:
    return Crop(
        torch.stack([crop.image for crop in crops]),
        torch.stack([crop.label for crop in crops]),
        tuple(name for crop in crops for name in crop.names),
    )
