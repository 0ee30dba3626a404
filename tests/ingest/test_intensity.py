"""Percentiles, foreground box, resize, statistics and storage type of ingest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from ingest.geometry import axis_codes, direction_cosines
from ingest.intensity import (
    Statistics,
    complement,
    describe,
    distribution,
    distribution_within,
    foreground_box,
    in_substance,
    percentile_above_minimum,
    percentile_window,
    quantise,
    resize_in_plane,
    resized_shape,
    statistics,
    without_padding,
)
from ingest.reasons import ExcludedImage

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "float32", "float64"]


def images(dtype: str, lowest: float = -3000, highest: float = 3000) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=4, max_dims=4, max_side=6).map(lambda shape: (1, *shape[1:]))
    kind = np.dtype(dtype)
    if kind.kind == "f":
        elements: Any = st.floats(lowest, highest, width=32).map(lambda value: value + 0.0)
    else:
        limits = np.iinfo(kind)
        elements = st.integers(max(int(lowest), int(limits.min)), min(int(highest), int(limits.max)))
    return hnp.arrays(kind, shapes, elements=elements, fill=elements)


def reference_case(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = shared / "reference"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def in_layout(raw: np.ndarray, affine: np.ndarray, wanted: str) -> np.ndarray:
    """`raw` (i, j, k) with its axes growing towards the letters of `wanted`."""
    codes = axis_codes(direction_cosines(affine))
    same = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
    axes = [next(axis for axis in range(3) if codes[axis] in (code, same[code])) for code in wanted]
    steps = [
        slice(None, None, 1 if codes[axis] == code else -1) for axis, code in zip(axes, wanted, strict=True)
    ]
    return raw.transpose(axes)[tuple(steps)]


CASES_3D = [
    "ct_axial",
    "mri_sagittal",
    "mri_coronal",
    "ct_isotropic",
    "mri_nearly_isotropic",
    "mri_two_modalities/m0",
    "mri_two_modalities/m1",
    "mri_permuted_axes",
    "ct_negative_fraction",
]


@pytest.mark.parametrize("name", CASES_3D)
def test_crop_and_statistics_of_volumes_agree_with_the_reference(shared: Path, name: str) -> None:
    document, tensors = reference_case(shared, "09a_preprocess_3d")
    case = next(case for case in document["cases"] if case["id"] == name)
    tensor = name.split("/")[0]
    raw = tensors[f"{tensor}/raw"]
    raw = raw[..., int(name[-1])] if raw.ndim == 4 else raw
    image = in_layout(raw, tensors[f"{tensor}/affine"], case["codes_after_adjust"])[None]

    threshold = percentile_above_minimum(distribution(image), 0.5)
    assert threshold == pytest.approx(case["crop_value_exact"][0], rel=1e-6)
    box = foreground_box(image, threshold)
    assert [start for start, _ in box] == case["crop_start_with_exact_value"]
    assert [stop for _, stop in box] == case["crop_end_with_exact_value"]

    # The reference truncates a fractional threshold of integers; its statistics are those of its own crop.
    box = foreground_box(image, case["crop_value_used"][0])
    cropped = image[:, *(slice(*bounds) for bounds in box)]
    np.testing.assert_array_equal(cropped, tensors[f"{name}/cropped"])
    ours, theirs, count = statistics(cropped), case["statistics"], cropped.size
    close = {"rel": 1e-5, "abs": 1e-4}
    assert ours.mean == pytest.approx(theirs["mean"], **close)
    assert ours.std == pytest.approx(theirs["std"] * math.sqrt((count - 1) / count), **close)
    assert (ours.minimum, ours.maximum) == pytest.approx((theirs["min"], theirs["max"]), **close)
    assert ours.p0_5 == pytest.approx(theirs["p0.5"], **close)
    assert ours.p99_5 == pytest.approx(theirs["p99.5"], **close)
    lower, upper = np.sort(cropped, axis=None)[[(count - 1) // 2, count // 2]]
    assert lower == pytest.approx(theirs["median"], **close)
    assert ours.median == pytest.approx((float(lower) + float(upper)) / 2)


@pytest.mark.parametrize(
    ("name", "case_id"), [("09b_preprocess_resize", "large"), ("09d_preprocess_resize_factor2", "slice")]
)
def test_crop_and_size_of_large_slices_agree_with_the_reference(shared: Path, name: str, case_id: str) -> None:
    document, tensors = reference_case(shared, name)
    case = document["cases"][0]
    image = in_layout(tensors[f"{case_id}/raw"], tensors[f"{case_id}/affine"], case["codes_after_adjust"])[None]
    threshold = percentile_above_minimum(distribution(image), 0.5)
    assert threshold == case["crop_value_exact"][0]
    box = foreground_box(image, threshold)
    assert ([start for start, _ in box], [stop for _, stop in box]) == (case["crop_start"], case["crop_end"])
    cropped = image[:, *(slice(*bounds) for bounds in box)]
    size = resized_shape(*cropped.shape[2:])
    assert [1, cropped.shape[1], *size] == case["shape_final"]
    resized = resize_in_plane(cropped.astype(np.float32), size)
    np.testing.assert_allclose(resized[0], exact_area(cropped[0].astype(np.float64), size), atol=2e-3)


def test_resized_sizes_agree_with_the_reference(shared: Path) -> None:
    document, _ = reference_case(shared, "09a_preprocess_3d")
    for row in document["resize_table"]["rows"]:
        assert list(resized_shape(*row["size"])) == row["resized"]


def test_grey_2d_image_agrees_with_the_reference(shared: Path) -> None:
    document, tensors = reference_case(shared, "09c_preprocess_2d")
    case = next(case for case in document["cases"] if case["id"] == "gray_small")
    image = tensors["gray_small/raw"][None, None]
    box = foreground_box(image, 0)
    assert [start for start, _ in box[1:]] == case["loader_crop_start"]
    assert [stop for _, stop in box[1:]] == case["loader_crop_end"]
    cropped = image[:, *(slice(*bounds) for bounds in box)]
    np.testing.assert_array_equal(cropped, tensors["gray_small/loaded"])
    found = statistics(cropped)
    theirs = case["statistics"]
    assert (found.mean, found.median, found.p0_5, found.p99_5) == pytest.approx(
        (theirs["mean"], theirs["median"], theirs["p0.5"], theirs["p99.5"]), abs=1e-3
    )


def test_colour_image_is_cropped_once_to_where_all_channels_are_lit(shared: Path) -> None:
    _, tensors = reference_case(shared, "09c_preprocess_2d")
    image = tensors["rgb/raw"].transpose(2, 0, 1)[:, None]
    rows, columns = np.nonzero((image > 0).all(axis=(0, 1)))
    assert foreground_box(image, 0) == (
        (0, 1),
        (rows.min(), rows.max() + 1),
        (columns.min(), columns.max() + 1),
    )


@given(data=st.data(), dtype=st.sampled_from(DTYPES), percent=st.sampled_from([0.5, 50, 99.5]))
@settings(max_examples=120, deadline=None)
def test_percentiles_are_exact_for_every_dtype(data: st.DataObject, dtype: str, percent: float) -> None:
    image = data.draw(images(dtype))
    above = image[image > image.min()].astype(np.float64)
    if above.size == 0:
        with pytest.raises(ExcludedImage, match="all voxels") as caught:
            percentile_above_minimum(distribution(image), percent)
        assert caught.value.reason == "constant"
    else:
        expected = np.percentile(above, percent)
        assert percentile_above_minimum(distribution(image), percent) == pytest.approx(
            expected, rel=1e-12, abs=1e-12
        )


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_statistics_are_numpys(data: st.DataObject, dtype: str) -> None:
    image = data.draw(images(dtype).filter(lambda image: image.min() < image.max()))
    found = statistics(image)
    values = image.astype(np.float64)
    assert found.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9)
    assert found.std == pytest.approx(values.std(), rel=1e-9, abs=1e-9)
    assert found.median == np.median(values)
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    low, high = percentile_window(found)
    assert low < high


@pytest.mark.parametrize("background", [-5, 0, 700])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_much_background_is_counted_exactly(background: int, share: float) -> None:
    random = np.random.default_rng(0)
    image = np.where(random.random(300_000) < share, random.integers(-50, 900, 300_000), background)
    image = np.append(image, 901).astype(np.int16)
    ranks = range(0, image.size, 997)
    np.testing.assert_array_equal(distribution(image).ranked(ranks), np.sort(image)[ranks])


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_padding_counts_as_the_minimum_of_the_others(data: st.DataObject, dtype: str) -> None:
    image = data.draw(images(dtype, -50, 50))
    padding = data.draw(st.integers(-60, 60))
    outside = image == padding
    replaced = image.copy()
    if outside.any() and not outside.all():
        replaced[outside] = image[~outside].min()
    ours, expected = distribution(image, padding), distribution(replaced)
    ranks = range(image.size)
    np.testing.assert_array_equal(ours.ranked(ranks), expected.ranked(ranks))
    assert (ours.minimum, ours.at_minimum) == (expected.minimum, expected.at_minimum)
    np.testing.assert_array_equal(without_padding(image, padding, expected.minimum), replaced)
    threshold = float(np.median(replaced))
    if (replaced > threshold).any():
        assert foreground_box(image, threshold, padding) == foreground_box(replaced, threshold)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_crop_is_described_as_if_counted_by_itself(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["int8", "uint8", "int16", "uint16", "float32"]))
    image = data.draw(images(dtype, -3, 3))
    image = image[:, ::-1].transpose(0, 3, 1, 2)
    box = tuple(sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in image.shape[1:])
    padding = data.draw(st.sampled_from([None, 0, 2, 99, 100_000]))
    inside = image[:, *(slice(*ends) for ends in box)]
    whole = distribution(image, padding)
    if inside.size == 0:
        return
    alone = without_padding(inside, padding, whole.minimum) if padding in (0, 2) else inside
    found = distribution_within(whole, image, box, padding)
    assert (found.size, found.minimum, found.at_minimum) == (
        alone.size,
        alone.min(),
        np.count_nonzero(alone == alone.min()),
    )
    if alone.min() < alone.max():
        assert describe(found) == statistics(alone)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), threshold=st.floats(-40, 40))
@settings(max_examples=80, deadline=None)
def test_foreground_box_for_any_strides(data: st.DataObject, dtype: str, threshold: float) -> None:
    image = data.draw(images(dtype, -50, 50))
    order = data.draw(st.permutations(range(3)))
    steps = data.draw(st.tuples(*[st.sampled_from([1, -1])] * 3))
    view = image.transpose(0, *(axis + 1 for axis in order))[:, *(slice(None, None, step) for step in steps)]
    where = np.argwhere(view[0].astype(np.float64) > threshold)
    if len(where) == 0:
        with pytest.raises(ExcludedImage) as caught:
            foreground_box(view, threshold)
        assert caught.value.reason == "empty_crop"
    else:
        bounds = zip(where.min(axis=0), where.max(axis=0) + 1, strict=True)
        assert foreground_box(view, threshold) == tuple(bounds)


def test_a_fraction_of_the_threshold_counts_for_integers_and_float32() -> None:
    image = np.array([-701, -700, -701], dtype=np.int16).reshape(1, 1, 1, 3)
    assert foreground_box(image, -700.5)[2] == (1, 2)
    image = np.array([0, 0.1, 0], dtype=np.float32).reshape(1, 1, 1, 3)
    assert foreground_box(image, float(np.float32(0.1)) - 1e-12)[2] == (1, 2)


def exact_area(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Area weights in float64 as a matrix of overlaps between old and new pixels."""

    def overlaps(old: int, new: int) -> np.ndarray:
        edges = np.arange(new + 1) * (old / new)
        start, stop = edges[:-1, None], edges[1:, None]
        pixel = np.arange(old)[None]
        return np.clip(np.minimum(stop, pixel + 1) - np.maximum(start, pixel), 0, None) / (old / new)

    return overlaps(planes.shape[1], size[0]) @ planes @ overlaps(planes.shape[2], size[1]).T


SIZES = [(513, 513), (600, 800), (700, 520), (1024, 1030), (530, 2203)]


@pytest.mark.parametrize("shape", SIZES)
def test_resize_has_true_area_weights(shape: tuple[int, int]) -> None:
    # Bright noise: OpenCV alone misses up to 3 units of it on sides of 1000 and more.
    planes = np.random.default_rng(0).integers(-1000, 3000, (2, *shape)).astype(np.float64)
    size = resized_shape(*shape)
    assert min(size) == 512
    expected = exact_area(planes, size)
    np.testing.assert_allclose(resize_in_plane(planes.astype(np.float32)[None], size)[0], expected, atol=2e-3)
    stored = resize_in_plane(planes.astype(np.int16)[None], size)[0]
    assert stored.dtype == np.int16
    unclear = np.abs(expected - np.floor(expected) - 0.5) < 2e-3
    np.testing.assert_array_equal(stored[~unclear], np.rint(expected)[~unclear])
    assert np.abs(stored - expected).max() < 0.503


@pytest.mark.parametrize("shape", [(1300, 1100), (1024, 1501), (1501, 1024), (1536, 1600)])
def test_resize_gives_the_bits_of_a_plane_resized_as_a_whole(shape: tuple[int, int]) -> None:
    plane = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    height, width = resized_shape(*shape)
    whole = cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(resize_in_plane(plane[None, None], (height, width))[0, 0], whole)


def test_resize_rounds_half_to_even_and_keeps_the_dtype() -> None:
    tiles = np.array([[0, 1, 0, 1], [0, 1, 1, 3]], dtype=np.uint8)  # means 0.5 and 1.25 of 2 x 2
    plane = np.tile(tiles, (512, 256))
    plane[:, 2::4] += 2
    plane[:, 3::4] += 1
    expected = np.rint(plane.reshape(512, 2, 512, 2).mean(axis=(1, 3)))
    resized = resize_in_plane(plane[None, None], (512, 512))
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized[0, 0], expected)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64"])
def test_resize_does_not_touch_edges_or_depth(dtype: str) -> None:
    image = np.full((3, 2, 700, 600), 100, dtype=dtype) + np.arange(2, dtype=dtype)[:, None, None]
    resized = resize_in_plane(image, resized_shape(700, 600))
    assert resized.shape == (3, 2, 597, 512)
    for z, value in enumerate((100, 101)):
        np.testing.assert_allclose(resized[:, z], value, rtol=1e-12)


def test_resize_of_wide_integers_keeps_every_digit() -> None:
    image = np.full((1, 1, 1024, 1024), 2**30 + 1, dtype=np.int32)
    assert np.unique(resize_in_plane(image, (512, 512))) == 2**30 + 1


def test_resize_does_not_depend_on_the_number_of_threads() -> None:
    image = np.random.default_rng(1).normal(size=(1, 1, 777, 999)).astype(np.float32)
    threads = cv2.getNumThreads()
    try:
        results = []
        for number in (1, 2, 5):
            cv2.setNumThreads(number)
            results.append(resize_in_plane(image, (512, 658)))
    finally:
        cv2.setNumThreads(threads)
    assert all(np.array_equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 1], "bool", "uint8"),
        ([-5, 5], "int8", "int8"),
        ([0, 5], "uint16", "uint16"),
        ([-1024, 3071], "int32", "int16"),
        ([0, 40000], "int64", "uint16"),
        ([-1, 40000], "int64", "int32"),
        ([0, 2**32 - 1], "uint64", "uint32"),
        ([-1, 2**40], "int64", "int64"),
        ([-1024.0, 3071.0], "float64", "int16"),
        ([0.0, 65535.0], "float32", "uint16"),
        ([-0.0, 7.0], "float16", "int16"),
        ([0.0, 1e9], "float32", "int32"),
        ([0.0, 1e20], "float32", "float32"),
        ([0.5, 1.0], "float16", "float32"),
        ([0.5, 1.0], "float32", "float32"),
        ([0.5, 1e300], "float64", "float64"),
    ],
)
def test_type_in_substance(values: list[float], dtype: str, expected: str) -> None:
    image = np.array(values, dtype=dtype).reshape(1, 1, 1, 2)
    stored = in_substance(image)
    assert stored.dtype == expected
    np.testing.assert_array_equal(stored, image)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_voxels_that_are_not_finite_exclude(bad: float, dtype: str) -> None:
    image = np.zeros((1, 2, 2, 2), dtype=dtype)
    image[0, 1, 0, 1] = bad
    with pytest.raises(ExcludedImage, match="1 of 8 voxels") as caught:
        in_substance(image)
    assert caught.value.reason == "not_finite"


def test_voxels_that_are_no_numbers_exclude() -> None:
    with pytest.raises(ExcludedImage) as caught:
        in_substance(np.zeros((1, 2, 2, 2), dtype=np.complex64))
    assert caught.value.reason == "unsupported_layout"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "float32"])
def test_complement_reverses_the_order_without_overflow(dtype: str) -> None:
    kind = np.dtype(dtype)
    limits: Any = np.iinfo(kind) if kind.kind in "iu" else np.finfo(kind)
    image = np.array([limits.min, 0, 3, limits.max], dtype=dtype)
    reversed_, offset = complement(image)
    assert reversed_.dtype == kind
    assert [offset - int(value) for value in reversed_] == [int(value) for value in image]


@given(
    image=hnp.arrays(np.float32, (1, 3, 4, 5), elements=st.floats(-1000, 1000, width=32)).filter(
        lambda image: image.min() < image.max()
    )
)
@settings(max_examples=80, deadline=None)
def test_floats_lose_less_than_a_thousandth_of_the_window(image: np.ndarray) -> None:
    found = statistics(image)
    low, high = percentile_window(found)
    stored, slope, intercept = quantise(image, found)
    real = slope * stored.astype(np.float64) + intercept
    if found.maximum - found.minimum <= 16 * (high - low):
        assert stored.dtype == np.uint16
        assert np.abs(real - image).max() <= slope / 2 * (1 + 1e-9)
        assert np.abs(real - image).max() <= (high - low) / 8192 * (1 + 1e-9)
        assert (stored.min(), stored.max()) == (0, 65535)
    else:
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(real, image)


def test_outliers_far_outside_the_window_keep_floats() -> None:
    image = np.random.default_rng(0).uniform(0, 1, (1, 10, 20, 20))
    image[0, 0, 0, 0] = 100.0
    stored, slope, intercept = quantise(image, statistics(image))
    assert (stored.dtype, slope, intercept) == (np.float32, 1.0, 0.0)
    image[0, 0, 0, 0] = 1e40
    with pytest.raises(ExcludedImage) as caught:
        quantise(image, statistics(image))
    assert caught.value.reason == "not_finite"


def test_window_starts_at_the_minimum_where_the_percentiles_are_equal() -> None:
    image = np.full((1, 10, 10, 10), 7, dtype=np.uint8)
    image[0, :5] = 2
    found = statistics(image)
    assert found.p0_5 == found.p99_5 == 7
    assert percentile_window(found) == (2, 7)


def test_real_units() -> None:
    found = Statistics(mean=1, std=2, median=3, minimum=4, maximum=5, p0_5=6, p99_5=7)
    real = found.in_real_units(2.0, -10.0)
    assert real == Statistics(mean=-8, std=4, median=-4, minimum=-2, maximum=0, p0_5=2, p99_5=4)
