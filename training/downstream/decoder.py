"""From the stages of a backbone to a label for every voxel: a plain U-Net decoder with deep supervision.

PUMIT, section on segmentation: a plain ViT has one grid for all of its blocks, so transposed convolutions and a
pooling make a pyramid of four of them. Resolution follows the anisotropy of the voxels, as the patches of the
ViT do: steps near the full resolution leave the depth alone until voxels are about isotropic.

Shape suffixes: B crops, C channels, D, H, W voxels, K classes with the background first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetUpBlock, get_conv_layer
from torch import Tensor, nn

from catalog.errors import SetupError
from training.backbone import Backbone, Spacing
from training.downstream.initialisations import as_module

Size = tuple[int, int, int]
"""Voxels, positions or factors along (D, H, W)."""

SUPERVISED = 4
"""Resolutions that have a head of their own while training, from the full one down."""
_MOST_CHANNELS = 512
_NORM = ("instance", {"affine": True})
_ACTIVATION = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})
_FACTORS = (1, 2, 4, 8, 16, 32, 64)


class SegmentationNet(nn.Module):
    """A backbone, the pyramid of its stages, and a decoder that ends at full resolution.

    Stages of one size, as those of a plain ViT, become a pyramid; stages that grow coarser are taken as they
    are. What is finer than the finest stage is filled by convolutions on the image itself.
    """

    def __init__(
        self, backbone: Backbone, *, channels: int, classes: int, crop: Size, spacing: Spacing, width: int
    ) -> None:
        """Build for crops (B, channels, *crop) of `spacing`, with `classes` including the background.

        `width` is the number of channels at full resolution; it doubles with each step down, to at most 512.
        Runs the backbone once to see its stages. Raises SetupError where the crop does not suit it.
        """
        super().__init__()
        self.backbone = as_module(backbone)
        self.frozen = not any(parameter.requires_grad for parameter in self.backbone.parameters())
        self.spacing = spacing
        self.three_channels = _three_channels(channels)
        grids = self._grids(crop)
        of_stages = backbone.stage_channels
        plain = len(grids) > 1 and len(set(grids)) == 1
        self.pyramid = nn.ModuleList(nn.Identity() for _ in grids)
        if plain:
            self.pyramid, of_stages, grids = _pyramid(of_stages, _factor(crop, grids[0]), grids[0])
        if max(grids[-1]) == 1:
            raise SetupError(
                f"a crop of {_by(crop)} voxels leaves one position at the coarsest resolution, which cannot be "
                "normalised: choose a larger --set images.crop"
            )
        steps = halvings(_factor(crop, grids[0]))
        factors = [*steps, *(_factor(fine, coarse) for fine, coarse in pairwise(grids))]
        widths = [min(width << level, _MOST_CHANNELS) for level in range(len(factors) + 1)]
        inside = len(steps)
        kernels = [(3 if step[0] == 2 else 1, 3, 3) for step in steps]
        self.encoders = nn.ModuleList(
            UnetBasicBlock(
                3,
                widths[level - 1] if level else channels,
                widths[level],
                kernels[level],
                steps[level - 1] if level else 1,
                _NORM,
            )
            for level in range(inside)
        )
        self.laterals = nn.ModuleList(
            get_conv_layer(3, given, wanted, 1, norm=_NORM, act=_ACTIVATION, conv_only=False)
            for given, wanted in zip(of_stages, widths[inside:], strict=True)
        )
        self.ups = nn.ModuleList(
            UnetUpBlock(
                3,
                widths[level + 1],
                widths[level],
                kernels[level] if level < inside else 3,
                1,
                factor,
                _NORM,
            )
            for level, factor in enumerate(factors)
        )
        self.heads = nn.ModuleList(
            UnetOutBlock(3, wide, classes) for wide in widths[: max(min(SUPERVISED, len(factors)), 1)]
        )

    def forward(self, image_BCDHW: Tensor) -> list[Tensor]:
        """Logits (B, K, D, H, W) at full resolution, and in training at coarser ones after it."""
        features = cast(Backbone, self.backbone).forward_features(
            self.three_channels(image_BCDHW), self.spacing
        )
        skips, x = [], image_BCDHW
        for encode in self.encoders:
            x = encode(x)
            skips.append(x)
        skips += [
            lateral(resize(stage))
            for lateral, resize, stage in zip(self.laterals, self.pyramid, features.stages, strict=True)
        ]
        decoded = [skips[-1]]
        for up, skip in zip(reversed(self.ups), reversed(skips[:-1]), strict=True):
            decoded.append(up(decoded[-1], skip))
        heads = self.heads if self.training else self.heads[:1]
        return [head(x) for head, x in zip(heads, reversed(decoded), strict=False)]

    def train(self, mode: bool = True) -> SegmentationNet:
        """A frozen backbone stays in evaluation mode: nothing of it is to vary."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def _grids(self, crop: Size) -> list[Size]:
        """The grid of each stage for a crop."""
        mode = self.backbone.training
        self.backbone.eval()
        device = next((parameter.device for parameter in self.backbone.parameters()), torch.device("cpu"))
        with torch.no_grad():
            seen = cast(Backbone, self.backbone).forward_features(
                torch.zeros(1, 3, *crop, device=device), self.spacing
            )
        self.backbone.train(mode)
        return [cast(Size, tuple(stage.shape[2:])) for stage in seen.stages]


def supervision(heads: int) -> nn.Module:
    """Dice plus cross entropy, summed over the heads with weights 0.5^i that add up to 1.

    Called with the logits of `SegmentationNet` in training and labels (B, 1, D, H, W); for coarser heads the
    labels are shrunk to the nearest voxel.
    """
    weights = [0.5**head for head in range(heads)]
    loss = DiceCELoss(include_background=True, to_onehot_y=True, softmax=True)
    return cast(nn.Module, DeepSupervisionLoss(loss, weights=[weight / sum(weights) for weight in weights]))


def halvings(factor: Size) -> list[Size]:
    """The steps by which `factor` is reached, each 1 or 2 an axis; axes with fewer steps take the last ones.

    So at patches of 4 x 16 x 16 voxels the first two steps leave the depth as it is.
    """
    counts = [side.bit_length() - 1 for side in factor]
    most = max(counts)
    return [cast(Size, tuple(2 if step >= most - count else 1 for count in counts)) for step in range(most)]


def _pyramid(
    channels: Sequence[int], patch: Size, grid: Size
) -> tuple[nn.ModuleList, tuple[int, ...], list[Size]]:
    """Layers that bring stages of one grid to resolutions of their own; their channels and grids.

    The last stage is pooled, the one before it stays, each earlier one is a step finer than the next.
    """
    steps = halvings(patch)
    pool = cast(Size, tuple(2 if side > 1 else 1 for side in grid))
    if any(side % factor for side, factor in zip(grid, pool, strict=True)):
        raise SetupError(
            f"the backbone sees {_by(grid)} tokens in a crop, which cannot be halved along each axis: choose a "
            f"--set images.crop of multiples of {_by(_times(patch, pool))} voxels"
        )
    if len(channels) - 2 > len(steps):
        raise SetupError(
            f"{len(channels)} stages of one size take patches of {2 ** (len(channels) - 2)} voxels"
        )
    layers: list[nn.Module] = []
    out: list[int] = []
    grids: list[Size] = []
    for number, given in enumerate(channels):
        ups = len(channels) - 2 - number
        if ups < 0:
            layers.append(nn.MaxPool3d(pool))
            out.append(given)
            grids.append(cast(Size, tuple(side // f for side, f in zip(grid, pool, strict=True))))
            continue
        finer: list[nn.Module] = []
        now, size = given, grid
        for step in reversed(steps[len(steps) - ups :]):
            if finer:
                finer += [nn.InstanceNorm3d(now, affine=True), nn.LeakyReLU(0.01)]
            wanted = max(now // 2, 1)
            finer.append(nn.ConvTranspose3d(now, wanted, step, step))
            now, size = wanted, _times(size, step)
        layers.append(nn.Sequential(*finer))
        out.append(now)
        grids.append(size)
    return nn.ModuleList(layers), tuple(out), grids


def _three_channels(channels: int) -> nn.Module:
    """What a backbone sees of an image of so many channels; a new mixture starts as their mean."""
    if channels == 3:
        return nn.Identity()
    if channels == 1:
        return _Repeat()
    mix = nn.Conv3d(channels, 3, 1)
    nn.init.constant_(mix.weight, 1 / channels)
    nn.init.zeros_(cast(Tensor, mix.bias))
    return mix


class _Repeat(nn.Module):
    def forward(self, image_B1DHW: Tensor) -> Tensor:
        return image_B1DHW.expand(-1, 3, -1, -1, -1)


def _factor(fine: Size, coarse: Size) -> Size:
    """How many positions of `fine` one of `coarse` stands for."""
    factor = cast(Size, tuple(f // c for f, c in zip(fine, coarse, strict=True)))
    if _times(coarse, factor) != fine or any(side not in _FACTORS for side in factor):
        raise SetupError(
            f"a grid of {_by(coarse)} does not halve one of {_by(fine)}: choose a --set images.crop that the "
            "strides of the backbone, which must be powers of two, divide"
        )
    return factor


def _times(size: Size, factor: Size) -> Size:
    return cast(Size, tuple(side * f for side, f in zip(size, factor, strict=True)))


def _by(size: Size) -> str:
    return " x ".join(map(str, size))
