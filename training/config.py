"""What a training run is made of, as data: two configurations, read from presets.

A preset is a YAML file in `training/presets/` that states a complete run. `--set section.field=value`
changes single values. Every message names the field, what it holds and what is allowed.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import typing
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from catalog.errors import SetupError

if TYPE_CHECKING:
    from training.engine_config import EngineConfig

Kind = Literal["tokenizer", "mim"]
ObjectiveName = Literal["tokens", "pixels", "contrastive", "distillation"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OfGroups8 = Annotated[int, Field(gt=0, multiple_of=8)]
"""Channels that a group norm of 8 groups divides."""
OfGroups16 = Annotated[int, Field(gt=0, multiple_of=16)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Weight of one term of a loss; 0 leaves the term out."""


class _Section(BaseModel):
    """Part of a configuration: immutable, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(_Section):
    """Which images, and how much of each."""

    mix: Annotated[str, Field(min_length=1)]
    """Which images are drawn how often: all, no-benchmarks, or a mix of the corpus (`pumit-data mix list`)."""
    dedup: bool = False
    """Of images that show the same, draw one, whatever the mix says; needs `pumit-data duplicates`."""
    batch_size: Positive
    """Crops in one step, over all processes."""
    tokens_z: Positive
    """Size of a crop along depth in tokens of 16 >> level slices; images seen slice by slice have 1 slice."""
    tokens_x: Positive
    """Size of a crop along height and along width in tokens of 16 voxels."""
    workers: Annotated[int, Field(ge=0)]
    """Processes that read crops; 0 reads in the training process. Any number gives the same batches."""
    accumulate: Positive = 1
    """Passes that a process makes of its share of a batch, one by one: the same step in less memory."""
    cache_dir: Path | None = None
    """Folder on a disk of this machine that keeps what was read of a corpus in a store; its ranks share it."""
    cache_gb: PositiveReal = 100.0
    """Limit of that folder in GB (10^9 bytes)."""


class OptimConfig(_Section):
    """AdamW, linear warm-up, cosine down to a minimum."""

    peak_lr: PositiveReal
    """Learning rate at the end of the warm-up."""
    min_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Learning rate of the last step."""
    weight_decay: Weight
    """Decoupled weight decay of the weights of linear and convolution layers."""
    betas: tuple[Share, Share]
    """Momenta of AdamW's first and second moment."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps in which the learning rate climbs."""
    max_grad_norm: PositiveReal | None
    """L2 norm to which the gradient is clipped; null leaves it as it is."""

    @model_validator(mode="after")
    def _falls(self) -> OptimConfig:
        if self.min_lr > self.peak_lr:
            raise ValueError(f"min_lr {self.min_lr} must not exceed peak_lr {self.peak_lr}")
        return self


class MimOptimConfig(OptimConfig):
    """The same for a ViT, whose layers may learn at rates of their own."""

    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from one block to the one before it; 1 gives all layers the same."""
    patch_gradient_scale: Share = 1.0
    """Factor on the gradient of the patch embedding before clipping; 0 freezes it, but for weight decay."""


class IntervalConfig(_Section):
    """How often something besides training happens; the last step always has it."""

    log_every_steps: Positive
    """Steps between two points of the training curves."""
    validate_every_steps: Positive
    """Steps between two validations, each with a picture."""
    save_every_steps: Positive
    """Steps between two checkpoints."""


class MimIntervalConfig(IntervalConfig):
    """The same for a ViT, whose features are also put to the test."""

    probe_every_steps: Positive | None = None
    """Steps between two probes (kNN, linear) of the frozen features; null never probes."""


class RunConfig(_Section):
    """What both kinds of run share."""

    kind: Kind
    """What is trained."""
    data: DataConfig
    """Images and crops."""
    optim: OptimConfig
    """Optimiser of the network."""
    steps: Positive
    """Optimiser steps of the whole run."""
    intervals: IntervalConfig
    """Steps between logging, validation and checkpoints."""
    keep_checkpoints: Positive
    """Newest checkpoints to keep."""
    validation_images: Positive
    """Held-out images to measure on, spread over data sets and modalities."""
    validation_tokens_x: Positive
    """In-plane tokens of the centre crops measured on: the networks take any grid."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Number format of the forward pass; weights stay float32. fp16 scales the loss and needs a GPU."""
    compile: bool = False
    """Compile the networks, one graph a DA level: minutes at the start, for quicker steps on a GPU."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights, of which each step leaves this share; null keeps none."""
    device: Literal["auto", "cpu", "cuda"]
    """Where to train; auto takes a GPU where there is one, and each of several processes its own."""
    wandb_project: Annotated[str, Field(min_length=1)] | None = None
    """Project on Weights & Biases that gets the training curves too; null sends nothing anywhere."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of weights, draws of images, augmentation and masks."""

    @property
    def draws_noise(self) -> bool:
        """Whether each process draws random numbers by itself, besides those addressed by sample."""
        return False

    @property
    def least_overlap(self) -> float | None:
        """Of two crops of every image, what they have in common along each axis; None for one crop."""
        return None

    @property
    def probed_images(self) -> int:
        """Training images that probes learn from; 0 for a run without probes."""
        return 0

    @model_validator(mode="after")
    def _warms_up_within_the_run(self) -> RunConfig:
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} must be below steps {self.steps}")
        return self


class TokenizerModelConfig(_Section):
    """Spatially adaptive encoder, codebook, decoder; 16x smaller in-plane."""

    quantizer: Literal["soft", "gumbel", "nearest"]
    """How features become tokens: soft as in the paper, one code drawn (gumbel), or the nearest code."""
    codebook_size: Positive
    """Entries of the codebook, K."""
    embedding_dim: Positive
    """Length of a codebook entry."""
    channels: tuple[OfGroups8, OfGroups8, OfGroups8]
    """Channels after the strides 4, 2 and 2 of the encoder; the decoder has the same in reverse."""
    depth_merge: Literal["sum", "mean"]
    """Merging of depth taps in the decoder: sum as in the paper, mean for one scale at all DA levels."""
    initial: Literal["random", "linear"]
    """Weights of the first step: random, or those of a linear autoencoder (training.linear_start)."""

    @model_validator(mode="after")
    def _compares(self) -> TokenizerModelConfig:
        if self.quantizer == "nearest" and self.channels[-1] != self.embedding_dim:
            raise ValueError(
                f"quantizer nearest compares features with codes: the last of channels, {self.channels[-1]}, "
                f"must equal embedding_dim {self.embedding_dim}"
            )
        if self.initial == "linear":
            if self.quantizer == "nearest":
                raise ValueError("initial linear is for the quantizers soft and gumbel, not for nearest")
            if any(width % 16 or width < 32 for width in self.channels):
                raise ValueError(
                    f"initial linear needs channels in multiples of 16 from 32 on, got {self.channels}"
                )
        return self


class DiscriminatorConfig(_Section):
    """The patch discriminator and its optimiser."""

    channels: tuple[OfGroups16, OfGroups16, OfGroups16]
    """Channels of its three stages, each of stride 2."""
    optim: OptimConfig
    """Optimiser of the discriminator."""


class TokenizerLossConfig(_Section):
    """Terms of the tokenizer's loss; a weight of 0 leaves a term out."""

    l1_weight: Weight
    """Mean absolute difference of image and reconstruction, both in [-1, 1]."""
    lpips_weight: Weight
    """Perceptual difference (LPIPS) of slices, in features of VGG-16."""
    lpips_weights_file: Path | None
    """File or folder with the weights of VGG-16 and LPIPS; needed where lpips_weight is not 0."""
    lpips_max_slices: Positive
    """Slices drawn from each image for the perceptual term."""
    gan_weight: Weight
    """Adversarial term, once the gate is open; 0 builds no discriminator."""
    gan_gate_loss: PositiveReal
    """Discriminator loss (the larger of its moving average and its last value) at which the gate opens."""
    gan_gate_momentum: Share
    """Momentum of that moving average."""
    diversity_weight: Weight
    """Weight of sum(m log m) of the mean token distribution m; larger spreads tokens over the codebook."""
    sharpness_weight: Weight
    """Weight of the mean entropy of a token; larger makes tokens sharper."""


class TokenizerRunConfig(RunConfig):
    """A run of `pumit-train tokenizer`."""

    kind: Literal["tokenizer"] = "tokenizer"
    model: TokenizerModelConfig
    """The tokenizer."""
    loss: TokenizerLossConfig
    """Terms of the loss."""
    discriminator: DiscriminatorConfig
    """The adversary, built where loss.gan_weight is not 0."""
    channels_last: bool = False
    """Keep the channels of a voxel side by side, which suits the half-precision convolutions of GPUs."""

    @property
    def draws_noise(self) -> bool:
        return self.model.quantizer == "gumbel"


class MimModelConfig(_Section):
    """The universal ViT and its masked modelling task."""

    dim: Positive
    """Features of a token."""
    depth: Positive
    """Transformer blocks."""
    heads: Positive
    """Attention heads."""
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    """Chance that training skips a branch of the last block; falls linearly to 0 at the first."""
    recompute_blocks: bool
    """Recompute each block in the backward pass: less memory, a third more time."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)]
    """Share of tokens hidden from the ViT, which it predicts."""
    mask_from_block: Annotated[int, Field(ge=0)]
    """First block that sees mask tokens; the blocks before it see the visible tokens alone."""

    @model_validator(mode="after")
    def _fits(self) -> MimModelConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(f"dim / heads must be a multiple of 4, got {self.dim} / {self.heads}")
        if self.mask_from_block >= self.depth:
            raise ValueError(f"mask_from_block {self.mask_from_block} must be below depth {self.depth}")
        return self


class PairsConfig(_Section):
    """What objectives have in common that compare two crops of an image."""

    least_overlap: Share = 0.5
    """Share of the smaller field of view that both crops show, along each axis and before any rotation."""


class ContrastiveConfig(PairsConfig):
    """Which crop shows the same image: InfoNCE over the batch, as in MoCo v3 and SimCLR."""

    hidden_dim: Positive = 4096
    """Features between the layers of the heads."""
    dim: Positive = 256
    """Features that are compared."""
    temperature: PositiveReal = 0.2
    """Divides the cosines; smaller minds the hardest negatives more."""
    momentum: Share | None = 0.99
    """Share of the momentum encoder that the first step leaves, rising to 1; null: no such encoder (SimCLR)."""


class DistillationConfig(PairsConfig):
    """To say of a crop what a slower copy of the network says of another one, as in DINO."""

    hidden_dim: Positive = 2048
    """Features between the layers of the head."""
    dim: Positive = 256
    """Features that are compared with the prototypes."""
    prototypes: Positive = 8192
    """Classes that the teacher invents."""
    local_views: Annotated[int, Field(ge=0)] = 4
    """Crops of half the size, cut out of the two, that the student alone sees."""
    momentum: Share = 0.996
    """Share of the teacher that the first step leaves, rising to 1."""
    centre_momentum: Share = 0.9
    """Share of the centre, which keeps the teacher off a single class, that a step leaves."""
    student_temperature: PositiveReal = 0.1
    """Divides the student's scores."""
    teacher_temperatures: tuple[PositiveReal, PositiveReal] = (0.04, 0.07)
    """Divide the teacher's: in the first step, and from the end of the teacher's warm-up."""
    teacher_warmup: Share = 0.3
    """Share of the run in which that temperature climbs."""


class MimRunConfig(RunConfig):
    """A run of `pumit-train mim`."""

    kind: Literal["mim"] = "mim"
    objective: ObjectiveName = "tokens"
    """What the ViT learns: the paper's masked tokens, or what to compare them with (docs/objectives.md)."""
    tokenizer: Path | None
    """Run folder of the trained tokenizer (or one of its checkpoints), whose soft tokens are the targets."""
    targets: Path | None = None
    """Folder of `pumit-train targets`: what the tokenizer said of the crops of this run; null asks it anew."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    """Of objective contrastive."""
    distillation: DistillationConfig = DistillationConfig()
    """Of objective distillation."""
    intervals: MimIntervalConfig
    """Steps between logging, validation, probes and checkpoints."""
    probe_images: Positive = 128
    """Training images that probes learn from; they are tested on half as many held-out ones."""
    initial_weights: Path | None
    """File of ViT weights to start from (EVA-02, or a published PUMIT checkpoint); null starts at random."""
    model: MimModelConfig
    """The network."""
    optim: MimOptimConfig
    """Optimiser of the network."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each of several processes holds: ddp the whole network, fsdp a shard of it (memory for speed)."""

    @property
    def draws_noise(self) -> bool:
        return self.model.drop_path > 0

    @property
    def least_overlap(self) -> float | None:
        if self.objective == "contrastive":
            return self.contrastive.least_overlap
        return self.distillation.least_overlap if self.objective == "distillation" else None

    @property
    def probed_images(self) -> int:
        return 0 if self.intervals.probe_every_steps is None else self.probe_images

    @model_validator(mode="after")
    def _can_be_done(self) -> MimRunConfig:
        if self.objective != "tokens" and self.tokenizer is not None:
            raise ValueError(f"objective {self.objective} needs no tokenizer: leave it out, or learn tokens")
        if self.objective != "tokens" and self.targets is not None:
            raise ValueError(f"objective {self.objective} has no targets: leave them out, or learn tokens")
        if self.least_overlap is not None and self.parallel == "fsdp":
            raise ValueError(f"objective {self.objective} keeps a second network whole: use parallel ddp")
        if self.least_overlap is not None and self.data.accumulate > 1:
            raise ValueError(f"objective {self.objective} looks at a batch at once: set data.accumulate to 1")
        if self.least_overlap is not None and self.data.batch_size < 2:
            raise ValueError(f"objective {self.objective} compares images: set data.batch_size to 2 or more")
        return self

    @model_validator(mode="after")
    def _shards(self) -> MimRunConfig:
        if self.parallel == "fsdp" and self.compile:
            raise ValueError("parallel fsdp does not go with compile: set one of them to ddp or false")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError("parallel fsdp does not go with precision fp16: use bf16 or fp32")
        return self


Config = TypeVar("Config", bound=BaseModel)

_CONFIGS: dict[Kind, type[TokenizerRunConfig | MimRunConfig]] = {
    "tokenizer": TokenizerRunConfig,
    "mim": MimRunConfig,
}

_FREE_ON_RESUME = (
    *("device", "data.workers", "data.cache_", "data.accumulate"),
    *("intervals.", "keep_checkpoints", "validation_", "probe_", "wandb_", "targets"),
)
"""Fields (or sections, with the dot) that change no weight, but by rounding, so that a resumed run may set them
anew. As with the number of processes, `accumulate` may only change where no pass draws noise (training.run)."""


@overload
def load_preset(kind: Literal["tokenizer"], name: str, overrides: Sequence[str] = ()) -> TokenizerRunConfig: ...
@overload
def load_preset(kind: Literal["mim"], name: str, overrides: Sequence[str] = ()) -> MimRunConfig: ...
def load_preset(kind: Kind, name: str, overrides: Sequence[str] = ()) -> TokenizerRunConfig | MimRunConfig:
    """The preset `training/presets/{kind}-{name}.yaml`, changed by `overrides` ("section.field=value").

    Values are read as YAML. Raises SetupError for an unknown preset or field (with the closest name) and
    for a value that is not allowed.
    """
    return preset_of(_CONFIGS[kind], kind, name, overrides)


def preset_of(config_type: type[Config], kind: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """The same for any kind of settings that has presets `training/presets/{kind}-{name}.yaml`."""
    if name not in preset_names(kind):
        raise SetupError(
            f"there is no {kind} preset {name!r}.{_closest(name, preset_names(kind))} "
            f"Presets: {', '.join(preset_names(kind))}"
        )
    content = yaml.safe_load((_presets() / f"{kind}-{name}.yaml").read_text())
    for override in overrides:
        _set(content, override, config_type)
    return parse(config_type, content, f"{kind} preset {name}")


def parse(config_type: type[Config], content: object, origin: str) -> Config:
    """Make `content`, as read from YAML or JSON, a configuration.

    Raises SetupError that names `origin`, every wrong field, and what is allowed there.
    """
    try:
        return config_type.model_validate(content)
    except ValidationError as error:
        problems = [_describe(problem, config_type) for problem in error.errors(include_url=False)]
        raise SetupError(f"{origin}: {'; '.join(problems)}") from None


def preset_names(kind: str) -> list[str]:
    """Names of the presets of `kind`, sorted."""
    files = (entry.name for entry in _presets().iterdir())
    return sorted(
        file.removeprefix(f"{kind}-").removesuffix(".yaml")
        for file in files
        if file.startswith(f"{kind}-") and file.endswith(".yaml")
    )


def changed_fields(before: Mapping[str, Any], config: EngineConfig) -> list[str]:
    """Fields in which `before` (a configuration as JSON) differs from `config`, with both values.

    Left out are those that change no weight (device, workers, intervals), which a resumed run may set. What
    `before` lacks, since an earlier version of this program wrote it, had the value that is the default now.
    """
    if isinstance(config, BaseModel):
        with contextlib.suppress(ValidationError):
            before = type(config).model_validate(before).model_dump(mode="json")
    old, new = _flat(before), _flat(config.model_dump(mode="json"))
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(_FREE_ON_RESUME)
    ]


def _presets() -> Traversable:
    return importlib.resources.files("training") / "presets"


def _set(content: dict[str, Any], override: str, config: type[BaseModel]) -> None:
    """Put one "a.b=value" into `content`, where only fields that the configuration knows exist."""
    path, equals, text = override.partition("=")
    *sections, field = path.strip().split(".")
    if not equals or not field:
        raise SetupError(f"--set {override}: write section.field=value, as in --set optim.peak_lr=1e-4")
    for section in sections:
        inner = _section(config, section) if section in config.model_fields else None
        known = isinstance(inner, type) and issubclass(inner, BaseModel)
        # A preset leaves out sections whose defaults it takes.
        if inner is None or not known or not isinstance(content.setdefault(section, {}), dict):
            raise SetupError(f"--set {override}: {_unknown(path, section, config)}")
        content, config = content[section], inner
    if field not in config.model_fields:
        raise SetupError(f"--set {override}: {_unknown(path, field, config)}")
    try:
        content[field] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SetupError(f"--set {override}: {text!r} is not a YAML value") from None


def _describe(problem: Mapping[str, Any], config: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path) or "the whole"
    if problem["type"] == "extra_forbidden":
        for section in path[:-1]:
            config = _section(config, section)
        return _unknown(name, path[-1], config)
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "value_error":
        return f"{name}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    return f"{name} is {problem['input']!r}: {problem['msg']}"


def _unknown(path: str, name: str, config: type[BaseModel]) -> str:
    fields = sorted(config.model_fields)
    return f"there is no field {path}.{_closest(name, fields)} Fields there: {', '.join(fields)}"


def _closest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    return f" Did you mean {close[0]!r}?" if close else ""


def _section(config: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = config.model_fields[name].annotation
    return typing.cast(type[BaseModel], annotation)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
