"""Half the multiplications, the same convolution: exact in float64 but for rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training import onednn, winograd

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5, 6), (2, 3, 12, 4, 3), (1, 1, 8, 1, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_direct_convolution(shape, layout, has_bias):
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64).to(memory_format=layout).requires_grad_(),
        torch.randn(4, shape[1], 3, 3, 3, dtype=torch.float64, requires_grad=True),
    ]
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_bias else None
    wanted = inputs if bias is None else [*inputs, bias]
    found, expected = winograd.convolution(*inputs, bias), F.conv3d(*inputs, bias, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, wanted, weights)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, wanted, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_it_computes_only_the_gradient_that_is_wanted(wanted):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(1, 2, 4, 3, 3), "weight": torch.randn(5, 2, 3, 3, 3), "bias": torch.randn(5)}
    inputs[wanted].requires_grad_()
    winograd.convolution(*inputs.values()).square().sum().backward()
    found = inputs[wanted].grad
    inputs[wanted].grad = None
    F.conv3d(*inputs.values(), padding=1).square().sum().backward()
    torch.testing.assert_close(found, inputs[wanted].grad, rtol=1e-4, atol=1e-4)
    assert all(inputs[name].grad is None for name in inputs if name != wanted)


def test_large_maps_take_it_and_lose_no_more_than_a_few_roundings(monkeypatch):
    """In float32; a wrong number in a matrix would show as an error of the size of the map."""
    torch.manual_seed(0)
    taken = []
    direct = winograd.convolution
    monkeypatch.setattr(winograd, "convolution", lambda *inputs: taken.append(1) or direct(*inputs))
    x, weight, bias = torch.randn(1, 32, 4, 16, 16), torch.randn(32, 32, 3, 3, 3) / 30, torch.randn(32)
    once = (1, 1, 1)
    found = onednn.convolution(x, weight, bias, once, once)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=1)
    assert taken
    assert float((found - expected).abs().max()) < 5e-5
    wide, wide_weight = torch.randn(2, 48, 4, 16, 16), torch.randn(48, 48, 3, 3, 3) / 36
    taken.clear()
    found = onednn.convolution(wide, wide_weight, None, once, once)
    assert taken
    expected = F.conv3d(wide.double(), wide_weight.double(), padding=1)
    assert float((found - expected).abs().max()) < 5e-5
    two = torch.cat([x, x])
    for other in (x[:, :, :3], x[:, :, :, :8, :8], two, two[:, :16]):
        taken.clear()
        found = onednn.convolution(other, weight[:, : other.shape[1]], bias, once, once)
        assert not taken
        expected = F.conv3d(other, weight[:, : other.shape[1]], bias, padding=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
