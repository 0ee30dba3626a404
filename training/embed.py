"""Features of a corpus's images by a trained ViT: one vector for an image, or one for each of its tokens too.

The whole image is seen, in tiles of the size that the ViT was trained on (`training.tiles`). The vector of the
class token is the mean over tiles. A patch token seen in several tiles is the mean of these, and the mean over
patch tokens counts each place of the image once.

Images are done in parts, which are the same however often the work is interrupted, and whatever the number of
workers. An image that cannot be read is left out and told.

Shape suffixes: B tiles, C features, d, h, w tokens of a tile, N images of a part, T their tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.manifest import digest_of
from catalog.mix import load_mix
from catalog.query import catalog_fingerprint
from catalog.remote import open_corpus
from catalog.selection import Selection
from catalog.store import Location, StoreError
from shards.remote import Reader, open_reader
from training.augment import render
from training.data import ingested_tables
from training.extractor import ViTBackbone
from training.feature_store import Failure, open_store
from training.images import Images, is_text
from training.loader import RawBatch, make_loader, read_batch
from training.plan import SamplePlan
from training.pretrained import find_pretrained, load_vit, weights_file
from training.tiles import TileBatch, TilePlanner, Tiling, tile_shares
from training.validation import evaluating

Split = Literal["train", "validation"]
Level = Literal["class", "tokens"]
Number = Literal["float16", "float32"]
Precision = Literal["fp32", "bf16"]
Progress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and of how many."""

_PARTS = 256
"""How many parts a corpus is done in, so that little is lost when the work stops, ..."""
_LEAST_TILES = 64
"""... unless they were smaller than this, ..."""
_MOST_BYTES = 256 << 20
"""... or took more memory than this."""
_PIECE_ROWS = 1 << 16

_NAMES = ("dataset", "key", "modality", "split")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Which features of which images."""

    mix: str = "all"
    """A mix of the corpus: images that it leaves out are not looked at."""
    where: str | None = None
    """Only images for which this condition in SQL holds."""
    split: Split | None = None
    """Only images of this split; None takes both."""
    level: Level = "class"
    """With tokens, also a vector for each patch token."""
    number: Number = "float16"
    """How features are stored."""
    precision: Precision = "fp32"
    """How they are computed."""


@dataclass(frozen=True)
class Embedding:
    """Work that is planned: `write` does it."""

    config: EmbeddingConfig
    backbone: ViTBackbone
    corpus: Corpus
    images: Images
    names: pa.Table
    """dataset, key, modality and split of each of the images."""
    parts: list[range]
    """Rows of the images that are done together."""
    identity: dict[str, Any]
    """What decides which features come out, and how much that is."""

    def write(
        self,
        folder: Path,
        device: torch.device,
        *,
        batch_size: int,
        workers: int,
        progress: Progress = lambda what, done, total: None,
    ) -> dict[str, Any]:
        """Compute what `folder` does not have yet, and write it there; what it then has, as plain data.

        `batch_size` counts tiles. Raises SetupError if the folder holds something else, a store does not
        answer, or the device has too little memory.
        """
        self.backbone.to(device)
        with open_store(folder, self.identity, len(self.parts)) as store:
            missing = store.missing()
            done = len(self.images) - sum(len(self.parts[part]) for part in missing)
            progress("images", done, len(self.images))
            for part, features in self._computed(missing, device, batch_size, workers):
                store.write(part, *features.finish(self.names, self.config.number))
                done += len(self.parts[part])
                progress("images", done, len(self.images))
            return store.finish()

    def _computed(
        self, missing: list[int], device: torch.device, batch_size: int, workers: int
    ) -> Iterator[tuple[int, _PartFeatures]]:
        """The features of these parts, in order."""
        while missing:
            parts = [self.parts[part] for part in missing]
            planner = TilePlanner(self.images, parts, self.backbone.vit.config, batch_size)
            loader = make_loader(self.corpus, planner, 0, len(planner) - 1, workers)
            batches = iter(loader)
            for place, part in enumerate(missing):
                expected = itertools.islice(batches, len(planner.steps(place)))
                try:
                    features = self._features(planner, place, expected, device)
                except SetupError:
                    break  # a loader ends with the first image that cannot be read
                yield part, features
            else:
                return
            unreadable: dict[int, str] = {}
            readable = _readable(open_reader(self.corpus.shards), planner, place, unreadable)
            features = self._features(planner, place, readable, device)
            features.unreadable = unreadable
            yield part, features
            missing = missing[place + 1 :]

    def _features(
        self, planner: TilePlanner, part: int, batches: Iterable[RawBatch], device: torch.device
    ) -> _PartFeatures:
        tiling, tiles = planner.cut(part)
        features = _PartFeatures(tiling, self.backbone.channels, self.config.level == "tokens")
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        try:
            with evaluating(self.backbone), autocast:
                for raw, batch in zip(batches, tiles, strict=True):
                    if raw.indices:
                        found = self.backbone.features_at(render(raw, device).voxels, raw.level)
                        features.add(batch, np.array(raw.indices), found.whole, found.stages[-1])
        except torch.OutOfMemoryError as error:
            raise SetupError("the device has too little memory: lower --batch-size, and go on") from error
        return features


def plan_embedding(place: Location, model: str | Path, config: EmbeddingConfig) -> Embedding:
    """What is to be done to embed the images of a corpus with the ViT at `model` (a place of `load_vit`).

    Raises SetupError if there is no such corpus, model or mix, the condition is wrong, or no image is left.
    """
    corpus = open_corpus(place)
    weights = find_pretrained(model)
    vit = load_vit(weights)
    backbone = ViTBackbone(vit.vit, (vit.vit.config.depth,))
    mix = load_mix(corpus, config.mix)
    if config.where is not None:
        both = config.where if mix.where is None else f"({mix.where}) AND ({config.where})"
        mix = mix.model_copy(update={"where": both})
    selection = Selection(corpus, mix)
    names: list[pa.Table] = []
    images = Images(_of_split(ingested_tables(corpus, selection), config.split, names), _ANY_SPLIT)
    if not len(images):
        raise SetupError(
            f"no image of {corpus.place} is left to embed: `pumit-data stats` shows what there is, and --mix, "
            "--where and --split leave out"
        )
    parts, tiles = _parts(images, backbone, config.level)
    identity = {
        "model": {
            "sha256": digest_of(weights_file(weights)),
            "config": backbone.vit.config.model_dump(mode="json"),
        },
        "corpus": {"catalog": catalog_fingerprint(corpus), **selection.fingerprints},
        **asdict(config),
        "images": len(images),
        "tiles_by_da_level": {str(level): tiles[level] for level in sorted(tiles)},
        "parts": len(parts),
    }
    return Embedding(config, backbone, corpus, images, pa.concat_tables(names), parts, identity)


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """What there is, or is to be done, in words."""
    tiles = summary["tiles_by_da_level"]
    of_levels = ", ".join(f"{count:,} of level {level}" for level, count in tiles.items())
    channels = summary["model"]["config"]["dim"]
    lines = [
        f"{summary['images']:,} images in {sum(tiles.values()):,} tiles ({of_levels}); "
        f"{channels} features, {summary['number']}; {summary['parts']} parts"
    ]
    if "embedded" in summary:
        lines.append(f"Embedded: {summary['embedded']:,}. Failed: {summary['failed']:,}.")
    lines += [f"  {one['dataset']}/{one['key']}: {one['message']}" for one in summary.get("failed_images", ())]
    return lines


_ANY_SPLIT = "any"


def _of_split(tables: Iterator[pa.Table], split: Split | None, names: list[pa.Table]) -> Iterator[pa.Table]:
    """The rows of a split; their names are appended to `names`, and their splits called _ANY_SPLIT."""
    for table in tables:
        if split is not None:
            table = table.filter(pa.array(is_text(table["split"], split)))
        names.append(table.select(_NAMES).cast(pa.schema([(name, pa.string()) for name in _NAMES])))
        same = pa.array([_ANY_SPLIT] * table.num_rows, pa.string())
        yield table.set_column(table.column_names.index("split"), "split", same)


def _parts(images: Images, backbone: ViTBackbone, level: Level) -> tuple[list[range], Counter[int]]:
    """Rows that are done together, and how many tiles of each DA level there are."""
    tiles, tokens = [], []
    by_level: Counter[int] = Counter()
    for start in range(0, len(images), _PIECE_ROWS):
        rows = range(start, min(start + _PIECE_ROWS, len(images)))
        tiling = Tiling(images, rows, backbone.vit.config)
        tiles.append(tiling.count)
        tokens.append(tiling.grid.prod(axis=1))
        for one in np.unique(tiling.levels).tolist():
            by_level[one] += int(tiling.count[tiling.levels == one].sum())
    tiles_N = np.concatenate(tiles)
    vectors_N = 2 + (np.concatenate(tokens) if level == "tokens" else 0 * tiles_N)
    least = max(-(-int(tiles_N.sum()) // _PARTS), _LEAST_TILES)
    most = max(_MOST_BYTES // (4 * backbone.channels), 1)
    # Images stay whole: a part begins where the sum over those before passes another multiple.
    numbers = [(np.cumsum(each) - each) // size for each, size in ((tiles_N, least), (vectors_N, most))]
    new = np.any([np.diff(number) > 0 for number in numbers], axis=0)
    edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(images)]
    return [range(*pair) for pair in itertools.pairwise(edges)], by_level


def _readable(
    reader: Reader, planner: TilePlanner, part: int, unreadable: dict[int, str]
) -> Iterator[RawBatch]:
    """The batches of a part without what cannot be read; why, by number of the image, goes to `unreadable`.

    Raises SetupError if a store does not answer: then it is not for the image.
    """
    _, tiles = planner.cut(part)
    for step, batch in zip(planner.steps(part), tiles, strict=True):
        plan = planner.plan(step)
        kept: list[SamplePlan] = []
        for sample in plan.samples:
            try:
                read_batch(reader, replace(plan, samples=(sample,)))
                kept.append(sample)
            except SetupError as error:
                if isinstance(error.__cause__, StoreError):
                    raise
                unreadable[int(batch.numbers[sample.index])] = str(error)
        yield read_batch(reader, replace(plan, samples=tuple(kept)))


class _PartFeatures:
    """Sums over tiles."""

    def __init__(self, tiling: Tiling, channels: int, with_tokens: bool) -> None:
        self._tiling = tiling
        self._shape = len(tiling.rows), channels
        self._whole_NC = np.zeros(self._shape, np.float32)
        self._patches_NC = np.zeros(self._shape, np.float32)
        self._tokens_N = tiling.grid.prod(axis=1)
        self._first_N = np.cumsum(self._tokens_N) - self._tokens_N
        self._tokens_TC = np.zeros((int(self._tokens_N.sum()), channels), np.float32) if with_tokens else None
        self.unreadable: dict[int, str] = {}
        """Why, by the number of the image."""

    def add(
        self, batch: TileBatch, places: npt.NDArray[np.int64], whole_BC: Tensor, patches_BCdhw: Tensor
    ) -> None:
        """Count the tiles at these `places` of a batch."""
        numbers_B, starts_B3 = batch.numbers[places], batch.starts[places]
        shares_Bdhw = np.stack([self._shares(*at) for at in zip(numbers_B, starts_B3, strict=True)])
        shares = torch.from_numpy(shares_Bdhw).to(patches_BCdhw.device)
        weighted_BCdhw = patches_BCdhw.float() * shares[:, None]
        np.add.at(self._whole_NC, numbers_B, whole_BC.float().cpu().numpy())
        np.add.at(self._patches_NC, numbers_B, weighted_BCdhw.sum(dim=(2, 3, 4)).cpu().numpy())
        if self._tokens_TC is not None:
            tiles = weighted_BCdhw.permute(0, 2, 3, 4, 1).cpu().numpy()
            for number, start, tile_dhwC in zip(numbers_B, starts_B3, tiles, strict=True):
                first, grid = self._first_N[number], self._tiling.grid[number]
                image = self._tokens_TC[first : first + self._tokens_N[number]].reshape(*grid, -1)
                image[_window(start, tile_dhwC.shape)] += tile_dhwC

    def finish(
        self, names: pa.Table, number: Number
    ) -> tuple[pa.Table, npt.NDArray[Any] | None, list[Failure]]:
        """The rows of the images, the patch tokens (T, C) if they were kept, and what failed."""
        kind, tiling = np.dtype(number), self._tiling
        with np.errstate(over="ignore"):
            class_NC = (self._whole_NC / tiling.count[:, None]).astype(kind)
            mean_NC = (self._patches_NC / self._tokens_N[:, None]).astype(kind)
        finite_N = np.isfinite(class_NC).all(axis=1) & np.isfinite(mean_NC).all(axis=1)
        rows = names.slice(tiling.rows.start, len(tiling.rows))
        failures = []
        good_N = finite_N.copy()
        for one in sorted(self.unreadable.keys() | set(np.flatnonzero(~finite_N).tolist())):
            reason = "unreadable" if one in self.unreadable else "not_finite"
            message = self.unreadable.get(one, f"a feature is not a finite number in {number}")
            dataset, key = (rows[name][one].as_py() for name in ("dataset", "key"))
            failures.append(Failure(dataset, key, reason, message))
            good_N[one] = False
        columns = {
            "da_level": pa.array(tiling.levels, pa.int8()),
            "tiles": pa.array(tiling.count, pa.int32()),
            "class_token": _vectors(class_NC),
            "patch_mean": _vectors(mean_NC),
        }
        tokens_TC = None
        if self._tokens_TC is not None:
            kept_N = np.where(good_N, self._tokens_N, 0)
            columns["grid"] = _vectors(tiling.grid.astype(np.int32))
            columns["tokens_first"] = pa.array(np.cumsum(kept_N) - kept_N, pa.int64())
            tokens_TC = self._tokens_TC[np.repeat(good_N, self._tokens_N)].astype(kind)
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        return rows.filter(pa.array(good_N)), tokens_TC, failures

    def _shares(self, number: int, start: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What each token of a tile counts, (d, h, w)."""
        grid, tile = self._tiling.grid[number].tolist(), self._tiling.tile[number].tolist()
        z, y, x = (
            tile_shares(tokens, size)[first : first + size]
            for tokens, size, first in zip(grid, tile, start.tolist(), strict=True)
        )
        shares: npt.NDArray[np.float32] = (z[:, None, None] * y[:, None] * x).astype(np.float32)
        return shares


def _window(start: npt.NDArray[np.int64], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start.tolist(), shape, strict=False))


def _vectors(rows: npt.NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
