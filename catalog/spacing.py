"""Degree of anisotropy (DA): how much thicker than wide a voxel is, and the level that batches share."""

from __future__ import annotations

MAX_DA_LEVEL = 5
"""The level of images seen one slice at a time: 2-D, and 3-D with DA >= 32."""


def degree_of_anisotropy(spacing_zyx: tuple[float, float, float]) -> float:
    """spacing_z / min(spacing_y, spacing_x), in mm (paper, spatially adaptive convolution)."""
    z, y, x = spacing_zyx
    return z / min(y, x)


def da_level(da: float | None) -> int:
    """floor(log2(DA)) clipped to 0..5; a null DA (2-D, acts as infinite) is level 5."""
    if da is None:
        return MAX_DA_LEVEL
    # Comparisons are exact at powers of two, where log2 may round down, and torch.compile can follow them. NaN
    # is below nothing.
    return sum(not da < 2**level for level in range(1, MAX_DA_LEVEL + 1))
