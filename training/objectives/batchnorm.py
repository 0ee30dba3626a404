"""Batch norm whose batch is that of all processes, so that several learn as one does.

PyTorch's own (SyncBatchNorm) needs a GPU. Shape suffixes: B crops of a process, C features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training.world import sum_over_ranks

_MOMENTUM, _EPSILON = 0.1, 1e-5
"""Those of PyTorch."""


class BatchNorm(nn.Module):
    """Features (B, C) to mean 0 and deviation 1 over the crops of all processes; `affine` adds gain and bias.

    In evaluation, with the moving averages that training left. Computes and answers in float32 at least.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x_BC: Tensor) -> Tensor:
        with torch.autocast(x_BC.device.type, enabled=False):
            x_BC = x_BC.to(torch.promote_types(x_BC.dtype, torch.float32))
            if not self.training:
                mean_C, var_C = self.running_mean, self.running_var
                return F.batch_norm(x_BC, mean_C, var_C, self.weight, self.bias, eps=_EPSILON)
            # Two sums in turn: where features differ little, a difference of large sums would be noise.
            mean_C = _mean(x_BC)
            centred_BC = x_BC - mean_C
            var_C = _mean(centred_BC.square())
            with torch.no_grad():
                for average, found in ((self.running_mean, mean_C), (self.running_var, var_C)):
                    # A batch that is not finite, whose step is skipped, must not spoil the average for good.
                    average.copy_(torch.where(found.isfinite(), average.lerp(found, _MOMENTUM), average))
            y_BC = centred_BC * (var_C + _EPSILON).rsqrt()
            return y_BC if self.weight is None or self.bias is None else y_BC * self.weight + self.bias


def _mean(x_BC: Tensor) -> Tensor:
    """Mean over the crops of all processes, which may hold different numbers of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x_BC.mean(dim=0)
    packed: Tensor = sum_over_ranks(torch.cat([x_BC.sum(dim=0), x_BC.new_tensor([len(x_BC)])]))
    return packed[:-1] / packed[-1]
