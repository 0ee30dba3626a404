"""`pumit-train ... --nproc N`: the same command N times on this machine, as processes of one training.

What `torchrun --standalone --no-python` does, with exit codes and messages of our own, without importing torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

GRACE_SECONDS = 15.0
"""What the others have to end by themselves, once one process failed, before they are stopped."""
_LOOK_SECONDS = 0.1
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def launch(command: Sequence[str], processes: int) -> int:
    """Run `command` in `processes` processes that train together, to their end; the exit code of the whole.

    It is 0 if all of them ended well, else that of the first that did not (3 where a signal ended it).
    SIGINT and SIGTERM are passed on to all, which write a checkpoint; a second one ends them at once.
    """
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    common = {"OMP_NUM_THREADS": str(threads)} | os.environ
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal(started, signal.Signals(number))

    earlier = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(processes):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In groups of their own, so that Ctrl-C on the terminal reaches each once: through us.
            child = subprocess.Popen(  # noqa: S603 - our own command
                command, env=environment, process_group=0, preexec_fn=_die_with_parent
            )
            started.append(child)
        return _watch(started)
    finally:
        _signal(started, signal.SIGKILL)
        for process in started:
            process.wait()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, the others not long after one that failed; the exit code of the whole."""
    deadline, code = None, 0
    while any(process.poll() is None for process in processes):
        if deadline is None and (code := _failure(processes)):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            _signal(processes, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)
    return code or _failure(processes)


def _failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code for the processes that failed, 0 if none did; which one a signal ended is said."""
    # A signal's victim (its code is negative) is the cause, though those who lost it may be seen first.
    failed = [(process.returncode, rank) for rank, process in enumerate(processes) if process.returncode]
    code, rank = min(failed, default=(0, 0))
    if code >= 0:
        return code
    print(
        f"error: process {rank} was ended by {signal.Signals(-code).name}, and the others with it. Repeat the "
        "command with --resume to go on from the newest checkpoint.",
        file=sys.stderr,
    )
    return 3


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _die_with_parent() -> None:
    """Should this launcher be killed, its processes get SIGTERM and write a checkpoint."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
