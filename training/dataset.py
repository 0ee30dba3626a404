"""The batches of a prepared corpus for any training loop in PyTorch: augmented, in order, resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from catalog.errors import SetupError
from catalog.mix import load_mix
from catalog.query import catalog_fingerprint
from catalog.remote import open_corpus
from catalog.sampling import CropGeometry
from catalog.selection import Selection
from catalog.store import Location, RemotePath, location
from shards.cache import CacheConfig
from shards.remote import open_reader
from training.augment import render
from training.config import load_preset
from training.data import Candidates, plan_batches
from training.loader import RawBatch, read_steps, worker_context

Batch = dict[str, Any]


class PumitDataset(IterableDataset[Batch]):
    """The training batches of steps 0 ... steps - 1, each of one DA level and hence of one shape.

    A batch is a dict:

        image    (B, 3, D, H, W) float32 in [0, 1]; with `augment="device"` there is `raw` instead, a RawBatch,
                 of which `training.augment.render(batch["raw"], device)` makes the crops on the device
        spacing  (B, 3) float32, mm of a voxel of the crop along z, y, x; NaN where unknown (not with `raw`)
        level    DA level of all samples, 0 ... 5
        keys     `dataset/key` of each sample
        step     number of the step

    Batches follow from corpus, crop, batch size and seed alone: neither ranks nor workers change them. Give it
    to `DataLoader(dataset, batch_size=None, num_workers=W, multiprocessing_context="forkserver")`, or take
    `dataset.loader(W)`, which also has the state of the whole.
    """

    def __init__(
        self,
        place: str | Path | Location,
        crop: CropGeometry | str,
        batch_size: int,
        *,
        steps: int,
        seed: int = 0,
        augment: Literal["cpu", "device"] = "cpu",
        rank: int | None = None,
        world: int | None = None,
        mix: str = "all",
        dedup: bool = False,
        cache: CacheConfig | None = None,
    ) -> None:
        """Args:
            place: the corpus: a folder or URL.
            crop: its size, or the preset that has it: "tokenizer-paper", "mim-paper" ...
            batch_size: crops in a step over all ranks.
            steps: of the whole training; the dataset ends after them.
            rank, world: of this process among those that train together; by default asked of torch.distributed,
                then of RANK and WORLD_SIZE, when iteration begins.
            mix: name of a mix of the corpus, as `pumit-data mix list` shows it.
            dedup: of images that show the same, draw one.
            cache: keeps what was read of a corpus in a store on a disk of this machine.

        Raises SetupError if there is no such corpus, preset or mix, or no image to train on.
        """
        if steps < 1:
            raise SetupError(f"steps must be at least 1, got {steps}")
        self._crop = _crop_of(crop) if isinstance(crop, str) else crop
        corpus = open_corpus(place if isinstance(place, RemotePath) else location(place))
        self._corpus = corpus
        selection = Selection(corpus, load_mix(corpus, mix), dedup=dedup)
        self._planner = plan_batches(corpus, self._crop, batch_size, seed, Candidates(0), selection)
        self._reader = open_reader(corpus.shards, cache)
        self._augment = augment
        self._steps = steps
        self._rank, self._world = rank, world
        self._identity = {
            "catalog": catalog_fingerprint(corpus),
            **selection.fingerprints,
            "crop": [self._crop.tokens_z, self._crop.tokens_x],
            "batch_size": batch_size,
            "seed": seed,
        }
        self._start: dict[str, int] = {"step": 0, "workers": 0}
        self._position = self._start

    def __len__(self) -> int:
        """Steps of the whole training, wherever it goes on."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """The batches from where `load_state_dict` said; of a worker, its share of them."""
        start = self._start
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = start["step"] + number
        if start["workers"]:
            if start["workers"] != workers or not worker:
                raise SetupError(
                    f"this state is that of one of {start['workers']} workers: go on with as many, or save the "
                    "state of `dataset.loader(...)`, which fits any number"
                )
            first = start["step"]
        rank, world = self._rank_and_world()
        for raw in read_steps(self._reader, self._planner, range(first, self._steps, workers), rank, world):
            self._position = {"step": raw.step + workers, "workers": workers if worker else 0}
            yield self._made(raw)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the batch that was taken last in this process.

        Workers have states of their own, which only torchdata's StatefulDataLoader asks for; with a plain
        DataLoader that has workers take `state_after`.
        """
        return {**self._position, **self._identity}

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after a batch, whoever read it."""
        return {"step": int(batch["step"]) + 1, "workers": 0, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let iteration begin where a state was taken.

        Raises SetupError if that was of another corpus, crop, batch size or seed.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise SetupError(
                    f"this state is of another {name} ({state.get(name)!r}, here {value!r}): the batches would "
                    "not be those that were due"
                )
        self._start = self._position = {"step": int(state["step"]), "workers": int(state["workers"])}

    def loader(self, workers: int = 0, **options: Any) -> PumitLoader:
        """A DataLoader of these batches, with the state of the whole; `options` are DataLoader's."""
        return PumitLoader(self, workers, **options)

    def __getstate__(self) -> dict[str, Any]:
        # A worker knows nothing of the process group: it is told.
        rank, world = self._rank_and_world()
        return self.__dict__ | {"_rank": rank, "_world": world}

    def _rank_and_world(self) -> tuple[int, int]:
        if self._rank is not None and self._world is not None:
            return self._rank, self._world
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def _made(self, raw: RawBatch) -> Batch:
        told = {"level": raw.level, "keys": list(raw.keys), "step": raw.step}
        if self._augment == "device":
            return {"raw": raw, **told}
        crops = render(raw, torch.device("cpu"))
        return {"image": crops.voxels, "spacing": crops.spacing, **told}


class PumitLoader(DataLoader[Batch]):
    """A DataLoader that knows how far it is, whatever workers read ahead: for checkpoints, also Lightning's."""

    def __init__(self, dataset: PumitDataset, workers: int, **options: Any) -> None:
        if workers:
            options = {"multiprocessing_context": worker_context()} | options
        super().__init__(dataset, batch_size=None, num_workers=workers, **options)
        self._source = dataset
        self._state = dataset.state_dict()

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self._state = self._source.state_after(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """To go on after the batch that was taken last."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `PumitDataset.load_state_dict`."""
        self._source.load_state_dict(state)
        self._state = state


def _crop_of(preset: str) -> CropGeometry:
    kind, _, name = preset.partition("-")
    if kind not in ("tokenizer", "mim") or not name:
        raise SetupError(f"{preset!r} is no preset: give tokenizer-NAME or mim-NAME, as tokenizer-paper")
    data = (load_preset("tokenizer", name) if kind == "tokenizer" else load_preset("mim", name)).data
    return CropGeometry(tokens_z=data.tokens_z, tokens_x=data.tokens_x)
