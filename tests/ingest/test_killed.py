"""Processes of an ingest that are killed at any moment: a rerun ends as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
import pyarrow.parquet as pq
import pytest

from catalog.corpus import Corpus
from ingest.journal import Journal, RunEndedError
from tests.commands import command, published_files, recorded_tasks, run

Victim = Literal["driver", "worker", "scheduler"]

DATASET = {
    "id": "mixed",
    "title": "Samples under many names",
    "folder": "mixed",
    "private_names": False,
    "images": [
        {
            "globs": ["*.nii.gz"],
            "format": "nifti",
            "dimension": 3,
            "path": r"(?P<name>[^/.]+)\.nii\.gz",
            "key": "{name}",
            "modality": "CT",
        },
        {
            "globs": ["*.png"],
            "format": "raster",
            "dimension": 2,
            "path": r"(?P<name>[^/.]+)\.png",
            "key": "{name}",
            "modality": "XR",
        },
        {
            "globs": ["broken*.dcm/"],
            "format": "dicom",
            "dimension": 3,
            "path": r"(?P<name>[^/.]+)\.dcm",
            "key": "{name}",
            "modality": "MRI",
        },
    ],
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, samples: Path) -> Path:
    """Eight volumes, four pictures in a pack, and a series that fails."""
    raw = tmp_path_factory.mktemp("raw")
    (raw / "mixed").mkdir()
    for number in range(8):
        shutil.copy(samples / "CT/totalsegmentator/chest.nii.gz", raw / "mixed" / f"volume{number:02d}.nii.gz")
    for number in range(4):
        shutil.copy(samples / "US/monai/neck.png", raw / "mixed" / f"picture{number}.png")
    (raw / "mixed" / "broken.dcm").mkdir()
    (raw / "mixed" / "broken.dcm" / "1.dcm").write_bytes(bytes(1000))
    (raw / "datasets.yaml").write_text(json.dumps([DATASET]))
    return raw


def ingest(raw: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run("pumit-data", "ingest", "mixed", "--raw", raw, "--data", data, *options)


@pytest.fixture(scope="module")
def undisturbed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    data = tmp_path_factory.mktemp("undisturbed")
    result = ingest(raw, data, "--workers", "1")
    assert result.returncode == 1, "the broken series fails"
    return published_files(data)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def dask_cluster(workers: int = 2) -> Iterator[tuple[str, dict[str, list[psutil.Process]]]]:
    """A scheduler process and worker processes on loopback, as an operator starts them."""
    address = f"tcp://127.0.0.1:{free_port()}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen(
        [*start, "scheduler", "--host", address, "--no-dashboard", "--no-show"],
        **quiet,  # type: ignore[call-overload]
    )
    ones = [*start, "worker", address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
    others = [subprocess.Popen(ones, **quiet) for _ in range(workers)]  # type: ignore[call-overload]
    try:
        yield (
            address,
            {
                "scheduler": [psutil.Process(scheduler.pid)],
                "worker": [psutil.Process(nanny.pid) for nanny in others],
            },
        )
    finally:
        for process in [*others, scheduler]:
            kill_with_children(psutil.Process(process.pid))
            process.wait()


def kill_with_children(process: psutil.Process) -> None:
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


class Reader:
    """Reads the catalog all the time, as a user beside an ingest may."""

    def __init__(self, data: Path) -> None:
        self.reads = 0
        self.faults: list[str] = []
        self._corpus = Corpus(data)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._ended.is_set():
            time.sleep(0.005)
            try:
                content = self._corpus.catalog_file("mixed").read_bytes()
            except FileNotFoundError:
                continue
            try:
                table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
                keys = table["key"].to_pylist()
                assert keys == sorted(set(keys))
                for shard in set(table["shard_path"].to_pylist()) - {None}:
                    assert (self._corpus.shards / shard / "zarr.json").is_file(), shard
                self.reads += 1
            except Exception as error:
                self.faults.append(repr(error))


def kill_at_random(raw: Path, data: Path, victim: Victim, chance: random.Random) -> None:
    """One ingest of which a process is killed; on a cluster of its own, or on one started beside it."""
    if victim == "driver":
        driver = subprocess.Popen(
            command("pumit-data", "ingest", "mixed", "--raw", raw, "--data", data, "--workers", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_records(data, driver, chance)
        driver.kill()  # its workers live on, and have to notice
        driver.wait()
        return
    with dask_cluster() as (address, processes):
        driver = subprocess.Popen(
            command("pumit-data", "ingest", "mixed", "--raw", raw, "--data", data, "--scheduler", address),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_records(data, driver, chance)
        one = chance.choice(processes[victim])
        # Of a worker the process that computes, which its nanny starts anew.
        (one.children() or [one])[0].kill() if victim == "worker" else one.kill()
        try:
            _, errors = driver.communicate(timeout=120)
        finally:
            driver.kill()
        assert "Traceback" not in errors, errors
        if victim == "scheduler" and driver.returncode != 1:
            assert driver.returncode == 2, errors
            assert "scheduler" in errors
        elif victim == "worker":
            assert driver.returncode == 1, errors


def wait_for_records(data: Path, driver: subprocess.Popen[str], chance: random.Random) -> None:
    """Until some tasks are recorded, and a moment."""
    number = chance.randrange(0, 7)
    deadline = time.monotonic() + 60
    while driver.poll() is None and time.monotonic() < deadline:
        if recorded_tasks(data, "mixed") >= number and (data / "private/journal/mixed/tasks").is_dir():
            break
        time.sleep(0.002)
    time.sleep(chance.random() * 0.2)


def check_rerun(raw: Path, data: Path, undisturbed: dict[str, str]) -> None:
    result = ingest(raw, data, "--workers", "2")
    assert result.returncode == 1, result.stderr
    assert published_files(data) == undisturbed
    journal = data / "private" / "journal" / "mixed"
    assert not list(journal.rglob("*.parquet"))
    assert not list(data.rglob(".tmp-*"))


def kill_three(seed: int, raw: Path, data: Path, undisturbed: dict[str, str]) -> None:
    """Driver, worker and scheduler killed one after the other, in any order, before anyone repairs."""
    chance = random.Random(seed)
    victims: list[Victim] = ["driver", "worker", "scheduler"]
    chance.shuffle(victims)
    with Reader(data) as reader:
        for victim in victims:
            kill_at_random(raw, data, victim, chance)
        check_rerun(raw, data, undisturbed)
    assert not reader.faults
    assert reader.reads


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(17))
def test_killed_at_many_moments(seed: int, raw: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """51 kills in all."""
    kill_three(seed, raw, tmp_path / "data", undisturbed)


def test_a_worker_that_outlives_its_run_cannot_write(tmp_path: Path) -> None:
    journal = Journal(Corpus(tmp_path), "mixed")
    with journal.lock():
        with journal.run() as earlier:
            pass
        with journal.run():
            with pytest.raises(RunEndedError):
                journal.record(earlier, "volume-1", [], {})
            with pytest.raises(RunEndedError), journal.taking_part(earlier):
                pass
    assert not list(tmp_path.rglob("*.parquet"))


HOLD = """
import sys, time
from pathlib import Path
from catalog.corpus import Corpus
from ingest.journal import Journal
with Journal(Corpus(Path(sys.argv[1])), "mixed").taking_part(sys.argv[2]):
    print("in", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def test_a_new_run_waits_for_tasks_of_a_killed_one(tmp_path: Path) -> None:
    journal = Journal(Corpus(tmp_path), "mixed")
    (tmp_path / "private/journal/mixed/tasks/cafe").mkdir(parents=True)
    arguments = [sys.executable, "-c", HOLD, str(tmp_path), "cafe", "1"]
    checkout = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": checkout}
    ) as orphan:
        assert orphan.stdout is not None
        orphan.stdout.readline()
        with journal.lock(), journal.run():
            assert orphan.poll() is not None or orphan.wait(1) == 0, "the run began while a task was going on"
