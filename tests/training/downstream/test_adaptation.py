"""Each mode trains what it says and nothing else, and begins as the network that was loaded."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from catalog.errors import SetupError
from training.backbone import Backbone, Features, Spacing
from training.downstream.adaptation import adapt, trained_parameters
from training.downstream.initialisations import as_module
from training.extractor import ViTBackbone
from training.vit import UniversalViT, ViTConfig

DIM, DEPTH = 16, 3
VIT = ViTConfig(dim=DIM, depth=DEPTH, heads=2, position_grid=(1, 2, 2))
SPACING = (1.0, 1.0, 1.0)

TRAINED = {
    "full": r".*",
    "linear": r"(?!)",
    "last-2": r"vit\.(blocks\.[12]\.|norm\.).*",
    "lora": r"vit\.blocks\.\d\.attention\.(query|value)\.lora_[AB]\..*",
    "lora-2": r"vit\.blocks\.\d\.attention\.(query|value)\.lora_[AB]\..*",
    "adapter-4": r"vit\.blocks\.\d\.((attention|mlp)\.bottleneck|norm[12])\..*",
    "adaptformer-4": r"vit\.blocks\.\d\.mlp\.bottleneck\..*",
}


def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone(UniversalViT(VIT)).eval()


def crops() -> Tensor:
    return torch.rand(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", TRAINED)
def test_a_mode_begins_as_the_loaded_network_and_trains_only_its_part(mode: str) -> None:
    network = backbone()
    before = network.forward_features(crops(), SPACING)
    adapt(network, mode)
    after = network.forward_features(crops(), SPACING)
    assert torch.equal(before.whole, after.whole)
    assert all(torch.equal(one, other) for one, other in zip(before.stages, after.stages, strict=True))

    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert trained_parameters(network) == sum(parameter.numel() for parameter in trained)
    if trained:
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
        for _ in range(2):  # what is zero at first passes no gradient on in the first step
            features = network.forward_features(crops(), SPACING)
            loss = features.whole.square().sum() + sum((stage**3).sum() for stage in features.stages)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, start[name])}
    named = {name for name in start if re.fullmatch(TRAINED[mode], name)}
    assert {name for name, value in network.named_parameters() if value.requires_grad} == named
    # Keys that all shift alike shift no attention: a few such directions may have no gradient.
    assert changed <= named
    assert len(changed) >= 0.9 * len(named)


def test_the_numbers_of_trained_parameters() -> None:
    expected = {
        "lora-2": DEPTH * 2 * 2 * (DIM + DIM),
        "adapter-4": DEPTH * (2 * (2 * DIM * 4 + 4 + DIM) + 4 * DIM),
        "adaptformer-4": DEPTH * (2 * DIM * 4 + 4 + DIM),
        "linear": 0,
    }
    for mode, count in expected.items():
        network = backbone()
        adapt(network, mode)
        assert trained_parameters(network) == count, mode


@pytest.mark.parametrize(
    "mode", ["", "half", "last", "last-0", "last-9", "lora-0", "full-2", "linear-1", "lora-x"]
)
def test_a_mode_that_is_none_is_refused(mode: str) -> None:
    with pytest.raises(SetupError, match="mode"):
        adapt(backbone(), mode)


class Other(nn.Module):
    """A network without blocks."""

    channels, stage_channels = 4, (4,)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, 4, 1)

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        stage = self.layer(image_BCDHW)
        return Features(stage.mean(dim=(2, 3, 4)), (stage,))


def test_a_network_without_blocks_can_be_trained_or_frozen_but_not_injected() -> None:
    for mode, count in (("full", 16), ("linear", 0)):
        network: Backbone = Other()
        adapt(network, mode)
        assert trained_parameters(as_module(network)) == count
    for mode in ("last-1", "lora", "adapter", "adaptformer"):
        with pytest.raises(SetupError, match="blocks of a ViT"):
            adapt(Other(), mode)
