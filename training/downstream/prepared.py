"""Cases brought to the spacing and intensities that a network is trained on, once, in a folder on disk.

    CACHE/NAME-HASH/image.npy       (C, D, H, W) float16 in [0, 1]
    CACHE/NAME-HASH/label.npy       (D, H, W) uint8; absent where labels are secret
    CACHE/NAME-HASH/places.npz      voxels of each class, as flat indices, to centre crops on
    CACHE/NAME-HASH/case.json       spacing, channels' scale and shift, sha256 of the voxels

The hash is of the settings and of the names, sizes and times of the case's files, so a change of either makes a
new folder; a folder appears when it is complete. Arrays are read where they lie, without pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.transforms import ClassesToIndices

from catalog.errors import SetupError
from training.backbone import Spacing
from training.downstream.cases import Case, Image, LabelledData, Scan
from training.mim import IMAGENET_MEAN, IMAGENET_STD

_VERSION = 1
"""Of what preparation makes of a case."""

_PERCENTILES = (0.5, 99.5)
_PLACES = 20_000
"""Voxels of a class that are kept to centre crops on, spread evenly over those it has."""

_SHOWN_MEAN = sum(IMAGENET_MEAN) / 3
_SHOWN_STD = sum(IMAGENET_STD) / 3
"""Where a backbone that normalises as for ImageNet sees a mean of 0 and a deviation of 1."""


@dataclass(frozen=True)
class Preparation:
    """What is done to the images of a task."""

    spacing: Spacing | None
    """In mm along (D, H, W); None leaves images on their own grid."""
    window: tuple[float, float] | None
    """Intensities shown as 0 and 1, and clipped there. None: the percentiles 0.5 and 99.5 of each channel, and
    then each channel of an image has mean 0 and deviation 1 for the network."""


@dataclass(frozen=True)
class Prepared:
    """A case in the cache; opens its arrays anew each time, so that processes can share it."""

    case: Case
    folder: Path
    scale: tuple[float, ...]
    """Of each channel: what a network is shown is image * scale + shift."""
    shift: tuple[float, ...]
    spacing: Spacing
    """After preparation."""
    original_spacing: Spacing
    original_shape: tuple[int, int, int]
    sha256: str

    def image(self) -> npt.NDArray[np.float16]:
        return self._array("image")  # type: ignore[no-any-return]

    def label(self) -> npt.NDArray[np.uint8]:
        return self._array("label")  # type: ignore[no-any-return]

    def places(self) -> list[npt.NDArray[np.int64]]:
        """Flat indices of voxels of the background and of every class."""
        with np.load(self.folder / "places.npz", allow_pickle=False) as stored:
            return [stored[str(number)] for number in range(len(stored.files))]

    def shown(self, image_CDHW: torch.Tensor) -> torch.Tensor:
        """Intensities as a network is shown them."""
        scale, shift = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1) for values in (self.scale, self.shift)
        )
        return image_CDHW.float() * scale + shift

    def _array(self, name: str) -> Any:
        # Copy on write: torch warns of arrays that it must not write to, and nobody does.
        return np.load(self.folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)


def prepare(data: LabelledData, case: Case, preparation: Preparation, cache: Path) -> Prepared:
    """The case in `cache`, read and brought there if it is not yet. Raises SetupError as reading does."""
    folder = cache / f"{case.name}-{_key(case, preparation, len(data.classes))}"
    if not (folder / "case.json").is_file():
        scan = data.read(case)
        if not np.isfinite(scan.image).all():
            raise SetupError(f"{case.image} holds values that are not finite: repair it, or leave the case out")
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{case.name}-", dir=cache))
        try:
            _write(scan, preparation, len(data.classes), temporary)
            temporary.chmod(0o777 & ~_umask())
            try:
                temporary.rename(folder)
            except OSError:  # another process was faster; both made the same
                if not (folder / "case.json").is_file():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    told = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return Prepared(
        case=case,
        folder=folder,
        scale=tuple(told["scale"]),
        shift=tuple(told["shift"]),
        spacing=tuple(told["spacing"]),
        original_spacing=tuple(told["original_spacing"]),
        original_shape=tuple(told["original_shape"]),
        sha256=told["sha256"],
    )


def resized(array_CDHW: npt.NDArray[Any], shape: tuple[int, int, int], *, labels: bool) -> npt.NDArray[Any]:
    """Voxels on a grid of another shape over the same extent: linear for images, nearest for labels."""
    if array_CDHW.shape[1:] == shape:
        return array_CDHW
    values = torch.from_numpy(np.ascontiguousarray(array_CDHW))[None]
    if labels:
        return F.interpolate(values, shape, mode="nearest-exact")[0].numpy()
    return F.interpolate(values.float(), shape, mode="trilinear", align_corners=False)[0].numpy()


def _write(scan: Scan, preparation: Preparation, classes: int, folder: Path) -> None:
    image, scale, shift = _normalised(scan.image, preparation.window)
    spacing = preparation.spacing or scan.spacing
    before = image.shape[1:]
    depth, rows, columns = (
        # A flat image has no depth to resample.
        1 if size == 1 else max(round(size * old / new), 1)
        for size, old, new in zip(before, scan.spacing, spacing, strict=True)
    )
    shape = (depth, rows, columns)
    half = resized(image, shape, labels=False).astype(np.float16)
    np.save(folder / "image.npy", half, allow_pickle=False)
    digest = hashlib.sha256(half.tobytes())
    if scan.label is not None:
        label = resized(scan.label[None], shape, labels=True)[0]
        np.save(folder / "label.npy", label, allow_pickle=False)
        digest.update(label.tobytes())
        places = ClassesToIndices(num_classes=classes + 1, max_samples_per_class=_PLACES)(label[None])
        arrays = {str(number): np.asarray(place, np.int64) for number, place in enumerate(places)}
        np.savez(folder / "places.npz", allow_pickle=False, **arrays)
    told = {
        "scale": scale,
        "shift": shift,
        "spacing": [old * size / new for old, size, new in zip(scan.spacing, before, shape, strict=True)],
        "original_spacing": scan.spacing,
        "original_shape": before,
        "sha256": digest.hexdigest(),
    }
    (folder / "case.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _normalised(
    image_CDHW: Image, window: tuple[float, float] | None
) -> tuple[Image, tuple[float, ...], tuple[float, ...]]:
    """The image in [0, 1], and scale and shift of each channel to what a network is shown."""
    channels, scale, shift = [], [], []
    for channel_DHW in image_CDHW:
        low, high = window or np.percentile(channel_DHW, _PERCENTILES)
        shown = ((channel_DHW - low) / max(high - low, np.finfo(np.float32).tiny)).clip(0, 1)
        channels.append(shown.astype(np.float32))
        if window is None:
            factor = _SHOWN_STD / max(float(shown.std()), 1e-6)
            scale.append(factor)
            shift.append(_SHOWN_MEAN - float(shown.mean()) * factor)
        else:
            scale.append(1.0)
            shift.append(0.0)
    return np.stack(channels), tuple(scale), tuple(shift)


def _key(case: Case, preparation: Preparation, classes: int) -> str:
    """What a prepared case depends on, as a name."""
    files = [
        (str(file.relative_to(place.parent)), file.stat().st_size, file.stat().st_mtime_ns)
        for place in (case.image, case.label)
        if place is not None
        for file in (sorted(place.rglob("*")) if place.is_dir() else [place])
        if file.is_file()
    ]
    place = str(case.image.parent.absolute())
    identity = [_VERSION, preparation.spacing, preparation.window, classes, place, files]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
