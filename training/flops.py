"""How many floating point operations a training step takes, counted without computing anything.

A copy of the networks without data ("meta" tensors: shapes alone) makes the step for one crop while PyTorch's
counter adds up what products, convolutions and attention multiply and add; nothing else matters. What a GPU
does twice to save memory (`recompute_blocks`) counts once: the figure is of the model, not of the way in which
it is run (MFU, Chowdhery et al., 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.discriminator import PatchDiscriminator
from training.lpips import LPIPS
from training.mim import MaskedImageModel, n_visible
from training.plan import BatchPlan
from training.speed import StepWork
from training.tokenizer import Tokenizer
from training.vit import token_grid

PATCH = 16
"""Voxels of a token in-plane, of both networks."""

Network = TypeVar("Network", bound=nn.Module)


def without_data(network: Network) -> Network:
    """A copy of `network` on the device "meta", in evaluation mode; it takes no memory."""
    empty: dict[int, Tensor] = {id(b): b.to("meta") for b in network.buffers()}
    for parameter in network.parameters():
        empty[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(network, empty).eval()


def crop_tokens(size: tuple[int, int, int], level: int) -> int:
    """Tokens of a crop of `size` voxels (D, H, W)."""
    depth, height, width = token_grid(size, level, PATCH)
    return depth * height * width


class StepCounter:
    """What the steps of a training cost; each kind of step is counted once."""

    def __init__(self, batch_size: int, one_crop: Callable[[Tensor, int, bool], None]) -> None:
        """`one_crop` makes forward and backward passes of a step of voxels (1, 3, D, H, W) at a level; its last
        argument is the `variant` of the step, for trainings that have two."""
        self._batch_size = batch_size
        self._one_crop = one_crop
        self._counted: dict[tuple[int, bool], float] = {}

    def work(self, plan: BatchPlan, variant: bool = False) -> StepWork:
        """Of the whole batch, in all processes."""
        kind = plan.level, variant
        if kind not in self._counted:
            voxels = torch.empty(1, 3, *plan.crop_size, device="meta")
            with FlopCounterMode(display=False) as counter:
                self._one_crop(voxels, *kind)
            self._counted[kind] = float(counter.get_total_flops())
        tokens = self._batch_size * crop_tokens(plan.crop_size, plan.level)
        return StepWork(kind=kind, tokens=tokens, flops=self._batch_size * self._counted[kind])


def mim_counter(batch_size: int, model: MaskedImageModel, tokenizer: Tokenizer | None) -> StepCounter:
    """Of masked image modelling: the tokenizer's targets, unless they are ready; the ViT both ways."""
    model, tokenizer = without_data(model), None if tokenizer is None else without_data(tokenizer)

    def one_crop(voxels: Tensor, level: int, variant: bool) -> None:
        if tokenizer is not None:
            with torch.no_grad():
                tokenizer.encode(voxels, level)
        _, _, depth, height, width = voxels.shape
        seen = n_visible(crop_tokens((depth, height, width), level), model.config.mask_ratio)
        visible = torch.empty((1, seen), dtype=torch.int64, device="meta")
        model(voxels, level, visible).sum().backward()

    return StepCounter(batch_size, one_crop)


def tokenizer_counter(
    batch_size: int,
    tokenizer: Tokenizer,
    judge: PatchDiscriminator | None,
    lpips: LPIPS | None,
    slices: int,
) -> StepCounter:
    """Of the tokenizer; with discriminator, and perceptual term of up to `slices` slices, where they are.

    The step's variant is whether the gate lets the discriminator judge the reconstruction.
    """
    tokenizer = without_data(tokenizer)
    judge = None if judge is None else without_data(judge)
    lpips = None if lpips is None else without_data(lpips)

    def one_crop(voxels: Tensor, level: int, gate_open: bool) -> None:
        output = tokenizer(voxels, level)
        loss = output.reconstruction.sum() + output.diversity + output.sharpness
        if lpips is not None:
            taken = min(voxels.shape[2], slices)
            pictures = [x[0, :, :taken].movedim(1, 0) for x in (output.reconstruction, voxels)]
            loss = loss + lpips(*pictures)
        if judge is not None and gate_open:
            judge.requires_grad_(False)
            loss = loss + judge(output.reconstruction, level).sum()
        loss.backward()
        if judge is not None:
            judge.requires_grad_(True)
            both = torch.cat([voxels, output.reconstruction.detach()])
            judge(both, level).sum().backward()

    return StepCounter(batch_size, one_crop)
