"""Whole runs of every objective on a small corpus: they learn, resume bit for bit, and share batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from catalog.errors import SetupError
from tests.training.conftest import write_corpus
from training import train_mim
from training.config import MimRunConfig, load_preset
from training.models import build_mim
from training.objectives.contrastive import gathered, head, info_nce
from training.pretrained import export_pretrained, load_pretrained, load_vit
from training.run import newest_checkpoint
from training.vit import UniversalViT
from training.weights import load_weights
from training.world import World

REPOSITORY = Path(__file__).parents[3]
OBJECTIVES = ("pixels", "contrastive", "distillation")
SMALL = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=5", "data.workers=0", "device=cpu"),
    *("model.dim=16", "model.depth=2", "model.heads=2", "steps=4", "optim.warmup_steps=1"),
    *("optim.peak_lr=1e-4", "optim.min_lr=0"),
    *("contrastive.hidden_dim=16", "contrastive.dim=8", "validation_tokens_x=3"),
    *("distillation.hidden_dim=16", "distillation.dim=8", "distillation.prototypes=16"),
    *("intervals.log_every_steps=1", "intervals.save_every_steps=2", "intervals.validate_every_steps=100"),
]
"""Five images a batch: two processes have uneven shares."""
IMAGES = [
    *((f"f{number}", "fundus", (3, 1, 64 + number, 80), None) for number in range(8)),
    *((f"x{number}", "XR", (1, 1, 80, 64 + number), None) for number in range(8)),
]


def config(objective: str, *overrides: str) -> MimRunConfig:
    return load_preset("mim", f"{objective}-tiny", [*SMALL, *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest_checkpoint(run).glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def curve(run: Path, name: str = "loss") -> list[float]:
    log = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in log.Scalars(name)]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of flat images of two modalities: every batch holds several."""
    return write_corpus(tmp_path_factory.mktemp("gallery"), IMAGES)


@pytest.fixture(scope="module")
def runs(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every objective, by one process."""
    folder = tmp_path_factory.mktemp("runs")
    for objective in OBJECTIVES:
        train_mim.train(config(objective), gallery, folder / objective, resume=False)
    return {objective: folder / objective for objective in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_ends_bit_for_bit_the_same(objective, gallery, runs, tmp_path):
    shutil.copytree(runs[objective], tmp_path / "run")
    shutil.rmtree(newest_checkpoint(tmp_path / "run"))
    # How often it is measured changes nothing.
    often = ["intervals.validate_every_steps=1", "intervals.probe_every_steps=1"]
    train_mim.train(config(objective, *often), gallery, tmp_path / "run", resume=True)
    expected, found = weights(runs[objective]), weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("objective", "measure", "share"),
    [("pixels", "loss", 0.97), ("contrastive", "loss", 0.85), ("distillation", "kl", 0.6)],
)
def test_it_learns(objective, measure, share, gallery, tmp_path):
    longer = ["steps=60", "optim.warmup_steps=5", "optim.peak_lr=3e-3", "model.dim=32", "data.batch_size=8"]
    rarely = ["intervals.save_every_steps=60", "intervals.probe_every_steps=60"]
    summary = train_mim.train(config(objective, *longer, *rarely), gallery, tmp_path / "run", resume=False)
    losses = curve(tmp_path / "run", measure)
    assert sum(losses[-20:]) < share * sum(losses[:20])
    if objective == "pixels":  # batches differ in how many of their patches are of one value
        assert summary["validation/loss"] < 0.9 * summary["validation/of_mean"]


def steps_of_heads(rows: list[int], world: World) -> dict[str, torch.Tensor]:
    """Loss, gradients and averages of a contrastive step of heads alone, in float64, on rows of a batch."""
    torch.manual_seed(0)
    features_N2C, images_N = torch.randn(5, 2, 6, dtype=torch.float64), torch.arange(5)
    heads = torch.nn.Sequential(head(6, 8, 4), head(4, 8, 4)).double()
    embeddings_B2P = heads(features_N2C[rows].flatten(0, 1)).view(len(rows), 2, 4)
    rows_B = torch.tensor(rows)
    keys_N2P = gathered(embeddings_B2P, rows_B, 5, world)
    ways = [info_nce(embeddings_B2P[:, v], keys_N2P[:, 1 - v], rows_B, images_N, 0.2) for v in range(2)]
    loss = sum(way.loss for way in ways) * len(rows) / 5
    loss.backward()
    found = {f"gradient/{name}": p.grad for name, p in heads.named_parameters()}
    return (
        found | {"loss": loss.detach().reshape(1)} | {f"buffer/{name}": b for name, b in heads.named_buffers()}
    )


def work(rank: int, folder: Path, corpus: Path) -> None:
    """One of two processes: a step of heads, then runs of every objective."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, rank)
    found = steps_of_heads([[0, 1], [2, 3, 4]][rank], world)
    for name, value in found.items():
        if not name.startswith("buffer/"):
            dist.all_reduce(value)
    save_file(found, folder / f"{rank}.safetensors")
    for objective in OBJECTIVES:
        train_mim.train(config(objective), corpus, folder / objective, resume=False, world=world)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_as_one_does(gallery, runs, tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.training.objectives import test_objective_runs as t; "
    )
    program += "t.work(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path), str(gallery)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said

    expected = steps_of_heads([0, 1, 2, 3, 4], World())
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)

    for objective, run in runs.items():
        losses, alone = curve(tmp_path / objective), curve(run)
        assert len(losses) == len(alone) == 4
        assert losses[0] == pytest.approx(alone[0], rel=1e-5), objective
        # Batch norm enlarges what an untrained network makes of crops, which differs little, and rounding too.
        assert losses == pytest.approx(alone, rel=1e-5 if objective == "pixels" else 1e-3), objective
        assert curve(tmp_path / objective, "grad_norm") == pytest.approx(curve(run, "grad_norm"), rel=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_is_a_vit_for_those_who_come_after(objective, runs, tmp_path):
    vit = load_vit(runs[objective]).vit
    assert isinstance(vit, UniversalViT)
    saved = weights(runs[objective])
    file = "teacher" if objective == "distillation" else "model"
    assert all(torch.equal(value, saved[f"{file}/vit.{name}"]) for name, value in vit.state_dict().items())
    export_pretrained(load_pretrained(runs[objective]), tmp_path / "export")
    exported = load_vit(tmp_path / "export").vit.state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in vit.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_is_a_weight_file_that_masked_tokens_can_start_from(objective, runs):
    model = build_mim(config(objective), 16)
    report = load_weights(model, newest_checkpoint(runs[objective]) / "model.safetensors")
    assert {name for name in report.missing if name.startswith("vit.")} == set()
    saved = weights(runs[objective])
    assert torch.equal(model.vit.norm.bias, saved["model/vit.norm.bias"])


def test_a_teacher_follows_and_a_centre_is_kept(runs):
    saved = weights(runs["distillation"])
    assert float(saved["teacher/centre"].abs().max()) > 0
    assert not torch.equal(saved["teacher/vit.norm.bias"], saved["model/vit.norm.bias"])
    slow = weights(runs["contrastive"])
    assert "teacher/projector.0.weight" in slow
    assert not any(name.startswith("teacher/predictor") for name in slow)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_picture_has_three_columns_and_the_summary_what_was_measured(objective, gallery, runs):
    (picture,) = (runs[objective] / "pictures").iterdir()
    assert Image.open(picture).width > 3 * 100
    summary: dict[str, Any] = json.loads((runs[objective] / "summary.json").read_text())
    measured = {"pixels": "of_mean", "contrastive": "retrieval", "distillation": "retrieval"}[objective]
    assert {"validation/loss", f"validation/{measured}"} <= summary.keys()
    for column in ("modality", "body_part"):
        for name in (
            "probe/{}/knn/class_token",
            "probe_untrained/{}/linear/mean",
            "probe_pixels/{}/linear/grey",
        ):
            assert 0 <= summary[name.format(column)] <= 1


def test_all_objectives_begin_with_the_same_vit(runs):
    found = [json.loads((run / "summary.json").read_text()) for run in runs.values()]
    untrained = [{name: one[name] for name in one if name.startswith("probe_untrained")} for one in found]
    assert untrained[0] == untrained[1] == untrained[2]


def test_what_an_objective_cannot_do_is_said_before_anything_starts():
    for wrong, answer in (
        (["objective=pixels", "tokenizer=runs/tokenizer"], "needs no tokenizer"),
        (["objective=contrastive", "data.accumulate=2"], "set data.accumulate to 1"),
        (["objective=contrastive", "data.batch_size=1"], "data.batch_size to 2 or more"),
        (["objective=distillation", "data.accumulate=2"], "set data.accumulate to 1"),
        (["objective=distillation", "parallel=fsdp"], "use parallel ddp"),
    ):
        with pytest.raises(SetupError, match=answer):
            load_preset("mim", "tiny", wrong)
