"""The processes an ingest runs in."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from typing import Any

import pytest
from distributed import Client
from distributed.system import MEMORY_LIMIT

from catalog.errors import SetupError
from ingest.cluster import DaskPool, dashboard_of, open_client, workers_that_fit
from ingest.task import IngestTask


def test_workers_have_one_thread_each() -> None:
    """Cores are shared out as processes; threads of the libraries would only fight for them."""

    def threads() -> dict[str, Any]:  # sent by value: workers do not know the tests
        import os

        import cv2
        import SimpleITK

        from ingest.task import use_one_thread

        use_one_thread()  # as every task begins
        return {
            "opencv": cv2.getNumThreads(),
            "itk": SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads(),
            "environment": {os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")},
        }

    with open_client(workers=2) as client:
        link = dashboard_of(client)
        assert link is None or urllib.request.urlopen(link).status == 200
        assert set(client.nthreads().values()) == {1}
        found = client.run(threads)
    assert len(found) == 2
    for worker in found.values():
        assert worker == {"opencv": 1, "itk": 1, "environment": {"1"}}


def test_no_scheduler_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.cluster._CONNECT_SECONDS", 0.2)
    with (
        pytest.raises(SetupError, match="no Dask scheduler answers at"),
        open_client(scheduler="tcp://127.0.0.1:9"),
    ):
        pass


def test_workers_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask.system.CPU_COUNT", 16)
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 64 << 30)
    assert workers_that_fit(0) == 16
    assert workers_that_fit(512 << 20) == 11, (
        "1 GiB and eight times the file each, in nine tenths of the memory"
    )
    assert workers_that_fit(100 << 30) == 1
    monkeypatch.setattr("dask.system.CPU_COUNT", 2)
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 24 << 30)
    assert workers_that_fit(300_000_000) == 2


def test_fewer_workers_may_use_all_the_memory() -> None:
    with open_client(workers=1) as client:
        (worker,) = client.scheduler_info()["workers"].values()
    assert worker["memory_limit"] >= MEMORY_LIMIT - 1


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_comes_back_each_time() -> None:
    """15 seconds after a death Dask would give up a worker that just then is dead anew."""
    with open_client(workers=1) as client:
        for seconds_until_next in (14, 0):
            os.kill(_process_of_the_worker(client), signal.SIGKILL)
            time.sleep(seconds_until_next)
        time.sleep(15)
        assert client.submit(int, "7").result(timeout=60) == 7


def test_without_workers_a_run_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.cluster._NO_WORKERS_SECONDS", 0.5)
    with open_client(workers=1) as client:
        pool = DaskPool(client)
        client.retire_workers()
        pool.submit(IngestTask.__new__(IngestTask))
        with pytest.raises(SetupError, match="no worker process could be started for 0 seconds"):
            pool.wait()


def _process_of_the_worker(client: Client) -> int:
    client.wait_for_workers(1, timeout=60)
    (process,) = client.run(os.getpid).values()
    return int(process)
