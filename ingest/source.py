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
    alias: str | None = None
    """What rows, messages and logs call the path, where its names may identify somebody."""
    format: Format
    dimension: Literal[2, 3]
    modality: str
    upstream_modality: str | None = None
    """The same in the words of the reference implementation; null: of each volume its own modality."""
    volume_modalities: tuple[str, ...] = ()
    """Those of the volumes of a file, in order, where they differ or the dataset states how many there are."""
    body_part: tuple[str, ...] = ()
    depth_axis: DepthAxis | None = None
    """The official description of the dataset, if it says how images were scanned."""
    weight: float = 1.0
    """Weight of the file: that of the dataset, or the share of it that the file has."""
    share_weight: bool | Literal["after-first"] = False
    """The n volumes of the file share its weight; `after-first`: all but the first do."""
    overrides: tuple[tuple[int | None, str], ...] = ()
    """What the user's overrides.yaml leaves out: number of a volume, or null for all, and why."""
    exclude: tuple[str, str] | None = None
    """(reason code, message) when datasets.yaml leaves this source out by name."""
    failure: tuple[str, str] | None = None
    """(reason code, message) when its name alone tells that it cannot be read."""

    @property
    def file(self) -> Path:
        return self.root / self.path

    @property
    def public_path(self) -> str:
        return self.path if self.alias is None else self.alias

    def overridden(self, index: int | None) -> str | None:
        """Why the user leaves out a volume, or, for null, the whole; null if it is not left out."""
        return next((why for volume, why in self.overrides if volume in (None, index)), None)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of all its images."""
        return self.volume_modalities or (self.modality,)

    def volume_weight(self, index: int, count: int) -> float:
        """Sampling weight of one of the `count` volumes of the file."""
        if not self.share_weight:
            return self.weight
        apart = self.share_weight == "after-first"
        return self.weight if apart and index == 0 else self.weight * shared_weight(max(count - apart, 1))


def shared_weight(count: int) -> float:
    """Weight of each of `count` images that share one: together between 1 and 2 (paper: (2n - 1) / n^2)."""
    return (2 * count - 1) / count**2
