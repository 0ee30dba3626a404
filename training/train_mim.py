"""Masked image modelling, from top to bottom: the ViT predicts the tokens of patches it does not see.

Shape suffixes: B crops, C channels, D H W voxels, d h w tokens, L = d * h * w, V visible tokens, K codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from catalog.errors import SetupError
from catalog.manifest import digest_of
from catalog.store import Location
from training.augment import Crops, render
from training.config import MimRunConfig
from training.data import RunData, open_data
from training.flops import StepCounter, mim_counter
from training.loader import RawBatch
from training.mim import MaskedImageModel, mim_loss, n_visible, visible_mask
from training.models import build_mim
from training.optim import follow, learning_rate, mim_adamw, set_learning_rate
from training.parallel import passes, replicated, shard
from training.pictures import Row, caption, contact_sheet, hide, middle_slice
from training.plan import visible_indices
from training.pretrained import find_pretrained, load_tokenizer
from training.run import Run
from training.tokenizer import Tokenizer
from training.transfer import sent
from training.validation import Means, evaluating
from training.weights import load_weights
from training.world import World


def train(
    config: MimRunConfig,
    corpus: Location,
    run_dir: Path,
    resume: bool,
    licences: Mapping[str, str | None] | None = None,
    world: World = World(),  # noqa: B008 - an immutable constant
) -> dict[str, Any]:
    """Pre-train a ViT on the corpus at `corpus`; checkpoints, curves and pictures go to `run_dir`.

    `licences` as of `open_data`. Every process of the `world` calls.

    Returns first and last loss, images per second and the last validation, as written to summary.json.
    Raises SetupError (corpus, tokenizer, folder, resume, divergence) and TrainingInterrupted (SIGTERM, SIGINT).
    """
    # Input
    if config.tokenizer is None:
        raise SetupError(
            "the targets come from a trained tokenizer: run `pumit-train tokenizer` first and give its --run "
            "folder with --set tokenizer=PATH"
        )
    pretrained = find_pretrained(config.tokenizer)
    tokenizer = load_tokenizer(pretrained).eval().requires_grad_(False)
    data = open_data(corpus, config, licences)
    fingerprints = data.fingerprints | {"tokenizer": digest_of(pretrained / "model.safetensors")}
    with Run(run_dir, config, fingerprints=fingerprints, resume=resume, lock=data.lock, world=world) as run:
        networks = build(run, config, tokenizer)
        measured: dict[str, float] = {}
        loader = data.loader(config, run.first_step, run.world)
        run.take_meter = loader.take_meter
        for step, batch in zip(run.steps(), loader, strict=True):
            scalars = train_step(run, networks, config, step, batch)
            run.finish_step(step, scalars, networks.counter.work(batch.plan))

            if run.due(step, config.intervals.validate_every_steps):
                measured = validate(run, step, networks.model, networks.tokenizer, data, config)
            if run.due(step, config.intervals.save_every_steps):
                run.save(step + 1)
        last = config.steps - 1
        return run.summary(measured or validate(run, last, networks.model, networks.tokenizer, data, config))


@dataclass(frozen=True, eq=False)
class Networks:
    """What a step works with, on the run's device."""

    tokenizer: Tokenizer
    """Frozen."""
    model: MaskedImageModel
    optimizer: torch.optim.Optimizer
    average: MaskedImageModel | None
    """Moving average of the model's weights."""
    trained: nn.Module
    """`model`, to be called in training."""
    encode: Callable[[Tensor, int], Tensor]
    """Of the tokenizer, to be called in training."""
    counter: StepCounter


def build(run: Run, config: MimRunConfig, tokenizer: Tokenizer) -> Networks:
    """Make the networks, new or as of the checkpoint that the run goes on from."""
    tokenizer = tokenizer.to(run.device)
    model = build_mim(config, tokenizer.config.codebook_size)
    if config.initial_weights is not None:
        run.console.print(str(load_weights(model, config.initial_weights)))
    model = model.to(run.device)
    counter = mim_counter(config.data.batch_size, model, tokenizer)
    models: dict[str, nn.Module] = {"model": model}
    average = None
    if config.ema_decay is not None:
        average = models["ema"] = copy.deepcopy(model).requires_grad_(False)
    sharded = config.parallel == "fsdp" and run.world.size > 1
    if sharded:
        for network in (model, average):
            if network is not None:
                shard(network, network.vit.blocks)
    optimizer = mim_adamw(model, config.optim)
    run.restore(models, {"model": optimizer})
    return Networks(
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        average=average,
        trained=model if sharded else replicated(run.compiled(model), run.world),
        encode=run.compiled(tokenizer.encode),
        counter=counter,
    )


def train_step(
    run: Run, networks: Networks, config: MimRunConfig, step: int, batch: RawBatch
) -> dict[str, float | Tensor]:
    """Learn from a batch. Returns what is to be logged, on the device: the host waits for nothing here."""
    lr = learning_rate(step, config.steps, config.optim)
    set_learning_rate(networks.optimizer, lr)
    for part in passes(networks.trained, batch.split(config.data.accumulate)):
        crops = render(part, run.device)
        with torch.no_grad(), run.autocast():
            target_logits_BLK = networks.encode(2 * crops.voxels - 1, crops.level).flatten(1, 3)
        visible_BV = sent(draw_visible(config, part, target_logits_BLK.shape[1]), run.device)
        with run.autocast():
            logits_BLK = networks.trained(crops.voxels, crops.level, visible_BV)
        losses = mim_loss(logits_BLK, target_logits_BLK, visible_BV)
        run.backward(losses.loss, crops.keys, losses._asdict())
    means = run.update(networks.optimizer, config.optim.max_grad_norm)
    if networks.average is not None and config.ema_decay is not None:
        follow(networks.average, networks.model, config.ema_decay)
    return {"lr": lr, **means}


def validate(
    run: Run,
    step: int,
    model: MaskedImageModel,
    tokenizer: Tokenizer,
    data: RunData,
    config: MimRunConfig,
) -> dict[str, float]:
    """Measure predictions of hidden tokens under fixed masks, log them and draw the contact sheet.

    Loss, KL divergence and target entropy in nats, accuracies as shares of the hidden tokens.
    """
    means, rows = Means(), []
    with evaluating(model):
        for batch in data.validation:
            crops = render(batch, run.device)
            with run.autocast():
                target_logits_BdhwK = tokenizer.encode(2 * crops.voxels - 1, crops.level)
                target_logits_BLK = target_logits_BdhwK.flatten(1, 3)
                visible_BV = draw_visible(config, batch, target_logits_BLK.shape[1]).to(run.device)
                logits_BLK = model(crops.voxels, crops.level, visible_BV)
            means.add(len(crops.keys), mim_loss(logits_BLK, target_logits_BLK, visible_BV)._asdict())
            rows += picture_rows(data, crops, tokenizer, target_logits_BdhwK, logits_BLK, visible_BV)
    measured = {f"{data.validation_name}/{name}": value for name, value in means.result().items()}
    run.log(step, measured)
    if run.world.rank == 0:
        columns = ["input", "tokenizer", "masked", "prediction"]
        rows.sort(key=lambda row: row.caption)  # by modality, then DA level
        contact_sheet(run.picture_file(step), f"masked image modelling, step {step + 1}", columns, rows)
    return measured


def picture_rows(
    data: RunData,
    crops: Crops,
    tokenizer: Tokenizer,
    target_logits_BdhwK: Tensor,
    logits_BLK: Tensor,
    visible_BV: Tensor,
) -> list[Row]:
    """Each crop as it is, as the tokenizer restores it, masked, and with its hidden tokens predicted.

    The prediction's visible tokens are the tokenizer's, so that only what the ViT imagined differs.
    """
    visible_Bdhw = visible_mask(visible_BV, logits_BLK.shape[1]).view(target_logits_BdhwK.shape[:-1])
    p_BdhwK = target_logits_BdhwK.float().softmax(dim=-1)
    q_BdhwK = logits_BLK.float().softmax(dim=-1).view_as(p_BdhwK)
    restored, predicted = (
        tokenizer.decode(tokenizer.quantizer.mix(mixture), crops.level) / 2 + 0.5
        for mixture in (p_BdhwK, torch.where(visible_Bdhw[..., None], p_BdhwK, q_BdhwK))
    )
    rows = []
    for number, key in enumerate(crops.keys):
        panel = middle_slice(crops.voxels[number])
        depth, tokens = crops.voxels.shape[2], visible_Bdhw.shape[1]
        visible_hw = visible_Bdhw[number, depth // 2 * tokens // depth]
        panels = [panel, middle_slice(restored[number]), hide(panel, visible_hw)]
        rows.append(
            Row(caption(data.modalities[key], key, crops.level), [*panels, middle_slice(predicted[number])])
        )
    return rows


def draw_visible(config: MimRunConfig, batch: RawBatch, length: int) -> Tensor:
    """Which of `length` patch tokens each crop shows to the ViT: (B, V) int64 on the CPU, ascending.

    A function of seed, step and position in the global batch alone, so the same on any number of processes.
    """
    count = n_visible(length, config.model.mask_ratio)
    rows = [visible_indices(config.seed, batch.step, index, length, count) for index in batch.indices]
    return torch.from_numpy(np.stack(rows))
