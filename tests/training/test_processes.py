"""Several real processes train together: like one, however one of them is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import SCRIPTS, command, run
from training.pretrained import load_vit
from training.run import newest_checkpoint, read_state

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=3", "device=cpu", "optim.warmup_steps=1"),
    *("intervals.log_every_steps=1", "intervals.save_every_steps=2", "intervals.validate_every_steps=100"),
]
SETTINGS = {
    "tokenizer": [
        *COMMON,
        *("model.channels=[8,8,16]", "model.codebook_size=16", "model.embedding_dim=8", "steps=4"),
        *("loss.diversity_weight=0.3", "loss.sharpness_weight=0.1", "loss.gan_weight=0.1"),
        *("loss.gan_gate_loss=10", "discriminator.channels=[16,16,16]", "discriminator.optim.warmup_steps=1"),
    ],
    "mim": [*COMMON, "steps=4", "model.dim=16", "model.depth=2", "model.heads=2"],
}
"""Three crops a batch: processes have uneven shares."""


class Training:
    """A training as a user starts it, on the toy corpus."""

    def __init__(self, corpus: Path, tokenizer: Path | None = None) -> None:
        self._kind = "tokenizer" if tokenizer is None else "mim"
        self._fixed: list[str | Path] = ["--data", corpus]
        if tokenizer is not None:
            self._fixed += ["--tokenizer", tokenizer]

    def start(
        self, run: Path, *arguments: str, settings: tuple[str, ...] = (), torchrun: int = 0
    ) -> subprocess.Popen[str]:
        chosen = [part for one in (*SETTINGS[self._kind], *settings) for part in ("--set", one)]
        call = command("pumit-train", self._kind, "--run", run, *self._fixed, *arguments, *chosen)
        if torchrun:
            call = [
                *(str(SCRIPTS / "python"), "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(torchrun), "--no-python", "--", *call),
            ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        pipe = subprocess.PIPE
        return subprocess.Popen(call, env=environment, stderr=pipe, stdout=pipe, text=True)

    def run(self, run: Path, *arguments: str, settings: tuple[str, ...] = (), torchrun: int = 0) -> str:
        """What a training that ends well says."""
        process = self.start(run, *arguments, settings=settings, torchrun=torchrun)
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        return said


def curve(run: Path, name: str = "loss") -> list[float]:
    log = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in log.Scalars(name)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest_checkpoint(run).glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_like(run: Path, alone: Path) -> None:
    """The same losses to 1e-5, and weights that AdamW has not driven apart."""
    for name in ("loss", "grad_norm"):
        assert curve(run, name) == pytest.approx(curve(alone, name), rel=1e-5 if name == "loss" else 1e-3)
    assert len(curve(run)) == read_state(newest_checkpoint(run))["step"]
    expected = weights(alone)
    found = weights(run)
    assert found.keys() == expected.keys(), "names do not tell how a network was wrapped"


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert float((found[name] - value).norm()) < 1e-2 * float(value.norm()) + 1e-3


def assert_same_result(run: Path, other: Path) -> None:
    found, expected = weights(run), weights(other)
    assert newest_checkpoint(run).name == newest_checkpoint(other).name
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def processes_of(process: subprocess.Popen[str], count: int) -> list[int]:
    """The ids of the training processes that a launcher started, by rank."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if len(children) == count:
            return [int(child) for child in children]
        time.sleep(0.05)
    raise AssertionError(f"{count} processes did not start")


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while newest_checkpoint(run) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert newest_checkpoint(run) is not None, process.communicate()


@pytest.fixture(scope="module")
def alone(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained by one process."""
    folder = tmp_path_factory.mktemp("alone") / "tokenizer"
    Training(toy_corpus).run(folder)
    return folder


def test_two_processes_train_a_tokenizer_as_one_does(toy_corpus, alone, tmp_path):
    said = Training(toy_corpus).run(tmp_path / "run", "--nproc", "2")
    assert_like(tmp_path / "run", alone)
    assert said.count("step 1/4") == 1, "one of them speaks"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_passes_over_parts_of_a_batch_add_up_to_the_whole(toy_corpus, alone, tmp_path):
    Training(toy_corpus).run(tmp_path / "run", settings=("data.accumulate=3",))
    assert_like(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_processes_train_a_vit_as_one_does(toy_corpus, alone, tmp_path):
    training = Training(toy_corpus, alone)
    training.run(tmp_path / "one", settings=("data.accumulate=2", "ema_decay=0.5"))
    settings = ("ema_decay=0.5", "intervals.save_every_steps=4")
    training.run(tmp_path / "two", torchrun=2, settings=settings)
    assert_like(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_the_other_and_a_resume_goes_on_exactly(toy_corpus, tmp_path, victim):
    training = Training(toy_corpus)
    long = ("steps=60", "model.quantizer=gumbel")
    training.run(tmp_path / "whole", "--nproc", "2", settings=long)
    process = training.start(tmp_path / "run", "--nproc", "2", settings=long)
    ranks = processes_of(process, 2)
    wait_for_checkpoint(tmp_path / "run", process)
    os.kill(ranks[victim], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 3, said
    assert f"process {victim} was ended by SIGKILL" in said
    assert f"rank {1 - victim} of 2 lost another process" in said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert read_state(newest_checkpoint(tmp_path / "run"))["step"] < 60
    training.run(tmp_path / "run", "--nproc", "2", "--resume", settings=long)
    assert_same_result(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank 1", "launcher"])
def test_a_signal_to_any_of_them_stops_all_after_the_same_step(toy_corpus, tmp_path, who):
    process = Training(toy_corpus).start(tmp_path / "run", "--nproc", "2", settings=("steps=1000",))
    ranks = processes_of(process, 2)
    wait_for_checkpoint(tmp_path / "run", process)
    os.kill(ranks[1] if who == "rank 1" else process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3, said
    step = read_state(newest_checkpoint(tmp_path / "run"))["step"]
    assert said.count(f"SIGTERM: stopped after step {step} of 1000; checkpoint written") == 1
    assert "lost another process" not in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_processes_that_draw_noise_cannot_change_their_number(toy_corpus, tmp_path):
    noisy = ("model.quantizer=gumbel", "steps=4")
    training = Training(toy_corpus)
    training.run(tmp_path / "run", "--nproc", "2", settings=noisy)
    process = training.start(tmp_path / "run", "--resume", settings=noisy)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "was trained by 2 processes" in said
    assert "Resume with as many" in said


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batches(toy_corpus, alone, tmp_path):
    run = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(newest_checkpoint(run))
    said = Training(toy_corpus).run(run, "--nproc", "3", "--resume")
    assert "until now trained by 1 processes (data.accumulate 1), now by 3" in said
    assert curve(run) == pytest.approx(curve(alone), rel=1e-5)


@pytest.mark.slow
def test_a_taken_folder_is_told_once(toy_corpus, alone):
    process = Training(toy_corpus).start(alone, "--nproc", "2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.count("exists already: continue that run with --resume") == 1


@pytest.mark.slow
def test_processes_are_started_once(toy_corpus, tmp_path):
    process = Training(toy_corpus).start(tmp_path / "run", "--nproc", "3", torchrun=2)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "leave --nproc out" in said


@pytest.mark.slow
def test_shards_of_a_vit_train_as_the_whole_does_and_its_checkpoints_are_whole(toy_corpus, alone, tmp_path):
    training = Training(toy_corpus, alone)
    layers = ("optim.layer_lr_decay=0.7", "optim.patch_gradient_scale=0.1", "ema_decay=0.5")
    training.run(tmp_path / "one", settings=layers)
    sharded = (*layers, "parallel=fsdp")
    training.run(tmp_path / "two", "--nproc", "2", settings=sharded)
    assert_like(tmp_path / "two", tmp_path / "one")
    assert_near(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert load_vit(tmp_path / "two").channels == 16

    resumed = shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(newest_checkpoint(resumed))
    training.run(resumed, "--nproc", "2", "--resume", settings=sharded)
    assert_same_result(resumed, tmp_path / "two")


ENGINE = """
import importlib.util
from pathlib import Path
from training.world import joined
spec = importlib.util.spec_from_file_location("engine", {file!r})
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
with joined("cpu") as world:
    def bad(step, loss):
        return loss * float("nan") if world.rank == 1 and step in {steps!r} else loss
    summary = engine.train(Path({folder!r}), False, "data.batch_size=16", each_step=bad, world=world)
    assert summary["last_loss"] < float("inf")
"""


def train_with_bad_steps(folder: Path, steps: tuple[int, ...]) -> tuple[int, str]:
    """Exit code and messages of two processes, of which the second has a loss of NaN in some steps."""
    program = ENGINE.format(
        file=str(REPOSITORY / "tests/training/test_run.py"), folder=str(folder), steps=steps
    )
    starter = "import sys; from training.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    call = [sys.executable, "-c", starter, sys.executable, "-c", program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(tmp_path):
    code, said = train_with_bad_steps(tmp_path / "run", (2, 3, 5))
    assert code == 0, said
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert [value != value for value in curve(tmp_path / "run")] == [n in (2, 3, 5) for n in range(12)]


@pytest.mark.slow
def test_three_of_them_stop_all_and_name_the_images_of_the_process_concerned(tmp_path):
    code, said = train_with_bad_steps(tmp_path / "run", (4, 5, 6))
    assert code != 0
    assert said.count("TrainingDivergedError") == 1, "rank 0 says it"
    assert all(f"ds/image{step}-1" in said for step in (4, 5, 6))
    assert "ds/image4-0" not in said


@pytest.mark.slow
def test_the_moving_average_is_exported_on_request(toy_corpus, tmp_path):
    Training(toy_corpus).run(tmp_path / "run", settings=("ema_decay=0.5", "channels_last=true"))
    kept = weights(tmp_path / "run")
    assert any(
        not torch.equal(kept[f"ema/{name[6:]}"], kept[name]) for name in kept if name.startswith("model/")
    )
    done = run("pumit-train", "export", tmp_path / "run", "--ema", "--out", tmp_path / "average")
    assert done.returncode == 0, done.stderr
    for name, value in load_file(tmp_path / "average" / "model.safetensors").items():
        assert torch.equal(value, kept[f"ema/{name}"])


def test_a_run_without_an_average_says_how_to_keep_one(alone, tmp_path):
    done = run("pumit-train", "export", alone, "--ema", "--out", tmp_path / "average")
    assert done.returncode == 2
    assert "ema_decay" in done.stderr


@pytest.mark.slow
def test_compiled_networks_train_as_plain_ones_do(toy_corpus, alone, tmp_path):
    Training(toy_corpus).run(tmp_path / "run", settings=("compile=true",))
    assert curve(tmp_path / "run") == pytest.approx(curve(alone), rel=1e-4)
