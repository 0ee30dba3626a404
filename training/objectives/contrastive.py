"""Contrastive learning: of all images of a batch, find the one that another crop shows (MoCo v3, SimCLR).

Every image gives two crops, by the paper's augmentation with different random numbers: affine, flips,
brightness, contrast, gamma. Medical images have no hue to jitter, and a grey value means something. A query of
one crop is compared with keys of the other crops of the whole batch, of all processes (InfoNCE), and the other
way round.

- With `momentum` (MoCo v3): keys come from a slowly following copy of ViT and projector, and have no gradient;
  queries pass a predictor.
- Without (SimCLR): queries are keys; the gradient reaches both, through the exchange between processes too.
  Unlike SimCLR, and like MoCo v3, crops are compared with those of the other side only.

Images are drawn with replacement, so a batch may hold one twice: it is not its own negative then.

Shape suffixes: B images of a process, N of the whole batch, P features; the two crops of an image follow one
another.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import render
from training.config import MimRunConfig
from training.data import RunData
from training.loader import RawBatch
from training.models import vit_config
from training.objectives.batchnorm import BatchNorm
from training.objectives.objective import Recipe
from training.objectives.pairs import (
    Compared,
    ProjectedViT,
    mean_overlap,
    momentum_of,
    validate_pairs,
)
from training.onednn import Linear
from training.optim import follow
from training.run import Run
from training.vit import ViTConfig
from training.world import World, sum_over_ranks


def recipe(config: MimRunConfig) -> Recipe[ContrastiveModel]:
    """Compare crops; nothing else is needed."""
    chosen = config.contrastive
    build = partial(
        ContrastiveModel, vit_config(config), chosen.hidden_dim, chosen.dim, chosen.momentum is not None
    )
    return Recipe(build=build, begin=partial(Contrast, config))


class ContrastiveModel(ProjectedViT):
    """A ViT whose class token is projected and, beside a momentum encoder, made a prediction of its output.

    Both heads are those of MoCo v3. Their batch norms, the last of which keep embeddings from becoming all
    alike, are over the crops of all processes.
    """

    def __init__(self, vit: ViTConfig, hidden_dim: int, dim: int, predicts: bool) -> None:
        super().__init__(vit)
        self.projector = head(vit.dim, hidden_dim, hidden_dim, dim)
        self.predictor = head(dim, hidden_dim, dim) if predicts else nn.Identity()

    def forward(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Queries (B, P), of any length."""
        return self.predictor(self.embed(x_BCDHW, level))  # type: ignore[no-any-return]


def head(*dims: int) -> nn.Sequential:
    """Linear layers between features of these sizes, each with a batch norm, and ReLUs between them."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(dims), start=2):
        last = number == len(dims)
        layers += [Linear(inputs, outputs, bias=False), BatchNorm(outputs, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class InfoNCE(NamedTuple):
    """Means over the queries at hand; scalars of float32 at least."""

    loss: Tensor
    """Cross entropy of finding the other crop in nats: log N by chance."""
    accuracy: Tensor
    """Share of queries for which it is the nearest."""


def info_nce(
    queries_BP: Tensor, keys_NP: Tensor, rows_B: Tensor, images_N: Tensor, temperature: float
) -> InfoNCE:
    """Find key `rows_B[i]` by query i among all keys but those of the same image (equal numbers `images_N`)."""
    with torch.autocast(queries_BP.device.type, enabled=False):
        precise = torch.promote_types(queries_BP.dtype, torch.float32)
        queries_BP, keys_NP = (F.normalize(x.to(precise), dim=-1) for x in (queries_BP, keys_NP))
        logits_BN = queries_BP @ keys_NP.t() / temperature
        same_BN = images_N[rows_B][:, None] == images_N
        same_BN = same_BN.scatter(1, rows_B[:, None], False)
        logits_BN = logits_BN.masked_fill(same_BN, -torch.inf)
        loss = F.cross_entropy(logits_BN, rows_B)
    return InfoNCE(loss, (logits_BN.argmax(dim=1) == rows_B).float().mean())


def gathered(x: Tensor, rows_B: Tensor, total: int, world: World) -> Tensor:
    """Rows (B, ...) of every process at their places in the whole (N, ...); the gradient finds its way back.

    `rows_B` are the places of those of this process. Processes may hold different numbers. All must call.
    """
    whole = x.new_zeros((total, *x.shape[1:])).index_copy(0, rows_B, x)
    return sum_over_ranks(whole) if world.size > 1 else whole


class Contrast:
    """The contrastive objective."""

    def __init__(self, config: MimRunConfig, run: Run, data: RunData, model: ContrastiveModel) -> None:
        self._config, self._run, self._data, self._model = config, run, data, model
        self._slow: ProjectedViT | None = None
        self.companions: Mapping[str, nn.Module] = {}
        if config.contrastive.momentum is not None:
            self._slow = copy.deepcopy(model).requires_grad_(False)
            del self._slow.predictor
            self.companions = {"teacher": self._slow}
        self._embed = run.compiled(self._slow.embed) if self._slow is not None else None
        self.encoder = model

    def losses(self, trained: nn.Module, part: RawBatch) -> Mapping[str, Tensor]:
        """InfoNCE both ways, its accuracy, and how much of the images the crops have in common."""
        run, total, temperature = self._run, part.plan.global_size, self._config.contrastive.temperature
        crops = render(part, run.device)
        with run.autocast():
            queries_B2P = trained(crops.voxels, crops.level).view(len(part.images), 2, -1)
            keys_B2P = queries_B2P
            if self._embed is not None:
                with torch.no_grad():
                    keys_B2P = self._embed(crops.voxels, crops.level).view_as(queries_B2P)
        rows_B = torch.tensor(part.indices[::2], device=run.device)
        numbers_B = torch.tensor([number_of(name) for name in part.images], device=run.device)
        images_N = gathered(numbers_B, rows_B, total, run.world)
        keys_N2P = gathered(keys_B2P.float(), rows_B, total, run.world)
        ways = [
            info_nce(queries_B2P[:, view], keys_N2P[:, 1 - view], rows_B, images_N, temperature)
            for view in range(2)
        ]
        means = {name: torch.stack(values).mean() for name, values in _by_field(ways).items()}
        return means | {"overlap": mean_overlap(part, run.device)}

    def finish_step(self, step: int) -> Mapping[str, float]:
        """The momentum encoder follows."""
        first = self._config.contrastive.momentum
        if self._slow is None or first is None:
            return {}
        momentum = momentum_of(step, self._config.steps, first)
        follow(self._slow, self._model, momentum)
        return {"momentum": momentum}

    def validate(self, step: int) -> dict[str, float]:
        """InfoNCE and retrieval of held-out images (`validate_pairs`)."""

        def loss(queries_NP: Tensor, keys_NP: Tensor) -> Tensor:
            rows_N = torch.arange(len(keys_NP), device=keys_NP.device)
            return info_nce(queries_NP, keys_NP, rows_N, rows_N, self._config.contrastive.temperature).loss

        slow = self._slow or self._model
        compared = Compared(self._model, slow.embed, loss, [self._model, slow], "contrastive learning")
        return validate_pairs(self._run, self._data, compared, step)


def number_of(image: str) -> int:
    """A number of 63 bits for `dataset/key`: equal for equal images, in every process."""
    return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest()) >> 1


def _by_field(ways: list[InfoNCE]) -> dict[str, tuple[Tensor, ...]]:
    return dict(zip(InfoNCE._fields, zip(*ways, strict=True), strict=True))
