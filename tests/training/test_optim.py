"""Which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.config import MimOptimConfig, OptimConfig
from training.mim import MaskedImageModel, MIMConfig
from training.optim import adamw, follow, learning_rate, mim_adamw, parameter_groups, set_learning_rate
from training.vit import ViTConfig


def config(warmup: int = 10, peak: float = 1e-3, minimum: float = 1e-6) -> OptimConfig:
    return OptimConfig(
        peak_lr=peak,
        min_lr=minimum,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        warmup_steps=warmup,
        max_grad_norm=None,
    )


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 2)
        self.norm = nn.GroupNorm(2, 4)
        self.codebook = nn.Embedding(5, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2, 2))
        self.head = nn.Linear(4, 5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = self.head


def test_only_the_weights_of_layers_that_multiply_decay():
    model = Network()
    decayed, kept = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert kept["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(model.conv.weight), id(model.head.weight)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(kept["params"]) == len(trainable), "each once, tied ones too"


def test_a_parameter_without_decay_rests_where_it_is_when_its_gradient_is_zero():
    model = Network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model, config())
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    assert torch.equal(model.codebook.weight, torch.ones_like(model.codebook.weight))
    torch.testing.assert_close(model.head.weight, torch.full_like(model.head.weight, 1 - 0.1 * 0.05))


def test_the_learning_rate_climbs_to_the_peak_and_ends_at_the_minimum():
    rates = [learning_rate(step, 100, config()) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[99] == pytest.approx(1e-6)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    middle = 10 + 45 - 1
    assert rates[middle] == pytest.approx((1e-3 + 1e-6) / 2)


@given(st.integers(1, 500), st.integers(0, 499), st.floats(1e-8, 1), st.floats(0, 1))
def test_the_learning_rate_stays_between_zero_and_the_peak(steps, warmup, peak, share):
    optim = config(min(warmup, steps - 1), peak, peak * share)
    rates = [learning_rate(step, steps, optim) for step in range(steps)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(rate >= optim.min_lr * (1 - 1e-12) for rate in rates[optim.warmup_steps :])


def mim_model() -> MaskedImageModel:
    vit = ViTConfig(dim=16, depth=2, heads=2, position_grid=(1, 2, 2))
    return MaskedImageModel(MIMConfig(vit=vit, codebook_size=8, mask_layer_ids=(0, 1)))


def test_layers_of_a_vit_learn_at_rates_that_fall_towards_its_input():
    model = mim_model()
    chosen = MimOptimConfig(**config().model_dump(), layer_lr_decay=0.5, patch_gradient_scale=0.1)
    optimizer = mim_adamw(model, chosen)
    set_learning_rate(optimizer, 1.0)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert groups.keys() == set(model.parameters())
    vit = model.vit
    assert groups[vit.patch_embedding.weight]["lr"] == groups[vit.position_table]["lr"] == 0.125
    assert groups[model.mask_token]["lr"] == groups[vit.class_token]["lr"] == 0.125
    assert groups[vit.blocks[0].mlp.out.weight]["lr"] == 0.25
    assert groups[vit.blocks[1].norm1.weight]["lr"] == 0.5
    assert groups[vit.norm.weight]["lr"] == groups[model.head[2].weight]["lr"] == 1.0
    scaled = {parameter for parameter, group in groups.items() if group["gradient_scale"] == 0.1}
    assert scaled == set(vit.patch_embedding.parameters())
    assert groups[vit.blocks[0].mlp.out.weight]["weight_decay"] == 0.05
    assert groups[vit.blocks[0].mlp.out.bias]["weight_decay"] == 0


def test_without_such_options_a_vit_has_two_groups():
    assert len(mim_adamw(mim_model(), MimOptimConfig(**config().model_dump())).param_groups) == 2


def test_an_average_follows_the_weights():
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.weight.fill_(0.0)
    follow(average, model, 0.9)
    follow(average, model, 0.9)
    torch.testing.assert_close(average.weight, torch.full((2, 2), 1 - 0.9**2))
