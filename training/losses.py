"""Losses of the tokenizer: reconstruction, perceptual, prior, adversarial; and the gate of the last one.

    total = L1 + perceptual * LPIPS + diversity * sum m log m + sharpness * entropy [+ adversarial * GAN]

Every term is a mean over the crops a process holds, except `diversity`, which is already taken over all
processes; averaged over processes with the number of crops as weight, the gradient is that of the whole batch.

Shape suffixes: B crops, C channels, D depth, H height, W width, S slices drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.lpips import LPIPS
from training.rng import Stream, uniforms
from training.transfer import sent


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the generator's loss, one for each of its terms."""

    reconstruction: float
    perceptual: float
    """2 is what 1 is in the paper's code, whose LPIPS is doubled (training.lpips)."""
    diversity: float
    """Not negative, as all weights: a larger one spreads the tokens of a batch over more codes."""
    sharpness: float
    """Not negative: a larger one makes each token surer of its code."""
    adversarial: float
    codebook: float = 1.0
    """Of the nearest-neighbour quantizer's own loss."""


@dataclass(frozen=True)
class GeneratorLosses:
    """Unweighted terms of one batch, scalars. A term that does not take part is None."""

    reconstruction: Tensor
    """Mean absolute difference, images in [-1, 1]."""
    diversity: Tensor
    sharpness: Tensor
    perceptual: Tensor | None = None
    """LPIPS; None without perceptual weights."""
    codebook: Tensor | None = None
    """None unless the quantizer is the nearest-neighbour one."""
    adversarial: Tensor | None = None
    """None while the gate is shut: the discriminator then need not see the reconstruction."""

    def total(self, weights: LossWeights) -> Tensor:
        """Weighted sum of the terms that take part."""
        total = torch.zeros_like(self.reconstruction)
        for field in fields(self):
            term = getattr(self, field.name)
            if term is not None:
                total = total + getattr(weights, field.name) * term
        return total


class GateState(NamedTuple):
    """When the adversarial term takes part: once the discriminator is good, and only while it is.

    Floats that belong into the checkpoint. All processes must update it with the same (averaged) loss.
    """

    ema: float = 0.1
    """Moving average of the discriminator's loss."""
    last: float = 0.1
    """Its last value."""

    def updated(self, discriminator_loss: float, *, momentum: float = 0.9) -> GateState:
        """After one more step. A loss that is not finite shuts the gate, and stays out of the average."""
        if not math.isfinite(discriminator_loss):
            return GateState(self.ema, discriminator_loss)
        return GateState(momentum * self.ema + (1 - momentum) * discriminator_loss, discriminator_loss)

    def is_open(self, threshold: float = 0.025) -> bool:
        """max(ema, last) <= threshold: neither one lucky batch nor a good past opens it, and NaN never does."""
        return self.ema <= threshold and self.last <= threshold


def reconstruction_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean absolute difference (scalar) over all voxels and channels."""
    return F.l1_loss(reconstruction, image)


def perceptual_loss(
    lpips: LPIPS, reconstruction_BCDHW: Tensor, image_BCDHW: Tensor, slices_BS: Tensor | None
) -> Tensor:
    """LPIPS (scalar) of the slices `slices_BS` (int64 indices along the depth), or of every slice if None."""
    return lpips(_take(reconstruction_BCDHW, slices_BS), _take(image_BCDHW, slices_BS))  # type: ignore[no-any-return]


def draw_slices(depth: int, *, seed: int, step: int, samples: Sequence[int], limit: int = 24) -> Tensor | None:
    """Which slices of each crop LPIPS sees: (B, limit) int64, ascending, without repetition; on the CPU.

    A pure function of the seed, the step and each crop's index in the global batch (`samples`, B of them), so
    it does not depend on how crops are spread over processes. None when a crop has no more than `limit` slices.
    """
    if depth <= limit:
        return None
    noise = np.concatenate([uniforms(seed, Stream.SLICES, step, sample, 1, depth) for sample in samples])
    return torch.from_numpy(np.sort(np.argsort(noise, axis=1)[:, :limit], axis=1))


def generator_adversarial_loss(score_fake: Tensor) -> Tensor:
    """-mean(score): what the discriminator makes of reconstructions, to be raised."""
    return -score_fake.mean()


def discriminator_loss(score_real: Tensor, score_fake: Tensor) -> Tensor:
    """Half the hinge loss, (mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return (F.relu(1 - score_real).mean() + F.relu(1 + score_fake).mean()) / 2


def _take(x_BCDHW: Tensor, slices_BS: Tensor | None) -> Tensor:
    """The chosen slices of each crop as one batch of pictures, (B * S, C, H, W)."""
    x_BDCHW = x_BCDHW.movedim(2, 1)
    if slices_BS is None:
        return x_BDCHW.flatten(0, 1)
    crops_B1 = torch.arange(len(slices_BS), device=x_BCDHW.device)[:, None]
    return x_BDCHW[crops_B1, sent(slices_BS, x_BCDHW.device)].flatten(0, 1)
