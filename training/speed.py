"""How fast a training is: images, tokens and operations a second, the share of what its GPUs could do (MFU)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
}
"""Dense bf16 and fp16 operations a second that NVIDIA states (data sheets, without sparsity), by words of the
device's name; of several that fit, the first counts."""


SPEEDS = ("images_per_second", "tokens_per_second", "tflops_per_second", "mfu")
"""Names of the figures in log and summary."""


class StepWork(NamedTuple):
    """What one step is, over all processes."""

    kind: Hashable
    """Steps of one kind need the same compiled graphs."""
    tokens: int
    flops: float
    """Of the model: what is computed twice to save memory counts once."""


class Speed:
    """Adds up steps and their time."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._tokens, self._flops = 0, 0.0

    def add(self, seconds: float, images: int, work: StepWork | None) -> None:
        """Count a step; `work` where it is known."""
        self.seconds += seconds
        self.images += images
        if work is not None:
            self._tokens += work.tokens
            self._flops += work.flops

    def rates(self, peak_flops: float | None) -> dict[str, float]:
        """images_per_second, and where it is known tokens_per_second, tflops_per_second and, of the peak of all
        devices together, mfu."""
        if not self.seconds:
            return {}
        found = {"images_per_second": self.images / self.seconds}
        if self._tokens:
            found["tokens_per_second"] = self._tokens / self.seconds
            found["tflops_per_second"] = self._flops / self.seconds / 1e12
            if peak_flops is not None:
                found["mfu"] = self._flops / self.seconds / peak_flops
        return found


class GraphWatch:
    """Counts compiled graphs, and those that a kind of step needed although it had been there before."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._before = graphs_compiled()
        self.late = 0

    def step(self, kind: Hashable) -> None:
        """Look after a step."""
        now = graphs_compiled()
        if kind in self._seen:
            self.late += now - self._before
        self._seen.add(kind)
        self._before = now

    def scalars(self) -> dict[str, float]:
        """`compile/graphs` of the process so far; `compile/late_graphs` should stay 0."""
        return {"compile/graphs": float(self._before), "compile/late_graphs": float(self.late)}


def graphs_compiled() -> int:
    """Graphs that torch.compile made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that `device` could do in bf16 or fp16; None where it is not known.

    In fp32 it depends on switches (TF32), and a CPU's depends on its clock: neither is guessed.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of the GPU that calls itself `name`."""
    words = set(name.replace("-", " ").split())
    return next((peak for known, peak in PEAK_FLOPS.items() if set(known.split()) <= words), None)
