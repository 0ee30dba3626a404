"""Weight files: EVA-02, the reference implementation's and our own, and files that must be refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from catalog.errors import SetupError
from training.mim import MaskedImageModel, MIMConfig
from training.vit import UniversalViT, ViTConfig
from training.weights import (
    inflate_patch_kernel,
    load_weights,
    split_position_rows,
)

TINY = ViTConfig(dim=8, depth=1, heads=2, position_grid=(2, 3, 3))
EVA = ViTConfig(dim=96, depth=3, heads=4, position_grid=(1, 4, 4), norm_eps=1e-6)


def vit(config: ViTConfig = TINY, seed: int = 0, **changes: Any) -> UniversalViT:
    torch.manual_seed(seed)
    return UniversalViT(ViTConfig(**{**config.model_dump(), **changes})).eval()


def mim(seed: int = 0, **changes: Any) -> MaskedImageModel:
    torch.manual_seed(seed)
    return MaskedImageModel(MIMConfig(vit=TINY, codebook_size=6, mask_layer_ids=(0,), **changes)).eval()


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def expect(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def eva(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference/10_eva02.safetensors")


@pytest.fixture(scope="module")
def timm_weights(eva: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("weights."): t for key, t in eva.items() if key.startswith("weights.")}


@pytest.fixture(scope="module")
def loading(shared: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    cases = json.loads((shared / "reference/07c_vit_loading.json").read_text())["cases"]
    return cases, load_file(shared / "reference/07c_vit_loading.safetensors")


def original_names(timm: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names under which EVA-02 was first published, with the tables that its checkpoints carry."""
    renamed = {
        "mlp.fc1_g": "mlp.w1",
        "mlp.fc1_x": "mlp.w2",
        "mlp.fc2": "mlp.w3",
        "mlp.norm": "mlp.ffn_ln",
        "attn.q_proj.bias": "attn.q_bias",
        "attn.v_proj.bias": "attn.v_bias",
    }
    tensors = {}
    for key, tensor in timm.items():
        for new, old in renamed.items():
            key = key.replace(new, old)
        tensors[key] = tensor
    extra = ("rope.freqs_cos", "blocks.0.attn.rope.freqs_sin", "lm_head.weight", "lm_head.bias")
    return tensors | {key: torch.zeros(3) for key in extra} | {"mask_token": torch.ones(1, 1, 96)}


class TestEVA02:
    def test_a_slice_gives_the_features_of_the_2d_model(
        self, eva: dict[str, Tensor], timm_weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        model = vit(EVA)
        report = load_weights(model, saved(timm_weights, tmp_path / "eva.safetensors"))
        assert not report.missing
        assert not report.unused
        slices = eva["input"].unsqueeze(2)
        with torch.no_grad():
            tokens, grid = model.embed_patches(slices, 5)
            features = model.forward_features(slices, 5)
        assert grid == (1, 4, 4)
        expect(tokens, eva["patch_embed"], atol=2e-5)
        expect(features, eva["features"], atol=2e-5)

    def test_a_slice_does_not_feel_the_depth_of_the_position_table(
        self, eva: dict[str, Tensor], timm_weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        model = vit(EVA, position_grid=(5, 4, 4))
        load_weights(model, saved(timm_weights, tmp_path / "eva.safetensors"))
        with torch.no_grad():
            expect(model.forward_features(eva["input"].unsqueeze(2), 5), eva["features"], atol=2e-5)

    def test_checkpoint_as_first_published(self, timm_weights: dict[str, Tensor], tmp_path: Path) -> None:
        """A PyTorch file with `module` on top, other names, tables, a mask token and a foreign head."""
        torch.save({"module": original_names(timm_weights), "epoch": 150}, tmp_path / "eva.pt")
        expected, model = vit(EVA), vit(EVA, seed=1)
        load_weights(expected, saved(timm_weights, tmp_path / "eva.safetensors"))
        report = load_weights(model, tmp_path / "eva.pt")
        assert same(expected, model)
        assert set(report.unused) == {
            "rope.freqs_cos",
            "blocks.0.attn.rope.freqs_sin",
            "lm_head.weight",
            "lm_head.bias",
            "mask_token",
        }

        masked = MaskedImageModel(MIMConfig(vit=EVA, mask_layer_ids=(0, 1, 2)))
        report = load_weights(masked, tmp_path / "eva.pt")
        assert same(masked.vit, expected)
        assert (masked.mask_token == 1).all()
        assert report.missing == ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
        assert "mask_token" in report.loaded

    def test_norm_behind_the_pooling(self, timm_weights: dict[str, Tensor], tmp_path: Path) -> None:
        """timm's models that average their tokens call the last norm `fc_norm`."""
        tensors = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: tensor
                   for key, tensor in timm_weights.items()}  # fmt: skip
        assert "fc_norm.weight" in tensors
        assert not load_weights(vit(EVA), saved(tensors, tmp_path / "eva.safetensors")).missing

    def test_half_precision_file(self, timm_weights: dict[str, Tensor], tmp_path: Path) -> None:
        half = {key: tensor.half() for key, tensor in timm_weights.items()}
        model = vit(EVA)
        load_weights(model, saved(half, tmp_path / "eva.safetensors"))
        assert model.norm.weight.dtype == torch.float32
        expected = timm_weights["patch_embed.proj.weight"] / 16
        torch.testing.assert_close(model.patch_embedding.weight[:, :, 7], expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("index", range(3))
    def test_patch_kernel_and_positions_match_the_reference(
        self, loading: tuple[list[dict[str, Any]], dict[str, Tensor]], tmp_path: Path, index: int
    ) -> None:
        cases, tensors = loading
        case = next(case for case in cases if case["id"] == f"eva{index}")
        prefix = f"{case['id']}/checkpoint/"
        model = vit(position_grid=tuple(case["pos_embed_shape"]))
        adapted = {"class_token", "position_table", "patch_embedding.weight", "patch_embedding.bias"}
        checkpoint = {name: t for name, t in model.state_dict().items() if name not in adapted}
        checkpoint |= {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        file = saved(checkpoint, tmp_path / "eva.safetensors")
        report = load_weights(model, file, position_grid=tuple(case["checkpoint_grid"]))
        assert not report.missing

        loaded = f"{case['id']}/loaded/"
        kernel = model.patch_embedding.weight
        for depth in range(16):
            expect(kernel[:, :, depth], tensors[f"{loaded}patch_kernel_depth_slice"])
        expect(model.position_table, tensors[f"{loaded}pos_embed"])
        expect(model.class_token, tensors[f"{loaded}cls_token_row0"])

    def test_a_table_that_is_not_square_needs_its_grid(
        self, timm_weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        tensors = timm_weights | {"pos_embed": torch.zeros(1, 31, 96)}
        file = saved(tensors, tmp_path / "eva.safetensors")
        with pytest.raises(SetupError, match=r"30 patches.*position_grid"):
            load_weights(vit(EVA), file)
        with pytest.raises(SetupError, match="4 x 4"):
            load_weights(vit(EVA), file, position_grid=(4, 4))
        assert load_weights(vit(EVA), file, position_grid=(5, 6)).loaded


def test_inflated_kernel_sums_to_the_2d_one() -> None:
    kernel = torch.randn(4, 3, 16, 16)
    expect(inflate_patch_kernel(kernel, 16).sum(dim=2), kernel)


def test_resampling_keeps_the_values_of_a_flat_kernel() -> None:
    kernel = torch.full((2, 3, 14, 14), 0.5)
    expect(inflate_patch_kernel(kernel, 16), torch.full((2, 3, 16, 16, 16), 0.5 / 16))


def test_position_rows_lie_row_by_row() -> None:
    rows = torch.arange(7.0)[None, :, None].expand(1, 7, 2)
    first, table = split_position_rows(rows, (2, 3))
    assert first.flatten().tolist() == [0, 0]
    assert table[0, 1, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


class TestReference:
    @pytest.fixture
    def checkpoint(self, shared: Path) -> dict[str, Tensor]:
        tensors = load_file(shared / "reference/07a_vit_weights.safetensors")
        return {key.removeprefix("weights."): tensor for key, tensor in tensors.items()}

    def test_every_key_has_its_place(self, checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
        torch.save({"state_dict": checkpoint, "global_step": 300_000}, tmp_path / "pumit.ckpt")
        config = MIMConfig(
            vit=ViTConfig(dim=64, depth=2, heads=4, position_grid=(2, 3, 3)),
            codebook_size=64,
            mask_layer_ids=(0, 1),
        )
        model = MaskedImageModel(config)
        report = load_weights(model, tmp_path / "pumit.ckpt")
        assert len(report.loaded) == len(checkpoint)
        assert report.missing == report.unused == ()
        assert "mask_token_position=false" in str(report)
        assert torch.equal(model.head[2].bias, checkpoint["mim_head.2.bias"])

        encoder = UniversalViT(config.vit)
        report = load_weights(encoder, tmp_path / "pumit.ckpt")
        assert same(encoder, model.vit)
        assert set(report.unused) == {k for k in checkpoint if k.startswith("mim_head")} | {"mask_token"}

    @pytest.mark.parametrize("depth", [1, 2, 4, 8])
    def test_adaptive_checkpoint(
        self, loading: tuple[list[dict[str, Any]], dict[str, Tensor]], tmp_path: Path, depth: int
    ) -> None:
        """The fixed patch depths of the reference's downstream models are what levels 4 to 1 use here."""
        cases, tensors = loading
        case = next(case for case in cases if case["id"] == f"adaptive/depth{depth}")
        model = vit(position_grid=tuple(case["pos_embed_shape"]))
        checkpoint = model.state_dict()
        for ours, theirs in (
            ("patch_embedding.weight", "patch_embed.proj.weight"),
            ("position_table", "pos_embed"),
        ):
            del checkpoint[ours]
            checkpoint[theirs] = tensors[f"adaptive/checkpoint/{theirs}"]
        load_weights(model, saved(checkpoint, tmp_path / "adaptive.safetensors"))
        expect(model.position_table, tensors[f"{case['id']}/pos_embed"])

        x, stride = torch.randn(1, 3, 8, 32, 16), (depth, 16, 16)
        expected = F.conv3d(x, tensors[f"{case['id']}/patch_kernel"], model.patch_embedding.bias, stride)
        with torch.no_grad():
            tokens, grid = model.embed_patches(x, 4 - int(math.log2(depth)))
        expect(tokens.transpose(1, 2).unflatten(2, grid), expected, atol=1e-4)


def test_other_number_of_input_channels(tmp_path: Path) -> None:
    """Three equal channels and their two-channel copy give the same tokens."""
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    model = vit(in_channels=2, seed=1)
    report = load_weights(model, tmp_path / "vit.safetensors")
    assert "spread over 2" in str(report)
    x = torch.randn(1, 1, 4, 16, 16)
    with torch.no_grad():
        expected, _ = vit().embed_patches(x.expand(-1, 3, -1, -1, -1), 2)
        actual, _ = model.embed_patches(x.expand(-1, 2, -1, -1, -1), 2)
    expect(actual, expected)


class TestOwnFiles:
    def test_a_pretrained_model_fills_an_encoder(self, tmp_path: Path) -> None:
        pretrained = mim()
        save_file(pretrained.state_dict(), tmp_path / "mim.safetensors")
        encoder = vit(seed=1)
        report = load_weights(encoder, tmp_path / "mim.safetensors")
        assert same(encoder, pretrained.vit)
        assert report.missing == ()
        assert "class_token" in report.loaded
        assert "head.2.bias" in report.unused

    def test_an_encoder_fills_a_model_to_pretrain(self, tmp_path: Path) -> None:
        save_file(vit().state_dict(), tmp_path / "vit.safetensors")
        model = mim(seed=1)
        report = load_weights(model, tmp_path / "vit.safetensors")
        assert same(model.vit, vit())
        assert "mask_token" in report.missing
        assert re.search(r"25 of 30 parameters loaded\n  not in the file.*mask_token", str(report))


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in vit().state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (vit().state_dict() | {"blocks.0.attn.qkv.weight": torch.zeros(24, 8)}, "qkv.weight.*no parameter"),
        (vit().state_dict() | {"blocks.1.norm1.weight": torch.zeros(8)}, "blocks.1.norm1.weight"),
        (without("blocks.0.mlp.gate.weight"), "lacks vit.blocks.0.mlp.gate.weight"),
        (without("norm.bias") | {"norm.bias": torch.zeros(9)}, "norm.bias is 9, the model needs 8"),
        (
            without("patch_embedding.weight") | {"patch_embedding.weight": torch.zeros(8, 3, 8, 8, 8)},
            "8 x 3 x 8",
        ),
        (without("class_token") | {"cls_token": torch.zeros(1, 1, 8), "class_token": torch.ones(8)}, "twice"),
        ({"norm.weight": torch.zeros(8), "norm.bias": torch.zeros(8)}, "2 of 25 parameters"),
        ({"encoder.conv.weight": torch.zeros(3)}, "encoder.conv.weight"),
    ],
    ids=["fused", "deeper", "lacking", "shape", "kernel", "twice", "few", "foreign"],
)
def test_a_file_that_does_not_fit_changes_nothing(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    model = vit(seed=1)
    file = saved(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(SetupError, match=message) as error:
        load_weights(model, file)
    assert str(file) in str(error.value)
    assert same(model, vit(seed=1))


class Harmful:
    """Runs code when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": vit().state_dict(), "hooks": Harmful(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(SetupError, match="more than tensors"):
        load_weights(vit(), tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_refused(suffix: str, damage: str, tmp_path: Path) -> None:
    file = tmp_path / f"vit{suffix}"
    if suffix == ".pt":
        torch.save(vit().state_dict(), file)
    else:
        save_file(vit().state_dict(), file)
    content = {"cut": file.read_bytes()[:2000], "empty": b"", "text": b"<!doctype html>\n" * 9}[damage]
    file.write_bytes(content)
    with pytest.raises(SetupError, match=re.escape(str(file))):
        load_weights(vit(), file)


def test_other_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no weight file"):
        load_weights(vit(), tmp_path / "absent.pt")
    (tmp_path / "vit.h5").touch()
    with pytest.raises(SetupError, match="safetensors"):
        load_weights(vit(), tmp_path / "vit.h5")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SetupError, match="by name"):
        load_weights(vit(), tmp_path / "list.pt")
    torch.save(vit().state_dict() | {"step": 3}, tmp_path / "mixed.pt")
    with pytest.raises(SetupError, match=r"step.*not tensors"):
        load_weights(vit(), tmp_path / "mixed.pt")
