"""What the engine (`training.run`) reads of a configuration, whatever is trained by it."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Precision = Literal["fp32", "bf16", "fp16"]
"""Number format of the forward pass; weights stay float32."""


class Batches(Protocol):
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...


class Intervals(Protocol):
    @property
    def log_every_steps(self) -> int: ...


class EngineConfig(Protocol):
    """`training.config.RunConfig` is one; a field has the meaning that it has there."""

    @property
    def kind(self) -> str: ...
    @property
    def data(self) -> Batches: ...
    @property
    def steps(self) -> int: ...
    @property
    def intervals(self) -> Intervals: ...
    @property
    def keep_checkpoints(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def compile(self) -> bool: ...
    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def wandb_project(self) -> str | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def draws_noise(self) -> bool: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The configuration as plain data; `mode` is "json" or, with paths as such, "python"."""
