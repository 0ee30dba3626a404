"""The official layout of every source of datasets.yaml: `official/<id>.yaml`, written as tiny files.

A description says what discovery must find in a release, and what lies beside it in a real download and must
not be found. How each file is made follows from its name and, where that does not tell, from its description.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from ingest.declared import Declared, Text, checked_relative
from ingest.glance import suffix_of
from ingest.reasons import EXCLUSIONS
from tests.layouts import tiny

DESCRIPTIONS = Path(__file__).resolve().parent / "official"

_NIFTI = (".nii", ".nii.gz")
_ITK = (".mha", ".nrrd")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

Beside = Literal["label", "derived", "localizer", "unused", "debris", "text"]
"""What lies beside the images: a label or mask; an image made from others, or unused for another reason; a
series of crossing planes; remains of an archive; a text."""


class Found(Declared):
    """One file, or one folder of a DICOM series, that discovery must find."""

    key: Text
    subject: Text
    modality: Text | tuple[Text, ...]
    """One for each volume where they differ."""
    upstream: Text | tuple[Text, ...] | None = None
    """In the words of the reference implementation; by default the modality itself."""
    weight: float | tuple[float, ...] = 1.0
    """Final weight in the catalog; one for each volume where they differ."""
    volumes: Annotated[int, Field(ge=1)] = 1
    excluded: Text | None = None
    """The reason code of its catalog rows; a file that is left out by name, or as a copy, has one row."""

    shape: Annotated[tuple[int, ...], Field(min_length=3, max_length=4)] = (12, 11, 6)
    """Volume files, in the file's order of axes; the fourth number is that of its volumes."""
    spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)
    orientation: Annotated[str, Field(pattern="^[RLAPSI]{3}$")] = "RAS"
    size: tuple[int, int] = (40, 36)
    """Pictures: height and width."""
    mode: Literal["L", "RGB", "RGBA", "L16", "grey-as-RGB"] = "RGB"
    slices: Annotated[int, Field(ge=2)] = 4
    """DICOM series."""
    dicom: Mapping[Text, Any] = Field(default_factory=dict)
    """DICOM attributes by keyword, over those of any series."""
    names: Annotated[str, Field(pattern=r"\{.*\}")] = "1-{:03d}.dcm"
    """Template of the file names in a DICOM series."""
    same_as: Text | None = None
    """The found file of which this is a copy, byte by byte."""

    @model_validator(mode="after")
    def _consistent(self) -> Found:
        if len(self.shape) == 4 and self.shape[3] != self.volumes and self.excluded is None:
            raise ValueError(f"`shape` has {self.shape[3]} volumes, `volumes` says {self.volumes}")
        if self.excluded is not None and self.excluded not in EXCLUSIONS:
            raise ValueError(f"`excluded` must be a reason code, not {self.excluded!r}")
        for name in ("modality", "upstream", "weight"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.volumes:
                raise ValueError(f"`{name}` has {len(value)} items for {self.volumes} volumes")
        return self

    def rows(self) -> list[dict[str, Any]]:
        """What the catalog must say of it: one row a volume, or a single one if it is excluded."""
        whole = self.volumes == 1 or self.excluded in ("declared", "duplicate")
        keys = [self.key] if whole else [f"{self.key}#{index:04d}" for index in range(self.volumes)]
        return [
            {
                "key": key,
                "subject": self.subject,
                "status": "ingested" if self.excluded is None else "excluded",
                "reason": self.excluded,
                "modality": self.of_volume("modality", index),
                "upstream_modality": self.of_volume("upstream", index),
                "sampling_weight": self.of_volume("weight", index),
            }
            for index, key in enumerate(keys)
        ]

    def of_volume(self, field: Literal["modality", "upstream", "weight"], index: int) -> Any:
        """What the description says of one volume."""
        value = self.upstream or self.modality if field == "upstream" else getattr(self, field)
        return _of_volume(value, index)


def _of_volume(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, tuple) else value


class Release(Declared):
    """A tiny release: paths are relative to the dataset's folder; with a slash at the end, a DICOM series."""

    found: Annotated[Mapping[Text, Found], Field(min_length=1)]
    beside: Mapping[Text, Beside] = Field(default_factory=dict)
    tables: Mapping[Text, str] = Field(default_factory=dict)
    """Text files and their content."""
    variants: Mapping[Text, Mapping[str, str]] = Field(default_factory=dict)
    """Other ways to unpack the same release: old to new beginnings of paths. The first that fits counts."""

    @model_validator(mode="after")
    def _consistent(self) -> Release:
        paths = [*self.found, *self.beside, *self.tables]
        for path in paths:
            checked_relative(path)
        if doubled := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"{doubled[0]!r} is described twice")
        for path, file in self.found.items():
            if not path.endswith("/") and suffix_of(path).lower() not in (*_NIFTI, *_ITK, *_PICTURES):
                raise ValueError(f"{path!r}: no image file is made of this name")
            original = self.found.get(file.same_as or path)
            if original is None or (original is not file and original.same_as):
                raise ValueError(f"{path!r}: `same_as` must name a found file that is no copy itself")
        keys = [file.key for file in self.found.values()]
        if len(set(keys)) != len(keys):
            raise ValueError("two found files have one key")
        for name, moves in self.variants.items():
            if len(set(map(_moved(moves), paths))) != len(paths):
                raise ValueError(f"variant {name!r}: two files get one path")
            if unused := [start for start in moves if not any(path.startswith(start) for path in paths)]:
                raise ValueError(f"variant {name!r}: no path begins with {unused[0]!r}")
        return self

    def variant(self, name: str) -> Release:
        """The same release, unpacked in another way."""
        return self._renamed(_moved(self.variants[name]))

    def decomposed(self) -> Release:
        """The same with names in Unicode NFD, as a Mac writes them."""
        return self._renamed(lambda path: unicodedata.normalize("NFD", path))

    def only(self, wanted: Callable[[str], bool]) -> Release:
        """The files whose path is wanted, and all tables. A copy without its original is an image itself."""
        kept = {path: file for path, file in self.found.items() if wanted(path)}
        for path, file in kept.items():
            if file.same_as is not None and file.same_as not in kept:
                alone = None if file.excluded == "duplicate" else file.excluded
                kept[path] = file.model_copy(update={"same_as": None, "excluded": alone})
        return Release(
            found=kept,
            beside={path: kind for path, kind in self.beside.items() if wanted(path)},
            tables=self.tables,
        )

    def write(self, folder: Path) -> Path:
        """Write all files below the dataset's folder, which is made; returns the folder."""
        for path, file in self.found.items():
            if file.same_as is None:
                _write_found(folder / path, path, file)
        for path, file in self.found.items():
            if file.same_as is not None:
                copy = shutil.copytree if path.endswith("/") else shutil.copyfile
                _ready(folder / path)
                copy(folder / file.same_as, folder / path)
        for path, kind in self.beside.items():
            modality = _of_volume(next(iter(self.found.values())).modality, 0)
            _write_beside(folder / path, path, kind, modality)
        for path, text in self.tables.items():
            _ready(folder / path).write_text(text, encoding="utf-8")
        return folder

    def _renamed(self, rename: Callable[[str], str]) -> Release:
        found = {
            rename(path): file.model_copy(update={"same_as": file.same_as and rename(file.same_as)})
            for path, file in self.found.items()
        }
        beside = {rename(path): kind for path, kind in self.beside.items()}
        return Release(found=found, beside=beside, tables={rename(p): text for p, text in self.tables.items()})


def described() -> list[str]:
    """Ids of all datasets with a description."""
    return sorted(file.stem for file in DESCRIPTIONS.glob("*.yaml"))


@functools.cache
def load_release(dataset: str) -> Release:
    """The description of a dataset's release.

    Raises:
        FileNotFoundError: there is none.
        pydantic.ValidationError: an unknown field, or one that contradicts another.
    """
    text = (DESCRIPTIONS / f"{dataset}.yaml").read_text(encoding="utf-8")
    return Release.model_validate(yaml.safe_load(text))


def _moved(moves: Mapping[str, str]) -> Callable[[str], str]:
    def rename(path: str) -> str:
        start = next((start for start in moves if path.startswith(start)), None)
        return path if start is None else moves[start] + path[len(start) :]

    return rename


def _ready(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _seed(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")


def _kind(modality: str | tuple[str, ...]) -> str:
    return str(_of_volume(modality, 0)).split("/")[0]


def _write_found(target: Path, path: str, file: Found) -> None:
    _ready(target)
    suffix = suffix_of(path).lower()
    if path.endswith("/"):
        tiny.write_series(
            target,
            _seed(path),
            _kind(file.modality),
            slices=file.slices,
            volumes=file.volumes,
            spacing=file.spacing,
            names=file.names,
            tags=file.dicom,
        )
    elif suffix in _PICTURES:
        tiny.write_picture(target, _seed(path), file.size, file.mode)
    elif suffix in _ITK:
        tiny.write_itk(target, tiny.noise(_seed(path), file.shape), file.spacing)
    else:
        tiny.write_nifti(target, tiny.noise(_seed(path), file.shape), file.spacing, file.orientation)


def _write_beside(target: Path, path: str, kind: Beside, modality: str) -> None:
    _ready(target)
    seed, suffix, label = _seed(path), suffix_of(path).lower(), kind == "label"
    if kind == "debris":
        target.write_bytes(b"\0\5\x16\7 what an archive leaves")
    elif path.endswith("/"):
        _write_folder_beside(target, seed, kind, modality)
    elif kind == "text" or suffix not in (*_NIFTI, *_ITK, *_PICTURES):
        target.write_text("a line\n")
    elif suffix in _PICTURES:
        tiny.write_picture(target, seed, (40, 36), "label" if label else "L")
    elif suffix in _ITK:
        tiny.write_itk(target, tiny.noise(seed, (12, 11, 6), label=label), (1, 1, 3))
    else:
        tiny.write_nifti(target, tiny.noise(seed, (12, 11, 6), label=label), (1, 1, 3), "RAS")


def _write_folder_beside(folder: Path, seed: int, kind: Beside, modality: str) -> None:
    if kind == "label":
        tiny.write_segmentation(folder, seed)
    elif kind == "localizer":
        tiny.write_localizer(folder, seed, _kind(modality))
    elif kind in ("derived", "unused"):
        tags = {"ImageType": ["DERIVED", "SECONDARY"]} if kind == "derived" else {}
        tiny.write_series(
            folder,
            seed,
            _kind(modality),
            slices=4,
            volumes=1,
            spacing=(1, 1, 3),
            names="1-{:03d}.dcm",
            tags=tags,
        )
    else:
        raise ValueError(f"{folder}: a folder cannot be {kind}")
