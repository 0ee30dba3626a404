"""The linear start of the tokenizer: what it passes before the first step of a training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catalog.errors import SetupError
from training.config import load_preset
from training.linear_start import most_signals, start_linear
from training.models import build_tokenizer
from training.tokenizer import NORM_GROUPS, Tokenizer, TokenizerConfig
from training.validation import psnr

LEVELS = range(6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(load_preset("tokenizer", "small").model).eval()


def smooth(level: int, seed: int) -> Tensor:
    """(1, 3, D, 64, 64) in [-1, 1]: noise as smooth as anatomy, in colour at level 5."""
    generator = torch.Generator().manual_seed(seed)
    channels = 3 if level == 5 else 1
    slices = max(32 >> level, 1)
    noise = torch.randn(1, channels, -(-slices * 2**level // 16) + 1, 9, 9, generator=generator)
    thin = F.interpolate(noise, size=(slices << level, 64, 64), mode="trilinear", align_corners=True)
    thick = thin.reshape(1, channels, slices, 1 << level, 64, 64).mean(dim=3)
    return (0.3 * thick - 0.4).clamp(-1, 1).expand(1, 3, -1, -1, -1)


@torch.no_grad()
def passed(tokenizer: Tokenizer, x: Tensor, level: int) -> Tensor:
    return tokenizer(x, level).reconstruction


@pytest.mark.parametrize("level", LEVELS)
def test_before_training_it_is_better_than_the_mean_colour_of_patches(tokenizer, level):
    x = smooth(level, 1)
    means = F.interpolate(F.avg_pool3d(x, (1, 16, 16)), scale_factor=(1, 16, 16))
    gain = psnr(passed(tokenizer, x, level) / 2 + 0.5, x / 2 + 0.5) - psnr(means / 2 + 0.5, x / 2 + 0.5)
    assert float(gain) > 4


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_almost_linear(tokenizer, level):
    one, two = smooth(level, 1), smooth(level, 2)
    mixed = passed(tokenizer, (one + two) / 2, level)
    apart = (passed(tokenizer, one, level) + passed(tokenizer, two, level)) / 2
    assert float((mixed - apart).square().mean() / apart.var()) < 0.02


@pytest.mark.parametrize("level", [1, 3, 4])
def test_thick_slices_pass_like_their_thin_ones(tokenizer, level):
    thick = smooth(level, 3)
    thin = thick.repeat_interleave(1 << level, dim=2)
    averaged = F.avg_pool3d(passed(tokenizer, thin, 0), (1 << level, 1, 1))
    difference = (passed(tokenizer, thick, level) - averaged).square().mean()
    assert float(difference / thick.var()) < 0.01


def test_its_tokens_use_all_codes(tokenizer):
    with torch.no_grad():
        tokens = tokenizer.encode(torch.cat([smooth(0, seed) for seed in range(4)]), 0).softmax(dim=-1)
    usage = tokens.flatten(0, -2).mean(dim=0)
    assert float(usage.min()) > 0.1 / len(usage)


def test_it_needs_room_for_pairs_and_codes_that_mix():
    assert [most_signals(width, NORM_GROUPS) for width in (16, 32, 48, 192)] == [0, 8, 16, 88]
    narrow = TokenizerConfig(encoder_channels=(16, 32, 64), feature_channels=64, decoder_channels=(64, 32, 16))
    with pytest.raises(ValueError, match="more than that, got"):
        start_linear(Tokenizer(narrow), NORM_GROUPS)
    nearest = TokenizerConfig(
        quantizer="nearest",
        codebook_size=8,
        embedding_dim=64,
        feature_channels=64,
        encoder_channels=(32, 32, 64),
        decoder_channels=(64, 32, 32),
    )
    with pytest.raises(ValueError, match="not for nearest codes"):
        start_linear(Tokenizer(nearest), NORM_GROUPS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["model.channels=[16,32,64]"], "multiples of 16 from 32 on"),
        (["model.quantizer=nearest", "model.embedding_dim=192"], "not for nearest"),
    ],
)
def test_a_configuration_that_cannot_start_so_is_refused(settings, told):
    with pytest.raises(SetupError, match=told):
        load_preset("tokenizer", "small", settings)
