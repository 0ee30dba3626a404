"""Backbones by name: each is what its name says, and what is no backbone is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from catalog.errors import SetupError
from training.downstream.initialisations import as_module, load_backbone, origin_of
from training.downstream.swin import SwinBackbone, load_swin
from training.extractor import ViTBackbone
from training.pretrained import export_pretrained
from training.vit import UniversalViT, ViTConfig

SPACING = (1.0, 1.0, 1.0)
VIT = ViTConfig(dim=16, depth=2, heads=2, position_grid=(1, 2, 2))
EVA_DIM = 64


def crops(size: tuple[int, int, int] = (16, 32, 32), channels: int = 3) -> Tensor:
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))


def export(folder: Path, config: ViTConfig = VIT) -> UniversalViT:
    torch.manual_seed(3)
    vit = UniversalViT(config)
    export_pretrained(vit, folder, {"step": 40})
    return vit


def test_a_place_gives_the_weights_that_lie_there_and_scratch_of_it_only_their_size(tmp_path: Path) -> None:
    vit = export(tmp_path / "model")
    loaded = as_module(load_backbone(str(tmp_path / "model")))
    assert isinstance(loaded, ViTBackbone)
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), loaded.vit.parameters(), strict=True))
    fresh = as_module(load_backbone(f"scratch:{tmp_path / 'model'}"))
    assert isinstance(fresh, ViTBackbone)
    assert fresh.vit.config == VIT
    assert not torch.equal(fresh.vit.class_token, vit.class_token)

    origin = origin_of(str(tmp_path / "model"))
    assert origin["step"] == 40
    assert origin["corpus"] is None
    assert len(origin["weights_sha256"]) == 64


def test_scratch_follows_from_the_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(as_module(load_backbone("scratch:tiny")).state_dict())
    first, again, other = made
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["vit.class_token"], other["vit.class_token"])
    assert origin_of("scratch:tiny") == {}


def eva02_file(file: Path, depth: int = 2, hidden: int = 170) -> dict[str, Tensor]:
    """A small EVA-02 as timm saves it."""
    draw = torch.Generator().manual_seed(5)
    block = {
        "norm1.weight": (EVA_DIM,),
        "norm1.bias": (EVA_DIM,),
        "attn.q_proj.weight": (EVA_DIM, EVA_DIM),
        "attn.q_proj.bias": (EVA_DIM,),
        "attn.k_proj.weight": (EVA_DIM, EVA_DIM),
        "attn.v_proj.weight": (EVA_DIM, EVA_DIM),
        "attn.v_proj.bias": (EVA_DIM,),
        "attn.proj.weight": (EVA_DIM, EVA_DIM),
        "attn.proj.bias": (EVA_DIM,),
        "norm2.weight": (EVA_DIM,),
        "norm2.bias": (EVA_DIM,),
        "mlp.fc1_g.weight": (hidden, EVA_DIM),
        "mlp.fc1_g.bias": (hidden,),
        "mlp.fc1_x.weight": (hidden, EVA_DIM),
        "mlp.fc1_x.bias": (hidden,),
        "mlp.norm.weight": (hidden,),
        "mlp.norm.bias": (hidden,),
        "mlp.fc2.weight": (EVA_DIM, hidden),
        "mlp.fc2.bias": (EVA_DIM,),
    }
    shapes = {
        "cls_token": (1, 1, EVA_DIM),
        "pos_embed": (1, 17, EVA_DIM),
        "patch_embed.proj.weight": (EVA_DIM, 3, 14, 14),
        "patch_embed.proj.bias": (EVA_DIM,),
        "norm.weight": (EVA_DIM,),
        "norm.bias": (EVA_DIM,),
        **{f"blocks.{index}.{name}": shape for index in range(depth) for name, shape in block.items()},
    }
    tensors = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    torch.save(tensors, file)
    return tensors


def test_eva02_has_the_size_and_the_values_of_its_file(tmp_path: Path) -> None:
    tensors = eva02_file(tmp_path / "eva.pt")
    backbone = as_module(load_backbone(f"eva02:{tmp_path / 'eva.pt'}"))
    assert isinstance(backbone, ViTBackbone)
    config = backbone.vit.config
    assert (config.dim, config.depth, config.heads) == (EVA_DIM, 2, 1)
    last = backbone.vit.blocks[1].mlp.out.weight
    assert torch.equal(last, tensors["blocks.1.mlp.fc2.weight"])
    assert backbone.forward_features(crops(), SPACING).whole.shape == (2, EVA_DIM)
    assert set(origin_of(f"eva02:{tmp_path / 'eva.pt'}")) == {"weights_sha256"}
    torch.save({"cls_token": tensors["cls_token"]}, tmp_path / "other.pt")
    with pytest.raises(SetupError, match="gated MLP"):
        load_backbone(f"eva02:{tmp_path / 'other.pt'}")


@pytest.fixture(scope="module")
def swin() -> SwinBackbone:
    torch.manual_seed(0)
    return SwinBackbone(width=16).eval()


def published(swin: SwinBackbone) -> dict[str, Tensor]:
    """The names of MONAI's model_swinvit.pt, with a head of its pre-training."""
    names = {
        f"module.{name}".replace(".mlp.linear", ".mlp.fc"): tensor
        for name, tensor in swin.encoder.state_dict().items()
    }
    return {**names, "module.rotation_head.weight": torch.zeros(4, 256)}


def test_swin_unetr_is_filled_from_the_published_names(swin: SwinBackbone, tmp_path: Path) -> None:
    file = tmp_path / "model_swinvit.pt"
    torch.save({"epoch": 9, "state_dict": published(swin)}, file)
    torch.manual_seed(1)
    loaded = load_swin(file).eval()
    image = crops((32, 32, 32))
    features = loaded.forward_features(image, SPACING)
    assert [stage.shape[1] for stage in features.stages] == list(loaded.stage_channels)
    assert features.whole.shape == (2, loaded.channels)
    expected = swin.forward_features(image, SPACING)
    assert torch.equal(features.whole, expected.whole)


@pytest.mark.slow
def test_swin_unetr_is_filled_as_monai_fills_it(tmp_path: Path) -> None:
    from monai.networks.nets.swin_unetr import SwinUNETR

    image = crops((32, 32, 32))
    whole = SwinBackbone(width=48).eval()
    theirs = SwinUNETR(in_channels=1, out_channels=2, feature_size=48).eval()
    theirs.load_from({"state_dict": published(whole)})
    torch.save(theirs.state_dict(), tmp_path / "whole.pt")
    again = load_swin(tmp_path / "whole.pt").eval()
    with torch.no_grad():
        expected = theirs.swinViT(image.mean(dim=1, keepdim=True))
        stages = again.forward_features(image, SPACING).stages
    assert all(torch.equal(one, other) for one, other in zip(stages, expected, strict=True))


def test_swin_unetr_refuses_other_files_and_sizes(swin: SwinBackbone, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"model_swinvit\.pt"):
        load_backbone("swin-unetr")
    with pytest.raises(SetupError, match="no weight file"):
        load_backbone(f"swin-unetr:{tmp_path / 'none.pt'}")
    short = published(swin)
    del short["module.layers3.0.blocks.1.attn.proj.bias"]
    torch.save(short, tmp_path / "short.pt")
    with pytest.raises(SetupError, match=r"layers3\.0\.blocks\.1\.attn\.proj\.bias is missing"):
        load_backbone(f"swin-unetr:{tmp_path / 'short.pt'}")
    for size in ((1, 32, 32), (32, 32, 48)):
        with pytest.raises(SetupError, match="multiples of 32"):
            swin.forward_features(crops(size), SPACING)


OWN = """
from torch import nn

class Net(nn.Module):
    {channels}
    stage_channels = (4,)
    def forward_features(self, image, spacing):
        raise NotImplementedError

def make():
    return Net()

def nothing():
    return 3
"""


def test_ones_own_function_by_module_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(OWN.format(channels="channels = 4"))
    assert load_backbone(f"{tmp_path / 'my_networks.py'}:make").channels == 4
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = load_backbone("my_networks:make")
    assert isinstance(backbone, nn.Module)
    assert origin_of("my_networks:make") == {}
    (tmp_path / "lacking.py").write_text(OWN.format(channels=""))
    for name, message in {
        "my_networks:nothing": "returned int",
        "my_networks:missing": "no function missing",
        "no_such_networks:make": "no module no_such_networks",
        f"{tmp_path}/none.py:make": "no file",
        "lacking:make": "channels",
        "scratch:huge": "no size",
        "nowhere": "holds no trained model",
    }.items():
        with pytest.raises(SetupError, match=message):
            load_backbone(name)
