"""The tokenizer's training, from top to bottom.

Shape suffixes: B crops, C channels, D H W voxels, d h w tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catalog.store import Location
from training.augment import render
from training.config import TokenizerRunConfig
from training.data import RunData, open_data
from training.discriminator import PatchDiscriminator
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
from training.lpips import load_lpips
from training.models import build_tokenizer
from training.optim import adamw, learning_rate, set_learning_rate
from training.pictures import Row, caption, contact_sheet, middle_slice
from training.quantizer import GumbelQuantizer, gumbel_temperature, mean_usage, perplexity, utilisation
from training.run import Run
from training.tokenizer import Tokenizer
from training.validation import Means, evaluating, psnr


def train(
    config: TokenizerRunConfig,
    corpus: Location,
    run_dir: Path,
    resume: bool,
    licences: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Train a tokenizer on the corpus at `corpus`; checkpoints, curves and pictures go to `run_dir`.

    `licences` as of `open_data`.

    Returns first and last loss, images per second and the last validation, as written to summary.json.
    Raises SetupError (corpus, folder, resume, divergence) and TrainingInterrupted (SIGTERM, SIGINT).
    """
    # Input
    data = open_data(corpus, config, licences)
    with Run(run_dir, config, fingerprints=data.fingerprints, resume=resume, lock=data.lock) as run:
        # Networks
        tokenizer = build_tokenizer(config.model).to(run.device)
        optimizer = adamw(tokenizer, config.optim)
        models: dict[str, torch.nn.Module] = {"model": tokenizer}
        optimizers: dict[str, torch.optim.Optimizer] = {"model": optimizer}
        adversary = None
        if config.loss.gan_weight:
            adversary = PatchDiscriminator(config.discriminator.channels)
            models["discriminator"] = adversary.to(run.device)
            optimizers["discriminator"] = adamw(adversary, config.discriminator.optim)
        lpips = None
        if config.loss.lpips_weight:
            lpips = load_lpips(config.loss.lpips_weights_file).to(run.device)
        run.restore(models, optimizers)

        # Losses
        weights = LossWeights(
            reconstruction=config.loss.l1_weight,
            perceptual=config.loss.lpips_weight,
            adversarial=config.loss.gan_weight,
            diversity=config.loss.diversity_weight,
            sharpness=config.loss.sharpness_weight,
        )
        gate = GateState(**run.numbers)

        measured: dict[str, float] = {}
        loader = data.loader(config, run.first_step, run.world)
        run.take_meter = loader.take_meter
        for step, batch in zip(run.steps(), loader, strict=True):
            crops = render(batch, run.device)
            image_BCDHW = 2 * crops.voxels - 1

            # Generator
            if isinstance(tokenizer.quantizer, GumbelQuantizer):
                tokenizer.quantizer.temperature.fill_(gumbel_temperature(step, config.steps))
            lr = learning_rate(step, config.steps, config.optim)
            set_learning_rate(optimizer, lr)
            adversarial = perceptual = None
            with run.autocast():
                output = tokenizer(image_BCDHW, crops.level)
                if adversary is not None and gate.is_open(config.loss.gan_gate_loss):
                    score_fake = adversary(output.reconstruction, crops.level)
                    adversarial = generator_adversarial_loss(score_fake.float())
                if lpips is not None:
                    slices_BS = draw_slices(
                        image_BCDHW.shape[2],
                        seed=config.seed,
                        step=step,
                        samples=batch.indices,
                        limit=config.loss.lpips_max_slices,
                    )
                    perceptual = perceptual_loss(lpips, output.reconstruction, image_BCDHW, slices_BS)
            losses = GeneratorLosses(
                reconstruction=reconstruction_loss(output.reconstruction.float(), image_BCDHW),
                diversity=output.diversity,
                sharpness=output.sharpness,
                perceptual=perceptual,
                codebook=output.codebook_loss,
                adversarial=adversarial,
            )
            loss = losses.total(weights)
            terms = {f"loss/{name}": term for name, term in vars(losses).items() if term is not None}
            grad_norm = run.update(loss, optimizer, config.optim.max_grad_norm, crops.keys)
            scalars: dict[str, float | Tensor] = {"lr": lr, "grad_norm": grad_norm, **terms}

            # Discriminator: learns from the first step on, so that the gate can tell when it is good.
            if adversary is not None:
                adversary_optim = config.discriminator.optim
                lr = learning_rate(step, config.steps, adversary_optim)
                set_learning_rate(optimizers["discriminator"], lr)
                with run.autocast():
                    score_real = adversary(image_BCDHW, crops.level)
                    score_fake = adversary(output.reconstruction.detach(), crops.level)
                adversary_loss = discriminator_loss(score_real.float(), score_fake.float())
                run.update(
                    adversary_loss, optimizers["discriminator"], adversary_optim.max_grad_norm, crops.keys
                )
                gate = gate.updated(adversary_loss.item(), momentum=config.loss.gan_gate_momentum)
                run.numbers = gate._asdict()
                scalars |= {"discriminator_loss": gate.last, "gan_gate_open": adversarial is not None}

            run.finish_step(step, loss.item(), len(crops.keys), scalars)

            if run.due(step, config.intervals.validate_every_steps):
                measured = validate(run, step, tokenizer, data)
            if run.due(step, config.intervals.save_every_steps):
                run.save(step + 1)
        return run.summary(measured or validate(run, config.steps - 1, tokenizer, data))


def validate(run: Run, step: int, tokenizer: Tokenizer, data: RunData) -> dict[str, float]:
    """Measure reconstructions and the use of the codebook, log them and draw the contact sheet.

    PSNR in dB and L1 are of images in [0, 1]; entropies in nats. Perplexity and utilisation are of all
    tokens together: how many codes they are spread over, and which share is the likeliest of some token.
    """
    means, rows, usages, best = Means(), [], [], []
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
            usages += [mean_usage(of_image, across_ranks=False) for of_image in probabilities]
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
    title = f"tokenizer, step {step + 1}"
    contact_sheet(run.picture_file(step), title, ["input", "reconstruction"], rows)
    return measured
