"""Targets of masked image modelling, computed before the training that learns from them.

Which crop a step takes, and how it is augmented, follows from corpus, settings and step alone. So the tokenizer
can look at the crops of a run once, and any number of ViTs, of other sizes, rates or masks, learn from what it
said of them. Each crop takes tokens x codes numbers: worth it for small networks, whose steps the tokenizer
takes much of, and not for those of the paper.

    FOLDER/targets.json                  what decides which crops there are, and which tokens they get
    FOLDER/steps/00000012.safetensors    `logits` (B, L, K) of the whole batch of a step, as they were computed

Shape suffixes: B crops, L = d * h * w tokens in (z, y, x) order, K codes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from catalog.durable import remove_unfinished, replacing
from catalog.errors import SetupError
from catalog.manifest import digest_of
from catalog.store import Location
from training.augment import render
from training.claimed import claimed, differing
from training.config import MimRunConfig
from training.data import RunData, open_data
from training.flops import crop_tokens
from training.loader import RawBatch
from training.pretrained import find_pretrained, load_tokenizer
from training.run import autocast, choose_device, compiled
from training.tokenizer import Tokenizer
from training.world import World

FORMAT = "pumit-data targets"
VERSION = 1

Progress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and of how many."""

_IDENTITY, _STEPS, _LOGITS = "targets.json", "steps", "logits"
_NOT_OF_CROPS = {"workers", "accumulate", "cache_dir", "cache_gb"}
_LOOKED_AT = 1000
"""Steps that the size is estimated from."""


@dataclass(frozen=True)
class TargetWork:
    """Targets that are planned: `write` computes them."""

    config: MimRunConfig
    data: RunData
    tokenizer: Tokenizer
    identity: dict[str, Any]

    @property
    def bytes_expected(self) -> int:
        """Of all steps, about."""
        planner, steps = self.data.planner, self.config.steps
        levels = [planner.level(step) for step in range(0, steps, -(-steps // _LOOKED_AT))]
        tokens = sum(crop_tokens(planner.crop.size(level), level) for level in levels) / len(levels)
        width = 4 if self.config.precision == "fp32" else 2
        return round(steps * self.config.data.batch_size * tokens * self.tokenizer.config.codebook_size * width)

    def write(self, folder: Path, progress: Progress = lambda what, done, total: None) -> int:
        """Compute what `folder` does not have yet; the number of steps that were computed.

        Raises SetupError if the folder holds something else, the disk is too small, or an image cannot be read.
        """
        config, device = self.config, choose_device(self.config.device)
        with claimed(folder / _IDENTITY, self.identity, "targets"):
            steps = folder / _STEPS
            steps.mkdir(exist_ok=True)
            first = next((step for step in range(config.steps) if not _file(folder, step).exists()), None)
            if first is None:
                return 0
            remove_unfinished(_file(folder, first))
            share = (config.steps - first) / config.steps
            needed, free = share * self.bytes_expected, shutil.disk_usage(folder).free
            if needed > free:
                raise SetupError(
                    f"the targets of {config.steps - first} steps take about {needed / 1e9:.3g} GB, and "
                    f"{folder} has {free / 1e9:.3g} GB left. Ask for fewer steps, or train without targets."
                )
            encode = compiled(self.tokenizer.to(device).encode, config.compile)
            for step, batch in enumerate(self.data.loader(config, first, World()), first):
                crops = render(batch, device)
                with torch.no_grad(), autocast(device, config.precision):
                    logits_BLK = encode(2 * crops.voxels - 1, crops.level).flatten(1, 3)
                with replacing(_file(folder, step)) as temporary:
                    save_file({_LOGITS: logits_BLK.cpu().contiguous()}, temporary)
                progress("steps", step + 1, config.steps)
        return config.steps - first


def plan_targets(config: MimRunConfig, corpus: Location) -> TargetWork:
    """The targets of all steps of a run.

    Raises SetupError if there is no tokenizer or corpus, or the objective of the run needs no tokenizer.
    """
    if config.tokenizer is None:
        raise SetupError(
            "the targets come from a trained tokenizer: run `pumit-train tokenizer` first, and give its run "
            "folder with --tokenizer"
        )
    tokenizer = load_tokenizer(config.tokenizer).eval().requires_grad_(False)
    data = open_data(corpus, config)
    return TargetWork(config, data, tokenizer, _identity(config, data))


@dataclass(frozen=True)
class Targets:
    """The folder of targets that a run learns from."""

    folder: Path

    @classmethod
    def of(cls, folder: Path, config: MimRunConfig, data: RunData) -> Targets:
        """Raises SetupError if `folder` holds no targets, those of other crops, or of too few steps."""
        again = f"write them with `pumit-train targets --out {folder}` and the settings of this run"
        if not (folder / _IDENTITY).is_file():
            raise SetupError(f"{folder} holds no targets: {again}")
        changed = differing(folder / _IDENTITY, _identity(config, data))
        if changed:
            raise SetupError(
                f"the targets in {folder} differ from this run in: {', '.join(changed)}. Write others with "
                "`pumit-train targets --out` another folder and the settings of this run"
            )
        if not _file(folder, config.steps - 1).is_file():
            raise SetupError(f"{folder} has no targets of step {config.steps}, the last of this run: {again}")
        return cls(folder)

    def logits(self, part: RawBatch) -> Tensor:
        """Of the crops of `part`, (B, L, K) on the CPU. Raises SetupError if they cannot be read."""
        file = _file(self.folder, part.step)
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.get_slice(_LOGITS)[part.indices[0] : part.indices[-1] + 1]  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise SetupError(
                f"{file} cannot be read: {error}. Delete it and repeat `pumit-train targets`."
            ) from error


def _identity(config: MimRunConfig, data: RunData) -> dict[str, Any]:
    if config.tokenizer is None:
        raise SetupError("a run that learns from targets names the tokenizer that they are of: --tokenizer")
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": digest_of(find_pretrained(config.tokenizer) / "model.safetensors"),
        "seed": config.seed,
        "precision": config.precision,
        "data": config.data.model_dump(mode="json", exclude=_NOT_OF_CROPS),
        **data.fingerprints,
    }


def _file(folder: Path, step: int) -> Path:
    return folder / _STEPS / f"{step:08d}.safetensors"
