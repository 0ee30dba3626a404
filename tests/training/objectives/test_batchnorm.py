"""Batch norm as PyTorch's, and unharmed by a batch that is not finite; over processes: test_objective_runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.objectives.batchnorm import BatchNorm


@pytest.mark.parametrize("affine", [True, False])
def test_it_is_that_of_pytorch(affine):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5, affine=affine), nn.BatchNorm1d(5, affine=affine)
    x = torch.randn(7, 5) * 3 + 40
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    theirs.running_var = ours.running_var  # of which theirs has one degree of freedom less
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_features_that_differ_by_little_are_still_told_apart():
    x = 1000 + 0.5 * torch.tensor([[-1.0], [1.0]])
    torch.testing.assert_close(BatchNorm(1)(x), torch.tensor([[-1.0], [1.0]]), atol=1e-4, rtol=0)


def test_a_batch_that_is_not_finite_leaves_the_averages_as_they_were():
    norm = BatchNorm(2)
    norm(torch.randn(4, 2))
    before = norm.running_mean.clone()
    norm(torch.tensor([[1.0, torch.nan], [2.0, 1.0]]))
    assert norm.running_mean.isfinite().all()
    assert norm.running_mean[1] == before[1]
