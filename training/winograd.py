"""3 x 3 x 3 convolutions with half the multiplications: Winograd's F(4, 3) along the depth.

Four neighbouring slices of the result read six slices of the input, by 12 products of a slice with a kernel
slice. Six linear combinations of the input slices, convolved in-plane with six of the kernel slices, give the
same four by 6 products (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016). It rounds
more: of float32 results about 1, the largest errors were 1e-5 to 7e-5, and 1e-6 to 2e-5 of the direct sum.

Shape suffixes: B crops, I input channels, O output channels, D depth, H height, W width, k 3; T groups of four
slices, N those of all crops, G their four slices, R the six that they read, J the six products; F all numbers
of a slice, channels last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 4
"""Slices that are made at once."""
_READ = GROUP + 2

Matrix = tuple[tuple[float, ...], ...]

_OF_INPUT: Matrix = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
_OF_KERNEL: Matrix = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
_OF_PRODUCTS: Matrix = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)
_WITH_BIAS = 1
"""The product that is added once to each of the four slices, so that its bias is theirs."""
_IN_PLANE = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
"""Stride, padding and dilation of the products; not transposed; one group."""


def convolution(x_BIDHW: Tensor, weight_OIkkk: Tensor, bias_O: Tensor | None) -> Tensor:
    """F.conv3d with stride 1 and padding 1, of a map with channels last and a depth that GROUP divides."""
    y_BODHW: Tensor = _Convolution.apply(x_BIDHW, weight_OIkkk, bias_O)  # type: ignore[no-untyped-call]
    return y_BODHW


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BIDHW: Tensor, weight_OIkkk: Tensor, bias_O: Tensor | None) -> Tensor:
        batch, _, depth, *plane = x_BIDHW.shape
        padded_BDF = F.pad(x_BIDHW.movedim(1, -1).flatten(2), (0, 0, 1, 1))
        read_BTRF = padded_BDF.unfold(1, _READ, GROUP).movedim(-1, 2)
        inputs_NJF = _combine(_OF_INPUT, read_BTRF).flatten(0, 1)
        inputs_NJIHW = _channels_first(inputs_NJF, plane)
        kernels_JOIkk = _kernels(weight_OIkkk)
        products = [
            F.conv2d(inputs_NJIHW[:, j], kernel, bias_O if j == _WITH_BIAS else None, padding=1)
            for j, kernel in enumerate(kernels_JOIkk)
        ]
        ctx.save_for_backward(inputs_NJIHW, weight_OIkkk)
        y_NGF = _combine(_OF_PRODUCTS, _channels_last(products))
        return _channels_first(y_NGF.view(batch, depth, -1), plane).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BODHW: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs_NJIHW, weight_OIkkk = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        batch, channels, _, *plane = gradient_BODHW.shape
        gradient_NGF = gradient_BODHW.movedim(1, -1).reshape(-1, GROUP, math.prod(plane) * channels)
        gradient_NJOHW = _channels_first(_combine(_transposed(_OF_PRODUCTS), gradient_NGF), plane)
        of_inputs, of_kernels, of_biases = zip(
            *(
                torch.ops.aten.convolution_backward(
                    gradient_NJOHW[:, j],
                    inputs_NJIHW[:, j],
                    kernel,
                    [channels],
                    *_IN_PLANE,
                    [for_x, for_weight, for_bias and j == _WITH_BIAS],
                )
                for j, kernel in enumerate(_kernels(weight_OIkkk))
            ),
            strict=True,
        )
        of_x = of_weight = None
        if for_x:
            rows_NJF = _channels_last(of_inputs)
            of_inputs_BTJF = rows_NJF.view(batch, -1, *rows_NJF.shape[1:])
            of_read_BTRF = _combine(_transposed(_OF_INPUT), of_inputs_BTJF)
            of_x_BDF = of_read_BTRF[:, :, 1:-1].flatten(1, 2)
            # The first and the last slice that a group reads are its neighbours' own, and zeros at the ends.
            of_x_BDF[:, GROUP - 1 : -1 : GROUP] += of_read_BTRF[:, 1:, 0]
            of_x_BDF[:, GROUP::GROUP] += of_read_BTRF[:, :-1, -1]
            of_x = _channels_first(of_x_BDF, plane).transpose(1, 2)
        if for_weight:
            of_kernels_JOkkI = torch.stack([kernel.movedim(1, -1) for kernel in of_kernels])
            of_taps = _combine(_transposed(_OF_KERNEL), of_kernels_JOkkI.flatten(1))
            of_weight = of_taps.view(-1, *of_kernels_JOkkI.shape[1:]).permute(1, 4, 0, 2, 3)
        return of_x, of_weight, of_biases[_WITH_BIAS]


def _combine(matrix: Matrix, x: Tensor) -> Tensor:
    """Linear combinations of rows: (..., columns of the matrix, F) to (..., its rows, F)."""
    return torch.matmul(x.new_tensor(matrix), x)


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _kernels(weight_OIkkk: Tensor) -> Tensor:
    """The kernels of the six products, (J, O, I, 3, 3)."""
    taps_kOkkI = weight_OIkkk.permute(2, 0, 3, 4, 1)
    return _combine(_OF_KERNEL, taps_kOkkI.flatten(1)).view(-1, *taps_kOkkI.shape[1:]).movedim(-1, 2)


def _channels_first(x_NJF: Tensor, plane: list[int]) -> Tensor:
    """A view (N, J, C, H, W) of rows that hold channels last."""
    return x_NJF.view(*x_NJF.shape[:2], *plane, -1).movedim(-1, 2)


def _channels_last(maps: Sequence[Tensor]) -> Tensor:
    """J maps (N, C, H, W) as rows (N, J, F) that hold channels last."""
    return torch.stack([x_NCHW.movedim(1, -1).flatten(1) for x_NCHW in maps], dim=1)
