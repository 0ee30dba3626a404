"""A catalog of made-up images of every kind, ready to be planned; no voxels."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from catalog.corpus import Corpus
from catalog.spacing import da_level
from catalog.write import merge_dataset

MODALITIES = {
    "amos": ["CT", "MRI"],
    "busi": ["US", "XR"],
    "chaos": ["CT", "MRI/T1"],
    "ixi": ["MRI/T1", "MRI/T2"],
}


def rows_of(dataset: str, count: int = 40) -> list[dict[str, Any]]:
    """Rows of one dataset: two to a subject, one in eight held out, one in ten excluded."""
    draw = random.Random(dataset)
    return [_row(dataset, number, draw) for number in range(count)]


def _row(dataset: str, number: int, draw: random.Random) -> dict[str, Any]:
    flat = dataset == "busi"
    z = None if flat else draw.choice([0.8, 1.2, 2.3, 4.5, 9.0, 40.0])
    in_plane = None if flat else draw.choice([0.7, 1.0])
    side = draw.choice([64, 128, 300])
    level = da_level(None if z is None else z / in_plane)
    return {
        "dataset": dataset,
        "key": f"{number:03d}",
        "subject": f"person-{number // 2}",
        "status": "excluded" if number % 10 == 9 else "ingested",
        "reason": "uneven_slices" if number % 10 == 9 else None,
        "modality": draw.choice(MODALITIES[dataset]),
        "body_part": draw.sample(["chest", "head"], draw.randrange(3)),
        "dimension": 2 if flat else 3,
        "shape_c": 1,
        "shape_d": 1 if flat else 20,
        "shape_h": side,
        "shape_w": side,
        "spacing_z": z,
        "spacing_y": in_plane,
        "spacing_x": in_plane,
        "da": None if flat else z / in_plane,
        "da_level": level,
        "stored_dtype": "int16",
        "slope": 1.0,
        "intercept": 0.0,
        "window_low": 0.0,
        "window_high": 1.0,
        "sampling_weight": draw.choice([0.2, 1.0, 3.0]),
        "split": "validation" if number % 16 < 2 else "train",
        "shard_path": f"{dataset}/{number}.zarr",
        "shard_shape": [1, 1 if flat else 20, side, side],
        "shard_sha256": f"{number + 1000:064d}",
        "source_path": f"{number}.nii",
        "source_hash": f"{number:064d}",
        "entry_hash": "e",
        "normalisation_version": 1,
    }


def write_mixed(root: Path) -> Corpus:
    """The corpus of all MODALITIES."""
    corpus = Corpus(root)
    for dataset in MODALITIES:
        merge_dataset(corpus, dataset, rows_of(dataset), [])
    return corpus


def training_rows() -> list[dict[str, Any]]:
    """The rows of that corpus that training draws from."""
    rows = (row for dataset in MODALITIES for row in rows_of(dataset))
    return [row for row in rows if row["status"] == "ingested" and row["split"] == "train"]
