"""Training in a process of its own, which can be stopped for real."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

_PROGRAM = """
import os, signal
from pathlib import Path
from training.config import load_preset
from training.run import Run
from training.train_{kind} import train

finish = Run.finish_step

def finish_or_stop(self, step, *rest):
    finish(self, step, *rest)
    if {stop!r} and step == 4:
        os.kill(os.getpid(), getattr(signal, {stop!r}))

Run.finish_step = finish_or_stop
train(load_preset({kind!r}, "tiny", {overrides!r}), Path({corpus!r}), Path({run!r}), resume={resume!r})
"""


def train_in_process(
    kind: Literal["tokenizer", "mim"],
    overrides: Sequence[str],
    corpus: Path,
    run: Path,
    *,
    resume: bool = False,
    stop: str = "",
) -> int:
    """Exit code of a run of the tiny preset; `stop` names a signal that it gets after its fifth step.

    Runs that are to be compared bit by bit must all come from here: sums depend on the state of the process
    (number of threads, switches of PyTorch that other tests may have set).
    """
    program = _PROGRAM.format(
        kind=kind, stop=stop, overrides=[*overrides], corpus=str(corpus), run=str(run), resume=resume
    )
    repository = Path(__file__).resolve().parent.parent
    return subprocess.run([sys.executable, "-c", program], cwd=repository, check=False).returncode
