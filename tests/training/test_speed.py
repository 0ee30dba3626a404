"""Speed figures: operations counted against formulas, graphs counted, and a step that waits for nothing."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from catalog.sampling import LEVELS, CropGeometry
from shards.remote import open_reader
from tests.training.conftest import write_corpus
from training import optim, train_mim, train_tokenizer
from training.config import MimRunConfig, load_preset
from training.data import open_data
from training.flops import StepCounter, crop_tokens, mim_counter, without_data
from training.loader import RawBatch, read_batch
from training.models import build_mim, build_tokenizer
from training.objectives import tokens as tokens_objective
from training.objectives.tokens import recipe_for
from training.run import Run
from training.speed import GraphWatch, Speed, StepWork, peak_flops, peak_of
from training.tokenizer import Tokenizer

SMALL = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=2", "data.workers=0", "device=cpu"),
    *("steps=40", "optim.warmup_steps=1", "intervals.log_every_steps=20", "intervals.save_every_steps=40"),
    "intervals.validate_every_steps=40",
]
VIT = ["model.dim=16", "model.depth=2", "model.heads=2", "tokenizer=unused"]
TOKENIZER = [
    *("discriminator.optim.warmup_steps=1", "model.channels=[8,8,16]"),
    *("model.codebook_size=16", "model.embedding_dim=8"),
]
EVERY_LEVEL = [
    *((f"z{level}", "CT", (1, max(32 >> level, 2), 66, 70), float(2**level)) for level in range(5)),
    *((f"more{level}", "CT", (1, max(32 >> level, 2), 66, 70), float(2**level)) for level in range(5)),
    ("flat", "fundus", (3, 1, 70, 66), None),
    ("flatter", "fundus", (3, 1, 70, 66), None),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images or more of each DA level."""
    return write_corpus(tmp_path_factory.mktemp("levels"), EVERY_LEVEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(load_preset("tokenizer", "tiny", [*SMALL, *TOKENIZER]).model).eval()


def batches(corpus: Path, config: Any) -> dict[int, RawBatch]:
    """A batch of each level."""
    data = open_data(corpus, config)
    plans = {plan.level: plan for plan in map(data.planner.plan, range(200))}
    assert sorted(plans) == list(range(LEVELS))
    reader = open_reader(data.corpus.shards)
    return {level: read_batch(reader, plan) for level, plan in plans.items()}


def vit_flops(config: MimRunConfig, codes: int, tokens: int, level: int) -> int:
    """Forward and backward of one crop by hand: 2 for each product, twice that for the two gradients."""
    dim, hidden, seen = config.model.dim, int(config.model.dim * 8 / 3), tokens + 1
    visible = int(tokens * 0.45) + 1
    total = 0
    for block in range(config.model.depth):
        rows = seen if block >= config.model.mask_from_block else visible
        total += 6 * rows * (4 * dim**2 + 3 * dim * hidden) + 6 * 2 * rows**2 * dim
    total += 6 * tokens * (dim * dim + dim * codes)
    # Voxels get no gradient; the weights are those of the crop's level, whose depth is that of a token.
    return total + 4 * tokens * dim * 3 * max(16 >> level, 1) * 256


@pytest.mark.parametrize("level", [0, 4, 5])
@pytest.mark.parametrize("overrides", [[], ["model.mask_from_block=1"], ["model.recompute_blocks=true"]])
def test_the_operations_of_a_vit_are_those_of_the_formula(tokenizer, overrides, level):
    config = load_preset("mim", "tiny", [*SMALL, *VIT, *overrides])
    size = CropGeometry(tokens_z=1, tokens_x=2).size(level)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        without_data(tokenizer).encode(torch.empty(1, 3, *size, device="meta"), level)
    of_targets = counter.get_total_flops()
    found = mim_counter(3, build_mim(config, 16), tokenizer).work(_Plan(level, size))
    tokens = crop_tokens(size, level)
    assert found.tokens == 3 * tokens == 3 * 4
    assert found.flops == 3 * (of_targets + vit_flops(config, 16, tokens, level))


class _Plan:
    def __init__(self, level: int, crop_size: tuple[int, int, int]) -> None:
        self.level, self.crop_size = level, crop_size


@pytest.mark.parametrize("gate_open", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_operations_of_a_tokenizer_are_those_of_its_real_step(corpus, tmp_path, gate_open):
    gan = ["loss.gan_weight=0.1", "discriminator.channels=[16,16,16]", "precision=bf16", "data.accumulate=1"]
    config = load_preset("tokenizer", "tiny", [*SMALL, *TOKENIZER, *gan])
    with Run(tmp_path / "run", config, fingerprints={}, resume=False) as run:
        networks = train_tokenizer.build(run, config)
        for level, batch in batches(corpus, config).items():
            run.numbers = {"ema": 0.0, "last": 0.0} if gate_open else {"ema": 1.0, "last": 1.0}
            with FlopCounterMode(display=False) as counter:
                scalars = train_tokenizer.train_step(run, networks, config, 0, batch)
            assert scalars["gan_gate_open"] is gate_open
            found = networks.counter.work(batch.plan, gate_open)
            assert found.kind == (level, gate_open)
            assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_each_kind_of_step_is_counted_once():
    calls = []
    counter = StepCounter(2, lambda voxels, level, variant: calls.append((tuple(voxels.shape), level, variant)))
    for level, variant in ((0, False), (0, True), (0, False), (5, False), (0, True)):
        counter.work(_Plan(level, (16 >> level or 1, 32, 32)), variant)
    assert calls == [
        ((1, 3, 16, 32, 32), 0, False),
        ((1, 3, 16, 32, 32), 0, True),
        ((1, 3, 1, 32, 32), 5, False),
    ]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_gpu_follows_from_its_name(name, peak):
    assert peak_of(name) == peak


def test_without_a_known_peak_there_is_no_mfu():
    assert peak_flops(torch.device("cpu"), "bf16") is None
    speed = Speed()
    assert speed.rates(1e12) == {}
    speed.add(2.0, 8, StepWork(kind=0, tokens=100, flops=1e12))
    assert speed.rates(None) == {"images_per_second": 4, "tokens_per_second": 50, "tflops_per_second": 0.5}
    assert speed.rates(5e12)["mfu"] == pytest.approx(0.1)


def test_a_graph_that_a_known_kind_of_step_needs_is_late():
    torch._dynamo.reset()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    watch = GraphWatch()
    for size, kind, late in ((2, "a", 0), (3, "b", 0), (2, "a", 0), (4, "a", 1), (3, "b", 1)):
        double(torch.ones(size))
        watch.step(kind)
        assert watch.late == late


@pytest.mark.slow
def test_a_compiled_run_compiles_nothing_once_each_level_was_seen(corpus, tokenizer, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(tokens_objective, "find_pretrained", lambda place: _weights_file(tmp_path))
    monkeypatch.setattr(tokens_objective, "load_tokenizer", lambda place: tokenizer)
    config = load_preset(
        "mim", "tiny", [*SMALL, *VIT, "compile=true", "data.batch_size=3", "data.accumulate=2"]
    )
    summary = train_mim.train(config, corpus, tmp_path / "run", resume=False)
    levels = {batch.level for batch in map(open_data(corpus, config).planner.plan, range(40))}
    assert len(levels) == LEVELS
    # Of targets and ViT, for each level and each size of the passes of a batch.
    assert summary["compile/graphs"] >= 2 * 2 * LEVELS
    assert summary["compile/late_graphs"] == 0
    assert summary["tokens_per_second"] > summary["images_per_second"] > 0
    assert summary["tflops_per_second"] > 0
    assert "mfu" not in summary
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("compile/late_graphs")] == [20, 40]
    assert [event.step for event in log.Scalars("tokens_per_second")] == [20, 40]


def _weights_file(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"")
    return folder


class NothingIsWaitedFor(TorchDispatchMode):
    """Fails where a tensor goes to or from the device in a way that would stop the host.

    Networks and batch lie on the device "meta": what needs a number of theirs on the host fails by itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            there = kwargs.get("device") or args[0].device
            here = args[0].device if func is torch.ops.aten._to_copy.default else args[1].device
            queued = kwargs.get("non_blocking") or (
                func is torch.ops.aten.copy_.default and args[2:] == (True,)
            )
            if torch.device(there).type != here.type and not queued:
                raise AssertionError(f"{func} from {here} to {there} would wait")
        return func(*args, **kwargs)


class NoOptimizer(torch.optim.SGD):
    """Fused optimizers, which ask the host for nothing, exist on real devices only."""

    def step(self, closure: Any = None) -> None:
        pass


def step_without_data(
    corpus: Path, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of masked image modelling of each level on "meta"."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_named: contextlib.nullcontext())
    monkeypatch.setattr(optim, "fused_adamw", lambda groups, lr, betas: NoOptimizer(groups, lr))
    config = load_preset("mim", "tiny", [*SMALL, *VIT, "ema_decay=0.9", "data.accumulate=2"])
    with Run(folder, config, fingerprints={}, resume=False) as run:
        run.device = torch.device("meta")
        networks = train_mim.build(
            run, config, recipe_for(config, without_data(tokenizer)), open_data(corpus, config)
        )
        for level, batch in batches(corpus, config).items():
            with NothingIsWaitedFor():
                for step in range(2):
                    train_mim.train_step(run, networks, config, step + 2 * level, batch)


def test_a_step_of_masked_image_modelling_waits_for_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    step_without_data(corpus, tokenizer, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("place", ["training.objectives.tokens", "training.augment"])
def test_a_step_that_would_wait_for_a_copy_is_found(corpus, tokenizer, tmp_path, monkeypatch, place):
    monkeypatch.setattr(f"{place}.sent", lambda tensor, device: tensor.to(device))
    with pytest.raises(AssertionError, match="would wait"):
        step_without_data(corpus, tokenizer, tmp_path / "run", monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is what the host would wait for")
def test_a_step_waits_for_nothing_on_a_gpu(corpus, tokenizer, tmp_path):
    config = load_preset("mim", "tiny", [*SMALL, *VIT, "device=cuda", "precision=bf16", "data.accumulate=2"])
    with Run(tmp_path / "run", config, fingerprints={}, resume=False) as run:
        networks = train_mim.build(run, config, recipe_for(config, tokenizer), open_data(corpus, config))
        for level, batch in batches(corpus, config).items():
            pinned = batch.pin_memory()
            train_mim.train_step(run, networks, config, 2 * level, pinned)  # the first may make tables
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                train_mim.train_step(run, networks, config, 2 * level + 1, pinned)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_large_preset_is_the_authors_configuration():
    large, paper = load_preset("mim", "large"), load_preset("mim", "paper")
    size = large.model
    assert (size.dim, size.depth, size.heads, size.mask_from_block) == (1024, 24, 16, 18)
    assert (large.optim, large.steps, large.data.batch_size) == (
        paper.optim,
        paper.steps,
        paper.data.batch_size,
    )
