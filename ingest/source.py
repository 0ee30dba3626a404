"""One image file or series that a dataset's rule found; no voxel is read yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["nifti", "dicom", "itk", "raster"]
DepthAxis = Literal["SI", "AP", "LR"]


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """What ingest needs to read and describe one file or series. Small: it travels to the workers."""

    dataset: str
    key: str
    """Unique in the dataset. A file with several volumes gives images `key#0000`, `key#0001`, ..."""
    subject: str
    path: str
    """File, or folder of one DICOM series, relative to `root`, with forward slashes."""
    root: Path
    """Folder of the dataset; nothing outside is read."""
    format: Format
    dimension: Literal[2, 3]
    modality: str
    upstream_modality: str
    body_part: tuple[str, ...] = ()
    depth_axis: DepthAxis | None = None
    """The official description of the dataset, if it says how images were scanned."""
    weight: float = 1.0
    """Weight of the dataset; a file of n volumes gives each (2n - 1) / n^2 of it if `share_weight`."""
    share_weight: bool = False
    exclude: tuple[str, str] | None = None
    """(reason code, message) when datasets.yaml leaves this source out by name."""
    failure: tuple[str, str] | None = None
    """(reason code, message) when its name alone tells that it cannot be read."""

    @property
    def file(self) -> Path:
        return self.root / self.path
