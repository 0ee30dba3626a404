"""The processes an ingest runs in."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import SetupError
from ingest.cluster import open_client


def test_workers_have_one_thread_each() -> None:
    """Cores are shared out as processes; threads of the libraries would only fight for them."""

    def threads() -> dict[str, Any]:  # sent by value: workers do not know the tests
        import os

        import cv2
        import SimpleITK

        from ingest.task import _use_one_thread

        _use_one_thread()  # as every task begins
        return {
            "opencv": cv2.getNumThreads(),
            "itk": SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads(),
            "environment": {os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")},
        }

    with open_client(workers=2) as client:
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
