"""A universal ViT as a `training.backbone.Backbone`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catalog.spacing import MAX_DA_LEVEL, da_level, degree_of_anisotropy
from training.backbone import Features, Spacing
from training.mim import IMAGENET_MEAN, IMAGENET_STD
from training.vit import UniversalViT

_STAGES = (1 / 3, 1 / 2, 2 / 3, 1)


class ViTBackbone(nn.Module):
    """Stages are the tokens after a third, half, two thirds and all of the blocks."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, vit: UniversalViT) -> None:
        super().__init__()
        self.vit = vit
        self.channels = vit.config.dim
        self.blocks = tuple(max(round(vit.config.depth * share), 1) for share in _STAGES)
        self.stage_channels = (vit.config.dim,) * len(self.blocks)
        for name, values in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1, 1), persistent=False)

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        """Features of crops (B, 3, D, H, W) in [0, 1]; SetupError where they do not divide into tokens."""
        flat = image_BCDHW.shape[2] == 1
        level = MAX_DA_LEVEL if flat else da_level(degree_of_anisotropy(spacing))
        vit = self.vit
        tokens_BLC, grid = vit.embed_patches((image_BCDHW - self.image_mean) / self.image_std, level)
        x_BLC = vit.with_class_token(tokens_BLC + vit.positions(grid))
        rotation = vit.rotation(grid)
        after = {}
        for index in range(vit.config.depth):
            x_BLC = after[index + 1] = vit.run_block(index, x_BLC, rotation)
        after[vit.config.depth] = x_BLC = vit.norm(x_BLC)
        stages = tuple(
            after[block][:, 1:].transpose(1, 2).reshape(len(x_BLC), -1, *grid) for block in self.blocks
        )
        return Features(whole=x_BLC[:, 0], stages=stages)

    def forward(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        return self.forward_features(image_BCDHW, spacing)
