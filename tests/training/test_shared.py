"""Arrays shared by processes: one copy, no name, and nothing left however a process ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from training.shared import ArrayWriter, SharedArray

RECORD = np.dtype([("name", np.int16), ("place", np.float64, 3)])

HOLDER = """
import sys, time
import numpy as np
from training.shared import ArrayWriter

writer = ArrayWriter(np.int64)
writer.append(np.arange(100_000))
array = writer.finish()
print(array.values.sum(), flush=True)
time.sleep(60)
"""

FULL = """
import resource
import numpy as np
from catalog.errors import SetupError
from training.shared import ArrayWriter

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    ArrayWriter(np.int64).append(np.arange(1000))
except SetupError as error:
    print(error)
"""


def shared(*pieces: np.ndarray) -> SharedArray:
    writer = ArrayWriter(pieces[0].dtype)
    for piece in pieces:
        writer.append(piece)
    return writer.finish()


def test_an_array_holds_its_pieces() -> None:
    whole = np.zeros(10, RECORD)
    whole["place"] = np.arange(30).reshape(10, 3)
    array = shared(whole[:4], whole[4:4], whole[4:])
    assert len(array) == 10
    assert array.values.dtype == RECORD
    assert np.array_equal(array.values, whole)
    assert np.array_equal(shared(np.arange(20)[::2]).values, np.arange(0, 20, 2))
    with pytest.raises(ValueError, match="read-only"):
        array.values["name"][0] = 1


def test_an_array_may_be_empty() -> None:
    assert shared(np.empty(0, np.int32)).values.shape == (0,)


def place_and_sum(array: SharedArray, answer: Connection) -> None:
    content = Path(f"/proc/self/fd/{array._file.fileno()}").stat()
    answer.send((content.st_dev, content.st_ino, int(array.values.sum())))


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_worker_maps_the_same_file(method: str) -> None:
    array = shared(np.arange(1000))
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=place_and_sum, args=(array, theirs))
    worker.start()
    assert ours.poll(60)
    here = os.fstat(array._file.fileno())
    assert ours.recv() == (here.st_dev, here.st_ino, 499_500)
    worker.join()


@pytest.mark.parametrize("module", ["", "import os\ndel os.memfd_create\n"])
def test_a_killed_process_leaves_nothing_behind(tmp_path: Path, module: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", module + HOLDER],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 4_999_950_000
        held = " ".join(str(path.readlink()) for path in Path(f"/proc/{process.pid}/fd").iterdir())
        assert (str(tmp_path) if module else "memfd:") in held, "the array lies there"
        assert list(tmp_path.iterdir()) == []
        assert not any("pumit" in path.name for path in Path("/dev/shm").iterdir())
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_so() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=True)
    assert "no room for the catalog's training rows" in done.stdout
