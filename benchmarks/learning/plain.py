"""The tokenizer without spatial adaptivity: images are resampled to isotropic voxels, convolutions are plain.

What most networks for volumes do. At level 0 a spatially adaptive layer is a plain 3-D one, so the same network
serves: thick slices are interpolated to 2^level thin ones before it, and averaged again behind it. Losses and
measures see the image's own slices in both designs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from training.config import TokenizerModelConfig
from training.models import build_tokenizer
from training.tokenizer import Tokenizer, TokenizerOutput


class PlainTokenizer(Tokenizer):
    """A tokenizer of volumes that sees all of them at level 0; parameters are those of `Tokenizer`."""

    @classmethod
    def build(cls, model: TokenizerModelConfig) -> PlainTokenizer:
        start = build_tokenizer(model)
        plain = cls(start.config)
        plain.load_state_dict(start.state_dict())
        return plain

    def forward(self, x_BCDHW: Tensor, level: int) -> TokenizerOutput:
        slices = 1 << level
        thin = x_BCDHW
        if slices > 1:
            depth, height, width = x_BCDHW.shape[2:]
            thin = F.interpolate(x_BCDHW, size=(depth * slices, height, width), mode="trilinear")
        output = super().forward(thin, 0)
        return output._replace(reconstruction=F.avg_pool3d(output.reconstruction, (slices, 1, 1)))
