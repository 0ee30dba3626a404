"""Level probabilities and conditional scales: parity with the reference sampler, and with brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.sampling import (
    LEVELS,
    CropGeometry,
    ImageScales,
    ScaleRules,
    draw_scales,
    image_scales,
    level_probabilities,
)
from catalog.spacing import da_level

TOKENIZER = CropGeometry(tokens_z=4, tokens_x=8)
VIT = CropGeometry(tokens_z=5, tokens_x=10)
RULES = ScaleRules()


def scales_of(
    spacing: tuple[float, float, float], side: int, crop: CropGeometry = TOKENIZER, n: int = 1
) -> ImageScales:
    return image_scales(np.tile(np.array(spacing, float), (n, 1)), np.full(n, side), crop, RULES)


def simulate(scales: ImageScales, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sampler in its plainest form: draw the scales, then see which level came out."""
    n = len(scales.anisotropy)
    x = np.where(rng.random(n) < scales.rules.in_plane_p, rng.uniform(scales.low, scales.high), 1.0)
    z = np.where(
        scales.nearly_isotropic & (rng.random(n) < scales.rules.depth_p),
        rng.uniform(*scales.rules.depth, n),
        1.0,
    )
    levels = np.clip(np.frexp(scales.anisotropy * z / x)[1] - 1, 0, 5)
    return levels, z, x


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "reference" / "08_sampler.json").read_text())


def test_every_case_of_the_reference_sampler(reference: dict[str, Any]) -> None:
    reversed_ranges = 0
    for case in reference["cases"]:
        config = reference["configs"][case["config"]]
        crop = CropGeometry(tokens_z=config["tz"], tokens_x=config["tx"])
        _, height, width = case["shape"]
        scales = scales_of(tuple(case["spacing"]), min(height, width), crop)
        eligible = bool(scales.nearly_isotropic[0])
        assert eligible == case["scale_z_eligible"]
        low, high = float(scales.low[0]), float(scales.high[0])
        scale_x, scale_z = 1.0, 1.0
        if case["u_x"] is not None:
            scale_x = low + (high - low) * case["u_x"]
            if case["range_reversed"]:
                # Ours on purpose: the smallest scale, and the image is padded.
                assert low == high == 0.75
                assert case["scale_x"] <= 0.75
                reversed_ranges += 1
                continue
            assert [low, high] == pytest.approx(case["scale_x_range"])
        if case["u_z"] is not None and eligible:
            scale_z = 0.8 + 0.45 * case["u_z"]
        assert (scale_z, scale_x) == pytest.approx((case["scale_z"], case["scale_x"]))
        ratio = float(scales.anisotropy[0]) * scale_z / scale_x
        assert np.clip(ratio, 1, 32) == pytest.approx(case["ratio"])
        level = da_level(case["ratio"])
        assert level == case["aniso_d"]
        assert crop.depth_stride(level) == case["dz"]
        assert crop.tokens(level)[0] == case["tz"]
        assert list(crop.size(level)) == case["crop_size"]
        assert level_probabilities(scales)[0, level] > 0 or case["u_x"] in (0.0, 1.0)
    assert reversed_ranges > 0


@pytest.mark.parametrize(
    ("crop", "depths"), [(TOKENIZER, [64, 32, 16, 8, 4, 1]), (VIT, [80, 40, 20, 10, 5, 1])]
)
def test_crop_sizes_of_the_paper(crop: CropGeometry, depths: list[int]) -> None:
    side = 16 * crop.tokens_x
    assert [crop.size(level) for level in range(LEVELS)] == [(depth, side, side) for depth in depths]
    assert [crop.tokens(level)[0] for level in range(LEVELS)] == [crop.tokens_z] * 5 + [1]


def test_slices_read_are_bounded_as_in_the_reference() -> None:
    assert (TOKENIZER.max_read_slices, VIT.max_read_slices) == (96, 120)


spacings = st.tuples(st.floats(0.1, 60), st.floats(0.1, 3), st.floats(0.1, 3))
sides = st.integers(1, 600)


@given(spacings, sides)
def test_probabilities_are_a_distribution(spacing: tuple[float, float, float], side: int) -> None:
    p = level_probabilities(scales_of(spacing, side))
    assert p.shape == (1, LEVELS)
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)


# DA just around the powers of two, nearly isotropic ones, small images, and beyond 32.
CORNERS = [
    ((1.0, 1.0, 1.0), 512),
    ((1.5, 1.0, 1.0), 512),
    ((1.5, 1.0, 1.2), 130),
    ((0.6, 1.0, 1.0), 256),
    ((1.999, 1.0, 1.0), 200),
    ((2.0, 1.0, 1.0), 60),
    ((5.0, 0.7, 0.7), 512),
    ((10.0, 0.9, 1.0), 128),
    ((30.0, 1.0, 1.0), 300),
    ((40.0, 1.0, 1.0), 400),
    ((1.4, 1.0, 1.0), 96),
    ((1.4, 1.0, 1.0), 40),
]


@pytest.mark.parametrize(("spacing", "side"), CORNERS)
def test_probabilities_match_simulation(spacing: tuple[float, float, float], side: int) -> None:
    n = 100_000
    scales = scales_of(spacing, side, n=n)
    levels, _, _ = simulate(scales, np.random.default_rng(0))
    seen = np.bincount(levels, minlength=LEVELS) / n
    exact = level_probabilities(scales_of(spacing, side))[0]
    assert seen == pytest.approx(exact, abs=4.5 * 0.5 / np.sqrt(n))


@pytest.mark.parametrize(("spacing", "side"), CORNERS)
def test_conditional_draws_match_simulation(spacing: tuple[float, float, float], side: int) -> None:
    n = 100_000
    scales = scales_of(spacing, side, n=n)
    rng = np.random.default_rng(1)
    levels, z_expected, x_expected = simulate(scales, rng)
    for level in np.unique(levels):
        here = np.flatnonzero(levels == level)
        if len(here) < 1000:
            continue
        drawn = np.full(n, level)
        z, x = draw_scales(scales, drawn, rng.random((n, 3)))
        for ours, theirs in (
            (z, z_expected[here]),
            (x, x_expected[here]),
            (z * x, (z_expected * x_expected)[here]),
        ):
            assert largest_cdf_gap(ours, theirs) < 2.2 * np.sqrt(1 / len(ours) + 1 / len(theirs))


def largest_cdf_gap(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic of two samples; ties (the point mass at 1) are counted together."""
    # Rounded, so that values that differ by rounding only are the same point mass.
    a, b = np.sort(a.round(9)), np.sort(b.round(9))
    points = np.union1d(a, b)
    gap = np.searchsorted(a, points, side="right") / len(a) - np.searchsorted(b, points, side="right") / len(b)
    return float(np.abs(gap).max())


unit = st.floats(0, 1, exclude_max=True)


@given(spacings, sides, st.tuples(unit, unit, unit))
def test_draws_have_the_level_asked_for(
    spacing: tuple[float, float, float], side: int, uniforms: tuple[float, float, float]
) -> None:
    scales = scales_of(spacing, side)
    for level in np.flatnonzero(level_probabilities(scales)[0] > 1e-12):
        z, x = draw_scales(scales, np.array([level]), np.array([uniforms]))
        assert scales.low[0] - 1e-12 <= min(x[0], 1.0)
        assert x[0] <= max(scales.high[0], 1.0) + 1e-12
        assert z[0] == 1 or (scales.nearly_isotropic[0] and 0.8 - 1e-12 <= z[0] <= 1.25 + 1e-12)
        ratio = float(scales.anisotropy[0] * z[0] / x[0])
        assert level in (da_level(ratio * (1 - 1e-9)), da_level(ratio * (1 + 1e-9)))


def test_flat_images_have_level_5_surely_and_are_scaled_in_plane() -> None:
    n = 4000
    spacing = np.array([[np.nan, np.nan, np.nan], [np.nan, 0.2, 0.2]] * (n // 2))
    scales = image_scales(spacing, np.full(n, 512), TOKENIZER, RULES)
    assert (level_probabilities(scales) == [0, 0, 0, 0, 0, 1]).all()
    z, x = draw_scales(scales, np.full(n, 5), np.random.default_rng(2).random((n, 3)))
    assert (z == 1).all()
    assert np.mean(x == 1) == pytest.approx(0.5, abs=0.04)
    assert x[x != 1].mean() == pytest.approx(1.375, abs=0.05)


def test_thick_volumes_can_leave_level_5_by_scaling() -> None:
    p = level_probabilities(scales_of((40.0, 1.0, 1.0), 512))[0]
    # Level 5 unless the in-plane scale (drawn half of the time from 0.75..2) exceeds 40 / 32.
    assert p == pytest.approx([0, 0, 0, 0, 0.5 * 0.75 / 1.25, 1 - 0.5 * 0.75 / 1.25])


def test_a_small_image_has_one_scale_not_a_reversed_range() -> None:
    scales = scales_of((1.0, 1.0, 1.0), 50)
    assert (scales.low[0], scales.high[0]) == (0.75, 0.75)
    # 1 / 0.75 < 2, but a depth scale of 1.25 would not reach 2 either: level 0 surely.
    assert level_probabilities(scales)[0] == pytest.approx([1, 0, 0, 0, 0, 0])


def test_a_level_an_image_never_has_is_refused() -> None:
    with pytest.raises(ValueError, match="never has level 4"):
        draw_scales(scales_of((1.0, 1.0, 1.0), 512), np.array([4]), np.zeros((1, 3)))


@pytest.mark.parametrize("spacing", [(1.0, np.nan, 1.0), (0.0, 1.0, 1.0), (1.0, -1.0, 1.0)])
def test_impossible_spacings_are_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="positive spacings"):
        scales_of(spacing, 100)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_z"):
        CropGeometry(tokens_z=0, tokens_x=8)
    with pytest.raises(ValueError, match="in_plane"):
        ScaleRules(in_plane=(1.0, 0.5))
    with pytest.raises(ValueError, match="depth_p"):
        ScaleRules(depth_p=1.5)
    with pytest.raises(ValueError, match="level"):
        TOKENIZER.size(6)


@given(spacings, sides, st.integers(0, LEVELS - 1))
def test_a_level_can_be_drawn_if_and_only_if_it_has_a_probability(
    spacing: tuple[float, float, float], side: int, level: int
) -> None:
    scales = scales_of(spacing, side)
    probability = level_probabilities(scales)[0, level]
    try:
        draw_scales(scales, np.array([level]), np.full((1, 3), 0.5))
    except ValueError:
        assert probability == 0
    else:
        assert probability > 0
