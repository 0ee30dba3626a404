"""The tokenizer's training, from top to bottom.

Shape suffixes: B crops, C channels, D H W voxels, d h w tokens, K codes.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from catalog.store import Location
from training.augment import render
from training.config import TokenizerModelConfig, TokenizerRunConfig
from training.data import RunData, open_data
from training.discriminator import PatchDiscriminator
from training.flops import StepCounter, tokenizer_counter
from training.loader import RawBatch
from training.losses import (
    GateState,
    GeneratorLosses,
    LossWeights,
    discriminator_loss,
    draw_slices,
    generator_adversarial_loss,
    perceptual_loss,
    reconstruction_loss,
)
from training.lpips import LPIPS, load_lpips
from training.models import build_tokenizer
from training.optim import adamw, follow, learning_rate, set_learning_rate
from training.parallel import passes, replicated
from training.pictures import CodebookUse, Row, caption, codebook_use, contact_sheet, middle_slice
from training.quantizer import (
    GumbelQuantizer,
    diversity_of_part,
    gumbel_temperature,
    mean_usage,
    perplexity,
    utilisation,
)
from training.run import Run
from training.tokenizer import Tokenizer
from training.validation import Means, evaluating, psnr
from training.world import World

Network = TypeVar("Network", bound=nn.Module)


def train(
    config: TokenizerRunConfig,
    corpus: Location,
    run_dir: Path,
    resume: bool,
    licences: Mapping[str, str | None] | None = None,
    world: World = World(),  # noqa: B008 - an immutable constant
    make: Callable[[TokenizerModelConfig], Tokenizer] = build_tokenizer,
) -> dict[str, Any]:
    """Train a tokenizer on the corpus at `corpus`; checkpoints, curves and pictures go to `run_dir`.

    `licences` as of `open_data`. Every process of the `world` calls. `make` gives the network.

    Returns first and last loss, images per second and the last validation, as written to summary.json.
    Raises SetupError (corpus, folder, resume, divergence) and TrainingInterrupted (SIGTERM, SIGINT).
    """
    # Input
    data = open_data(corpus, config, licences)
    with Run(
        run_dir, config, fingerprints=data.fingerprints, resume=resume, lock=data.lock, world=world
    ) as run:
        networks = build(run, config, make)
        measured: dict[str, float] = {}
        loader = data.loader(config, run.first_step, run.world)
        run.take_meter = loader.take_meter
        for step, batch in zip(run.steps(), loader, strict=True):
            scalars = train_step(run, networks, config, step, batch)
            run.finish_step(
                step, scalars, networks.counter.work(batch.plan, bool(scalars.get("gan_gate_open")))
            )

            if run.due(step, config.intervals.validate_every_steps):
                measured = validate(run, step, networks.tokenizer, data)
            if run.due(step, config.intervals.save_every_steps):
                run.save(step + 1)
        return run.summary(measured or validate(run, config.steps - 1, networks.tokenizer, data))


@dataclass(frozen=True, eq=False)
class Networks:
    """What a step works with, on the run's device."""

    layout: torch.memory_format
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    average: Tokenizer | None
    """Moving average of the tokenizer's weights."""
    network: nn.Module
    """The tokenizer, to be called in training."""
    judge: nn.Module | None
    """The discriminator, to be called for the tokenizer's loss; None where there is no adversarial term."""
    trained_judge: nn.Module | None
    """The same, to be called for its own loss."""
    judge_optimizer: torch.optim.Optimizer | None
    lpips: LPIPS | None
    weights: LossWeights
    counter: StepCounter


def build(
    run: Run,
    config: TokenizerRunConfig,
    make: Callable[[TokenizerModelConfig], Tokenizer] = build_tokenizer,
) -> Networks:
    """Make the networks, new or as of the checkpoint that the run goes on from."""
    layout = torch.channels_last_3d if config.channels_last else torch.contiguous_format
    tokenizer = in_layout(make(config.model).to(run.device), layout)
    optimizer = adamw(tokenizer, config.optim)
    models: dict[str, nn.Module] = {"model": tokenizer}
    optimizers: dict[str, torch.optim.Optimizer] = {"model": optimizer}
    average = None
    if config.ema_decay is not None:
        average = models["ema"] = copy.deepcopy(tokenizer).requires_grad_(False)
    adversary = None
    if config.loss.gan_weight:
        adversary = PatchDiscriminator(config.discriminator.channels).to(run.device)
        models["discriminator"] = adversary = in_layout(adversary, layout)
        optimizers["discriminator"] = adamw(adversary, config.discriminator.optim)
    lpips = None
    if config.loss.lpips_weight:
        lpips = load_lpips(config.loss.lpips_weights_file).to(run.device)
    run.restore(models, optimizers)
    judge = None if adversary is None else run.compiled(adversary)
    return Networks(
        layout=layout,
        tokenizer=tokenizer,
        optimizer=optimizer,
        average=average,
        network=replicated(run.compiled(tokenizer), run.world),
        judge=judge,
        trained_judge=None if judge is None else replicated(judge, run.world),
        judge_optimizer=optimizers.get("discriminator"),
        lpips=lpips,
        weights=LossWeights(
            reconstruction=config.loss.l1_weight,
            perceptual=config.loss.lpips_weight,
            adversarial=config.loss.gan_weight,
            diversity=config.loss.diversity_weight,
            sharpness=config.loss.sharpness_weight,
        ),
        counter=tokenizer_counter(
            config.data.batch_size, tokenizer, adversary, lpips, config.loss.lpips_max_slices
        ),
    )


def train_step(
    run: Run, networks: Networks, config: TokenizerRunConfig, step: int, batch: RawBatch
) -> dict[str, float | Tensor]:
    """Learn from a batch: the tokenizer, then the discriminator. Returns what is to be logged.

    The gate of the adversarial term, between steps in `run.numbers`, is the only thing the host waits for.
    """
    tokenizer, judge, lpips = networks.tokenizer, networks.judge, networks.lpips
    gate = GateState(**run.numbers)
    parts = [render(part, run.device) for part in batch.split(config.data.accumulate)]
    indices = [part.indices for part in batch.split(config.data.accumulate)]
    images = [(2 * crops.voxels - 1).contiguous(memory_format=networks.layout) for crops in parts]
    level = batch.level

    # Generator
    if isinstance(tokenizer.quantizer, GumbelQuantizer):
        tokenizer.quantizer.temperature.fill_(gumbel_temperature(step, config.steps))
    lr = learning_rate(step, config.steps, config.optim)
    set_learning_rate(networks.optimizer, lr)
    usage_K = whole_usage(run, tokenizer, images, level) if len(parts) > 1 else None
    gate_open = gate.is_open(config.loss.gan_gate_loss)
    reconstructions = []
    together = list(zip(images, parts, indices, strict=True))
    for image_BCDHW, crops, samples in passes(networks.network, together):
        adversarial = perceptual = None
        with run.autocast():
            output = networks.network(image_BCDHW, level)
            if judge is not None and gate_open:
                with frozen(judge):
                    score_fake = judge(output.reconstruction, level)
                adversarial = generator_adversarial_loss(score_fake.float())
            if lpips is not None:
                slices_BS = draw_slices(
                    image_BCDHW.shape[2],
                    seed=config.seed,
                    step=step,
                    samples=samples,
                    limit=config.loss.lpips_max_slices,
                )
                perceptual = perceptual_loss(lpips, output.reconstruction, image_BCDHW, slices_BS)
        diversity = output.diversity
        if usage_K is not None:
            probabilities = tokenizer.quantizer.probabilities(output.logits)
            diversity = diversity_of_part(probabilities, usage_K)
        losses = GeneratorLosses(
            reconstruction=reconstruction_loss(output.reconstruction.float(), image_BCDHW),
            diversity=diversity,
            sharpness=output.sharpness,
            perceptual=perceptual,
            codebook=output.codebook_loss,
            adversarial=adversarial,
        )
        terms = {f"loss/{name}": term for name, term in vars(losses).items() if term is not None}
        run.backward(losses.total(networks.weights), crops.keys, terms)
        reconstructions.append(output.reconstruction.detach())
    scalars: dict[str, float | Tensor] = {"lr": lr}
    scalars |= run.update(networks.optimizer, config.optim.max_grad_norm)
    if networks.average is not None and config.ema_decay is not None:
        follow(networks.average, tokenizer, config.ema_decay)

    # Discriminator: learns from the first step on, so that the gate can tell when it is good.
    trained_judge, judge_optimizer = networks.trained_judge, networks.judge_optimizer
    if trained_judge is not None and judge_optimizer is not None:
        adversary_optim = config.discriminator.optim
        set_learning_rate(judge_optimizer, learning_rate(step, config.steps, adversary_optim))
        pairs = list(zip(images, reconstructions, parts, strict=True))
        for real_BCDHW, fake_BCDHW, crops in passes(trained_judge, pairs):
            with run.autocast():
                # One call for both: processes average gradients once for each call.
                both = trained_judge(torch.cat([real_BCDHW, fake_BCDHW.to(real_BCDHW.dtype)]), level)
            score_real, score_fake = both.float().chunk(2)
            run.backward(discriminator_loss(score_real, score_fake), crops.keys)
        found = run.update(judge_optimizer, adversary_optim.max_grad_norm)
        # The gate decides what the next step computes: the one number that the host must wait for.
        gate = gate.updated(float(found["loss"]), momentum=config.loss.gan_gate_momentum)
        run.numbers = gate._asdict()
        scalars |= {"discriminator_loss": gate.last, "gan_gate_open": gate_open}
    return scalars


def in_layout(model: Network, layout: torch.memory_format) -> Network:
    """`model` with its weights in a memory layout."""
    return model.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """What is computed meanwhile leaves no gradient in the weights of `model`."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


def whole_usage(run: Run, tokenizer: Tokenizer, images: Sequence[Tensor], level: int) -> Tensor:
    """m (K) of the whole batch of all processes: what no single pass over a part of it can know."""
    with torch.no_grad(), run.autocast():
        probabilities = [
            tokenizer.quantizer.probabilities(tokenizer.encode(image, level)).flatten(0, -2) for image in images
        ]
    return mean_usage(torch.cat(probabilities), across_ranks=True)


def validate(run: Run, step: int, tokenizer: Tokenizer, data: RunData) -> dict[str, float]:
    """Measure reconstructions and the use of the codebook, log them and draw the contact sheet.

    PSNR in dB and L1 are of images in [0, 1]; entropies in nats. Perplexity and utilisation are of all
    tokens together: how many codes they are spread over, and which share is the likeliest of some token.
    """
    means, rows, usages, best = Means(), [], [], []
    by_modality: dict[str, list[CodebookUse]] = defaultdict(list)
    with evaluating(tokenizer):
        for batch in data.validation:
            crops = render(batch, run.device)
            with run.autocast():
                output = tokenizer(2 * crops.voxels - 1, crops.level)
            reconstruction = (output.reconstruction.float() / 2 + 0.5).clamp(0, 1)
            probabilities = output.logits.float().softmax(dim=-1)
            means.add(
                len(crops.keys),
                {
                    "psnr": psnr(reconstruction, crops.voxels),
                    "l1": (reconstruction - crops.voxels).abs().mean(),
                    "token_entropy": output.sharpness,
                },
            )
            for key, of_image in zip(crops.keys, probabilities, strict=True):
                usages.append(mean_usage(of_image, across_ranks=False))
                entropies = torch.special.entr(of_image).sum(dim=-1).flatten().cpu().numpy()
                by_modality[data.modalities[key]].append(CodebookUse(usages[-1], entropies))
            best.append(probabilities.argmax(dim=-1).flatten())
            for key, image, restored in zip(crops.keys, crops.voxels, reconstruction, strict=True):
                panels = [middle_slice(image), middle_slice(restored)]
                rows.append(Row(caption(data.modalities[key], key, crops.level), panels))
    codebook = {
        "codebook_perplexity": float(perplexity(torch.stack(usages).mean(dim=0))),
        "codebook_utilisation": float(utilisation(torch.cat(best), tokenizer.config.codebook_size)),
    }
    measured = {f"{data.validation_name}/{name}": value for name, value in (means.result() | codebook).items()}
    run.log(step, measured)
    if run.world.rank == 0:
        title = f"tokenizer, step {step + 1}"
        rows.sort(key=lambda row: row.caption)  # by modality, then DA level
        contact_sheet(run.picture_file(step), title, ["input", "reconstruction"], rows)
        used = {name: _together(by_modality[name]) for name in sorted(by_modality)}
        codebook_use(run.codebook_file(step), f"use of the codebook, step {step + 1}", used)
    return measured


def _together(uses: Sequence[CodebookUse]) -> CodebookUse:
    """Of several images, each counting the same."""
    usage_K = torch.stack([use.usage for use in uses]).mean(dim=0)
    return CodebookUse(usage_K, np.concatenate([use.entropies for use in uses]))
