"""Measuring a network without disturbing its training."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random generators are afterwards what they were.

    So how often a run validates changes nothing about what it learns.
    """
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


class Means:
    """Means over images of what batches of several sizes report."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._images = 0

    def add(self, images: int, values: Mapping[str, Tensor]) -> None:
        """Count a batch: `values` are its means (scalars) over `images` images."""
        self._images += images
        for name, value in values.items():
            self._sums[name] += images * float(value)

    def result(self) -> dict[str, float]:
        """The mean of every value over all images counted."""
        return {name: total / self._images for name, total in self._sums.items()}


def psnr(reconstruction_BCDHW: Tensor, image_BCDHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: mean over the batch, scalar."""
    error_B = (reconstruction_BCDHW.float() - image_BCDHW.float()).square().flatten(1).mean(dim=1)
    # 100 dB is beyond what eight bits tell apart; a perfect image must not make the mean infinite.
    return (-10 * error_B.clamp_min(1e-10).log10()).mean()
