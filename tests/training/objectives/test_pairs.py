"""What objectives share that compare two crops."""

from __future__ import annotations

import pytest
import torch

from training.objectives.pairs import momentum_of, retrieve, windows


def test_the_slower_network_is_followed_less_and_less():
    shares = [momentum_of(step, 11, 0.9) for step in range(11)]
    assert shares == sorted(shares)
    assert (shares[0], shares[5], shares[10]) == pytest.approx((0.9, 0.95, 1.0))
    assert momentum_of(0, 1, 0.9) == pytest.approx(0.9)


def test_windows_are_whole_tokens_of_opposite_corners_and_overlap():
    x = torch.arange(64 * 64.0).view(1, 1, 1, 64, 64)
    one, other = windows(x, 16)
    assert one.shape == other.shape == (1, 1, 1, 48, 48)
    assert torch.equal(one[..., 16:, 16:], other[..., :32, :32])
    single = torch.rand(1, 1, 1, 16, 16)
    assert all(torch.equal(window, single) for window in windows(single, 16))


def test_retrieval_finds_the_nearest_by_cosine():
    keys = torch.eye(4)
    assert retrieve(5 * keys, keys).accuracy == 1
    found = retrieve(keys[[1, 0, 2, 3]], keys)
    assert found.accuracy == 0.5
    assert found.nearest.tolist() == [1, 0, 2, 3]
