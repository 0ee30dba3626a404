"""Weight inflation: parity with reference values, and the responses it must keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from training.inflation import (
    DepthMode,
    OutputMode,
    inflate_convolution,
    inflate_depth,
    merge_output_channels,
    spread_input_channels,
)

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
CASES = json.loads((REFERENCE / "02_inflation.json").read_text())["cases"] if REFERENCE.is_dir() else []


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "02_inflation.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_inflation_gives_the_reference_values(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    weight = tensors[f"{case['id']}/checkpoint_weight"]
    bias = tensors[f"{case['id']}/checkpoint_bias"]
    depth_mode: DepthMode = case["mode"] if case["kind"] == "depth" else "average"
    output_mode: OutputMode = "rgb_to_grey" if case.get("mode") == "RGB_L" else "average"
    if case.get("force"):
        weight = spread_input_channels(weight, case["dst"])
    new_weight, new_bias = inflate_convolution(
        weight, bias, case["loaded_weight_shape"], depth_mode=depth_mode, output_mode=output_mode
    )
    assert new_bias is not None
    torch.testing.assert_close(new_weight, tensors[f"{case['id']}/loaded_weight"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_bias, tensors[f"{case['id']}/loaded_bias"], rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(depth=st.integers(1, 17), mode=st.sampled_from(["average", "center"]))
def test_the_depth_of_a_kernel_sums_to_the_flat_kernel(depth: int, mode: DepthMode) -> None:
    weight = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    inflated = inflate_depth(weight, depth, mode)
    assert inflated.shape == (2, 3, depth, 2, 2)
    torch.testing.assert_close(inflated.sum(dim=2), weight)
    torch.testing.assert_close(inflated, inflated.flip(2))


@settings(deadline=None)
@given(before=st.integers(1, 5), after=st.integers(1, 5))
def test_equal_channels_keep_their_response(before: int, after: int) -> None:
    weight = torch.randn(2, before, 3, 3, dtype=torch.float64)
    grey = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    old = F.conv2d(grey.expand(-1, before, -1, -1), weight)
    new = F.conv2d(grey.expand(-1, after, -1, -1), spread_input_channels(weight, after))
    torch.testing.assert_close(new, old)


def test_what_already_fits_is_left_as_it_is() -> None:
    weight, bias = torch.randn(4, 3, 2, 2, 2), torch.randn(4)
    same = inflate_convolution(weight, bias, weight.shape)
    assert same[0] is weight
    assert same[1] is bias


def test_a_kernel_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel \(16, 3, 3\)"):
        inflate_convolution(torch.zeros(4, 3, 3, 3), None, (4, 3, 16, 14, 14))


def test_grey_needs_exactly_three_channels() -> None:
    with pytest.raises(ValueError, match="4 into 1"):
        merge_output_channels(torch.zeros(4, 2, 1, 1), 1, "rgb_to_grey")
