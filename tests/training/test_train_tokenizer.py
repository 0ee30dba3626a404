"""The tokenizer's loop on a real corpus: it learns, continues exactly, and refuses what would not continue."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from catalog.errors import SetupError
from tests.training_process import train_in_process
from training import train_tokenizer
from training.config import TokenizerRunConfig, load_preset
from training.pretrained import load_tokenizer
from training.quantizer import gumbel_temperature
from training.run import Run, TrainingDivergedError, TrainingInterrupted, newest_checkpoint, read_state
from training.train_tokenizer import train

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=2", "data.workers=0", "device=cpu"),
    *("model.channels=[8,8,16]", "model.codebook_size=16", "model.embedding_dim=8", "steps=6"),
    *("optim.warmup_steps=1", "discriminator.optim.warmup_steps=1", "discriminator.channels=[16,16,16]"),
    *("intervals.log_every_steps=1", "intervals.save_every_steps=2", "intervals.validate_every_steps=3"),
]
GAN = ["loss.gan_weight=0.1", "loss.gan_gate_loss=10"]


def config(*overrides: str) -> TokenizerRunConfig:
    return load_preset("tokenizer", "tiny", [*SMALL, *overrides])


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest_checkpoint(run).glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same_result(run: Path, other: Path) -> None:
    found, expected = tensors(run), tensors(other)
    assert newest_checkpoint(run).name == newest_checkpoint(other).name
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert read_state(newest_checkpoint(run))["numbers"] == read_state(newest_checkpoint(other))["numbers"]


@pytest.fixture(scope="module")
def whole(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every part but LPIPS, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(*GAN), toy_corpus, folder, resume=False)
    return folder


def test_the_loss_falls_and_the_summary_says_how_well_it_went(toy_corpus, tmp_path):
    longer = config(
        "steps=60", "optim.peak_lr=1e-2", "optim.max_grad_norm=1", "intervals.validate_every_steps=60"
    )
    summary = train(longer, toy_corpus, tmp_path / "run", resume=False)
    assert summary["last_loss"] < 0.8 * summary["first_loss"]
    assert summary["images_per_second"] > 0
    assert summary["validation/psnr"] > 5
    assert 0 < summary["validation/codebook_utilisation"] <= 1
    assert 1 <= summary["validation/codebook_perplexity"] <= 16


def test_curves_and_pictures_are_written(whole):
    log = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert {"discriminator_loss", "loss/adversarial", "validation/psnr"} <= set(log.Tags()["scalars"])
    assert all(0 <= event.value <= 1 for event in log.Scalars("loader/wait_share"))
    assert all(event.value > 0 for event in log.Scalars("loader/decode_ms_per_crop"))
    assert [p.name for p in sorted((whole / "pictures").iterdir())] == [
        "codebook-00000003.png",
        "codebook-00000006.png",
        "step-00000003.png",
        "step-00000006.png",
    ]
    assert Image.open(whole / "pictures" / "step-00000006.png").width > 100


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_other_quantizers_train_and_load_as_what_they_are(quantizer, toy_corpus, tmp_path, monkeypatch):
    temperatures = []
    update = Run.update

    def watch(self, optimizer, *rest):
        temperatures.append(dict(models["model"].named_buffers()).get("quantizer.temperature"))
        temperatures[-1] = None if temperatures[-1] is None else float(temperatures[-1])
        return update(self, optimizer, *rest)

    models = {}
    restore = Run.restore
    monkeypatch.setattr(Run, "restore", lambda self, m, o: (models.update(m), restore(self, m, o))[1])
    monkeypatch.setattr(Run, "update", watch)
    chosen = [f"model.quantizer={quantizer}", "model.embedding_dim=16", "steps=4"]
    summary = train(config(*chosen), toy_corpus, tmp_path / "run", resume=False)
    assert summary["last_loss"] < float("inf")
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded.config.quantizer == quantizer
    if quantizer == "gumbel":
        assert temperatures == pytest.approx([gumbel_temperature(step, 4) for step in range(4)])


def test_a_shut_gate_leaves_the_adversarial_term_out(toy_corpus, tmp_path):
    train(config("loss.gan_weight=0.1", "steps=3"), toy_corpus, tmp_path / "run", resume=False)
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert "loss/adversarial" not in log.Tags()["scalars"]
    assert {event.value for event in log.Scalars("gan_gate_open")} == {0.0}


def test_validation_leaves_no_trace_in_the_weights(toy_corpus, whole, tmp_path):
    train(config(*GAN, "intervals.validate_every_steps=1"), toy_corpus, tmp_path / "run", resume=False)
    assert_same_result(tmp_path / "run", whole)


def test_a_resumed_run_ends_bit_for_bit_the_same_discriminator_and_gate_included(toy_corpus, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(newest_checkpoint(run))
    train(config(*GAN), toy_corpus, run, resume=True)
    assert_same_result(run, whole)


@pytest.fixture(scope="module")
def undisturbed(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `whole`, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train_in_process("tokenizer", [*SMALL, *GAN], toy_corpus, folder) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "code", "steps"),
    [("SIGKILL", -9, 4), pytest.param("SIGTERM", 3, 5, marks=pytest.mark.slow)],
)
def test_a_process_that_was_stopped_resumes_and_ends_the_same(
    name, code, steps, toy_corpus, undisturbed, tmp_path
):
    settings = ("tokenizer", [*SMALL, *GAN], toy_corpus, tmp_path / "run")
    assert train_in_process(*settings, stop=name) == code
    assert read_state(newest_checkpoint(tmp_path / "run"))["step"] == steps
    assert train_in_process(*settings, resume=True) == 0
    assert_same_result(tmp_path / "run", undisturbed)


def test_a_signal_in_this_process_ends_with_exit_code_3(toy_corpus, tmp_path, monkeypatch):
    finish = Run.finish_step

    def finish_and_interrupt(self: Run, step: int, *rest: Any) -> None:
        finish(self, step, *rest)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "finish_step", finish_and_interrupt)
    with pytest.raises(TrainingInterrupted) as stopped:
        train(config(), toy_corpus, tmp_path / "run", resume=False)
    assert stopped.value.code == 3
    assert read_state(newest_checkpoint(tmp_path / "run"))["step"] == 1


def test_losses_that_are_not_finite_stop_the_run_and_name_the_images(toy_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "reconstruction_loss", lambda x, _y: x.mean() * float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"step 0:.*toy/.*step 1:.*toy/.*step 2:.*toy/"):
        train(config(), toy_corpus, tmp_path / "run", resume=False)


@pytest.mark.parametrize(
    ("overrides", "message"), [(["seed=1"], "seed was 666, is 1"), ([], "loss.gan_weight was 0.1, is 0.0")]
)
def test_a_resume_with_another_configuration_is_refused(overrides, message, toy_corpus, whole):
    with pytest.raises(SetupError, match=message):
        train(config(*(GAN if overrides else ()), *overrides), toy_corpus, whole, resume=True)


def test_a_resume_on_another_catalog_is_refused(toy_corpus, whole, tmp_path):
    from catalog.corpus import Corpus
    from catalog.query import load_catalog
    from catalog.write import merge_dataset

    corpus = shutil.copytree(toy_corpus, tmp_path / "corpus")
    row = next(row for row in load_catalog(Corpus(corpus)).to_pylist() if row["split"] == "train")
    merge_dataset(Corpus(corpus), "toy", [row | {"sampling_weight": 2.0}], [])
    with pytest.raises(SetupError, match="the catalog changed since this run began"):
        train(config(*GAN), corpus, whole, resume=True)


def test_a_resume_on_another_split_is_refused(toy_corpus, whole, tmp_path):
    corpus = shutil.copytree(toy_corpus, tmp_path / "corpus")
    (corpus / "splits" / "toy.parquet").unlink()
    with pytest.raises(SetupError, match="the split changed since this run began"):
        train(config(*GAN), corpus, whole, resume=True)


def test_a_taken_folder_is_refused(toy_corpus, whole):
    with pytest.raises(SetupError, match=r"exists already.*--resume"):
        train(config(*GAN), toy_corpus, whole, resume=False)


def test_the_perceptual_loss_without_weights_says_what_to_set(toy_corpus, tmp_path):
    with pytest.raises(SetupError, match=r"loss\.lpips_weights_file"):
        train(config("loss.lpips_weight=1"), toy_corpus, tmp_path / "run", resume=False)


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(SetupError, match="no catalog"):
        train(config(), tmp_path, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_trained_tokenizer_loads_from_its_run_folder_with_its_own_size(whole):
    tokenizer = load_tokenizer(whole)
    assert tokenizer.config.codebook_size == 16
    expected = load_file(newest_checkpoint(whole) / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in tokenizer.state_dict().items())


def test_a_folder_without_a_tokenizer_says_what_to_run(tmp_path):
    with pytest.raises(SetupError, match="pumit-train tokenizer"):
        load_tokenizer(tmp_path)
