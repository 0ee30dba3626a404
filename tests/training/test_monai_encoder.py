"""The ViT as an encoder of MONAI's networks: its shapes, its sense of spacing, and that it can be trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import FlexibleUNet

from catalog.errors import SetupError
from training.extractor import ViTBackbone
from training.monai_encoder import ViTEncoder, pyramid_channels, register_vit
from training.pretrained import export_pretrained
from training.vit import UniversalViT, ViTConfig

CONFIG = ViTConfig(dim=16, depth=4, heads=2, position_grid=(1, 2, 2))


def vit() -> UniversalViT:
    torch.manual_seed(0)
    return UniversalViT(CONFIG)


def volumes(*mm: tuple[float, float, float], size: tuple[int, int, int] = (32, 48, 16)) -> MetaTensor:
    """Images (B, 1, X, Y, Z) with these spacings, turned as scanners do."""
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    affine = torch.stack([torch.eye(4) for _ in mm])
    affine[:, :3, :3] = torch.stack([turn @ torch.diag(torch.tensor(one)) for one in mm])
    voxels = torch.rand((len(mm), 1, *size), generator=torch.Generator().manual_seed(1))
    batch = MetaTensor(voxels, affine=affine)
    batch.is_batch = True
    return batch


@pytest.mark.parametrize("thickness", [1.0, 2.0, 5.0, 9.0, 20.0, 50.0])
def test_a_network_of_monai_is_trained_at_every_level(thickness: float, tmp_path: Path) -> None:
    export_pretrained(vit(), tmp_path / "vit")
    register_vit("pumit", tmp_path / "vit")
    network = FlexibleUNet(1, 3, "pumit", pretrained=True, spatial_dims=3, decoder_channels=(16, 8, 8, 4))
    assert torch.equal(network.encoder.backbone.vit.class_token, vit().class_token)
    image = volumes((1.0, 1.0, thickness), (0.9, 0.9, 0.9 * thickness))
    predicted = network(image)
    assert predicted.shape == (2, 3, 32, 48, 16)
    predicted.square().mean().backward()
    unused = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not unused


def test_a_network_of_monai_sees_pictures(tmp_path: Path) -> None:
    export_pretrained(vit(), tmp_path / "vit")
    register_vit("pumit-2d", tmp_path / "vit")
    network = FlexibleUNet(3, 2, "pumit-2d", spatial_dims=2, decoder_channels=(16, 8, 8, 4))
    predicted = network(torch.rand(2, 3, 32, 48))
    assert predicted.shape == (2, 2, 32, 48)
    predicted.mean().backward()


def test_without_pretraining_the_weights_are_new(tmp_path: Path) -> None:
    export_pretrained(vit(), tmp_path / "vit")
    register_vit("pumit-new", tmp_path / "vit")
    torch.manual_seed(1)
    network = FlexibleUNet(1, 2, "pumit-new", pretrained=False, spatial_dims=3)
    assert not torch.equal(network.encoder.backbone.vit.class_token, vit().class_token)


def test_the_deepest_features_are_the_tokens_of_the_vit() -> None:
    backbone = ViTBackbone(vit()).eval()
    encoder = ViTEncoder(backbone).eval()
    image = volumes((0.7, 0.7, 1.0))
    with torch.no_grad():
        pyramid = encoder(image)
        tokens = backbone.forward_features(image.as_tensor().movedim(-1, 2), (1.0, 0.7, 0.7)).stages[-1]
    assert torch.equal(pyramid[-1], tokens.movedim(2, -1))
    sizes = [(channels, 32 >> k, 48 >> k, 16 >> k) for k, channels in enumerate(pyramid_channels(16), start=1)]
    assert [tuple(one.shape[1:]) for one in pyramid] == sizes


def test_the_depth_may_be_another_axis_and_the_spacing_be_given() -> None:
    backbone = ViTBackbone(vit()).eval()
    last = ViTEncoder(backbone, spacing=(1.0, 1.0, 5.0)).eval()
    first = ViTEncoder(backbone, spacing=(5.0, 1.0, 1.0), depth_axis=0).eval()
    first.load_state_dict(last.state_dict())
    image = volumes((1.0, 1.0, 1.0)).as_tensor()
    with torch.no_grad():
        for one, other in zip(last(image), first(image.movedim(-1, 2)), strict=True):
            torch.testing.assert_close(one, other.movedim(2, -1))
        assert torch.equal(last(volumes((1.0, 1.0, 5.0)))[0], last(image)[0])
        assert not torch.equal(last(volumes((1.0, 1.0, 1.0)))[0], last(image)[0])


def test_what_cannot_be_encoded_is_told() -> None:
    encoder = ViTEncoder(ViTBackbone(vit()))
    with pytest.raises(SetupError, match="do not tell their spacing"):
        encoder(torch.rand(1, 1, 16, 16, 16))
    with pytest.raises(SetupError, match=r"DA levels \[0, 2\]"):
        encoder(volumes((1.0, 1.0, 1.0), (1.0, 1.0, 5.0)))
    with pytest.raises(SetupError, match="multiple of 16"):
        encoder(volumes((1.0, 1.0, 1.0), size=(32, 32, 20)))
    with pytest.raises(SetupError, match="4 stages"):
        ViTEncoder(ViTBackbone(vit(), (4,)))
    with pytest.raises(SetupError, match="in_channels 2"):
        ViTEncoder(ViTBackbone(vit()), in_channels=2)
