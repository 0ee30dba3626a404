"""What limits the loader on this machine and these shards, measured with the loader itself.

The same steps are loaded three times: as they come, then without what the system's memory holds of their
shards, then with it. The difference is what the disk costs. What is left is CPU, which workers count by stage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from catalog.corpus import Corpus
from catalog.mix import load_mix
from catalog.remote import open_corpus
from catalog.sampling import CropGeometry
from catalog.selection import Selection
from catalog.store import Location
from shards.layout import METADATA_FILE, SHARD_FILE
from training.augment import render
from training.config import RunConfig
from training.data import Candidates, cache_of, plan_batches
from training.loader import RawBatch, make_loader
from training.meter import Work
from training.plan import BatchPlanner
from training.run import choose_device

Limit = Literal["disk", "network", "workers", "decoding", "augmentation"]

_SLOWER = 1.25
"""A disk that makes loading so many times slower limits it; less may be the noise of a machine in use."""
_BUSY = 0.6
"""Share of their time for which workers must compute, if computing and not waiting limits them."""
_RENDERED = 20
"""Batches that the augmentation is measured on."""


class Pass(NamedTuple):
    """Some steps, loaded once."""

    seconds: float
    """From the first batch to the last."""
    crops: int
    """After the first batch."""
    work: Work
    """Of all batches."""

    @property
    def rate(self) -> float:
        """Crops/s."""
        return self.crops / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured. Rates are crops/s, CPU times ms a crop."""

    place: str
    remote: bool
    cores: int
    workers: int
    batch_size: int
    steps: int
    """Loaded in each pass."""
    stored_rate: float
    """With voxels from the disk, or from the store and its cache as they were."""
    memory_rate: float
    """The same steps once more: of a folder, from the system's memory."""
    augment_rate: float
    """Of the crops on the device, one batch after the other."""
    device: str
    plan_ms: float
    decode_ms: float
    busy_share: float
    """Of the time of the reading processes, what they computed for, with voxels from the disk or the store."""
    disk_mb_per_s: float
    received_mb_per_s: float
    cached_mb_per_s: float
    cache_hit_share: float | None
    fast_codec: bool
    """Whether the shards have the codec that decodes fastest."""
    run_steps: int
    """Of the preset's whole run."""


class Verdict(NamedTuple):
    """What limits, how that is known, and what to change."""

    limit: Limit
    why: str
    change: list[str]


def measure(place: Location, config: RunConfig, *, workers: int, batch_size: int, seconds: float) -> Figures:
    """Run the loader of a configuration for some three times `seconds`.

    Raises SetupError as a training does: no corpus, no image to train on, a shard that cannot be read.
    """
    corpus = open_corpus(place)
    crop = CropGeometry(tokens_z=config.data.tokens_z, tokens_x=config.data.tokens_x)
    selection = Selection(corpus, load_mix(corpus, config.data.mix), dedup=config.data.dedup)
    planner = plan_batches(
        corpus, crop, batch_size, config.seed, Candidates(0), selection, config.least_overlap
    )

    def load(limit_seconds: float, steps: int) -> Pass:
        loader = make_loader(corpus, planner, 0, steps - 1, workers, cache=cache_of(config.data))
        began = first = 0.0
        crops = 0
        for batch in loader:
            now = time.perf_counter()
            if not first:
                began = first = now
            else:
                crops += len(batch.plan.samples)
            kept.append(batch) if len(kept) < _RENDERED else None
            if now - began > limit_seconds and batch.step > workers:
                break
        return Pass(time.perf_counter() - began, crops, loader.take_meter().work)

    kept: list[RawBatch] = []
    pilot = load(seconds, config.steps)
    steps = int(pilot.work.batches)
    if corpus.origin is None:
        _forget(_shard_files(corpus, planner, steps))
    stored = load(4 * seconds, steps) if corpus.origin is None else pilot
    again = load(4 * seconds, steps)
    device = choose_device("auto")
    work, processes = stored.work, max(workers, 1)
    computed = work.plan_seconds + work.decode_seconds
    chunks = work.cache_hits + work.cache_misses

    def per_second(count: float) -> float:
        return count / 1e6 / max(stored.seconds, 1e-9)

    return Figures(
        place=str(place),
        remote=corpus.origin is not None,
        cores=len(os.sched_getaffinity(0)),
        workers=workers,
        batch_size=batch_size,
        steps=steps,
        stored_rate=stored.rate,
        memory_rate=again.rate,
        augment_rate=_augment_rate(kept, device),
        device=str(device),
        plan_ms=1e3 * work.plan_seconds / work.crops,
        decode_ms=1e3 * work.decode_seconds / work.crops,
        busy_share=min(computed / (processes * max(stored.seconds, 1e-9)), 1.0),
        disk_mb_per_s=per_second(work.disk_bytes),
        received_mb_per_s=per_second(work.received_bytes),
        cached_mb_per_s=per_second(work.cached_bytes),
        cache_hit_share=work.cache_hits / chunks if chunks else None,
        fast_codec=_has_fast_codec(corpus, planner),
        run_steps=config.steps,
    )


def judge(figures: Figures) -> Verdict:
    """Which of the stages is the slowest, by the figures alone."""
    f = figures
    if f.augment_rate < f.stored_rate:
        where = "the CPU" if f.device == "cpu" else f.device
        return Verdict(
            "augmentation",
            f"{where} makes {f.augment_rate:.0f} crops/s of what the loader brings {f.stored_rate:.0f} of",
            ["train on a GPU: crops are made there, many times faster"]
            if f.device == "cpu"
            else ["nothing in the loader: its share of a step is what the augmentation takes"],
        )
    return judge_loader(figures)


def judge_loader(figures: Figures) -> Verdict:
    """As `judge`, of the stages before the augmentation."""
    f = figures
    if f.remote and f.busy_share < _BUSY:
        cache = ["keep what was read on a local disk: --cache FOLDER --cache-gb N"]
        more = [f"more workers wait at the same time: data.workers={2 * max(f.workers, 1)}"]
        near = ["run nearer to the store, or copy the corpus to a local disk"]
        why = f"workers compute for {f.busy_share:.0%} of their time and wait for the store for the rest"
        return Verdict("network", why, [*(cache if f.cache_hit_share is None else []), *more, *near])
    if not f.remote and f.memory_rate > _SLOWER * f.stored_rate:
        return Verdict(
            "disk",
            f"from memory the same steps come {f.memory_rate / f.stored_rate:.1f} times as fast",
            [
                f"more workers wait at the same time: data.workers={2 * max(f.workers, 1)}",
                "move the corpus to a faster disk, or to a machine whose memory holds it",
                "store fewer bytes: pumit-data repack --profile small",
            ],
        )
    if f.workers < f.cores:
        of = f"{f.workers} workers decode" if f.workers else "the training process itself decodes"
        return Verdict("workers", f"{of} where there are {f.cores} cores", [f"data.workers={f.cores}"])
    repack = ["decode faster: pumit-data repack --profile train"] if not f.fast_codec else []
    return Verdict(
        "decoding",
        f"{f.workers} workers keep {f.cores} cores busy, {f.decode_ms:.1f} ms a crop for decoding",
        [*repack, "more cores: each brings as much again"],
    )


def as_json(figures: Figures) -> dict[str, object]:
    """Figures and verdict, as `bench-loader --json` prints them."""
    return asdict(figures) | judge(figures)._asdict() | {"loader": judge_loader(figures)._asdict()}


def report(figures: Figures) -> Iterator[str]:
    """Lines for the terminal."""
    f, verdict, loader = figures, judge(figures), judge_loader(figures)
    yield f"{f.place}: {f.steps} steps of {f.batch_size} crops, {f.workers} workers, {f.cores} cores"
    if f.remote:
        received = f"{f.received_mb_per_s:.0f} MB/s received"
        yield f"  loader, from the store     {f.stored_rate:8.1f} crops/s   {received}"
        yield f"  loader, once more          {f.memory_rate:8.1f} crops/s"
    else:
        yield f"  loader, from the disk      {f.stored_rate:8.1f} crops/s   {f.disk_mb_per_s:.0f} MB/s read"
        yield f"  loader, from memory        {f.memory_rate:8.1f} crops/s"
    if f.cache_hit_share is not None:
        yield f"  chunks from the cache      {f.cache_hit_share:8.0%}           {f.cached_mb_per_s:.0f} MB/s"
    yield f"  augmentation on {f.device:10s} {f.augment_rate:8.1f} crops/s"
    stages = f"plan {f.plan_ms:.2f} ms, read and decode {f.decode_ms:.2f} ms"
    yield f"  CPU a crop: {stages}"
    yield f"Limit: {verdict.limit}. {verdict.why[0].upper()}{verdict.why[1:]}."
    yield from (f"  - {change}" for change in verdict.change)
    if verdict != loader:
        yield f"Behind that, the loader is limited by {loader.limit}: {loader.why}."
        yield from (f"  - {change}" for change in loader.change)
    rate = min(f.stored_rate, f.augment_rate)
    hours = f.run_steps * f.batch_size / max(rate, 1e-9) / 3600
    yield f"A step/s takes {f.batch_size} crops/s. At {rate:.0f} crops/s the preset's {f.run_steps:,} steps"
    yield f"get their data in {hours:,.1f} h: only GPUs that would need less than that wait."


def _augment_rate(batches: list[RawBatch], device: torch.device) -> float:
    render(batches[0], device)
    crops, began = 0, time.perf_counter()
    for batch in batches:
        crops += len(render(batch, device).keys)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return crops / max(time.perf_counter() - began, 1e-9)


def _shard_files(corpus: Corpus, planner: BatchPlanner, steps: int) -> set[Path]:
    plans = (planner.plan(step) for step in range(steps))
    return {corpus.shards_folder / s.image.shard_path / SHARD_FILE for plan in plans for s in plan.samples}


def _forget(files: set[Path]) -> None:
    """Let the system drop from memory what it has of some files, where it has such a call."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _has_fast_codec(corpus: Corpus, planner: BatchPlanner) -> bool:
    """Whether the first shard drawn has the codec of the profile `train`."""
    path = planner.plan(0).samples[0].image.shard_path
    content = json.loads((corpus.shards / path / METADATA_FILE).read_bytes())
    inner = content["codecs"][0]["configuration"]["codecs"]
    return any(codec.get("configuration", {}).get("cname") == "lz4hc" for codec in inner)
