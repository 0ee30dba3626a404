"""One image through all steps of ingest: voxels, row, preview, exclusions."""

from __future__ import annotations

import io
import math
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catalog.schema import CATALOG_SCHEMA
from ingest.image import NORMALISATION_VERSION, excluded_row, normalise
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume

KNOWN_LATER = {
    "split",
    "shard_path",
    "shard_shape",
    "shard_index",
    "stored_bytes",
    "shard_sha256",
    "entry_hash",
}


def source(**fields: Any) -> ImageSource:
    return ImageSource(
        **(
            {
                "dataset": "toy",
                "key": "case_1",
                "subject": "1",
                "path": "images/case_1.nii.gz",
                "root": Path("toy"),
                "format": "nifti",
                "dimension": 3,
                "modality": "CT",
                "upstream_modality": "CT",
                "body_part": ("chest",),
            }
            | fields
        )
    )


def blob(shape: tuple[int, int, int] = (6, 9, 12), *, dtype: str = "int16", seed: int = 0) -> np.ndarray:
    """(1, I, J, K): noise in a box of zeros with different margins on all sides."""
    image = np.zeros(shape)
    inner = tuple(slice(1, size - 2) for size in shape)
    image[inner] = np.random.default_rng(seed).uniform(50, 1000, image[inner].shape)
    return image.astype(dtype)[None]


def volume(voxels: np.ndarray | None = None, **fields: Any) -> Volume:
    voxels = blob() if voxels is None else voxels
    spacing = fields.pop("spacing", (1.0, 1.0, 1.0))
    affine = None if spacing is None else np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    return Volume(**({"voxels": voxels, "dimension": 3, "spacing": spacing, "affine": affine} | fields))


def picture(voxels: np.ndarray, **fields: Any) -> Volume:
    return volume(voxels, **({"dimension": 2, "spacing": None} | fields))


def reason_of(found: Volume, **fields: Any) -> str:
    with pytest.raises(ExcludedImage, match=r"^toy/case_1 \(images/case_1\.nii\.gz\): ") as caught:
        normalise(found, source(**fields))
    return caught.value.reason


def check_row(row: dict[str, Any], voxels: np.ndarray) -> None:
    """What holds for the row of every ingested image."""
    assert list(row) == [name for name in CATALOG_SCHEMA.names if name not in KNOWN_LATER]
    schema = pa.schema([CATALOG_SCHEMA.field(name) for name in row])
    table = pa.Table.from_pylist([row], schema=schema)
    assert all(field.nullable or table[field.name].null_count == 0 for field in schema)
    assert voxels.flags.c_contiguous or row["dimension"] == 3
    assert voxels.shape == tuple(row[f"shape_{axis}"] for axis in "cdhw")
    assert voxels.dtype.name == row["stored_dtype"]
    assert row["window_low"] < row["window_high"]
    real = row["slope"] * voxels.astype(np.float64) + row["intercept"]
    scale = max(abs(real).max(), 1)
    for column, value in {
        "intensity_mean": real.mean(),
        "intensity_std": real.std(),
        "intensity_median": np.median(real),
        "intensity_min": real.min(),
        "intensity_max": real.max(),
        "intensity_p0_5": np.percentile(real[real > real.min()], 0.5),
        "intensity_p99_5": np.percentile(real[real > real.min()], 99.5),
    }.items():
        assert row[column] == pytest.approx(value, rel=1e-9, abs=1e-9 * scale), column


def test_row_of_a_volume() -> None:
    voxels = blob((8, 10, 12))
    found = volume(
        voxels, spacing=(0.5, 0.5, 2.5), slope=2.0, intercept=-100.0, source_hash="ab", flags=("z", "a")
    )
    result = normalise(found, source(weight=3.0))
    row = result.row
    check_row(row, result.voxels)
    expected = {
        "dataset": "toy",
        "key": "case_1",
        "subject": "1",
        "status": "ingested",
        "reason": None,
        "message": None,
        "modality": "CT",
        "upstream_modality": "CT",
        "body_part": ["chest"],
        "dimension": 3,
        "spacing_z": 2.5,
        "spacing_y": 0.5,
        "spacing_x": 0.5,
        "da": 5.0,
        "da_level": 2,
        "stored_dtype": "int16",
        "slope": 2.0,
        "intercept": -100.0,
        "original_shape": [8, 10, 12],
        "original_spacing": [0.5, 0.5, 2.5],
        "original_orientation": "LPS",
        "geometry_flags": ["a", "z"],
        "depth_axis": "SI",
        "depth_rule": "anisotropy",
        "crop_box": [1, 10, 1, 8, 1, 6],
        "resize_factor": 1.0,
        "sampling_weight": 3.0,
        "source_path": "images/case_1.nii.gz",
        "source_hash": "ab",
        "normalisation_version": NORMALISATION_VERSION,
    }
    assert {name: row[name] for name in expected} == expected
    # LPS is (W, H, D) of the display order: nothing is flipped.
    np.testing.assert_array_equal(result.voxels[0], voxels[0].transpose(2, 1, 0)[1:10, 1:8, 1:6])
    assert (row["window_low"], row["window_high"]) == (row["intensity_p0_5"], row["intensity_p99_5"])


@given(
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    copied=st.booleans(),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (0.7, 0.7, 3.0), (4.0, 0.8, 0.805), (0.9, 2.0, 0.95)]),
    modality=st.sampled_from(["CT", "MRI/T1"]),
    dtype=st.sampled_from(["uint8", "int16", "int32", "float32"]),
    tilt=st.sampled_from([0.0, 0.2]),
    oblique=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_any_order_of_the_axes_gives_the_same_image(
    order: list[int],
    flips: tuple[bool, bool, bool],
    copied: bool,
    spacing: tuple[float, float, float],
    modality: str,
    dtype: str,
    tilt: float,
    oblique: bool,
) -> None:
    if modality != "CT" and spacing == (1.0, 1.0, 1.0):
        copied = False  # the slowest axis of the file decides, so memory has to stay as it is
    voxels = blob(dtype="float64", seed=1)
    voxels = (voxels / 8 if dtype == "uint8" else voxels).astype(dtype)
    thickest = spacing.index(max(spacing))
    linear = np.diag([-spacing[0], -spacing[1], spacing[2]])
    if spacing[thickest] > 1.5:
        linear[(thickest + 1) % 3, thickest] = tilt * spacing[thickest]
    if oblique:
        turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]])
        linear = turn @ linear
    affine = np.eye(4)
    affine[:3, :3] = linear
    reference = normalise(volume(voxels, spacing=spacing, affine=affine), source(modality=modality))

    signs = np.where(flips, -1.0, 1.0)
    turned = voxels.transpose(0, *(axis + 1 for axis in order))
    turned = turned[:, *(slice(None, None, int(sign)) for sign in signs)]
    affine = np.eye(4)
    affine[:3, :3] = linear[:, order] * signs
    again = normalise(
        volume(
            turned.copy() if copied else turned,
            spacing=tuple(spacing[axis] for axis in order),
            affine=affine,
        ),
        source(modality=modality),
    )
    np.testing.assert_array_equal(again.voxels, reference.voxels)
    assert again.preview == reference.preview
    as_stored = {"original_shape", "original_spacing", "original_orientation"}
    assert {name: value for name, value in again.row.items() if name not in as_stored} == {
        name: value for name, value in reference.row.items() if name not in as_stored
    }
    check_row(again.row, again.voxels)


NIFTI = {
    # folder/file: depth axis, rule, stored type, flags
    "ct/head_ct_sheared_uint8.nii.gz": ("SI", "anisotropy", "uint8", ["gantry_tilt"]),
    "ct/lidc_0314_chest_ct_axes_PIR.nii.gz": ("SI", "anisotropy", "int16", []),
    "ct/pyradiomics_lung1_ct_thick.nii.gz": ("SI", "anisotropy", "int16", []),
    "ct/totalsegmentator_aorta_ct_cropped.nii.gz": ("SI", "default", "int16", []),
    "mri/brain_fmri_sagittal_4d.nii": ("LR", "metadata", "int16", []),
    "mri/nibabel_anatomical.nii": ("SI", "default", "int16", []),
    "mri/spinal_cord_fmri_4d.nii.gz": ("SI", "anisotropy", "int16", []),
    "mri/tcga_fg_6692_flair.nii.gz": ("SI", "metadata", "int16", []),
}


@pytest.mark.parametrize("name", NIFTI)
def test_real_nifti_images(shared: Path, name: str) -> None:
    image = nibabel.load(shared / "data" / name)
    stored = np.asarray(image.dataobj.get_unscaled())
    stored = stored[..., 0] if stored.ndim == 4 else stored
    found = Volume(
        voxels=stored.astype(stored.dtype.newbyteorder("="), copy=False)[None],
        dimension=3,
        spacing=tuple(float(step) for step in image.header.get_zooms()[:3]),
        affine=image.affine,
        slope=image.dataobj.slope,
        intercept=image.dataobj.inter,
        slice_axis=image.header.get_dim_info()[2],
    )
    result = normalise(found, source(modality="CT" if name.startswith("ct") else "MRI"))
    row = result.row
    check_row(row, result.voxels)
    assert (row["depth_axis"], row["depth_rule"], row["stored_dtype"], row["geometry_flags"]) == NIFTI[name]

    # nibabel's own reordering of the scaled image, cropped to the box of the row, is the stored image.
    wanted = {"SI": "SPL", "AP": "PIL", "LR": "LIP"}[row["depth_axis"]]
    transform = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(nibabel.aff2axcodes(image.affine)),
        nibabel.orientations.axcodes2ornt(tuple(wanted)),
    )
    scaled = stored.astype(np.float64) * image.dataobj.slope + image.dataobj.inter
    turned = nibabel.orientations.apply_orientation(scaled, transform)
    z0, z1, y0, y1, x0, x1 = row["crop_box"]
    real = row["slope"] * result.voxels[0].astype(np.float64) + row["intercept"]
    np.testing.assert_allclose(real, turned[z0:z1, y0:y1, x0:x1], atol=1e-9)
    foreground = turned > np.percentile(turned[turned > turned.min()], 0.5) + 1e-9
    outside = foreground.copy()
    outside[z0:z1, y0:y1, x0:x1] = False
    assert foreground.any()
    assert not outside.any()
    assert max(Image.open(io.BytesIO(result.preview)).size) >= 96


def test_large_slices_are_shrunk_and_spacing_follows() -> None:
    voxels = np.random.default_rng(0).integers(100, 200, (1, 602, 802, 3)).astype(np.int16)
    voxels[:, [0, -1]] = 0
    voxels[:, :, [0, -1]] = 0
    result = normalise(volume(voxels, spacing=(0.5, 0.5, 4.0)), source())
    check_row(result.row, result.voxels)
    assert result.voxels.shape == (1, 3, 683, 512)
    assert result.voxels.dtype == np.int16
    assert result.row["resize_factor"] == 512 / 600
    assert result.row["spacing_z"] == 4.0
    assert result.row["spacing_y"] == pytest.approx(0.5 * 800 / 683, rel=1e-12)
    assert result.row["spacing_x"] == pytest.approx(0.5 * 600 / 512, rel=1e-12)
    assert result.row["da"] == pytest.approx(4.0 / (0.5 * 800 / 683), rel=1e-12)


def test_true_floats_become_16_bit_integers_unless_lossless() -> None:
    voxels = blob(dtype="float32")
    found = volume(voxels, slope=0.5, intercept=3.0)
    result, kept = normalise(found, source()), normalise(found, source(), lossless=True)
    check_row(result.row, result.voxels)
    check_row(kept.row, kept.voxels)
    assert (result.voxels.dtype, kept.voxels.dtype) == (np.uint16, np.float32)
    assert (kept.row["slope"], kept.row["intercept"]) == (0.5, 3.0)
    real = result.row["slope"] * result.voxels + result.row["intercept"]
    window = result.row["window_high"] - result.row["window_low"]
    np.testing.assert_allclose(real, 0.5 * kept.voxels + 3.0, atol=window / 8192)
    whole = normalise(volume(np.rint(voxels).astype(np.float64)), source())
    assert whole.voxels.dtype == np.int16


def test_negative_slope_keeps_bright_bright() -> None:
    voxels = blob()
    plain = normalise(volume(voxels), source())
    turned = normalise(volume((500 - voxels).astype(np.int16), slope=-1.0, intercept=500.0), source())
    check_row(turned.row, turned.voxels)
    assert turned.row["geometry_flags"] == ["negative_slope"]
    real = turned.row["slope"] * turned.voxels.astype(float) + turned.row["intercept"]
    np.testing.assert_array_equal(real, plain.voxels)
    assert turned.row["crop_box"] == plain.row["crop_box"]
    for name in ("window_low", "window_high", "intensity_mean"):
        assert turned.row[name] == pytest.approx(plain.row[name], rel=1e-12)


@pytest.mark.parametrize("padding", [-2000, 3000])
def test_padding_is_the_minimum_of_the_scan(padding: int) -> None:
    voxels = blob()
    padded = voxels.copy()
    padded[:, 0] = padding
    padded[:, 3, 4, 5] = padding
    voxels[:, 3, 4, 5] = 0
    expected = normalise(volume(voxels), source())
    before = padded.copy()
    result = normalise(volume(padded, padding_value=padding), source())
    np.testing.assert_array_equal(result.voxels, expected.voxels)
    assert result.row == expected.row
    np.testing.assert_array_equal(padded, before)


def test_2d_grey_image_without_spacing() -> None:
    voxels = np.zeros((1, 1, 20, 30), dtype=np.uint8)
    voxels[..., 3:10, 4:] = np.arange(1, 183, dtype=np.uint8).reshape(7, 26)
    result = normalise(picture(voxels), source(dimension=2, modality="XR"))
    row = result.row
    check_row(row, result.voxels)
    assert result.voxels.shape == (1, 1, 7, 26)
    assert row["crop_box"] == [0, 1, 3, 10, 4, 30]
    assert (row["window_low"], row["window_high"]) == (0, 255)
    assert (row["dimension"], row["da"], row["da_level"]) == (2, None, 5)
    assert [row[name] for name in ("spacing_z", "spacing_y", "spacing_x", "depth_axis", "depth_rule")] == [
        None
    ] * 5
    assert (row["original_shape"], row["original_spacing"], row["original_orientation"]) == (
        [20, 30],
        None,
        None,
    )


def test_2d_colour_image_is_cropped_to_all_channels_before_the_resize() -> None:
    voxels = np.random.default_rng(0).integers(1, 255, (3, 1, 700, 640)).astype(np.uint8)
    voxels[1, :, :100] = 0
    voxels[2, :, :, 600:] = 0
    result = normalise(
        picture(voxels, spacing=(math.nan, 0.2, 0.2)), source(dimension=2, modality="RGB/fundus")
    )
    check_row(result.row, result.voxels)
    assert result.voxels.shape == (3, 1, 512, 512)
    assert result.row["crop_box"] == [0, 1, 100, 700, 0, 600]
    assert result.row["original_spacing"] == pytest.approx([0.2, 0.2])
    assert result.row["spacing_y"] == pytest.approx(0.2 * 600 / 512)
    assert result.row["spacing_z"] is None
    assert (result.row["window_low"], result.row["window_high"]) == (0, 255)


def test_16_bit_2d_image_uses_percentiles() -> None:
    voxels = blob((1, 20, 30)[::-1], dtype="uint16")[0].reshape(1, 1, 30, 20)
    voxels = np.maximum(voxels, np.arange(600, dtype=np.uint16).reshape(1, 1, 30, 20))
    result = normalise(picture(voxels), source(dimension=2))
    check_row(result.row, result.voxels)
    assert result.row["window_low"] == result.row["intensity_p0_5"]


def test_8_bit_volumes_use_percentiles() -> None:
    result = normalise(volume((blob() // 8).astype(np.uint8)), source())
    assert (result.row["window_low"], result.row["window_high"]) != (0, 255)


def test_thick_slices_stay_three_dimensional_at_the_last_level() -> None:
    result = normalise(volume(spacing=(0.25, 0.25, 9.0)), source())
    assert (result.row["dimension"], result.row["da"], result.row["da_level"]) == (3, 36.0, 5)


def test_volume_without_orientation_keeps_a_null_depth_axis() -> None:
    result = normalise(volume(affine=None), source())
    check_row(result.row, result.voxels)
    assert (result.row["depth_axis"], result.row["depth_rule"]) == (None, "default")
    assert result.row["original_orientation"] is None
    assert result.voxels.shape == (1, 3, 6, 9)


@pytest.mark.parametrize(
    ("index", "count", "share", "key", "weight"),
    [(0, 1, True, "case_1", 2.0), (3, 4, True, "case_1#0003", 2.0 * 7 / 16), (3, 4, False, "case_1#0003", 2.0)],
)
def test_volumes_of_one_file_have_keys_and_share_its_weight(
    index: int, count: int, share: bool, key: str, weight: float
) -> None:
    row = normalise(volume(index=index, count=count), source(weight=2.0, share_weight=share)).row
    assert (row["key"], row["sampling_weight"]) == (key, weight)


def constant() -> np.ndarray:
    return np.full((1, 4, 5, 6), 7, dtype=np.int16)


def binary() -> np.ndarray:
    return (blob() > 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (volume(constant()), "constant"),
        (volume(constant().astype(np.float32)), "constant"),
        (volume(slope=0.0), "constant"),
        (volume(binary()), "empty_crop"),
        (picture(np.zeros((1, 1, 5, 5), dtype=np.uint8)), "constant"),
        (picture(np.eye(3, dtype=np.uint8)[:, None, :, None]), "empty_crop"),
        (volume(slope=math.nan), "not_finite"),
        (volume(np.full((1, 4, 5, 6), math.nan)), "not_finite"),
        (volume(np.concatenate([blob()] * 3)), "colour_volume"),
        (picture(np.concatenate([blob((1, 6, 7))] * 2)), "unsupported_layout"),
        (picture(blob((2, 6, 7))), "unsupported_layout"),
        (volume(np.zeros((1, 4, 0, 6))), "no_pixels"),
        (volume(blob((6, 9, 1))), "single_slice"),
        (volume(spacing=None), "spacing_missing"),
        (volume(spacing=(1.0, 2.0, 3.0)), "in_plane_spacing"),
    ],
)
def test_unfit_images_are_excluded_with_a_reason(found: Volume, reason: str) -> None:
    assert reason_of(found, dimension=found.dimension) == reason


def test_image_that_is_constant_after_the_crop_is_excluded() -> None:
    voxels = np.zeros((1, 12, 12, 12), dtype=np.int16)
    voxels[:, 0, 0] = 1
    voxels[:, 2:, 2:, 2:] = 9  # 12 of 1012 voxels above the minimum are 1: p0.5 is 1
    assert reason_of(volume(voxels)) == "constant"


def test_excluded_row_of_a_file_that_was_not_read() -> None:
    row = excluded_row(source(), FailedImage("unreadable", "toy/case_1: truncated"), None, 1, None)
    assert list(row) == [name for name in CATALOG_SCHEMA.names if name not in KNOWN_LATER]
    known = {name: value for name, value in row.items() if value is not None}
    assert known == {
        "dataset": "toy",
        "key": "case_1",
        "subject": "1",
        "status": "failed",
        "reason": "unreadable",
        "message": "toy/case_1: truncated",
        "modality": "CT",
        "upstream_modality": "CT",
        "body_part": ["chest"],
        "dimension": 3,
        "source_path": "images/case_1.nii.gz",
        "normalisation_version": NORMALISATION_VERSION,
    }


def test_excluded_row_keeps_what_is_known_of_the_image() -> None:
    found = volume(constant(), spacing=(0.5, 0.5, 4.0), index=1, count=2, flags=("unit_converted",))
    row = excluded_row(source(), ExcludedImage("constant", "all the same"), found.index, found.count, found)
    expected = {
        "key": "case_1#0001",
        "status": "excluded",
        "reason": "constant",
        "original_shape": [4, 5, 6],
        "original_spacing": [0.5, 0.5, 4.0],
        "original_orientation": "LPS",
        "geometry_flags": ["unit_converted"],
        "depth_axis": "SI",
        "depth_rule": "anisotropy",
        "spacing_z": 4.0,
        "da": 8.0,
        "da_level": 3,
        "sampling_weight": None,
    }
    assert {name: row[name] for name in expected} == expected


def test_excluded_row_of_unfit_geometry_keeps_the_file_s_own_numbers() -> None:
    found = volume(spacing=(1.0, 2.0, math.nan))
    row = excluded_row(source(), ExcludedImage("spacing_invalid", "bad"), 0, 1, found)
    assert row["original_spacing"][:2] == [1.0, 2.0]
    assert math.isnan(row["original_spacing"][2])
    assert (row["spacing_z"], row["depth_axis"], row["original_orientation"]) == (None, None, None)
    unfit = volume(spacing=(1.0, 2.0, 3.0))
    row = excluded_row(source(), ExcludedImage("in_plane_spacing", "bad"), 0, 1, unfit)
    assert (row["original_orientation"], row["depth_axis"]) == ("LPS", None)


@pytest.mark.parametrize("kind", ["int16", "float32", "float64"])
def test_working_memory_stays_below_twice_the_volume(kind: str) -> None:
    voxels = np.asfortranarray(np.random.default_rng(0).normal(0, 300, (160, 160, 120)).astype(kind))[None]
    found = volume(voxels, spacing=(1.0, 1.0, 1.0))
    tracemalloc.start()
    try:
        normalise(found, source())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Beside the volume itself; a constant part is for chunks and histograms.
    assert peak < 2.1 * voxels.nbytes + 12e6
