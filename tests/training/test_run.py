"""The engine: a run continues exactly, is never half saved, and stops with a reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from catalog.errors import SetupError
from training.config import TokenizerRunConfig, load_preset
from training.optim import adamw, learning_rate, set_learning_rate
from training.parallel import replicated
from training.run import Run, TrainingDivergedError, TrainingInterrupted, choose_device, newest_checkpoint

REPOSITORY = Path(__file__).parents[2]
FINGERPRINTS = {"catalog": "c1", "split": "s1"}


def config(*overrides: str) -> TokenizerRunConfig:
    short = ["steps=12", "intervals.save_every_steps=4", "intervals.log_every_steps=1", "optim.warmup_steps=2"]
    short += ["discriminator.optim.warmup_steps=2", "optim.peak_lr=2e-3"]
    return load_preset("tokenizer", "tiny", [*short, *overrides])


def train(folder: Path, resume: bool = False, *overrides: str, each_step=lambda step, loss: loss, **kwargs):
    """Fit a dropout network to noise: momenta, scheduled rates and random numbers all matter to the result."""
    chosen = config(*overrides)
    with Run(folder, chosen, **({"fingerprints": FINGERPRINTS} | kwargs), resume=resume) as run:
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        optimizer = adamw(model, chosen.optim)
        run.restore({"model": model}, {"model": optimizer})
        network = replicated(model, run.world)
        for step in run.steps():
            x = torch.randn(8, 4)
            set_learning_rate(optimizer, learning_rate(step, chosen.steps, chosen.optim))
            loss = each_step(step, (network(x) - x.sum(1, keepdim=True)).square().mean())
            images = f"ds/image{step}" + (f"-{run.world.rank}" if run.world.size > 1 else "")
            run.backward(loss, [images] * len(x))
            run.update(optimizer, 1.0)
            run.finish_step(step, {})
            if run.due(step, chosen.intervals.save_every_steps):
                run.save(step + 1)
        return run.summary({"psnr": 20.0})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(folder) / "model.safetensors")


def assert_same_result(folder: Path, other: Path) -> None:
    assert newest_checkpoint(folder).name == newest_checkpoint(other).name
    expected = weights(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    states = [torch.load(newest_checkpoint(run) / "training.pt", weights_only=True) for run in (folder, other)]
    assert torch.equal(states[0]["rng"][0]["cpu"], states[1]["rng"][0]["cpu"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(folder)
    return folder


def test_a_run_folder_holds_what_it_promises(uninterrupted):
    assert {p.name for p in uninterrupted.iterdir()} == {
        "run.json", "tensorboard", "pictures", "checkpoints", "summary.json",
    }  # fmt: skip
    assert [p.name for p in sorted((uninterrupted / "checkpoints").iterdir())] == [
        "step-00000008", "step-00000012"
    ]  # fmt: skip
    state = json.loads((newest_checkpoint(uninterrupted) / "state.json").read_text())
    assert state["step"] == 12
    assert state["fingerprints"] == FINGERPRINTS
    assert state["config"] == config().model_dump(mode="json")


def test_the_summary_has_both_losses_speed_and_what_was_measured(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["images_per_second"] > 0
    assert summary["psnr"] == 20.0


def test_the_curves_have_one_point_a_step(uninterrupted):
    log = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("loss")] == list(range(1, 13))


def test_a_run_resumed_from_any_checkpoint_ends_bit_for_bit_the_same(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(newest_checkpoint(folder))
    summary = train(folder, True)
    assert_same_result(folder, uninterrupted)
    whole = json.loads((uninterrupted / "summary.json").read_text())
    assert (summary["first_loss"], summary["last_loss"]) == (whole["first_loss"], whole["last_loss"])


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_beginning(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints" / ".step-00000004.partial").mkdir(parents=True)
    train(folder, True)
    assert_same_result(folder, uninterrupted)
    assert not list((folder / "checkpoints").glob(".*"))


def test_the_curves_of_a_resumed_run_are_whole(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(newest_checkpoint(folder))
    train(folder, True)
    log = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("loss")] == list(range(1, 13))


def test_resuming_a_finished_run_does_nothing_and_reports_it_again(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    summary = train(folder, True)
    assert summary["last_loss"] == json.loads((uninterrupted / "summary.json").read_text())["last_loss"]
    assert_same_result(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_with_exit_code_3(number, uninterrupted, tmp_path):
    def stop_in_step_5(step, loss):
        if step == 5:
            os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match=r"after step 6 of 12.*--resume") as stopped:
        train(tmp_path / "run", each_step=stop_in_step_5)
    assert stopped.value.code == 3
    assert signal.getsignal(number) is before
    assert newest_checkpoint(tmp_path / "run").name == "step-00000006"
    train(tmp_path / "run", True)
    assert_same_result(tmp_path / "run", uninterrupted)


CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("engine", {file!r})
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
def die_in_step_9(step, loss):
    if step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
engine.train(Path({folder!r}), each_step=die_in_step_9)
"""


def test_a_process_killed_with_kill_9_resumes_and_ends_the_same(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    child = CHILD.format(file=__file__, folder=str(folder))
    # Child and parent sum in the same order only with the same number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    died = subprocess.run([sys.executable, "-c", child], cwd=REPOSITORY, env=environment)
    assert died.returncode == -signal.SIGKILL
    assert newest_checkpoint(folder).name == "step-00000008"
    train(folder, True)
    assert_same_result(folder, uninterrupted)


def test_a_checkpoint_that_cannot_be_finished_leaves_none(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        train(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run") is None


def test_a_taken_folder_is_refused_without_resume(tmp_path, uninterrupted):
    with pytest.raises(SetupError, match=r"exists already.*--resume"):
        train(uninterrupted)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SetupError, match="exists already"):
        train(tmp_path)


def test_resuming_where_no_run_is_is_refused(tmp_path):
    with pytest.raises(SetupError, match="no run to resume"):
        train(tmp_path / "typo", True)


@pytest.mark.parametrize("name", ["catalog", "split"])
def test_a_resume_on_changed_data_is_refused(uninterrupted, name):
    with pytest.raises(SetupError, match=f"the {name} changed since this run began"):
        train(uninterrupted, True, fingerprints=FINGERPRINTS | {name: "other"})


def test_a_resume_with_another_configuration_is_refused_but_with_other_intervals_is_not(
    uninterrupted, tmp_path
):
    with pytest.raises(SetupError, match=r"optim\.peak_lr was 0\.002, is 0\.1"):
        train(uninterrupted, True, "optim.peak_lr=0.1")
    shutil.copytree(uninterrupted, tmp_path / "run")
    train(tmp_path / "run", True, "intervals.log_every_steps=7", "device=auto")


def test_three_steps_running_without_a_finite_loss_stop_the_run_and_name_the_images(tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"ds/image4.*ds/image5.*ds/image6") as stopped:
        train(tmp_path / "run", each_step=lambda step, loss: loss * float("nan") if step >= 4 else loss)
    assert "ds/image3" not in str(stopped.value)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_host_that_reads_one_step_behind_sees_the_same(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.steps_behind", lambda device: 1)
    rarely = ("intervals.log_every_steps=100", "intervals.save_every_steps=7")
    train(tmp_path / "run", False, *rarely)
    assert_same_result(tmp_path / "run", uninterrupted)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", uninterrupted)]
    assert summaries[0]["first_loss"] == summaries[1]["first_loss"]
    assert summaries[0]["last_loss"] == summaries[1]["last_loss"]


def test_a_host_that_reads_one_step_behind_still_names_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.steps_behind", lambda device: 1)

    def bad_from_step_4(step, loss):
        return loss * float("nan") if step >= 4 else loss

    with pytest.raises(TrainingDivergedError, match=r"ds/image4.*ds/image5.*ds/image6") as stopped:
        train(tmp_path / "run", False, "intervals.log_every_steps=100", each_step=bad_from_step_4)
    assert "ds/image7" not in str(stopped.value)


def test_two_bad_steps_are_skipped_and_forgotten_after_a_good_one(tmp_path):
    def mostly_bad(step, loss):
        return loss * float("inf") if step % 3 else loss

    summary = train(tmp_path / "run", each_step=mostly_bad)
    assert summary["last_loss"] < float("inf")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_bad_step_before_the_interruption_still_counts_after_it(tmp_path):
    def bad_from_step_3(step, loss):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * float("nan") if step >= 3 else loss

    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", each_step=bad_from_step_3)
    with pytest.raises(TrainingDivergedError, match=r"ds/image3.*ds/image4.*ds/image5"):
        train(tmp_path / "run", True, each_step=lambda _step, loss: loss * float("nan"))


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SetupError, match="device=cpu"):
            choose_device("cuda")
    with pytest.raises(SetupError, match=r"fp16.*needs a GPU"):
        train(tmp_path / "run", False, "precision=fp16")
    assert not (tmp_path / "run").exists()


def test_bfloat16_runs_on_the_cpu(tmp_path):
    with Run(tmp_path, config("precision=bf16"), fingerprints={}, resume=False) as run, run.autocast():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16
