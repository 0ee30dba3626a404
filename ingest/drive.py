"""The loop that keeps workers busy: a few tasks in flight, whatever their number in all.

It knows nothing of Dask, so that a clock and a heap can stand in for a cluster (benchmarks/scaling.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ingest.task import IngestTask, TaskResult, halves, record_lost_task


class Pool(Protocol):
    """Workers that take tasks."""

    def width(self) -> int:
        """How many tasks should be in flight now."""

    def in_flight(self) -> int:
        """How many are."""

    def submit(self, task: IngestTask) -> None: ...

    def wait(self) -> tuple[IngestTask, TaskResult | None]:
        """The next task that ends, and its result: None if the worker died over it."""


def run_tasks(tasks: Iterator[IngestTask], pool: Pool) -> Iterator[tuple[IngestTask, TaskResult]]:
    """Run all tasks, and yield each with its result as it ends.

    A worker that dies is blamed on every task that waited for it. These run again at the end, one at a time,
    and those of several images in halves, so that only the image that kills its workers is lost. It is lost
    once two workers died while it was their only one: one alone may have died of what others do on the machine.
    """
    died_over: set[str] = set()
    suspects: list[IngestTask] = []
    _fill(tasks, pool)
    while pool.in_flight():
        task, result = pool.wait()
        if result is None:
            suspects.append(task)
        else:
            yield task, result
        _fill(tasks, pool)
    suspects.sort(key=lambda task: task.name, reverse=True)
    while suspects:
        pool.submit(suspects.pop())
        task, result = pool.wait()
        if result is not None:
            yield task, result
        elif len(task.places) > 1:
            suspects.extend(reversed(halves(task)))
        elif task.name not in died_over:
            died_over.add(task.name)
            suspects.append(task)
        else:
            yield task, record_lost_task(task)


def _fill(tasks: Iterator[IngestTask], pool: Pool) -> None:
    while pool.in_flight() < pool.width():
        task = next(tasks, None)
        if task is None:
            return
        pool.submit(task)
