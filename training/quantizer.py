"""From encoder features to tokens over a learnt codebook: soft (the paper's), Gumbel, nearest neighbour.

A soft token is the distribution p = softmax(W z + b) over the K codes e_k; the decoder sees
z_q = sum_k p_k e_k. Two terms regularise its prior (paper, soft tokens; both are minimised, natural logarithm):

    diversity = sum_k m_k log m_k, with m the mean of p over all tokens of the batch
                -log K when all codes are used alike, 0 when only one is
    sharpness = mean over tokens of -sum_k p_k log p_k
                log K when tokens say nothing, 0 when every token is one code

Shape suffixes: B crops, C channels, D H W token grid, K codes. Logits and probabilities are channel last.
Logarithms are taken in float32 at least, whatever the precision of the features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training.onednn import Linear, linear
from training.world import sum_over_ranks


class Quantised(NamedTuple):
    """Tokens of one batch."""

    z_q: Tensor
    """Input of the decoder, (B, C, D, H, W)."""
    logits: Tensor
    """(B, D, H, W, K), unnormalised log-probabilities; 2 z.e - |e|^2 for nearest neighbours."""
    probabilities: Tensor
    """(B, D, H, W, K), what z_q mixes: p, a straight-through sample of it, or one-hot."""
    diversity: Tensor
    """sum_k m_k log m_k, scalar in [-log K, 0]."""
    sharpness: Tensor
    """Mean entropy of a token in nats, scalar in [0, log K]; 0 for nearest neighbours."""
    codebook_loss: Tensor | None = None
    """Pull of features and codes towards each other, scalar; nearest neighbours only."""


_INITIAL_GAIN = 8.0
"""On the usual initial projection, whose logits are so alike that all tokens start as the mean of the codebook:
with it they start about 1.5 nats below the entropy of the uniform distribution."""


class SoftQuantizer(nn.Module):
    """Soft tokens: the decoder sees the expectation over the codebook, so everything is differentiable."""

    def __init__(self, in_channels: int, codebook_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.projection = Linear(in_channels, codebook_size)
        with torch.no_grad():
            self.projection.weight.mul_(_INITIAL_GAIN)
        self.codebook = nn.Parameter(torch.randn(codebook_size, embedding_dim))

    def logits(self, features_BCDHW: Tensor) -> Tensor:
        """(B, D, H, W, K) from features (B, C, D, H, W)."""
        return self.projection(features_BCDHW.movedim(1, -1))  # type: ignore[no-any-return]

    def probabilities(self, logits_BDHWK: Tensor) -> Tensor:
        """(B, D, H, W, K), whose mean is m."""
        return _log_softmax(logits_BDHWK).exp()

    def mix(self, probabilities_BDHWK: Tensor) -> Tensor:
        """z_q (B, C, D, H, W), C = embedding_dim: the codes mixed by `probabilities`."""
        return _mix(probabilities_BDHWK, self.codebook)

    def forward(self, features_BCDHW: Tensor) -> Quantised:
        """Quantise (B, C, D, H, W); C = in_channels. In training, m is taken over all processes."""
        logits = self.logits(features_BCDHW)
        log_p = _log_softmax(logits)
        p = log_p.exp()
        mixed = self._assign(log_p, p)
        return Quantised(
            z_q=self.mix(mixed),
            logits=logits,
            probabilities=mixed,
            diversity=negative_entropy(mean_usage(p, across_ranks=self.training)),
            sharpness=-(p * log_p).sum(dim=-1).mean(),
        )

    def _assign(self, log_p: Tensor, p: Tensor) -> Tensor:
        return p


class GumbelQuantizer(SoftQuantizer):
    """In training, one code drawn per token by the Gumbel-max trick (straight through); p itself otherwise.

    `temperature` is a buffer, so that a compiled graph sees a tensor and not a new constant each step:
    `quantizer.temperature.fill_(gumbel_temperature(step, steps))`. It follows from the step and is not saved.
    """

    temperature: Tensor

    def __init__(self, in_channels: int, codebook_size: int, embedding_dim: int) -> None:
        super().__init__(in_channels, codebook_size, embedding_dim)
        self.register_buffer("temperature", torch.tensor(gumbel_temperature(0, 1)), persistent=False)

    def _assign(self, log_p: Tensor, p: Tensor) -> Tensor:
        if not self.training:
            return p
        gumbel = -torch.empty_like(log_p).exponential_().log()
        relaxed = ((log_p + gumbel) / self.temperature).softmax(dim=-1)
        drawn = F.one_hot(relaxed.argmax(dim=-1), relaxed.shape[-1]).to(relaxed.dtype)
        return drawn + (relaxed - relaxed.detach())


class NearestQuantizer(nn.Module):
    """The nearest code replaces the feature; the decoder's gradient passes to the feature (VQ-VAE).

    codebook_loss = codebook_weight mean |sg(z) - e|^2 + commitment_weight mean |z - sg(e)|^2, means over all
    elements. The defaults are those of VQ-VAE (eq. 3); the reference implementation has the two swapped.
    No gradient flows through `diversity`, and `sharpness` is 0.
    """

    def __init__(
        self,
        codebook_size: int,
        embedding_dim: int,
        *,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, embedding_dim))
        nn.init.uniform_(self.codebook, -1 / codebook_size, 1 / codebook_size)
        self.codebook_weight = codebook_weight
        self.commitment_weight = commitment_weight

    def logits(self, features_BCDHW: Tensor) -> Tensor:
        """(B, D, H, W, K) from features (B, C, D, H, W): |z|^2 minus the squared distance to each code."""
        return 2 * features_BCDHW.movedim(1, -1) @ self.codebook.T - self.codebook.square().sum(dim=1)

    def probabilities(self, logits_BDHWK: Tensor) -> Tensor:
        """(B, D, H, W, K) one-hot, whose mean is m."""
        return F.one_hot(logits_BDHWK.argmax(dim=-1), len(self.codebook)).to(self.codebook.dtype)

    def mix(self, probabilities_BDHWK: Tensor) -> Tensor:
        """z_q (B, C, D, H, W), C = embedding_dim: the codes mixed by `probabilities`."""
        return _mix(probabilities_BDHWK, self.codebook)

    def forward(self, features_BCDHW: Tensor) -> Quantised:
        """Quantise (B, C, D, H, W); C = embedding_dim. In training, m is taken over all processes."""
        logits = self.logits(features_BCDHW)
        index = logits.argmax(dim=-1)
        chosen_BCDHW = self.codebook[index].movedim(-1, 1)
        one_hot = F.one_hot(index, len(self.codebook)).to(self.codebook.dtype)
        return Quantised(
            z_q=features_BCDHW + (chosen_BCDHW - features_BCDHW).detach(),
            logits=logits,
            probabilities=one_hot,
            diversity=negative_entropy(mean_usage(one_hot, across_ranks=self.training)),
            sharpness=one_hot.new_zeros(()),
            codebook_loss=self.codebook_weight * F.mse_loss(chosen_BCDHW, features_BCDHW.detach())
            + self.commitment_weight * F.mse_loss(features_BCDHW, chosen_BCDHW.detach()),
        )


def gumbel_temperature(step: int, steps: int, *, lowest: float = 1e-6, highest: float = 0.9) -> float:
    """Temperature before `step` (counted from 0) of a run of `steps`: half a cosine from highest to lowest."""
    return lowest + (highest - lowest) / 2 * (1 + math.cos(math.pi * min(step / steps, 1)))


def mean_usage(probabilities: Tensor, *, across_ranks: bool) -> Tensor:
    """m (K): mean of (..., K) over all tokens, of all processes where `across_ranks` and there are several.

    Processes may hold different numbers of tokens. The gradient runs through the sum: with gradients
    averaged over processes (as data-parallel training does) a function of m gets the gradient that one
    process with all tokens would get. Every process must call.
    """
    total_K = probabilities.flatten(0, -2).sum(dim=0)
    tokens = probabilities.numel() // probabilities.shape[-1]
    if not (across_ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return total_K / tokens
    packed: Tensor = sum_over_ranks(torch.cat([total_K, total_K.new_tensor([tokens])]))
    return packed[:-1] / packed[-1]


def diversity_of_part(probabilities: Tensor, whole_K: Tensor) -> Tensor:
    """sum_k m_k log m_k of a batch of which only a part is at hand; `whole_K` is its m, without a gradient.

    The gradients of all parts, each weighted with its share of the tokens, add up to that of the whole.
    """
    part_K = mean_usage(probabilities, across_ranks=False)
    return negative_entropy(whole_K + (part_K - part_K.detach()))


def negative_entropy(m_K: Tensor) -> Tensor:
    """sum_k m_k log m_k, with value and gradient finite where some m_k underflows to 0."""
    # The slope of m log m at 0 is infinite, and infinity times the vanished slope of the softmax is NaN.
    # The smallest normal number bounds the logarithm; it changes no m that float arithmetic can tell from 0.
    return (m_K * m_K.clamp_min(torch.finfo(m_K.dtype).tiny).log()).sum()


def utilisation(index: Tensor, codebook_size: int) -> Tensor:
    """Share of the codebook that is some token's most likely code; `index` int64 of any shape."""
    return (torch.bincount(index.flatten(), minlength=codebook_size) > 0).float().mean()


def perplexity(m_K: Tensor) -> Tensor:
    """exp(entropy of m): how many codes, used alike, would spread as much; in [1, K]."""
    return (-negative_entropy(m_K)).exp()


def distinct_codes(index_BDHW: Tensor) -> float:
    """Distinct most likely codes of each image, summed over the batch, per token; the reference's diversity."""
    return sum(len(image.unique()) for image in index_BDHW) / index_BDHW.numel()


def _mix(probabilities_BDHWK: Tensor, codebook_KC: Tensor) -> Tensor:
    return linear(probabilities_BDHWK.to(codebook_KC.dtype), codebook_KC.t()).movedim(-1, 1).contiguous()


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
