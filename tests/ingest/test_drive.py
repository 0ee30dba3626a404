"""The loop that keeps workers busy, on workers that a test makes up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import ingest.drive
from catalog.corpus import Corpus
from ingest.drive import run_tasks
from ingest.source import ImageSource
from ingest.task import IngestTask, Place, TaskResult

KIND = ImageSource(
    dataset="demo",
    key="",
    subject="",
    path="",
    root=Path(),
    format="nifti",
    dimension=3,
    modality="CT",
    upstream_modality="CT",
)


def task(number: int, images: int = 1) -> IngestTask:
    places = tuple(Place(f"{number}/{image}", f"{number}/{image}", "s", 0) for image in range(images))
    return IngestTask(
        f"task-{number:03d}", "run", "demo", Corpus(Path()), Path(), (KIND,), places, frozenset(), "e"
    )


class Workers:
    """Ends tasks last in, first out; dies over those that hold a deadly image, and in numbered calls anyway."""

    def __init__(
        self,
        widths: Iterator[int],
        deadly: frozenset[str] = frozenset(),
        killed: frozenset[int] = frozenset(),
    ) -> None:
        self._widths = widths
        self._deadly = deadly
        self._killed = killed
        self._calls = count()
        self._running: list[IngestTask] = []
        self.most = 0

    def width(self) -> int:
        return next(self._widths)

    def in_flight(self) -> int:
        return len(self._running)

    def submit(self, task: IngestTask) -> None:
        self._running.append(task)
        self.most = max(self.most, len(self._running))

    def wait(self) -> tuple[IngestTask, TaskResult | None]:
        task = self._running.pop()
        if next(self._calls) in self._killed or self._deadly & {place.path for place in task.places}:
            return task, None
        return task, result(task, "ingested")


def result(task: IngestTask, status: str) -> TaskResult:
    return TaskResult(Counter({(status, ""): len(task.places)}), [], 0, 0)


def always(width: int) -> Iterator[int]:
    while True:
        yield width


def test_every_task_ends_and_few_are_in_flight() -> None:
    asked = 0

    def tasks() -> Iterator[IngestTask]:
        nonlocal asked
        for number in range(500):
            asked += 1
            yield task(number)

    workers = Workers(always(4))
    ended = []
    for one, _ in run_tasks(tasks(), workers):
        ended.append(one.name)
        assert asked <= len(ended) + 4, "tasks are made when there is room for them, not before"
    assert sorted(ended) == [task(number).name for number in range(500)]
    assert workers.most == 4


def test_workers_that_come_later_are_used() -> None:
    def growing() -> Iterator[int]:
        yield from [1] * 20
        yield from always(6)

    workers = Workers(growing())
    assert len(list(run_tasks(map(task, range(100)), workers))) == 100
    assert workers.most == 6


def test_only_the_image_that_kills_its_workers_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest.drive, "record_lost_task", lambda task: result(task, "failed"))
    workers = Workers(always(3), deadly=frozenset({"2/5", "4/0"}))
    outcomes: Counter[str] = Counter()
    for one, told in run_tasks(iter([task(number, images=8) for number in range(6)]), workers):
        for status, _ in told.outcomes:
            for place in one.places:
                outcomes[place.path] += 1
                assert status == ("failed" if place.path in {"2/5", "4/0"} else "ingested")
    assert set(outcomes.values()) == {1}
    assert len(outcomes) == 48


def test_a_worker_that_dies_of_something_else_loses_no_image() -> None:
    """As where the kernel ends one to make room for other processes: in a try of many, or in a lone one."""
    # Calls 0 to 5 are the first tries.
    for killed in ({3}, {3, 6}, {3, 4, 6, 8}):
        workers = Workers(always(1), killed=frozenset(killed))
        outcomes = [told.outcomes for _, told in run_tasks(map(task, range(6)), workers)]
        assert outcomes == 6 * [Counter({("ingested", ""): 1})]
