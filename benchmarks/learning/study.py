"""Preset `small` from its first step to pictures of what it makes of subjects that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.ablation import HELD_OUT
from catalog.output import batches_of, write_csv
from training.config import load_preset
from training.data import open_validation
from training.evaluate import draw_codebook, draw_reconstructions, evaluate_tokenizer
from training.pretrained import load_tokenizer
from training.train_tokenizer import train

CURVES = (
    ("validation/psnr", "PSNR of held-out images, dB"),
    ("loss/reconstruction", "L1 of training crops"),
    ("validation/codebook_perplexity", "perplexity of the codebook"),
    ("validation/token_entropy", "entropy of a token, nats"),
)


def study(corpus: Path, run: Path, out: Path, steps: int | None) -> None:
    """Train preset `small` in `run`, unless that is done, and write table, pictures and curves to `out`."""
    if not (run / "summary.json").exists():
        settings = [f"steps={steps}"] if steps else []
        train(load_preset("tokenizer", "small", settings), corpus, run, resume=run.exists())
    held_out = open_validation(corpus, HELD_OUT)
    evaluation = evaluate_tokenizer(
        load_tokenizer(run), held_out.batches, held_out.modalities, torch.device("cpu")
    )
    table = evaluation.table()
    with (out / "tokenizer.csv").open("wb") as stream:
        write_csv(batches_of(table), stream)
    (out / "tokenizer.md").write_text(_markdown(table.to_pylist()), encoding="utf-8")
    (out / "held-out.txt").write_text("\n".join(sorted(held_out.modalities)) + "\n", encoding="utf-8")
    draw_reconstructions(evaluation, out / "reconstructions.png")
    draw_codebook(evaluation, out / "codebook.png")
    draw_curves(run / "tensorboard", out / "curves.png", CURVES)
    print((out / "tokenizer.md").read_text(encoding="utf-8"))


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| modality | images | PSNR, dB | of patch means | gain | SSIM | codes in use | token entropy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["da_level"] is None:
            gain = row["psnr"] - row["psnr_patch_means"]
            lines.append(
                f"| {row['modality'] or 'all'} | {row['images']} | {row['psnr']:.2f} "
                f"| {row['psnr_patch_means']:.2f} | {gain:+.2f} | {row['ssim']:.3f} "
                f"| {row['codes_in_use']:.0%} | {row['token_entropy']:.2f} |"
            )
    return "\n".join(lines) + "\n"


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
