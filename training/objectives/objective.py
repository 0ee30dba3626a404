"""What the loop of pre-training knows of an objective, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from training.data import RunData
from training.flops import StepCounter
from training.loader import RawBatch
from training.mim import NormalisedViT
from training.run import Run

Model = TypeVar("Model", bound=NormalisedViT)


class Objective(Protocol):
    """A task under way: it has its networks, on the device of the run."""

    @property
    def companions(self) -> Mapping[str, nn.Module]:
        """Networks that belong into checkpoints, by file name, though no gradient reaches them: a teacher."""

    @property
    def encoder(self) -> NormalisedViT:
        """What the run is for: the network whose ViT is probed, exported and used."""

    def losses(self, trained: nn.Module, part: RawBatch) -> Mapping[str, Tensor]:
        """Scalars of one pass, means over the images of `part`: `loss` to be minimised, others to be logged.

        `trained` is the model of the recipe, as it is to be called: compiled, replicated or sharded.
        """

    def finish_step(self, step: int) -> Mapping[str, float]:
        """What is due once the weights have moved in `step`; tells what else to log."""

    def validate(self, step: int) -> dict[str, float]:
        """Measure the model on held-out images, log that under their name and draw a contact sheet."""


class Recipe(NamedTuple, Generic[Model]):
    """An objective before there is a run, checked as far as that goes."""

    build: Callable[[], Model]
    """Makes the model, on the CPU. Its `forward` is what `Objective.losses` calls."""
    begin: Callable[[Run, RunData, Model], Objective]
    """Begins with that model, when it is on the run's device and has its first weights."""
    counter: Callable[[Model], StepCounter] | None = None
    """Tells tokens and operations of a step; None where nobody counts them."""
    fingerprints: Mapping[str, str] = {}
    """What a resumed run must find unchanged besides its data."""
