"""Training curves on Weights & Biases, beside TensorBoard, for runs that name a project there.

Numbers and the configuration go there, without folders: no picture, no name of an image, no code, no output of
the terminal. With WANDB_MODE=offline nothing leaves the machine until `wandb sync`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catalog.errors import SetupError
from training.engine_config import EngineConfig

_ID_FILE = "wandb.json"
"""In the run folder: which run of which project continues this one's curves."""


class WandbLog:
    """The curves of one training run; interrupted and resumed, they go on as the same run there."""

    def __init__(self, project: str, folder: Path, config: EngineConfig) -> None:
        """Begin or go on. Raises SetupError without the package, or where it cannot log in."""
        try:
            import wandb
        except ImportError as error:
            raise SetupError(
                "wandb_project is set, which takes the package wandb. Install it: pip install "
                "'pumit-data[wandb]', or leave wandb_project out: TensorBoard has the same curves."
            ) from error
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(folder, project),
                resume="allow",
                name=folder.name,
                dir=folder,
                config=_without_folders(config.model_dump(mode="python")),
                settings=wandb.Settings(
                    console="off", silent=True, save_code=False, disable_code=True, disable_git=True
                ),
            )
        except wandb.Error as error:
            reason = str(error).strip().partition("\n")[0]
            raise SetupError(
                f"Weights & Biases refuses the project {project}: {reason} Type `wandb login`, set "
                "WANDB_MODE=offline, or leave wandb_project out."
            ) from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add points after so many steps. What a resumed run repeats is there already, and stays as it is."""
        self._run.log(dict(scalars), step=step)

    def close(self, *, done: bool) -> None:
        """Hand over what is left; a run that is not `done` is shown as failed until it is resumed."""
        self._run.finish(exit_code=0 if done else 1)


def _run_id(folder: Path, project: str) -> str:
    """The id of the run that continues the curves of `folder`; a new one for another project."""
    file = folder / _ID_FILE
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("project") != project:
        known = {"project": project, "id": secrets.token_hex(8)}
        file.write_text(json.dumps(known) + "\n")
    return str(known["id"])


def _without_folders(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the last part of paths alone: folders name users and projects."""
    plain: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            plain[name] = _without_folders(value)
        else:
            plain[name] = value.name if isinstance(value, Path) else value
    return plain
