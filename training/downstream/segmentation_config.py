"""Settings of the segmentation tasks; the presets are `training/presets/{btcv,chaos,folder}-*.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.config import IntervalConfig, OptimConfig, Positive, PositiveReal, Share
from training.downstream.task import Cell


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ImagesConfig(_Section):
    """What is done to images, and which are kept to measure on."""

    spacing: tuple[PositiveReal, PositiveReal, PositiveReal] | None
    """Voxels in mm along (D, H, W) to which images are resampled; null leaves them on their own grid."""
    window: tuple[float, float] | None
    """Intensities shown as 0 and 1; null takes percentiles of each channel, then mean 0 and deviation 1."""
    crop: tuple[Positive, Positive, Positive]
    """Voxels (D, H, W) of a training crop and of a window of inference."""
    random_share: Share
    """Share of the crops that lie anywhere; the others lie around a voxel of a class, each as often."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """Share of the subjects kept to measure on, where the task has no split of its own; 0 measures nothing."""
    cache_dir: Path | None = None
    """Folder for prepared images; null is one in the user's cache."""


class InferenceConfig(_Section):
    """How whole images are labelled in the end."""

    overlap: Annotated[float, Field(ge=0, lt=1)]
    """Share of a window that its neighbour covers as well."""
    flips: bool
    """Average over all mirror images: eight times the work for volumes."""


class SegmentationConfig(_Section):
    """Settings of btcv, chaos and folder:NAME."""

    data: Path | None = None
    """Folder that the release was unpacked to, or that holds images/ and labels/."""
    images: ImagesConfig
    batch_size: Positive
    """Crops in one step."""
    workers: Annotated[int, Field(ge=0)]
    """Processes that make crops; any number makes the same."""
    width: Positive
    """Channels of the decoder at full resolution."""
    optim: OptimConfig
    steps: Positive
    weights: Literal["last", "best"]
    """Which weights are measured: those of the last step, or of the validation with the best mean Dice."""
    inference: InferenceConfig
    intervals: IntervalConfig
    keep_checkpoints: Positive
    precision: Literal["fp32", "bf16", "fp16"]
    device: Literal["auto", "cpu", "cuda"]

    @model_validator(mode="after")
    def _fits(self) -> SegmentationConfig:
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} must be below steps {self.steps}")
        if self.images.window is not None and self.images.window[0] >= self.images.window[1]:
            raise ValueError(f"images.window {list(self.images.window)} must rise")
        return self


@dataclass(frozen=True)
class Batches:
    batch_size: int
    accumulate: int = 1


@dataclass(frozen=True)
class EngineSettings:
    """A cell and its settings as the engine reads them: a `training.engine_config.EngineConfig`."""

    cell: Cell
    settings: SegmentationConfig

    kind = "segmentation"
    compile = False
    wandb_project = None
    draws_noise = False

    @property
    def data(self) -> Batches:
        return Batches(self.settings.batch_size)

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def intervals(self) -> IntervalConfig:
        return self.settings.intervals

    @property
    def keep_checkpoints(self) -> int:
        return self.settings.keep_checkpoints

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        return self.settings.precision

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        return self.settings.device

    @property
    def seed(self) -> int:
        return self.cell.seed

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """What the weights depend on; places and workers may change while a run is stopped."""
        settings = self.settings.model_dump(mode=mode, exclude={"data", "device", "workers"})
        settings["images"].pop("cache_dir")
        return {
            **self.cell.model_dump(mode=mode),
            **settings,
            "data": {"batch_size": self.data.batch_size, "accumulate": self.data.accumulate},
        }
