"""The stream of batches is the same for any start, any number of workers and any number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.sampling import CropGeometry
from catalog.schema import CATALOG_SCHEMA
from catalog.spacing import da_level
from shards.read import ShardReader
from shards.write import StoredArray, write_pack, write_volume
from training.augment import render
from training.loader import RawBatch, make_loader, read_batch
from training.plan import BatchPlanner, ValidationPlanner

CROP = CropGeometry(tokens_z=1, tokens_x=2)
STEPS = 9
Prepared = tuple[Corpus, list[dict[str, Any]], dict[str, np.ndarray]]
"""A corpus, its catalog rows, and what was stored: key -> (C, D, H, W)."""
Content = tuple[Any, list[Any]]


def row(
    key: str,
    voxels: np.ndarray,
    spacing: tuple[float | None, float | None, float | None],
    stored: StoredArray,
    shard_index: int | None = None,
) -> dict[str, Any]:
    flat = spacing[0] is None
    return {
        "dataset": "demo",
        "key": key,
        "subject": key,
        "status": "ingested",
        "split": "train",
        "dimension": 2 if flat else 3,
        **dict(zip(("shape_c", "shape_d", "shape_h", "shape_w"), voxels.shape, strict=True)),
        **dict(zip(("spacing_z", "spacing_y", "spacing_x"), spacing, strict=True)),
        "da_level": 5 if flat else da_level(spacing[0] / min(spacing[1:])),
        "sampling_weight": 1.0,
        "stored_dtype": voxels.dtype.name,
        "slope": 1.0,
        "intercept": 0.0,
        "window_low": 0.0,
        "window_high": 255.0,
        "shard_path": stored.path,
        "shard_shape": list(stored.shape),
        "shard_index": shard_index,
        "source_path": key,
        "entry_hash": "0",
        "normalisation_version": 1,
    }


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Corpus, list[dict[str, Any]], dict[str, np.ndarray]]:
    """Two volumes of different dtype and level, a pack of two grey images, a pack of one colour image."""
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    rng = np.random.default_rng(0)

    def noise(dtype: str, *shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape).astype(dtype)

    iso, thick = noise("int16", 1, 24, 50, 45), noise("float32", 1, 9, 70, 40)
    big, small = noise("uint8", 1, 1, 60, 70), noise("uint8", 1, 1, 20, 41)
    colour = noise("uint8", 3, 1, 48, 40)
    grey_pack = write_pack(corpus.shards, "demo/grey.zarr", [big, small])
    rows = [
        row("iso", iso, (1.0, 1.0, 1.0), write_volume(corpus.shards, "demo/iso.zarr", iso)),
        row("thick", thick, (5.0, 1.0, 1.0), write_volume(corpus.shards, "demo/thick.zarr", thick)),
        row("big", big, (None, None, None), grey_pack, 0),
        row("small", small, (None, 0.2, 0.2), grey_pack, 1),
        row("colour", colour, (None, None, None), write_pack(corpus.shards, "demo/colour.zarr", [colour]), 0),
    ]
    return corpus, rows, {"iso": iso, "thick": thick, "big": big, "small": small, "colour": colour}


def planner(rows: list[dict[str, Any]], batch_size: int = 5) -> BatchPlanner:
    return BatchPlanner(pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA), CROP, batch_size, seed=1)


def content(batch: RawBatch) -> Content:
    """Everything a batch holds, comparable."""
    return batch.plan, [(box.dtype, tuple(box.shape), box.numpy().tobytes()) for box in batch.boxes]


@pytest.fixture(scope="module")
def uninterrupted(prepared: Prepared) -> list[Content]:
    corpus, rows, _ = prepared
    batches = [content(batch) for batch in make_loader(corpus, planner(rows), 0, STEPS - 1, workers=0)]
    assert [plan.step for plan, _ in batches] == list(range(STEPS))
    assert len({plan.level for plan, _ in batches}) > 1
    return batches


def test_boxes_hold_the_stored_voxels(prepared: Prepared) -> None:
    corpus, rows, arrays = prepared
    for batch in make_loader(corpus, planner(rows), 0, STEPS - 1, workers=0):
        assert batch.indices == tuple(range(5))
        for sample, box in zip(batch.plan.samples, batch.boxes, strict=True):
            where = (slice(None), *(slice(start, stop) for start, stop in sample.box))
            assert np.array_equal(box.numpy(), arrays[sample.image.key][where])
            assert box.numpy().dtype == arrays[sample.image.key].dtype
        crops = render(batch, torch.device("cpu"))
        assert crops.voxels.shape == (5, 3, *CROP.size(batch.level))
        assert torch.isfinite(crops.voxels).all()
        assert crops.keys == batch.keys


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_parts_of_a_batch_hold_its_boxes_in_order(prepared: Prepared, parts: int) -> None:
    corpus, rows, _ = prepared
    for batch in make_loader(corpus, planner(rows), 0, 5, 0):
        split = batch.split(parts)
        assert len(split) == parts
        assert max(len(part.keys) for part in split) - min(len(part.keys) for part in split) <= 1
        assert [key for part in split for key in part.keys] == [*batch.keys]
        assert [index for part in split for index in part.indices] == [*batch.indices]
        boxes = [box for part in split for box in part.boxes]
        assert all(torch.equal(box, whole) for box, whole in zip(boxes, batch.boxes, strict=True))
    with pytest.raises(SetupError, match=r"data\.accumulate"):
        batch.split(6)


def test_boxes_read_side_by_side_do_not_mix(prepared: Prepared) -> None:
    corpus, rows, arrays = prepared
    many, reader = planner(rows, batch_size=40), ShardReader(corpus.shards)
    for step in range(3):
        batch = read_batch(reader, many.plan(step))
        for sample, box in zip(batch.plan.samples, batch.boxes, strict=True):
            where = (slice(None), *(slice(start, stop) for start, stop in sample.box))
            assert np.array_equal(box.numpy(), arrays[sample.image.key][where])


def test_one_broken_box_of_many_is_named(tmp_path: Path) -> None:
    corpus, voxels = Corpus(tmp_path), np.ones((1, 24, 50, 45), np.int16)
    good, bad = (write_volume(corpus.shards, f"demo/{name}.zarr", voxels) for name in ("good", "bad"))
    plan = planner([row("good", voxels, (1.0, 1.0, 1.0), good)], 20).plan(0)
    samples = list(plan.samples)
    samples[3] = dataclasses.replace(
        samples[3], image=dataclasses.replace(samples[3].image, key="bad", shard_path=bad.path)
    )
    shard = corpus.shards / "demo" / "bad.zarr" / "c.0.0.0.0"
    shard.write_bytes(b"\xff" * 1000 + shard.read_bytes()[1000:])
    with pytest.raises(SetupError, match="demo/bad"):
        read_batch(ShardReader(corpus.shards), dataclasses.replace(plan, samples=tuple(samples)))


def test_resuming_at_every_step_continues_the_same_stream(
    prepared: Prepared, uninterrupted: list[Content]
) -> None:
    corpus, rows, _ = prepared
    for first in range(STEPS + 1):
        loader = make_loader(corpus, planner(rows), first, STEPS - 1, workers=0)
        assert len(loader) == STEPS - first
        assert [content(batch) for batch in loader] == uninterrupted[first:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "first"), [(1, 7), (2, 0), (3, 4)])
def test_any_number_of_workers_gives_the_same_stream(
    prepared: Prepared, uninterrupted: list[Content], workers: int, first: int
) -> None:
    corpus, rows, _ = prepared
    # This process has used TensorStore, whose threads do not survive a fork: workers must not be forked.
    loader = make_loader(corpus, planner(rows), first, STEPS - 1, workers)
    assert [content(batch) for batch in loader] == uninterrupted[first:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_read_the_global_batch(
    prepared: Prepared, uninterrupted: list[Content], world: int
) -> None:
    corpus, rows, _ = prepared
    ranks = [
        list(make_loader(corpus, planner(rows), 0, STEPS - 1, workers=0, rank=rank, world=world))
        for rank in range(world)
    ]
    for plan, boxes in uninterrupted:
        parts = [content(batches[plan.step]) for batches in ranks]
        assert [sample for part, _ in parts for sample in part.samples] == list(plan.samples)
        assert [box for _, read in parts for box in read] == boxes
        assert all((part.level, part.global_size) == (plan.level, 5) for part, _ in parts)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("world", "workers", "first"),
    [(1, 0, 2), (2, 0, 5), (4, 0, 1), (8, 0, 6), (2, 2, 6), pytest.param(8, 1, 7, marks=pytest.mark.slow)],
)
def test_a_resumed_run_may_have_other_ranks_and_workers(
    prepared: Prepared, world: int, workers: int, first: int
) -> None:
    corpus, rows, _ = prepared
    uninterrupted = [content(batch) for batch in make_loader(corpus, planner(rows, 9), 0, STEPS - 1, workers=0)]
    ranks = [
        make_loader(corpus, planner(rows, 9), first, STEPS - 1, workers, rank=rank, world=world)
        for rank in range(world)
    ]
    for (plan, boxes), *parts in zip(uninterrupted[first:], *ranks, strict=True):
        read = [content(part) for part in parts]
        assert tuple(sample for part, _ in read for sample in part.samples) == plan.samples
        assert [box for _, part in read for box in part] == boxes
        assert {(part.step, part.level) for part, _ in read} == {(plan.step, plan.level)}


def test_loading_leaves_the_random_state_alone(prepared: Prepared) -> None:
    corpus, rows, _ = prepared
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    list(make_loader(corpus, planner(rows), 0, 2, workers=0))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_batch_survives_pickling(prepared: Prepared) -> None:
    corpus, rows, _ = prepared
    batch = read_batch(ShardReader(corpus.shards), planner(rows).plan(0))
    assert content(pickle.loads(pickle.dumps(batch))) == content(batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_names_the_image(prepared: Prepared, workers: int) -> None:
    corpus, rows, _ = prepared
    lost = [{**rows[0], "key": "lost", "shard_path": "demo/lost.zarr"}]
    with (
        pytest.raises(SetupError, match=r"demo/lost \(shard demo/lost.zarr\)") as caught,
        contextlib.closing(iter(make_loader(corpus, planner(lost), 0, 3, workers))) as batches,
    ):
        next(batches)
    assert "Traceback" not in str(caught.value), "one clear message, also from a worker"


def test_a_damaged_shard_names_the_image(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    voxels = np.random.default_rng(0).integers(0, 256, (1, 32, 64, 64)).astype(np.int16)
    rows = [row("hurt", voxels, (1.0, 1.0, 1.0), write_volume(corpus.shards, "demo/hurt.zarr", voxels))]
    shard = corpus.shards / "demo" / "hurt.zarr" / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 4] ^= 0xFF
    data[3 * len(data) // 4] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(SetupError, match="demo/hurt"):
        list(make_loader(corpus, planner(rows), 0, 5, workers=0))


def test_validation_crops_stream_the_same_way(prepared: Prepared) -> None:
    corpus, rows, arrays = prepared
    held_out = [{**row, "split": "validation"} for row in rows]
    fixed = ValidationPlanner(pa.Table.from_pylist(held_out, schema=CATALOG_SCHEMA), CROP, batch_size=2)
    seen = {}
    for batch in make_loader(corpus, fixed, 0, len(fixed) - 1, workers=0):
        crops = render(batch, torch.device("cpu"))
        seen |= dict(zip(crops.keys, crops.voxels, strict=True))
    assert set(seen) == {f"demo/{key}" for key in arrays}
    # 24 x 50 x 45 to 16 x 32 x 32, from the middle.
    middle = arrays["iso"][0, 4:20, 9:41, 6:38] * np.float32(1 / 255)
    assert np.array_equal(seen["demo/iso"][0].numpy(), middle)
    # 20 x 41 to 32 x 32: padded along height, cropped along width.
    small = np.zeros((32, 32), np.float32)
    small[6:26] = arrays["small"][0, 0, :, 4:36] * np.float32(1 / 255)
    assert np.array_equal(seen["demo/small"][1, 0].numpy(), small)
