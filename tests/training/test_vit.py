"""Universal ViT: numbers of the reference at every level, and what must hold for any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from catalog.errors import SetupError
from training.vit import DropPath, UniversalViT, ViTConfig, resample_positions, token_grid
from training.weights import load_weights

SMALL = ViTConfig(dim=64, depth=2, heads=4, position_grid=(2, 3, 3))
"""The configuration of the reference numbers."""
TINY = ViTConfig(dim=16, depth=3, heads=2, patch=4, position_grid=(2, 2, 2))
"""The fastest one, where any weights will do."""


def reference_cases(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    description = json.loads((folder / "07b_vit.json").read_text())
    return {case["id"]: case for case in description["cases"]}, load_file(folder / "07b_vit.safetensors")


@pytest.fixture(scope="module")
def reference(shared: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return reference_cases(shared / "reference")


@pytest.fixture(scope="module")
def reference_vit(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> UniversalViT:
    file = tmp_path_factory.mktemp("weights") / "reference.safetensors"
    tensors = load_file(shared / "reference/07a_vit_weights.safetensors")
    save_file({key.removeprefix("weights."): tensor for key, tensor in tensors.items()}, file)
    model = UniversalViT(SMALL).eval()
    load_weights(model, file)
    return model


def tiny(**changes: Any) -> UniversalViT:
    torch.manual_seed(0)
    return UniversalViT(ViTConfig(**{**TINY.model_dump(), **changes}))


def features(model: UniversalViT, x_BCDHW: Tensor, level: int) -> Tensor:
    with torch.no_grad():
        return model.forward_features(x_BCDHW, level)


@pytest.mark.parametrize("level", range(6))
def test_matches_the_reference(
    reference: tuple[dict[str, Any], dict[str, Tensor]], reference_vit: UniversalViT, level: int
) -> None:
    cases, tensors = reference
    name = f"vit/a{level}"

    def expect(actual: Tensor, part: str) -> None:
        torch.testing.assert_close(actual, tensors[f"{name}/{part}"], rtol=1e-5, atol=5e-5)

    model, x = reference_vit, tensors[f"{name}/input"]
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.blocks]
    hooks += [model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    output = features(model, x, level)
    for hook in hooks:
        hook.remove()

    with torch.no_grad():
        tokens, grid = model.embed_patches(x, level)
    assert list(grid) == cases[name]["token_grid"]
    expect(tokens.transpose(1, 2).unflatten(2, grid), "patch_embedding")
    for actual, part in zip(seen, ("sequence_input", "block0", "block1"), strict=True):
        expect(actual, part)
    expect(output, "output")


def test_position_table_resamples_as_the_reference(shared: Path) -> None:
    tensors = load_file(shared / "reference/07c_vit_loading.safetensors")
    targets = [key for key in tensors if key.startswith("resample/") and not key.endswith("source")]
    assert len(targets) == 8
    for key in targets:
        depth, height, width = (int(size) for size in key.removeprefix("resample/").split("x"))
        actual = resample_positions(tensors["resample/source"], (depth, height, width))
        torch.testing.assert_close(actual, tensors[key], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    old=st.tuples(*[st.integers(1, 6)] * 3),
    new=st.tuples(*[st.integers(1, 6)] * 3),
    value=st.floats(-3, 3, width=32),
)
def test_resampling_keeps_a_constant_table(
    old: tuple[int, int, int], new: tuple[int, int, int], value: float
) -> None:
    resampled = resample_positions(torch.full((1, 2, *old), value), new)
    torch.testing.assert_close(resampled, torch.full((1, 2, *new), value))


@pytest.mark.parametrize(
    ("size", "level", "grid"),
    [
        ((80, 160, 160), 0, (5, 10, 10)),
        ((40, 160, 160), 1, (5, 10, 10)),
        ((5, 160, 160), 4, (5, 10, 10)),
        ((1, 160, 160), 5, (1, 10, 10)),
        ((1, 16, 48), 26, (1, 1, 3)),
    ],
)
def test_token_grid(size: tuple[int, int, int], level: int, grid: tuple[int, int, int]) -> None:
    assert token_grid(size, level, patch=16) == grid


@pytest.mark.parametrize("size", [(3, 4, 4), (4, 6, 4), (4, 4, 7), (0, 4, 4)])
def test_a_crop_that_does_not_divide_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(SetupError, match="multiples"):
        tiny().forward_features(torch.zeros(1, 3, *size), 0)


@pytest.mark.parametrize("level", [1, 2])
def test_thick_slices_give_what_repeated_thin_slices_give(level: int) -> None:
    """The promise of the adaptive patch embedding, through the whole network."""
    model = tiny().eval()
    thick = torch.randn(2, 3, 8 >> level, 8, 8)
    thin = thick.repeat_interleave(2**level, dim=2)
    torch.testing.assert_close(features(model, thick, level), features(model, thin, 0), rtol=1e-4, atol=1e-5)


def test_crops_of_a_batch_do_not_touch_each_other() -> None:
    model = tiny().eval()
    x = torch.randn(3, 3, 4, 8, 8)
    order = [2, 0, 1]
    torch.testing.assert_close(features(model, x[order], 0), features(model, x, 0)[order])


def test_drop_path_acts_in_training_only() -> None:
    model, plain = tiny(drop_path=0.5), tiny()
    x = torch.randn(4, 3, 4, 8, 8)
    model.train()
    assert not torch.equal(features(model, x, 0), features(model, x, 0))
    model.eval()
    plain.eval()
    assert torch.equal(features(model, x, 0), features(plain, x, 0))


def test_drop_path_rises_along_the_blocks_and_keeps_the_mean() -> None:
    rates = [module.rate for module in tiny(drop_path=0.4).modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(10_000, 1, 1)).flatten()
    assert sorted(set(dropped.tolist())) == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradients(drop_path: float) -> None:
    x = torch.randn(4, 3, 4, 8, 8)

    def gradients(model: UniversalViT) -> dict[str, Tensor]:
        model.train()
        torch.manual_seed(1)
        model(x, 0).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept = gradients(tiny(drop_path=drop_path))
    recomputed = gradients(tiny(drop_path=drop_path, checkpoint_blocks=True))
    assert kept.keys() == dict(tiny().named_parameters()).keys(), "every parameter must learn"
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


def test_half_precision_stays_close() -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, 4, 8, 8)
    expected = features(model, x, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(features(model, x, 0).float(), expected, rtol=0.1, atol=0.1)
    pure = features(model.bfloat16(), x.bfloat16(), 0)
    assert pure.dtype == torch.bfloat16
    torch.testing.assert_close(pure.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("config", "millions"), [(ViTConfig.base(), 85.8), (ViTConfig.large(), 303.3)], ids=["base", "large"]
)
def test_presets_have_the_size_of_eva02(config: ViTConfig, millions: float) -> None:
    """Beside what is 3-D, as many parameters as the 2-D models (patch 14, 16 x 16 tokens) have."""
    with torch.device("meta"):
        model = UniversalViT(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    count -= model.patch_embedding.weight.numel() + model.position_table.numel()
    count += config.dim * (3 * 14 * 14 + 1 + 16 * 16)
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_preset_fields_can_be_changed() -> None:
    assert ViTConfig.base(depth=2) == ViTConfig(depth=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "multiple of 4"),
        ({"dim": 48, "heads": 8}, "multiple of 4"),
        ({"patch": 14}, "power of two"),
        ({"position_grid": (0, 2, 2)}, "at least one token"),
        ({"drop_path": 1.0}, "less than 1"),
        ({"width": 3}, "Extra inputs"),
    ],
)
def test_config_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViTConfig(**change)
