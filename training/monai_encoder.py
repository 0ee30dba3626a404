"""A trained universal ViT as the encoder of MONAI's networks: images as its loaders give them, a pyramid out.

MONAI's arrays are (B, C, X, Y[, Z]) and know their spacing, if they are MetaTensors. Its decoders double all
axes at each step, so the pyramid has the strides 2, 4, 8 and 16 along all axes, whatever the DA level.

Shape suffixes: B images, C features, D, H, W voxels, d, h, w tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.blocks import BaseEncoder
from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE
from torch import Tensor, nn

from catalog.errors import SetupError
from training.backbone import Spacing
from training.extractor import ViTBackbone, level_of
from training.pretrained import load_vit
from training.sac import SACTransposedConv3d, SpatialState
from training.vit import UniversalViT

_STRIDE = 16
_HALVINGS = 4
"""Of the tokens: log2 of the stride."""


def register_vit(name: str, place: str | Path, *, spacing: Spacing | None = None, depth_axis: int = -1) -> None:
    """Let `FlexibleUNet(..., backbone=name)` have the ViT at `place` (of `training.load_vit`) as its encoder.

    With its `pretrained=False`, the ViT has new weights. The other arguments are those of `ViTEncoder`.
    Raises SetupError as `load_vit` and `ViTEncoder` do.
    """
    config = load_vit(place).vit.config
    channels = pyramid_channels(config.dim)

    class RegisteredViT(ViTEncoder, BaseEncoder):  # type: ignore[misc]
        def __init__(self, spatial_dims: int, in_channels: int, pretrained: bool) -> None:
            backbone = load_vit(place) if pretrained else ViTBackbone(UniversalViT(config))
            super().__init__(backbone, spatial_dims, in_channels, spacing=spacing, depth_axis=depth_axis)

        @classmethod
        def get_encoder_parameters(cls) -> list[dict[str, Any]]:
            return [{"spatial_dims": 3, "in_channels": 1, "pretrained": True}]

        @classmethod
        def num_channels_per_output(cls) -> list[tuple[int, ...]]:
            return [channels]

        @classmethod
        def num_outputs(cls) -> list[int]:
            return [len(channels)]

        @classmethod
        def get_encoder_names(cls) -> list[str]:
            return [name]

    FLEXUNET_BACKBONE.register_class(RegisteredViT)


def pyramid_channels(dim: int) -> tuple[int, int, int, int]:
    """Features at the strides 2, 4, 8 and 16 of a ViT of `dim` features."""
    return dim // 8, dim // 4, dim // 2, dim


class ViTEncoder(nn.Module):
    """The ViT and, from its four stages, a pyramid that is trained with the task.

    Spatially adaptive transposed convolutions widen the first three stages, with the same weights for all
    levels; where their depth is finer than the stride, slices are averaged.
    """

    def __init__(
        self,
        backbone: ViTBackbone,
        spatial_dims: int = 3,
        in_channels: int = 1,
        *,
        spacing: Spacing | None = None,
        depth_axis: int = -1,
    ) -> None:
        """Args:
            in_channels: of the images, 1 or 3.
            spacing: mm along the axes of the images, for those that do not tell it.
            depth_axis: the one of the three spatial axes that the slices are counted along: the last one of
                MONAI's axial images.

        Raises SetupError if the ViT has not four stages of stride 16, or for other dimensions and channels.
        """
        super().__init__()
        config = backbone.vit.config
        if config.patch != _STRIDE or len(backbone.blocks) != _HALVINGS or config.dim % 8:
            raise SetupError(
                f"the pyramid takes a ViT of patch {_STRIDE} with {_HALVINGS} stages of 8, 16 ... features; "
                f"this has patch {config.patch}, {len(backbone.blocks)} stages and {config.dim} features"
            )
        if spatial_dims not in (2, 3) or in_channels not in (1, 3):
            raise SetupError(
                "images have 2 or 3 dimensions and 1 or 3 channels; "
                f"got spatial_dims {spatial_dims} and in_channels {in_channels}"
            )
        self.backbone = backbone
        self.spatial_dims = spatial_dims
        self.spacing = spacing
        self.depth_axis = depth_axis % 3
        widths = pyramid_channels(config.dim)[::-1]
        self.widen = nn.ModuleList(
            _Widening(widths[: doublings + 1], _HALVINGS - doublings)
            for doublings in range(_HALVINGS - 1, -1, -1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at the strides 2, 4, 8 and 16 of images (B, 1 or 3, X, Y[, Z]) in [0, 1].

        The spacing is that of a MetaTensor, else the one given. Raises SetupError where there is none, the
        images of a batch are of several DA levels, or an axis is no multiple of 16.
        """
        spatial = tuple(x.shape[2:])
        if len(spatial) != self.spatial_dims or any(size % _STRIDE for size in spatial):
            raise SetupError(
                f"images need {self.spatial_dims} axes, each a multiple of {_STRIDE} voxels, got {spatial}: "
                f"monai.transforms.DivisiblePadd(k={_STRIDE}) pads them"
            )
        flat = self.spatial_dims == 2
        level = level_of((1.0, 1.0, 1.0), 1) if flat else self._level(x)
        image = x.as_tensor() if isinstance(x, MetaTensor) else x
        image_BCDHW = image.unsqueeze(2) if flat else image.movedim(2 + self.depth_axis, 2)
        stages = self.backbone.features_at(image_BCDHW, level).stages
        pyramid = [widen(stage, level) for widen, stage in zip(self.widen, stages, strict=True)]
        return [one.squeeze(2) if flat else one.movedim(2, 2 + self.depth_axis) for one in pyramid]

    def _level(self, x: Tensor) -> int:
        """The DA level of volumes."""
        told: list[Sequence[float]] = [self.spacing] if self.spacing is not None else []
        if isinstance(x, MetaTensor):
            affines = x.affine if x.affine.ndim == 3 else x.affine[None]
            told = [affine[:3, :3].norm(dim=0).tolist() for affine in affines]
        if not told:
            raise SetupError(
                "these images do not tell their spacing: give MetaTensors, or the encoder a spacing"
            )
        levels = set()
        for mm in told:
            in_plane = [size for axis, size in enumerate(mm) if axis != self.depth_axis]
            spacing = (mm[self.depth_axis], in_plane[0], in_plane[1])
            levels.add(level_of(spacing, x.shape[2 + self.depth_axis]))
        if len(levels) > 1:
            raise SetupError(f"the images of a batch are of the DA levels {sorted(levels)}: batch those of one")
        return levels.pop()


class _Widening(nn.Module):
    """From the stride of the tokens, 16, to a smaller one."""

    def __init__(self, widths: Sequence[int], halvings: int) -> None:
        """Args: widths: features before and after each doubling; halvings: log2 of the stride in the end."""
        super().__init__()
        self.halvings = halvings
        pairs = list(itertools.pairwise(widths))
        self.expand = nn.ModuleList(SACTransposedConv3d(*pair, stride=2, merge="mean") for pair in pairs)
        self.norm = nn.ModuleList(nn.GroupNorm(1, after) for _, after in pairs)

    def forward(self, x_BCdhw: Tensor, level: int) -> Tensor:
        state = SpatialState(level, _HALVINGS)
        for expand, norm in zip(self.expand, self.norm, strict=True):
            x_BCdhw, state = expand(x_BCdhw, state)
            x_BCdhw = F.gelu(norm(x_BCdhw))
        # So far, the stride along the depth is 2^max(halvings - level, 0).
        slices = min(1 << min(self.halvings, level), x_BCdhw.shape[2])
        return F.avg_pool3d(x_BCdhw, (slices, 1, 1)) if slices > 1 else x_BCdhw
