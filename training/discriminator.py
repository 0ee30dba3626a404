"""Patch discriminator of the tokenizer's adversarial loss: one score a patch, on images of every DA level."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from catalog.errors import SetupError
from training.sac import SACConv3d, SACConvBlock, SpatialState

NORM_GROUPS = 16
IMAGE_CHANNELS = 3


class PatchDiscriminator(nn.Module):
    """Spatially adaptive 3 x 3 x 3 convolutions: stride 2 per stage, one more of stride 1, then the score."""

    def __init__(self, channels: Sequence[int] = (128, 256, 512)) -> None:
        """`channels` after each stage (the paper's by default); SetupError unless multiples of 16."""
        super().__init__()
        if not channels or any(width < 1 or width % NORM_GROUPS for width in channels):
            raise SetupError(
                f"discriminator.channels must be positive multiples of {NORM_GROUPS} (group norm), "
                f"got {channels}"
            )
        self.blocks = nn.ModuleList(
            SACConvBlock(before, after, groups=NORM_GROUPS, stride=2)
            for before, after in pairwise((IMAGE_CHANNELS, *channels))
        )
        self.blocks.append(SACConvBlock(channels[-1], channels[-1], groups=NORM_GROUPS))
        self.head = SACConv3d(channels[-1], 1, kernel_size=3)

    def forward(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Score the patches of images (B, 3, D, H, W) in [-1, 1] of one DA level; high means real.

        Returns (B, 1, d, h, w) of any sign, with h = H / 2^stages, rounded up.
        """
        x, state = x_BCDHW, SpatialState(level)
        for block in self.blocks:
            x, state = block(x, state)
        score: Tensor = self.head(x, state)[0]
        return score
