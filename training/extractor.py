"""A trained universal ViT as a backbone: crops of any size and spacing in, tokens of several blocks out.

Shape suffixes: B crops, C features, D, H, W voxels, d, h, w tokens, L = 1 + d * h * w tokens with the class
token first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catalog.errors import SetupError
from catalog.spacing import MAX_DA_LEVEL, da_level, degree_of_anisotropy
from training.backbone import Features, Spacing
from training.mim import IMAGENET_MEAN, IMAGENET_STD
from training.rope import Grid
from training.vit import UniversalViT, token_voxels

_STAGES = (1 / 3, 1 / 2, 2 / 3, 1)
"""Depths of the stages: blocks 4, 6, 8 and 12 of 12, which feed the paper's decoder."""


def level_of(spacing: Spacing, slices: int) -> int:
    """DA level of crops of so many `slices`: that of their spacing (catalog.spacing), of a single slice 5.

    A single slice is an image in 2-D, whatever its spacing, which may be NaN. Raises SetupError if that of more
    slices is no positive number; infinity along z stands for slices to be seen one by one.
    """
    if slices == 1:
        return MAX_DA_LEVEL
    z, y, x = (float(mm) for mm in spacing)
    if not (z > 0 and 0 < y < math.inf and 0 < x < math.inf):
        raise SetupError(f"a spacing is three positive numbers, mm along (D, H, W), got {(z, y, x)}")
    return da_level(degree_of_anisotropy((z, y, x)))


class ViTBackbone(nn.Module):
    """The `training.backbone.Backbone` of a universal ViT.

    Its stages all have the grid of the tokens: `vit.config.patch` rows and columns each, and as many slices as
    the level says (`token_voxels`). All but the last are taken before the norm that ends the ViT.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, vit: UniversalViT, blocks: Sequence[int] | None = None) -> None:
        """Args: blocks: those whose tokens are stages, counted from 1, ascending, the last one being the ViT's.

        By default a third, half, two thirds and all of the way: 4, 6, 8 and 12 of 12 (PUMIT's decoder).
        Raises SetupError if the ViT has no such blocks, or was not made for images of three channels.
        """
        super().__init__()
        depth = vit.config.depth
        if blocks is None:
            blocks = [max(round(depth * share), 1) for share in _STAGES]
        if list(blocks) != sorted(blocks) or not blocks or blocks[0] < 1 or blocks[-1] != depth:
            raise SetupError(f"blocks must be ascending, from 1 on, and end with {depth}; got {list(blocks)}")
        if vit.config.in_channels != len(IMAGENET_MEAN):
            raise SetupError(f"the ViT takes {vit.config.in_channels} channels; its images must have three")
        self.vit = vit
        self.blocks = tuple(blocks)
        self.channels = vit.config.dim
        self.stage_channels = (vit.config.dim,) * len(blocks)
        for name, values in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1, 1), persistent=False)

    def token_voxels(self, level: int) -> tuple[int, int, int]:
        """Voxels (D, H, W) of a token at a DA level."""
        return token_voxels(level, self.vit.config.patch)

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        """Features of crops (B, 1 or 3, D, H, W) in [0, 1], all of one `spacing` in mm.

        Crops that do not divide into tokens are padded with 0 at the far end of each axis, by less than a
        token: 0 is what training shows beyond an image. So token i begins at voxel i * `token_voxels`, no token
        is padding alone, and the grids are those of the crop, rounded up.

        A spacing with several slices must be positive, else SetupError, and so if there are neither 1 nor 3
        channels. A single slice is taken as 2-D: level 5.
        """
        return self.features_at(image_BCDHW, level_of(spacing, image_BCDHW.shape[2]))

    def features_at(self, image_BCDHW: Tensor, level: int) -> Features:
        """As `forward_features`, of crops whose DA level is known."""
        if image_BCDHW.ndim != 5 or image_BCDHW.shape[1] not in (1, 3) or 0 in image_BCDHW.shape:
            raise SetupError(
                f"crops are (B, 1 or 3, D, H, W), D = 1 in 2-D, and not empty; got {tuple(image_BCDHW.shape)}"
            )
        vit = self.vit
        padded_BCDHW = F.pad(image_BCDHW, self._padding(image_BCDHW, level))
        # Grey crops get their three channels here: each has a mean of its own.
        tokens_BLC, grid = vit.embed_patches((padded_BCDHW - self.image_mean) / self.image_std, level)
        x_BLC = vit.with_class_token(tokens_BLC + vit.positions(grid))
        rotation = vit.rotation(grid)
        after_block = {}
        for block in range(1, vit.config.depth + 1):
            x_BLC = vit.run_block(block - 1, x_BLC, rotation)
            if block in self.blocks:
                after_block[block] = x_BLC
        after_block[vit.config.depth] = x_BLC = vit.norm(x_BLC)
        stages = tuple(_as_grid(after_block[block], grid) for block in self.blocks)
        return Features(whole=x_BLC[:, 0], stages=stages)

    def forward(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        """The same as `forward_features`; what `torch.compile` and wrappers such as DDP call."""
        return self.forward_features(image_BCDHW, spacing)

    def _padding(self, image_BCDHW: Tensor, level: int) -> list[int]:
        """Voxels to append to W, H and D, as `F.pad` counts them."""
        sizes = zip(image_BCDHW.shape[2:], self.token_voxels(level), strict=True)
        missing = [-size % voxels for size, voxels in sizes]
        return [number for more in reversed(missing) for number in (0, more)]


def _as_grid(x_BLC: Tensor, grid: Grid) -> Tensor:
    """The patch tokens as an image (B, C, d, h, w)."""
    return x_BLC[:, 1:].transpose(1, 2).reshape(len(x_BLC), -1, *grid)
