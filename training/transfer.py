"""Small tensors on their way to a GPU that must not be waited for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`.

    From ordinary memory the host would wait until the GPU has done all that is queued; from page-locked memory
    the copy queues up like everything else.
    """
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
