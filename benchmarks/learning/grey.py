"""The features of who looks at nothing but grey values: what a pre-trained network must beat.

pumit-train finetune --task catalog:modality --init benchmarks/learning/grey.py:grey --mode linear ...
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from training.backbone import Features, Spacing

CELLS = (2, 16, 16)
"""(D, H, W) in which the voxels of an image are averaged."""


class GreyValues(nn.Module):
    """No network at all."""

    channels = CELLS[0] * CELLS[1] * CELLS[2]
    stage_channels = (1,)

    def forward_features(self, image: Tensor, spacing: Spacing) -> Features:
        """Images (B, 3, D, H, W) in [0, 1] to their means in cells."""
        grey = F.adaptive_avg_pool3d(image.mean(dim=1, keepdim=True), CELLS)
        return Features(whole=grey.flatten(1), stages=(grey,))


def grey() -> nn.Module:
    return GreyValues()
