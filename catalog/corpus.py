"""Where the parts of a prepared corpus lie: written down once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Corpus:
    """The folder given as `--data`: catalog, shards, splits, and what never leaves the machine."""

    root: Path

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def private(self) -> Path:
        """Journal, locks and logs of ingest (mode 0700): times and paths live here, never in the catalog."""
        return self.root / "private"

    def catalog_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "images.parquet"

    def preview_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "previews.parquet"

    def manifest_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "manifest.sha256"

    def next_manifest_file(self, dataset: str) -> Path:
        """What the manifest is about to become, while files of the dataset are being replaced."""
        return self.root / "catalog" / f"dataset={dataset}" / "manifest.next.sha256"

    def split_file(self, dataset: str) -> Path:
        return self.root / "splits" / f"{dataset}.parquet"

    def datasets(self) -> list[str]:
        """Ids of the datasets that have a catalog file, sorted."""
        found = (self.root / "catalog").glob("dataset=*/images.parquet")
        return sorted(path.parent.name.removeprefix("dataset=") for path in found)
