"""Weights of others as models of ours: published PUMIT checkpoints, and EVA-02 as a start for the ViT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from catalog.errors import SetupError
from catalog.manifest import digest_of
from training.config import load_preset
from training.models import build_mim, build_tokenizer
from training.pretrained import Kind, export_pretrained
from training.tokenizer import Tokenizer, load_reference
from training.weights import LoadReport, load_weights, read_tensors

_LOSS_ONLY = re.compile(r"(loss|discriminator|lpips|perceptual_loss)\..*")
"""Keys of a tokenizer's checkpoint that belong to its training: discriminator, perceptual network."""


def import_weights(kind: Kind, file: Path, folder: Path, preset: str, overrides: Sequence[str]) -> LoadReport:
    """Read a checkpoint of others and write it as a folder of `training.pretrained`; tell what was found in it.

    `kind` says what to make of it: tokenizer, mim (ViT with the head that predicts codes) or vit. The preset,
    changed by `overrides`, says how large the model is. Raises SetupError, and writes nothing, where the file
    cannot be read or does not fit.
    """
    if kind == "tokenizer":
        tokenizer = build_tokenizer(load_preset("tokenizer", preset, overrides).model)
        report = _fill_tokenizer(tokenizer, file)
        export_pretrained(tokenizer, folder, _origin(file))
        return report
    tensors = read_tensors(file)
    codes = next((len(tensors[name]) for name in ("mim_head.2.bias", "head.2.bias") if name in tensors), None)
    if kind == "mim" and codes is None:
        raise SetupError(f"{file} has no head that predicts codes: import it with --kind vit")
    model = build_mim(load_preset("mim", preset, overrides), codes or 2)
    part = model.vit if kind == "vit" else model
    report = load_weights(part, file)
    if kind == "mim" and report.missing:
        raise SetupError(f"{file} lacks {', '.join(report.missing)}: import it with --kind vit")
    export_pretrained(part, folder, _origin(file))
    return report


def _fill_tokenizer(tokenizer: Tokenizer, file: Path) -> LoadReport:
    tensors = read_tensors(file)
    unused = tuple(sorted(name for name in tensors if _LOSS_ONLY.fullmatch(name)))
    try:
        load_reference(tokenizer, {name: tensor for name, tensor in tensors.items() if name not in unused})
    except SetupError as error:
        raise SetupError(f"{file}: {error}") from error
    loaded = tuple(name for name, _ in tokenizer.named_parameters())
    return LoadReport(path=file, loaded=loaded, missing=(), unused=unused, notes=())


def _origin(file: Path) -> dict[str, str]:
    return {"source": file.name, "sha256": digest_of(file)}
