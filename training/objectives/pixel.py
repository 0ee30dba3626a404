"""Masked image modelling without a tokenizer: predict the voxels of hidden patches, as SimMIM and MAE do.

The network hides patches as the paper's does (`training.mim.MaskedViT`) and has SimMIM's head, one linear
layer. Its targets are MAE's: the voxels of a patch, normalised to mean 0 and deviation 1 of that patch.

A token stands for 16 x 16 voxels in-plane and 16 >> level slices, so the head must give fewer voxels for thick
slices. It is the transpose of the patch embedding, `SACTransposedConv3d`: 16 x 16 x 16 voxels at level 0, and
where one thick slice stands for 2^level thin ones, the mean of what the head says of those. The embedding sums
the taps that meet one thick slice; here the mean is taken, since the value of a thick slice is that of the thin
ones it stands for and not their sum, so one head serves all levels at one scale. It equals predicting the
isotropic patch and pooling it along depth (pooling is linear), without the voxels that are then pooled away.

Shape suffixes: B crops, D H W voxels, d h w tokens, L = d * h * w, V visible and M = L - V hidden tokens,
P values of a patch in the order (channel, z, y, x).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import Crops, render
from training.config import MimRunConfig
from training.data import RunData
from training.loader import RawBatch
from training.mim import MaskedViT, MaskingConfig, masked_index, visible_mask
from training.models import masked_blocks, vit_config
from training.objectives.masks import draw_visible, masked_panel
from training.objectives.objective import Recipe
from training.pictures import Row, caption, contact_sheet, middle_slice
from training.rope import Grid
from training.run import Run
from training.sac import SACTransposedConv3d, SpatialState
from training.transfer import sent
from training.validation import Means, evaluating
from training.vit import INIT_STD, token_grid

_EPSILON = 1e-6
"""Added to the variance of a patch, as in MAE: a patch of one value has the target 0 everywhere."""


def recipe(config: MimRunConfig) -> Recipe[MaskedPixelModel]:
    """Predict pixels; nothing else is needed."""
    masking = MaskingConfig(
        vit=vit_config(config), mask_ratio=config.model.mask_ratio, mask_layer_ids=masked_blocks(config)
    )
    return Recipe(build=partial(MaskedPixelModel, masking), begin=partial(MaskedPixels, config))


class MaskedPixelModel(MaskedViT):
    """A masked ViT and a linear head that predicts normalised voxels, from crops as `MaskedViT` takes them."""

    def __init__(self, config: MaskingConfig) -> None:
        super().__init__(config)
        vit = config.vit
        self.head = SACTransposedConv3d(vit.dim, vit.in_channels, vit.patch, merge="mean")
        nn.init.trunc_normal_(self.mask_token, std=INIT_STD)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.get_parameter("bias"))

    def forward(self, x_BCDHW: Tensor, level: int, visible_index_BV: Tensor) -> Tensor:
        """Normalised voxels (B, 3, D, H, W) of every patch; only those of hidden ones are trained."""
        patch = self.vit.config.patch
        _, _, depth, height, width = x_BCDHW.shape
        grid = token_grid((depth, height, width), level, patch)
        tokens_BLC = self.encode(x_BCDHW, level, visible_index_BV)[:, 1:]
        tokens_BCdhw = tokens_BLC.transpose(1, 2).reshape(len(tokens_BLC), -1, *grid)
        voxels_BCDHW, _ = self.head(tokens_BCdhw, SpatialState(level, patch.bit_length() - 1))
        return voxels_BCDHW  # type: ignore[no-any-return]


def to_patches(x_BCDHW: Tensor, grid: Grid) -> Tensor:
    """The crop cut into the patches of a grid of tokens, (B, L, P) in (z, y, x) order."""
    size = x_BCDHW.shape[2:]
    axes = [part for tokens, voxels in zip(grid, size, strict=True) for part in (tokens, voxels // tokens)]
    return x_BCDHW.reshape(*x_BCDHW.shape[:2], *axes).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def to_crop(patches_BLP: Tensor, grid: Grid, size: tuple[int, int, int]) -> Tensor:
    """The reverse: a crop (B, C, D, H, W) of `size` (D, H, W)."""
    inner = [voxels // tokens for voxels, tokens in zip(size, grid, strict=True)]
    x = patches_BLP.reshape(len(patches_BLP), *grid, -1, *inner).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(len(x), -1, *size)


class Target(NamedTuple):
    """Patches as the network is to predict them, and what makes voxels of them again."""

    normalised: Tensor
    """(B, L, P)"""
    mean: Tensor
    """(B, L, 1)"""
    deviation: Tensor
    """(B, L, 1)"""

    @classmethod
    def of(cls, patches_BLP: Tensor) -> Target:
        """In float32."""
        patches_BLP = patches_BLP.float()
        variance_BL1, mean_BL1 = torch.var_mean(patches_BLP, dim=-1, keepdim=True)
        deviation_BL1 = (variance_BL1 + _EPSILON).sqrt()
        return cls((patches_BLP - mean_BL1) / deviation_BL1, mean_BL1, deviation_BL1)

    def voxels(self, normalised_BLP: Tensor) -> Tensor:
        """What a prediction means, (B, L, P): with the mean and deviation of the true patches."""
        return normalised_BLP * self.deviation + self.mean


class PixelLoss(NamedTuple):
    """Means over the hidden patches of a batch; float32 scalars."""

    loss: Tensor
    """Squared error of the normalised voxels. It alone has a gradient."""
    of_mean: Tensor
    """The same of a network that says 0 everywhere: near 1, and less with patches of a single value."""


def pixel_loss(predicted_BLP: Tensor, target: Target, visible_index_BV: Tensor) -> PixelLoss:
    """Compare predictions with the normalised voxels of hidden patches."""
    _, length, values = predicted_BLP.shape
    rows_BMP = masked_index(visible_index_BV, length).unsqueeze(-1).expand(-1, -1, values)
    with torch.autocast(predicted_BLP.device.type, enabled=False):
        target_BMP = target.normalised.gather(1, rows_BMP)
        loss = F.mse_loss(predicted_BLP.gather(1, rows_BMP).float(), target_BMP)
    return PixelLoss(loss=loss, of_mean=target_BMP.square().mean())


class MaskedPixels:
    """The objective that predicts pixels."""

    def __init__(self, config: MimRunConfig, run: Run, data: RunData, model: MaskedPixelModel) -> None:
        self._config, self._run, self._data = config, run, data
        self.companions: Mapping[str, nn.Module] = {}
        self.encoder = model

    def losses(self, trained: nn.Module, part: RawBatch) -> Mapping[str, Tensor]:
        """The fields of `PixelLoss`."""
        crops = render(part, self._run.device)
        return self._compare(trained, part, crops).losses._asdict()

    def finish_step(self, step: int) -> Mapping[str, float]:
        """Nothing is due."""
        return {}

    def validate(self, step: int) -> dict[str, float]:
        """Measure predictions of hidden patches under fixed masks: the fields of `PixelLoss`."""
        run, data = self._run, self._data
        means, rows = Means(), []
        with evaluating(self.encoder):
            for batch in data.validation:
                crops = render(batch, run.device)
                compared = self._compare(self.encoder, batch, crops)
                means.add(len(crops.keys), compared.losses._asdict())
                rows += _picture_rows(data, crops, compared)
        measured = {f"{data.validation_name}/{name}": value for name, value in means.result().items()}
        run.log(step, measured)
        if run.world.rank == 0:
            rows.sort(key=lambda row: row.caption)
            columns = ["input", "masked", "prediction"]
            contact_sheet(run.picture_file(step), f"masked pixels, step {step + 1}", columns, rows)
        return measured

    def _compare(self, network: nn.Module, batch: RawBatch, crops: Crops) -> _Compared:
        patch = self.encoder.vit.config.patch
        grid = token_grid(batch.plan.crop_size, crops.level, patch)
        length = grid[0] * grid[1] * grid[2]
        visible_BV = sent(draw_visible(self._config, batch, length), self._run.device)
        with self._run.autocast():
            predicted_BCDHW = network(crops.voxels, crops.level, visible_BV)
        target = Target.of(to_patches(crops.voxels, grid))
        predicted_BLP = to_patches(predicted_BCDHW, grid)
        return _Compared(grid, visible_BV, predicted_BLP, target, pixel_loss(predicted_BLP, target, visible_BV))


class _Compared(NamedTuple):
    """What a network made of a batch."""

    grid: Grid
    visible: Tensor
    """(B, V)"""
    predicted: Tensor
    """(B, L, P)"""
    target: Target
    losses: PixelLoss


def _picture_rows(data: RunData, crops: Crops, compared: _Compared) -> list[Row]:
    """Each crop as it is, masked, and with its hidden patches predicted."""
    depth, height, width = crops.voxels.shape[2:]
    visible_BL = visible_mask(compared.visible, compared.predicted.shape[1])
    voxels_BLP = compared.target.voxels(compared.predicted.float())
    shown_BLP = torch.where(visible_BL[..., None], to_patches(crops.voxels, compared.grid), voxels_BLP)
    predicted_BCDHW = to_crop(shown_BLP, compared.grid, (depth, height, width))
    visible_Bdhw = visible_BL.view(-1, *compared.grid)
    rows = []
    for number, key in enumerate(crops.keys):
        panel = middle_slice(crops.voxels[number])
        masked = masked_panel(panel, visible_Bdhw[number], depth)
        panels = [panel, masked, middle_slice(predicted_BCDHW[number])]
        rows.append(Row(caption(data.modalities[key], key, crops.level), panels))
    return rows
