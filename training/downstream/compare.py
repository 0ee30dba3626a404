"""A grid of runs: every task from every start in every mode, with every share of the labels and every seed.

    tasks:
      - {task: medmnist3d:organ, preset: tiny, data: /data/medmnist}
    inits:
      - scratch:base
      - {init: runs/mim, name: ours}
      - {init: models.py:unimiss, name: UniMiSS, set: {size: [96, 96, 96]}}
    modes: [full, lora]
    fractions: [0.1, 1.0]
    seeds: [0, 1, 2]
    baseline: ours               # the others are tested against it; by default the first of inits

Each cell has a folder, and its result there says that it is done. So a grid that was killed goes on where it
was, several processes can share one, and a larger grid takes over what a smaller one did.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rich.console import Console

from catalog.errors import SetupError
from training.downstream.cells import CellBusyError, run_cell, settings_of
from training.downstream.task import Cell, Result, read_result, task_of

_FAILURE = "failure.txt"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    settings: dict[str, Any] = Field(default={}, alias="set")
    """Settings of the task that are changed, by name."""

    @property
    def overrides(self) -> list[str]:
        return [f"{name}={json.dumps(value)}" for name, value in self.settings.items()]


class TaskEntry(_Entry):
    """A task of a grid."""

    task: str
    preset: str = "paper"
    data: str | None = None
    """Where its images lie."""


class InitEntry(_Entry):
    """A start of a grid."""

    init: str
    name: str = ""
    """How tables call it; by default as `init`."""

    @model_validator(mode="after")
    def _named(self) -> InitEntry:
        return self if self.name else self.model_copy(update={"name": self.init})


def _entries(values: object, key: str) -> object:
    """Plain texts as entries."""
    if not isinstance(values, list):
        return values
    return [{key: value} if isinstance(value, str) else value for value in values]


class Grid(BaseModel):
    """What GRID.yaml says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: Annotated[tuple[TaskEntry, ...], Field(min_length=1)]
    inits: Annotated[tuple[InitEntry, ...], Field(min_length=1)]
    modes: Annotated[tuple[str, ...], Field(min_length=1)] = ("full",)
    fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0,)
    baseline: str = ""

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, values: object) -> object:
        return _entries(values, "task")

    @field_validator("inits", mode="before")
    @classmethod
    def _inits(cls, values: object) -> object:
        return _entries(values, "init")

    @model_validator(mode="after")
    def _is_consistent(self) -> Grid:
        axes: dict[str, list[Any]] = {
            "tasks": [entry.task for entry in self.tasks],
            "names of inits": [entry.name for entry in self.inits],
            "modes": list(self.modes),
            "fractions": list(self.fractions),
            "seeds": list(self.seeds),
        }
        for name, values in axes.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ, got {values}")
        names = axes["names of inits"]
        if self.baseline and self.baseline not in names:
            raise ValueError(f"baseline must be one of {names}, got {self.baseline!r}")
        return self if self.baseline else self.model_copy(update={"baseline": names[0]})


@dataclass(frozen=True)
class GridCell:
    """A cell of a grid, and how the grid calls its start."""

    cell: Cell
    name: str
    config: Any
    folder: Path
    """Below the output."""


@dataclass
class Outcome:
    """What a grid has come to."""

    results: list[tuple[GridCell, Result]] = field(default_factory=list)
    failures: list[tuple[GridCell, str]] = field(default_factory=list)
    """Cells that cannot be run, and why."""
    missing: list[GridCell] = field(default_factory=list)
    """Cells not yet run, or in the hands of another process."""


def load_grid(file: Path) -> Grid:
    """Read GRID.yaml. Raises SetupError that names what is wrong with it."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read the grid {file}: {error}") from error
    except yaml.YAMLError as error:
        raise SetupError(f"{file} is not YAML: {error}") from error
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        problems = [
            ".".join(map(str, problem["loc"])) + ": " + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors(include_url=False)
        ]
        raise SetupError(f"{file}: {'; '.join(problems)}. docs/downstream.md shows a grid.") from None


def cells_of(grid: Grid) -> Iterator[GridCell]:
    """All cells, seeds outermost: an unfinished grid has all starts for the first seeds.

    Raises SetupError where a task, preset, setting or mode does not exist.
    """
    axes = itertools.product(grid.seeds, grid.tasks, grid.fractions, grid.modes, grid.inits)
    for seed, task, fraction, mode, init in axes:
        cell = Cell(task=task.task, init=init.init, mode=mode, fraction=fraction, seed=seed)
        config = settings_of(task.task, task.preset, task.data, [*task.overrides, *init.overrides])
        parts = (task.task, init.name, mode, f"{fraction:g}", f"seed-{seed}")
        yield GridCell(cell, init.name, config, Path("cells", *map(_file_name, parts)))


def run_grid(grid: Grid, output: Path, *, run: bool = True) -> Outcome:
    """Run the cells that have no result yet, and collect all; with `run` false, only collect.

    A cell that cannot be run (a mode that its network does not have, too few cases) is told and left out; the
    others go on. Raises SetupError, before anything runs, if the grid is wrong.
    """
    cells = list(cells_of(grid))
    for each in cells:
        if run:
            task_of(each.cell.task).check(each.cell, each.config)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    outcome = Outcome()
    for number, each in enumerate(cells, 1):
        folder = output / each.folder
        result, failure = read_result(folder), folder / _FAILURE
        if run and result is None:
            console.print(f"{number}/{len(cells)}: {each.folder}", markup=False)
        try:
            if run:
                result = run_cell(each.cell, each.config, folder)
                failure.unlink(missing_ok=True)
        except CellBusyError:
            pass
        except SetupError as error:
            console.print(f"not run: {error}", markup=False)
            failure.write_text(f"{error}\n", encoding="utf-8")
        if failure.is_file():
            outcome.failures.append((each, failure.read_text(encoding="utf-8").strip()))
        elif result is not None:
            outcome.results.append((each, result))
        else:
            outcome.missing.append(each)
    return outcome


def _file_name(text: str) -> str:
    """A text as the name of a folder, of plain characters."""
    return re.sub("[^A-Za-z0-9._-]+", "-", text).strip("-.") or "-"
