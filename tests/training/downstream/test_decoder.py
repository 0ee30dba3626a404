"""The decoder follows the anisotropy of the voxels and the strides of the backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from catalog.errors import SetupError
from tests.training.downstream.toy import PatchBackbone, PyramidBackbone
from training.downstream.decoder import SegmentationNet, halvings, supervision
from training.extractor import ViTBackbone
from training.vit import UniversalViT, ViTConfig

CUBE = (1.0, 1.0, 1.0)


def net(backbone: nn.Module, crop, spacing=CUBE, channels=1, classes=3) -> SegmentationNet:
    torch.manual_seed(0)
    return SegmentationNet(backbone, channels=channels, classes=classes, crop=crop, spacing=spacing, width=4)


def test_depth_is_left_alone_until_voxels_are_about_isotropic():
    """Patches of 4 x 16 x 16 voxels, as at 3 x 0.75 x 0.75 mm; of cubes; and of pictures."""
    assert halvings((4, 16, 16)) == [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert halvings((16, 16, 16)) == [(2, 2, 2)] * 4
    assert halvings((1, 16, 16)) == [(1, 2, 2)] * 4


@pytest.mark.parametrize(
    ("spacing", "crop", "grids"),
    [
        # BTCV's: level 2; pyramid of strides (1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32)
        ((3, 0.75, 0.75), (16, 64, 64), [(16, 16, 16), (8, 8, 8), (4, 4, 4), (2, 2, 2)]),
        (CUBE, (32, 64, 64), [(8, 16, 16), (4, 8, 8), (2, 4, 4), (1, 2, 2)]),
        (CUBE, (1, 64, 64), [(1, 16, 16), (1, 8, 8), (1, 4, 4), (1, 2, 2)]),
    ],
)
def test_a_vit_becomes_a_pyramid_of_the_strides_of_the_paper(spacing, crop, grids):
    vit = UniversalViT(ViTConfig(dim=16, depth=4, heads=2, position_grid=(2, 4, 4)))
    made = net(ViTBackbone(vit), crop, spacing)
    image = torch.rand(1, 1, *crop)
    seen = []
    for lateral in made.laterals:
        lateral.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    logits = made(image)
    assert seen == grids
    depth_is_halved_first_between = crop[0] // grids[0][0]
    assert [tuple(one.shape) for one in logits[:2]] == [
        (1, 3, *crop),
        (1, 3, crop[0] // min(depth_is_halved_first_between, 2), 32, 32),
    ]


def test_stages_that_grow_coarser_are_taken_as_they_are():
    made = net(PyramidBackbone(), (16, 32, 32))
    assert all(isinstance(layer, nn.Identity) for layer in made.pyramid)
    shapes = [tuple(one.shape[2:]) for one in made(torch.rand(2, 1, 16, 32, 32))]
    assert shapes == [(16, 32, 32), (8, 16, 16), (4, 8, 8)]


def test_while_not_training_there_is_the_full_resolution_alone():
    made = net(PatchBackbone(), (8, 32, 32)).eval()
    assert [tuple(one.shape) for one in made(torch.rand(1, 1, 8, 32, 32))] == [(1, 3, 8, 32, 32)]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_weight_learns_whatever_the_number_of_channels(channels):
    made = net(PatchBackbone(), (8, 32, 32), channels=channels)
    logits = made(torch.rand(2, channels, 8, 32, 32))
    supervision(len(logits))(logits, torch.randint(0, 3, (2, 1, 8, 32, 32)).float()).backward()
    still = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    # What an instance norm removes has no gradient: the biases of convolutions before it.
    assert all(name.endswith("bias") for name in still), still


def test_the_weights_of_the_heads_halve_and_add_up_to_one():
    """Heads that are all sure of the right answer, or of the wrong one: the loss tells their weights."""
    label = torch.zeros(1, 1, 4, 8, 8)
    right = [torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 2, 2, 4, 4), torch.zeros(1, 2, 1, 2, 2)]
    for logits in right:
        logits[:, 0] = 1000
    loss = supervision(3)
    alone = []
    for wrong in range(3):
        logits = [-one if number == wrong else one for number, one in enumerate(right)]
        alone.append(float(loss(logits, label)))
    everywhere = float(loss([-one for one in right], label))
    assert alone == pytest.approx([alone[0], alone[0] / 2, alone[0] / 4], rel=0.01)
    assert sum(alone) == pytest.approx(everywhere, rel=0.01)
    single = float(supervision(1)([-right[0]], label))
    assert everywhere == pytest.approx(single, rel=0.01)


def test_a_frozen_backbone_stays_as_it_is_in_training():
    backbone = PatchBackbone()
    backbone.requires_grad_(False)
    made = net(backbone, (8, 32, 32)).train()
    assert not made.backbone.training
    assert made.ups.training


@pytest.mark.parametrize(
    ("crop", "said"),
    [
        ((8, 24, 32), "multiples of 4 x 16 x 16"),  # 3 patches cannot be halved
        ((8, 33, 32), "images.crop"),
        ((2, 16, 16), "one position"),
    ],
)
def test_a_crop_that_does_not_suit_the_backbone_is_told(crop, said):
    with pytest.raises(SetupError, match=said):
        net(PatchBackbone(), crop)
