"""Masked image modelling on a real corpus, with the tokens of a really trained tokenizer."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from catalog.errors import SetupError
from tests.training_process import train_in_process
from training import train_mim, train_tokenizer
from training.config import MimRunConfig, load_preset
from training.mim import MIMLoss
from training.models import build_mim
from training.objectives import tokens
from training.run import TrainingDivergedError, newest_checkpoint, read_state
from training.weights import load_weights

REPOSITORY = Path(__file__).parents[2]
DATA = ["data.tokens_z=1", "data.tokens_x=2", "data.batch_size=2", "data.workers=0", "device=cpu"]
INTERVALS = [
    *("intervals.log_every_steps=1", "intervals.save_every_steps=2", "intervals.validate_every_steps=3"),
    *("steps=6", "optim.warmup_steps=1"),
]
SMALL = [*DATA, *INTERVALS, "model.dim=16", "model.depth=2", "model.heads=2", "model.drop_path=0.2"]
TOKENIZER = [
    *DATA,
    *INTERVALS,
    *("discriminator.optim.warmup_steps=1", "model.channels=[8,8,16]"),
    *("model.codebook_size=16", "model.embedding_dim=8"),
]


@pytest.fixture(scope="module")
def tokenizer(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    train_tokenizer.train(load_preset("tokenizer", "tiny", TOKENIZER), toy_corpus, folder, resume=False)
    return folder


def config(tokenizer: Path, *overrides: str) -> MimRunConfig:
    return load_preset("mim", "tiny", [*SMALL, f"tokenizer={tokenizer}", *overrides])


@pytest.fixture(scope="module")
def whole(toy_corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_mim.train(config(tokenizer), toy_corpus, folder, resume=False)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(run) / "model.safetensors")


def assert_same_result(run: Path, other: Path) -> None:
    expected = weights(other)
    assert newest_checkpoint(run).name == newest_checkpoint(other).name
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())


def test_the_loss_falls_and_the_summary_says_how_well_it_went(toy_corpus, tokenizer, tmp_path):
    longer = config(tokenizer, "steps=30", "optim.peak_lr=3e-3", "intervals.validate_every_steps=30")
    summary = train_mim.train(longer, toy_corpus, tmp_path / "run", resume=False)
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["validation/kl"] >= 0
    assert 0 < summary["validation/unigram_loss"] <= math.log(16)
    assert summary["validation/loss"] == pytest.approx(
        summary["validation/kl"] + summary["validation/target_entropy"], rel=1e-4
    )
    assert 0 <= summary["validation/accuracy"] <= summary["validation/accuracy_top5"] <= 1


def test_pictures_have_four_columns(whole):
    pictures = sorted((whole / "pictures").iterdir())
    assert [p.name for p in pictures] == ["step-00000003.png", "step-00000006.png"]
    assert Image.open(pictures[-1]).width > 4 * 100


def test_the_tokenizer_stays_frozen(toy_corpus, tokenizer, tmp_path):
    file = newest_checkpoint(tokenizer) / "model.safetensors"
    before = file.read_bytes()
    train_mim.train(config(tokenizer), toy_corpus, tmp_path / "run", resume=False)
    assert file.read_bytes() == before
    assert [p.name for p in newest_checkpoint(tmp_path / "run").glob("*.safetensors")] == ["model.safetensors"]


def test_a_resumed_run_ends_bit_for_bit_the_same(toy_corpus, tokenizer, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(newest_checkpoint(tmp_path / "run"))
    train_mim.train(config(tokenizer), toy_corpus, tmp_path / "run", resume=True)
    assert_same_result(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_process_killed_with_kill_9_resumes_and_ends_the_same(toy_corpus, tokenizer, tmp_path):
    overrides = [*SMALL, f"tokenizer={tokenizer}"]
    assert train_in_process("mim", overrides, toy_corpus, tmp_path / "undisturbed") == 0
    assert train_in_process("mim", overrides, toy_corpus, tmp_path / "run", stop="SIGKILL") == -signal.SIGKILL
    assert read_state(newest_checkpoint(tmp_path / "run"))["step"] == 4
    assert train_in_process("mim", overrides, toy_corpus, tmp_path / "run", resume=True) == 0
    assert_same_result(tmp_path / "run", tmp_path / "undisturbed")


def test_a_missing_tokenizer_says_what_to_run_first(toy_corpus, tmp_path):
    with pytest.raises(SetupError, match="run `pumit-train tokenizer` first"):
        train_mim.train(load_preset("mim", "tiny", SMALL), toy_corpus, tmp_path / "run", resume=False)
    with pytest.raises(SetupError, match="run `pumit-train tokenizer` or `mim` first"):
        train_mim.train(config(tmp_path / "nowhere"), toy_corpus, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_run_of_something_else_is_no_tokenizer(toy_corpus, whole, tmp_path):
    with pytest.raises(SetupError, match="a ViT, not a tokenizer"):
        train_mim.train(config(whole), toy_corpus, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_tokenizer_is_refused(toy_corpus, tokenizer, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    moved = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, moved)
    with pytest.raises(SetupError, match="tokenizer was"):
        train_mim.train(config(moved), toy_corpus, tmp_path / "run", resume=True)
    # The same path with other weights, as after training it anew.
    backup = shutil.copytree(tokenizer, tmp_path / "backup")
    try:
        shutil.rmtree(newest_checkpoint(tokenizer))
        with pytest.raises(SetupError, match="the tokenizer changed since this run began"):
            train_mim.train(config(tokenizer), toy_corpus, tmp_path / "run", resume=True)
    finally:
        shutil.copytree(backup, tokenizer, dirs_exist_ok=True)


def test_losses_that_are_not_finite_stop_the_run_and_name_the_images(
    toy_corpus, tokenizer, tmp_path, monkeypatch
):
    real = tokens.mim_loss

    def spoilt(*args: torch.Tensor) -> MIMLoss:
        losses = real(*args)
        return losses._replace(loss=losses.loss * float("nan"))

    monkeypatch.setattr(tokens, "mim_loss", spoilt)
    with pytest.raises(TrainingDivergedError, match=r"step 0:.*toy/.*step 2:.*toy/"):
        train_mim.train(config(tokenizer), toy_corpus, tmp_path / "run", resume=False)


def test_a_checkpoint_is_a_weight_file_that_starts_another_run(toy_corpus, tokenizer, whole, tmp_path):
    file = newest_checkpoint(whole) / "model.safetensors"
    report = load_weights(build_mim(config(tokenizer), 16), file)
    assert not report.missing
    started = config(tokenizer, f"initial_weights={file}", "steps=2", "optim.peak_lr=1e-12", "optim.min_lr=0")
    train_mim.train(started, toy_corpus, tmp_path / "run", resume=False)
    expected = weights(whole)
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8)
