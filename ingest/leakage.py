"""Which images of a corpus also occur in an evaluation set, prepared or not."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.corpus import Corpus
from catalog.duplicates.candidates import Progress
from catalog.duplicates.groups import CorpusImages
from catalog.duplicates.search import Images, Work, exact_pairs, near_pairs
from catalog.errors import SetupError
from ingest.glance import Glance, as_source, glance_file, survey
from ingest.image import Normalised, normalise
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.task import images_of
from ingest.volume import Volume

_PARTS = ("train_images", "val_images", "test_images")
"""Arrays of a MedMNIST archive."""


@dataclass(frozen=True)
class Leak:
    """An image of the corpus that the evaluation set holds as well."""

    dataset: str
    key: str
    split: str
    evaluation: str
    """Name of the image in the evaluation set."""
    kind: str
    """exact | near"""
    agreement: float


@dataclass(frozen=True)
class Leakage:
    """What a comparison with an evaluation set found."""

    target: str
    images: int
    """Number of images of the corpus that were compared, ..."""
    evaluation_images: int
    """... and of the evaluation set."""
    unread: list[str]
    """What could not be read or used of the evaluation set, and why."""
    leaks: list[Leak]
    """By evaluation image, then dataset and key."""
    work: Work | None
    """What the search for near duplicates looked at, if there was one."""

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain dicts and lists."""
        return {
            "target": self.target,
            "images": self.images,
            "evaluation_images": self.evaluation_images,
            "evaluation_images_found": len({leak.evaluation for leak in self.leaks}),
            "unread": self.unread,
            "leaks": [leak.__dict__ for leak in self.leaks],
            "work": self.work._asdict() if self.work else None,
        }


def find_leaks(corpus: Corpus, target: str, progress: Progress, *, exact_only: bool = False) -> Leakage:
    """Compare all other images of a corpus with an evaluation set.

    Args:
        target: id of a dataset of the corpus; a folder with another prepared corpus; a folder with raw images;
        or
            one raw image or MedMNIST archive (.npz).

    Raises:
        SetupError: there is no such thing, nothing in it is an image, or features are missing.
    """
    with Images() as images:
        known = CorpusImages(images)
        path = Path(target)
        unread: list[str] = []
        names: dict[int, str] = {}
        if target in corpus.datasets():
            known.add(corpus, [name for name in corpus.datasets() if name != target])
            border = len(images)
            known.add(corpus, [target])
        elif (path / "catalog").is_dir():
            known.add(corpus)
            border = len(images)
            known.add(Corpus(path))
        elif path.exists():
            known.add(corpus)
            border = len(images)
            for number, (name, found) in enumerate(_evaluation(path, unread), start=1):
                names[len(images)] = name
                images.add([found.features.voxel_hash], [found.features.pictures], [f"evaluation\0{name}"])
                progress("evaluation images", number, 0)
            if not names:
                raise SetupError(f"{target}: nothing in it could be read as an image. {' '.join(unread[:3])}")
        else:
            ids = ", ".join(corpus.datasets())
            raise SetupError(
                f"--leakage {target}: neither a file or folder, nor a dataset of the corpus ({ids})."
            )
        side = np.arange(len(images)) >= border
        exact = dict.fromkeys(map(tuple, exact_pairs(images, side).tolist()), 1.0)
        pairs: dict[tuple[int, ...], float] = {}
        work = None
        if not exact_only:
            near, work = near_pairs(images, progress, side)
            # float32 has no 0.93, but a number near it.
            scores = (round(score, 3) for score in near.agreement.tolist())
            pairs = dict(zip(map(tuple, near.images.tolist()), scores, strict=True))
        numbers = sorted({image for pair in pairs | exact for image in pair if image not in names})
        rows = dict(zip(numbers, known.rows(np.array(numbers, np.int64)).to_pylist(), strict=True))
        leaks = [
            Leak(
                dataset=rows[first]["dataset"],
                key=rows[first]["key"],
                split=rows[first]["split"],
                evaluation=names.get(second) or f"{rows[second]['dataset']}/{rows[second]['key']}",
                kind="exact" if (first, second) in exact else "near",
                agreement=score,
            )
            for (first, second), score in (pairs | exact).items()
        ]
        leaks.sort(key=lambda leak: (leak.evaluation, leak.dataset, leak.key))
        return Leakage(target, border, len(images) - border, unread, leaks, work)


def _evaluation(path: Path, unread: list[str]) -> Iterator[tuple[str, Normalised]]:
    """Names and images of raw files; what cannot be used is added to `unread`."""
    if path.is_dir():
        archives = sorted(path.rglob("*.npz"))
        found: Collection[Glance] = survey(path).images
        root = path
    else:
        archives = [path] if path.suffix == ".npz" else []
        glance = None if archives else glance_file(path)
        found, root = [glance] if glance is not None else [], path.parent
    for archive in archives:
        yield from _archive(archive, unread)
    for image in found:
        source = as_source(root, image, dataset="evaluation", key=image.name)
        try:
            for outcome in images_of(source):
                if isinstance(outcome, Normalised):
                    yield outcome.row["key"], outcome
                else:
                    unread.append(outcome["message"])
        except FailedImage as error:
            unread.append(error.message)


def _archive(path: Path, unread: list[str]) -> Iterator[tuple[str, Normalised]]:
    """The images of a MedMNIST archive: (n, h, w), (n, h, w, 3) or, of volumes, (n, d, h, w)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in _PARTS if name in arrays.files]
            if not names:
                unread.append(f"{path.name}: it has none of {', '.join(_PARTS)}, as MedMNIST archives have.")
            for name in names:
                whole = arrays[name]
                if whole.ndim not in (3, 4) or whole.dtype.kind not in "iuf":
                    unread.append(f"{path.name}: {name} has shape {whole.shape} and type {whole.dtype}.")
                    continue
                for number, voxels in enumerate(whole):
                    label = f"{path.name}:{name.removesuffix('_images')}:{number}"
                    try:
                        yield label, _normalised(label, voxels)
                    except ExcludedImage as outcome:
                        unread.append(outcome.message)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise SetupError(f"{path} is no archive of plain arrays: {type(error).__name__}.") from error


def _normalised(name: str, voxels: npt.NDArray[Any]) -> Normalised:
    if voxels.ndim == 2:
        stored, dimension = voxels[np.newaxis, np.newaxis], 2
    elif voxels.shape[-1] == 3:
        stored, dimension = np.moveaxis(voxels, -1, 0)[:, np.newaxis], 2
    else:
        stored, dimension = voxels[np.newaxis], 3
    volume = Volume(
        voxels=np.ascontiguousarray(stored),
        dimension=dimension,
        spacing=(1.0, 1.0, 1.0) if dimension == 3 else None,
        affine=None,
        slice_axis=0 if dimension == 3 else None,
    )
    source = ImageSource(
        dataset="evaluation",
        key=name,
        subject=name,
        path=name,
        root=Path(),
        format="raster" if dimension == 2 else "itk",
        dimension=2 if dimension == 2 else 3,
        modality="",
    )
    return normalise(volume, source)
