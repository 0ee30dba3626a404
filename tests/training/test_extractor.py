"""The universal ViT as a backbone: what it makes of crops of any size and spacing is what the ViT makes."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import training
from catalog.errors import SetupError
from catalog.spacing import da_level, degree_of_anisotropy
from tests.conftest import REPOSITORY
from training.backbone import Backbone, Features, Spacing
from training.extractor import ViTBackbone, level_of
from training.mim import IMAGENET_MEAN, IMAGENET_STD, MaskedImageModel, MIMConfig
from training.pretrained import export_pretrained
from training.vit import UniversalViT, ViTConfig, token_grid

CONFIG = ViTConfig(dim=16, depth=4, heads=2, position_grid=(2, 3, 3))


def backbone(**changes: Any) -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone(UniversalViT(ViTConfig(**{**CONFIG.model_dump(), **changes}))).eval()


def crop(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def features(model: Backbone, image_BCDHW: Tensor, spacing: Spacing) -> Features:
    with torch.no_grad():
        return model.forward_features(image_BCDHW, spacing)


def assert_close(one: Features, other: Features, **tolerance: float) -> None:
    for a, b in zip((one.whole, *one.stages), (other.whole, *other.stages), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, st.integers(2, 99))
def test_the_level_is_the_catalogs(z: float, y: float, x: float, slices: int) -> None:
    assert level_of((z, y, x), slices) == da_level(degree_of_anisotropy((z, y, x)))


def test_a_single_slice_has_no_depth() -> None:
    assert level_of((1.0, 1.0, 1.0), 1) == level_of((math.nan,) * 3, 1) == da_level(None)
    assert level_of((math.inf, 1.0, 1.0), 7) == da_level(None)


@pytest.mark.parametrize(
    "spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (math.nan, 1.0, 1.0), (1.0, 1.0, math.inf)]
)
def test_slices_of_no_distance_are_refused(spacing: Spacing) -> None:
    with pytest.raises(SetupError, match="three positive numbers"):
        features(backbone(), crop(1, 3, 16, 16, 16), spacing)


@pytest.mark.parametrize("level", range(6))
def test_it_gives_what_the_vit_gives_of_normalised_crops(level: int) -> None:
    model, size = backbone(), (max(32 >> level, 1), 32, 48)
    image = crop(2, 3, *size)
    found = features(model, image, (2.0**level * 0.7, 0.7, 0.9))
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected_BLC = model.vit.forward_features((image - mean) / std, level)
    d, h, w = token_grid(size, level, CONFIG.patch)
    assert torch.equal(found.whole, expected_BLC[:, 0])
    assert [tuple(stage.shape) for stage in found.stages] == [(2, 16, d, h, w)] * 4
    assert model.stage_channels == (16,) * 4
    for z, y, x in ((0, 0, 0), (d - 1, 1, w - 1)):
        assert torch.equal(found.stages[-1][:, :, z, y, x], expected_BLC[:, 1 + (z * h + y) * w + x])


def test_stages_are_the_tokens_after_their_blocks() -> None:
    model = backbone(depth=12)
    assert model.blocks == (4, 6, 8, 12)
    image = crop(1, 3, 1, 32, 32)
    cut = ViTBackbone(model.vit, blocks=(6, 12)).eval()
    seen: list[Tensor] = []
    model.vit.blocks[5].register_forward_hook(lambda _module, _input, output: seen.append(output))
    stage = features(cut, image, (1.0, 1.0, 1.0)).stages[0]
    assert torch.equal(stage.flatten(2).transpose(1, 2), seen[0][:, 1:])
    assert torch.equal(features(model, image, (1.0, 1.0, 1.0)).stages[1], stage)


@pytest.mark.parametrize("blocks", [(), (0, 4), (3, 2, 4), (1, 2), (4, 5)])
def test_blocks_that_there_are_not_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(SetupError, match="blocks must be ascending"):
        ViTBackbone(UniversalViT(CONFIG), blocks)


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_a_crop_of_any_size_is_padded_with_nothing_behind_it(d: int, h: int, w: int, level: int) -> None:
    model, spacing = backbone(depth=1, dim=8), (2.0**level, 1.0, 1.0)
    image, (slices, patch, _) = crop(1, 1, d, h, w), model.token_voxels(level)
    whole = torch.zeros(1, 3, -(-d // slices) * slices, -(-h // patch) * patch, -(-w // patch) * patch)
    whole[:, :, :d, :h, :w] = image
    found = features(model, image, spacing)
    assert_close(found, features(model, whole, spacing))
    assert found.stages[0].shape[2:] == (-(-d // slices), -(-h // patch), -(-w // patch))


def test_grey_is_three_equal_channels() -> None:
    model, grey = backbone(), crop(1, 1, 1, 32, 32)
    assert_close(
        features(model, grey, (1.0, 1.0, 1.0)), features(model, grey.expand(-1, 3, -1, -1, -1), (1.0, 1.0, 1.0))
    )
    for shape in ((1, 2, 1, 32, 32), (3, 32, 32), (1, 3, 0, 32, 32)):
        with pytest.raises(SetupError, match="crops are"):
            model.forward_features(crop(*shape), (1.0, 1.0, 1.0))


def test_every_weight_of_it_can_be_trained() -> None:
    model = backbone().train()
    image = crop(2, 3, 16, 32, 32).requires_grad_()
    found = model.forward_features(image, (1.0, 1.0, 1.0))
    (found.whole.square().sum() + sum(stage.square().sum() for stage in found.stages)).backward()
    assert image.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False)
    assert not model.forward_features(image.detach(), (1.0, 1.0, 1.0)).whole.requires_grad


def test_half_precision_is_close() -> None:
    model, image = backbone(), crop(1, 3, 16, 32, 32)
    exact = features(model, image, (1.0, 1.0, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = features(model, image, (1.0, 1.0, 1.0))
    assert_close(
        Features(rounded.whole.float(), tuple(s.float() for s in rounded.stages)), exact, atol=0.1, rtol=0.1
    )
    assert not torch.equal(rounded.whole.float(), exact.whole)


@pytest.mark.slow
def test_it_compiles_whole_for_any_spacing() -> None:
    model = backbone(depth=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for spacing in ((1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (5.5, 0.8, 0.8), (math.inf, 0.8, 0.8)):
        image = crop(1, 3, 8, 32, 32)
        with torch.no_grad():
            assert_close(compiled(image, spacing), model(image, spacing))


@pytest.mark.parametrize("head", [True, False])
def test_the_package_loads_what_was_exported(head: bool, tmp_path) -> None:
    torch.manual_seed(0)
    trained = MaskedImageModel(MIMConfig(vit=CONFIG, codebook_size=8, mask_layer_ids=(0, 1, 2, 3)))
    export_pretrained(trained if head else trained.vit, tmp_path / "vit")
    model = training.load_vit(tmp_path / "vit", blocks=(2, 4))
    assert not model.training
    assert model.blocks == (2, 4)
    image = crop(1, 3, 1, 32, 32)
    assert_close(
        features(model, image, (1.0, 1.0, 1.0)),
        features(ViTBackbone(trained.vit, (2, 4)), image, (1.0, 1.0, 1.0)),
    )


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys, training; assert 'torch' not in sys.modules; training.load_vit; training.nothing"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 1
    assert "AttributeError: module 'training' has no attribute 'nothing'" in ended.stderr
