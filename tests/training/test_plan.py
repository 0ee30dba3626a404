"""Plans are pure functions of (catalog, config, seed, step), follow the weights, and lie inside images."""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import SetupError
from catalog.sampling import LEVELS, CropGeometry, ScaleRules, image_scales, level_probabilities
from catalog.schema import CATALOG_SCHEMA
from catalog.spacing import da_level
from training.plan import (
    AugmentationConfig,
    BatchPlan,
    BatchPlanner,
    SamplePlan,
    ValidationPlanner,
    overlap,
    visible_indices,
)
from training.rng import Stream, uniforms

CROP = CropGeometry(tokens_z=4, tokens_x=8)
PLAIN = AugmentationConfig(
    scale=ScaleRules(in_plane_p=0, depth_p=0), rotate_p=0, flip_p=0, brightness_p=0, contrast_p=0, gamma_p=0
)
"""Nothing but where the crop lies is random."""


def image(
    key: str,
    shape: tuple[int, int, int] = (100, 300, 280),
    spacing: tuple[float | None, float | None, float | None] = (1.0, 1.0, 1.0),
    weight: float = 1.0,
    **columns: Any,
) -> dict[str, Any]:
    flat = spacing[0] is None
    return {
        "dataset": "demo",
        "key": key,
        "subject": key,
        "status": "ingested",
        "split": "train",
        "dimension": 2 if flat else 3,
        "shape_c": 1,
        "sampling_weight": weight,
        **dict(zip(("shape_d", "shape_h", "shape_w"), shape, strict=True)),
        **dict(zip(("spacing_z", "spacing_y", "spacing_x"), spacing, strict=True)),
        "da_level": 5 if flat else da_level(spacing[0] / min(spacing[1:])),
        "stored_dtype": "int16",
        "slope": 1.0,
        "intercept": 0.0,
        "window_low": -100.0,
        "window_high": 900.0,
        "shard_path": f"demo/{key}.zarr",
        "shard_shape": [1, *shape],
        "shard_index": None,
        "source_path": key,
        "entry_hash": "0",
        "normalisation_version": 1,
        **columns,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=CATALOG_SCHEMA)


def mixed_rows() -> list[dict[str, Any]]:
    """Every level, 2-D with and without spacing, tiny images, thick ones that scaling moves between levels."""
    return [
        image("iso"),
        image("iso-small", (40, 90, 100), weight=0.5),
        image("nearly", (60, 200, 210), (1.4, 1.0, 1.05), weight=2.0),
        image("two", (50, 256, 256), (2.0, 0.9, 0.9)),
        image("five", (20, 512, 512), (5.0, 0.7, 0.7), weight=3.0),
        image("thick", (12, 320, 300), (20.0, 1.0, 1.0)),
        image("slices", (9, 400, 300), (40.0, 1.0, 1.0)),
        image("xray", (1, 512, 600), (None, None, None), weight=1.5),
        image("us", (1, 70, 130), (None, 0.2, 0.2)),
        image("fundus", (1, 512, 512), (None, None, None), shape_c=3, stored_dtype="uint8"),
    ]


def planner(
    rows: list[dict[str, Any]] | None = None, batch_size: int = 12, seed: int = 3, **rest: Any
) -> BatchPlanner:
    return BatchPlanner(table(*(rows or mixed_rows())), CROP, batch_size, seed, **rest)


def image_weights(rows: list[dict[str, Any]]) -> np.ndarray:
    """weight x probability of each level, (n, 6), for the expected frequencies."""
    spacing = np.array([[row[f"spacing_{axis}"] for axis in "zyx"] for row in rows], dtype=float)
    sides = np.array([min(row["shape_h"], row["shape_w"]) for row in rows])
    weights = np.array([row["sampling_weight"] for row in rows])
    return weights[:, None] * level_probabilities(image_scales(spacing, sides, CROP, ScaleRules()))


def test_a_plan_depends_on_its_step_alone() -> None:
    first = planner()
    in_order = [first.plan(step) for step in range(20)]
    assert [planner().plan(step) for step in reversed(range(20))] == in_order[::-1]
    assert len({plan.samples for plan in in_order}) == 20
    assert planner(seed=4).plan(0) != in_order[0]


def test_the_order_of_rows_does_not_matter() -> None:
    assert [planner(mixed_rows()[::-1]).plan(step) for step in range(5)] == [
        planner().plan(step) for step in range(5)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 12])
def test_ranks_share_the_global_batch(world: int) -> None:
    ours = planner(batch_size=13)
    for step in range(10):
        whole = ours.plan(step)
        slices = [ours.plan(step, rank, world) for rank in range(world)]
        assert tuple(sample for part in slices for sample in part.samples) == whole.samples
        assert {(part.level, part.crop_size, part.global_size) for part in slices} == {
            (whole.level, whole.crop_size, 13)
        }
        sizes = [len(part.samples) for part in slices]
        assert max(sizes) - min(sizes) <= 1
        assert [sample.index for sample in whole.samples] == list(range(13))


def test_plans_and_planners_travel_to_workers() -> None:
    ours = planner()
    assert pickle.loads(pickle.dumps(ours)).plan(7) == ours.plan(7)
    plan = ours.plan(7)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert len(pickle.dumps(plan)) < 1000 * len(plan.samples)


def test_what_is_sent_to_workers_does_not_grow_with_the_images() -> None:
    few, many = (planner([image(f"{i:04d}") for i in range(n)]) for n in (3, 3000))
    assert abs(len(pickle.dumps(many)) - len(pickle.dumps(few))) < 100
    assert pickle.loads(pickle.dumps(many)).plan(0) == many.plan(0)


def test_rows_may_come_in_several_tables() -> None:
    rows = mixed_rows() + [{**row, "dataset": "other"} for row in mixed_rows()]
    rows.sort(key=lambda row: (row["dataset"], row["key"]))
    whole = planner(rows)
    for cuts in ([5], [1, 2, 2, 19], [10]):
        ends = [0, *cuts, len(rows)]
        tables = [table(*rows[start:stop]) for start, stop in itertools.pairwise(ends)]
        coded = [part.set_column(*coded_column(part, "stored_dtype")) for part in tables]
        for parts in (tables, coded):
            parted = BatchPlanner(iter(parts), CROP, 12, 3)
            assert [parted.plan(step) for step in range(20)] == [whole.plan(step) for step in range(20)]
    with pytest.raises(SetupError, match="demo/five comes after other/xray"):
        BatchPlanner([table(*rows[10:]), table(*rows[:10])], CROP, 12, 3)


def coded_column(of: pa.Table, name: str) -> tuple[int, pa.Field, pa.ChunkedArray]:
    """A column as dictionary codes, as files of the catalog are read."""
    codes = of[name].dictionary_encode()
    return of.column_names.index(name), pa.field(name, codes.type), codes


@pytest.mark.parametrize("steps", [1200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_levels_and_images_follow_the_weights(steps: int) -> None:
    rows = mixed_rows()
    ours = planner(rows, batch_size=50)
    expected = image_weights(rows)
    expected /= expected.sum()
    assert ours.level_probabilities == pytest.approx(expected.sum(axis=0))
    seen_levels = np.zeros(LEVELS)
    seen = np.zeros((len(rows), LEVELS))
    number = {row["key"]: i for i, row in enumerate(rows)}
    for step in range(steps):
        plan = ours.plan(step)
        seen_levels[plan.level] += 1
        for sample in plan.samples:
            seen[number[sample.image.key], plan.level] += 1
    # 99.9 % quantiles of chi-squared with 5 degrees of freedom, and with (10 images - 1) for each level.
    assert chi_squared(seen_levels, expected.sum(axis=0) * steps) < 20.5
    for level in range(LEVELS):
        share = expected[:, level] / expected[:, level].sum()
        assert (seen[share == 0, level] == 0).all()
        assert chi_squared(seen[share > 0, level], share[share > 0] * seen[:, level].sum()) < 27.9


def test_images_of_one_level_follow_the_weights() -> None:
    n = 40_000
    weights = np.random.default_rng(0).uniform(0, 5, 40)
    weights[[0, 17, 39]] = 0
    rows = [image(f"{i:02d}", weight=float(weight)) for i, weight in enumerate(weights)]
    plan = planner(rows, batch_size=n, augmentation=PLAIN).plan(0)
    seen = np.bincount([int(sample.image.key) for sample in plan.samples], minlength=40)
    assert (seen[weights == 0] == 0).all()
    expected = weights / weights.sum() * n
    assert chi_squared(seen[weights > 0], expected[weights > 0]) < 67.9  # 99.9 %, 36 degrees of freedom


def chi_squared(seen: np.ndarray, expected: np.ndarray) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def level_of(sample: SamplePlan) -> set[int]:
    z, y, x = sample.image.spacing
    if z is None or y is None or x is None:
        return {5}
    ratio = z * sample.scale[0] / (min(y, x) * sample.scale[1])
    return {da_level(ratio * (1 - 1e-9)), da_level(ratio * (1 + 1e-9))}


def test_every_sample_has_the_level_and_size_of_its_batch() -> None:
    ours = planner()
    plans = [ours.plan(step) for step in range(200)]
    assert {plan.level for plan in plans} == set(range(LEVELS))
    for plan in plans:
        assert plan.crop_size == CROP.size(plan.level)
        for sample in plan.samples:
            assert plan.level in level_of(sample)


def test_boxes_lie_in_the_image_and_hold_what_the_crop_needs() -> None:
    ours = planner()
    for plan in (ours.plan(step) for step in range(200)):
        corners = np.stack(np.meshgrid(*([-(n - 1) / 2, (n - 1) / 2] for n in plan.crop_size)), -1).reshape(
            -1, 3
        )
        for sample in plan.samples:
            box, shape = np.array(sample.box), np.array(sample.image.shape[1:])
            assert (box[:, 0] >= 0).all()
            assert (box[:, 0] < box[:, 1]).all()
            assert (box[:, 1] <= shape).all()
            depth_read = box[0, 1] - box[0, 0]
            assert depth_read <= CROP.max_read_slices
            at = np.array(sample.centre) + box[:, 0] + corners @ np.array(sample.matrix).T
            within = np.clip(at, 0, shape - 1)
            checked = slice(1, 3) if depth_read == CROP.max_read_slices else slice(0, 3)
            assert (np.floor(within)[:, checked] >= box[checked, 0]).all()
            assert (np.ceil(within)[:, checked] <= box[checked, 1] - 1).all()


def test_a_wide_depth_scale_is_read_whole() -> None:
    wide = AugmentationConfig(scale=ScaleRules(in_plane_p=0, depth=(0.5, 1.9), depth_p=1), rotate_p=0)
    plan = planner([image("deep", (200, 128, 128), (1.0, 1.0, 1.0))], batch_size=200, augmentation=wide).plan(0)
    for sample in plan.samples:
        (start, stop), *_ = sample.box
        assert stop - start >= min(64 * sample.scale[0] - 1, 200)


def test_unscaled_unrotated_crops_are_whole_voxels() -> None:
    for plan in (planner(augmentation=PLAIN).plan(step) for step in range(50)):
        for sample in plan.samples:
            size = [stop - start for start, stop in sample.box]
            assert size == [
                min(n, have) for n, have in zip(plan.crop_size, sample.image.shape[1:], strict=True)
            ]
            assert np.array_equal(sample.matrix, np.eye(3))
            # The crop's first voxel is a voxel of the box, at most half the padding before it.
            first = np.array(sample.centre) - (np.array(plan.crop_size) - 1) / 2
            assert np.array_equal(first, -((np.array(plan.crop_size) - size) // 2))


def test_crop_positions_are_uniform() -> None:
    # 8 positions along depth, 3 along height, 1 along width.
    rows = [image("a", (64 + 7, 128 + 2, 128))]
    plan = planner(rows, batch_size=12_000, augmentation=PLAIN).plan(0)
    starts = np.array([[start for start, _ in sample.box] for sample in plan.samples])
    counts = np.unique(starts, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert chi_squared(counts, np.full(24, 500)) < 49.7  # 99.9 %, 23 degrees of freedom


def test_a_slice_of_a_thick_volume_comes_from_anywhere_in_it() -> None:
    rows = [image("slices", (9, 200, 200), (40.0, 1.0, 1.0))]
    plan = planner(rows, batch_size=400, augmentation=PLAIN).plan(0)
    assert plan.level == 5
    assert plan.crop_size == (1, 128, 128)
    assert {sample.box[0] for sample in plan.samples} == {(i, i + 1) for i in range(9)}


def test_augmentation_happens_as_often_as_the_paper_says() -> None:
    n = 15_000
    samples = planner([image("iso")], batch_size=n).plan(1).samples
    flips = np.array([sample.flips for sample in samples])
    assert flips.mean(axis=0) == pytest.approx([0.5] * 3, abs=0.02)
    for name, probability, low, high in (
        ("brightness", 0.15, 0.75, 1.25),
        ("contrast", 0.15, 0.75, 1.25),
        ("gamma", 0.3, 0.7, 1.5),
    ):
        values = np.array([getattr(sample, name) for sample in samples])
        drawn = values[values != 1]
        assert len(drawn) / n == pytest.approx(probability, abs=0.015)
        assert low <= drawn.min() < low + 0.01
        assert high - 0.01 < drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.01)
    inverted = [sample.gamma_inverted for sample in samples if sample.gamma != 1]
    assert np.mean(inverted) == pytest.approx(0.5, abs=0.03)
    assert not any(sample.gamma_inverted for sample in samples if sample.gamma == 1)
    assert {sample.shift for sample in samples} == {0.0}
    matrices = np.array([sample.matrix for sample in samples])
    rotated = np.abs(matrices * (1 - np.eye(3))).max(axis=(1, 2)) > 0
    assert rotated.mean() == pytest.approx(0.3, abs=0.015)


def test_rotations_are_rigid_in_millimetres_and_stay_in_plane_for_thick_slices() -> None:
    nearly = planner([image("nearly", (60, 200, 200), (1.4, 1.0, 1.08))], batch_size=300).plan(0)
    thick = planner([image("thick", (20, 300, 300), (5.0, 1.0, 1.0))], batch_size=300).plan(0)
    out_of_plane = 0
    for plan in (nearly, thick):
        for sample in plan.samples:
            spacing = np.array(sample.image.spacing)
            rotation = np.diag(spacing) @ np.array(sample.matrix) @ np.diag(1 / (spacing * sample.scale))
            assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-9)
            assert np.linalg.det(rotation) == pytest.approx(1)
            tilt = np.degrees(np.arccos(np.clip(rotation[0, 0], -1, 1)))
            if plan is thick:
                assert rotation[0] == pytest.approx([1, 0, 0])
            out_of_plane = max(out_of_plane, tilt)
    assert 25 < out_of_plane < 45  # two rotations of up to 30 degrees each


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 300), st.integers(1, 40))
@settings(max_examples=50)
def test_random_numbers_are_addressed(seed: int, step: int, first: int, width: int) -> None:
    whole = uniforms(seed, Stream.SAMPLE, step, 0, first + 3, width)
    assert np.array_equal(whole[first:], uniforms(seed, Stream.SAMPLE, step, first, 3, width))
    assert ((whole >= 0) & (whole < 1)).all()
    assert not np.array_equal(whole, uniforms(seed, Stream.VISIBLE, step, 0, first + 3, width))
    assert not np.array_equal(whole, uniforms(seed, Stream.SAMPLE, step + 1, 0, first + 3, width))


def test_large_seeds_that_differ_by_one_differ() -> None:
    last, other = (uniforms(seed, Stream.SAMPLE, 0, 0, 1, 4) for seed in (2**64 - 1, 2**64 - 2))
    assert not np.array_equal(last, other)


def test_random_numbers_are_the_same_everywhere() -> None:
    # Written down once: a checkpoint's batches must not change with numpy's version.
    assert uniforms(666, Stream.SAMPLE, 1000, 5, 1, 3)[0].tolist() == [
        0.42171189980641277,
        0.2646913025713131,
        0.8374523211093121,
    ]


def test_visible_tokens() -> None:
    kept = visible_indices(1, 2, 3, length=500, n_visible=224)
    assert kept.shape == (224,)
    assert (np.diff(kept) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < 500
    assert np.array_equal(kept, visible_indices(1, 2, 3, 500, 224))
    assert not np.array_equal(kept, visible_indices(1, 2, 4, 500, 224))
    often = np.zeros(20)
    for index in range(4000):
        often[visible_indices(0, 0, index, 20, 9)] += 1
    assert often / 4000 == pytest.approx(np.full(20, 0.45), abs=0.035)
    with pytest.raises(ValueError, match="21 of 20"):
        visible_indices(0, 0, 0, 20, 21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "demo/iso is not an ingested image of the train split"),
        ({"status": "excluded"}, "demo/iso is not an ingested image of the train split"),
        ({"sampling_weight": -1.0}, "demo/iso has no usable sampling weight"),
        ({"sampling_weight": None}, "demo/iso has no usable sampling weight"),
        ({"sampling_weight": 0.0}, "positive sampling weight"),
        ({"window_high": -100.0}, "demo/iso has no usable intensity window"),
        ({"spacing_y": None}, "demo/iso is 3-D and lacks a positive spacing"),
        ({"da_level": None}, "demo/iso has no DA level"),
        ({"shard_path": None}, "demo/iso lacks the shape, the type or the place"),
        ({"shard_shape": [64, 64]}, "demo/iso lacks the shape, the type or the place"),
        ({"shard_shape": None}, "demo/iso lacks the shape, the type or the place"),
        ({"stored_dtype": None}, "demo/iso lacks the shape, the type or the place"),
        ({"shape_c": None}, "demo/iso lacks the shape, the type or the place"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        planner([{**image("iso"), **change}])


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(SetupError, match="cannot be shared by 13 processes"):
        planner(batch_size=12).plan(0, rank=0, world=13)
    with pytest.raises(SetupError, match=r"the rank must be in 0 \.\.\. 1"):
        planner().plan(0, rank=2, world=2)
    with pytest.raises(SetupError, match="batch size"):
        planner(batch_size=0)
    with pytest.raises(SetupError, match="seed"):
        planner(seed=-1)
    with pytest.raises(SetupError, match="positive sampling weight"):
        BatchPlanner(table(), CROP, 4, 0)
    with pytest.raises(ValueError, match="rotate_p"):
        AugmentationConfig(rotate_p=2)
    with pytest.raises(ValueError, match="gamma"):
        AugmentationConfig(gamma=(0, 1))


def held_out() -> list[dict[str, Any]]:
    return [{**row, "split": "validation"} for row in mixed_rows()]


def test_validation_sees_every_held_out_image_once() -> None:
    ours = ValidationPlanner(table(*held_out()), CROP, batch_size=2)
    plans = [ours.plan(step) for step in range(len(ours))]
    keys = [sample.image.key for plan in plans for sample in plan.samples]
    assert sorted(keys) == sorted(row["key"] for row in mixed_rows())
    levels = {row["key"]: row["da_level"] for row in mixed_rows()}
    for plan in plans:
        assert plan.crop_size == CROP.size(plan.level)
        assert plan.global_size == len(plan.samples) <= 2
        assert all(levels[sample.image.key] == plan.level for sample in plan.samples)
        assert all(sample.flips == (False,) * 3 and sample.gamma == 1 for sample in plan.samples)
    assert [plan.level for plan in plans] == sorted(plan.level for plan in plans)
    again = ValidationPlanner(table(*held_out()[::-1]), CROP, batch_size=2)
    assert [again.plan(step) for step in range(len(again))] == plans


def test_validation_shared_by_ranks() -> None:
    ours = ValidationPlanner(table(*held_out()), CROP, batch_size=3)
    for step in range(len(ours)):
        parts = [ours.plan(step, rank, 4) for rank in range(4)]
        assert tuple(sample for part in parts for sample in part.samples) == ours.plan(step).samples


def test_training_rows_are_no_validation_rows() -> None:
    with pytest.raises(SetupError, match="validation split"):
        ValidationPlanner(table(*mixed_rows()), CROP, batch_size=2)


def test_crops_are_planned_as_the_reference_sampler_does(shared: Path) -> None:
    reference = json.loads((shared / "reference" / "08_sampler.json").read_text())
    images = {(case["config"], tuple(case["shape"]), tuple(case["spacing"])): [] for case in reference["cases"]}
    for case in reference["cases"]:
        images[case["config"], tuple(case["shape"]), tuple(case["spacing"])].append(case)
    for (name, shape, spacing), cases in images.items():
        config = reference["configs"][name]
        crop = CropGeometry(tokens_z=config["tz"], tokens_x=config["tx"])
        ours = BatchPlanner(table(image("a", shape, spacing)), crop, batch_size=40, seed=5)
        ranges = [case["scale_x_range"] for case in cases if case["scale_x_range"]]
        low, high = ranges[0] if ranges else (0.75, 2.0)
        eligible = any(case["scale_z_eligible"] for case in cases)
        seen = {}
        for plan in (ours.plan(step) for step in range(30)):
            seen[plan.level] = plan.crop_size
            for sample in plan.samples:
                scale_z, scale_y, scale_x = sample.scale
                assert scale_y == scale_x
                assert scale_x in (1.0, pytest.approx(low)) or low <= scale_x <= high
                assert scale_z == 1 or (eligible and 0.8 <= scale_z <= 1.25)
                assert plan.level in level_of(sample)
        for case in cases:
            if case["aniso_d"] in seen:
                assert seen[case["aniso_d"]] == tuple(case["crop_size"])
        unscaled = [case["aniso_d"] for case in cases if case["scale"] == [1.0, 1.0, 1.0]]
        assert seen.keys() & {*unscaled}, "a quarter of the crops at least are not scaled"


def test_validation_depth_is_cropped_and_padded_as_in_the_reference(shared: Path) -> None:
    reference = json.loads((shared / "reference" / "08_sampler.json").read_text())["validation"]["cases"]
    compared = 0
    for case in reference:
        depth, height, width = case["shape"]
        z, y, x = case["spacing"]
        if case["aniso_d"] > 5 or z >= 32 * min(y, x):
            continue  # theirs has levels beyond 5, or two slices at level 5
        row = {**image("a", (depth, height, width), (z, y, x)), "split": "validation"}
        plan: BatchPlan = ValidationPlanner(table(row), CROP, 1).plan(0)
        assert plan.level == case["aniso_d"]
        assert plan.crop_size[0] == case["output_shape"][1]
        start, stop = plan.samples[0].box[0]
        have = plan.crop_size[0]
        assert (
            (start, stop) == ((depth - have + 1) // 2, (depth - have + 1) // 2 + have)
            if depth > have
            else (0, depth)
        )
        compared += 1
    assert compared == 5


def test_the_first_of_two_views_is_the_crop_that_a_single_one_would_be() -> None:
    alone, pairs = planner(), planner(least_overlap=0.5)
    same = 0
    for step in range(10):
        plan = pairs.plan(step)
        assert (plan.views, plan.global_size, len(plan.samples)) == (2, 12, 24)
        assert plan.samples[::2] == alone.plan(step).samples
        for one, other in zip(plan.samples[::2], plan.samples[1::2], strict=True):
            assert (one.index, one.image) == (other.index, other.image)
            same += (one.centre, one.flips, one.matrix) == (other.centre, other.flips, other.matrix)
    assert same < 12, "of 120: small images leave little to choose"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_pairs_of_views(world: int) -> None:
    ours = planner(batch_size=7, least_overlap=0.3)
    for step in range(5):
        slices = [ours.plan(step, rank, world) for rank in range(world)]
        assert tuple(sample for part in slices for sample in part.samples) == ours.plan(step).samples
        assert [len(part.samples) % 2 for part in slices] == [0] * world


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_two_views_have_at_least_the_wanted_share_of_each_axis_in_common(share: float) -> None:
    ours = planner(least_overlap=share)
    found = []
    for step in range(60):
        plan = ours.plan(step)
        for one, other in zip(plan.samples[::2], plan.samples[1::2], strict=True):
            fields = np.array([one.scale, other.scale]) * plan.crop_size
            smaller = fields.min(axis=0)
            lowest = float(np.prod(np.clip(share * smaller - 1, 0, None) / smaller))  # whole voxels: one less
            found.append(overlap(one, other, plan.crop_size))
            assert lowest - 1e-9 <= found[-1] <= 1 + 1e-9
            centre = np.array(other.centre) + np.array(other.box)[:, 0]
            shape, half = np.array(other.image.shape[1:]), np.array(other.scale) * plan.crop_size / 2
            fits = shape >= 2 * half
            assert (centre - half + 0.5 >= -1e-6)[fits].all(), "views lie inside the image where they fit"
            assert (centre + half - 0.5 <= shape - 1 + 1e-6)[fits].all()
    if share < 1:
        assert min(found) < 0.95, "views differ"


def test_crops_that_are_the_same_overlap_wholly_and_distant_ones_not_at_all() -> None:
    crop = planner(augmentation=PLAIN, rows=[image("iso", (500, 500, 500))]).plan(0).samples[0]
    assert overlap(crop, crop, (64, 128, 128)) == 1
    half = replace(crop, centre=(crop.centre[0], crop.centre[1], crop.centre[2] + 64))
    assert overlap(crop, half, (64, 128, 128)) == pytest.approx(0.5)
    apart = replace(crop, centre=(crop.centre[0] + 64, *crop.centre[1:]))
    assert overlap(crop, apart, (64, 128, 128)) == 0
