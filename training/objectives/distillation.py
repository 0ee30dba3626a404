"""Self-distillation without labels (DINO): say of one crop what a slower copy of the network says of another.

Student and teacher assign a crop to prototypes: their class token, projected and brought to length 1, is
compared with prototypes of length 1 (DINO's last layer, its weight norm fixed). The teacher follows the
student's weights. What keeps it from saying the same of every crop is DINO's: its scores are centred by their
moving mean, which rules out that one prototype always wins, and sharpened by a small temperature, which rules
out that all are alike. The projector has DINO's optional batch norms (its authors use them with convolutions):
a network that has learnt nothing says nearly the same of all medical images, and without them one prototype
wins everything before the centre is found.

Views. Two global ones are drawn as for `contrastive`, by the paper's augmentation. Local ones, which the
student alone sees, are cut out of these on the device: half of the tokens along each axis, at least one, at any
voxel, in turns from the first and the second. So they cost no reading, and share flips, rotation and
intensities with the crop they are of, where DINO draws them anew. Where they lie follows from seed, step, image
and number.

Shape suffixes: B images of a process, V views, K prototypes, P features; D H W voxels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.augment import render
from training.config import DistillationConfig, MimRunConfig
from training.data import RunData
from training.loader import RawBatch
from training.models import vit_config
from training.objectives.batchnorm import BatchNorm
from training.objectives.objective import Recipe
from training.objectives.pairs import Compared, ProjectedViT, mean_overlap, momentum_of, validate_pairs
from training.onednn import Linear
from training.optim import follow
from training.rng import Stream, uniforms
from training.run import Run
from training.vit import INIT_STD, ViTConfig, initialise_linear, token_grid


def recipe(config: MimRunConfig) -> Recipe[DistilledModel]:
    """Distil; nothing else is needed."""
    chosen = config.distillation
    build = partial(DistilledModel, vit_config(config), chosen.hidden_dim, chosen.dim, chosen.prototypes)
    return Recipe(build=build, begin=partial(Distillation, config))


class Prototypes(nn.Module):
    """Cosines with K directions."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, dim), std=INIT_STD))

    def forward(self, x_BP: Tensor) -> Tensor:
        """(B, K) in [-1, 1], before any temperature."""
        return F.linear(F.normalize(x_BP, dim=-1), F.normalize(self.weight, dim=-1))


class DistilledModel(ProjectedViT):
    """A ViT whose class token is assigned to prototypes."""

    def __init__(self, vit: ViTConfig, hidden_dim: int, dim: int, prototypes: int) -> None:
        super().__init__(vit)
        self.projector = nn.Sequential(
            *(Linear(vit.dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.GELU()),
            *(Linear(hidden_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.GELU()),
            Linear(hidden_dim, dim),
        )
        initialise_linear(self.projector)
        self.prototypes = Prototypes(dim, prototypes)

    def score(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Cosines (B, K) of crops with the prototypes."""
        return self.prototypes(self.embed(x_BCDHW, level))  # type: ignore[no-any-return]

    def forward(self, whole_BCDHW: Tensor, local_BCDHW: Tensor | None, level: int) -> Tensor:
        """The same of global and local crops, one after the other; batch norms see either by itself."""
        scores = [self.score(x, level) for x in (whole_BCDHW, local_BCDHW) if x is not None]
        return torch.cat(scores)


class DistillationLoss(NamedTuple):
    """Means over pairs of views; float32 scalars in nats."""

    loss: Tensor
    """Cross entropy of what the student says of a view against what the teacher says of another."""
    kl: Tensor
    """The same less the entropy of the teacher's distribution: 0 where they agree."""
    teacher_entropy: Tensor
    """Near 0 or near log K for long, the teacher has collapsed."""


def distillation_loss(
    student_BVK: Tensor,
    teacher_B2K: Tensor,
    centre_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> DistillationLoss:
    """Compare scores of V views, the teacher's two first, over all pairs of different views."""
    views = student_BVK.shape[1]
    with torch.autocast(student_BVK.device.type, enabled=False):
        log_q_BVK = (student_BVK.float() / student_temperature).log_softmax(dim=-1)
        with torch.no_grad():
            p_B2K = ((teacher_B2K.float() - centre_K) / teacher_temperature).softmax(dim=-1)
            entropy_B2 = torch.special.entr(p_B2K).sum(dim=-1)
            # A teacher's view is compared with as many as any other.
            entropy = entropy_B2.mean()
        cross_B2V = -torch.einsum("btk,bvk->btv", p_B2K, log_q_BVK)
        different_2V = ~torch.eye(2, views, dtype=torch.bool, device=cross_B2V.device)
        loss = (cross_B2V * different_2V).sum() / (len(cross_B2V) * 2 * (views - 1))
    return DistillationLoss(loss=loss, kl=loss.detach() - entropy, teacher_entropy=entropy)


def teacher_temperature(step: int, steps: int, config: DistillationConfig) -> float:
    """Climbs in equal parts over the teacher's warm-up, then stays."""
    first, last = config.teacher_temperatures
    warmup = config.teacher_warmup * steps
    return first + (last - first) * (min(step / warmup, 1.0) if warmup else 1.0)


def local_crops(whole_BCDHW: Tensor, level: int, patch: int, places_BN3: Tensor) -> Tensor | None:
    """N crops of half the tokens along each axis of B images, (B * N, C, D', H', W'); None for no places.

    `whole_BCDHW` holds two crops of each image, one after the other; local crop n is cut from the first where n
    is even, else from the second. `places_BN3`, in [0, 1), on the CPU, say where, from one end to the other.
    """
    count = places_BN3.shape[1]
    if not count:
        return None
    size = whole_BCDHW.shape[2], whole_BCDHW.shape[3], whole_BCDHW.shape[4]
    tokens = token_grid(size, level, patch)
    inner = [length // grid * max(grid // 2, 1) for length, grid in zip(size, tokens, strict=True)]
    free = torch.tensor([length - cut + 1 for length, cut in zip(size, inner, strict=True)])
    starts = (places_BN3 * free).long().tolist()
    cut = [
        whole_BCDHW[2 * image + number % 2][(slice(None), *_slices(start, inner))]
        for image, of_image in enumerate(starts)
        for number, start in enumerate(of_image)
    ]
    return torch.stack(cut)


def _slices(start: list[int], size: list[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))


class Distillation:
    """The objective of self-distillation."""

    def __init__(self, config: MimRunConfig, run: Run, data: RunData, model: DistilledModel) -> None:
        self._config, self._run, self._data, self._student = config, run, data, model
        self._teacher = copy.deepcopy(model).requires_grad_(False)
        count = config.distillation.prototypes
        self._centre = torch.zeros(count, device=run.device)
        self._teacher.register_buffer("centre", self._centre)
        self._mean_K = self._centre
        self._score = run.compiled(self._teacher.score)
        self.companions: Mapping[str, nn.Module] = {"teacher": self._teacher}
        self.encoder = self._teacher

    def losses(self, trained: nn.Module, part: RawBatch) -> Mapping[str, Tensor]:
        """The fields of `DistillationLoss`, and how much of the images the global crops have in common."""
        run, chosen = self._run, self._config.distillation
        crops = render(part, run.device)
        places_BN3 = self._places(part)
        local = local_crops(crops.voxels, crops.level, self._student.vit.config.patch, places_BN3)
        images = len(part.images)
        with run.autocast():
            student = trained(crops.voxels, local, crops.level)
            with torch.no_grad():
                teacher_B2K = self._score(crops.voxels, crops.level).float().view(images, 2, -1)
        scores = student.split([2 * images, len(student) - 2 * images])
        student_BVK = torch.cat([one.view(images, -1, one.shape[1]) for one in scores if len(one)], dim=1)
        losses = distillation_loss(
            student_BVK,
            teacher_B2K,
            self._centre,
            student_temperature=chosen.student_temperature,
            teacher_temperature=teacher_temperature(part.step, self._config.steps, chosen),
        )
        self._mean_K = teacher_B2K.sum(dim=(0, 1)) / (2 * part.plan.global_size)
        return {**losses._asdict(), "overlap": mean_overlap(part, run.device)}

    def finish_step(self, step: int) -> Mapping[str, float]:
        """The centre and the teacher follow."""
        chosen = self._config.distillation
        mean_K = self._run.world.sum(self._mean_K)
        # DINO's begins at 0, and one prototype wins everything until it is near the mean: here it starts there.
        kept = chosen.centre_momentum if step else 0.0
        moved_K = self._centre.lerp(mean_K, 1 - kept)
        # A batch without a finite score must not spoil the centre for good.
        self._centre.copy_(torch.where(moved_K.isfinite(), moved_K, self._centre))
        momentum = momentum_of(step, self._config.steps, chosen.momentum)
        follow(self._teacher, self._student, momentum)
        temperature = teacher_temperature(step, self._config.steps, chosen)
        return {"momentum": momentum, "teacher_temperature": temperature}

    def validate(self, step: int) -> dict[str, float]:
        """The loss between two windows, and retrieval, of held-out images (`validate_pairs`)."""
        chosen, student, teacher = self._config.distillation, self._student, self._teacher

        def loss(student_NP: Tensor, teacher_NP: Tensor) -> Tensor:
            student_NK, teacher_NK = student.prototypes(student_NP), teacher.prototypes(teacher_NP)
            log_q_NK = (student_NK / chosen.student_temperature).log_softmax(dim=-1)
            temperature = teacher_temperature(step, self._config.steps, chosen)
            p_NK = ((teacher_NK - self._centre) / temperature).softmax(dim=-1)
            cross_N: Tensor = -(p_NK * log_q_NK).sum(dim=-1)
            return cross_N.mean()

        compared = Compared(student.embed, teacher.embed, loss, [student, teacher], "self-distillation")
        return validate_pairs(self._run, self._data, compared, step)

    def _places(self, part: RawBatch) -> Tensor:
        """Where local views lie, (B, N, 3) in [0, 1)."""
        count, seed = self._config.distillation.local_views, self._config.seed
        rows = [
            uniforms(seed, Stream.LOCAL_VIEW, part.step, index, 1, 3 * count)[0] for index in part.indices[::2]
        ]
        return torch.from_numpy(np.stack(rows)).view(len(rows), count, 3)
