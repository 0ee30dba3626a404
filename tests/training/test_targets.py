"""Targets computed ahead of a training: the same training comes out, and never one on other crops."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from catalog.errors import SetupError
from tests.commands import command
from training import targets, train_mim, train_tokenizer
from training.config import MimRunConfig, load_preset
from training.flops import mim_counter
from training.models import build_mim
from training.pretrained import load_tokenizer
from training.run import newest_checkpoint
from training.targets import plan_targets

SMALL = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=3", "data.workers=0", "device=cpu", "steps=5"),
    *("intervals.validate_every_steps=5", "intervals.save_every_steps=5", "optim.warmup_steps=1"),
]
TOKENIZER = ["model.channels=[8,8,16]", "model.codebook_size=16", "model.embedding_dim=8"]
VIT = ["model.dim=16", "model.depth=2", "model.heads=2", "validation_images=2"]


@pytest.fixture(scope="module")
def tokenizer(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    settings = [*SMALL, *TOKENIZER, "discriminator.optim.warmup_steps=1"]
    train_tokenizer.train(load_preset("tokenizer", "tiny", settings), toy_corpus, folder, resume=False)
    return folder


def config(tokenizer: Path, *settings: str) -> MimRunConfig:
    return load_preset("mim", "tiny", [*SMALL, *VIT, f"tokenizer={tokenizer}", *settings])


@pytest.fixture(scope="module")
def ready(toy_corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "of-five-steps"
    assert plan_targets(config(tokenizer), toy_corpus).write(folder) == 5
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(run) / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "steps").iterdir()}


@pytest.mark.parametrize("settings", [[], ["model.dim=32", "steps=4"]], ids=["same", "another ViT"])
def test_a_training_on_them_is_bit_for_bit_the_same(toy_corpus, tokenizer, ready, tmp_path, settings):
    with_them = config(tokenizer, *settings, f"targets={ready}")
    train_mim.train(config(tokenizer, *settings), toy_corpus, tmp_path / "without", resume=False)
    train_mim.train(with_them, toy_corpus, tmp_path / "with", resume=False)
    expected = weights(tmp_path / "without")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "with").items())


def test_passes_of_a_batch_take_their_own_part(toy_corpus, tokenizer, ready, tmp_path):
    for name, settings in {"without": [], "with": [f"targets={ready}"]}.items():
        parts = config(tokenizer, "data.accumulate=2", *settings)
        train_mim.train(parts, toy_corpus, tmp_path / name, resume=False)
    expected = weights(tmp_path / "without")
    # Fewer crops at once round otherwise.
    for name, value in weights(tmp_path / "with").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_what_is_there_is_not_computed_again(toy_corpus, tokenizer, ready, tmp_path):
    folder = tmp_path / "targets"
    shutil.copytree(ready, folder)
    for step in (3, 4):
        (folder / "steps" / f"{step:08d}.safetensors").unlink()
    before = (folder / "steps" / "00000000.safetensors").stat().st_mtime_ns
    assert plan_targets(config(tokenizer), toy_corpus).write(folder) == 2
    assert plan_targets(config(tokenizer), toy_corpus).write(folder) == 0
    assert (folder / "steps" / "00000000.safetensors").stat().st_mtime_ns == before
    assert contents(folder) == contents(ready)


def test_more_steps_are_added(toy_corpus, tokenizer, ready, tmp_path):
    folder = tmp_path / "targets"
    shutil.copytree(ready, folder)
    longer = config(tokenizer, "steps=7")
    with pytest.raises(SetupError, match="has no targets of step 7"):
        train_mim.train(
            longer.model_copy(update={"targets": folder}), toy_corpus, tmp_path / "run", resume=False
        )
    assert plan_targets(longer, toy_corpus).write(folder) == 2
    assert len(contents(folder)) == 7


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files_and_goes_on(toy_corpus, tokenizer, tmp_path):
    folder = tmp_path / "targets"
    settings = [f"--set={one}" for one in [*SMALL, *VIT, "steps=400"]]
    call = command(
        *("pumit-train", "targets", "--out", folder, "--tokenizer", tokenizer, "--data", toy_corpus), *settings
    )
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("steps/000000?5.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = len(list(folder.glob("steps/0*.safetensors")))
    assert 0 < killed_at < 400
    told = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert f"{400 - killed_at} of them new" in told
    plan_targets(config(tokenizer, "steps=400"), toy_corpus).write(tmp_path / "undisturbed")
    assert contents(folder) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("setting", "told"),
    [("seed=9", "seed"), ("data.batch_size=2", "data"), ("precision=bf16", "precision")],
)
def test_those_of_other_crops_are_refused(toy_corpus, tokenizer, ready, tmp_path, setting, told):
    other = config(tokenizer, setting, f"targets={ready}")
    with pytest.raises(SetupError, match=rf"this run in: {told}. .*targets --out` another folder"):
        train_mim.train(other, toy_corpus, tmp_path / "run", resume=False)
    with pytest.raises(SetupError, match=rf"differ in: {told}"):
        plan_targets(config(tokenizer, setting), toy_corpus).write(ready)


def test_those_of_another_tokenizer_are_refused(toy_corpus, tokenizer, ready, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, other)
    file = newest_checkpoint(other) / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(SetupError, match="differ from this run in: tokenizer"):
        train_mim.train(config(other, f"targets={ready}"), toy_corpus, tmp_path / "run", resume=False)


def test_folders_that_cannot_be_used_are_named(toy_corpus, tokenizer, ready, tmp_path, monkeypatch):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    with pytest.raises(SetupError, match=rf"{empty} holds no targets"):
        train_mim.train(config(tokenizer, f"targets={empty}"), toy_corpus, tmp_path / "a", resume=False)
    shutil.copytree(ready, broken)
    file = broken / "steps" / "00000002.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SetupError, match=rf"{file} cannot be read: .* Delete it"):
        train_mim.train(config(tokenizer, f"targets={broken}"), toy_corpus, tmp_path / "b", resume=False)
    with pytest.raises(SetupError, match="holds something else than targets"):
        plan_targets(config(tokenizer), toy_corpus).write(tokenizer)
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(SetupError, match=r"take about .* GB, and .* has 1e-06 GB left"):
        plan_targets(config(tokenizer), toy_corpus).write(tmp_path / "c")


def test_only_tokens_are_learnt_from_them(tokenizer, ready):
    with pytest.raises(SetupError, match="objective pixels has no targets"):
        load_preset("mim", "tiny", [*SMALL, *VIT, "objective=pixels", f"targets={ready}"])


def test_the_size_is_told_before_anything_is_written(toy_corpus, tokenizer, ready):
    work = plan_targets(config(tokenizer), toy_corpus)
    stored = sum(len(content) for content in contents(ready).values())
    assert work.bytes_expected == pytest.approx(stored, rel=0.1)  # a header in each file
    settings = [f"--set={one}" for one in [*SMALL, *VIT]]
    call = command(
        *("pumit-train", "targets", "--out", ready / "no", "--tokenizer", tokenizer, "--data", toy_corpus),
        *("--dry-run", *settings),
    )
    told = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "targets of 5 steps, about" in told
    assert not (ready / "no").exists()


def test_a_step_on_them_has_fewer_operations(tokenizer):
    model = build_mim(config(tokenizer), 16)

    class Plan:
        level, crop_size = 0, (16, 32, 32)

    whole = mim_counter(3, model, load_tokenizer(tokenizer)).work(Plan)
    fewer = mim_counter(3, model, None).work(Plan)
    assert fewer.tokens == whole.tokens
    assert 0 < fewer.flops < whole.flops
