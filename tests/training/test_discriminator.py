"""Patch discriminator: parity with reference values, shapes, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from catalog.errors import SetupError
from training.discriminator import PatchDiscriminator

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
CASES = json.loads((REFERENCE / "05_gan_lpips.json").read_text())["cases"] if REFERENCE.is_dir() else []


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "05_gan_lpips.safetensors")


@pytest.fixture(scope="module")
def reference(tensors: dict[str, Tensor]) -> PatchDiscriminator:
    """The reference numbers convolution, norm and activation through: 3 i, 3 i + 1, 3 i + 2."""
    modules = {f"{3 * i}": f"blocks.{i}.conv" for i in range(3)}
    modules |= {f"{3 * i + 1}": f"blocks.{i}.norm" for i in range(3)} | {"9": "head"}
    discriminator = PatchDiscriminator((16, 32))
    discriminator.load_state_dict(
        {
            f"{ours}.{kind}": tensors[f"discriminator.{theirs}.{kind}"]
            for theirs, ours in modules.items()
            for kind in ("weight", "bias")
        }
    )
    return discriminator


@pytest.mark.parametrize("case", [c for c in CASES if "aniso_d" in c], ids=lambda case: case["id"])
@pytest.mark.parametrize("image", ["real", "fake"])
def test_scores_are_the_reference_values(
    image: str, case: dict[str, Any], tensors: dict[str, Tensor], reference: PatchDiscriminator
) -> None:
    with torch.no_grad():
        score = reference(tensors[f"{case['id']}/{image}"], case["aniso_d"])
    assert list(score.shape) == case["score_shape"]
    torch.testing.assert_close(score, tensors[f"{case['id']}/score_{image}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", range(6))
def test_any_size_is_scored_and_every_parameter_learns(level: int) -> None:
    discriminator = PatchDiscriminator((16, 16))
    discriminator(torch.randn(2, 3, max(20 >> level, 1), 18, 13), level).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize("channels", [(), (24,), (0,)])
def test_channels_that_group_norm_cannot_split_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(SetupError, match=r"discriminator\.channels must be positive multiples of 16"):
        PatchDiscriminator(channels)
