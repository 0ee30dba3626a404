"""Whole images as crops of the size that a ViT was trained on: which, where, and read in which batches.

An image is laid out in whole tokens from its first voxel. Along each axis as few tiles as cover it are spread
evenly, at whole tokens, so tiles may overlap but each has the same shape; an image smaller than a training crop
is one tile of its own size. Nothing is random, and every tile is a plain slice of the image.

Order is (z, y, x); N images, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from catalog.sampling import LEVELS, Reals
from catalog.spacing import MAX_DA_LEVEL
from training.images import Images
from training.plan import BatchPlan, SamplePlan
from training.vit import ViTConfig, token_voxels

Integers = npt.NDArray[np.int64]

_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def tile_starts(grid: int, tile: int) -> list[int]:
    """First tokens of the tiles along an axis of `grid` tokens: the fewest that cover it, spread evenly."""
    gaps = -(-grid // tile) - 1
    return [number * (grid - tile) // gaps for number in range(gaps + 1)] if gaps else [0]


def tile_shares(grid: int, tile: int) -> Reals:
    """1 / tiles that have a token, for each token along an axis: (grid,)."""
    tiles_at = np.zeros(grid)
    for start in tile_starts(grid, tile):
        tiles_at[start : start + tile] += 1
    return 1 / tiles_at


class Tiling:
    """How N images are cut."""

    def __init__(self, images: Images, rows: range, vit: ViTConfig) -> None:
        part = slice(rows.start, rows.stop)
        self.rows = rows
        """Those of the images in `Images`."""
        self.shape, _ = images.geometry(part)
        # As `training.extractor.level_of`: a single slice has no depth.
        self.levels = np.where(self.shape[:, 0] == 1, MAX_DA_LEVEL, images.levels[part].astype(np.int64))
        sizes = np.array([token_voxels(level, vit.patch) for level in range(LEVELS)])
        self.token: Integers = sizes[self.levels]
        """(N, 3): voxels of a token."""
        self.grid = -(-self.shape // self.token)
        """(N, 3): tokens of the image, the last ones perhaps padded."""
        trained = np.tile(np.array(vit.position_grid), (len(rows), 1))
        trained[self.levels == MAX_DA_LEVEL, 0] = 1  # slices are seen one by one
        self.tile = np.minimum(self.grid, trained)
        """(N, 3): tokens of a tile."""
        self.count: Integers = (-(-self.grid // self.tile)).prod(axis=1)
        """(N,): tiles of the image."""

    def starts(self, number: int) -> Integers:
        """First tokens (T, 3) of the tiles of image `number` of the N."""
        axes = zip(self.grid[number].tolist(), self.tile[number].tolist(), strict=True)
        return np.stack(np.meshgrid(*(tile_starts(*axis) for axis in axes), indexing="ij"), -1).reshape(-1, 3)

    def kinds(self) -> tuple[Integers, Integers]:
        """The levels and shapes of tiles that occur, (K, 4), and which of them each image has, (N,)."""
        kinds, kind = np.unique(np.column_stack([self.levels, self.tile]), axis=0, return_inverse=True)
        return kinds, kind.reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class TileBatch:
    """Tiles of one level and shape."""

    level: int
    tile: tuple[int, int, int]
    """Tokens of each."""
    numbers: Integers
    """(T,): which of the images of the part each is of."""
    starts: Integers
    """(T, 3): its first token."""


class TilePlanner:
    """The batches of some parts of a corpus's images, one part after the other.

    Of a part, tiles of one level and shape come together, and within these in the order of the images.
    """

    def __init__(self, images: Images, parts: Sequence[range], vit: ViTConfig, batch_size: int) -> None:
        self._images, self._parts, self._vit, self._batch_size = images, parts, vit, batch_size
        self._ends = np.cumsum([self._batch_count(part) for part in range(len(parts))])
        self._latest: tuple[int, Tiling, list[TileBatch]] | None = None

    def __len__(self) -> int:
        """Batches of all parts."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def steps(self, part: int) -> range:
        """The batches of a part."""
        return range(int(self._ends[part - 1]) if part else 0, int(self._ends[part]))

    def cut(self, part: int) -> tuple[Tiling, list[TileBatch]]:
        """How the images of a part are cut, and its batches."""
        if self._latest is None or self._latest[0] != part:
            self._latest = part, *self._cut(part)
        return self._latest[1:]

    def plan(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """Slice `rank` of `world` of a batch. A sample's index is the place of its tile in the batch."""
        part = int(np.searchsorted(self._ends, step, side="right"))
        tiling, batches = self.cut(part)
        batch = batches[step - self.steps(part).start]
        chosen = slice(rank * len(batch.numbers) // world, (rank + 1) * len(batch.numbers) // world)
        numbers = batch.numbers[chosen]
        size = np.array(batch.tile) * token_voxels(batch.level, self._vit.patch)
        first = batch.starts[chosen] * tiling.token[numbers]
        stop = np.minimum(first + size, tiling.shape[numbers])
        depth, height, width = size.tolist()
        centre = ((depth - 1) / 2, (height - 1) / 2, (width - 1) / 2)
        samples = tuple(
            SamplePlan(
                index=chosen.start + place,
                image=image,
                box=((z0, z1), (y0, y1), (x0, x1)),
                centre=centre,
                matrix=_IDENTITY,
            )
            for place, (image, (z0, y0, x0), (z1, y1, x1)) in enumerate(
                zip(self._images.take(numbers + tiling.rows.start), first.tolist(), stop.tolist(), strict=True)
            )
        )
        return BatchPlan(
            step=step,
            level=batch.level,
            crop_size=(depth, height, width),
            global_size=len(batch.numbers),
            samples=samples,
        )

    def _batch_count(self, part: int) -> int:
        tiling = Tiling(self._images, self._parts[part], self._vit)
        _, kind = tiling.kinds()
        tiles = np.bincount(kind, weights=tiling.count)
        return int(np.ceil(tiles / self._batch_size).sum())

    def _cut(self, part: int) -> tuple[Tiling, list[TileBatch]]:
        tiling = Tiling(self._images, self._parts[part], self._vit)
        kinds, kind = tiling.kinds()
        batches = []
        for number, (level, depth, height, width) in enumerate(kinds.tolist()):
            images = np.flatnonzero(kind == number)
            numbers = np.repeat(images, tiling.count[images])
            starts = np.concatenate([tiling.starts(image) for image in images.tolist()])
            for first in range(0, len(numbers), self._batch_size):
                piece = slice(first, first + self._batch_size)
                batches.append(TileBatch(level, (depth, height, width), numbers[piece], starts[piece]))
        return tiling, batches
