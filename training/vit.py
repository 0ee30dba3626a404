"""The universal ViT: one EVA-02 transformer for 2-D and 3-D images of any slice distance.

PUMIT, section on the universal ViT. A spatially adaptive patch embedding turns a crop of any level of
anisotropy into tokens of about equal physical shape. What follows is EVA-02 (Fang et al., 2023): pre-norm
blocks, SwiGLU with an inner norm, separate query, key and value projections, and rotary embedding, here
additive in 3-D, beside a learned position table.

Shape suffixes: B crops, C features, D, H, W voxels, d, h, w tokens along each axis, L = 1 + d * h * w tokens
with the class token first, N heads, n features of a head.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catalog.errors import SetupError
from training.onednn import Linear
from training.rope import BASES, Grid, Rotation, class_and_grid_rotation
from training.sac import SACConv3d, SpatialState

INIT_STD = 0.02
"""Standard deviation of new weights, as in BEiT and EVA-02."""


class ViTConfig(BaseModel):
    """Shape of a universal ViT. The defaults are those of the paper's ViT-B."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(default=768, gt=0)
    """Features of a token."""
    depth: int = Field(default=12, gt=0)
    """Transformer blocks."""
    heads: int = Field(default=12, gt=0)
    patch: int = Field(default=16, gt=0)
    """Voxels of a token along each axis of an isotropic image; a power of two."""
    in_channels: int = Field(default=3, gt=0)
    position_grid: tuple[int, int, int] = (5, 10, 10)
    """Shape of the position table in tokens (z, y, x); resampled to the grid of each batch."""
    mlp_ratio: float = Field(default=8 / 3, gt=0)
    """Hidden features of the MLP per feature of a token, rounded down."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Of all layer norms: 1e-5 in the published models, 1e-6 in 2-D EVA-02."""
    rope_bases: tuple[float, float, float] = BASES
    """Bases of the rotary frequencies along (z, y, x)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Chance that training skips a branch of the last block; falls linearly to 0 at the first."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"dim / heads must be a multiple of 4 for the rotary embedding, got {self.dim} / {self.heads}"
            )
        if self.patch & (self.patch - 1):
            raise ValueError(f"patch must be a power of two, got {self.patch}")
        if min(self.position_grid) < 1:
            raise ValueError(f"position_grid needs at least one token an axis, got {self.position_grid}")
        return self

    @classmethod
    def base(cls, **changes: Any) -> Self:
        """ViT-B of the paper: 86 M parameters beside the patch embedding and the position table."""
        return cls(**{"dim": 768, "depth": 12, "heads": 12, **changes})

    @classmethod
    def large(cls, **changes: Any) -> Self:
        """ViT-L: four times the work of ViT-B."""
        return cls(**{"dim": 1024, "depth": 24, "heads": 16, **changes})


def token_voxels(level: int, patch: int) -> tuple[int, int, int]:
    """Voxels (D, H, W) of a token: `patch` rows and columns, and `patch >> level` slices but at least one."""
    return max(patch >> level, 1), patch, patch


def token_grid(size: tuple[int, int, int], level: int, patch: int) -> Grid:
    """Tokens (d, h, w) of a crop of `size` voxels (D, H, W) at level of anisotropy `level`.

    Raises SetupError where they do not divide the crop.
    """
    slices, _, _ = token_voxels(level, patch)
    depth, height, width = size
    if depth % slices or height % patch or width % patch or min(size) < 1:
        raise SetupError(
            f"a crop of {depth} x {height} x {width} voxels at level {level} does not divide into tokens of "
            f"{slices} x {patch} x {patch}. Crop or pad it to multiples of these."
        )
    return depth // slices, height // patch, width // patch


def resample_positions(table_1Cdhw: Tensor, grid: Grid) -> Tensor:
    """The position table on another grid, (1, C, *grid).

    Axes that shrink are averaged by area, axes that grow are then interpolated linearly between the centres
    of their cells (align_corners false).
    """
    old: list[int] = list(table_1Cdhw.shape[2:])
    smaller = [min(pair) for pair in zip(old, grid, strict=True)]
    if smaller != old:
        table_1Cdhw = F.interpolate(table_1Cdhw, size=smaller, mode="area")
    if smaller != list(grid):
        table_1Cdhw = F.interpolate(table_1Cdhw, size=list(grid), mode="trilinear", align_corners=False)
    return table_1Cdhw


def initialise_linear(module: nn.Module) -> None:
    """Give every linear layer in `module` truncated normal weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Multi-head self-attention with rotary queries and keys; keys have no bias, as in EVA-02."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim, bias=False)
        self.value = Linear(dim, dim)
        self.out = Linear(dim, dim)

    def forward(self, x_BLC: Tensor, rotation: Rotation) -> Tensor:
        q_BNLn, k_BNLn, v_BNLn = (
            project(x_BLC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed_BNLn = F.scaled_dot_product_attention(rotation.rotate(q_BNLn), rotation.rotate(k_BNLn), v_BNLn)
        return self.out(mixed_BNLn.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated MLP with a norm before its last projection (the sub-LN of EVA-02)."""

    def __init__(self, dim: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.value = Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden, eps=norm_eps)
        self.out = Linear(hidden, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.out(self.norm(F.silu(self.gate(x_BLC)) * self.value(x_BLC)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a residual branch of whole crops and scale up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_BLC: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return branch_BLC
        keep = 1 - self.rate
        return branch_BLC * (branch_BLC.new_empty(len(branch_BLC), 1, 1).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Block(nn.Module):
    """Pre-norm transformer block number `index`, counted from 0."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, int(config.dim * config.mlp_ratio), config.norm_eps)
        self.drop_path = DropPath(config.drop_path * index / max(config.depth - 1, 1))
        initialise_linear(self)
        with torch.no_grad():  # as in BEiT, so that the residual stream does not grow with the depth
            for branch in (self.attention, self.mlp):
                branch.out.weight /= math.sqrt(2 * (index + 1))

    def forward(self, x_BLC: Tensor, rotation: Rotation) -> Tensor:
        x_BLC = x_BLC + self.drop_path(self.attention(self.norm1(x_BLC), rotation))
        return x_BLC + self.drop_path(self.mlp(self.norm2(x_BLC)))  # type: ignore[no-any-return]


class UniversalViT(nn.Module):
    """Encoder of 2-D and 3-D crops of any level of anisotropy.

    Input: (B, in_channels, D, H, W) floats, ImageNet-normalised, all of one level. Output: features of the
    class token and of every patch token, after the last norm.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = SACConv3d(config.in_channels, dim, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position_table = nn.Parameter(torch.empty(1, dim, *config.position_grid))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        nn.init.trunc_normal_(self.class_token, std=INIT_STD)
        nn.init.trunc_normal_(self.position_table, std=INIT_STD)

    def embed_patches(self, x_BCDHW: Tensor, level: int) -> tuple[Tensor, Grid]:
        """Patch tokens (B, d * h * w, C) without position, and their grid (d, h, w).

        Raises SetupError where the crop does not divide into tokens.
        """
        _, _, depth, height, width = x_BCDHW.shape
        grid = token_grid((depth, height, width), level, self.config.patch)
        tokens_BCdhw, _ = self.patch_embedding(x_BCDHW, SpatialState(level, 0))
        return tokens_BCdhw.flatten(2).transpose(1, 2), grid

    def positions(self, grid: Grid) -> Tensor:
        """Learned positions of the patch tokens of `grid`, (1, d * h * w, C)."""
        return resample_positions(self.position_table, grid).flatten(2).transpose(1, 2)

    def rotation(self, grid: Grid) -> Rotation:
        """Rotary embedding of the class token and of the tokens of `grid`."""
        config = self.config
        device = self.position_table.device
        return class_and_grid_rotation(grid, config.dim // config.heads, config.rope_bases, device)

    def with_class_token(self, tokens_BLC: Tensor) -> Tensor:
        """Put the class token, which has no position, before the patch tokens."""
        return torch.cat([self.class_token.expand(len(tokens_BLC), -1, -1), tokens_BLC], dim=1)

    def run_block(self, index: int, x_BLC: Tensor, rotation: Rotation) -> Tensor:
        """One transformer block; its activations are recomputed in training if the config says so."""
        block = self.blocks[index]
        if self.config.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return checkpoint(block, x_BLC, rotation, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x_BLC, rotation)  # type: ignore[no-any-return]

    def forward_features(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Features (B, L, C) of the class token, at index 0, and of the patch tokens in (z, y, x) order.

        Raises SetupError where the crop does not divide into tokens.
        """
        tokens_BLC, grid = self.embed_patches(x_BCDHW, level)
        x_BLC = self.with_class_token(tokens_BLC + self.positions(grid))
        rotation = self.rotation(grid)
        for index in range(len(self.blocks)):
            x_BLC = self.run_block(index, x_BLC, rotation)
        return self.norm(x_BLC)  # type: ignore[no-any-return]

    def forward(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """The same as `forward_features`; what wrappers such as DDP call."""
        return self.forward_features(x_BCDHW, level)
