"""Which crop of which image, transformed how: `plan(step)` is a pure function of (catalog, config, seed, step).

Nothing is read and nothing is consumed here. Every random number is addressed by (seed, step, global sample
index), so any step can be planned at once (exact resume), and every rank and worker plans its slice of the
same global batch. All samples of a batch have one DA level, hence one crop size.

Coordinates: voxel centres lie at integers, so an axis of n voxels spans [-0.5, n - 0.5]. Order is (z, y, x).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
from training.images import Images, StoredImage
from training.rng import Stream, uniforms
from training.shared import ArrayWriter, SharedArray

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
    views: int = 1
    """Crops of each image, which follow one another in `samples`."""


class Planner(Protocol):
    """What the loader needs: the batch of a step."""

    def plan(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """Slice `rank` of `world` of the step's global batch."""


class BatchPlanner:
    """Training batches: level by its marginal probability, then images and scales given the level.

    Images are drawn with replacement with probability proportional to `sampling_weight` and to their
    probability of the level. The order of rows does not matter.

    With `least_overlap`, every image gives two crops (`BatchPlan.views`). The first is the one it would give
    alone; the second has random numbers of its own, and lies so that the fields of view, before any rotation,
    have at least that share of the smaller one in common along each axis, to a voxel.

    Whatever grows with the number of images lies in shared memory without a name, which workers map.
    """

    def __init__(
        self,
        rows: pa.Table | Iterable[pa.Table],
        crop: CropGeometry,
        batch_size: int,
        seed: int,
        augmentation: AugmentationConfig | None = None,
        least_overlap: float | None = None,
    ) -> None:
        """Args:
            rows: catalog rows of the training split with IMAGE_COLUMNS, in any order; or several such tables
                in the order of (dataset, key), of which one is in memory at a time.
            batch_size: images in a step over all ranks, each of one crop or, with `least_overlap`, of two.
            least_overlap: share from 0 to 1.

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
        self.least_overlap = least_overlap
        self._images = Images([rows] if isinstance(rows, pa.Table) else rows, "train")
        self._draws = self._weigh()
        if not any(len(draw.rows) for draw in self._draws):
            raise SetupError(
                "no image of the training split has a positive sampling weight; see `pumit-data stats`, and "
                "`pumit-data mix show NAME` for what a mix leaves"
            )
        self._running = np.cumsum(self.level_probabilities)

    def _weigh(self) -> list[_LevelDraw]:
        """Per level: the rows that can have it, and the running sum of weight x probability over them."""
        number = np.min_scalar_type(len(self._images))
        writers = [(ArrayWriter(number), ArrayWriter(np.float64)) for _ in range(LEVELS)]
        totals = [0.0] * LEVELS
        pieces = [slice(start, start + _PIECE_ROWS) for start in range(0, len(self._images), _PIECE_ROWS)]
        with ThreadPoolExecutor(_WEIGHED_AT_ONCE) as pool:
            for first in range(0, len(pieces), _WEIGHED_AT_ONCE):
                together = pieces[first : first + _WEIGHED_AT_ONCE]
                for piece, masses in zip(together, pool.map(self._masses, together), strict=True):
                    for level, (rows, running) in enumerate(writers):
                        possible = np.flatnonzero(masses[:, level] > 0)
                        if possible.size:
                            rows.append(possible + piece.start)
                            sums = np.cumsum(np.append(totals[level], masses[possible, level]))[1:]
                            running.append(sums)
                            totals[level] = sums[-1]
        return [_LevelDraw(rows.finish(), running.finish()) for rows, running in writers]

    def _masses(self, piece: slice) -> Reals:
        """Weight x probability of each level: (n, 6)."""
        shape, spacing = self._images.geometry(piece)
        scales = image_scales(spacing, np.minimum(shape[:, 1], shape[:, 2]), self.crop, self.augmentation.scale)
        return self._images.weights(piece)[:, None] * level_probabilities(scales)

    @property
    def level_probabilities(self) -> Reals:
        """Marginal probability of each DA level: (6,)."""
        masses = np.array([draw.total for draw in self._draws])
        probabilities: Reals = masses / masses.sum()
        return probabilities

    def plan(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """Slice `rank` of `world` of the global batch of a step >= 0; the slices are disjoint and cover it."""
        if world > self.batch_size:
            raise SetupError(f"a batch of {self.batch_size} crops cannot be shared by {world} processes")
        first, stop = _slice(self.batch_size, rank, world)
        level = self.level(step)
        crop_size = self.crop.size(level)
        u = uniforms(self.seed, Stream.SAMPLE, step, first, stop - first, _DRAWS)
        rows = self._draws[level].draw(u[:, _Draw.IMAGE])
        samples = self._samples(np.arange(first, stop), rows, level, crop_size, u)
        views = 1
        if self.least_overlap is not None:
            views, v = 2, uniforms(self.seed, Stream.SECOND_VIEW, step, first, stop - first, _DRAWS)
            others = self._samples(np.arange(first, stop), rows, level, crop_size, v, beside=samples)
            samples = tuple(itertools.chain.from_iterable(zip(samples, others, strict=True)))
        return BatchPlan(
            step=step,
            level=level,
            crop_size=crop_size,
            global_size=self.batch_size,
            samples=samples,
            views=views,
        )

    def level(self, step: int) -> int:
        """DA level of a step."""
        u = uniforms(self.seed, Stream.LEVEL, step, 0, 1, 1)[:, 0]
        return int(_drawn(self._running, u)[0])

    def _samples(
        self,
        indices: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        level: int,
        crop_size: tuple[int, int, int],
        u: Reals,
        beside: tuple[SamplePlan, ...] = (),
    ) -> tuple[SamplePlan, ...]:
        """One crop of each of n images, from the random numbers (n, _DRAWS); those `beside` are overlapped."""
        config, (shape, spacing) = self.augmentation, self._images.geometry(rows)
        scales = image_scales(spacing, np.minimum(shape[:, 1], shape[:, 2]), self.crop, config.scale)
        depth_scale, in_plane_scale = draw_scales(
            scales, np.full(len(rows), level), u[:, [_Draw.SCALE_CASE, _Draw.SCALE_X, _Draw.SCALE_Z]]
        )
        scale = np.stack([depth_scale, in_plane_scale, in_plane_scale], axis=1)
        matrix = _matrices(config, scales, spacing, scale, u)
        size = np.array(crop_size)
        lowest, highest = np.zeros_like(scale), shape - scale * size
        if beside and self.least_overlap is not None:
            nearest, farthest = _starts_beside(beside, size, scale, self.least_overlap)
            lowest, highest = np.maximum(lowest, nearest), np.minimum(highest, farthest)
        position = u[:, [_Draw.POSITION_Z, _Draw.POSITION_Y, _Draw.POSITION_X]]
        centre = _centres(shape, size, scale, lowest, highest, position)
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
        self._images = Images([table], "validation")
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
        (shape, _), size = self._images.geometry(rows[first:stop]), np.array(crop_size)
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


_PIECE_ROWS = 1 << 14
"""Images weighed in one go: few enough for a processor's cache."""

_WEIGHED_AT_ONCE = 8
"""Pieces of so many images in as many threads: more would wait for the sums, which are made in order."""

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


def _slice(size: int, rank: int, world: int) -> tuple[int, int]:
    if not 0 <= rank < world:
        raise SetupError(f"the rank must be in 0 ... {world - 1}, got {rank}")
    return rank * size // world, (rank + 1) * size // world


@dataclass(frozen=True, slots=True)
class _LevelDraw:
    """Images drawn in proportion to how often they have a level."""

    rows: SharedArray
    """Those that can have it."""
    running: SharedArray
    """The running sum of their masses."""

    @property
    def total(self) -> float:
        return float(self.running.values[-1]) if len(self.running) else 0.0

    def draw(self, u: Reals) -> npt.NDArray[np.int64]:
        """One row for each number in [0, 1)."""
        rows: npt.NDArray[np.int64] = self.rows.values[_drawn(self.running.values, u)].astype(np.int64)
        return rows


def _drawn(running: Reals, u: Reals) -> npt.NDArray[np.int64]:
    """Indices drawn with the probabilities whose running sum is given. Two dozen steps for ten million."""
    index = np.searchsorted(running, u * running[-1], side="right")
    # u * total may round up to total; entries of no mass at the end must not be reached by that.
    drawn: npt.NDArray[np.int64] = np.minimum(index, np.searchsorted(running, running[-1], side="left"))
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


def overlap(one: SamplePlan, other: SamplePlan, size: tuple[int, int, int]) -> float:
    """Share of the smaller field of view that two crops of an image, of `size` voxels, have in common.

    Of fields of view as they lie before rotation, by volume; padding outside the image counts.
    """
    centres = np.array([_in_image(crop) for crop in (one, other)])
    fields = np.array([one.scale, other.scale]) * size
    start, stop = (centres - fields / 2).max(axis=0), (centres + fields / 2).min(axis=0)
    return float(np.prod(np.clip(stop - start, 0, None) / fields.min(axis=0)))


def _in_image(crop: SamplePlan) -> list[float]:
    """Centre of a crop in voxels of its image."""
    return [at + first for at, (first, _) in zip(crop.centre, crop.box, strict=True)]


def _starts_beside(
    beside: tuple[SamplePlan, ...], size: npt.NDArray[np.int64], scale: Reals, share: float
) -> tuple[Reals, Reals]:
    """First and last start of crops that have `share` of the smaller field of view in common with others."""
    others = np.array([crop.scale for crop in beside]) * size
    middle = np.array([_in_image(crop) for crop in beside])
    fields = scale * size
    reach = (others + fields) / 2 - share * np.minimum(others, fields)
    start = middle - (fields - 1) / 2
    return start - reach, start + reach


def _centres(
    shape: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
    scale: Reals,
    lowest: Reals,
    highest: Reals,
    u: Reals,
) -> Reals:
    """Centres of the crops in voxels of the image, (n, 3): fields of view start from `lowest` to `highest`.

    An unscaled axis starts at a whole voxel, so that an unscaled, unrotated crop is a plain slice. Along an
    axis shorter than the field of view the image is centred (the odd voxel of padding comes last).
    """
    field_of_view = scale * size
    slack = shape - field_of_view
    # Where no whole voxel lies between, the next one below is as near as whole voxels come.
    last = np.floor(highest)
    first = np.minimum(np.ceil(lowest), last)
    whole = np.where(slack >= 0, first + np.floor(u * (last - first + 1)), np.ceil(slack / 2))
    free = np.where(slack >= 0, lowest + u * (highest - lowest), slack / 2)
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
    if column.ndim == 1:
        values: list[Any] = column.tolist()
        return values
    # Transposed first, so that one `zip` makes the tuples of all rows.
    axes = [_plain(column[:, axis]) for axis in range(column.shape[1])]
    return list(zip(*axes, strict=True))
