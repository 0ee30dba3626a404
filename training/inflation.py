"""Fit convolution weights of one shape into a layer of another: 2-D into 3-D, other channel counts.

The response to a constant input is kept wherever it can be: a kernel spread over the depth answers an image
that repeats along the depth as the 2-D kernel answers one slice, and an input channel that is split or merged
keeps the sum of its weights.

Shape suffixes: O output channels, I input channels, D depth, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

DepthMode = Literal["average", "center"]
OutputMode = Literal["average", "rgb_to_grey"]

_GREY_OF_RGB = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma."""


def inflate_depth(weight_OIHW: Tensor, depth: int, mode: DepthMode = "average") -> Tensor:
    """Give a 2-D kernel a depth: (O, I, H, W) to (O, I, D, H, W); the sum over D is the 2-D kernel.

    `average` spreads it evenly. `center` puts it into the middle slice, or half of it into each of the two
    middle slices of an even depth.
    """
    if mode == "average":
        return (weight_OIHW / depth).unsqueeze(2).repeat(1, 1, depth, 1, 1)
    weight_OIDHW = weight_OIHW.new_zeros(*weight_OIHW.shape[:2], depth, *weight_OIHW.shape[2:])
    middle = slice((depth - 1) // 2, depth // 2 + 1)
    weight_OIDHW[:, :, middle] = weight_OIHW.unsqueeze(2) / (2 - depth % 2)
    return weight_OIDHW


def spread_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Sum over the input channels (axis 1), shared evenly among `channels` new ones.

    A colour kernel becomes one for grey, or a grey one one for three equal channels, with the same response.
    """
    merged = weight.sum(dim=1, keepdim=True) / channels
    return merged.repeat(1, channels, *[1] * (weight.ndim - 2))


def merge_output_channels(parameter: Tensor, channels: int, mode: OutputMode = "average") -> Tensor:
    """Turn the output channels (axis 0) of a weight or bias into `channels` others.

    `average` shares their sum evenly; `rgb_to_grey` weighs three channels as luma and gives one.
    Raises ValueError where `rgb_to_grey` is asked for anything but 3 to 1.
    """
    if mode == "average":
        merged = parameter.sum(dim=0, keepdim=True) / channels
        return merged.repeat(channels, *[1] * (parameter.ndim - 1))
    if (parameter.shape[0], channels) != (3, 1):
        raise ValueError(f"rgb_to_grey merges 3 channels into 1, not {parameter.shape[0]} into {channels}")
    return torch.einsum("o,o...->...", parameter.new_tensor(_GREY_OF_RGB), parameter).unsqueeze(0)


def inflate_convolution(
    weight: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    *,
    depth_mode: DepthMode = "average",
    output_mode: OutputMode = "average",
) -> tuple[Tensor, Tensor | None]:
    """Fit a checkpoint's convolution, 2-D or 3-D, into a 3-D layer: channels first, depth second.

    Args:
        weight: (O', I', H, W) or (O', I', D, H, W), as the checkpoint holds it.
        bias: (O'), or None.
        shape: (O, I, D, H, W) of the layer. What already agrees is left as it is.

    Raises:
        ValueError: the kernel sizes differ otherwise than by a missing depth.
    """
    out_channels, in_channels, depth = shape[:3]
    if weight.shape[1] != in_channels:
        weight = spread_input_channels(weight, in_channels)
    if weight.shape[0] != out_channels:
        weight = merge_output_channels(weight, out_channels, output_mode)
        bias = None if bias is None else merge_output_channels(bias, out_channels, output_mode)
    if weight.ndim == 4:
        weight = inflate_depth(weight, depth, depth_mode)
    if tuple(weight.shape) != tuple(shape):
        raise ValueError(
            f"a checkpoint kernel {tuple(weight.shape[2:])} does not fit a layer's kernel {tuple(shape[2:])}; "
            "only a missing depth can be filled in"
        )
    return weight, bias
