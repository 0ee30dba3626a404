"""A made-up corpus of any size, with features and a catalog but no voxels, whose images resemble each other as
those of real collections do.

Random pictures would flatter a search: no two of them have anything in common. Here every image is a real one
(the templates) bent by a smooth random displacement, with a second one and a texture of its own laid over it:
thousands of images of a dataset share the anatomy of a few templates, in almost the same place, and differ in
what is fine. How much they agree was set by what different people's radiographs, fundus photographs and scans
in `../shared/data` agree. Beside them are what crowds any index: blank images, and pictures with the same
burned-in marks.

A share of the images comes once more, in a dataset of copies, in another form: flipped, cropped by up to 10 % a
side, in another window, with other noise, or unchanged. Their keys say of which image they are.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catalog.corpus import Corpus
from catalog.duplicates.pictures import FEATURES_VERSION, LEVELS
from catalog.manifest import publish
from catalog.schema import CATALOG_SCHEMA, FEATURES_SCHEMA
from catalog.write import catalog_file, features_file

DATASETS = 55
PLANTED = 0.04
"""Share of the images that come once more."""
_UNCHANGED = 0.1
"""Share of these that have the same voxels."""
_BLANK, _MARKED = 0.003, 0.01
"""Shares of the images that show nothing, and that have the burned-in marks of one device."""
_TEMPLATES = 4
"""Real images behind a dataset."""
_BENT, _GRID = (0.012, 0.04), 6
"""Standard deviation of the displacement, as a share of the side, and points along a side where it is drawn."""
_SHIFTED = 0.03
"""That of the shift of the whole."""
_OVERLAID = 0.4
"""Weight of the second image at most."""
_TEXTURE = (0.3, 1.2)
"""Standard deviation of the texture in grey levels, from and to."""
_NOISE = (0.2, 1.0)
"""That of what another form changes beyond its shape."""
_AT_ONCE = 2048

Pictures = npt.NDArray[np.float32]
"""(B, 1 or 3, side, side) of grey levels, not yet whole numbers."""


class Copy(NamedTuple):
    """An image that comes once more."""

    of: str
    voxel_hash: bytes
    levels: npt.NDArray[np.uint8]


def write_lookalikes(folder: Path, rows: int, templates: Sequence[npt.NDArray[np.uint8]]) -> int:
    """Write a corpus of `rows` images, and as many copies as are planted among them.

    Args:
        templates: pictures of real images, (1 or 3, side, side) each.

    Returns:
        Number of copies.
    """
    by_kind = {count: [one for one in templates if len(one) == count] for count in (1, 3)}
    shares = np.random.default_rng(0).lognormal(0, 1, DATASETS)
    sizes = np.maximum(np.rint(rows * shares / shares.sum()).astype(int), 1)
    sizes[-1] = max(1, rows - sizes[:-1].sum())
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kinds = [by_kind[1 if number % 2 else 3] for number in range(DATASETS)]
        return sum(pool.map(_write_dataset, [folder] * DATASETS, range(DATASETS), sizes.tolist(), kinds))


def _write_dataset(folder: Path, number: int, size: int, templates: Sequence[npt.NDArray[np.uint8]]) -> int:
    """Write a dataset and that of its copies, and return how many of these there are."""
    corpus = Corpus(folder)
    dataset, again = f"made-up-{number:02d}", f"of-made-up-{number:02d}"
    copies: list[Copy] = []
    keys = [f"{place:09d}" for place in range(size)]
    features = features_file(corpus, dataset, _features(dataset, number, keys, templates, copies))
    publish(corpus, dataset, [features, catalog_file(corpus, dataset, [_catalog(dataset, number, keys)])])
    if copies:
        keys = [copy.of for copy in copies]
        features = features_file(corpus, again, _features_of(again, copies))
        publish(corpus, again, [features, catalog_file(corpus, again, [_catalog(again, number, keys)])])
    return len(copies)


def original_of(key: str) -> tuple[str, str] | None:
    """Dataset and key of the image that this one is a copy of."""
    if not key.startswith("of-"):
        return None
    _, number, original = key.split("-")
    return f"made-up-{number}", original


def _features(
    dataset: str,
    number: int,
    keys: Sequence[str],
    templates: Sequence[npt.NDArray[np.uint8]],
    copies: list[Copy],
) -> Iterator[pa.Table]:
    """The features of a dataset; `copies` gets those of its images."""
    rng = np.random.default_rng([1, number])
    chosen = rng.choice(len(templates), _TEMPLATES, replace=False)
    own = np.stack([templates[one] for one in chosen]).astype(np.float32)
    others = np.stack(templates).astype(np.float32)
    textures = _textures(own.shape[-1])
    for start in range(0, len(keys), _AT_ONCE):
        some = keys[start : start + _AT_ONCE]
        count = len(some)
        made = _bent(rng, own[rng.integers(len(own), size=count)], others, textures)
        levels = _levels(made)
        hashes = [_digest(f"{dataset} {start + place}") for place in range(count)]
        yield _table(dataset, some, hashes, levels)
        again = np.flatnonzero((rng.random(count) < PLANTED) & levels.any((1, 2, 3)))
        unchanged = rng.random(len(again)) < _UNCHANGED
        forms = np.where(
            unchanged[:, None, None, None], levels[again], _levels(_in_other_form(rng, made[again]))
        )
        for place, same, form in zip(again.tolist(), unchanged.tolist(), forms, strict=True):
            key = f"of-{number:02d}-{some[place]}"
            copies.append(Copy(key, hashes[place] if same else _digest(key), form.astype(np.uint8)))


def _features_of(dataset: str, copies: Sequence[Copy]) -> Iterator[pa.Table]:
    for start in range(0, len(copies), _AT_ONCE):
        some = copies[start : start + _AT_ONCE]
        keys, hashes, pictures = zip(*some, strict=True)
        yield _table(dataset, keys, hashes, np.stack(pictures))


def _bent(rng: np.random.Generator, own: Pictures, others: Pictures, textures: Pictures) -> Pictures:
    """Images of other people than the templates `own`."""
    count, slabs, side, _ = own.shape
    along = _upsampling(side)
    bent = np.repeat(rng.uniform(*_BENT, count), slabs)[:, None, None] * side
    drawn = (bent * rng.normal(size=(2, count * slabs, _GRID, _GRID))).astype(np.float32)
    drawn += rng.normal(0, _SHIFTED * side, (2, count * slabs, 1, 1)).astype(np.float32)
    fields = along @ drawn @ along.T
    cells = np.arange(side, dtype=np.float32)
    down, across = fields[0] + cells[:, None], fields[1] + cells
    second = others[rng.integers(len(others), size=count)].reshape(-1, side, side)
    first = own.reshape(-1, side, side)
    weight = np.repeat(rng.uniform(0, _OVERLAID, count), slabs)
    noise = textures[rng.integers(len(textures), size=count * slabs)]
    noise = noise * np.repeat(rng.uniform(*_TEXTURE, count), slabs)[:, None, None].astype(np.float32)
    second = second - second.mean((1, 2), keepdims=True)
    both = first + weight[:, None, None].astype(np.float32) * second
    made = np.empty_like(both)
    for place in range(count * slabs):
        cv2.remap(
            both[place], across[place], down[place], cv2.INTER_LINEAR, made[place], cv2.BORDER_REFLECT_101
        )
    made = (made + noise).reshape(own.shape)
    kind = rng.random(count)
    made[kind < _BLANK] = 0
    marked = (kind >= _BLANK) & (kind < _BLANK + _MARKED)
    made[marked, :, :, : side // 4] = others[0, :, :, : side // 4]
    return made


def _in_other_form(rng: np.random.Generator, images: Pictures) -> Pictures:
    """Flips, crops, windows and noise, each axis of an image by itself."""
    count, slabs, side, _ = images.shape
    planes = ((1, 2), (0, 2), (0, 1)) if slabs == 3 else ((0, 1),)
    before, after = rng.uniform(0, 0.1, (2, count, 3)) * (rng.random((count, 1)) < 0.6)
    cells = (np.arange(side, dtype=np.float32) + 0.5) / side
    places = (before[..., None] + (1 - before - after)[..., None] * cells) * side - 0.5
    flipped = rng.random((count, 3)) < 0.25
    places = np.where(flipped[..., None], places[..., ::-1], places).astype(np.float32)
    low = rng.uniform(0, 1.0, count) * (rng.random(count) < 0.4)
    high = LEVELS - 1 - rng.uniform(0, 2.5, count) * (rng.random(count) < 0.4)
    made = np.empty_like(images)
    for image in range(count):
        for slab, (down, across) in enumerate(planes):
            rows = np.repeat(places[image, down][:, None], side, axis=1)
            columns = np.repeat(places[image, across][None], side, axis=0)
            made[image, slab] = cv2.remap(
                images[image, slab], columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
    made = (made - low[:, None, None, None]) * ((LEVELS - 1) / (high - low))[:, None, None, None]
    noise = rng.uniform(*_NOISE, (count, 1, 1, 1)) * rng.normal(size=made.shape)
    return np.asarray(made + noise, np.float32)


def _levels(images: Pictures) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(images), 0, LEVELS - 1).astype(np.uint8)


@functools.cache
def _textures(side: int, count: int = 4096) -> Pictures:
    """Noise whose amplitude falls with the frequency, as that of tissue: standard deviation 1."""
    rng = np.random.default_rng(side)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    falling = np.fft.rfft2(rng.normal(size=(count, side, side))) / np.maximum(frequency, 2 / side)
    noise = np.fft.irfft2(falling, s=(side, side))
    return np.asarray(
        (noise - noise.mean((1, 2), keepdims=True)) / noise.std((1, 2), keepdims=True), np.float32
    )


def _upsampling(side: int) -> npt.NDArray[np.float32]:
    """(side, _GRID): smooth interpolation between the points of the grid."""
    at = np.linspace(0, _GRID - 1, side)[:, None]
    weights = np.exp(-((at - np.arange(_GRID)) ** 2) / (2 * 0.5**2))
    return np.asarray(weights / np.sqrt((weights**2).sum(axis=1, keepdims=True)), np.float32)


def _table(
    dataset: str, keys: Sequence[str], hashes: Sequence[bytes], levels: npt.NDArray[np.uint8]
) -> pa.Table:
    cells = levels.reshape(len(levels), -1)
    packed = (cells[:, 0::2] << 4) | cells[:, 1::2]
    return pa.table(
        {
            "dataset": pa.array([dataset] * len(keys)),
            "key": pa.array(keys),
            "features_version": pa.array(np.full(len(keys), FEATURES_VERSION, np.int32)),
            "voxel_hash": pa.array(hashes, pa.binary(16)),
            "pictures": pa.array(list(map(bytes, packed)), pa.binary()),
        },
        schema=FEATURES_SCHEMA,
    )


def _catalog(dataset: str, number: int, keys: Sequence[str]) -> pa.Table:
    rows = len(keys)
    flat = bool(number % 2)

    def whole(value: int) -> pa.Array:
        return pa.array(np.full(rows, value, np.int64))

    def text(value: str) -> pa.Array:
        return pa.array([value] * rows)

    columns: dict[str, Any] = {
        "dataset": text(dataset),
        "key": pa.array(keys),
        "subject": pa.array(keys),
        "status": text("ingested"),
        "modality": text("XR" if flat else "CT"),
        "dimension": whole(2 if flat else 3),
        "shape_c": whole(1),
        "shape_d": whole(1 if flat else 100),
        "shape_h": whole(512),
        "shape_w": whole(512),
        "split": pa.array(np.where(np.arange(rows) % 50, "train", "validation")),
        "sampling_weight": pa.array(np.ones(rows)),
        "stored_dtype": text("int16"),
        "source_path": pa.array([f"images/{key}" for key in keys]),
        "source_hash": text("0" * 64),
        "entry_hash": text("0" * 64),
        "normalisation_version": whole(1),
    }
    complete = {
        field.name: columns[field.name].cast(field.type)
        if field.name in columns
        else pa.nulls(rows, field.type)
        for field in CATALOG_SCHEMA
    }
    return pa.table(complete, schema=CATALOG_SCHEMA)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()
