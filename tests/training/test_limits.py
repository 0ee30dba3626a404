"""What limits the loader: by made-up figures of every kind, and by a run of the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import cli
from tests.commands import run
from training.limits import Figures, judge, judge_loader, report

BUSY = Figures(
    place="corpus",
    remote=False,
    cores=8,
    workers=8,
    batch_size=48,
    steps=100,
    stored_rate=300.0,
    memory_rate=310.0,
    augment_rate=1000.0,
    device="cuda",
    plan_ms=0.1,
    decode_ms=20.0,
    busy_share=0.9,
    disk_mb_per_s=500.0,
    received_mb_per_s=0.0,
    cached_mb_per_s=0.0,
    cache_hit_share=None,
    fast_codec=False,
    run_steps=600_000,
)
"""All cores decode, and nothing else is slower."""
STORE = replace(BUSY, remote=True, busy_share=0.2)


@pytest.mark.parametrize(
    ("figures", "limit", "change"),
    [
        (BUSY, "decoding", "repack --profile train"),
        (replace(BUSY, fast_codec=True), "decoding", "more cores"),
        (replace(BUSY, workers=3), "workers", "data.workers=8"),
        (replace(BUSY, workers=0), "workers", "data.workers=8"),
        (replace(BUSY, memory_rate=900.0), "disk", "faster disk"),
        (replace(BUSY, memory_rate=900.0, workers=2), "disk", "data.workers=4"),
        (STORE, "network", "--cache"),
        (replace(STORE, cache_hit_share=0.1), "network", "nearer"),
        (replace(STORE, busy_share=0.9), "decoding", "repack --profile train"),
        (replace(STORE, busy_share=0.9, memory_rate=900.0), "decoding", "repack"),
        (replace(BUSY, augment_rate=100.0), "augmentation", "nothing in the loader"),
        (replace(BUSY, augment_rate=100.0, device="cpu"), "augmentation", "GPU"),
    ],
)
def test_the_slowest_stage_limits(figures: Figures, limit: str, change: str) -> None:
    verdict = judge(figures)
    assert verdict.limit == limit
    assert change in " ".join(verdict.change)
    lines = "\n".join(report(figures))
    assert f"Limit: {limit}" in lines
    assert change in lines


def test_a_cache_that_is_there_is_not_advised() -> None:
    assert "--cache" not in " ".join(judge(replace(STORE, cache_hit_share=0.1)).change)


def test_behind_the_augmentation_the_loader_is_told_too() -> None:
    figures = replace(BUSY, augment_rate=10.0, workers=2)
    assert (judge(figures).limit, judge_loader(figures).limit) == ("augmentation", "workers")
    assert "data.workers=8" in "\n".join(report(figures))


def test_the_command(toy_corpus: Path) -> None:
    options = ("--preset", "tiny", "--batch", "3", "--workers", "0", "--seconds", "0.2")
    done = run("pumit-data", "bench-loader", "--data", toy_corpus, *options, "--json")
    assert done.returncode == cli.DONE, done.stderr
    told = json.loads(done.stdout)
    assert told["limit"] in ("disk", "workers", "decoding", "augmentation")
    assert told["change"]
    assert (told["workers"], told["batch_size"]) == (0, 3)
    assert told["stored_rate"] > 0
    assert told["memory_rate"] > 0
    assert told["augment_rate"] > 0
    assert told["decode_ms"] > 0
    assert told["loader"]["limit"] in ("disk", "workers", "decoding")


def test_wrong_calls(toy_corpus: Path, tmp_path: Path) -> None:
    for arguments in (("--preset", "nothing"), ("--workers", "-1"), ("--data", str(tmp_path))):
        done = run("pumit-data", "bench-loader", "--data", toy_corpus, *arguments)
        assert done.returncode == cli.WRONG_CALL, arguments
        assert "Traceback" not in done.stderr
