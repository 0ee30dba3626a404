"""What a pre-trained network offers to those who build on it, whatever it is and whoever trained it.

Shape suffixes: B crops, C features, D, H, W voxels, d, h, w positions of a stage.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

Spacing = tuple[float, float, float]
"""Distance of voxels in mm along (D, H, W)."""


class Features(NamedTuple):
    """What a network makes of crops."""

    whole: Tensor
    """(B, C): the class token of a ViT, the mean over positions of a convolutional network."""
    stages: tuple[Tensor, ...]
    """(B, C, d, h, w) each, from shallow to deep; the last is the network's output. Those of a plain ViT all
    have the grid of its tokens, those of a hierarchical network grow coarser."""


class Backbone(Protocol):
    """An `nn.Module` that turns crops into features."""

    channels: int
    """Features C of `whole`."""
    stage_channels: tuple[int, ...]
    """Features C of each stage."""

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        """Features of crops (B, 3, D, H, W) in [0, 1], all of one `spacing`; 2-D images have D = 1.

        A network normalises its input itself (ImageNet's mean and deviation, say). Raises SetupError where
        the size of the crops does not suit it.
        """
