"""Which patches a crop shows to the ViT, and how that looks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.config import MimRunConfig
from training.loader import RawBatch
from training.mim import n_visible
from training.pictures import Panel, hide
from training.plan import visible_indices


def draw_visible(config: MimRunConfig, batch: RawBatch, length: int) -> Tensor:
    """Which of `length` patch tokens each crop shows to the ViT: (B, V) int64 on the CPU, ascending.

    A function of seed, step and position in the global batch alone, so the same on any number of processes.
    """
    count = n_visible(length, config.model.mask_ratio)
    rows = [visible_indices(config.seed, batch.step, index, length, count) for index in batch.indices]
    return torch.from_numpy(np.stack(rows))


def masked_panel(panel: Panel, visible_dhw: Tensor, depth: int) -> Panel:
    """The middle slice of a crop of `depth` slices, its hidden tokens painted over."""
    return hide(panel, visible_dhw[depth // 2 * visible_dhw.shape[0] // depth])
