"""Masked image modelling, the paper's objective: predict the tokenizer's soft tokens of hidden patches.

Shape suffixes: B crops, C channels, D H W voxels, d h w tokens, L = d * h * w, V visible tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from catalog.errors import SetupError
from catalog.manifest import digest_of
from training.augment import Crops, render
from training.config import MimRunConfig
from training.data import RunData
from training.flops import mim_counter
from training.loader import RawBatch
from training.mim import MaskedImageModel, mim_loss, visible_mask
from training.models import build_mim
from training.objectives.masks import draw_visible, masked_panel
from training.objectives.objective import Recipe
from training.pictures import Row, caption, contact_sheet, middle_slice
from training.pretrained import find_pretrained, load_tokenizer
from training.quantizer import mean_usage, negative_entropy
from training.run import Run
from training.targets import Targets
from training.tokenizer import Tokenizer
from training.transfer import sent
from training.validation import Means, evaluating


def recipe(config: MimRunConfig) -> Recipe[MaskedImageModel]:
    """Raises SetupError where there is no trained tokenizer."""
    if config.tokenizer is None:
        raise SetupError(
            "the targets come from a trained tokenizer: run `pumit-train tokenizer` first and give its --run "
            "folder with --set tokenizer=PATH"
        )
    pretrained = find_pretrained(config.tokenizer)
    targets = recipe_for(config, load_tokenizer(pretrained).eval().requires_grad_(False))
    return targets._replace(fingerprints={"tokenizer": digest_of(pretrained / "model.safetensors")})


def recipe_for(config: MimRunConfig, tokenizer: Tokenizer) -> Recipe[MaskedImageModel]:
    """With a tokenizer that is at hand, frozen and in evaluation mode."""
    return Recipe(
        build=partial(build_mim, config, tokenizer.config.codebook_size),
        begin=partial(MaskedTokens, config, tokenizer),
        counter=lambda model: mim_counter(
            config.data.batch_size, model, tokenizer if config.targets is None else None
        ),
    )


class MaskedTokens:
    """The objective that predicts tokens."""

    def __init__(
        self, config: MimRunConfig, tokenizer: Tokenizer, run: Run, data: RunData, model: MaskedImageModel
    ) -> None:
        self._config, self._run, self._data = config, run, data
        self._tokenizer = tokenizer.to(run.device)
        self._encode = run.compiled(tokenizer.encode)
        self._targets = None if config.targets is None else Targets.of(config.targets, config, data)
        self.companions: Mapping[str, nn.Module] = {}
        self.encoder = model

    def losses(self, trained: nn.Module, part: RawBatch) -> Mapping[str, Tensor]:
        """The fields of `MIMLoss`."""
        crops = render(part, self._run.device)
        if self._targets is not None:
            target_logits_BLK = sent(self._targets.logits(part), self._run.device)
        else:
            with torch.no_grad(), self._run.autocast():
                target_logits_BLK = self._encode(2 * crops.voxels - 1, crops.level).flatten(1, 3)
        visible_BV = sent(draw_visible(self._config, part, target_logits_BLK.shape[1]), self._run.device)
        with self._run.autocast():
            logits_BLK = trained(crops.voxels, crops.level, visible_BV)
        return mim_loss(logits_BLK, target_logits_BLK, visible_BV)._asdict()

    def finish_step(self, step: int) -> Mapping[str, float]:
        """Nothing is due."""
        return {}

    def validate(self, step: int) -> dict[str, float]:
        """Measure predictions of hidden tokens under fixed masks.

        Loss, KL divergence and target entropy in nats, accuracies as shares of the hidden tokens. unigram_loss
        is that of the best prediction that is the same everywhere: the mean distribution of these tokens.
        """
        run, data, tokenizer = self._run, self._data, self._tokenizer
        means, rows, usages = Means(), [], []
        with evaluating(self.encoder):
            for batch in data.validation:
                crops = render(batch, run.device)
                with run.autocast():
                    target_logits_BdhwK = tokenizer.encode(2 * crops.voxels - 1, crops.level)
                    target_logits_BLK = target_logits_BdhwK.flatten(1, 3)
                    visible_BV = draw_visible(self._config, batch, target_logits_BLK.shape[1]).to(run.device)
                    logits_BLK = self.encoder(crops.voxels, crops.level, visible_BV)
                means.add(len(crops.keys), mim_loss(logits_BLK, target_logits_BLK, visible_BV)._asdict())
                tokens_BLK = target_logits_BLK.float().softmax(dim=-1)
                usages += [mean_usage(of_image, across_ranks=False) for of_image in tokens_BLK]
                rows += picture_rows(data, crops, tokenizer, target_logits_BdhwK, logits_BLK, visible_BV)
        found = means.result() | {"unigram_loss": -float(negative_entropy(torch.stack(usages).mean(dim=0)))}
        measured = {f"{data.validation_name}/{name}": value for name, value in found.items()}
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
        masked = masked_panel(panel, visible_Bdhw[number], crops.voxels.shape[2])
        panels = [panel, middle_slice(restored[number]), masked, middle_slice(predicted[number])]
        rows.append(Row(caption(data.modalities[key], key, crops.level), panels))
    return rows
