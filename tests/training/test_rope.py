"""Rotary embedding: numbers of the reference, and the two properties the paper's appendix proves."""

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

from catalog.errors import SetupError
from training.rope import (
    BASES,
    Rotation,
    class_and_grid_rotation,
    rotary_angles,
    rotary_frequencies,
)

CPU = torch.device("cpu")
HEAD_DIM = 64
"""Of ViT-B and ViT-L."""
TRAINING_GRID = (5, 10, 10)
VOXEL_GRID = (80, 160, 160)
"""As many positions as a training crop has voxels: far more than any token grid."""


@pytest.fixture(scope="module")
def reference(shared: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    cases = json.loads((shared / "reference/06_rope.json").read_text())["cases"]
    return cases, load_file(shared / "reference/06_rope.safetensors")


def rotation_of(angles_LP: Tensor) -> Rotation:
    return Rotation(angles_LP.cos().float()[None, None], angles_LP.sin().float()[None, None])


@pytest.mark.parametrize("index", range(6))
def test_matches_the_reference(reference: tuple[list[dict[str, Any]], dict[str, Tensor]], index: int) -> None:
    cases, tensors = reference
    case = cases[index]
    bases = tuple(case["base"])
    rescale = tuple(None if span < 0 else float(span) for span in case["rescale_shape"])

    def expect(actual: Tensor, name: str) -> None:
        torch.testing.assert_close(actual, tensors[f"{case['id']}/{name}"], rtol=1e-5, atol=1e-5)

    for frequencies, axis in zip(rotary_frequencies(case["dim"], bases), "zhw", strict=True):
        expect(frequencies.float(), f"omega_{axis}")
    rotation = rotation_of(rotary_angles(tuple(case["spatial_shape"]), case["dim"], bases, rescale))
    expect(rotation.cos[0, 0], "cos")
    expect(rotation.sin[0, 0], "sin")

    def rotated(turn: Rotation, name: str) -> Tensor:
        return turn.rotate(tensors[f"{case['id']}/{name}"].transpose(1, 2)).transpose(1, 2)

    expect(rotated(rotation, "query"), "rotated")
    visible = rotation.take(tensors[f"{case['id']}/visible_idx"])
    expect(rotated(visible, "query_visible"), "rotated_visible")


def test_class_token_keeps_its_features() -> None:
    rotation = class_and_grid_rotation((2, 3, 4), HEAD_DIM, BASES, CPU)
    x = torch.randn(2, 3, 25, HEAD_DIM)
    turned = rotation.rotate(x)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    expected = rotation_of(rotary_angles((2, 3, 4), HEAD_DIM)).rotate(x[:, :, 1:])
    assert torch.equal(turned[:, :, 1:], expected)


def test_a_slice_turns_as_in_two_dimensions() -> None:
    """Level 5 has one token along depth: rows and columns alone decide, as in EVA-02."""
    volume = rotary_angles((3, 4, 5), HEAD_DIM).unflatten(0, (3, 4, 5))
    assert torch.equal(rotary_angles((1, 4, 5), HEAD_DIM).unflatten(0, (4, 5)), volume[0])


def test_table_is_computed_once_and_serves_training_after_evaluation() -> None:
    with torch.inference_mode():
        first = class_and_grid_rotation((1, 2, 7), HEAD_DIM, BASES, CPU)
    assert class_and_grid_rotation((1, 2, 7), HEAD_DIM, BASES, CPU) is first
    x = torch.randn(1, 1, 15, HEAD_DIM, requires_grad=True)
    first.rotate(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_keeps_dtype_and_length() -> None:
    rotation = class_and_grid_rotation(TRAINING_GRID, HEAD_DIM, BASES, CPU)
    x = torch.randn(1, 2, 501, HEAD_DIM, dtype=torch.bfloat16)
    turned = rotation.rotate(x)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=0)


POSITION = st.tuples(st.integers(0, 79), st.integers(0, 159), st.integers(0, 159))


def angles_at(position: tuple[int, int, int]) -> Tensor:
    omega_z, omega_y, omega_x = rotary_frequencies(HEAD_DIM)
    z, y, x = position
    return z * omega_z + torch.cat([y * omega_y, x * omega_x])


@settings(deadline=None)
@given(query_at=POSITION, key_at=POSITION, shift=POSITION, seed=st.integers(0, 1000))
def test_relative(
    query_at: tuple[int, int, int],
    key_at: tuple[int, int, int],
    shift: tuple[int, int, int],
    seed: int,
) -> None:
    """The product of a rotated query and key depends on their offset alone (appendix, first property)."""
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))

    def product(at_q: tuple[int, int, int], at_k: tuple[int, int, int]) -> Tensor:
        q_turned = rotation_of(angles_at(at_q)[None]).rotate(q)
        return (q_turned * rotation_of(angles_at(at_k)[None]).rotate(k)).sum()

    def shifted(position: tuple[int, int, int]) -> tuple[int, int, int]:
        z, y, x = (a + b for a, b in zip(position, shift, strict=True))
        return z, y, x

    torch.testing.assert_close(
        product(query_at, key_at), product(shifted(query_at), shifted(key_at)), rtol=1e-4, atol=1e-4
    )


def test_reversible_on_the_training_grid() -> None:
    """Every pair of positions has its own rotation (appendix, second property), compared one with another."""
    angles = rotary_angles(TRAINING_GRID, HEAD_DIM)
    points = torch.cat([angles.cos(), angles.sin()], dim=1)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 0.1


def test_reversible_on_the_voxel_grid() -> None:
    """Positions turn alike only where their offset turns by nothing, so it is enough to try all offsets.

    Half of the pairs sees (z, y) alone and the other half (z, x) with the same frequencies. A non-zero
    offset of the grid is non-zero in at least one of the two; hence the offsets in (z, y) decide.
    """
    depth, height, _ = VOXEL_GRID
    omega_z, omega_y, omega_x = rotary_frequencies(HEAD_DIM)
    assert torch.equal(omega_y, omega_x)
    y = torch.arange(1 - height, height, dtype=torch.float64)[:, None] * omega_y
    nearest = torch.inf
    for z in range(depth):  # an offset and its opposite turn equally far
        turn = (z * omega_z[: len(omega_y)] + y).remainder(2 * torch.pi)
        largest = torch.minimum(turn, 2 * torch.pi - turn).amax(dim=1)
        if z == 0:
            largest[height - 1] = torch.inf
        nearest = min(nearest, float(largest.min()))
    assert nearest > 0.05, "some offset of the grid turns every pair by less than 0.05 rad"


def test_reversible_in_float32() -> None:
    """Float32 tables of all 2 million positions: no two rows are equal.

    A random functional of the rows is compared: where it differs, the rows differ. The sum over the angles
    splits by axis, so no table of the whole grid is needed.
    """
    depth, height, width = VOXEL_GRID
    omega_z, omega_y, omega_x = rotary_frequencies(HEAD_DIM)
    weights = torch.randn(2, HEAD_DIM // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    half = len(omega_y)

    def project(z: int, size: int, omega: Tensor, part: slice) -> Tensor:
        angles = z * omega_z[part] + torch.arange(size, dtype=torch.float64)[:, None] * omega
        cos, sin = angles.cos().float().double(), angles.sin().float().double()
        return cos @ weights[0, part] + sin @ weights[1, part]

    rows = [project(z, height, omega_y, slice(half)) for z in range(depth)]
    columns = [project(z, width, omega_x, slice(half, None)) for z in range(depth)]
    values = torch.stack([a[:, None] + b for a, b in zip(rows, columns, strict=True)]).flatten().sort().values
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("head_dim", [0, 2, 6, 90])
def test_refuses_a_head_dimension_it_cannot_split(head_dim: int) -> None:
    with pytest.raises(SetupError, match="multiple of 4"):
        rotary_frequencies(head_dim)
