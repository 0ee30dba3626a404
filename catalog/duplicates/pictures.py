"""The small pictures by which an image is found again, as features.parquet holds them.

A 2-D image has one of itself; a volume has three, of slabs through its middle across D, H and W. Each is
square whatever the image's proportions: what a crop or other spacings do to it is a shift and a scale an axis.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FEATURES_VERSION = 1
"""Raised whenever the same voxels would give other features; rows of another version are made anew."""
FLAT_SIDE, SLAB_SIDE = 48, 32
"""Cells along each side of the picture of a 2-D image, and of each slab of a volume."""
LEVELS = 16
PACKED_BYTES = {1: FLAT_SIDE**2 // 2, 3: 3 * SLAB_SIDE**2 // 2}
"""Of an image of one picture, and of a volume."""


def pack(pictures: npt.NDArray[np.uint8]) -> bytes:
    """(n, side, side) of levels below LEVELS as bytes, two cells each."""
    cells = pictures.reshape(-1)
    return ((cells[0::2] << 4) | cells[1::2]).tobytes()


def unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The levels of many images of one kind: (N, bytes) to (N, 1 or 3, side, side)."""
    count, side = (3, SLAB_SIDE) if packed.shape[1] == PACKED_BYTES[3] else (1, FLAT_SIDE)
    cells = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    cells[:, 0::2], cells[:, 1::2] = packed >> 4, packed & 15
    return cells.reshape(len(packed), count, side, side)
