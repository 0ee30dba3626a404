"""LPIPS: distance of two images in the features of a frozen network (Zhang et al. 2018), here VGG-16.

Per stage, features are scaled to unit length over channels; the squared differences are weighed per channel by
learnt non-negative weights, averaged over positions and summed over stages.

Two differences from the implementation the paper trained with. Its input normalisation shifts by 1 - 2 mean;
images in [-1, 1] need 2 mean - 1, as here. And it doubles the result, which LPIPS does not; here it is not
doubled, so its loss weight 1 corresponds to a weight of 2.

Shape suffixes: N slices, C channels, H height, W width.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from catalog.errors import SetupError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of VGG-16 between its pooling layers; LPIPS reads the last of each stage."""

_EPSILON = 1e-10

_HELP = (
    "Give a file, or a folder of files, with loss.lpips_weights_file=PATH: torchvision's VGG-16 (vgg16-*.pth) "
    "and LPIPS's linear layers (vgg.pth), as .pth or .safetensors. Or do without the perceptual term "
    "(perceptual=none): loss.lpips_weight=0."
)


class LPIPS(nn.Module):
    """The distance, over any stack of feature stages; frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, stages: Sequence[nn.Module], linear: Sequence[Tensor]) -> None:
        """`stages` run one after the other; `linear[i]` (C_i) weighs the channels of stage i."""
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.linear = nn.ParameterList(nn.Parameter(weights) for weights in linear)
        # (x + 1) / 2, normalised by ImageNet's mean and std, in one step.
        self.register_buffer("mean", 2 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1) - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x_N3HW: Tensor, y_N3HW: Tensor) -> Tensor:
        """Mean distance (scalar, >= 0) of slices in [-1, 1]; gradients flow to both inputs."""
        x, y = (x_N3HW - self.mean) / self.std, (y_N3HW - self.mean) / self.std
        distance = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for stage, weights_C in zip(self.stages, self.linear, strict=True):
            x, y = stage(x), stage(y)
            difference_NCHW = (_unit(x) - _unit(y)).square()
            distance = distance + torch.einsum("nchw,c->nhw", difference_NCHW, weights_C).mean()
        return distance


def load_lpips(path: Path | None) -> LPIPS:
    """LPIPS on VGG-16 from a local file, or from all weight files of a folder.

    Together they must hold torchvision's `features.N.weight|bias` (or the `lpips` package's
    `net.sliceS.N.weight|bias`) and `linS.model.1.weight`, as .safetensors or .pth/.pt (tensors only, no other
    pickle is read). Raises SetupError naming what is absent and the option to set.
    """
    if path is None or not path.exists():
        what = "no file is given" if path is None else f"{path} does not exist"
        raise SetupError(f"the perceptual loss needs weights of VGG-16 and LPIPS, and {what}. {_HELP}")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _READERS)
    found: dict[str, Tensor] = {}
    for file in files:
        found |= {_common_name(name): value for name, value in _read(file).items()}

    stages, names = _vgg16()
    linear_names = [f"lin{stage}.model.1.weight" for stage in range(len(_VGG16_STAGES))]
    expected = {
        f"{ours}.{kind}": value.shape for ours, conv in names.items() for kind, value in conv.named_parameters()
    } | {
        name: torch.Size((1, widths[-1], 1, 1))
        for name, widths in zip(linear_names, _VGG16_STAGES, strict=True)
    }
    problems = [
        f"{name} is missing" if name not in found else f"{name} has shape {tuple(found[name].shape)}"
        for name, shape in expected.items()
        if name not in found or found[name].shape != shape
    ]
    if problems:
        shown = ", ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise SetupError(f"{path} does not hold the weights of VGG-16 and LPIPS: {shown}. {_HELP}")
    for name, conv in names.items():
        conv.load_state_dict({kind: found[f"{name}.{kind}"] for kind in ("weight", "bias")})
    return LPIPS(stages, [found[name].flatten().float() for name in linear_names])


def _unit(features_NCHW: Tensor) -> Tensor:
    # In float32: the square of a half-precision feature overflows, and the epsilon is 0 there.
    features = features_NCHW.to(torch.promote_types(features_NCHW.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + _EPSILON)


def _vgg16() -> tuple[list[nn.Sequential], dict[str, nn.Conv2d]]:
    """The five stages, and their convolutions by torchvision's names (`features.N`)."""
    stages: list[nn.Sequential] = []
    names: dict[str, nn.Conv2d] = {}
    in_channels, position = 3, 0
    for stage, widths in enumerate(_VGG16_STAGES):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if stage else []
        position += len(layers)
        for width in widths:
            conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
            names[f"features.{position}"] = conv
            layers += [conv, nn.ReLU(inplace=True)]
            in_channels, position = width, position + 2
        stages.append(nn.Sequential(*layers))
    return stages, names


def _common_name(name: str) -> str:
    return re.sub(r"^net\.slice\d+\.", "features.", name)


def _read_torch(file: Path) -> dict[str, Tensor]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": load_file,
    ".pth": _read_torch,
    ".pt": _read_torch,
}


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix not in _READERS:
        raise SetupError(f"{file}: weights are read from {', '.join(_READERS)} files. {_HELP}")
    try:
        return _READERS[file.suffix](file)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise SetupError(f"{file} could not be read as weights ({error}). {_HELP}") from error
