"""Volumes whose class can be seen, in the files of MedMNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COUNTS = {"train": 24, "val": 12, "test": 20}

QUICK = {
    "size": [16, 16, 16],
    "epochs": 5,
    "batch_size": 8,
    "learning_rates": [1e-3],
    "head_learning_rates": [3e-2],
    "lr_drops": [4],
}
"""Settings of a run that takes a second."""


def write_medmnist(folder: Path, name: str = "nodule", classes: int = 2, *, mask: bool = False) -> Path:
    """`folder`/{name}mnist3d.npz in the published form: class k is a bar along axis k, masks without noise."""
    draw = np.random.default_rng(7)
    arrays = {}
    for part, count in COUNTS.items():
        labels = np.arange(count) % classes
        images = np.zeros((count, 28, 28, 28), np.uint8) if mask else draw.integers(0, 60, (count, 28, 28, 28))
        for image, label in zip(images, labels, strict=True):
            where: list[slice] = [slice(at, at + 6) for at in draw.integers(8, 14, 3)]
            where[label] = slice(2, 26)
            image[tuple(where)] = 255 if mask else 200
        arrays[f"{part}_images"] = images.astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}mnist3d.npz", **arrays)
    return folder
