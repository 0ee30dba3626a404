"""Masked image modelling: numbers and gradients of the reference, and what hidden patches must not tell."""

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
from training.mim import MaskedImageModel, MIMConfig, masked_index, mim_loss, n_visible, visible_mask
from training.vit import ViTConfig
from training.weights import load_weights

SMALL = ViTConfig(dim=64, depth=2, heads=4, position_grid=(2, 3, 3))
TINY = ViTConfig(dim=16, depth=3, heads=2, patch=4, position_grid=(2, 2, 2))
REFERENCE_GRADIENTS = {
    "cls_token": "vit.class_token",
    "pos_embed": "vit.position_table",
    "mask_token": "mask_token",
    "blocks.0.attn.q_proj.weight": "vit.blocks.0.attention.query.weight",
    "mim_head.2.bias": "head.2.bias",
}


@pytest.fixture(scope="module")
def reference(shared: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    description = json.loads((shared / "reference/07b_vit.json").read_text())
    cases = {case["id"]: case for case in description["cases"]}
    return cases | {"n_visible": description["num_visible_table"]}, load_file(
        shared / "reference/07b_vit.safetensors"
    )


@pytest.fixture(scope="module")
def reference_weights(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "reference.safetensors"
    tensors = load_file(shared / "reference/07a_vit_weights.safetensors")
    save_file({key.removeprefix("weights."): tensor for key, tensor in tensors.items()}, file)
    return file


def tiny(mask_layer_ids: tuple[int, ...] = (0, 1, 2), **changes: Any) -> MaskedImageModel:
    torch.manual_seed(0)
    config = MIMConfig(vit=TINY, codebook_size=8, mask_layer_ids=mask_layer_ids, **changes)
    return MaskedImageModel(config).eval()


def random_visible(batch: int, length: int, count: int) -> Tensor:
    return torch.rand(batch, length).argsort(dim=1)[:, :count].sort(dim=1).values


@pytest.mark.parametrize("name", [f"mim{index}" for index in range(5)])
def test_matches_the_reference(
    reference: tuple[dict[str, Any], dict[str, Tensor]], reference_weights: Path, name: str
) -> None:
    cases, tensors = reference
    case = cases[name]

    def expect(actual: Tensor, part: str) -> None:
        torch.testing.assert_close(actual, tensors[f"{name}/{part}"], rtol=1e-5, atol=5e-5)

    config = MIMConfig(
        vit=SMALL, codebook_size=64, mask_layer_ids=case["mask_layer_ids"], mask_token_position=False
    )
    model = MaskedImageModel(config)
    assert not load_weights(model, reference_weights).missing

    image, visible = tensors[f"{name}/image"], tensors[f"{name}/visible_idx"]
    assert visible.shape[1] == n_visible(case["seq_len"])
    expect(model.encode(image, case["aniso_d"], visible), "hidden")
    logits = model(image, case["aniso_d"], visible)
    expect(logits[~visible_mask(visible, case["seq_len"])], "masked_prediction_logits")

    result = mim_loss(logits, tensors[f"{name}/target_logits"], visible)
    expect(result.loss, "loss")
    assert result.kl.item() == pytest.approx(case["kld"], abs=5e-5)
    assert result.target_entropy.item() == pytest.approx(case["target_mean_entropy"], abs=5e-5)

    result.loss.backward()
    parameters = dict(model.named_parameters())
    for theirs, ours in REFERENCE_GRADIENTS.items():
        gradient = parameters[ours].grad
        assert gradient is not None
        torch.testing.assert_close(gradient, tensors[f"{name}/grad/{theirs}"], rtol=1e-4, atol=2e-6)


def test_number_of_visible_tokens(reference: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    for row in reference[0]["n_visible"]:
        assert n_visible(row["seq_len"], row["mask_ratio"]) == row["num_visible"]


def test_rounding_of_visible_tokens() -> None:
    assert (n_visible(500), n_visible(100)) == (224, 44)


@settings(deadline=None)
@given(st.data())
def test_masked_index_completes_the_visible_one(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(0, length))
    choice = st.permutations(range(length)).map(lambda order: sorted(order[:count]))
    visible = torch.tensor([data.draw(choice) for _ in range(3)], dtype=torch.int64).reshape(3, count)
    masked = masked_index(visible, length)
    for seen, hidden in zip(visible.tolist(), masked.tolist(), strict=True):
        assert hidden == sorted(hidden)
        assert sorted(seen + hidden) == list(range(length))


@pytest.mark.parametrize("mask_layer_ids", [(0, 1, 2), (2,), (1,), (0, 2)])
@pytest.mark.parametrize("mask_token_position", [True, False])
def test_hidden_voxels_tell_nothing(mask_layer_ids: tuple[int, ...], mask_token_position: bool) -> None:
    model = tiny(mask_layer_ids, mask_token_position=mask_token_position)
    visible = random_visible(2, 8, 3)
    x = torch.rand(2, 3, 8, 8, 8, requires_grad=True)
    model(x, 0, visible).square().sum().backward()
    assert x.grad is not None
    # (B, 3, D, H, W) to the largest gradient within each of the 2 x 2 x 2 patches of 4 voxels a side.
    largest = torch.nn.functional.max_pool3d(x.grad.abs().amax(dim=1), 4).flatten(1)
    seen = visible_mask(visible, 8)
    assert (largest[~seen] == 0).all()
    assert (largest[seen] > 0).all()


def test_other_blocks_see_the_visible_tokens_only() -> None:
    model = tiny((2,))
    lengths: list[int] = []
    for block in model.vit.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(torch.rand(1, 3, 8, 8, 8), 0, random_visible(1, 8, 3))
    assert lengths == [4, 4, 9]


def test_all_visible_is_the_plain_vit() -> None:
    model = tiny()
    x = torch.rand(2, 3, 8, 8, 8)
    everything = torch.arange(8).expand(2, -1)
    with torch.no_grad():
        expected = model.vit((x - model.image_mean) / model.image_std, 0)
        torch.testing.assert_close(model.encode(x, 0, everything), expected)


def test_crops_of_a_batch_do_not_touch_each_other() -> None:
    model = tiny((1, 2))
    x, visible, order = torch.rand(3, 3, 8, 8, 8), random_visible(3, 8, 3), [2, 0, 1]
    with torch.no_grad():
        torch.testing.assert_close(model(x[order], 0, visible[order]), model(x, 0, visible)[order])


def test_position_of_mask_tokens_is_the_position_table() -> None:
    with_position, without = tiny(mask_token_position=True), tiny(mask_token_position=False)
    x, visible = torch.rand(1, 3, 8, 8, 8), random_visible(1, 8, 3)
    with torch.no_grad():
        assert not torch.allclose(with_position(x, 0, visible), without(x, 0, visible))
        for model in (with_position, without):
            model.vit.position_table.zero_()
        assert torch.equal(with_position(x, 0, visible), without(x, 0, visible))


def test_new_mask_token_is_initialised() -> None:
    assert 0.005 < MaskedImageModel(MIMConfig(vit=SMALL, mask_layer_ids=(0,))).mask_token.std() < 0.03


def test_every_parameter_learns() -> None:
    model = tiny((2,)).train()
    visible = random_visible(2, 8, 3)
    mim_loss(model(torch.rand(2, 3, 8, 8, 8), 0, visible), torch.randn(2, 8, 8), visible).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_recomputed_activations_give_the_same_gradients() -> None:
    visible, x, target = random_visible(2, 8, 3), torch.rand(2, 3, 8, 8, 8), torch.randn(2, 8, 8)

    def gradients(checkpoint_blocks: bool) -> list[Tensor]:
        torch.manual_seed(0)
        vit = ViTConfig(**{**TINY.model_dump(), "checkpoint_blocks": checkpoint_blocks, "drop_path": 0.5})
        model = MaskedImageModel(MIMConfig(vit=vit, codebook_size=8, mask_layer_ids=(1, 2))).train()
        mim_loss(model(x, 0, visible), target, visible).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


def test_loss_of_a_perfect_prediction() -> None:
    target, visible = torch.randn(2, 6, 10), random_visible(2, 6, 2)
    prediction = target.clone().requires_grad_()
    result = mim_loss(prediction, target, visible)
    assert result.kl.item() == pytest.approx(0, abs=1e-6)
    assert result.loss.item() == pytest.approx(result.target_entropy.item())
    assert (result.accuracy.item(), result.accuracy_top5.item()) == (1, 1)
    result.loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().max() < 1e-6


def test_loss_ignores_visible_tokens_and_gives_the_target_no_gradient() -> None:
    visible = torch.tensor([[0, 2]])
    prediction, target = torch.randn(1, 4, 6, requires_grad=True), torch.randn(1, 4, 6, requires_grad=True)
    mim_loss(prediction, target, visible).loss.backward()
    assert prediction.grad is not None
    assert target.grad is None
    assert prediction.grad[0].abs().amax(dim=1).gt(0).tolist() == [False, True, False, True]


def test_accuracies() -> None:
    """Codes 0..6; the target's best is 3. Predicted first, third and last."""
    target = torch.zeros(1, 4, 7)
    target[..., 3] = 5
    prediction = torch.stack(
        [
            torch.tensor(scores)
            for scores in (
                [0.0] * 7,
                [0.0, 0, 0, 9, 1, 2, 3],
                [0.0, 8, 9, 7, 1, 2, 3],
                [5.0, 4, 3, -9, 8, 7, 6],
            )
        ]
    )[None]
    result = mim_loss(prediction, target, torch.tensor([[0]]))
    assert result.accuracy.item() == pytest.approx(1 / 3)
    assert result.accuracy_top5.item() == pytest.approx(2 / 3)


def test_loss_is_stable_for_certain_tokens_in_half_precision() -> None:
    target = torch.full((1, 2, 4), -300.0, dtype=torch.bfloat16)
    target[..., 0] = 300
    result = mim_loss(torch.zeros(1, 2, 4, dtype=torch.bfloat16), target, torch.tensor([[0]]))
    assert result.target_entropy.item() == 0
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(torch.log(torch.tensor(4.0)).item())


def test_a_crop_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SetupError, match="multiples"):
        tiny()(torch.rand(1, 3, 8, 8, 9), 0, torch.tensor([[0]]))


def test_presets() -> None:
    assert MIMConfig.base().mask_layer_ids == tuple(range(12))
    assert MIMConfig.large().mask_layer_ids == tuple(range(18, 24))
    assert MIMConfig.large().vit == ViTConfig.large()


@pytest.mark.parametrize("ids", [(), (2, 1), (0, 0), (-1,), (3,)])
def test_config_refuses_blocks_that_do_not_exist(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="mask_layer_ids"):
        MIMConfig(vit=TINY, mask_layer_ids=ids)


def test_config_refuses_other_channels() -> None:
    with pytest.raises(ValidationError, match="3 channels"):
        MIMConfig(vit=ViTConfig(in_channels=2))
