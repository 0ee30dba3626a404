"""Curves on Weights & Biases: the real package, offline; what it keeps is read back from its own files."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from catalog.errors import SetupError
from tests.commands import run
from tests.training.test_processes import SETTINGS
from tests.training.test_run import train
from training.run import TrainingInterrupted


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """All that was kept of a run, part after part."""
    wandb.teardown()  # as at the end of a process: until then its files may not be written
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    return [wandb_internal_pb2.Record.FromString(one) for file in files for one in entries(file.read_bytes())]


def entries(log: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format: blocks of 32 KiB, in which whole entries (1) or pieces (2, 3, 4) lie."""
    at, entry = 7, b""
    while at + 7 <= len(log):
        if (left := -at % (1 << 15)) < 7:
            at += left
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        entry += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield entry
            entry = b""


def history(folder: Path) -> list[dict[str, float]]:
    points = (one.history.item for one in records(folder) if one.HasField("history"))
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in items} for items in points]


def test_a_run_that_was_interrupted_goes_on_as_the_same_run(tmp_path):
    def stop_in_step_5(step, loss):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    project = "wandb_project=curves"
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", False, project, each_step=stop_in_step_5)
    assert [one["_step"] for one in history(tmp_path / "run")] == list(range(1, 7))
    time.sleep(1.1)  # parts are told apart by the second
    train(tmp_path / "run", True, project)
    runs = [one.run for one in records(tmp_path / "run") if one.HasField("run")]
    assert {(one.project, one.run_id, one.display_name) for one in runs} == {("curves", runs[0].run_id, "run")}
    points = history(tmp_path / "run")
    assert [one["_step"] for one in points] == list(range(1, 13))
    assert all(one["loss"] > 0 and one["images_per_second"] > 0 for one in points)
    assert [one.exit.exit_code for one in records(tmp_path / "run") if one.HasField("exit")] == [1, 0]


def test_neither_folders_nor_images_leave_the_machine(tmp_path):
    private = tmp_path / "patients of dr who"
    settings = [
        "wandb_project=curves",
        f"data.cache_dir={private}",
        f"loss.lpips_weights_file={private}/vgg.pth",
    ]
    train(tmp_path / "run", False, *settings, "steps=4", each_step=lambda step, loss: loss)
    kept = b"".join(one.SerializeToString() for one in records(tmp_path / "run") if not one.HasField("footer"))
    assert b"vgg.pth" in kept
    assert str(tmp_path).encode() not in kept.replace(str(tmp_path / "run").encode(), b"")
    assert b"ds/image" not in kept


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SetupError, match=r"pip install 'pumit-data\[wandb\]'"):
        train(tmp_path / "run", False, "wandb_project=curves")


def test_what_the_package_refuses_is_told_with_what_to_do(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SetupError, match=r"refuses the project curves: No API key configured\. .*offline"):
        train(tmp_path / "run", False, "wandb_project=curves")


def test_a_run_without_a_project_never_asks_for_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tmp_path / "run", False, "steps=4")
    assert not list((tmp_path / "run").glob("wandb*"))


@pytest.mark.slow
def test_of_several_processes_one_tells(toy_corpus, tmp_path):
    settings = [part for one in (*SETTINGS["tokenizer"], "wandb_project=curves") for part in ("--set", one)]
    options = ["--data", toy_corpus, "--run", tmp_path / "run", "--nproc", "2", *settings]
    done = run("pumit-train", "tokenizer", *options, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    points = history(tmp_path / "run")
    assert [one["_step"] for one in points] == [1, 2, 3, 4]
    assert {"loss", "tokens_per_second", "validation/psnr"} <= points[-1].keys()
