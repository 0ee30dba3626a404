"""What can be told of a run before its first step: schedules, data, tokenizer, disk, limits of the system."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from catalog.errors import SetupError
from catalog.lock import Difference, differences, read_lock
from catalog.query import read_batches, remedy_of
from catalog.schema import CATALOG_SCHEMA
from shards.check import problems_of_array
from training.augment import render
from training.config import RunConfig, TokenizerRunConfig
from training.data import RunData
from training.loader import BATCHES_WAITING
from training.plan import BatchPlan
from training.preflight.codes import FULL_SHARE, NARROW_SHARE, SHARDS_LOOKED_AT, Finding
from training.pretrained import find_pretrained, load_tokenizer, lock_of
from training.tokenizer import Tokenizer

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where PyTorch puts what processes share
_FILES_OF_A_WORKER, _FILES_OF_TRAINING = 24, 256
_SAME_IMAGES = ("voxels", "weights", "normalisation")
"""Changes of a corpus that leave the images what they were: codec, sampling weights, and how they were made."""


def check_schedules(config: RunConfig, processes: int) -> Iterator[Finding]:
    """Of the configuration alone: schedules of the learning rate, and the passes of a batch."""
    if isinstance(config, TokenizerRunConfig) and config.loss.gan_weight:
        warmup = config.discriminator.optim.warmup_steps
        if warmup >= config.steps:
            yield Finding(
                "schedule_too_long",
                f"discriminator.optim.warmup_steps is {warmup:,}, the run has {config.steps:,} steps",
            )
    crops = config.data.batch_size // processes
    if crops < config.data.accumulate:
        yield Finding(
            "batch_too_small",
            f"{processes} processes have {crops} crops each of data.batch_size {config.data.batch_size}, and "
            f"data.accumulate is {config.data.accumulate}",
        )


def check_validation(data: RunData) -> Iterator[Finding]:
    """Whether every modality that is trained on is measured on somebody held out."""
    if data.validation_name != "validation":
        yield Finding("no_validation", f"{data.corpus.root} holds out no image that was ingested")
        return
    missing = sorted(data.trained_modalities - set(data.modalities.values()))
    if missing:
        yield Finding("modality_not_validated", f"no image is measured on of {', '.join(missing)}")


def check_shards(data: RunData, plans: Iterable[BatchPlan]) -> Iterator[Finding]:
    """Whether the arrays that some batches need are, byte by byte, what the catalog says was written."""
    images = (sample.image for plan in plans for sample in plan.samples)
    arrays = dict(islice({image.shard_path: image for image in images}.items(), SHARDS_LOOKED_AT))
    columns = ["shard_path", "shard_index", "stored_bytes", "shard_sha256"]
    for dataset in sorted({image.dataset for image in arrays.values()}):
        wanted = pa.array([path for path, image in arrays.items() if image.dataset == dataset])
        rows = [
            row
            for table in read_batches(
                data.corpus.catalog_file(dataset), remedy_of(dataset), columns, schema=CATALOG_SCHEMA
            )
            for row in table.filter(pc.is_in(table["shard_path"], wanted)).to_pylist()
        ]
        for path in wanted.to_pylist():
            image, members = arrays[path], [row for row in rows if row["shard_path"] == path]
            is_pack = image.shard_index is not None
            stored: list[int | None] = [None] * (image.shard_shape[0] if is_pack else 1)
            for row in members:
                stored[row["shard_index"] if is_pack else 0] = row["stored_bytes"]
            problems, _ = problems_of_array(
                data.corpus.shards / path,
                image.shard_shape,
                image.dtype,
                is_pack=is_pack,
                stored_bytes=stored,
                sha256=members[0]["shard_sha256"],
            )
            if problems:
                yield Finding("shard_damaged", f"{image.dataset}/{image.key} ({path}): {'; '.join(problems)}")


def check_corpus_of(place: Path, lock: str, *, allowed: bool) -> Iterator[Finding]:
    """Whether the tokenizer at `place` was trained on the corpus of this lock, or, if `allowed`, on another."""
    text = lock_of(find_pretrained(place))
    if text is None:
        yield Finding("tokenizer_from_elsewhere", f"{place} does not say which corpus it was trained on")
        return
    then, now = read_lock(text, f"the lock of {place}"), read_lock(lock, "the lock of the corpus")
    changes = [one for one in differences(then, now) if one.dataset and one.what not in _SAME_IMAGES]
    if changes:
        code = "tokenizer_from_elsewhere" if allowed else "tokenizer_other_corpus"
        yield Finding(code, f"{place} was trained on another corpus: {_told(changes)}")


def _told(changes: list[Difference]) -> str:
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "; ".join(f"{one.dataset} {one.text}" for one in changes[:3]) + more


def open_tokenizer(place: Path | None) -> tuple[Path, Tokenizer]:
    """The tokenizer of a run of masked image modelling, frozen, and its place. SetupError if there is none."""
    if place is None:
        raise SetupError("no tokenizer is given")
    return place, load_tokenizer(place).eval().requires_grad_(False)


@torch.no_grad()
def check_codebook(tokenizer: Tokenizer, data: RunData, device: torch.device) -> Iterator[Finding]:
    """Whether the likeliest codes of validation images differ."""
    used: set[int] = set()
    tokens = 0
    for batch in data.validation:
        crops = render(batch, device)
        codes = tokenizer.encode(2 * crops.voxels - 1, crops.level).argmax(dim=-1)
        used |= set(codes.flatten().tolist())
        tokens += codes.numel()
    size = tokenizer.config.codebook_size
    told = f"{tokens:,} tokens of validation images have {len(used):,} of {size:,} codes"
    if len(used) == 1:
        yield Finding("codebook_collapsed", told)
    elif len(used) < NARROW_SHARE * size:
        yield Finding("codebook_narrow", told)


def check_disk(folder: Path, config: RunConfig, checkpoint_bytes: int) -> Iterator[Finding]:
    """Whether the folder is free, and the checkpoints of a run fit on its disk."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        yield Finding("run_folder_taken", f"{folder} exists already")
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free, needed = shutil.disk_usage(existing).free, kept_bytes(config, checkpoint_bytes)
    told = (
        f"{config.keep_checkpoints} checkpoints of {_size(checkpoint_bytes)}, and one being written, take "
        f"{_size(needed)}; {existing} has {_size(free)} free"
    )
    if needed > free:
        yield Finding("disk_too_small", told)
    elif needed > FULL_SHARE * free:
        yield Finding("disk_nearly_full", told)


def kept_bytes(config: RunConfig, checkpoint_bytes: int) -> int:
    """What the checkpoints of a run take at most: a new one is written before the oldest goes."""
    most = -(-config.steps // config.intervals.save_every_steps)
    return min(config.keep_checkpoints + 1, most) * checkpoint_bytes


def check_limits(config: RunConfig, batch_bytes: int, processes: int) -> Iterator[Finding]:
    """Room for the batches of one machine's workers on their way, `batch_bytes` each, and open files."""
    workers = config.data.workers
    if not workers:
        return
    needed, free = BATCHES_WAITING * workers * processes * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        yield Finding(
            "shm_too_small",
            f"{processes * workers} workers with {BATCHES_WAITING} batches of {_size(batch_bytes)} each take "
            f"up to {_size(needed)}; {SHARED_MEMORY} has {_size(free)} free",
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES_OF_TRAINING + _FILES_OF_A_WORKER * workers
    if limit != resource.RLIM_INFINITY and files > limit:
        yield Finding("open_files_low", f"the limit is {limit:,}; {workers} workers may take some {files:,}")


def _size(count: float) -> str:
    power = 2 if count < 1e9 else 3 if count < 1e12 else 4
    return f"{count / 1e3**power:,.1f} {('', '', 'MB', 'GB', 'TB')[power]}"
