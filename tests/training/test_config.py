"""Presets: complete, overridable, and wrong values answered with the right name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from catalog.errors import SetupError
from training import config as configs
from training.config import changed_fields, load_preset, parse, preset_names

KINDS = ("tokenizer", "mim")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_tiny_and_the_paper_preset_and_all_presets_are_valid(kind):
    assert {"tiny", "paper"} <= set(preset_names(kind))
    for name in preset_names(kind):
        assert load_preset(kind, name).kind == kind


def test_the_paper_presets_hold_the_numbers_of_the_paper():
    tokenizer, mim = load_preset("tokenizer", "paper"), load_preset("mim", "paper")
    assert (tokenizer.steps, tokenizer.data.batch_size) == (600_000, 48)
    assert (tokenizer.model.codebook_size, tokenizer.model.embedding_dim) == (1024, 512)
    assert (tokenizer.model.quantizer, tokenizer.data.tokens_z, tokenizer.data.tokens_x) == ("soft", 4, 8)
    assert (tokenizer.loss.diversity_weight, tokenizer.loss.sharpness_weight) == (0.03, 1.0)
    assert (tokenizer.optim.peak_lr, tokenizer.optim.min_lr) == (1e-4, 1e-6)
    assert (mim.steps, mim.data.batch_size, mim.optim.warmup_steps) == (300_000, 84, 10_000)
    assert (mim.data.tokens_z, mim.data.tokens_x) == (5, 10)
    assert (mim.optim.peak_lr, mim.optim.max_grad_norm) == (2e-5, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_preset_of_a_large_gpu_is_the_paper_but_for_speed(kind):
    before = load_preset(kind, "paper").model_dump(mode="json")
    changed = {line.split(" was ")[0] for line in changed_fields(before, load_preset(kind, "h200"))}
    assert changed == {"compile", "precision"} | ({"channels_last"} if kind == "tokenizer" else set())
    assert load_preset(kind, "h200").precision == "bf16"


def test_the_small_preset_is_a_fraction_of_the_paper_on_a_cpu():
    small, paper = load_preset("tokenizer", "small"), load_preset("tokenizer", "paper")
    assert 256 <= small.model.codebook_size < paper.model.codebook_size
    assert all(ours < theirs for ours, theirs in zip(small.model.channels, paper.model.channels, strict=True))
    assert (small.device, small.precision, small.compile) == ("cpu", "fp32", False)


@pytest.mark.parametrize("kind", KINDS)
def test_options_beyond_the_paper_are_off_in_its_preset(kind):
    config = load_preset(kind, "paper")
    assert (config.compile, config.ema_decay, config.data.accumulate) == (False, None, 1)
    if kind == "mim":
        assert (config.optim.layer_lr_decay, config.optim.patch_gradient_scale) == (1, 1)
        assert config.parallel == "ddp"
        assert (config.objective, config.intervals.probe_every_steps) == ("tokens", None)


@pytest.mark.parametrize("objective", ["pixels", "contrastive", "distillation"])
def test_tiny_presets_of_objectives_differ_from_the_tiny_one_where_they_must(objective):
    before = load_preset("mim", "tiny").model_dump(mode="json")
    changed = {
        line.split(" was ")[0] for line in changed_fields(before, load_preset("mim", f"{objective}-tiny"))
    }
    own = {name for name in changed if name.startswith(f"{objective}.")}
    assert "objective" in changed
    assert changed - own <= {"objective", "data.batch_size", "optim.peak_lr"}


def test_a_section_that_a_preset_leaves_out_can_be_set():
    config = load_preset("mim", "paper", ["objective=contrastive", "contrastive.momentum=null"])
    assert config.contrastive.momentum is None
    assert config.contrastive.dim == configs.ContrastiveConfig().dim
    with pytest.raises(SetupError, match="'temperature'"):
        load_preset("mim", "paper", ["contrastive.temprature=1"])


def test_a_run_of_an_earlier_version_had_what_is_the_default_now():
    before = load_preset("mim", "tiny").model_dump(mode="json")
    for later in ("objective", "contrastive", "distillation", "probe_images"):
        del before[later]
    assert changed_fields(before, load_preset("mim", "tiny")) == []
    assert changed_fields(before, load_preset("mim", "tiny", ["objective=pixels"])) == [
        "objective was 'tokens', is 'pixels'"
    ]


def test_shards_do_not_go_with_compile_and_fp16():
    for other in ("compile=true", "precision=fp16"):
        with pytest.raises(SetupError, match="parallel fsdp does not go with"):
            load_preset("mim", "tiny", ["parallel=fsdp", other])


def test_overrides_are_yaml_and_reach_any_depth():
    config = load_preset(
        "tokenizer",
        "tiny",
        ["steps=40", "optim.peak_lr=1e-3", "discriminator.optim.warmup_steps=3", "optim.max_grad_norm=null"],
    )
    assert (config.steps, config.optim.peak_lr) == (40, 1e-3)
    assert config.discriminator.optim.warmup_steps == 3
    assert config.optim.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.peek_lr=1", ["optim.peek_lr", "'peak_lr'"]),
        ("optm.peak_lr=1", ["optm", "'optim'"]),
        ("stepps=1", ["stepps", "'steps'"]),
        ("steps.more=1", ["steps"]),
        ("device=gpu", ["device", "'gpu'", "'auto', 'cpu' or 'cuda'"]),
        ("steps=many", ["steps", "'many'", "integer"]),
        ("data.batch_size=0", ["data.batch_size", "0", "greater than 0"]),
        ("optim.warmup_steps=100000", ["optim.warmup_steps", "steps 600"]),
        ("optim.min_lr=1", ["optim", "min_lr", "peak_lr"]),
        ("loss.diversity_weight=-0.1", ["loss.diversity_weight", "-0.1", "greater than or equal to 0"]),
        ("loss.sharpness_weight=-1", ["loss.sharpness_weight", "-1", "greater than or equal to 0"]),
        ("model.quantizer=nearest", ["model", "128", "must equal embedding_dim 64"]),
        ("optim.peak_lr=.nan", ["optim.peak_lr", "finite"]),
        ("optim=3", ["optim", "dictionary"]),
        ("steps", ["section.field=value"]),
        ("steps=[", ["not a YAML value"]),
    ],
)
def test_a_wrong_override_is_answered_with_the_field_and_what_is_allowed(override, named):
    with pytest.raises(SetupError) as error:
        load_preset("tokenizer", "tiny", [override])
    for part in named:
        assert part in str(error.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(SetupError, match=r"Did you mean 'tiny'\? Presets: .*paper.*tiny"):
        load_preset("mim", "tinny")


def test_an_unknown_or_missing_field_of_a_stored_configuration_is_named():
    content = load_preset("mim", "tiny").model_dump(mode="json")
    del content["steps"]
    content["optim"]["lr"] = 1.0
    with pytest.raises(SetupError, match=r"run\.json: .*steps is missing.*") as error:
        parse(configs.MimRunConfig, content, "run.json")
    assert "optim.lr" in str(error.value)


def test_a_configuration_survives_json():
    for kind in KINDS:
        config = load_preset(kind, "tiny")
        assert parse(type(config), config.model_dump(mode="json"), "copy") == config


def test_changed_fields_name_what_changes_weights_and_nothing_else():
    before = load_preset("mim", "tiny").model_dump(mode="json")
    harmless = ["device=auto", "data.workers=0", "intervals.log_every_steps=3", "keep_checkpoints=1"]
    assert changed_fields(before, load_preset("mim", "tiny", harmless)) == []
    changes = changed_fields(before, load_preset("mim", "tiny", ["seed=7", "optim.peak_lr=0.1"]))
    assert changes == ["optim.peak_lr was 0.002, is 0.1", "seed was 666, is 7"]


def sections(config: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [field.annotation for field in config.model_fields.values()]
    below = [section for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)
             for section in sections(kind)]  # fmt: skip
    return [config, *below]


@pytest.mark.parametrize("config", [configs.TokenizerRunConfig, configs.MimRunConfig])
def test_every_field_says_in_a_sentence_what_it_is(config):
    for section in sections(config):
        for name, field in section.model_fields.items():
            # `kind` is narrowed in each child and described in the parent.
            described = field.description or configs.RunConfig.model_fields[name].description
            assert described, f"{section.__name__}.{name}"
            assert described.endswith("."), f"{section.__name__}.{name}"


def test_reading_a_preset_does_not_import_torch():
    code = (
        "import sys; from training.config import load_preset; load_preset('mim', 'paper');"
        "sys.exit('torch' in sys.modules)"
    )
    repository = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
