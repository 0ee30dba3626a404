"""The tokenizer: image to soft tokens, 16 x smaller in-plane, and back; on images of every DA level.

Encoder: per stage a spatially adaptive convolution with kernel = stride, layer norm over channels, GELU;
then two 3 x 3 x 3 blocks. Decoder: two 3 x 3 x 3 blocks; per stage a transposed convolution and a 3 x 3 x 3
block; the last stage only the transposed convolution, without an output non-linearity (paper, tokenizer).

As long as the tokens are past all pending halvings (levels 0..4 at stride 16), the encoder is exact under
repetition: a level-`a` image and its 2^a-fold repeated slices at level 0 give the same logits.

Shape suffixes: B crops, C channels, D H W voxels, d h w tokens, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from catalog.errors import SetupError
from training.fit import misfits
from training.quantizer import GumbelQuantizer, NearestQuantizer, SoftQuantizer
from training.sac import DepthMerge, SACConv3d, SACConvBlock, SACTransposedConv3d, SpatialState

NORM_GROUPS = 8
IMAGE_CHANNELS = 3


class TokenizerConfig(BaseModel):
    """Size of the tokenizer; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantizer: Literal["soft", "gumbel", "nearest"] = "soft"
    """How features become tokens (training.quantizer)."""
    codebook_size: int = Field(default=1024, ge=2)
    """Codes, K."""
    embedding_dim: int = Field(default=512, ge=1)
    """Channels of a code, and of the decoder's input."""
    feature_channels: int = Field(default=512, ge=1)
    """Channels of the encoder's output, which the quantizer reads."""
    encoder_channels: tuple[int, ...] = Field(default=(128, 256, 512), min_length=1)
    """Channels after each encoder stage."""
    encoder_strides: tuple[int, ...] = (4, 2, 2)
    """In-plane stride of each encoder stage, powers of two."""
    decoder_channels: tuple[int, ...] = Field(default=(512, 256, 128), min_length=1)
    """Channels going into each decoder stage; the last stage ends at the image's three."""
    decoder_strides: tuple[int, ...] = (2, 2, 4)
    """In-plane stride of each decoder stage, powers of two."""
    depth_merge: DepthMerge = "sum"
    """Merging of depth taps in the decoder. By the paper's "sum" what comes out at level 2 and above is about 4
    times as large as at level 0, which a short training does not level out behind the last layer, where no
    norm is; "mean" gives all levels one scale. Weights are of use only as trained."""

    @property
    def stride(self) -> int:
        """In-plane size of a token in voxels; also its depth in thin slices, stride >> level thick ones."""
        return math.prod(self.encoder_strides)

    @model_validator(mode="after")
    def _fits(self) -> TokenizerConfig:
        for side in ("encoder", "decoder"):
            channels, strides = getattr(self, f"{side}_channels"), getattr(self, f"{side}_strides")
            if len(channels) != len(strides):
                raise ValueError(f"{side}_channels {channels} and {side}_strides {strides} must be as many")
            if any(stride < 2 or stride & (stride - 1) for stride in strides):
                raise ValueError(f"{side}_strides must be powers of two from 2 on, got {strides}")
        if math.prod(self.decoder_strides) != self.stride:
            raise ValueError(
                f"encoder_strides {self.encoder_strides} and decoder_strides {self.decoder_strides} must have "
                "the same product"
            )
        grouped = (self.encoder_channels[-1], self.feature_channels, *self.decoder_channels)
        if any(width < 1 or width % NORM_GROUPS for width in grouped) or min(self.encoder_channels) < 1:
            raise ValueError(
                f"the last of encoder_channels, feature_channels and all decoder_channels must be positive "
                f"multiples of {NORM_GROUPS} (group norm), got {grouped}"
            )
        if self.quantizer == "nearest" and self.feature_channels != self.embedding_dim:
            raise ValueError(
                f"quantizer=nearest compares features with codes: feature_channels {self.feature_channels} "
                f"must equal embedding_dim {self.embedding_dim}"
            )
        return self


class TokenizerOutput(NamedTuple):
    """One batch through the tokenizer, with what its losses need."""

    reconstruction: Tensor
    """(B, 3, D, H, W), about [-1, 1]."""
    logits: Tensor
    """(B, d, h, w, K), unnormalised log-probabilities of the codes."""
    quantised: Tensor
    """(B, embedding_dim, d, h, w), input of the decoder."""
    diversity: Tensor
    """sum_k m_k log m_k of the mean token distribution m; scalar, to be minimised."""
    sharpness: Tensor
    """Mean entropy of a token in nats; scalar, to be minimised."""
    codebook_loss: Tensor | None
    """Of the nearest-neighbour quantizer; None otherwise."""


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder. One call takes images of one DA level."""

    quantizer: SoftQuantizer | GumbelQuantizer | NearestQuantizer

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        widths = (IMAGE_CHANNELS, *config.encoder_channels)
        self.encoder = nn.ModuleList(
            _Down(before, after, stride)
            for (before, after), stride in zip(pairwise(widths), config.encoder_strides, strict=True)
        )
        self.encoder.append(SACConvBlock(widths[-1], widths[-1], groups=NORM_GROUPS))
        self.encoder.append(SACConvBlock(widths[-1], config.feature_channels, groups=NORM_GROUPS))

        self.quantizer = _build_quantizer(config)

        widths = config.decoder_channels
        self.decoder = nn.ModuleList(
            [
                SACConvBlock(config.embedding_dim, widths[0], groups=NORM_GROUPS),
                SACConvBlock(widths[0], widths[0], groups=NORM_GROUPS),
            ]
        )
        for (before, after), stride in zip(pairwise(widths), config.decoder_strides[:-1], strict=True):
            self.decoder.append(_Up(before, after, stride, config.depth_merge))
        stride = config.decoder_strides[-1]
        self.decoder.append(SACTransposedConv3d(widths[-1], IMAGE_CHANNELS, stride, merge=config.depth_merge))

    def features(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """What the quantizer reads, (B, feature_channels, d, h, w), of images (B, 3, D, H, W) in [-1, 1].

        Raises ValueError when H and W are no multiples of the stride, or D of a token's depth.
        """
        stride = self.config.stride
        unit = (max(stride >> level, 1), stride, stride)
        sizes = zip(x_BCDHW.shape[2:], unit, strict=True)
        if x_BCDHW.shape[1] != IMAGE_CHANNELS or any(size % multiple for size, multiple in sizes):
            raise ValueError(
                f"images of shape {tuple(x_BCDHW.shape)} at level {level}: expected {IMAGE_CHANNELS} channels "
                f"and (D, H, W) in multiples of {unit}"
            )
        return _run(self.encoder, x_BCDHW, SpatialState(level))

    def encode(self, x_BCDHW: Tensor, level: int) -> Tensor:
        """Logits (B, d, h, w, K) of images (B, 3, D, H, W) in [-1, 1]; a soft token is their softmax."""
        return self.quantizer.logits(self.features(x_BCDHW, level))

    def decode(self, z_BCdhw: Tensor, level: int) -> Tensor:
        """Images (B, 3, D, H, W), about [-1, 1], from mixed codes (B, embedding_dim, d, h, w)."""
        halvings = self.config.stride.bit_length() - 1
        return _run(self.decoder, z_BCdhw, SpatialState(level, halvings))

    def forward(self, x_BCDHW: Tensor, level: int) -> TokenizerOutput:
        """Tokenise and reconstruct images (B, 3, D, H, W) in [-1, 1] of one DA level."""
        quantised = self.quantizer(self.features(x_BCDHW, level))
        return TokenizerOutput(
            reconstruction=self.decode(quantised.z_q, level),
            logits=quantised.logits,
            quantised=quantised.z_q,
            diversity=quantised.diversity,
            sharpness=quantised.sharpness,
            codebook_loss=quantised.codebook_loss,
        )


def reference_names(config: TokenizerConfig) -> dict[str, str]:
    """Parameter names of the published implementation -> ours, for every parameter of `Tokenizer(config)`."""
    modules: dict[str, str] = {}
    stages = len(config.encoder_strides)
    for i in range(stages):
        modules |= {f"encoder.{3 * i}": f"encoder.{i}.conv", f"encoder.{3 * i + 1}.1": f"encoder.{i}.norm"}
    for i in range(stages, stages + 2):
        modules |= {f"encoder.{3 * i}": f"encoder.{i}.conv", f"encoder.{3 * i + 1}": f"encoder.{i}.norm"}
    for i in range(2):
        modules |= {f"decoder.{3 * i}": f"decoder.{i}.conv", f"decoder.{3 * i + 1}": f"decoder.{i}.norm"}
    last = len(config.decoder_strides) - 1
    for i in range(last):
        theirs, ours = f"decoder.{6 + i}", f"decoder.{2 + i}"
        modules |= {
            f"{theirs}.transposed_conv": f"{ours}.up",
            f"{theirs}.conv.0": f"{ours}.block.conv",
            f"{theirs}.conv.1": f"{ours}.block.norm",
        }
    modules[f"decoder.{6 + last}"] = f"decoder.{2 + last}"
    if config.quantizer != "nearest":
        modules["quantize.proj"] = "quantizer.projection"
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    return names | {"quantize.embedding.weight": "quantizer.codebook"}


def load_reference(tokenizer: Tokenizer, state: Mapping[str, Tensor]) -> None:
    """Load weights that carry the published implementation's parameter names, all or nothing.

    Raises SetupError that lists every missing and unexpected name and every shape that differs; the
    tokenizer is then unchanged.
    """
    names = reference_names(tokenizer.config)
    own = tokenizer.state_dict()
    problems = misfits(state, {theirs: own[ours] for theirs, ours in names.items()})
    if problems:
        raise SetupError(
            f"the weights do not fit the tokenizer ({len(problems)} of {len(names)} parameters): "
            f"{'; '.join(problems)}. Check that the configuration is the one the weights were trained with."
        )
    tokenizer.load_state_dict({ours: state[name] for name, ours in names.items()})


class _Down(nn.Module):
    """Convolution with kernel = stride, layer norm over channels, GELU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = SACConv3d(in_channels, out_channels, kernel_size=stride, stride=stride)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x_BCDHW: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
        x, state = self.conv(x_BCDHW, state)
        return F.gelu(self.norm(x.movedim(1, -1)).movedim(-1, 1)), state


class _Up(nn.Module):
    """Transposed convolution with kernel = stride, then a 3 x 3 x 3 block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, merge: DepthMerge) -> None:
        super().__init__()
        self.up = SACTransposedConv3d(in_channels, out_channels, stride, merge=merge)
        self.block = SACConvBlock(out_channels, out_channels, groups=NORM_GROUPS)

    def forward(self, x_BCDHW: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
        x, state = self.up(x_BCDHW, state)
        return self.block(x, state)  # type: ignore[no-any-return]


def _run(layers: nn.ModuleList, x: Tensor, state: SpatialState) -> Tensor:
    for layer in layers:
        x, state = layer(x, state)
    return x


def _build_quantizer(config: TokenizerConfig) -> SoftQuantizer | GumbelQuantizer | NearestQuantizer:
    if config.quantizer == "nearest":
        return NearestQuantizer(config.codebook_size, config.embedding_dim)
    kind = SoftQuantizer if config.quantizer == "soft" else GumbelQuantizer
    return kind(config.feature_channels, config.codebook_size, config.embedding_dim)
