"""Starting the console scripts as a user would, in a process of their own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(sys.executable).parent


def command(name: str, *arguments: str | Path, unprivileged: bool = False) -> list[str]:
    """Command line of a console script of this environment.

    With `unprivileged`, root gives up its right to read and write everything.
    """
    drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.getuid() == 0 else []
    return [*(drop if unprivileged else []), str(SCRIPTS / name), *map(str, arguments)]


def run(
    name: str,
    *arguments: str | Path,
    unprivileged: bool = False,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a console script to its end and return its output as text."""
    return subprocess.run(
        command(name, *arguments, unprivileged=unprivileged),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200"} | (env or {}),
        check=False,
    )


def published_files(corpus: Path) -> dict[str, str]:
    """sha256 of every file of a corpus by relative path, without `private/`, which may hold times."""
    return {
        path.relative_to(corpus).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(corpus.rglob("*"))
        if path.is_file() and path.relative_to(corpus).parts[0] != "private"
    }


def recorded_tasks(corpus: Path, dataset: str) -> int:
    """How many tasks of an ingest that goes on are recorded and not merged yet."""
    try:
        return len(list((corpus / "private" / "journal" / dataset).rglob("[!.]*.parquet")))
    except FileNotFoundError:  # the run was just moved, or ended
        return 0
