"""Products and convolutions in the shapes in which a CPU does them fast.

Eager PyTorch in float32 leaves much of a CPU unused: matrices go to MKL, which uses half of an AMD processor's
vector width, and convolutions of one small crop to a routine half as fast as the one for larger ones. oneDNN,
which serves those, has neither fault; here it is called for all of them. Figures in this file: forward and
backward, one core of an AMD EPYC of 2025, PyTorch 2.13.

Shape suffixes: B crops, I input channels, O output channels, D depth, H height, W width; M rows, K sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import winograd

Triple = tuple[int, int, int]

_NATIVE_LIMIT = 20480
"""PyTorch keeps a lone crop from oneDNN if B * C * D * H is no more (aten/src/ATen/native/Convolution.cpp)."""

_WINOGRAD_VOXELS = 1024
"""With fewer of a batch the kernels outweigh the map: 512 channels of 4 x 8 x 8 would take a fifth longer."""
_WINOGRAD_SLICE = 8192
"""With no more numbers in a slice its calls outweigh its products: 8 crops of 64 channels of 4 x 8 x 8."""
_SHORT_RUN = 4
_IMAGE_CHANNELS = 4


def prefers_onednn(x: Tensor) -> bool:
    """Whether this module does better than the plain operators: float32 on a CPU, run eagerly.

    Graphs that are compiled or exported hold the plain operators, which run everywhere.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters, through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x (..., K) times the transposed weight, plus the bias: (..., O).

    501 x 768 by 768 x 2048: 200 GFLOP/s, and 90 by F.linear.
    """
    if not prefers_onednn(x):
        return F.linear(x, weight_OK, bias_O)
    rows_MO: Tensor = _Linear.apply(x.flatten(0, -2), weight_OK, bias_O)  # type: ignore[no-untyped-call]
    return rows_MO.reshape(*x.shape[:-1], -1)


def convolution(
    x_BIDHW: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple
) -> Tensor:
    """F.conv3d, where `prefers_onednn(x_BIDHW)`; either memory layout may come, either may go."""
    depth, kernel = weight.shape[2], tuple(weight.shape[2:])
    divides = kernel == stride and not any(x % k for x, k in zip(x_BIDHW.shape[2:], kernel, strict=True))
    if divides and x_BIDHW.is_contiguous(memory_format=torch.channels_last_3d):
        # Patches of such a map are copied in runs of I numbers: 30 ms, by F.conv3d 33, from 128 channels of
        # 16 x 32 x 32.
        patches = _windows(x_BIDHW.movedim(1, -1), 1, stride).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
        return linear(patches, weight.movedim(1, -1).flatten(1), bias).movedim(-1, 1)
    if divides and kernel[-1] > _SHORT_RUN:
        # 3 to 768 channels, kernel 16, from 80 x 160 x 160: 141 ms, by F.conv3d 319. With kernel 4 such runs
        # are too short: 3 to 128 channels from 64 x 128 x 128 take 20 ms, by F.conv3d 18.
        patches = _windows(x_BIDHW, 2, stride).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return linear(patches, weight.flatten(1), bias).movedim(-1, 1)
    if depth == 1 and stride[0] == 1:
        # 256 channels of 4 x 16 x 16: 22 ms, by F.conv3d 49.
        slices = x_BIDHW.transpose(1, 2)
        y = F.conv2d(slices.flatten(0, 1), weight.squeeze(2), bias, stride[1:], padding[1:])
        return y.reshape(*slices.shape[:2], *y.shape[1:]).transpose(1, 2)
    native = len(x_BIDHW) == 1 and x_BIDHW[..., 0].numel() <= _NATIVE_LIMIT
    if (
        (kernel, stride, padding) == ((3, 3, 3), (1, 1, 1), (1, 1, 1))
        and x_BIDHW.shape[2] % winograd.GROUP == 0
        and x_BIDHW[:, 0].numel() >= _WINOGRAD_VOXELS
        and (native or min(weight.shape[:2]) * x_BIDHW[0, 0, 0].numel() > _WINOGRAD_SLICE)
    ):
        # 128 channels of 16 x 32 x 32: 126 ms, by F.conv3d 209; 256 of 8 x 16 x 16: 69 ms, and 94.
        return winograd.convolution(x_BIDHW, weight, bias)
    if native:
        # Two slices of zeros lift a map above the limit. 512 channels of 4 x 8 x 8: 75 ms, by F.conv3d 138.
        x_BIDHW = F.pad(x_BIDHW.contiguous(), (0, 0, 0, 0, padding[0], padding[0]))
        padding = (0, *padding[1:])
    return F.conv3d(x_BIDHW, weight, bias, stride, padding)


def transposed_convolution(x_BIDHW: Tensor, weight_IOdhw: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv_transpose3d with stride = kernel: one product, whose columns are then put into place.

    128 to 3 channels, 16 x 32 x 32 to 64 x 128 x 128: 27 ms, by F.conv_transpose3d 46.
    """
    kernel, channels = weight_IOdhw.shape[2:], weight_IOdhw.shape[1]
    columns = weight_IOdhw.movedim(0, -1).movedim(0, -2).flatten(0, -2)
    y = linear(x_BIDHW.movedim(1, -1), columns, None if bias is None else bias.repeat(kernel.numel()))
    y_BDHWdhwO = y.reshape(*y.shape[:-1], *kernel, channels)
    if channels <= _IMAGE_CHANNELS:
        # An image, channels first as the one it is compared with.
        y_BODdHhWw = y_BDHWdhwO.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y_BODdHhWw.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    y_BDdHhWwO = y_BDHWdhwO.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return y_BDdHhWwO.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def _windows(x: Tensor, axis: int, size: Triple) -> Tensor:
    """A view in which each of the three axes from `axis` on is two: windows of `size`, and inside them."""
    shape = [*x.shape]
    for i in (2, 1, 0):
        shape[axis + i : axis + i + 1] = [x.shape[axis + i] // size[i], size[i]]
    return x.view(shape)


def _product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """The operator that inductor emits for linear layers, with the gradient it lacks."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, weight_OK)
        return _product(x_MK, weight_OK, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_MK, weight_OK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(gradient_MO, weight_OK.t()) if for_x else None,
            _product(gradient_MO.t(), x_MK.t()) if for_weight else None,
            gradient_MO.sum(dim=0) if for_bias else None,
        )
