"""Additive 3-D rotary position embedding: one angle per feature pair from depth, row and column.

PUMIT, section on the universal ViT and its appendix. With head dimension n and m = n / 2 feature pairs, the
token at (z, y, x) turns its pairs by

    z * w_z + concat(y * w_yx, x * w_yx)        w_yx = base ** (-j / m), j = 0, 2, ..., m - 2
                                                w_z  = base_z ** (-j / m), j = 1, 3, ..., m - 1, used twice

At z = 0 this is the rotary embedding of 2-D EVA-02, so its weights keep their meaning. The angles are linear
in the position, hence the product of a rotated query and key depends on their offset alone. They are
distinct (modulo a full turn) for all positions of any grid in use, hence positions can be told apart.

Shape suffixes: B crops, N heads, L tokens, P feature pairs (half the head dimension).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from catalog.errors import SetupError

Grid = tuple[int, int, int]
"""Tokens along (z, y, x)."""

BASES = (2333.0, 10000.0, 10000.0)
"""Base of the frequencies along (z, y, x)."""

Rescale = tuple[float | None, float | None, float | None]


def rotary_frequencies(
    head_dim: int, bases: tuple[float, float, float] = BASES, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Radians per token along z (head_dim / 2 values), y and x (head_dim / 4 values each), float64.

    Raises SetupError unless `head_dim` is a positive multiple of 4: half of the pairs follow the rows, half
    the columns.
    """
    if head_dim <= 0 or head_dim % 4:
        raise SetupError(
            f"rotary embedding needs a head dimension that is a multiple of 4, got {head_dim}. "
            "Choose `dim` and `heads` so that dim / heads is one."
        )
    pairs = head_dim // 2
    even = torch.arange(0, pairs, 2, dtype=torch.float64, device=device) / pairs
    odd = torch.arange(1, pairs, 2, dtype=torch.float64, device=device) / pairs
    base_z, base_y, base_x = bases
    return (base_z**-odd).repeat(2), base_y**-even, base_x**-even


def rotary_angles(
    grid: Grid,
    head_dim: int,
    bases: tuple[float, float, float] = BASES,
    rescale: Rescale = (None, None, None),
    device: torch.device | None = None,
) -> Tensor:
    """Angles in radians of every token, (L, P) float64, tokens in (z, y, x) order.

    An axis with a `rescale` r counts its n tokens as positions 0, r/n, ..., (n-1) r/n: the span that a
    model trained on r tokens along this axis knows.
    """
    omega_z, omega_y, omega_x = rotary_frequencies(head_dim, bases, device)
    z, y, x = (
        torch.arange(size, dtype=torch.float64, device=device) * (1.0 if span is None else span / size)
        for size, span in zip(grid, rescale, strict=True)
    )
    rows = (y[:, None] * omega_y)[:, None, :].expand(-1, len(x), -1)
    columns = (x[:, None] * omega_x)[None, :, :].expand(len(y), -1, -1)
    in_plane = torch.cat([rows, columns], dim=-1)
    return ((z[:, None] * omega_z)[:, None, None, :] + in_plane).flatten(0, 2)


class Rotation(NamedTuple):
    """How far each feature pair of each token turns. Float32, (1 or B, 1, L, P): broadcasts over the heads."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_BNLn: Tensor) -> Tensor:
        """Turn the interleaved pairs (x0, x1), (x2, x3), ... of queries or keys (B, N, L, 2P).

        Computed in float32 whatever the dtype of `x_BNLn`, which the result keeps.
        """
        dtype, x_BNLn = x_BNLn.dtype, x_BNLn.float()
        first, second = x_BNLn[..., 0::2], x_BNLn[..., 1::2]
        turned = torch.stack(
            [first * self.cos - second * self.sin, first * self.sin + second * self.cos], dim=-1
        )
        return turned.flatten(-2).to(dtype)

    def take(self, rows_BL: Tensor) -> Rotation:
        """The rotations of the tokens `rows_BL` (int64) of a rotation that all crops of the batch share."""
        return Rotation(self.cos[0, 0, rows_BL].unsqueeze(1), self.sin[0, 0, rows_BL].unsqueeze(1))


@functools.lru_cache(maxsize=64)
def class_and_grid_rotation(
    grid: Grid, head_dim: int, bases: tuple[float, float, float], device: torch.device
) -> Rotation:
    """Rotations of a sequence: the class token (not turned) and then the tokens of `grid`; L = 1 + tokens.

    Computed on `device` once and kept: training sees few grids, and no step waits for a copy from the host.
    (A graph that torch.compile traces through this call computes the few values anew.)
    """
    # A table first needed while evaluating must still serve training, which inference tensors cannot.
    with torch.inference_mode(False), torch.no_grad():
        angles = rotary_angles(grid, head_dim, bases, device=device)
        angles = torch.cat([angles.new_zeros(1, angles.shape[1]), angles])[None, None]
        return Rotation(angles.cos().float(), angles.sin().float())
