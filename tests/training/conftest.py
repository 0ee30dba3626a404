"""A corpus small enough to train on within a test: structured images of three levels, shards and catalog."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog.corpus import Corpus
from catalog.spacing import da_level
from catalog.split import hold_out
from catalog.write import merge_dataset
from shards.layout import array_name
from shards.write import write_volume

IMAGES = [
    # key, modality, (C, D, H, W), spacing z
    ("a", "CT", (1, 20, 72, 80), 1.0),
    ("b", "CT", (1, 18, 66, 64), 1.0),
    ("c", "MRI", (1, 12, 70, 66), 5.0),
    ("d", "MRI", (1, 10, 64, 90), 5.0),
    ("e", "fundus", (3, 1, 80, 96), None),
    ("f", "fundus", (3, 1, 96, 70), None),
]


BODY_PARTS = {"MRI": "head", "fundus": "eye"}


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Two bright ellipsoids on a ramp, uint8: smooth enough for a small network to learn in a few steps."""
    draw = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape[1:]), indexing="ij")
    image = 60 + 40 * axes[2]
    for _ in range(2):
        centre, radius = draw.uniform(-0.5, 0.5, 3), draw.uniform(0.3, 0.6)
        distance = sum((axis - at) ** 2 for axis, at in zip(axes, centre, strict=True))
        image = image + 110 * np.exp(-distance / radius**2)
    tint = np.linspace(1, 0.5, shape[0])[:, None, None, None]
    return (image[None] * tint).clip(0, 255).astype(np.uint8)


def write_corpus(root: Path, images: list[tuple[Any, ...]] = IMAGES) -> Path:
    """Write images, split and catalog of data set `toy` below `root`."""
    corpus, rows = Corpus(root), []
    subjects: dict[str, set[str]] = {}
    for key, modality, *_ in images:
        subjects.setdefault(modality, set()).add(key)
    held_out = hold_out(corpus, "toy", subjects)
    for seed, (key, modality, shape, z) in enumerate(images):
        voxels = blobs(shape, seed)
        name = array_name("toy", key, hashlib.sha256(voxels.tobytes()).hexdigest())
        stored = write_volume(corpus.shards, name, voxels)
        spacing = {"spacing_z": z, "spacing_y": 1.0 if z else None, "spacing_x": 1.0 if z else None}
        rows.append(
            {
                "dataset": "toy",
                "key": key,
                "subject": key,
                "status": "ingested",
                "modality": modality,
                "body_part": [BODY_PARTS.get(modality, "chest")],
                **{f"shape_{axis}": size for axis, size in zip("cdhw", shape, strict=True)},
                **spacing,
                "dimension": 3 if z else 2,
                "da": z,
                "da_level": da_level(z),
                "stored_dtype": "uint8",
                "slope": 1.0,
                "intercept": 0.0,
                "window_low": 0.0,
                "window_high": 255.0,
                "sampling_weight": 1.0,
                "split": "validation" if key in held_out else "train",
                "shard_path": stored.path,
                "shard_shape": list(stored.shape),
                "stored_bytes": stored.stored_bytes[0],
                "source_path": f"{key}.png",
                "entry_hash": "0",
                "normalisation_version": 1,
            }
        )
    merge_dataset(corpus, "toy", rows, [])
    return root


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of six images of three modalities, one of each held out."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
