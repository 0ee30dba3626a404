"""Which crop of which image, transformed how: `plan(step)` is a pure function of (catalog, config, seed, step).

Nothing is read and nothing is consumed here. Every random number is addressed by (seed, step, global sample
index), so any step can be planned at once (exact resume), and every rank and worker plans its slice of the
same global batch. All samples of a batch have one DA level, hence one crop size.

Coordinates: voxel centres lie at integers, so an axis of n voxels spans [-0.5, n - 0.5]. Order is (z, y, x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catalog.errors import SetupError
from catalog.sampling import (
    LEVELS,
    CropGeometry,
    ImageScales,
    Reals,
    ScaleRules,
    draw_scales,
    image_scales,
    level_probabilities,
)
from shards.read import Box
from training.rng import Stream, uniforms

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """What may happen to a crop (defaults: the paper's, both stages)."""

    scale: ScaleRules = field(default_factory=ScaleRules)
    """Random scaling, which also decides the DA level."""
    rotate_p: float = 0.3
    """Probability of a rotation about all three axes at once."""
    rotate_in_plane_deg: float = 90.0
    """Largest angle about the depth axis."""
    rotate_out_of_plane_deg: float = 30.0
    """Largest angle about the other axes; 0 unless the image is nearly isotropic."""
    flip_p: float = 0.5
    """Probability of a flip, for each axis."""
    brightness: float = 0.25
    """Intensities are multiplied by 1 + U(-brightness, brightness)."""
    brightness_p: float = 0.15
    shift: float = 0.1
    """U(-shift, shift) is added to the intensities."""
    shift_p: float = 0.0
    contrast: tuple[float, float] = (0.75, 1.25)
    """Range of the factor by which intensities are spread around their mean."""
    contrast_p: float = 0.15
    gamma: tuple[float, float] = (0.7, 1.5)
    """Range of the exponent, applied to the intensities or, as often, to 1 - intensities."""
    gamma_p: float = 0.3

    def __post_init__(self) -> None:
        shares = (
            "rotate_p",
            "flip_p",
            "brightness_p",
            "shift_p",
            "contrast_p",
            "gamma_p",
            "brightness",
            "shift",
        )
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0 ... 1, got {getattr(self, name)}")
        for name in ("contrast", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be a range 0 < low <= high, got ({low}, {high})")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """Where an image's voxels lie and what they mean: the columns of the catalog that training needs."""

    dataset: str
    key: str
    shape: tuple[int, int, int, int]
    """(C, D, H, W)"""
    spacing: tuple[float | None, float | None, float | None]
    """mm along z, y, x; None where unknown, along z for 2-D."""
    dtype: str
    slope: float
    intercept: float
    window: tuple[float, float]
    """Real values that become 0 and 1."""
    shard_path: str
    shard_shape: tuple[int, ...]
    shard_index: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """One crop. Plain numbers only, so that plans compare, pickle and print."""

    index: int
    """Position in the global batch: the address of the sample's random numbers."""
    image: StoredImage
    box: Box
    """What is read. Voxels of the crop that lie outside it are 0 after windowing."""
    centre: Triple
    """Centre of the crop in voxels of the box."""
    matrix: tuple[Triple, Triple, Triple]
    """Takes an offset from the crop's centre in voxels of the crop to one in voxels of the box."""
    scale: Triple = (1.0, 1.0, 1.0)
    """Spacing of the crop / spacing of the image; above 1 = larger field of view."""
    flips: tuple[bool, bool, bool] = (False, False, False)
    """Axes (z, y, x) along which the finished crop is reversed."""
    brightness: float = 1.0
    shift: float = 0.0
    contrast: float = 1.0
    gamma: float = 1.0
    gamma_inverted: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """One rank's slice of the global batch of a step."""

    step: int
    level: int
    crop_size: tuple[int, int, int]
    """(D, H, W) of every crop."""
    global_size: int
    """Samples of the step over all ranks; losses are weighted by it, as slices may differ by one."""
    samples: tuple[SamplePlan, ...]


class Planner(Protocol):
    """What the loader needs: the batch of a step."""

    def plan(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """Slice `rank` of `world` of the step's global batch."""


class BatchPlanner:
    """Training batches: level by its marginal probability, then images and scales given the level.

    Images are drawn with replacement with probability proportional to `sampling_weight` and to their
    probability of the level. The order of the table's rows does not matter.
    """

    def __init__(
        self,
        table: pa.Table,
        crop: CropGeometry,
        batch_size: int,
        seed: int,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        """Args: table: catalog rows of the training split; batch_size: crops in a step over all ranks.

        Raises SetupError if a row cannot be trained on (held out, not ingested, weight or window unusable),
        or if no image has a positive weight.
        """
        if batch_size < 1:
            raise SetupError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= seed < 2**64:
            raise SetupError(f"the seed must be an integer in 0 ... 2^64 - 1, got {seed}")
        self.crop = crop
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation or AugmentationConfig()
        self._images = _Images(table, "train")
        shapes = self._images.shapes
        self._scales = image_scales(
            self._images.spacing, shapes[:, 1:].min(axis=1), crop, self.augmentation.scale
        )
        self._rows, self._cumulative = self._weigh()

    def _weigh(self) -> tuple[list[npt.NDArray[np.int64]], list[Reals]]:
        """Per level: the rows that can have it, and the running sum of weight x probability over them."""
        weights = self._images.weights()
        masses = weights[:, None] * level_probabilities(self._scales)
        rows = [np.flatnonzero(masses[:, level] > 0) for level in range(LEVELS)]
        cumulative = [np.cumsum(masses[rows[level], level]) for level in range(LEVELS)]
        if not any(len(of_level) for of_level in rows):
            raise SetupError(
                "no image of the training split has a positive sampling weight; see `pumit-data stats`"
            )
        return rows, cumulative

    @property
    def level_probabilities(self) -> Reals:
        """Marginal probability of each DA level: (6,)."""
        masses = np.array([running[-1] if len(running) else 0.0 for running in self._cumulative])
        probabilities: Reals = masses / masses.sum()
        return probabilities

    def plan(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """Slice `rank` of `world` of the global batch of a step >= 0; the slices are disjoint and cover it."""
        if world > self.batch_size:
            raise SetupError(f"a batch of {self.batch_size} crops cannot be shared by {world} processes")
        first, stop = _slice(self.batch_size, rank, world)
        level = self._level(step)
        crop_size = self.crop.size(level)
        u = uniforms(self.seed, Stream.SAMPLE, step, first, stop - first, _DRAWS)
        rows = _draw(self._cumulative[level], u[:, _Draw.IMAGE], self._rows[level])
        samples = self._samples(np.arange(first, stop), rows, level, crop_size, u)
        return BatchPlan(
            step=step, level=level, crop_size=crop_size, global_size=self.batch_size, samples=samples
        )

    def _level(self, step: int) -> int:
        u = uniforms(self.seed, Stream.LEVEL, step, 0, 1, 1)[:, 0]
        return int(_draw(np.cumsum(self.level_probabilities), u, np.arange(LEVELS))[0])

    def _samples(
        self,
        indices: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        level: int,
        crop_size: tuple[int, int, int],
        u: Reals,
    ) -> tuple[SamplePlan, ...]:
        config, scales = self.augmentation, self._scales.take(rows)
        depth_scale, in_plane_scale = draw_scales(
            scales, np.full(len(rows), level), u[:, [_Draw.SCALE_CASE, _Draw.SCALE_X, _Draw.SCALE_Z]]
        )
        scale = np.stack([depth_scale, in_plane_scale, in_plane_scale], axis=1)
        matrix = _matrices(config, scales, self._images.spacing[rows], scale, u)
        shape, size = self._images.shapes[rows], np.array(crop_size)
        centre = _centres(shape, size, scale, u[:, [_Draw.POSITION_Z, _Draw.POSITION_Y, _Draw.POSITION_X]])
        box = _boxes(shape, size, centre, matrix, self.crop.max_read_slices)
        return _sample_plans(
            index=indices,
            image=self._images.take(rows),
            box=box,
            centre=centre - box[:, :, 0],
            matrix=matrix,
            scale=scale,
            flips=u[:, [_Draw.FLIP_Z, _Draw.FLIP_Y, _Draw.FLIP_X]] < config.flip_p,
            **_intensities(config, u),
        )


class ValidationPlanner:
    """Held-out images in fixed batches: centre crops, nothing random, every image once.

    Batch `step` runs over 0 ... len - 1: by level, then dataset and key. The crop has the training size, so
    that the number of tokens fits; smaller images are padded evenly, as in the reference's validation.
    """

    def __init__(self, table: pa.Table, crop: CropGeometry, batch_size: int) -> None:
        """Args: table: catalog rows of the validation split. Raises SetupError as `BatchPlanner` does."""
        if batch_size < 1:
            raise SetupError(f"the batch size must be at least 1, got {batch_size}")
        self.crop = crop
        self._images = _Images(table, "validation")
        self._batches = [
            (level, rows[start : start + batch_size])
            for level in range(LEVELS)
            if len(rows := np.flatnonzero(self._images.levels == level))
            for start in range(0, len(rows), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def plan(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """Slice `rank` of `world` of a batch; of the last batch of a level, a slice may be empty."""
        level, rows = self._batches[step]
        first, stop = _slice(len(rows), rank, world)
        crop_size = self.crop.size(level)
        shape, size = self._images.shapes[rows[first:stop]], np.array(crop_size)
        start = np.where(shape >= size, shape // 2 - size // 2, -((size - shape) // 2))
        centre = start + (size - 1) / 2
        matrix = np.broadcast_to(np.eye(3), (stop - first, 3, 3))
        box = _boxes(shape, size, centre, matrix, self.crop.max_read_slices)
        samples = _sample_plans(
            index=np.arange(first, stop),
            image=self._images.take(rows[first:stop]),
            box=box,
            centre=centre - box[:, :, 0],
            matrix=matrix,
        )
        return BatchPlan(step=step, level=level, crop_size=crop_size, global_size=len(rows), samples=samples)


def visible_indices(
    seed: int, step: int, global_index: int, length: int, n_visible: int
) -> npt.NDArray[np.int64]:
    """Tokens that stay visible in masked image modelling: a uniform subset of 0 ... length - 1, ascending.

    Shape (n_visible,). A pure function of its arguments; `global_index` is `SamplePlan.index`.
    """
    if not 0 <= n_visible <= length:
        raise ValueError(f"cannot keep {n_visible} of {length} tokens visible")
    order = uniforms(seed, Stream.VISIBLE, step, global_index, 1, length)[0].argsort(kind="stable")
    return np.sort(order[:n_visible])


_DRAWS = 32
"""Random numbers set aside for each sample: more than are used, so that one more shifts none."""


class _Draw(IntEnum):
    """Columns of a sample's random numbers. Append only: the order is part of what a seed means."""

    IMAGE = 0
    SCALE_CASE = auto()
    SCALE_X = auto()
    SCALE_Z = auto()
    POSITION_Z = auto()
    POSITION_Y = auto()
    POSITION_X = auto()
    ROTATE = auto()
    ANGLE_Z = auto()
    ANGLE_Y = auto()
    ANGLE_X = auto()
    FLIP_Z = auto()
    FLIP_Y = auto()
    FLIP_X = auto()
    BRIGHTNESS = auto()
    BRIGHTNESS_VALUE = auto()
    SHIFT = auto()
    SHIFT_VALUE = auto()
    CONTRAST = auto()
    CONTRAST_VALUE = auto()
    GAMMA = auto()
    GAMMA_VALUE = auto()
    GAMMA_INVERTED = auto()


class _Images:
    """The catalog columns of one split that planning and reading need, in the order of (dataset, key)."""

    _COLUMNS = (
        *("dataset", "key", "split", "status", "sampling_weight", "da_level"),
        *("shape_c", "shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"),
        *("stored_dtype", "slope", "intercept", "window_low", "window_high"),
        *("shard_path", "shard_shape", "shard_index"),
    )

    def __init__(self, table: pa.Table, split: str) -> None:
        order = [("dataset", "ascending"), ("key", "ascending")]
        self._table = table.select(list(self._COLUMNS)).sort_by(order).combine_chunks()
        self._require(
            (self._column("split") == split) & (self._column("status") == "ingested"),
            f"is not an ingested image of the {split} split: give the planner the rows of that split only",
        )
        self._require(
            self._reals("window_low") < self._reals("window_high"),
            "has no usable intensity window (window_low < window_high): ingest it again, or leave it out",
        )
        self.shapes = np.stack([self._reals(f"shape_{axis}") for axis in "dhw"], axis=1).astype(np.int64)
        """(n, 3): D, H, W"""
        self.spacing = np.stack([self._reals(f"spacing_{axis}") for axis in "zyx"], axis=1)
        """(n, 3) mm: z, y, x; NaN for null"""
        self._require(
            np.isnan(self.spacing[:, 0]) | (self.spacing > 0).all(axis=1),
            "is 3-D and lacks a positive spacing: ingest it again, or leave it out",
        )
        self.levels = self._reals("da_level")
        """(n,): DA level without scaling"""
        self._require(
            np.isin(self.levels, range(LEVELS)), "has no DA level from 0 to 5: ingest it again, or leave it out"
        )

    def _column(self, name: str) -> npt.NDArray[Any]:
        """One column as an array; null becomes None or NaN."""
        return np.asarray(self._table[name].to_numpy())

    def weights(self) -> Reals:
        """Sampling weights (n,), checked."""
        weights = self._reals("sampling_weight")
        self._require(
            np.isfinite(weights) & (weights >= 0),
            "has no usable sampling weight (a number >= 0): ingest its dataset again, or check the mix",
        )
        return weights

    def take(self, rows: npt.NDArray[np.int64]) -> list[StoredImage]:
        """The images at some rows, in that order."""
        return [_stored_image(row) for row in self._table.take(pa.array(rows)).to_pylist()]

    def _reals(self, name: str) -> Reals:
        return self._column(name).astype(np.float64)

    def _require(self, good: npt.NDArray[np.bool_], problem: str) -> None:
        bad = np.flatnonzero(~good)
        if bad.size:
            row = self._table.slice(int(bad[0]), 1).to_pylist()[0]
            others = f" ({bad.size - 1} more like it)" if bad.size > 1 else ""
            raise SetupError(f"{row['dataset']}/{row['key']} {problem}{others}")


def _stored_image(row: dict[str, Any]) -> StoredImage:
    return StoredImage(
        dataset=row["dataset"],
        key=row["key"],
        shape=(row["shape_c"], row["shape_d"], row["shape_h"], row["shape_w"]),
        spacing=(row["spacing_z"], row["spacing_y"], row["spacing_x"]),
        dtype=row["stored_dtype"],
        slope=row["slope"],
        intercept=row["intercept"],
        window=(row["window_low"], row["window_high"]),
        shard_path=row["shard_path"],
        shard_shape=tuple(row["shard_shape"]),
        shard_index=row["shard_index"],
    )


def _slice(size: int, rank: int, world: int) -> tuple[int, int]:
    if not 0 <= rank < world:
        raise SetupError(f"the rank must be in 0 ... {world - 1}, got {rank}")
    return rank * size // world, (rank + 1) * size // world


def _draw(cumulative: Reals, u: Reals, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Values drawn with the probabilities whose running sum is `cumulative`."""
    index = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    # u * total may round up to total; entries of no mass at the end must not be reached by that.
    last = np.searchsorted(cumulative, cumulative[-1], side="left")
    drawn: npt.NDArray[np.int64] = values[np.minimum(index, last)]
    return drawn


def _matrices(config: AugmentationConfig, scales: ImageScales, spacing: Reals, scale: Reals, u: Reals) -> Reals:
    """Crop offsets to image offsets, in voxels: (n, 3, 3). Rotations are rigid in mm, whatever the spacing."""
    matrix = scale[:, :, None] * np.eye(3)
    rows = np.flatnonzero(u[:, _Draw.ROTATE] < config.rotate_p)
    out_of_plane = np.where(scales.nearly_isotropic[rows], config.rotate_out_of_plane_deg, 0.0)
    limits = np.stack([np.full(len(rows), config.rotate_in_plane_deg), out_of_plane, out_of_plane], axis=1)
    angles = np.radians(limits * (2 * u[rows][:, [_Draw.ANGLE_Z, _Draw.ANGLE_Y, _Draw.ANGLE_X]] - 1))
    # Without spacing (2-D) only the in-plane ratio matters, and it is taken as 1.
    mm = np.where(np.isnan(spacing[rows]), 1.0, spacing[rows])
    rotation = _rotation(angles)
    matrix[rows] = rotation / mm[:, :, None] * (mm * scale[rows])[:, None, :]
    return matrix


def _rotation(angles_zyx: Reals) -> Reals:
    """Rotation about x, then y, then z, by angles (n, 3) in radians: (n, 3, 3) acting on (z, y, x)."""
    total = np.broadcast_to(np.eye(3), (len(angles_zyx), 3, 3))
    for axis, (i, j) in enumerate(((1, 2), (0, 2), (0, 1))):
        one = np.zeros((len(angles_zyx), 3, 3))
        cos, sin = np.cos(angles_zyx[:, axis]), np.sin(angles_zyx[:, axis])
        one[:, axis, axis] = 1
        one[:, i, i], one[:, j, j] = cos, cos
        one[:, i, j], one[:, j, i] = -sin, sin
        total = total @ one
    return total


def _centres(shape: npt.NDArray[np.int64], size: npt.NDArray[np.int64], scale: Reals, u: Reals) -> Reals:
    """Centres of the crops in voxels of the image, (n, 3): uniform where the unrotated field of view fits.

    An unscaled axis starts at a whole voxel, so that an unscaled, unrotated crop is a plain slice. Along an
    axis shorter than the field of view the image is centred (the odd voxel of padding comes last).
    """
    field_of_view = scale * size
    slack = shape - field_of_view
    whole = np.where(slack >= 0, np.floor(u * (slack + 1)), np.ceil(slack / 2))
    free = np.where(slack >= 0, u * slack, slack / 2)
    start: Reals = np.where(scale == 1, whole, free)
    return start + (field_of_view - 1) / 2


def _boxes(
    shape: npt.NDArray[np.int64], size: npt.NDArray[np.int64], centre: Reals, matrix: Reals, max_slices: int
) -> npt.NDArray[np.int64]:
    """Voxels of the image that the crops interpolate between: (n, 3, 2) of start and stop."""
    reach = np.abs(matrix) @ ((size - 1) / 2)
    start = np.clip(np.floor(centre - reach), 0, None).astype(np.int64)
    stop = np.minimum(np.ceil(centre + reach) + 1, shape).astype(np.int64)
    # A crop rotated out of its plane would need far more slices than it has; its corners stay empty instead.
    limit = np.maximum(max_slices, np.ceil(np.abs(matrix[:, 0, 0]) * size[0]).astype(np.int64) + 2)
    middle = np.floor(centre[:, 0] + 0.5).astype(np.int64)
    first = np.clip(middle - limit // 2, start[:, 0], np.maximum(stop[:, 0] - limit, start[:, 0]))
    start[:, 0], stop[:, 0] = first, np.minimum(stop[:, 0], first + limit)
    return np.stack([start, stop], axis=2)


def _intensities(config: AugmentationConfig, u: Reals) -> dict[str, npt.NDArray[Any]]:
    """The intensity fields of `SamplePlan`, each (n,); neutral where not drawn."""

    def drawn(gate: _Draw, p: float, low: float, high: float, neutral: float) -> Reals:
        value: Reals = np.where(u[:, gate] < p, low + u[:, gate + 1] * (high - low), neutral)
        return value

    gamma = drawn(_Draw.GAMMA, config.gamma_p, *config.gamma, 1.0)
    bright = 1 - config.brightness, 1 + config.brightness
    return {
        "brightness": drawn(_Draw.BRIGHTNESS, config.brightness_p, *bright, 1.0),
        "shift": drawn(_Draw.SHIFT, config.shift_p, -config.shift, config.shift, 0.0),
        "contrast": drawn(_Draw.CONTRAST, config.contrast_p, *config.contrast, 1.0),
        "gamma": gamma,
        "gamma_inverted": (gamma != 1.0) & (u[:, _Draw.GAMMA_INVERTED] < 0.5),
    }


def _sample_plans(**columns: npt.NDArray[Any] | list[StoredImage]) -> tuple[SamplePlan, ...]:
    """One plan per row of the columns, which are named as the fields are."""
    rows = zip(*(_plain(column) for column in columns.values()), strict=True)
    return tuple(SamplePlan(**dict(zip(columns, row, strict=True))) for row in rows)


def _plain(column: npt.NDArray[Any] | list[StoredImage]) -> list[Any]:
    """Rows of an array of one to three axes as plain numbers and tuples."""
    if not isinstance(column, np.ndarray):
        return column
    rows = column.tolist()
    if column.ndim == 2:
        return [tuple(row) for row in rows]
    return [tuple(map(tuple, row)) for row in rows] if column.ndim == 3 else rows
