"""The encoder of Swin UNETR as a backbone, with the self-supervised weights that MONAI documents.

Tang et al., "Self-supervised pre-training of Swin transformers for 3D medical image analysis" (2022). Their
file `model_swinvit.pt` holds the encoder and the heads of its pre-training; the encoder alone is read, and as
tensors: nothing in the file is executed.

Shape suffixes: B crops, C features, D, H, W voxels.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from catalog.errors import SetupError
from training.backbone import Features, Spacing
from training.fit import misfits
from training.weights import read_tensors

_WIDTH, _WINDOW, _PATCH = 48, 7, 2
_BLOCKS, _HEAD_DIM = (2, 2, 2, 2), 16
SIDE_MULTIPLE = _PATCH ** (len(_BLOCKS) + 1)
"""Every side of a crop is a multiple of so many voxels: patches halve it, and each stage does."""

_PATCH_KERNEL = "patch_embed.proj.weight"
_WRAPPERS = re.compile(r"^(module\.|swinViT\.)+")
_ENCODER = re.compile(r"(patch_embed|layers[1-4])\.")


class SwinBackbone(nn.Module):
    """Stages: the embedded patches and what each of the four stages of the encoder makes of them, normalised.

    `whole` is the mean over the positions of the last. Crops are taken as they come, in [0, 1], which is the
    range that the published weights were trained on (CT, from -1000 to 1000 HU); a network of one input channel
    sees the mean of the three.
    """

    def __init__(self, width: int = _WIDTH, in_channels: int = 1) -> None:
        """Args: width: features of an embedded patch, a multiple of 16; doubled by every stage."""
        super().__init__()
        if width < _HEAD_DIM or width % _HEAD_DIM:
            raise SetupError(f"the width of Swin UNETR must be a multiple of {_HEAD_DIM}, got {width}")
        if in_channels not in (1, 3):
            raise SetupError(f"this Swin UNETR takes {in_channels} channels; crops have one or three")
        self.in_channels = in_channels
        self.encoder = _encoder(width, in_channels)
        self.stage_channels = tuple(width << stage for stage in range(len(_BLOCKS) + 1))
        self.channels = self.stage_channels[-1]

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        """Features of crops (B, 3, D, H, W) in [0, 1], whatever their spacing, which this network is not told.

        Raises SetupError where a side is no multiple of SIDE_MULTIPLE, as that of 2-D images.
        """
        size = tuple(image_BCDHW.shape[2:])
        if any(side % SIDE_MULTIPLE for side in size):
            raise SetupError(
                f"Swin UNETR takes volumes whose sides are multiples of {SIDE_MULTIPLE} voxels, got "
                f"{' x '.join(map(str, size))}. Choose such an input size, or another network for 2-D images."
            )
        if self.in_channels == 1:
            image_BCDHW = image_BCDHW.mean(dim=1, keepdim=True)
        stages = tuple(self.encoder(image_BCDHW))
        return Features(whole=stages[-1].mean(dim=(2, 3, 4)), stages=stages)

    def forward(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        """The same as `forward_features`; what wrappers such as DDP call."""
        return self.forward_features(image_BCDHW, spacing)


def load_swin(file: Path) -> SwinBackbone:
    """The encoder in `file`: MONAI's `model_swinvit.pt`, or the state of a whole Swin UNETR.

    Names: `module.` and `swinViT.` before the encoder's own are dropped; the MLP's `fc1` and `fc2` are MONAI's
    `linear1` and `linear2`. Width and input channels follow from the file. Raises SetupError unless it fills
    the encoder, all of it.
    """
    tensors = {}
    for key, tensor in read_tensors(file).items():
        name = _WRAPPERS.sub("", key)
        if _ENCODER.match(name):
            tensors[name.replace(".mlp.fc", ".mlp.linear")] = tensor
    kernel = tensors.get(_PATCH_KERNEL)
    if kernel is None or kernel.ndim != 5:
        raise SetupError(
            f"{file} holds no {_PATCH_KERNEL} of a Swin UNETR. Give MONAI's model_swinvit.pt, or the "
            "state_dict of a SwinUNETR."
        )
    width, in_channels = kernel.shape[:2]
    try:
        backbone = SwinBackbone(width, in_channels)
    except SetupError as error:
        raise SetupError(f"{file}: {error}") from error
    problems = misfits(tensors, backbone.encoder.state_dict())
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SetupError(
            f"{file} is not the encoder of a Swin UNETR as published (two blocks a stage, windows of 7): "
            f"{'; '.join(problems[:5])}{more}"
        )
    backbone.encoder.load_state_dict(tensors)
    return backbone


def _encoder(width: int, in_channels: int) -> Any:
    try:
        import einops  # noqa: F401 - MONAI asks for it only when the network runs
        from monai.networks.nets.swin_unetr import SwinTransformer
    except ImportError as error:
        raise SetupError(
            f"Swin UNETR is MONAI's, which needs {error.name}: pip install 'pumit-data[downstream]'"
        ) from error

    return SwinTransformer(
        in_chans=in_channels,
        embed_dim=width,
        window_size=(_WINDOW,) * 3,
        patch_size=(_PATCH,) * 3,
        depths=_BLOCKS,
        num_heads=[(width << stage) // _HEAD_DIM for stage in range(len(_BLOCKS))],
        spatial_dims=3,
    )
