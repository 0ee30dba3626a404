"""A folder that a command fills in one call or several: a file in it says with what, and one process writes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from catalog.durable import replacing
from catalog.errors import SetupError

_LOCK = ".lock"


@contextmanager
def claimed(file: Path, identity: Mapping[str, Any], what: str) -> Iterator[None]:
    """Hold the folder of `file`, to fill it with `what` (a plural) that `identity` (plain data) tells of.

    `file` is written with the identity, or compared with it. Raises SetupError if the folder holds something
    else, or another process writes to it.
    """
    folder = file.parent
    if not file.is_file() and folder.exists() and any(path.name != _LOCK for path in folder.iterdir()):
        raise SetupError(f"{folder} holds something else than {what}: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(f"another process writes to {folder}: wait for it, or stop it") from error
        if file.is_file():
            changed = differing(file, identity)
            if changed:
                raise SetupError(
                    f"{folder} holds {what} that differ in: {', '.join(changed)}. Repeat the command as it "
                    "was, or name another folder."
                )
        else:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        yield


def differing(file: Path, identity: Mapping[str, Any]) -> list[str]:
    """Names of what `file`, written by `claimed`, tells otherwise than `identity`.

    Raises SetupError if it cannot be read.
    """
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{file} is damaged: {error}. Delete the folder and begin anew.") from error
    now = json.loads(json.dumps(identity))
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
