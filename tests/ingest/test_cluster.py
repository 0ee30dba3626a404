"""The processes an ingest runs in."""

from __future__ import annotations

import urllib.request
from typing import Any

import pytest
from distributed.system import MEMORY_LIMIT

from catalog.errors import SetupError
from ingest.cluster import dashboard_of, open_client, workers_that_fit


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
