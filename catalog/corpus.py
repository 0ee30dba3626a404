"""Where the parts of a prepared corpus lie: written down once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from catalog.store import Location, RemotePath

INDEX_NAME = "catalog/datasets.txt"
"""File of a corpus that names its datasets: see `catalog.index`."""


@dataclass(frozen=True)
class Corpus:
    """The place given as `--data`: catalog, shards, splits, and what never leaves the machine."""

    root: Path
    """Folder of all files; of a corpus in an object store, of copies of all but the shards."""
    origin: RemotePath | None = None
    """Where the corpus lies, if not in `root`."""

    @property
    def place(self) -> Location:
        """What the user knows it by."""
        return self.root if self.origin is None else self.origin

    @property
    def shards(self) -> Location:
        return self.place / "shards"

    @property
    def shards_folder(self) -> Path:
        """As `shards`, for those who only work on a corpus in a folder."""
        return self.root / "shards"

    def name_of(self, path: Location) -> str:
        """A path of the corpus, relative to it."""
        if isinstance(path, Path):
            return path.relative_to(self.root).as_posix()
        if self.origin is None:
            raise ValueError(f"{path} is not below {self.root}")
        return path.relative_to(self.origin).as_posix()

    def published(self, path: Path) -> Location:
        """Where a file of the corpus lies that is not copied from a store: previews and features, rarely
        read."""
        return path if self.origin is None else self.origin / self.name_of(path)

    @property
    def private(self) -> Path:
        """Journal, locks and logs of ingest (mode 0700): times and paths live here, never in the catalog."""
        return self.root / "private"

    def catalog_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "images.parquet"

    def preview_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "previews.parquet"

    def features_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "features.parquet"

    def manifest_file(self, dataset: str) -> Path:
        return self.root / "catalog" / f"dataset={dataset}" / "manifest.sha256"

    def next_manifest_file(self, dataset: str) -> Path:
        """What the manifest is about to become, while files of the dataset are being replaced."""
        return self.root / "catalog" / f"dataset={dataset}" / "manifest.next.sha256"

    def split_file(self, dataset: str) -> Path:
        return self.root / "splits" / f"{dataset}.parquet"

    def files(self, dataset: str) -> tuple[Path, Path, Path, Path]:
        """What a dataset's manifest tells of: catalog, previews, features and split."""
        beside = (self.preview_file(dataset), self.features_file(dataset))
        return (self.catalog_file(dataset), *beside, self.split_file(dataset))

    @property
    def index_file(self) -> Path:
        return self.root / INDEX_NAME

    @property
    def duplicates_file(self) -> Path:
        """What `pumit-data duplicates` found; it can be made anew from the catalog at any time."""
        return self.root / "catalog" / "duplicates.parquet"

    def mix_file(self, name: str) -> Path:
        return self.root / "mixes" / f"{name}.yaml"

    @property
    def duplicates_digest_file(self) -> Path:
        """The sha256 of `duplicates_file`."""
        return self.root / "catalog" / "duplicates.sha256"

    def datasets(self) -> list[str]:
        """Ids of the datasets that have a catalog file, sorted."""
        found = (self.root / "catalog").glob("dataset=*/images.parquet")
        return sorted(path.parent.name.removeprefix("dataset=") for path in found)
