"""Masked image modelling: predict the tokenizer's soft tokens of hidden patches from the visible ones.

PUMIT, section on pre-training and equation 6. A fixed share of the patch tokens is hidden behind one learned
mask token. Blocks named in `mask_layer_ids` see all tokens; the others, for speed, see only the class token
and the visible ones, as an encoder of a masked autoencoder does.

Shape suffixes: B crops, C features, D, H, W voxels, L patch tokens, V visible and M = L - V masked patch
tokens, S = 1 + L tokens with the class token first, K codes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from training.onednn import Linear
from training.vit import INIT_STD, UniversalViT, ViTConfig, initialise_linear

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MASK_RATIO = 0.55
"""Share of hidden patch tokens (PUMIT, implementation)."""


def n_visible(length: int, mask_ratio: float = MASK_RATIO) -> int:
    """Patch tokens of `length` that stay visible.

    Double precision and rounding down are part of the definition: 500 tokens leave 224, not 225.
    """
    return int(length * (1 - mask_ratio))


class MaskingConfig(BaseModel):
    """A ViT that sees part of its tokens. The defaults are those of the paper's ViT-B."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vit: ViTConfig = ViTConfig()
    mask_ratio: float = Field(default=MASK_RATIO, gt=0, lt=1)
    mask_layer_ids: tuple[int, ...] = tuple(range(12))
    """Blocks, counted from 0, that see the mask tokens."""
    mask_token_position: bool = True
    """Add the position table to mask tokens too, as BEiT and EVA-02 do. The reference implementation does
    not; its published weights were trained with, and need, False."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.vit.in_channels != len(IMAGENET_MEAN):
            raise ValueError(f"pre-training normalises 3 channels, got in_channels {self.vit.in_channels}")
        ids = self.mask_layer_ids
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= self.vit.depth:
            raise ValueError(
                f"mask_layer_ids must be ascending block numbers in 0..{self.vit.depth - 1}, got {ids}"
            )
        return self


class MIMConfig(MaskingConfig):
    """A ViT with its masked modelling task. The defaults are those of the paper's ViT-B."""

    codebook_size: int = Field(default=1024, gt=1)
    """Codes of the tokenizer whose soft tokens are predicted."""

    @classmethod
    def base(cls, **changes: Any) -> Self:
        """ViT-B of the paper: every block sees the mask tokens."""
        return cls(**{"vit": ViTConfig.base(), "mask_layer_ids": tuple(range(12)), **changes})

    @classmethod
    def large(cls, **changes: Any) -> Self:
        """ViT-L: the last six of 24 blocks see the mask tokens."""
        return cls(**{"vit": ViTConfig.large(), "mask_layer_ids": tuple(range(18, 24)), **changes})


class NormalisedViT(nn.Module):
    """A universal ViT that is given crops in [0, 1]: what every pre-training has in common."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vit = UniversalViT(config)
        for name, values in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1, 1), persistent=False)

    def normalise(self, x_BCDHW: Tensor) -> Tensor:
        """Crops (B, 3, D, H, W) in [0, 1], ImageNet-normalised as the ViT takes them."""
        return (x_BCDHW - self.image_mean) / self.image_std

    def features(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Features (B, S, C) of whole crops in [0, 1], class token first, after the last norm."""
        return self.vit.forward_features(self.normalise(x_BCDHW), level)


class MaskedViT(NormalisedViT):
    """A universal ViT that sees part of its patch tokens.

    Input: crops (B, 3, D, H, W) in [0, 1], all of one level of anisotropy; they are ImageNet-normalised
    here. `visible_index_BV` (int64) holds the visible patch tokens of each crop, ascending, in (z, y, x)
    order, not counting the class token.
    """

    def __init__(self, config: MaskingConfig) -> None:
        super().__init__(config.vit)
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.vit.dim))

    def encode(self, x_BCDHW: Tensor, level: int, visible_index_BV: Tensor) -> Tensor:
        """Features (B, S, C) after the last norm, class token first.

        What hidden patches contain has no influence. Raises SetupError where the crop does not divide
        into tokens.
        """
        vit = self.vit
        tokens_BLC, grid = vit.embed_patches(self.normalise(x_BCDHW), level)
        positions_1LC = vit.positions(grid)
        visible_BL1 = visible_mask(visible_index_BV, tokens_BLC.shape[1]).unsqueeze(-1)
        if self.config.mask_token_position:
            tokens_BLC = torch.where(visible_BL1, tokens_BLC, self.mask_token) + positions_1LC
        else:
            tokens_BLC = torch.where(visible_BL1, tokens_BLC + positions_1LC, self.mask_token)
        x_BSC = vit.with_class_token(tokens_BLC)

        rotation = vit.rotation(grid)
        seen_BV = F.pad(visible_index_BV + 1, (1, 0))  # the class token is always seen
        seen_rotation = rotation.take(seen_BV)
        seen_BVC = seen_BV.unsqueeze(-1).expand(-1, -1, x_BSC.shape[-1])
        for sees_mask, blocks in itertools.groupby(
            range(self.config.vit.depth), key=self.config.mask_layer_ids.__contains__
        ):
            if sees_mask:
                for index in blocks:
                    x_BSC = vit.run_block(index, x_BSC, rotation)
            else:
                part_BVC = x_BSC.gather(1, seen_BVC)
                for index in blocks:
                    part_BVC = vit.run_block(index, part_BVC, seen_rotation)
                x_BSC = x_BSC.scatter(1, seen_BVC, part_BVC)
        return vit.norm(x_BSC)  # type: ignore[no-any-return]


class MaskedImageModel(MaskedViT):
    """A masked ViT and a head that predicts codes, from crops as `MaskedViT` takes them."""

    config: MIMConfig

    def __init__(self, config: MIMConfig) -> None:
        super().__init__(config)
        dim = config.vit.dim
        self.head = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, config.codebook_size))
        nn.init.trunc_normal_(self.mask_token, std=INIT_STD)
        initialise_linear(self.head)

    def forward(self, x_BCDHW: Tensor, level: int, visible_index_BV: Tensor) -> Tensor:
        """Logits over the codebook (B, L, K) of every patch token; only those of masked ones are trained."""
        return self.head(self.encode(x_BCDHW, level, visible_index_BV)[:, 1:])  # type: ignore[no-any-return]


def visible_mask(visible_index_BV: Tensor, length: int) -> Tensor:
    """True where a patch token is visible, (B, L) bool."""
    nothing_BL = torch.zeros(len(visible_index_BV), length, dtype=torch.bool, device=visible_index_BV.device)
    return nothing_BL.scatter(1, visible_index_BV, True)


def masked_index(visible_index_BV: Tensor, length: int) -> Tensor:
    """The patch tokens that are not visible, (B, M) int64 ascending."""
    # A stable sort puts the masked positions first in their order: the count is known, no device sync.
    order_BL = visible_mask(visible_index_BV, length).to(torch.uint8).argsort(dim=1, stable=True)
    return order_BL[:, : length - visible_index_BV.shape[1]]


class MIMLoss(NamedTuple):
    """Means over the masked tokens of a batch; scalars in float32, entropies in nats."""

    loss: Tensor
    """Cross entropy of the prediction against the soft token (PUMIT, equation 6). It alone has a gradient."""
    kl: Tensor
    """The same less the entropy of the soft token: 0 for a perfect prediction."""
    target_entropy: Tensor
    accuracy: Tensor
    """Share of tokens whose likeliest code is predicted as the likeliest."""
    accuracy_top5: Tensor
    """Share of tokens whose likeliest code is among the five likeliest predicted."""


def mim_loss(logits_BLK: Tensor, target_logits_BLK: Tensor, visible_index_BV: Tensor) -> MIMLoss:
    """Compare predictions with the tokenizer's logits at the masked positions, in float32.

    `target_logits_BLK` are the tokenizer's logits, flattened in (z, y, x) order; they get no gradient.
    """
    _, length, codes = logits_BLK.shape
    rows_BMK = masked_index(visible_index_BV, length).unsqueeze(-1).expand(-1, -1, codes)
    with torch.autocast(logits_BLK.device.type, enabled=False):
        log_q_BMK = logits_BLK.gather(1, rows_BMK).float().log_softmax(dim=-1)
        with torch.no_grad():
            log_p_BMK = target_logits_BLK.gather(1, rows_BMK).float().log_softmax(dim=-1)
            p_BMK = log_p_BMK.exp()
            entropy = torch.special.entr(p_BMK).sum(dim=-1).mean()
            best_BM1 = p_BMK.argmax(dim=-1, keepdim=True)
            hits_BM5 = log_q_BMK.topk(min(5, codes), dim=-1).indices == best_BM1
        loss = -(p_BMK * log_q_BMK).sum(dim=-1).mean()
    return MIMLoss(
        loss=loss,
        kl=loss.detach() - entropy,
        target_entropy=entropy,
        accuracy=hits_BM5[..., 0].float().mean(),
        accuracy_top5=hits_BM5.any(dim=-1).float().mean(),
    )
