"""A start from which the tokenizer is a linear autoencoder: it keeps the principal components of smooth images.

From random weights a short training spends most of its steps on passing any picture through ten layers. Here
the network is linear to begin with, and already better than the mean colour of each patch:

- **Patterns.** Neighbouring voxels of images are alike; with a correlation of r^distance along each axis the
  principal components of a patch are products of one pattern for colour, depth, height and width. Each stage
  keeps those of the largest variance and scales them to variance 1; the decoder has the transposed weights.
- **Mirrored pairs.** Channels 2i and 2i + 1 carry u and -u, for act(u) - act(-u) = slope u holds for GELU
  (slope 1) and leaky ReLU (slope 1.01): with differences of pairs, layers are linear in spite of them
  ("looks linear" initialisation, Balduzzi et al., ICML 2017).
- **Constant pairs.** Norms take away how bright and how strong a picture is. One pair of each group that has a
  large constant value keeps the norm of the group about constant.
- **Codes** come in pairs e, -e with opposite logits, so that z_q is odd in the features and linear where logits
  are small.

Depth patterns are exact for all DA levels if taps are averaged where depth strides shrink
(`TokenizerConfig.depth_merge` "mean"), for a thick slice is then its thin ones in a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from training.quantizer import NearestQuantizer
from training.sac import SACConv3d

if TYPE_CHECKING:
    from training.tokenizer import Tokenizer

_IN_PLANE, _IN_DEPTH = 0.95, 0.97
"""Correlation of neighbouring voxels; larger in depth, for many images have thick slices or just one."""
_MEAN, _GREY, _COLOUR = -0.4, 0.9, 0.09
"""Of voxels in [-1, 1]: mean, variance of the sum of colours over sqrt(3), and of each of their differences."""
_LEAKY = 1.01
"""Slope of a mirrored pair behind a leaky ReLU."""
_CONSTANT = 10.0
"""Value of a constant pair, by the norm of the others of its group: the larger, the more linear."""
_SPREAD = 1.0
"""Standard deviation of logits: larger starts with surer tokens, and is less linear."""
_NOISE = 0.01
"""Of the usual random weights so much remains, lest channels without a pattern stay equal."""


class _Component(NamedTuple):
    """A number that describes a patch."""

    variance: float
    correlations: tuple[float, float, float]
    """Of this number in patches that are neighbours in depth, height and width."""
    parent: int
    """The number of the stage before, or the colour, that it is a pattern of."""
    pattern: Tensor
    """(k, k, k), of norm 1."""


class _Pairs(NamedTuple):
    """What the mirrored pairs of a layer's channels carry."""

    signals: Tensor
    """Pairs for signals, those of all groups in turn."""
    constants: Tensor
    """One pair of each group."""
    groups: int

    @classmethod
    def of(cls, channels: int, groups: int) -> _Pairs:
        pairs = torch.arange(channels // 2).reshape(groups, -1)
        return cls(pairs[:, :-1].T.flatten(), pairs[:, -1], groups)


def most_signals(channels: int, groups: int) -> int:
    """How many numbers a layer of so many channels can carry behind a norm of so many groups."""
    return channels // 2 - groups


@torch.no_grad()
def start_linear(tokenizer: Tokenizer, groups: int) -> None:
    """Give a new tokenizer the weights of a linear autoencoder.

    Args:
        groups: of its group norms.

    Raises:
        ValueError: it compares features with codes, or some layer has too few channels.
    """
    config, quantizer = tokenizer.config, tokenizer.quantizer
    if isinstance(quantizer, NearestQuantizer):
        raise ValueError("the linear start is for soft tokens and Gumbel samples, not for nearest codes")
    widths = (*config.encoder_channels, config.feature_channels, *config.decoder_channels)
    if any(width % (2 * groups) or most_signals(width, groups) < 1 for width in widths):
        raise ValueError(
            f"the linear start needs channels in multiples of {2 * groups} and more than that, got {widths}"
        )
    for name, parameter in tokenizer.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 5:
            parameter.mul_(_NOISE)

    # Layers of both kinds have `conv` or `up`, which a module list does not tell.
    encoder: list[Any] = list(tokenizer.encoder)
    decoder: list[Any] = list(tokenizer.decoder)
    *downs, mixing, last = encoder
    first, second, *ups, end = decoder
    kept = [
        min(most_signals(width, groups) for width in pair)
        for pair in zip(config.encoder_channels, reversed(config.decoder_channels), strict=True)
    ]
    codes, features = config.codebook_size // 2, most_signals(config.feature_channels, groups)
    kept[-1] = min(kept[-1], features, codes, config.embedding_dim)

    colours = torch.linalg.qr(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]).T).Q.T
    near = (_IN_DEPTH, _IN_PLANE, _IN_PLANE)
    before = [_Component(variance, near, 0, torch.ones(1, 1, 1)) for variance in (_GREY, _COLOUR, _COLOUR)]
    source, amplitude = _Pairs.of(2 * len(before), 1), 1.0
    for number, (down, count, up) in enumerate(zip(downs, kept, (end, *reversed(ups)), strict=True)):
        components = _largest(before, down.conv.stride, count)
        analysis, synthesis = _weights(components, before)
        target = _Pairs.of(down.conv.bias.shape[0], 1)
        back = _Pairs.of(config.decoder_channels[-1 - number], groups)
        scale = _LEAKY * _amplitude(config.decoder_channels[-1 - number], groups, count)
        if number == 0:
            analysis = torch.einsum("oc...,cr->or...", analysis, colours)
            synthesis = torch.einsum("oc...,cr->or...", synthesis, colours) / scale
            _write_signed(down.conv.weight, target, analysis)
            _write_signed(down.conv.bias, target, -_MEAN * analysis.sum((1, 2, 3, 4)))
            _write_signed(up.weight, back, synthesis)
            up.bias += _MEAN
        else:
            _connect(down.conv.weight, target, source, analysis / amplitude)
            wide = _Pairs.of(config.decoder_channels[-number], groups)
            _connect(up.up.weight.transpose(0, 1), wide, back, synthesis.transpose(0, 1) / scale)
            # No activation lies between, so the difference of a pair is twice its value.
            _mix(up.block.conv, wide, wide, torch.eye(len(before)) / 2)
            _add_constants(up.block.conv.bias, wide, len(before))
        amplitude = _add_constants(down.conv.bias, target, count)
        before, source = components, target

    count = kept[-1]
    rotation = nn.init.orthogonal_(torch.empty(count, count))
    for block, slope, matrix in ((mixing, 1.0, rotation), (last, _LEAKY, torch.eye(count))):
        target = _Pairs.of(block.conv.bias.shape[0], groups)
        _mix(block.conv, target, source, matrix / (amplitude * slope))
        amplitude, source = _add_constants(block.conv.bias, target, count), target

    logits = nn.init.orthogonal_(torch.empty(codes, count)) * (_SPREAD * math.sqrt(codes / count))
    embedding = nn.init.orthogonal_(torch.empty(codes, config.embedding_dim)) * math.sqrt(
        max(codes, config.embedding_dim)
    )
    quantizer.projection.weight.zero_()
    rows = torch.arange(2 * codes).reshape(2, codes).T.flatten()
    _connect_pairs(quantizer.projection.weight, rows, _channels(source, count), logits / (amplitude * _LEAKY))
    quantizer.codebook[: 2 * codes] = torch.cat([embedding, -embedding])

    # z_q is about embedding^T logits / codes.
    read = rotation.T @ torch.linalg.pinv(embedding.T @ logits) * codes
    target = _Pairs.of(first.conv.bias.shape[0], groups)
    _write_signed(_centre(first.conv), target, read)
    amplitude = _add_constants(first.conv.bias, target, count)
    wide = _Pairs.of(second.conv.bias.shape[0], groups)
    _mix(second.conv, wide, target, torch.eye(count) / (amplitude * _LEAKY))
    _add_constants(second.conv.bias, wide, count)


def _largest(parents: Sequence[_Component], stride: int, count: int) -> list[_Component]:
    """The `count` patterns of largest variance in stride^3 neighbouring patches."""
    found = []
    for number, parent in enumerate(parents):
        along = [_patterns(correlation, stride) for correlation in parent.correlations]
        for chosen in itertools.product(*along):
            share = math.prod(variance for variance, _, _ in chosen)
            patterns = [pattern for _, _, pattern in chosen]
            found.append(
                _Component(
                    variance=parent.variance * share,
                    correlations=tuple(correlation for _, correlation, _ in chosen),  # type: ignore[arg-type]
                    parent=number,
                    pattern=torch.einsum("d,h,w->dhw", *patterns),
                )
            )
    return sorted(found, key=lambda one: -one.variance)[:count]


def _patterns(correlation: float, length: int) -> list[tuple[float, float, Tensor]]:
    """Principal components of `length` neighbours: variance, correlation with the next such, and pattern."""
    place = torch.arange(length, dtype=torch.float64)
    distance = (place[:, None] - place).abs()
    variances, patterns = torch.linalg.eigh(correlation**distance)
    beside = correlation ** (length + place[None] - place[:, None])
    return [
        (float(variance), float(pattern @ beside @ pattern / variance), pattern.float())
        for variance, pattern in zip(variances, patterns.T, strict=True)
    ]


def _weights(components: Sequence[_Component], parents: Sequence[_Component]) -> tuple[Tensor, Tensor]:
    """From parents to components, all of variance 1, and back: (components, parents, k, k, k) twice."""
    patterns = torch.zeros(len(components), len(parents), *components[0].pattern.shape)
    for number, component in enumerate(components):
        patterns[number, component.parent] = component.pattern
    here = torch.tensor([component.variance for component in components]).sqrt()[:, None, None, None, None]
    there = torch.tensor([parent.variance for parent in parents]).sqrt()[:, None, None, None]
    return patterns * there / here, patterns * here / there


def _amplitude(channels: int, groups: int, count: int) -> float:
    """What a signal of variance 1 is behind the norm of a layer with `count` of them."""
    in_group = count / groups
    return 1 / math.sqrt(2 * in_group * (1 + _CONSTANT**2) / (channels / groups))


def _add_constants(bias: Tensor, pairs: _Pairs, count: int) -> float:
    """Set the constant pairs of a layer with `count` signals; returns their amplitude behind its norm."""
    constant = torch.full((pairs.groups,), _CONSTANT * math.sqrt(count / pairs.groups))
    bias[2 * pairs.constants] = constant
    bias[2 * pairs.constants + 1] = -constant
    return _amplitude(len(bias), pairs.groups, count)


def _centre(conv: SACConv3d) -> Tensor:
    """(O, I): the middle tap."""
    return conv.weight[:, :, 1, 1, 1]


def _mix(conv: SACConv3d, target: _Pairs, source: _Pairs, matrix: Tensor) -> None:
    _connect(_centre(conv), target, source, matrix)


def _channels(pairs: _Pairs, count: int) -> Tensor:
    """Channels of the first signals: (2 count,), the two of a pair side by side."""
    first = 2 * pairs.signals[:count]
    return torch.stack([first, first + 1], dim=1).flatten()


def _connect(weight: Tensor, target: _Pairs, source: _Pairs, matrix: Tensor) -> None:
    """Add a linear map (O, I, ...) from pairs to pairs to `weight`."""
    _connect_pairs(weight, _channels(target, matrix.shape[0]), _channels(source, matrix.shape[1]), matrix)


def _connect_pairs(weight: Tensor, rows: Tensor, columns: Tensor, matrix: Tensor) -> None:
    signed = matrix.repeat_interleave(2, 0).repeat_interleave(2, 1)
    signed[0::2, 1::2] *= -1
    signed[1::2, 0::2] *= -1
    weight[rows[:, None], columns] += signed


def _write_signed(weight: Tensor, target: _Pairs, values: Tensor) -> None:
    """Add values (n, ...) to the first channel of n pairs, and subtract them from the second."""
    channels = _channels(target, len(values))
    weight[channels[0::2]] += values
    weight[channels[1::2]] -= values
