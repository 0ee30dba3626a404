"""InfoNCE where its value is known, and keys of several processes at their places."""

from __future__ import annotations

import math

import pytest
import torch

from training.objectives.contrastive import ContrastiveModel, gathered, info_nce, number_of
from training.vit import ViTConfig
from training.world import World

ROWS = torch.arange(4)


def test_identical_features_are_told_apart_by_chance():
    same = torch.ones(4, 8)
    assert info_nce(same, same, ROWS, ROWS, 0.2).loss == pytest.approx(math.log(4))


def test_orthogonal_features_are_found_as_surely_as_the_temperature_allows():
    features = 3 * torch.eye(4, 8)
    found = info_nce(features, features, ROWS, ROWS, 0.2)
    assert found.loss == pytest.approx(math.log(1 + 3 * math.exp(-1 / 0.2)))
    assert found.accuracy == 1


def test_opposite_features_are_never_found():
    queries = torch.eye(4, 4)
    found = info_nce(queries, queries.roll(1, dims=0), ROWS, ROWS, 0.1)
    assert found.accuracy == 0
    assert found.loss > 9


def test_an_image_that_was_drawn_twice_is_not_its_own_negative():
    features = torch.eye(4, 8)
    features[1] = features[0]
    twice = torch.tensor([5, 5, 6, 7])
    # Two negatives are left to the first two, three to the others.
    expected = (math.log(1 + 2 * math.exp(-1 / 0.2)) + math.log(1 + 3 * math.exp(-1 / 0.2))) / 2
    assert info_nce(features, features, ROWS, twice, 0.2).loss == pytest.approx(expected)


def test_a_batch_of_a_single_image_has_the_loss_0():
    features, none_else = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    assert info_nce(features, features, ROWS, none_else, 0.2).loss == 0


def test_a_part_of_the_queries_has_a_part_of_the_loss():
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 8), torch.randn(4, 8)
    whole = info_nce(queries, keys, ROWS, ROWS, 0.2).loss
    parts = [info_nce(queries[at], keys, ROWS[at], ROWS, 0.2).loss for at in (slice(0, 1), slice(1, 4))]
    assert float(whole) == pytest.approx(float(parts[0] + 3 * parts[1]) / 4)


def test_rows_go_to_their_places_and_their_gradient_comes_back():
    x = torch.randn(2, 3, requires_grad=True)
    whole = gathered(x, torch.tensor([1, 3]), 4, World())
    assert torch.equal(whole[[1, 3]], x)
    assert torch.equal(whole[[0, 2]], torch.zeros(2, 3))
    (whole * torch.arange(4)[:, None]).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0] * 3, [3.0] * 3]))


def test_numbers_of_images_are_the_same_everywhere():
    assert number_of("toy/a") == number_of("toy/a") != number_of("toy/b")
    assert 0 <= number_of("toy/a") < 2**63


@pytest.mark.parametrize("predicts", [True, False])
def test_every_parameter_has_a_gradient_at_every_level(predicts):
    torch.manual_seed(0)
    vit = ViTConfig(dim=16, depth=2, heads=2, patch=4, position_grid=(1, 2, 2))
    model = ContrastiveModel(vit, 16, 8, predicts)
    for level in range(6):
        model.zero_grad()
        model(torch.rand(2, 3, max(4 >> level, 1), 8, 8), level).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
