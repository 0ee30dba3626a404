"""The loss where its value is known, the centre that keeps the teacher from collapsing, and local crops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from training.config import DistillationConfig
from training.objectives.distillation import (
    DistilledModel,
    Prototypes,
    distillation_loss,
    local_crops,
    teacher_temperature,
)
from training.vit import ViTConfig

NO_CENTRE = torch.zeros(8)
TEMPERATURES: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def test_a_network_that_says_nothing_has_the_loss_of_chance():
    losses = distillation_loss(torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), NO_CENTRE, **TEMPERATURES)
    assert float(losses.loss) == pytest.approx(math.log(8))
    assert float(losses.teacher_entropy) == pytest.approx(math.log(8))
    assert float(losses.kl) == pytest.approx(0, abs=1e-6)


def test_a_view_is_compared_with_the_others_only():
    # Each view is of a class of its own: to agree with itself would have the loss 0.
    scores = 10 * torch.eye(2, 8)[None]
    losses = distillation_loss(scores, scores, NO_CENTRE, student_temperature=1, teacher_temperature=0.1)
    wrong = 10 + math.log(1 + 7 * math.exp(-10))
    assert float(losses.loss) == pytest.approx(wrong, rel=1e-5)


def test_a_student_that_agrees_with_a_sure_teacher_has_the_loss_0():
    scores = torch.eye(8)[:3, None].expand(3, 2, 8)
    losses = distillation_loss(scores, scores, NO_CENTRE, student_temperature=0.02, teacher_temperature=0.02)
    assert float(losses.loss) == pytest.approx(0, abs=1e-6)
    assert float(losses.teacher_entropy) == pytest.approx(0, abs=1e-6)


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, views, 8, requires_grad=True) for views in (3, 2))
    distillation_loss(student, teacher, NO_CENTRE, **TEMPERATURES).loss.backward()
    assert teacher.grad is None
    assert float(student.grad.abs().sum()) > 0


def test_centring_takes_a_prototype_that_always_wins_its_victory():
    """Without a centre, the target of everything is one class: the collapse that a step would learn."""
    torch.manual_seed(0)
    teacher = torch.randn(16, 2, 8) * 0.02
    teacher[..., 3] += 1.0
    student = torch.zeros(16, 2, 8, requires_grad=True)

    def step(centre: torch.Tensor) -> tuple[float, torch.Tensor]:
        losses = distillation_loss(student, teacher, centre, **TEMPERATURES)
        (gradient,) = torch.autograd.grad(losses.loss, student)
        return float(losses.teacher_entropy), gradient.sum(dim=(0, 1))

    entropy, pull = step(NO_CENTRE)
    assert entropy < 1e-3
    assert pull[3] < -1  # all crops are drawn to prototype 3
    centred_entropy, centred_pull = step(teacher.mean(dim=(0, 1)))
    assert centred_entropy > 0.8 * math.log(8)
    assert float(centred_pull.abs().max()) < 0.1 * float(-pull[3])


def test_the_teachers_temperature_climbs_and_stays():
    config = DistillationConfig(teacher_temperatures=(0.04, 0.08), teacher_warmup=0.5)
    found = [teacher_temperature(step, 100, config) for step in (0, 25, 50, 99)]
    assert found == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert teacher_temperature(0, 100, DistillationConfig(teacher_warmup=0)) == 0.07


def test_prototypes_know_directions_only():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 10)
    x = torch.randn(4, 6)
    scores = prototypes(x).detach()
    assert float(scores.abs().max()) <= 1 + 1e-6
    with torch.no_grad():
        prototypes.weight *= 7
    torch.testing.assert_close(prototypes(3 * x), scores)


@pytest.mark.parametrize(
    ("level", "size"), [(0, (8, 16, 16)), (1, (4, 16, 16)), (5, (1, 16, 16)), (0, (4, 4, 4))]
)
def test_local_crops_are_parts_of_the_crops_they_take_turns_with(level, size):
    whole = torch.rand(4, 1, *size).expand(-1, 3, -1, -1, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[None, :, None].expand(2, 2, 3)
    local = local_crops(whole, level, 4, ends)
    tokens = [length // side for length, side in zip(size, (max(4 >> level, 1), 4, 4), strict=True)]
    d, h, w = (length // count * max(count // 2, 1) for length, count in zip(size, tokens, strict=True))
    assert local.shape == (4, 3, d, h, w)
    for image in range(2):
        assert torch.equal(local[2 * image], whole[2 * image, :, :d, :h, :w])
        assert torch.equal(local[2 * image + 1], whole[2 * image + 1, :, -d:, -h:, -w:])


def test_without_local_views_there_are_none():
    assert local_crops(torch.rand(2, 3, 4, 8, 8), 0, 4, torch.zeros(1, 0, 3)) is None


@pytest.mark.parametrize("local", [True, False])
def test_every_parameter_has_a_gradient(local):
    torch.manual_seed(0)
    vit = ViTConfig(dim=16, depth=2, heads=2, patch=4, position_grid=(1, 2, 2))
    model = DistilledModel(vit, 16, 8, 12)
    scores = model(torch.rand(2, 3, 4, 8, 8), torch.rand(3, 3, 4, 4, 4) if local else None, 0)
    assert scores.shape == (5 if local else 2, 12)
    scores.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
