"""Preset `small` from its first step to pictures of what it makes of subjects that it never saw."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.ablation import HELD_OUT
from catalog.output import batches_of, write_csv
from training import train_mim
from training.config import load_preset
from training.data import open_validation
from training.evaluate import Evaluation, draw_codebook, draw_reconstructions, evaluate_tokenizer
from training.models import build_tokenizer
from training.pictures import Row
from training.pretrained import load_tokenizer
from training.tokenizer import Tokenizer
from training.train_tokenizer import train

CURVES = (
    ("validation/psnr", "PSNR of held-out images, dB"),
    ("loss/reconstruction", "L1 of training crops"),
    ("validation/codebook_perplexity", "perplexity of the codebook"),
    ("validation/token_entropy", "entropy of a token, nats"),
)


_NOT_SHOWN = ("busi-n1", "chasedb1-01", "brats-gli-00001")
"""Subjects whose files do not plainly say that their images may be passed on."""

VIT_CURVES = (
    ("validation/loss", "loss on held-out images, nats"),
    ("validation/accuracy_top5", "their likeliest code among five"),
    ("probe/modality/linear/class_token", "modality, linear on class token"),
    ("probe/body_part/linear/class_token", "body part, linear on class token"),
)


def study(corpus: Path, run: Path, out: Path, steps: int | None) -> None:
    """Train preset `small` in `run`, unless that is done, and write table, pictures and curves to `out`."""
    config = load_preset("tokenizer", "small", [f"steps={steps}"] if steps else [])
    if not (run / "summary.json").exists():
        train(config, corpus, run, resume=run.exists())
    held_out = open_validation(corpus, HELD_OUT)

    def measured(tokenizer: Tokenizer) -> Evaluation:
        return evaluate_tokenizer(tokenizer, held_out.batches, held_out.modalities, torch.device("cpu"))

    torch.manual_seed(config.seed)
    start = measured(build_tokenizer(config.model)).table()
    evaluation = measured(load_tokenizer(run))
    table = evaluation.table()
    with (out / "tokenizer.csv").open("wb") as stream:
        write_csv(batches_of(table), stream)
    (out / "tokenizer.md").write_text(_markdown(table.to_pylist(), start["psnr"].to_pylist()), encoding="utf-8")
    (out / "held-out.txt").write_text("\n".join(sorted(held_out.modalities)) + "\n", encoding="utf-8")
    shown = replace(evaluation, rows=_some_of_each_kind(evaluation.rows))
    draw_reconstructions(shown, out / "reconstructions.png")
    draw_codebook(evaluation, out / "codebook.png")
    draw_curves(run / "tensorboard", out / "curves.png", CURVES)
    print((out / "tokenizer.md").read_text(encoding="utf-8"))


def vit_study(corpus: Path, tokenizer: Path, run: Path, out: Path, steps: int | None) -> None:
    """Train the ViT of preset `small` on the tokens of `tokenizer`; compare its loss with what bounds it."""
    if not (run / "summary.json").exists():
        longer = [f"steps={steps}", f"intervals.probe_every_steps={max(steps // 8, 1)}"] if steps else []
        settings = [f"tokenizer={json.dumps(str(tokenizer))}", *longer]
        train_mim.train(load_preset("mim", "small", settings), corpus, run, resume=run.exists())
    measured = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    loss, unigram, least = (
        measured[f"validation/{name}"] for name in ("loss", "unigram_loss", "target_entropy")
    )
    lines = [
        "| loss on hidden tokens of held-out images | nats |",
        "|---|---|",
        f"| best prediction that is the same everywhere | {unigram:.3f} |",
        f"| ViT | {loss:.3f} |",
        f"| entropy of the tokens: nothing can be below | {least:.3f} |",
    ]
    (out / "vit.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curves(run / "tensorboard", out / "vit-curves.png", VIT_CURVES)
    print("\n".join(lines))


def _markdown(rows: list[dict[str, Any]], psnr_at_start: list[float]) -> str:
    head = ("modality", "images", "PSNR, dB", "before training", "of patch means", "gain", "SSIM")
    head = (*head, "codes in use", "token entropy")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, start in zip(rows, psnr_at_start, strict=True):
        if row["da_level"] is None:
            gain = row["psnr"] - row["psnr_patch_means"]
            lines.append(
                f"| {row['modality'] or 'all'} | {row['images']} | {row['psnr']:.2f} "
                f"| {start:.2f} | {row['psnr_patch_means']:.2f} | {gain:+.2f} | {row['ssim']:.3f} "
                f"| {row['codes_in_use']:.0%} | {row['token_entropy']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _some_of_each_kind(rows: list[Row]) -> list[Row]:
    """Two images of each modality and DA level, of those that may be shown."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.caption):
        kind, _, key = row.caption.rpartition("  ·  ")
        if not any(subject in key for subject in _NOT_SHOWN):
            kinds[kind].append(row)
    return [row for of_kind in kinds.values() for row in of_kind[:2]]


def draw_curves(events: Path, file: Path, curves: Sequence[tuple[str, str]]) -> None:
    """The named scalars of a TensorBoard log, a small picture each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(events), size_guidance={"scalars": 0})
    log.Reload()
    known = [(tag, title) for tag, title in curves if tag in log.Tags()["scalars"]]
    figure = Figure(figsize=(3.3 * len(known), 2.8), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (tag, title) in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        points = log.Scalars(tag)
        axes.plot([point.step for point in points], [point.value for point in points], linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(file)
