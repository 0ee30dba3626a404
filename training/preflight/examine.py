"""The examination of a run, from top to bottom: what can be told before it, then its first steps."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from catalog.errors import SetupError
from catalog.store import Location
from shards.remote import open_reader
from training import limits, train_mim, train_tokenizer
from training.config import MimRunConfig, RunConfig, TokenizerRunConfig
from training.data import RunData, cache_of, open_data
from training.flops import StepCounter
from training.loader import RawBatch, read_batch
from training.objectives.tokens import recipe_for
from training.plan import BatchPlan
from training.preflight.codes import Finding
from training.preflight.forecast import Forecast, forecast, told
from training.preflight.measure import (
    DoesNotFitError,
    LevelSpeed,
    NotFiniteError,
    Steps,
    measure_steps,
    memory_limit,
)
from training.preflight.setup import (
    check_codebook,
    check_corpus_of,
    check_disk,
    check_limits,
    check_schedules,
    check_shards,
    check_validation,
    kept_bytes,
    open_tokenizer,
)
from training.run import Run, choose_device
from training.speed import peak_flops
from training.targets import Targets
from training.tokenizer import Tokenizer

Config = TypeVar("Config", bound=RunConfig)

_STEPS_LOOKED_AT = 20_000
"""Steps among which the first of each DA level is looked for: rarer levels are not measured."""
_FOR_STEPS, _FOR_LOADER = 0.6, 0.1
"""Shares of the time: all steps, and each of the three passes of the loader."""


@dataclass(kw_only=True)
class Examination:
    """What was found, as far as it came."""

    kind: str
    preset: str
    device: str
    processes: int
    steps: int
    batch_size: int
    findings: list[Finding] = field(default_factory=list)
    shares: dict[int, float] = field(default_factory=dict)
    """Of DA levels among the steps."""
    levels: list[LevelSpeed] = field(default_factory=list)
    peak_flops: float | None = None
    loader: limits.Figures | None = None
    forecast: Forecast | None = None

    def refused(self) -> bool:
        """Whether the run cannot end well."""
        return any(finding.severity == "error" for finding in self.findings)

    def say(self, code: str, text: object) -> Examination:
        """Add a finding."""
        self.findings.append(Finding(code, str(text)))
        return self


def examine(
    config: TokenizerRunConfig | MimRunConfig,
    corpus: Location,
    run_dir: Path,
    *,
    preset: str,
    processes: int,
    seconds: float,
    other_corpus: bool,
) -> Examination:
    """Examine the run that `pumit-train` would make of `config` with so many processes of this machine.

    Takes about as many `seconds`; if the set-up has errors, nothing is measured. Writes nothing to `run_dir`.
    `other_corpus` allows a tokenizer of another one.
    """
    if isinstance(config, MimRunConfig) and config.objective != "tokens":
        raise SetupError(
            f"the doctor knows what a step of masked tokens takes, not of {config.objective}: look at a run of "
            "--preset tiny with that objective, or at one of tokens with the same network"
        )
    found = Examination(
        kind=config.kind,
        preset=preset,
        device=config.device,
        processes=processes,
        steps=config.steps,
        batch_size=config.data.batch_size,
    )

    # Set-up
    found.findings += check_schedules(config, processes)
    try:
        device = choose_device(config.device)
    except SetupError as error:
        return found.say("device_unusable", error)
    found.device = str(device)
    try:
        data = open_data(corpus, config)
        plans = _plans(data, processes)
        found.findings += check_shards(data, plans)
        if found.refused():  # it would fail with less to say
            return found
        reader = open_reader(data.corpus.shards, cache_of(config.data))
        batches = {plan.level: read_batch(reader, plan) for plan in plans}
    except SetupError as error:
        return found.say("data_unusable", error)
    found.shares = {level: float(p) for level, p in enumerate(data.planner.level_probabilities) if p > 0}
    found.findings += check_validation(data)
    found.findings += check_limits(config, max(batch.buffer.numel() for batch in batches.values()), processes)
    tokenizer = None
    if isinstance(config, MimRunConfig):
        try:
            place, tokenizer = open_tokenizer(config.tokenizer)
            found.findings += check_corpus_of(place, data.lock, allowed=other_corpus)
            found.findings += check_codebook(tokenizer.to(device), data, device)
        except SetupError as error:
            return found.say("tokenizer_unusable", error)
        if config.targets is not None:
            try:
                Targets.of(config.targets, config, data)
            except SetupError as error:
                found.say("targets_unusable", error)
    if found.refused():
        return found

    # First steps
    checkpoint_bytes = _measure(found, config, data, batches, tokenizer, run_dir, _FOR_STEPS * seconds)
    if found.refused():
        return found
    found.peak_flops = peak_flops(device, config.precision)

    # Loader, and all together
    found.loader = limits.measure(
        corpus,
        config,
        workers=config.data.workers * processes,
        batch_size=config.data.batch_size,
        seconds=_FOR_LOADER * seconds,
    )
    memory = memory_limit(device)
    found.forecast = forecast(
        config,
        found.levels,
        found.loader,
        processes=processes,
        memory_bytes=memory,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=kept_bytes(config, checkpoint_bytes),
    )
    found.findings += told(config, found.levels, found.forecast, memory)
    if config.compile:
        found.say("measured_eagerly", "compile is true")
    return found


def _measure(
    found: Examination,
    config: TokenizerRunConfig | MimRunConfig,
    data: RunData,
    batches: Mapping[int, RawBatch],
    tokenizer: Tokenizer | None,
    run_dir: Path,
    seconds: float,
) -> int:
    """Make the run's first steps; the bytes of a checkpoint."""
    alone = _of_one_process(config, found.processes)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pumit-doctor-")))
        try:
            run = stack.enter_context(Run(scratch / "run", alone, fingerprints={}, resume=False))
        except SetupError as error:
            found.say("device_unusable", error)
            return 0
        run.restore_signals()
        run.console.quiet = True
        try:
            steps = _steps(run, alone, data, tokenizer)
        except SetupError as error:
            found.say("weights_unusable", error)
            return 0
        found.findings += check_disk(run_dir, config, run.checkpoint_bytes())
        if not found.refused():
            try:
                found.levels = measure_steps(steps, batches, found.shares, seconds)
            except DoesNotFitError as error:
                found.say("out_of_memory", error)
            except NotFiniteError as error:
                found.say("loss_not_finite", error)
        return run.checkpoint_bytes()


def _plans(data: RunData, processes: int) -> list[BatchPlan]:
    """The first batch of each DA level, as rank 0 of the processes gets it."""
    first: dict[int, int] = {}
    possible = np.count_nonzero(data.planner.level_probabilities)
    for step in range(_STEPS_LOOKED_AT):
        first.setdefault(data.planner.level(step), step)
        if len(first) == possible:
            break
    return [data.planner.plan(step, 0, processes) for _, step in sorted(first.items())]


def _of_one_process(config: Config, processes: int) -> Config:
    """What one of several processes does, as a run of its own; not compiled."""
    data = config.data.model_copy(update={"batch_size": max(config.data.batch_size // processes, 1)})
    changes = {"data": data, "compile": False, "wandb_project": None}
    if isinstance(config, MimRunConfig):
        changes["targets"] = None  # they are of whole batches; what a step then takes is the most it can
    return config.model_copy(update=changes)


def _in_passes(config: Config, accumulate: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"accumulate": accumulate})})


def _steps(
    run: Run, config: TokenizerRunConfig | MimRunConfig, data: RunData, tokenizer: Tokenizer | None
) -> Steps:
    """The training's own networks and step; with other numbers of passes than configured, if need be."""

    if isinstance(config, MimRunConfig):
        recipe = recipe_for(config, cast(Tokenizer, tokenizer))
        vit = train_mim.build(run, config, recipe, data)
        run.restore(vit.models, {"model": vit.optimizer})
        counter = cast(StepCounter, vit.counter)
        return Steps(
            run,
            lambda step, batch, count: train_mim.train_step(run, vit, _in_passes(config, count), step, batch),
            lambda batch: counter.work(batch.plan),
        )
    networks = train_tokenizer.build(run, config)
    # The worst case: as if the gate of the adversarial term were open.
    gate_open = config.loss.gan_weight > 0

    def take(step: int, batch: RawBatch, count: int) -> Mapping[str, float]:
        if gate_open:
            run.numbers = {"ema": 0.0, "last": 0.0}
        return cast(
            Mapping[str, float],
            train_tokenizer.train_step(run, networks, _in_passes(config, count), step, batch),
        )

    return Steps(run, take, lambda batch: networks.counter.work(batch.plan, gate_open))
