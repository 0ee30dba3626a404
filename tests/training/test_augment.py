"""Crops from boxes: exact where nothing is to be done, geometrically right where something is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catalog.errors import SetupError
from training.augment import Crops, place, render, resample, window
from training.loader import RawBatch, read_batch
from training.plan import BatchPlan, SamplePlan, StoredImage

CPU = torch.device("cpu")
Size = tuple[int, int, int]
Start = tuple[int, int, int] | None


class Memory:
    """A reader of arrays that were never stored."""

    def __init__(self, *images: np.ndarray) -> None:
        self._images = images

    def begin(
        self, path: str, shape: tuple[int, ...], dtype: str, index: int | None, box: Any, into: np.ndarray
    ) -> Callable[[], None]:
        into[...] = self._images[int(path)][(slice(None), *(slice(start, stop) for start, stop in box))]
        return lambda: None


def sample(voxels: np.ndarray, number: int, crop: Size, at: Start = None, **changes: Any) -> SamplePlan:
    """A crop centred in the image, or starting at voxel `at`; the box is the whole image."""
    shape = voxels.shape[1:]
    start = at or tuple(math.ceil((n - size) / 2) for n, size in zip(shape, crop, strict=True))
    image = StoredImage(
        dataset="demo",
        key=str(number),
        shape=voxels.shape,
        spacing=(2.0, 1.0, 0.5),
        dtype=voxels.dtype.name,
        slope=1.0,
        intercept=0.0,
        window=(0.0, 1.0) if voxels.dtype.kind == "f" else (0.0, 255.0),
        shard_path=str(number),
        shard_shape=voxels.shape,
        shard_index=None,
    )
    neutral = SamplePlan(
        index=number,
        image=image,
        box=tuple((0, n) for n in shape),
        centre=tuple(first + (size - 1) / 2 for first, size in zip(start, crop, strict=True)),
        matrix=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    return dataclasses.replace(neutral, **changes)


def scaled(z: float, y: float, x: float) -> dict[str, Any]:
    return {"scale": (z, y, x), "matrix": ((z, 0.0, 0.0), (0.0, y, 0.0), (0.0, 0.0, x))}


def batch_of(images: list[np.ndarray], samples: list[SamplePlan], crop: Size) -> RawBatch:
    plan = BatchPlan(step=0, level=0, crop_size=crop, global_size=len(samples), samples=tuple(samples))
    return read_batch(Memory(*images), plan)  # type: ignore[arg-type]


def one(voxels: np.ndarray, crop: Size, at: Start = None, **changes: Any) -> Tensor:
    """The crop (3, D, H, W) of one image."""
    crops = render(batch_of([voxels], [sample(voxels, 0, crop, at, **changes)], crop), CPU)
    return crops.voxels[0]


def noise(shape: tuple[int, ...], dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, shape).astype(dtype) if dtype != "float32" else rng.random(shape, np.float32)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
def test_identity_gives_exactly_the_windowed_voxels(dtype: str) -> None:
    voxels = noise((1, 9, 20, 22), dtype)
    crop = one(voxels, (8, 16, 16), (1, 3, 4))
    width = 1 if dtype == "float32" else 255
    expected = voxels[0, 1:9, 3:19, 4:20].astype(np.float32) * np.float32(1 / width)
    assert crop.dtype == torch.float32
    assert all(np.array_equal(channel.numpy(), expected) for channel in crop)


def test_window_is_in_real_units_and_clips() -> None:
    stored = torch.tensor([0, 1024, 1074, 1124, 1224, 3000], dtype=torch.int16)
    ct = sample(noise((1, 1, 1, 1)), 0, (1, 1, 1))
    ct = dataclasses.replace(
        ct, image=dataclasses.replace(ct.image, slope=2.0, intercept=-2048.0, window=(-100.0, 300.0))
    )
    hounsfield = 2.0 * stored.double() - 2048
    expected = ((hounsfield + 100) / 400).clamp(0, 1)
    assert torch.allclose(window(stored, ct).double(), expected, atol=1e-6)
    assert stored[1] == 1024, "the stored voxels are not changed"


def test_small_images_are_padded_with_zero_evenly() -> None:
    voxels = noise((1, 3, 10, 16)) // 2 + 100
    crop = one(voxels, (8, 16, 16))
    expected = np.zeros((8, 16, 16), np.float32)
    expected[2:5, 3:13] = voxels[0] * np.float32(1 / 255)
    assert np.array_equal(crop[0].numpy(), expected)


def test_colour_keeps_its_channels_and_grey_is_repeated() -> None:
    colour, grey = noise((3, 1, 20, 20), seed=1), noise((1, 1, 20, 20), seed=2)
    size = (1, 16, 16)
    crops = render(batch_of([colour, grey], [sample(colour, 0, size), sample(grey, 1, size)], size), CPU)
    assert np.array_equal(crops.voxels[0].numpy(), colour[:, :, 2:18, 2:18] * np.float32(1 / 255))
    assert torch.equal(crops.voxels[1, 0], crops.voxels[1, 2])
    assert crops.keys == ("demo/0", "demo/1")
    assert crops.voxels.shape == (2, 3, *size)


def test_flips_reverse_the_crop() -> None:
    voxels = noise((1, 8, 16, 16))
    plain = one(voxels, (8, 16, 16))
    for axis in range(3):
        flips = tuple(axis == i for i in range(3))
        assert torch.equal(one(voxels, (8, 16, 16), flips=flips), plain.flip(axis + 1))


def ramp(shape: tuple[int, int, int], slopes: tuple[float, float, float]) -> np.ndarray:
    """An image whose value at (z, y, x) is slopes @ (z, y, x): trilinear interpolation of it is exact."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return (slopes[0] * z + slopes[1] * y + slopes[2] * x).astype(np.float32)[None]


@pytest.mark.parametrize("scale", [(1.0, 1.5, 1.5), (0.8, 0.75, 0.75), (1.25, 2.0, 2.0)])
def test_scale_above_one_is_a_larger_field_of_view(scale: tuple[float, float, float]) -> None:
    slopes = (0.01, 0.005, 0.003)
    voxels = ramp((20, 64, 64), slopes)
    crop = one(voxels, (8, 16, 16), **scaled(*scale))[0]
    steps = [float(crop.diff(dim=axis).mean()) for axis in range(3)]
    expected = [slope * factor for slope, factor in zip(slopes, scale, strict=True)]
    assert steps == pytest.approx(expected, rel=1e-3)
    # The field of view is centred: 20, 64, 64 voxels have their centre at 9.5, 31.5, 31.5.
    middle = crop.mean().item()
    assert middle == pytest.approx(np.dot(slopes, (9.5, 31.5, 31.5)), abs=1e-4)


def test_a_crop_scaled_to_the_whole_side_is_not_darkened_at_the_edges() -> None:
    # Half a voxel beyond the outermost centres still belongs to the image.
    voxels = np.full((1, 1, 24, 24), 255, np.uint8)
    field_of_view = one(voxels, (1, 32, 32), **scaled(1, 0.75, 0.75), centre=(0.0, 11.5, 11.5))
    assert (field_of_view == 1).all()
    moved = one(voxels, (1, 32, 32), **scaled(1, 0.75, 0.75), centre=(0.0, 12.5, 11.5))
    assert moved[0, 0].mean(dim=1).tolist() == [1.0] * 31 + [0.0]


def test_rotation_by_90_degrees_is_a_rearrangement() -> None:
    voxels = noise((1, 4, 16, 16))
    quarter = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))
    crop = one(voxels, (4, 16, 16), matrix=quarter)
    # The crop's (y, x) shows the image's (-x, y) seen from the centre.
    expected = np.rot90(voxels[0], k=1, axes=(2, 1)).copy() / np.float32(255)
    alternative = np.rot90(voxels[0], k=-1, axes=(2, 1)).copy() / np.float32(255)
    assert np.abs(crop[0].numpy() - expected).max() < 1e-4
    assert np.abs(crop[0].numpy() - alternative).max() > 0.1


def test_resampling_agrees_with_slicing_where_both_apply() -> None:
    voxels = noise((1, 12, 40, 40))
    plain = one(voxels, (8, 16, 16), (2, 5, 20))
    # Not the identity, but too close to it for any interpolation to show.
    nearly = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0 + 1e-12))
    resampled = one(voxels, (8, 16, 16), (2, 5, 20), matrix=nearly)
    assert (plain - resampled).abs().max() < 1e-4


def test_voxels_outside_the_box_are_zero() -> None:
    voxels = np.full((1, 6, 20, 20), 255, np.uint8)
    tilted = sample(voxels, 0, (8, 16, 16), **scaled(1.2, 1.0, 1.0))
    crop = render(batch_of([voxels], [tilted], (8, 16, 16)), CPU).voxels[0, 0]
    # 8 slices at 1.2 voxels, centred on 6: the outermost lie beyond half a voxel of the box.
    assert crop.mean(dim=(1, 2)).tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_intensity_changes() -> None:
    voxels = noise((1, 4, 16, 16))
    size = (4, 16, 16)
    plain = one(voxels, size)

    def close(changed: Tensor, expected: Tensor) -> bool:
        return torch.allclose(changed, expected, atol=1e-6)

    assert close(one(voxels, size, brightness=1.25), (plain * 1.25).clamp(max=1))
    assert close(one(voxels, size, shift=-0.1), (plain - 0.1).clamp(min=0))
    assert close(one(voxels, size, contrast=0.75), plain.mean() + 0.75 * (plain - plain.mean()))
    stretched = (plain.mean() + 1.25 * (plain - plain.mean())).clamp(plain.min(), plain.max())
    assert close(one(voxels, size, contrast=1.25), stretched)
    assert close(one(voxels, size, gamma=1.5), plain**1.5)
    assert close(one(voxels, size, gamma=0.7, gamma_inverted=True), 1 - (1 - plain) ** 0.7)


angle = st.floats(-math.pi / 2, math.pi / 2)


@given(
    angle, st.floats(0.75, 2), st.floats(0.75, 1.25), st.floats(0.75, 1.25), st.floats(0.7, 1.5), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_crops_stay_finite_and_in_range(
    turn: float, scale: float, brightness: float, contrast: float, gamma: float, inverted: bool
) -> None:
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    changes = {"matrix": ((1.1, 0.0, 0.0), (0.0, cos, -sin), (0.0, sin, cos)), "brightness": brightness}
    intensity = {"contrast": contrast, "gamma": gamma, "gamma_inverted": inverted}
    # Saturated patches: interpolation between ones must not exceed one.
    voxels = (noise((1, 5, 24, 24)) > 60).astype(np.uint8) * 255
    crop = one(voxels, (4, 16, 16), **changes, **intensity)
    assert torch.isfinite(crop).all()
    assert ((crop >= 0) & (crop <= 1)).all()
    assert torch.equal(crop, one(voxels, (4, 16, 16), **changes, **intensity)), "rendering is deterministic"


unscaled = st.just(1.0)
halves = st.integers(-40, 80).map(lambda n: n / 2)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 30), st.integers(1, 30)),
    crop=st.tuples(st.sampled_from([1, 4, 7]), st.sampled_from([8, 9]), st.sampled_from([8, 9])),
    centre=st.tuples(*[halves | st.floats(-5, 25)] * 3),
    scale=st.tuples(*[unscaled | st.floats(0.75, 2)] * 3),
    turn=st.just(0.0) | angle,
    flips=st.tuples(*[st.booleans()] * 3),
)
@settings(max_examples=150, deadline=None)
def test_what_is_left_out_of_the_sum_is_nothing(
    shape: tuple[int, int, int, int],
    crop: Size,
    centre: tuple[float, float, float],
    scale: tuple[float, float, float],
    turn: float,
    flips: tuple[bool, bool, bool],
) -> None:
    """Slices copied, planes interpolated once for all of them: the general sum comes out."""
    (z, y, x), cos, sin = scale, math.cos(turn), math.sin(turn)
    matrix = ((z, 0.0, 0.0), (0.0, y * cos, -x * sin), (0.0, y * sin, x * cos))
    voxels = noise(shape, "float32")
    plan = sample(voxels, 0, crop, centre=centre, matrix=matrix, flips=flips)
    # On the border between an edge voxel and nothing, rounding decides.
    corners = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in crop), indexing="ij"), -1)
    at = corners @ np.array(matrix).T + centre
    border = np.minimum(np.abs(at + 0.5), np.abs(at - np.array(shape[1:]) + 0.5)).min(-1) < 1e-3
    box, fast, general = torch.from_numpy(voxels), *torch.full((2, shape[0], *crop), math.nan)
    place(box, plan, fast)
    resample(box, plan, general)
    away = ~torch.from_numpy(border).flip([axis for axis, flip in enumerate(flips) if flip])
    assert torch.isfinite(fast).all()
    assert ((fast >= 0) & (fast <= 1)).all()
    assert torch.allclose(fast[:, away], general[:, away], atol=2e-5)


def test_rotation_out_of_the_plane_is_interpolated_in_three_dimensions() -> None:
    slopes = (0.02, 0.005, 0.003)
    voxels = ramp((20, 40, 40), slopes)
    tilt = np.array(((0.9, 0.1, 0.05), (-0.1, 0.95, 0.2), (0.05, -0.2, 1.1)))
    crop = one(voxels, (4, 16, 16), matrix=tuple(map(tuple, tilt)), flips=(True, False, True))[0]
    gradient = np.array(slopes) @ tilt * (-1, 1, -1)
    for axis in range(3):
        assert torch.allclose(crop.diff(dim=axis), torch.tensor(gradient[axis]).float(), atol=1e-5)


def test_grey_crops_share_memory() -> None:
    grey = noise((1, 4, 16, 16))
    crop = one(grey, (4, 16, 16))
    assert crop.untyped_storage().nbytes() == 4 * grey.size


def test_spacing_of_the_crop() -> None:
    voxels = noise((1, 4, 16, 16))
    size = (4, 16, 16)
    flat = sample(voxels, 1, size)
    flat = dataclasses.replace(flat, image=dataclasses.replace(flat.image, spacing=(None, 0.3, 0.3)))
    samples = [sample(voxels, 0, size, **scaled(1.25, 2, 2)), flat]
    crops: Crops = render(batch_of([voxels, voxels], samples, size), CPU)
    assert crops.spacing[0].tolist() == [2.5, 2.0, 1.0]
    assert math.isnan(crops.spacing[1, 0])
    assert crops.spacing[1, 1:].tolist() == pytest.approx([0.3, 0.3])


def test_an_empty_slice_of_a_batch_renders() -> None:
    crops = render(batch_of([], [], (4, 16, 16)), CPU)
    assert crops.voxels.shape == (0, 3, 4, 16, 16)
    assert crops.spacing.shape == (0, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_crops() -> None:
    voxels = noise((1, 12, 40, 40))
    size = (8, 16, 16)
    tilt = ((1.1, 0.1, 0.0), (-0.1, 0.9, 0.2), (0.0, -0.2, 0.9))
    samples = [sample(voxels, 0, size), sample(voxels, 1, size, matrix=tilt, contrast=1.2, gamma=0.8)]
    batch = batch_of([voxels, voxels], samples, size)
    there = render(batch.pin_memory(), torch.device("cuda")).voxels.cpu()
    assert torch.allclose(there, render(batch, CPU).voxels, atol=1e-4)


def test_reading_errors_name_the_image() -> None:
    class Broken:
        def begin(self, *_: Any) -> Callable[[], None]:
            def wait() -> None:
                raise ValueError("checksum mismatch")

            return wait

    voxels = noise((1, 4, 16, 16))
    plan = batch_of([voxels], [sample(voxels, 0, (4, 16, 16))], (4, 16, 16)).plan
    with pytest.raises(SetupError, match=r"demo/0 \(shard 0\): checksum mismatch"):
        read_batch(Broken(), plan)  # type: ignore[arg-type]
