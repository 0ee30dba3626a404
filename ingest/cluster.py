"""The Dask cluster an ingest runs on: this machine's cores, or a scheduler that is already there."""

from __future__ import annotations

import logging
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from catalog.errors import SetupError
from ingest.journal import Journal, RunEndedError
from ingest.task import IngestTask, TaskResult, UnseenFolderError, run_task

if TYPE_CHECKING:
    from distributed import Client, Future

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    # ITK counts its own threads.
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"
}
_QUIET = {"PYTHONWARNINGS": "ignore", "OPENCV_LOG_LEVEL": "OFF"}
"""What libraries say of an odd file would tear the progress bar; its row says what became of it."""
_CONNECT_SECONDS = 20
_DASHBOARD_SECONDS = 2
_NO_WORKERS_SECONDS = 300
"""So long tasks wait for a worker process of this machine."""
_WIDTH_SECONDS = 5
"""So often it is looked how many workers there are: on a cluster they come and go."""

_USABLE_MEMORY = 0.9
_MEMORY_OF_A_WORKER = 1 << 30
"""Bytes: imports (300 MB) and a pack's images (256 of at most 512 x 1024 x 3 or 512 x 512 x 2 bytes)."""
_EXPANSION = 8
"""Peak memory of a volume per byte of its file, at most: voxels take up to 3 bytes per byte compressed, and
peak memory is up to 2.6 times the voxels (benchmarks/RESULTS.md)."""


@contextmanager
def open_client(
    workers: int | None = None, scheduler: str | None = None, largest_bytes: int = 0
) -> Iterator[Client]:
    """Connect to a scheduler, or start worker processes on this machine.

    Args:
        workers: number of local processes; by default one per core this process may use, and fewer where the
            memory would not hold so many of the largest files.
        scheduler: address such as `tcp://host:8786`; its workers must see the same folders.
        largest_bytes: size of the largest file or series.

    Raises:
        SetupError: no scheduler answers at the address.
    """
    import dask
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    # What distributed has to say of lost connections, the run says in its own words.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
        # This long after a worker died the cluster looks whether it is back, and shuts down its nanny if it is
        # not: one that dies again shortly before would never be started again.
        "distributed.deploy.lost-worker-timeout": "365 days",
        "distributed.scheduler.no-workers-timeout": _NO_WORKERS_SECONDS,
        # A worker near its limit would wait for memory that only its tasks hold, without end. One that passes
        # it is ended by its nanny, and the task is reported.
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
    }
    number = workers or workers_that_fit(largest_bytes)
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=number,
            threads_per_worker=1,
            memory_limit=MEMORY_LIMIT // number,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def workers_that_fit(largest_bytes: int) -> int:
    """Number of worker processes for this machine: cores and memory of its control group are respected.

    Args:
        largest_bytes: size of the largest file or series; every worker must be able to hold it at once.
    """
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    needed = _MEMORY_OF_A_WORKER + _EXPANSION * largest_bytes
    return max(1, min(int(CPU_COUNT), int(_USABLE_MEMORY * MEMORY_LIMIT) // needed))


def dashboard_of(client: Client) -> str | None:
    """Address of the cluster's dashboard, if it answers there: it needs bokeh, which few have."""
    link = client.dashboard_link
    try:
        with urllib.request.urlopen(link, timeout=_DASHBOARD_SECONDS) as page:  # noqa: S310 - of http alone
            missing = b"Dask needs" in page.read()
    except (OSError, ValueError):
        return None
    return None if missing else str(link)


class DaskPool:
    """A `Pool` of `ingest.drive` on a Dask cluster."""

    def __init__(self, client: Client) -> None:
        from distributed import as_completed

        self._client = client
        self._completed = as_completed()
        self._running: dict[Future, IngestTask] = {}
        self._width = 0
        self._width_known = float(-_WIDTH_SECONDS)

    def width(self) -> int:
        """Two tasks for each thread of a worker: one runs, one waits."""
        if time.monotonic() - self._width_known >= _WIDTH_SECONDS:
            self._width = 2 * max(1, threads_of(self._client))
            self._width_known = time.monotonic()
        return self._width

    def in_flight(self) -> int:
        return len(self._running)

    def submit(self, task: IngestTask) -> None:
        future = _asked(self._client, self._client.submit, run_task, task, pure=False)
        self._running[future] = task
        self._completed.add(future)

    def wait(self) -> tuple[IngestTask, TaskResult | None]:
        """As `Pool.wait`.

        Raises:
            SetupError: the scheduler is gone, or has no workers, or they cannot do such tasks.
            OSError: the corpus cannot be written.
        """
        from distributed import CancelledError, KilledWorker
        from distributed.comm import CommClosedError
        from distributed.scheduler import NoValidWorkerError, NoWorkerError

        future = next(self._completed)
        task = self._running.pop(future)
        try:
            return task, future.result()
        except KilledWorker:
            return task, None
        except (NoWorkerError, NoValidWorkerError) as error:
            raise SetupError(
                f"no worker process could be started for {error.timeout:.0f} seconds. The machine may lack "
                "memory, or have too many processes. What was done before is kept: repeat the command, and it "
                "goes on."
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise _lost() from error
        except RunEndedError as error:
            Journal(task.corpus, task.dataset).check_open(task.run)
            raise SetupError(
                f"a worker of {self._client.scheduler.address} does not see {task.corpus.root}. The corpus and "
                "the raw folder must lie at the same paths on all machines."
            ) from error
        except UnseenFolderError as error:
            raise SetupError(
                f"a worker of {self._client.scheduler.address} does not see {task.root}. The raw folder must "
                "lie at the same path on all machines, or be the URL of a store."
            ) from error
        except (ImportError, AttributeError) as error:
            raise SetupError(
                f"a worker of {self._client.scheduler.address} cannot run this program ({error}). Install the "
                "same version of pumit-data on all machines."
            ) from error

    def cancel(self) -> None:
        """Give up what is in flight. Where the scheduler is gone, so are its tasks."""
        with suppress(SetupError):
            _asked(self._client, self._client.cancel, list(self._running))


def threads_of(client: Client) -> int:
    """Number of threads of all workers. SetupError if the scheduler is gone."""
    return sum(_asked(client, client.nthreads).values())


def _asked(client: Client, question: Any, *arguments: Any, **options: Any) -> Any:
    from distributed.comm import CommClosedError

    try:
        return question(*arguments, **options)
    except CommClosedError as error:  # the client may not have noticed yet
        raise _lost() from error
    except Exception as error:
        if client.status == "running":
            raise
        raise _lost() from error


def _lost() -> SetupError:
    return SetupError(
        "the connection to the Dask scheduler broke. What was done before is kept: once the scheduler is there "
        "again, repeat the command, and it goes on."
    )
