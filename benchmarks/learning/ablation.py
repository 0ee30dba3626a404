"""Short trainings that differ in one thing, and the table of what became of them."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.plain import PlainTokenizer
from catalog.sampling import CropGeometry
from training.config import TokenizerModelConfig, load_preset
from training.data import open_validation
from training.evaluate import evaluate_tokenizer
from training.models import build_tokenizer
from training.pretrained import load_tokenizer
from training.tokenizer import Tokenizer
from training.train_tokenizer import train

VOLUMES = "volumes"
"""The mix of all 3-D images."""
HELD_OUT = 24
"""Images to measure on."""
CROP = CropGeometry(tokens_z=2, tokens_x=4)
"""Small, to take many steps; trained and measured on."""
PROBED_STEPS = (20, 80)
"""Of two runs, whose difference tells what a step costs."""
PROBES = 3
"""Of every arm, by turns; the least counts, as other work on the machine only adds to it."""
RANDOM = (
    *("model.initial=random", "loss.diversity_weight=0.01", "loss.sharpness_weight=0"),
    *("optim.peak_lr=1.0e-3", "optim.min_lr=1.0e-5", "optim.betas=[0.9,0.95]"),
)
"""The paper's start, with what it needs to learn in so short a time."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    settings: tuple[str, ...] = RANDOM
    build: Callable[[TokenizerModelConfig], Tokenizer] = build_tokenizer


ARMS = {
    "soft": Arm(),
    "Gumbel": Arm((*RANDOM, "model.quantizer=gumbel")),
    # Compares features with codes, so both have one size.
    "nearest": Arm((*RANDOM, "model.quantizer=nearest", "model.embedding_dim=192")),
    "soft, no prior": Arm((*RANDOM, "loss.diversity_weight=0")),
    "volumes: SAC": Arm((*RANDOM, f"data.mix={VOLUMES}")),
    "volumes: plain, isotropic": Arm((*RANDOM, f"data.mix={VOLUMES}"), PlainTokenizer.build),
    "soft, linear start": Arm(()),
}


def run_arms(corpus: Path, runs: Path, *, minutes: float, seeds: Iterable[int]) -> None:
    """Train every arm with every seed for so many CPU minutes; a file RUN.json says that one is done."""
    runs.mkdir(exist_ok=True)
    mix = corpus / "mixes" / f"{VOLUMES}.yaml"
    if not mix.exists():
        command = ["pumit-data", "mix", "write", VOLUMES, "--where", "dimension = 3", "--data", str(corpus)]
        subprocess.run(command, check=True)
    step_seconds = _step_seconds(corpus, runs)
    for seed in seeds:
        for name, arm in ARMS.items():
            file = runs / f"{name.replace(': ', '-').replace(', ', '-').replace(' ', '_')}-{seed}.json"
            if not file.exists():
                result = _run(name, arm, corpus, runs, round(60 * minutes / step_seconds[name]), seed)
                file.write_text(json.dumps(result, indent=1), encoding="utf-8")
                print(json.dumps({key: result[key] for key in ("arm", "seed", "steps", "cpu_seconds", "all")}))


def _step_seconds(corpus: Path, runs: Path) -> dict[str, float]:
    """CPU seconds of a step of every arm; measured once, so that all seeds of an arm take as many steps."""
    file = runs / "step-seconds"
    if not file.exists():
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(PROBES):
            for name, arm in ARMS.items():
                fewer, more = (_train(arm, corpus, runs / "probe", steps, seed=1) for steps in PROBED_STEPS)
                seconds[name].append((more - fewer) / (PROBED_STEPS[1] - PROBED_STEPS[0]))
        shutil.rmtree(runs / "probe")
        file.write_text(json.dumps({name: min(each) for name, each in seconds.items()}, indent=1))
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _run(name: str, arm: Arm, corpus: Path, runs: Path, steps: int, seed: int) -> dict[str, Any]:
    folder = runs / f"{list(ARMS).index(name)}-{seed}"
    seconds = _train(arm, corpus, folder, steps, seed)
    trained = load_tokenizer(folder)
    network = type(arm.build(load_preset("tokenizer", "small").model))(trained.config)
    network.load_state_dict(trained.state_dict())
    held_out = open_validation(corpus, HELD_OUT, CROP)
    # A plain network has no way with a single slice.
    batches = [batch for batch in held_out.batches if VOLUMES not in name or batch.level < 5]
    evaluation = evaluate_tokenizer(network, batches, held_out.modalities, torch.device("cpu"))
    rows = evaluation.table().to_pylist()
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "cpu_seconds": seconds,
        "all": rows[-1],
        "rows": rows[:-1],
    }


def _train(arm: Arm, corpus: Path, folder: Path, steps: int, seed: int) -> float:
    """CPU seconds that it took."""
    settings = [
        *arm.settings,
        f"data.tokens_z={CROP.tokens_z}",
        f"data.tokens_x={CROP.tokens_x}",
        "data.batch_size=8",
        f"seed={seed}",
        f"steps={steps}",
        f"optim.warmup_steps={min(400, steps // 4)}",
        f"intervals.validate_every_steps={steps}",
        f"intervals.save_every_steps={steps}",
        "validation_images=1",
    ]
    # What an interrupted call left.
    shutil.rmtree(folder, ignore_errors=True)
    config = load_preset("tokenizer", "small", settings)
    began = time.process_time()
    train(config, corpus, folder, resume=False, make=arm.build)
    return time.process_time() - began


def _results(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(runs.glob("*.json"))]


def write_arms(runs: Path, out: Path) -> None:
    """A line for each arm: mean and standard deviation over seeds of what was measured on held-out subjects."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in _results(runs):
        by_arm[result["arm"]].append(result)
    head = ("arm", "seeds", "steps", "CPU min", "PSNR, dB", "of levels 0 / above", "SSIM")
    head = (*head, "codes in use", "perplexity", "token entropy")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [_line(name, by_arm[name]) for name in ARMS if name in by_arm]
    (out / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _line(name: str, results: list[dict[str, Any]]) -> str:
    def spread(values: list[float], digits: int) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"

    def of_all(measure: str, digits: int) -> str:
        return spread([result["all"][measure] for result in results], digits)

    thin, thick = (
        spread([_mean_psnr(result, levels) for result in results], 2) for levels in ((0,), (1, 2, 3, 4))
    )
    cells = [
        name,
        str(len(results)),
        f"{statistics.mean(result['steps'] for result in results):.0f}",
        f"{statistics.mean(result['cpu_seconds'] for result in results) / 60:.1f}",
        spread([_mean_over_modalities(result) for result in results], 2),
        f"{thin} / {thick}",
        of_all("ssim", 3),
        spread([100 * result["all"]["codes_in_use"] for result in results], 0) + " %",
        of_all("perplexity", 0),
        of_all("token_entropy", 2),
    ]
    return "| " + " | ".join(cells) + " |"


def _mean_over_modalities(result: dict[str, Any]) -> float:
    return statistics.mean(row["psnr"] for row in result["rows"] if row["da_level"] is None)


def _mean_psnr(result: dict[str, Any], levels: tuple[int, ...]) -> float:
    rows = [row for row in result["rows"] if row["da_level"] in levels]
    return sum(row["psnr"] * row["images"] for row in rows) / sum(row["images"] for row in rows)
