"""The Dask cluster an ingest runs on: this machine's cores, or a scheduler that is already there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from catalog.errors import SetupError

if TYPE_CHECKING:
    from distributed import Client

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    # ITK counts its own threads.
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"
}
_QUIET = {"PYTHONWARNINGS": "ignore", "OPENCV_LOG_LEVEL": "OFF"}
"""What libraries say of an odd file would tear the progress bar; its row says what became of it."""
_CONNECT_SECONDS = 20


@contextmanager
def open_client(workers: int | None = None, scheduler: str | None = None) -> Iterator[Client]:
    """Connect to a scheduler, or start worker processes on this machine.

    Args:
        workers: number of local processes; by default one per core this process may use.
        scheduler: address such as `tcp://host:8786`; its workers must see the same folders.

    Raises:
        SetupError: no scheduler answers at the address.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise SetupError(
                f"no Dask scheduler answers at {scheduler}. Start one with `dask scheduler`, or leave "
                "--scheduler out to use this machine."
            ) from error
        with client:
            yield client
        return

    settings = {
        "distributed.nanny.pre-spawn-environ": _ONE_THREAD | _QUIET,
        # The run itself tries the tasks of a worker that died again, one at a time.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": True,
    }
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers or len(os.sched_getaffinity(0)),
            threads_per_worker=1,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
