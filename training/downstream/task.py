"""What a labelled task is to those who run and compare it: a module by the prefix of its name.

`medmnist3d:organ` is run by the module that TASKS names for `medmnist3d`. The module has what `Task` lists.
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from catalog.errors import SetupError
from training.run import write_json

TASKS = {
    "medmnist3d": "training.downstream.medmnist",
    "catalog": "training.downstream.catalog_labels",
    "btcv": "training.downstream.segmentation",
    "chaos": "training.downstream.segmentation",
    "folder": "training.downstream.segmentation",
}
"""Prefix of a task's name -> module that runs it."""

RESULT_FILE = "result.json"


class Cell(BaseModel):
    """One run of a comparison: a task, a start, a way to adapt, a share of the labels, a seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """Prefix and name: medmnist3d:organ."""
    init: str
    """What `initialisations.load_backbone` takes."""
    mode: str = "full"
    """What `adaptation.adapt` takes; a task may have modes of its own."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training cases whose labels are used."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of new weights, the cases used, and their order; whatever the start, the cases are the same."""


class Result(BaseModel):
    """What came of a cell; `result.json` in its folder, and its presence says that the cell is done."""

    model_config = ConfigDict(extra="forbid")

    cell: Cell
    metrics: dict[str, float]
    """On the test cases, by the names of the task's METRICS."""
    trained_parameters: int
    """Numbers that were trained, with the task's head."""
    training_cases: int
    seconds: float
    """From loading the network to the last figure."""
    origin: dict[str, Any]
    """Of the start's weights, as `initialisations.origin_of` tells: the lock of the pre-training, if any."""
    config: dict[str, Any]
    """The task's settings."""
    chosen: dict[str, Any] = {}
    """What the validation cases decided: learning rate, epoch."""
    data: dict[str, Any] = {}
    """What the cases are: checksums, numbers."""

    def write(self, folder: Path) -> None:
        """Write it as RESULT_FILE into `folder`, whole or not at all."""
        write_json(folder / RESULT_FILE, self.model_dump(mode="json"))


class Metric(NamedTuple):
    """A figure of merit."""

    name: str
    higher_is_better: bool
    scale: float = 1.0
    """Factor with which tables show it: 100 for shares as per cent."""


class Task(Protocol):
    """What a module of TASKS has."""

    CONFIG: type[BaseModel]
    """The task's settings; a field `data` says where its images lie."""
    METRICS: tuple[Metric, ...]
    """What is reported; comparisons test the first."""

    def check(self, cell: Cell, config: Any) -> None:
        """Raise SetupError if the cell cannot be run with these settings (name, mode); reads no image."""

    def run(self, cell: Cell, config: Any, folder: Path) -> Result:
        """Train and measure; `folder` exists and is the task's own to write into, beside RESULT_FILE.

        Called again with what an interrupted run left there. Raises SetupError.
        """


def task_of(name: str) -> Task:
    """The module that runs the task `name`. Raises SetupError if there is no task of its prefix."""
    prefix = prefix_of(name)
    return cast(Task, importlib.import_module(TASKS[prefix]))


def prefix_of(name: str) -> str:
    """`medmnist3d` of `medmnist3d:organ`. Raises SetupError, with the closest name, if it is none of TASKS."""
    prefix, colon, rest = name.partition(":")
    if prefix not in TASKS or (colon and not rest):
        close = difflib.get_close_matches(prefix, TASKS, n=1, cutoff=0.3)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SetupError(f"there is no task {name!r}.{hint} Tasks begin with {', '.join(TASKS)}")
    return prefix


def read_result(folder: Path) -> Result | None:
    """The result of a finished cell, or None. Raises SetupError if the file is damaged."""
    file = folder / RESULT_FILE
    if not file.is_file():
        return None
    try:
        return Result.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise SetupError(f"{file} is damaged: {error}. Delete it and repeat the command.") from error
