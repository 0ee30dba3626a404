"""The CPU's own ways to convolve and multiply: the values and gradients of the plain operators in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.onednn import Linear, convolution, linear, prefers_onednn, transposed_convolution

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
CONVOLUTIONS = [
    # (B, I, D, H, W), O, kernel, stride, padding
    pytest.param((2, 4, 4, 8, 8), 6, (2, 4, 4), (2, 4, 4), (0, 0, 0), id="patches"),
    pytest.param((1, 3, 8, 16, 16), 4, (8, 8, 8), (8, 8, 8), (0, 0, 0), id="long patches"),
    pytest.param((2, 4, 5, 9, 10), 6, (2, 4, 4), (2, 4, 4), (0, 0, 0), id="patches, with a rest"),
    pytest.param((1, 4, 3, 5, 6), 6, (1, 3, 3), (1, 1, 1), (0, 1, 1), id="flat"),
    pytest.param((2, 4, 3, 5, 6), 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), id="flat, stride 2"),
    pytest.param((1, 4, 3, 5, 6), 6, (3, 3, 3), (1, 1, 1), (1, 1, 1), id="a small crop"),
    pytest.param((1, 4, 4, 6, 6), 6, (3, 3, 3), (2, 2, 2), (1, 1, 1), id="a small crop, stride 2"),
    pytest.param((2, 4, 3, 5, 6), 6, (3, 3, 3), (1, 1, 1), (1, 1, 1), id="small crops"),
    pytest.param((1, 64, 8, 64, 4), 6, (3, 3, 3), (1, 1, 1), (1, 1, 1), id="a large crop"),
]


def assert_equal_to_double(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """Same output and gradients of all inputs; `tolerance` relative to the largest number of each."""
    single = [x.detach().requires_grad_() for x in inputs]
    double = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = ours(*single), plain(*double)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    weights = torch.randn_like(found)
    found.backward(weights)
    expected.backward(weights.double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(single, double, strict=True))]
    for a, b in pairs:
        assert a is not None
        assert b is not None
        assert float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels first", "channels last"])
@pytest.mark.parametrize(("shape", "channels", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_convolution(shape, channels, kernel, stride, padding, layout):
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=layout)
    assert_equal_to_double(
        lambda x, weight, bias: convolution(x, weight, bias, stride, padding),
        lambda x, weight, bias: F.conv3d(x, weight, bias, stride, padding),
        x,
        torch.randn(channels, shape[1], *kernel),
        torch.randn(channels),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels first", "channels last"])
@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 4, 4), (4, 4, 4)])
def test_transposed_convolution(kernel, layout):
    torch.manual_seed(0)
    assert_equal_to_double(
        transposed_convolution,
        lambda x, weight, bias: F.conv_transpose3d(x, weight, bias, kernel),
        torch.randn(2, 4, 2, 3, 2).to(memory_format=layout),
        torch.randn(4, 3, *kernel),
        torch.randn(3),
    )


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 1, 1, 1, 5)])
def test_linear(shape):
    torch.manual_seed(0)
    assert_equal_to_double(linear, F.linear, torch.randn(shape), torch.randn(6, 5), torch.randn(6))
    assert_equal_to_double(linear, F.linear, torch.randn(shape), torch.randn(5, 6).t())


def test_linear_computes_only_the_gradients_that_are_wanted():
    x, weight = torch.randn(3, 5), torch.randn(6, 5, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(6, 5))


def test_it_is_for_eager_single_precision_alone():
    x = torch.randn(2, 4)
    assert prefers_onednn(x)
    assert not prefers_onednn(x.double())
    assert not prefers_onednn(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not prefers_onednn(x)
        assert Linear(4, 4)(x).dtype == torch.bfloat16
    program = torch.export.export(Linear(4, 4), (x,))
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
