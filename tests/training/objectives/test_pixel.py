"""Voxels as targets: patches and back, one head for all levels, and a loss that minds hidden patches alone."""

from __future__ import annotations

import pytest
import torch

from training.mim import MaskingConfig, masked_index
from training.objectives.pixel import MaskedPixelModel, Target, pixel_loss, to_crop, to_patches
from training.sac import SpatialState
from training.vit import ViTConfig, token_grid

LEVELS = range(6)
PATCH = 4


def size_at(level: int) -> tuple[int, int, int]:
    return 2 * max(PATCH >> level, 1), 2 * PATCH, 3 * PATCH


def model() -> MaskedPixelModel:
    torch.manual_seed(0)
    vit = ViTConfig(dim=16, depth=2, heads=2, patch=PATCH, position_grid=(2, 2, 3))
    return MaskedPixelModel(MaskingConfig(vit=vit, mask_layer_ids=(1,)))


@pytest.mark.parametrize("level", LEVELS)
def test_patches_are_those_of_the_tokens_and_make_the_crop_again(level):
    size = size_at(level)
    x_BCDHW = torch.rand(2, 3, *size)
    grid = token_grid(size, level, PATCH)
    patches_BLP = to_patches(x_BCDHW, grid)
    slices = max(PATCH >> level, 1)
    assert patches_BLP.shape == (2, 12, 3 * slices * PATCH * PATCH)
    second_of_first_row = x_BCDHW[1, :, :slices, :PATCH, PATCH : 2 * PATCH]
    assert torch.equal(patches_BLP[1, 1], second_of_first_row.flatten())
    assert torch.equal(to_crop(patches_BLP, grid, size), x_BCDHW)


def test_targets_have_mean_0_and_deviation_1_and_mean_their_voxels():
    patches_BLP = torch.rand(2, 5, 48)
    target = Target.of(patches_BLP)
    torch.testing.assert_close(target.normalised.mean(dim=-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.normalised.std(dim=-1), torch.ones(2, 5), atol=1e-3, rtol=0)
    torch.testing.assert_close(target.voxels(target.normalised), patches_BLP)


def test_a_patch_of_one_value_has_the_target_0():
    target = Target.of(torch.full((1, 1, 48), 0.7))
    torch.testing.assert_close(target.normalised, torch.zeros(1, 1, 48), atol=1e-3, rtol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_the_head_says_of_a_thick_slice_the_mean_of_what_it_says_of_thin_ones(level):
    head = model().head
    tokens_BCdhw = torch.randn(2, 16, 2, 2, 3)
    thin_BCDHW, _ = head(tokens_BCdhw, SpatialState(0, 2))
    thick_BCDHW, _ = head(tokens_BCdhw, SpatialState(level, 2))
    slices = max(PATCH >> level, 1)
    pooled = thin_BCDHW.unflatten(2, (2, slices, PATCH // slices)).mean(dim=4).flatten(2, 3)
    torch.testing.assert_close(thick_BCDHW, pooled)


@pytest.mark.parametrize("level", LEVELS)
def test_every_parameter_has_a_gradient_at_every_level(level):
    network = model()
    network(torch.rand(2, 3, *size_at(level)), level, torch.tensor([[0, 3], [1, 2]])).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_loss_is_0_for_the_target_and_that_of_the_mean_for_0():
    target, visible_BV = Target.of(torch.rand(2, 6, 48)), torch.tensor([[0, 5], [1, 2]])
    right = pixel_loss(target.normalised, target, visible_BV)
    nothing = pixel_loss(torch.zeros(2, 6, 48), target, visible_BV)
    assert right.loss == 0
    assert nothing.loss == right.of_mean == nothing.of_mean
    assert nothing.loss == pytest.approx(47 / 48, rel=1e-3)  # the variance has one degree of freedom less


def test_visible_patches_do_not_count_and_hidden_ones_cannot_be_seen():
    network, x_BCDHW = model().eval(), torch.rand(1, 3, *size_at(0))
    grid, visible_BV = token_grid(size_at(0), 0, PATCH), torch.tensor([[0, 4, 7]])
    changed_BLP = to_patches(x_BCDHW, grid)
    changed_BLP[:, masked_index(visible_BV, 12)[0]] = torch.rand(9, changed_BLP.shape[2])
    before, after = (
        network(image, 0, visible_BV) for image in (x_BCDHW, to_crop(changed_BLP, grid, size_at(0)))
    )
    assert torch.equal(before, after)
    target, predicted_BLP = Target.of(to_patches(x_BCDHW, grid)), to_patches(before, grid)
    spoilt_BLP = predicted_BLP.clone()
    spoilt_BLP[:, visible_BV[0]] += 1
    assert pixel_loss(predicted_BLP, target, visible_BV).loss == pixel_loss(spoilt_BLP, target, visible_BV).loss
