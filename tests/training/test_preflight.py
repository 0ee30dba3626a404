"""The doctor of a run: a healthy one passes, and whatever cannot end well is refused, each for real."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cli
from shards.layout import SHARD_FILE
from tests.commands import run
from tests.conftest import REPOSITORY
from tests.training.conftest import IMAGES, write_corpus
from tests.training.test_limits import BUSY
from training import train_tokenizer
from training.config import load_preset
from training.data import open_data
from training.models import build_tokenizer
from training.preflight.codes import CODES, page
from training.preflight.examine import Examination, examine
from training.preflight.forecast import forecast, most_crops, told
from training.preflight.measure import LevelSpeed, fewest
from training.preflight.setup import check_limits
from training.preflight.show import as_json
from training.pretrained import export_pretrained
from training.tokenizer import Tokenizer

SMALL = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=4", "data.workers=0", "device=cpu"),
    *("steps=40", "optim.warmup_steps=1", "discriminator.optim.warmup_steps=1", "model.channels=[8,8,16]"),
    *("model.codebook_size=16", "model.embedding_dim=8", "discriminator.channels=[16,16,16]"),
]
VIT = [*SMALL[:7], "model.dim=16", "model.depth=2", "model.heads=2"]


def look(corpus: Path, folder: Path, *overrides: str, seconds: float = 0.3, **options: Any) -> Examination:
    config = load_preset("tokenizer", "tiny", [*SMALL, *overrides])
    chosen = {"preset": "tiny", "processes": 1, "seconds": seconds, "other_corpus": False} | options
    return examine(config, corpus, folder / "run", **chosen)


def look_at_vit(corpus: Path, folder: Path, *overrides: str, other_corpus: bool = False) -> Examination:
    config = load_preset("mim", "tiny", [*VIT, *overrides])
    chosen = {"preset": "tiny", "processes": 1, "seconds": 0.3, "other_corpus": other_corpus}
    return examine(config, corpus, folder / "run", **chosen)


def codes(found: Examination, *severities: str) -> set[str]:
    return {one.code for one in found.findings if not severities or one.severity in severities}


def refused_for(found: Examination, code: str, text: str) -> None:
    assert found.refused()
    assert codes(found, "error") == {code}
    assert text in next(one.text for one in found.findings if one.code == code)
    assert found.forecast is None


@pytest.fixture(scope="module")
def lock(toy_corpus: Path) -> str:
    return open_data(toy_corpus, load_preset("mim", "tiny", VIT)).lock


def export(folder: Path, lock: str | None, change: Any = lambda tokenizer: None) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(load_preset("tokenizer", "tiny", SMALL).model)
    with torch.no_grad():
        change(tokenizer)
    export_pretrained(tokenizer, folder, lock=lock)
    return folder


@pytest.fixture(scope="module")
def tokenizer(lock: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("tokenizer") / "export", lock)


def test_a_healthy_run_passes_and_is_forecast(toy_corpus, tmp_path, monkeypatch):
    # However busy the machine is, there is time for all steps.
    monkeypatch.setattr("training.preflight.examine._FOR_LOADER", 0.0005)
    found = look(toy_corpus, tmp_path, "loss.gan_weight=0.1", "ema_decay=0.9", seconds=200)
    assert codes(found) <= {"loader_limits"}
    assert not found.refused()
    assert [one.level for one in found.levels] == [0, 1, 2, 5]
    assert sum(one.share for one in found.levels) == pytest.approx(1)
    for one in found.levels:
        assert (one.crops, one.of_crops, one.accumulate) == (4, 4, 1)
        assert one.seconds > 0
        assert one.flops > 0
        assert one.memory_bytes > 1e8
    mean = sum(one.share * one.seconds for one in found.levels)
    assert found.forecast.compute_seconds == pytest.approx(mean)
    assert found.forecast.hours == pytest.approx(40 * found.forecast.step_seconds / 3600)
    assert not (tmp_path / "run").exists()
    json.dumps(as_json(found))


@pytest.mark.slow
def test_the_checkpoint_is_as_large_as_was_told(toy_corpus, tmp_path):
    overrides = ["steps=2", "intervals.save_every_steps=2", "ema_decay=0.9", "loss.gan_weight=0.1"]
    overrides += ["discriminator.channels=[64,64,64]"]
    found = look(toy_corpus, tmp_path, *overrides)
    config = load_preset("tokenizer", "tiny", [*SMALL, *overrides])
    train_tokenizer.train(config, toy_corpus, tmp_path / "done", resume=False)
    (checkpoint,) = (tmp_path / "done" / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert found.forecast.checkpoint_bytes == pytest.approx(size, rel=0.1)
    assert found.forecast.disk_bytes == found.forecast.checkpoint_bytes


def test_a_healthy_vit_passes(toy_corpus, tokenizer, tmp_path):
    found = look_at_vit(toy_corpus, tmp_path, f"tokenizer={tokenizer}", "compile=true")
    assert not found.refused()
    assert "measured_eagerly" in codes(found)
    assert found.levels


@pytest.mark.slow
def test_without_time_fewer_crops_are_measured_and_levels_estimated(toy_corpus, tmp_path):
    found = look(toy_corpus, tmp_path, "data.batch_size=200", "data.tokens_x=4", seconds=0.02)
    assert codes(found) >= {"smaller_batch_measured", "level_estimated"}
    assert found.levels[0].seconds > 0
    assert any(one.crops == 0 and one.seconds > 0 for one in found.levels)
    assert any(0 < one.crops < one.of_crops == 200 for one in found.levels)


# -- refusals ---------------------------------------------------------------------------------------------


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    refused_for(look(tmp_path / "corpus", tmp_path), "data_unusable", "no catalog")


def test_a_mix_of_nothing_is_refused(toy_corpus, tmp_path):
    corpus = shutil.copytree(toy_corpus, tmp_path / "corpus")
    (corpus / "mixes").mkdir()
    (corpus / "mixes" / "none.yaml").write_text("leave_out: [toy]\n")
    refused_for(look(corpus, tmp_path, "data.mix=none"), "data_unusable", "no image of the training split")
    refused_for(look(corpus, tmp_path, "data.mix=nowhere"), "data_unusable", "there is no mix")


def test_a_damaged_shard_is_refused(toy_corpus, tmp_path):
    corpus = shutil.copytree(toy_corpus, tmp_path / "corpus")
    data = open_data(corpus, load_preset("tokenizer", "tiny", SMALL))
    drawn = {sample.image.key: sample.image for step in range(40) for sample in data.planner.plan(step).samples}
    key, image = sorted(drawn.items())[0]
    shard = corpus / "shards" / image.shard_path / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused_for(look(corpus, tmp_path), "shard_damaged", f"toy/{key}")
    shutil.rmtree(corpus / "shards" / image.shard_path)
    refused_for(look(corpus, tmp_path), "shard_damaged", "missing")


def test_a_corpus_that_holds_nobody_out_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", IMAGES[:1])
    refused_for(look(corpus, tmp_path), "no_validation", "holds out no image")


def test_a_modality_that_is_not_measured_is_told(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [*IMAGES[:2], ("lone", "OCT", (1, 8, 66, 64), 1.0)])
    found = look(corpus, tmp_path)
    assert not found.refused()
    assert "OCT" in next(one.text for one in found.findings if one.code == "modality_not_validated")


def test_a_device_that_is_not_there_is_refused(toy_corpus, tmp_path):
    if not torch.cuda.is_available():
        refused_for(look(toy_corpus, tmp_path, "device=cuda"), "device_unusable", "no GPU")
    refused_for(look(toy_corpus, tmp_path, "precision=fp16"), "device_unusable", "fp16")


def test_a_schedule_that_never_ends_is_refused(toy_corpus, tmp_path):
    overrides = ["loss.gan_weight=0.1", "discriminator.optim.warmup_steps=40"]
    refused_for(look(toy_corpus, tmp_path, *overrides), "schedule_too_long", "discriminator")
    assert not look(toy_corpus, tmp_path, overrides[1]).refused()


def test_a_batch_of_too_few_crops_is_refused(toy_corpus, tmp_path):
    assert "batch_too_small" in codes(look(toy_corpus, tmp_path, "data.accumulate=5"), "error")
    assert "batch_too_small" in codes(look(toy_corpus, tmp_path, "data.accumulate=3", processes=2), "error")


def test_weights_that_are_missing_are_refused(toy_corpus, tokenizer, tmp_path):
    lpips = look(toy_corpus, tmp_path, "loss.lpips_weight=1", f"loss.lpips_weights_file={tmp_path}/no.pth")
    refused_for(lpips, "weights_unusable", "VGG-16")
    start = [f"tokenizer={tokenizer}", f"initial_weights={tmp_path}/no.safetensors"]
    refused_for(look_at_vit(toy_corpus, tmp_path, *start), "weights_unusable", "no.safetensors")


def test_a_missing_tokenizer_is_refused(toy_corpus, tmp_path):
    refused_for(look_at_vit(toy_corpus, tmp_path), "tokenizer_unusable", "no tokenizer")
    refused_for(look_at_vit(toy_corpus, tmp_path, f"tokenizer={tmp_path}"), "tokenizer_unusable", str(tmp_path))


def test_missing_targets_are_refused(toy_corpus, tokenizer, tmp_path):
    settings = [f"tokenizer={tokenizer}", f"targets={tmp_path}"]
    refused_for(look_at_vit(toy_corpus, tmp_path, *settings), "targets_unusable", "holds no targets")


def test_a_tokenizer_of_another_corpus_is_refused_unless_it_is_meant(toy_corpus, tmp_path):
    fewer = write_corpus(tmp_path / "fewer", IMAGES[:4])
    place = export(tmp_path / "of-fewer", open_data(fewer, load_preset("mim", "tiny", VIT)).lock)
    refused_for(
        look_at_vit(toy_corpus, tmp_path, f"tokenizer={place}"), "tokenizer_other_corpus", "toy 4 images"
    )
    allowed = look_at_vit(toy_corpus, tmp_path, f"tokenizer={place}", other_corpus=True)
    assert not allowed.refused()
    assert "tokenizer_from_elsewhere" in codes(allowed)


@pytest.mark.slow
def test_a_tokenizer_that_does_not_say_is_told_of(toy_corpus, tmp_path):
    found = look_at_vit(toy_corpus, tmp_path, f"tokenizer={export(tmp_path / 'unknown', None)}")
    assert not found.refused()
    assert "tokenizer_from_elsewhere" in codes(found)


def test_a_collapsed_codebook_is_refused(toy_corpus, lock, tmp_path):
    def collapse(tokenizer: Tokenizer) -> None:
        tokenizer.quantizer.projection.weight.zero_()
        tokenizer.quantizer.projection.bias[3] = 1

    place = export(tmp_path / "collapsed", lock, collapse)
    refused_for(look_at_vit(toy_corpus, tmp_path, f"tokenizer={place}"), "codebook_collapsed", "1 of 16 codes")


OFTEN = ["steps=1000000000000", "intervals.save_every_steps=1"]


def test_a_full_disk_is_refused(toy_corpus, tmp_path):
    found = look(toy_corpus, tmp_path, *OFTEN, "keep_checkpoints=1000000000")
    refused_for(found, "disk_too_small", "1000000000 checkpoints")


@pytest.mark.slow
def test_a_disk_that_will_be_nearly_full_is_told(toy_corpus, tmp_path):
    size = look(toy_corpus, tmp_path).forecast.checkpoint_bytes
    most = int(0.9 * shutil.disk_usage(tmp_path).free / size)
    tight = look(toy_corpus, tmp_path, *OFTEN, f"keep_checkpoints={most}")
    assert not tight.refused()
    assert "disk_nearly_full" in codes(tight)


def test_a_folder_that_is_taken_is_told(toy_corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    found = look(toy_corpus, tmp_path)
    assert not found.refused()
    assert "run_folder_taken" in codes(found)


def test_more_workers_than_shared_memory_holds_are_refused(toy_corpus, tmp_path):
    found = look(toy_corpus, tmp_path, "data.workers=100000000")
    assert codes(found, "error") == {"shm_too_small"}
    assert found.loader is None


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_low_limit_of_open_files_is_told(few_files):
    config = load_preset("tokenizer", "tiny", [*SMALL, "data.workers=30"])
    assert [one.code for one in check_limits(config, 1, 1)] == ["open_files_low"]
    assert not list(check_limits(load_preset("tokenizer", "tiny", SMALL), 1, 1))


def test_a_step_that_fits_into_no_memory_is_refused(toy_corpus, tmp_path):
    found = look(toy_corpus, tmp_path, "data.tokens_x=200000", "validation_tokens_x=2")
    refused_for(found, "out_of_memory", "3200000")


@pytest.mark.slow
def test_a_step_that_fits_in_more_passes_is_found(toy_corpus, tmp_path, monkeypatch):
    real, tried = train_tokenizer.train_step, []

    def short_of_memory(run, networks, config, step, batch):
        crops, passes = len(batch.plan.samples), config.data.accumulate
        tried.append((crops, passes))
        if crops > 2 * passes:
            raise torch.OutOfMemoryError("no room")
        return real(run, networks, config, step, batch)

    monkeypatch.setattr(train_tokenizer, "train_step", short_of_memory)
    monkeypatch.setattr("training.preflight.examine._FOR_LOADER", 0.0005)
    found = look(toy_corpus, tmp_path, "data.batch_size=7", seconds=200)
    assert "memory_short" in codes(found)
    assert not found.refused()
    assert found.forecast.settings["data.accumulate"] == 4
    assert found.forecast.limit == "memory"
    assert {passes for crops, passes in tried if crops == 7} == {1, 2, 3, 4}


def test_a_loss_that_is_not_finite_is_refused_and_names_its_images(toy_corpus, tmp_path):
    refused_for(look(toy_corpus, tmp_path, "loss.l1_weight=1e39"), "loss_not_finite", "toy/")


# -- figures ----------------------------------------------------------------------------------------------

LEVEL = LevelSpeed(
    level=0,
    share=0.5,
    crops=8,
    of_crops=8,
    accumulate=1,
    seconds=2.0,
    flops=1e12,
    memory_bytes=10_000,
    memory_half_bytes=6_000,
)
QUICK = replace(LEVEL, level=5, seconds=1.0, memory_bytes=4_000, memory_half_bytes=3_000)


def figures(*levels: LevelSpeed, workers: int = 4, processes: int = 1, **loader: float) -> Any:
    config = load_preset("tokenizer", "tiny", [*SMALL, f"data.workers={workers}", "data.batch_size=8"])
    plan = forecast(
        config,
        levels,
        replace(BUSY, workers=workers, **loader),
        processes=processes,
        memory_bytes=20_000,
        checkpoint_bytes=10,
        disk_bytes=30,
    )
    return plan, {one.code for one in told(config, levels, plan, 20_000)}


def test_the_mean_step_is_weighted_by_level():
    plan, found = figures(replace(LEVEL, share=0.25), replace(QUICK, share=0.5))
    assert plan.compute_seconds == plan.step_seconds == pytest.approx((0.25 * 2 + 0.5 * 1) / 0.75)
    assert plan.limit == "compute"
    assert not plan.settings
    assert not found


def test_a_slow_loader_limits_and_gets_the_workers_it_needs():
    # 8 crops take 160 ms of decoding a crop, one process: 1.28 s of CPU in a step of 0.5 s.
    fast = replace(LEVEL, seconds=0.5)
    plan, found = figures(fast, workers=1, stored_rate=6.0, decode_ms=160.0, plan_ms=0.0)
    assert plan.limit == "loader"
    assert plan.step_seconds == pytest.approx(8 / 6)
    assert plan.settings == {"data.workers": 4}
    assert found == {"loader_limits"}
    assert figures(fast, workers=1, stored_rate=6.0, decode_ms=1600.0)[0].settings == {"data.workers": 8}
    assert figures(fast, workers=4, stored_rate=6.0, decode_ms=1600.0, processes=2)[0].settings == {}


def test_without_workers_loading_comes_on_top():
    plan, _ = figures(LEVEL, workers=0, stored_rate=8.0)
    assert plan.step_seconds == pytest.approx(2 + 1)
    assert plan.limit == "loader"
    assert figures(LEVEL, workers=0, stored_rate=80.0)[0].limit == "compute"


def test_more_passes_than_configured_are_proposed():
    plan, found = figures(replace(LEVEL, accumulate=4), QUICK)
    assert (plan.limit, plan.settings) == ("memory", {"data.accumulate": 4})
    assert found == {"memory_short"}


def test_what_fits_follows_from_two_sizes_of_pass():
    # 1,000 bytes a crop beside 2,000: 16 crops are 18,000 of 20,000, nine tenths.
    assert most_crops([LEVEL, QUICK], 20_000) == 16
    assert most_crops([replace(LEVEL, accumulate=2, memory_half_bytes=8_000)], 20_000) == 12
    assert most_crops([replace(LEVEL, memory_half_bytes=None)], 20_000) is None
    assert most_crops([LEVEL], None) is None


def test_a_memory_that_is_nearly_full_is_told():
    assert figures(replace(LEVEL, memory_bytes=17_000))[1] == {"memory_tight"}


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 600))
def test_the_fewest_passes_that_fit_are_found_in_few_tries(too_few, more, needed):
    enough, tried = too_few + more, []
    needed = min(max(needed, too_few + 1), enough)

    def fits(passes: int) -> bool:
        tried.append(passes)
        return passes >= needed

    assert fewest(fits, too_few, enough) == needed
    assert len(tried) <= 10


# -- the command ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(toy_corpus, tmp_path):
    settings = [part for value in SMALL for part in ("--set", value)]
    options = ["--data", toy_corpus, "--run", tmp_path / "run", "--seconds", "1", *settings]
    healthy = run("pumit-train", "doctor", *options, "--json")
    assert healthy.returncode == cli.DONE, healthy.stderr
    told = json.loads(healthy.stdout)
    assert told["refused"] is False
    assert {one["level"] for one in told["levels"]} == {0, 1, 2, 5}
    assert told["forecast"]["hours"] > 0


def test_the_command_refuses_with_exit_code_2(toy_corpus, tmp_path):
    options = ["--data", toy_corpus, "--run", tmp_path / "run", "--set", "data.accumulate=9"]
    refused = run("pumit-train", "doctor", *options)
    assert refused.returncode == cli.WRONG_CALL
    assert "batch_too_small" in refused.stdout
    assert "Refused" in refused.stdout
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_the_page_lists_every_code():
    file = REPOSITORY / "docs/preflight.md"
    assert file.read_text(encoding="utf-8") == page(), (
        "run `python -m training.preflight.codes > docs/preflight.md`"
    )
    assert all(f"`{code}`" in page() for code in CODES)
