"""The pre-training of a ViT, from top to bottom, whatever it learns: masked tokens, or one of `objectives`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from catalog.store import Location
from training.config import MimRunConfig, ObjectiveName
from training.data import RunData, open_data
from training.flops import StepCounter
from training.loader import RawBatch
from training.mim import MaskedImageModel, NormalisedViT
from training.objectives import contrastive, distillation, pixel, tokens
from training.objectives.objective import Objective, Recipe
from training.optim import follow, learning_rate, mim_adamw, set_learning_rate
from training.parallel import passes, replicated, shard
from training.probe import Probe
from training.run import Run
from training.weights import load_weights
from training.world import World

_RECIPES: dict[ObjectiveName, Callable[[MimRunConfig], Recipe[Any]]] = {
    "tokens": tokens.recipe,
    "pixels": pixel.recipe,
    "contrastive": contrastive.recipe,
    "distillation": distillation.recipe,
}


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

    Returns first and last loss, images per second, the last validation and the last probes, as written to
    summary.json. Raises SetupError (corpus, tokenizer, folder, resume, divergence) and TrainingInterrupted
    (SIGTERM, SIGINT).
    """
    # Input
    recipe = _RECIPES[config.objective](config)
    data = open_data(corpus, config, licences)
    fingerprints = {**data.fingerprints, **recipe.fingerprints}
    with Run(run_dir, config, fingerprints=fingerprints, resume=resume, lock=data.lock, world=world) as run:
        networks = build(run, config, recipe, data)
        objective, probe = networks.objective, Probe.of(run, config, data, networks.objective.encoder)
        run.restore(networks.models, {"model": networks.optimizer})
        measured: dict[str, float] = {}
        loader = data.loader(config, run.first_step, run.world)
        run.take_meter = loader.take_meter
        for step, batch in zip(run.steps(), loader, strict=True):
            scalars = train_step(run, networks, config, step, batch)
            run.finish_step(step, scalars, networks.counter.work(batch.plan) if networks.counter else None)

            if run.due(step, config.intervals.validate_every_steps):
                measured |= objective.validate(step)
            if probe is not None and run.due(step, probe.every_steps):
                measured |= probe.measure(step)
            if run.due(step, config.intervals.save_every_steps):
                run.save(step + 1)
        if not measured:  # resumed after its last step
            measured = objective.validate(config.steps - 1) | (probe.measure(config.steps - 1) if probe else {})
        return run.summary(measured | (probe.baselines if probe else {}))


@dataclass(frozen=True, eq=False)
class Networks:
    """What a step works with, on the run's device."""

    objective: Objective
    model: NormalisedViT
    optimizer: torch.optim.Optimizer
    average: NormalisedViT | None
    """Moving average of the model's weights."""
    trained: nn.Module
    """`model`, to be called in training."""
    models: Mapping[str, nn.Module]
    """All that belongs into a checkpoint, by file name."""
    counter: StepCounter | None


def build(run: Run, config: MimRunConfig, recipe: Recipe[Any], data: RunData) -> Networks:
    """Make the networks, with new weights or the initial ones that the configuration names."""
    model = recipe.build()
    if config.initial_weights is not None:
        filled = model if isinstance(model, MaskedImageModel) else model.vit
        run.console.print(str(load_weights(filled, config.initial_weights)))
    model = model.to(run.device)
    objective = recipe.begin(run, data, model)
    counter = None if recipe.counter is None else recipe.counter(model)
    models: dict[str, nn.Module] = {"model": model, **objective.companions}
    average = None
    if config.ema_decay is not None:
        average = models["ema"] = copy.deepcopy(model).requires_grad_(False)
    sharded = config.parallel == "fsdp" and run.world.size > 1
    if sharded:
        for network in (model, average):
            if network is not None:
                shard(network, network.vit.blocks)
    return Networks(
        objective=objective,
        model=model,
        optimizer=mim_adamw(model, config.optim),
        average=average,
        trained=model if sharded else replicated(run.compiled(model), run.world),
        models=models,
        counter=counter,
    )


def train_step(
    run: Run, networks: Networks, config: MimRunConfig, step: int, batch: RawBatch
) -> dict[str, float | Tensor]:
    """Learn from a batch. Returns what is to be logged, on the device: the host waits for nothing here."""
    lr = learning_rate(step, config.steps, config.optim)
    set_learning_rate(networks.optimizer, lr)
    for part in passes(networks.trained, batch.split(config.data.accumulate)):
        losses = networks.objective.losses(networks.trained, part)
        run.backward(losses["loss"], part.images, losses)
    means = run.update(networks.optimizer, config.optim.max_grad_norm)
    if networks.average is not None and config.ema_decay is not None:
        follow(networks.average, networks.model, config.ema_decay)
    return {"lr": lr, **networks.objective.finish_step(step), **means}
