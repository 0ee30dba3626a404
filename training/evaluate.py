"""How well a trained tokenizer reconstructs held-out images, and how it uses its codebook.

Every image is measured on its centre crop, once, and counted under its modality and DA level. Beside the PSNR
of the reconstruction stands that of the plainest picture with as many numbers in-plane: each 16 x 16 patch of
a slice painted in its mean colour. Pictures show what the figures cannot.

Shape suffixes: B images, C channels, D H W voxels, d h w tokens, K codes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from training.augment import render
from training.loader import RawBatch
from training.pictures import IN_USE, CodebookUse, Row, caption, codebook_use, contact_sheet, middle_slice
from training.quantizer import perplexity
from training.tokenizer import Tokenizer
from training.validation import evaluating, psnr

MEASURES = {
    "images": pa.int64(),
    "tokens": pa.int64(),
    "l1": pa.float64(),
    "psnr": pa.float64(),
    "psnr_patch_means": pa.float64(),
    "ssim": pa.float64(),
    "token_entropy": pa.float64(),
    "perplexity": pa.float64(),
    "utilisation": pa.float64(),
    "codes_in_use": pa.float64(),
}
"""Columns of an evaluation behind `modality` and `da_level`; `Evaluation.table` tells what they are."""

_SSIM_WINDOW = 11
_ERROR_GAIN = 4


@dataclass
class Evaluation:
    """What was measured: one tally for each modality and DA level that occurred."""

    codebook_size: int
    tallies: dict[tuple[str, int], _Tally]
    rows: list[Row]
    """One for each image: input, reconstruction, and their difference."""

    def table(self) -> pa.Table:
        """A row for each modality and DA level, for each modality (`da_level` null), and for all (both null).

        l1, psnr (dB) and ssim are means over images in [0, 1]; psnr_patch_means is the PSNR of the plainest
        picture. token_entropy is the mean entropy of a token in nats (paper: 2.791 on its validation images,
        of at most ln K). Of the mean token distribution, perplexity says over how many codes it is spread, and
        codes_in_use the share of codes with more than a tenth of the uniform probability. utilisation is the
        share of codes that are the likeliest of some token.
        """
        rows = []
        for modality, level in sorted(self.tallies):
            rows.append(self._row(modality, level, [self.tallies[modality, level]]))
        for modality, tallies in self.by_modality().items():
            rows.append(self._row(modality, None, tallies))
        rows.append(self._row(None, None, list(self.tallies.values())))
        schema = pa.schema([("modality", pa.string()), ("da_level", pa.int8()), *MEASURES.items()])
        return pa.Table.from_pylist(rows, schema=schema)

    def by_modality(self) -> dict[str, list[_Tally]]:
        """The tallies of each modality, by name."""
        grouped: dict[str, list[_Tally]] = defaultdict(list)
        for (modality, _), tally in sorted(self.tallies.items(), key=lambda item: item[0]):
            grouped[modality].append(tally)
        return dict(grouped)

    def _row(self, modality: str | None, level: int | None, tallies: list[_Tally]) -> dict[str, Any]:
        images = sum(tally.images for tally in tallies)
        tokens = sum(tally.tokens for tally in tallies)
        usage_K = sum_of(tally.usage for tally in tallies) / tokens
        likeliest_K = sum_of(tally.likeliest for tally in tallies)
        means = {
            name: sum(tally.sums[name] for tally in tallies) / images
            for name in ("l1", "psnr", "psnr_patch_means", "ssim")
        }
        return {
            "modality": modality,
            "da_level": level,
            "images": images,
            "tokens": tokens,
            **means,
            "token_entropy": sum(tally.sums["entropy"] for tally in tallies) / tokens,
            "perplexity": float(perplexity(usage_K)),
            "utilisation": float((likeliest_K > 0).double().mean()),
            "codes_in_use": float((usage_K > IN_USE / self.codebook_size).double().mean()),
        }


@dataclass
class _Tally:
    """Sums over the images of one modality and DA level."""

    images: int = 0
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    usage: Tensor = field(default_factory=lambda: torch.zeros(()))
    """(K,): sum of the token distributions."""
    likeliest: Tensor = field(default_factory=lambda: torch.zeros(()))
    """(K,): how many tokens each code is the likeliest of."""
    entropies: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """Of every token, in nats."""


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def evaluate_tokenizer(
    tokenizer: Tokenizer, batches: Iterable[RawBatch], modalities: Mapping[str, str], device: torch.device
) -> Evaluation:
    """Reconstruct the images of `batches` and measure how well that went.

    `modalities` are those of the images, by `dataset/key`. The tokenizer, on `device`, is left as it was.
    """
    tallies: dict[tuple[str, int], _Tally] = defaultdict(_Tally)
    rows = []
    with evaluating(tokenizer):
        for batch in batches:
            crops = render(batch, device)
            output = tokenizer(2 * crops.voxels - 1, crops.level)
            restored = (output.reconstruction.float() / 2 + 0.5).clamp(0, 1)
            log_p = output.logits.float().log_softmax(dim=-1).flatten(1, -2).cpu()
            compared = zip(crops.keys, crops.voxels.cpu(), restored.cpu(), log_p, strict=True)
            for key, image_CDHW, restored_CDHW, log_p_NK in compared:
                tally = tallies[modalities[key], crops.level]
                _count(tally, image_CDHW, restored_CDHW, log_p_NK, tokenizer.config.stride)
                difference = (0.5 + _ERROR_GAIN / 2 * (restored_CDHW - image_CDHW)).clamp(0, 1)
                panels = [middle_slice(one) for one in (image_CDHW, restored_CDHW, difference)]
                rows.append(Row(caption(modalities[key], key, crops.level), panels))
    return Evaluation(tokenizer.config.codebook_size, dict(tallies), rows)


def _count(tally: _Tally, image_CDHW: Tensor, restored_CDHW: Tensor, log_p_NK: Tensor, patch: int) -> None:
    p_NK = log_p_NK.exp().double()
    entropy_N = -(p_NK * log_p_NK).sum(dim=-1)
    tally.images += 1
    tally.tokens += len(p_NK)
    tally.sums["l1"] += float((restored_CDHW - image_CDHW).abs().mean())
    tally.sums["psnr"] += float(psnr(restored_CDHW[None], image_CDHW[None]))
    tally.sums["psnr_patch_means"] += float(psnr(patch_means(image_CDHW, patch)[None], image_CDHW[None]))
    tally.sums["ssim"] += ssim(restored_CDHW, image_CDHW)
    tally.sums["entropy"] += float(entropy_N.sum())
    tally.usage = tally.usage + p_NK.sum(dim=0)
    tally.likeliest = tally.likeliest + torch.bincount(log_p_NK.argmax(dim=-1), minlength=p_NK.shape[1])
    tally.entropies.append(entropy_N.numpy().astype(np.float32))


def patch_means(image_CDHW: Tensor, patch: int) -> Tensor:
    """Each `patch` x `patch` square of each slice in its mean colour; H and W are multiples of `patch`."""
    means = F.avg_pool3d(image_CDHW, (1, patch, patch))
    return means.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)


def ssim(restored_CDHW: Tensor, image_CDHW: Tensor) -> float:
    """Structural similarity of images in [0, 1] with MONAI's Gaussian window of 11 voxels (sigma 1.5).

    3-D where there are several slices, in a window no deeper than they are; else of the slice.
    """
    from monai.metrics.regression import compute_ssim_and_cs

    depth, height, width = image_CDHW.shape[1:]
    flat = depth == 1
    sizes = (height, width) if flat else (depth, height, width)
    # An even window has no middle.
    window = [min(_SSIM_WINDOW, size - (size + 1) % 2) for size in sizes]
    restored, image = (x[:, 0][None] if flat else x[None] for x in (restored_CDHW, image_CDHW))
    full, _ = compute_ssim_and_cs(
        restored, image, spatial_dims=len(sizes), kernel_size=window, kernel_sigma=[1.5] * len(sizes)
    )
    return float(full.mean())


def draw_reconstructions(evaluation: Evaluation, file: Path) -> None:
    """Input, reconstruction and difference of every image, modality by modality."""
    title = f"reconstructions; difference x {_ERROR_GAIN}, grey = none"
    ordered = sorted(evaluation.rows, key=lambda row: row.caption)
    contact_sheet(file, title, ["input", "reconstruction", "difference"], ordered)


def draw_codebook(evaluation: Evaluation, file: Path) -> None:
    """How often each code is meant (sorted), and how undecided tokens are, a line for each modality."""
    uses = {}
    for modality, tallies in evaluation.by_modality().items():
        tokens = sum(tally.tokens for tally in tallies)
        entropies = np.concatenate([one for tally in tallies for one in tally.entropies])
        uses[modality] = CodebookUse(sum_of(tally.usage for tally in tallies) / tokens, entropies)
    codebook_use(file, "use of the codebook", uses)
