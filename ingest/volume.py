"""What every reader returns: stored voxels with all that later steps need of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Voxels = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One image as the file stores it: axes and values untouched.

    A 2-D image has shape (C, 1, H, W), with C = 3 for colour and 1 for grey. A 3-D image has shape
    (1, I, J, K) with the spatial axes in the file's own order, any strides.
    """

    voxels: Voxels
    """Stored numbers in the file's dtype (native byte order): integers where the file holds integers."""
    dimension: int
    spacing: tuple[float, float, float] | None
    """mm along the three spatial axes; null where the file has none. A 2-D image with a known pixel
    size holds (nan, y, x)."""
    affine: npt.NDArray[np.float64] | None
    """4 x 4, from (i, j, k) to millimetres in RAS+ world axes; null where the file has no orientation."""
    slope: float = 1.0
    intercept: float = 0.0
    """Real value = slope * stored + intercept (HU for CT)."""
    slice_axis: int | None = None
    """The spatial axis (0, 1, 2) along which the file's metadata says the image was scanned."""
    padding_value: int | None = None
    """Stored value that marks voxels outside the scan; counts as the minimum of the others."""
    flags: tuple[str, ...] = ()
    """What the reader repaired or noticed (geometry_flags of the catalog)."""
    index: int = 0
    """Position among the volumes of its file or series."""
    count: int = 1
    """Number of volumes in its file or series."""
    source_hash: str = field(default="", compare=False)
    """sha256 of the source files, read in the same pass where possible."""
