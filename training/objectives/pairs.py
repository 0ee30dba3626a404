"""What objectives share that compare two crops of an image: network, momentum, held-out pairs.

A crop's embedding is that of its class token.

Shape suffixes: B crops, C features of a token, N images of the whole batch, P features that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import render
from training.data import RunData
from training.loader import RawBatch
from training.mim import NormalisedViT
from training.pictures import Row, caption, contact_sheet, middle_slice
from training.plan import overlap
from training.run import Run
from training.validation import evaluating

_WINDOW = 0.75
"""Share of the rows and columns of tokens that each of two crops of a held-out image has."""


class ProjectedViT(NormalisedViT):
    """A universal ViT and a projector of its class token, which those that inherit build."""

    projector: nn.Module

    def embed(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Embeddings (B, P) of crops (B, 3, D, H, W) in [0, 1], of any length."""
        return self.projector(self.features(x_BCDHW, level)[:, 0])  # type: ignore[no-any-return]


def momentum_of(step: int, steps: int, first: float) -> float:
    """Share of the slower network that `step` leaves: half a cosine from `first` up to 1 in the last step."""
    progress = step / max(steps - 1, 1)
    return 1 - (1 - first) * (1 + math.cos(math.pi * progress)) / 2


def mean_overlap(part: RawBatch, device: torch.device) -> Tensor:
    """Mean share of the smaller field of view that the two crops of an image have in common, scalar."""
    crops, size = part.plan.samples, part.plan.crop_size
    shares = [overlap(one, other, size) for one, other in zip(crops[::2], crops[1::2], strict=True)]
    # Filled on the device: a copy to a GPU would wait for all that it still has to do.
    return torch.full((), math.fsum(shares) / len(shares), device=device)


class Retrieval(NamedTuple):
    """Of each embedding, which of the others is nearest."""

    nearest: Tensor
    """(N,)"""
    accuracy: float
    """Share for which it is the one of the same image; by chance 1 / N."""


def retrieve(queries_NP: Tensor, keys_NP: Tensor) -> Retrieval:
    """Compare all queries with all keys by cosine."""
    cosines_NN = F.normalize(queries_NP, dim=1) @ F.normalize(keys_NP, dim=1).t()
    nearest_N = cosines_NN.argmax(dim=1)
    right_N = nearest_N == torch.arange(len(nearest_N), device=nearest_N.device)
    return Retrieval(nearest_N, float(right_N.float().mean()))


def windows(x_BCDHW: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Two crops of a crop, of whole tokens: its lower and its upper rows and columns, all of its slices."""
    height, width = (math.ceil(_WINDOW * size / patch) * patch for size in x_BCDHW.shape[3:])
    return x_BCDHW[..., :height, :width], x_BCDHW[..., -height:, -width:]


class Compared(NamedTuple):
    """How an objective compares two sets of crops; embeddings of any length."""

    query: Callable[[Tensor, int], Tensor]
    """Embeddings (B, P) of crops (B, 3, D, H, W) of a level: of those that ask."""
    key: Callable[[Tensor, int], Tensor]
    """Of those that are asked for."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Scalar, of all queries and keys (N, P) in float32."""
    networks: Sequence[NormalisedViT]
    """What they use."""
    title: str
    """Of the picture."""


def validate_pairs(run: Run, data: RunData, compared: Compared, step: int) -> dict[str, float]:
    """Look at every held-out image in two overlapping windows of its centre crop, and compare all with all.

    `retrieval` is the share of images whose first window finds its second one among those of all. Logs it and
    the loss, and draws both windows beside the one that was found.
    """
    queries, keys, captions, panels = [], [], [], []
    patch = compared.networks[0].vit.config.patch
    with evaluating(*compared.networks):
        for batch in data.validation:
            crops = render(batch, run.device)
            first, second = windows(crops.voxels, patch)
            with run.autocast():
                queries.append(compared.query(first, crops.level).float())
                keys.append(compared.key(second, crops.level).float())
            captions += [caption(data.modalities[name], name, crops.level) for name in crops.keys]
            panels += [(middle_slice(one), middle_slice(two)) for one, two in zip(first, second, strict=True)]
        queries_NP, keys_NP = torch.cat(queries), torch.cat(keys)
        loss, found = float(compared.loss(queries_NP, keys_NP)), retrieve(queries_NP, keys_NP)
    measured = {
        f"{data.validation_name}/loss": loss,
        f"{data.validation_name}/retrieval": found.accuracy,
    }
    run.log(step, measured)
    if run.world.rank == 0:
        shown = zip(captions, panels, found.nearest.tolist(), strict=True)
        rows = [Row(text, [*both, panels[at][1]]) for text, both, at in shown]
        rows.sort(key=lambda row: row.caption)
        columns = ["one window", "the other", "found nearest"]
        contact_sheet(run.picture_file(step), f"{compared.title}, step {step + 1}", columns, rows)
    return measured
