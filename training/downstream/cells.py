"""One run of a task in its folder: done once, and what lies there is never of another run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from catalog.errors import SetupError
from training.config import preset_of
from training.downstream.task import RESULT_FILE, Cell, Result, prefix_of, read_result, task_of
from training.run import write_json

_CELL, _LOCK = "cell.json", "cell.lock"


class CellBusyError(SetupError):
    """Another process is at work in the folder."""


def settings_of(task: str, preset: str, data: str | None, overrides: Sequence[str]) -> Any:
    """The settings of a task: a preset, changed by `overrides`, with `data` where it is given.

    Raises SetupError for an unknown task, preset or field.
    """
    placed = [] if data is None else [f"data={json.dumps(data)}"]
    return preset_of(task_of(task).CONFIG, prefix_of(task), preset, [*overrides, *placed])


def run_cell(cell: Cell, config: BaseModel, folder: Path) -> Result:
    """Run `cell` in `folder`, or go on with it there; a finished one is read.

    Raises SetupError where the folder holds anything else, CellBusyError where another process runs it.
    """
    task = task_of(cell.task)
    identity = {"cell": cell.model_dump(mode="json"), "config": config.model_dump(mode="json")}
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _claim(folder, identity)
        if (done := read_result(folder)) is not None:
            return done
        task.check(cell, config)
        result = task.run(cell, config, folder)
        result.write(folder)
        return result


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Say whose folder it is. Raises SetupError if it is another's."""
    file = folder / _CELL
    if not file.is_file():
        if any(path.name != _LOCK for path in folder.iterdir()):
            raise SetupError(f"{folder} holds something else: give another folder")
        write_json(file, identity)
        return
    before = json.loads(file.read_text())
    changed = [
        f"{name} was {before.get(part, {}).get(name)!r}, is {value!r}"
        for part, fields in identity.items()
        for name, value in fields.items()
        if before.get(part, {}).get(name) != value and name not in _FREE
    ]
    if changed:
        raise SetupError(
            f"{folder} is of another run: {'; '.join(changed)}. Give another folder, or delete that one "
            f"(its {RESULT_FILE} too)."
        )


_FREE = ("data", "device", "at_once", "workers", "intervals", "keep_checkpoints")
"""Settings that change no figure, but by rounding."""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; one that was killed holds nothing."""
    with (folder / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CellBusyError(f"another process is at work in {folder}: wait for it") from None
        yield
