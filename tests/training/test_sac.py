"""Spatially adaptive layers: parity with reference values, gradients, and what repeated slices must give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from training.sac import SACConv3d, SACConvBlock, SACTransposedConv3d, SpatialState

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
CASES = json.loads((REFERENCE / "01_sac.json").read_text())["cases"] if REFERENCE.is_dir() else []


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "01_sac.safetensors")


def repeated(x_BCDHW: Tensor, level: int) -> Tensor:
    """The same image as 2^level times as many thin slices."""
    return x_BCDHW.repeat_interleave(2**level, dim=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_layer_gives_the_reference_values(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    weight = tensors[case["weight"]]
    kernel, stride = case["kernel"][0], case["stride"][0]
    layer: SACConv3d | SACTransposedConv3d
    if case["transposed"]:
        layer = SACTransposedConv3d(weight.shape[0], weight.shape[1], stride)
    else:
        layer = SACConv3d(weight.shape[1], weight.shape[0], kernel, stride)
    layer.load_state_dict({"weight": weight, "bias": tensors[case["bias"]]})

    before = SpatialState(case["aniso_d"], case["num_downsamples_before"])
    assert (before.pending, before.depth_halvings) == (case["pending_before"], case["depth_upsamples_left"])
    output, after = layer(tensors[case["input"]], before)

    assert after == (case["aniso_d"], case["num_downsamples_after"])
    torch.testing.assert_close(output, tensors[case["output"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", range(6))
@pytest.mark.parametrize("kernel_stride", [(2, 2), (4, 4), (3, 1), (3, 2)])
def test_convolution_gradients(level: int, kernel_stride: tuple[int, int]) -> None:
    torch.manual_seed(level)
    layer = SACConv3d(1, 1, *kernel_stride).double()
    depth, width = (4, 4) if kernel_stride == (4, 4) else (2, 2)
    x = torch.randn(1, 1, depth, 4, width, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        state = SpatialState(level, 1)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, state))[0]

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("level", range(6))
def test_transposed_convolution_gradients(level: int) -> None:
    torch.manual_seed(level)
    layer = SACTransposedConv3d(2, 1, 4).double()
    x = torch.randn(1, 2, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        state = SpatialState(level, 4)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, state))[0]

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


@settings(deadline=None, max_examples=40)
@given(
    level=st.integers(0, 5),
    exponents=st.lists(st.integers(1, 2), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_thick_slices_give_what_repeated_thin_ones_give(level: int, exponents: list[int], seed: int) -> None:
    """A chain of convolutions with kernel = stride; the thin image has as many slices more as are pending."""
    torch.manual_seed(seed)
    total = sum(exponents)
    side, slices = 2**total, 2 ** max(total - level, 0)
    thick = torch.randn(1, 2, slices, side, side, dtype=torch.float64)
    thin, thick_state, thin_state = repeated(thick, level), SpatialState(level), SpatialState(0)
    for exponent in exponents:
        layer = SACConv3d(2, 2, 2**exponent, 2**exponent).double()
        thick, thick_state = layer(thick, thick_state)
        thin, thin_state = layer(thin, thin_state)
    torch.testing.assert_close(repeated(thick, thick_state.pending), thin)


@pytest.mark.parametrize("level", [2, 3])
def test_3x3x3_equals_thin_slices_inside_each_thick_slice(level: int) -> None:
    torch.manual_seed(0)
    layer = SACConv3d(2, 3, 3).double()
    x = torch.randn(1, 2, 3, 5, 5, dtype=torch.float64)
    thick, _ = layer(x, SpatialState(level))
    thin, _ = layer(repeated(x, level), SpatialState(0))
    n = 2**level
    inside = [i for i in range(thin.shape[2]) if i % n not in (0, n - 1)]
    torch.testing.assert_close(repeated(thick, level)[:, :, inside], thin[:, :, inside])
    assert not torch.allclose(repeated(thick, level), thin)


@pytest.mark.parametrize("level", range(5))
def test_transposed_convolution_sums_the_thin_slices_of_a_group(level: int) -> None:
    torch.manual_seed(0)
    layer = SACTransposedConv3d(2, 3, 4).double()
    x = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64)
    thick, _ = layer(x, SpatialState(level, 4))
    thin, _ = layer(x, SpatialState(0, 4))
    bias = layer.bias.view(-1, 1, 1, 1)
    grouped = (thin - bias).unflatten(2, (thick.shape[2], -1)).sum(dim=3) + bias
    torch.testing.assert_close(thick, grouped)


def test_a_2d_image_needs_no_depth_at_any_level_above_five() -> None:
    torch.manual_seed(0)
    block = SACConvBlock(2, 8, groups=2, stride=2)
    x = torch.randn(1, 2, 1, 6, 6)
    expected, _ = block(x, SpatialState(5))
    actual, _ = block(x, SpatialState(26))
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (1, 8, 1, 3, 3)


def test_parameters_are_those_of_ordinary_convolutions() -> None:
    layer = SACConv3d(2, 3, 4, 4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (3, 2, 4, 4, 4),
        "bias": (3,),
    }
    assert type(layer.weight) is torch.nn.Parameter


@pytest.mark.parametrize("kernel_stride", [(3, 4), (4, 2), (2, 1), (3, 3)])
def test_pairs_without_a_rule_are_refused(kernel_stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="stride"):
        SACConv3d(1, 1, *kernel_stride)
    with pytest.raises(ValueError, match="power of two"):
        SACTransposedConv3d(1, 1, 3)


@pytest.mark.parametrize(("level", "depth_stride"), [(0, 4), (1, 2), (2, 1), (5, 1)])
def test_mean_merge_gives_the_average_of_the_thin_slices(level: int, depth_stride: int) -> None:
    """By the sum the output would be 4 / depth_stride times as large: a norm has to follow it."""
    torch.manual_seed(level)
    layer = SACTransposedConv3d(3, 2, 4, merge="mean")
    x = torch.randn(1, 3, 2, 3, 3)
    thin, _ = layer(x, SpatialState(level=0, halvings=2))
    merged, state = layer(x, SpatialState(level=level, halvings=2))
    average = thin.unflatten(2, (-1, 4 // depth_stride)).mean(dim=3)
    torch.testing.assert_close(merged, average)
    assert state.halvings == 0
