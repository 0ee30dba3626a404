"""Spatially adaptive convolution (SAC): one set of 3-D weights for images of every anisotropy.

A slice of an image of level `a` is about 2^a times as thick as its pixels are wide, so it stands for 2^a
thin slices of equal value. Two numbers travel with every feature map, its `SpatialState` (a, n): the level
of the *image*, which no layer changes, and the in-plane halvings n that led to the map. In-plane halving
makes voxels wider until, after a halvings, they are as wide as thick; p = max(a - n, 0) are pending. Until
then a layer leaves the depth alone as far as p says, and every kernel slice that would have met one of the
repeated thin slices meets the same thick one: their weights are summed (paper, spatially adaptive
convolution). For a stride s = 2^k:

    convolution             depth stride = max(s >> p, 1)              n -> n + k
    transposed convolution  depth stride = min(2^max(n - a, 0), s)     n -> n - k

A kernel as large as the stride is summed in contiguous groups down to the depth stride; a 3 x 3 x 3 kernel
is summed to depth 1 while p > 0. Level 5 ends with p = 1 at 16 x in-plane: all slices are seen one by one.

Consequence, exact for a convolution whose kernel equals its stride, and for any norm or activation that does
not mix slices or takes whole-volume moments: a thick-slice image gives what its 2^a-fold repetition gives at
level 0. A 3 x 3 x 3 kernel keeps this only where its three depth taps meet one thick slice, thus not at the
borders between slices while p > 0. A transposed convolution *sums* the thin outputs of a group, bias aside.

Shape suffixes: B crops, I input channels, O output channels, D depth, H height, W width.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from training import onednn

DepthMerge = Literal["sum", "mean"]
"""How a transposed convolution makes one depth tap of several."""


class SpatialState(NamedTuple):
    """What a feature map must know of its image. Plain integers: a compiled graph is fixed per level."""

    level: int
    """DA level of the image, 0..5 (catalog.spacing); anything above acts as 5, one slice at a time."""
    halvings: int = 0
    """In-plane halvings so far: 0 at the image, 4 at the tokens of a stride-16 network."""

    @property
    def pending(self) -> int:
        """p = max(a - n, 0): in-plane halvings until voxels are about as wide as thick."""
        return max(self.level - self.halvings, 0)

    @property
    def depth_halvings(self) -> int:
        """max(n - a, 0): how often the depth has been halved on the way to this feature map."""
        return max(self.halvings - self.level, 0)

    def moved(self, halvings: int) -> SpatialState:
        """The state after `halvings` more in-plane halvings (negative: doublings)."""
        return SpatialState(self.level, self.halvings + halvings)


def _log2(stride: int) -> int:
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"the stride of a spatially adaptive layer must be a power of two, got {stride}")
    return stride.bit_length() - 1


def _sum_depth(weight: Tensor, size: int) -> Tensor:
    """Sum the depth axis (2) of a kernel in contiguous equal groups down to `size` slices."""
    if weight.shape[2] == size:
        return weight
    if size == 1:
        # 5 ms for 512 x 512 x 27 weights and back on one core; by sum() 13.
        return functools.reduce(Tensor.add, weight.unbind(2)).unsqueeze(2)
    return weight.reshape(*weight.shape[:2], size, -1, *weight.shape[3:]).sum(dim=3)


class SACConv3d(nn.Module):
    """Spatially adaptive convolution with cubic kernel.

    Either the kernel equals the stride (no padding), or it is odd with padding kernel // 2 and stride 1 or 2.
    Parameters are those of `nn.Conv3d`: weight (O, I, k, k, k), bias (O).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.halvings = _log2(stride)
        if kernel_size != stride and (kernel_size % 2 == 0 or stride > 2):
            raise ValueError(
                f"kernel {kernel_size} with stride {stride}: the kernel must equal the stride, or be odd with "
                "stride 1 or 2; other pairs have no rule for anisotropic images"
            )
        self.stride = stride
        self.padding = 0 if kernel_size == stride else kernel_size // 2
        initial = nn.Conv3d(in_channels, out_channels, kernel_size)
        self.weight, self.bias = initial.weight, initial.bias

    def forward(self, x_BIDHW: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
        """Convolve (B, I, D, H, W) to (B, O, D / depth stride, H / s, W / s)."""
        weight, depth_stride, depth_padding = self.weight, self.stride, self.padding
        if state.pending > 0:
            depth_stride = max(self.stride >> state.pending, 1)
            weight, depth_padding = _sum_depth(weight, depth_stride), 0
        if depth_padding and x_BIDHW.shape[2] == 2 and x_BIDHW.device.type == "cpu":
            # Where oneDNN pads two slices itself, its bfloat16 gradient of the weight holds uninitialised
            # memory (PyTorch 2.13); given the zeros, it is right.
            x_BIDHW = F.pad(x_BIDHW, (0, 0, 0, 0, depth_padding, depth_padding))
            depth_padding = 0
        convolve = onednn.convolution if onednn.prefers_onednn(x_BIDHW) else F.conv3d
        stride = (depth_stride, self.stride, self.stride)
        padding = (depth_padding, self.padding, self.padding)
        x_BODHW = convolve(x_BIDHW, weight, self.bias, stride, padding)
        return x_BODHW, state.moved(self.halvings)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel = self.weight.shape[:3]
        return f"{in_channels}, {out_channels}, kernel={kernel}, stride={self.stride}, padding={self.padding}"


class SACTransposedConv3d(nn.Module):
    """Spatially adaptive transposed convolution, kernel = stride.

    Where the depth stride is below s, the depth taps of a group become one tap: their sum (the paper), or
    their mean (`merge`), for which a thick slice is the average of the thin ones it stands for.
    Parameters are those of `nn.ConvTranspose3d`: weight (I, O, s, s, s), bias (O).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, merge: DepthMerge = "sum") -> None:
        super().__init__()
        self.merge = merge
        self.halvings = _log2(stride)
        self.stride = stride
        initial = nn.ConvTranspose3d(in_channels, out_channels, stride)
        self.weight, self.bias = initial.weight, initial.bias

    def forward(self, x_BIDHW: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
        """Expand (B, I, D, H, W) to (B, O, D * depth stride, H * s, W * s)."""
        depth_stride = min(1 << state.depth_halvings, self.stride)
        weight = _sum_depth(self.weight, depth_stride)
        if self.merge == "mean":
            weight = weight * (depth_stride / self.stride)
        if onednn.prefers_onednn(x_BIDHW):
            x_BODHW = onednn.transposed_convolution(x_BIDHW, weight, self.bias)
        else:
            stride = (depth_stride, self.stride, self.stride)
            x_BODHW = F.conv_transpose3d(x_BIDHW, weight, self.bias, stride)
        return x_BODHW, state.moved(-self.halvings)

    def extra_repr(self) -> str:
        in_channels, out_channels = self.weight.shape[:2]
        return f"{in_channels}, {out_channels}, stride={self.stride}, merge={self.merge}"


class SACConvBlock(nn.Module):
    """3 x 3 x 3 spatially adaptive convolution, group norm, leaky ReLU (slope 0.01)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = SACConv3d(in_channels, out_channels, kernel_size=3, stride=stride)
        self.norm = nn.GroupNorm(groups, out_channels)
        self.activation = nn.LeakyReLU(inplace=True)

    def forward(self, x_BIDHW: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
        """(B, I, D, H, W) to (B, O, D', H / stride, W / stride)."""
        x, state = self.conv(x_BIDHW, state)
        return self.activation(self.norm(x)), state
