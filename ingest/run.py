"""Ingest of one dataset: plan what is left to do, hand it to Dask, merge what came back.

`discovered = ingested + excluded + failed` holds per dataset at the end of every run, also of one that was
interrupted: what was not reached has no row, and the next run finds it.
"""

from __future__ import annotations

import errno
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.store import RemotePath, StoreError
from ingest.discover import dataset_root, find_sources
from ingest.journal import Journal
from ingest.names import NameKey
from ingest.source import ImageSource
from ingest.spec import DatasetSpec
from ingest.task import IngestTask, halves, record_lost_task, run_task, stamp_of, task_name

if TYPE_CHECKING:
    from distributed import Client, Future

Outcomes = Counter[tuple[str, str]]
"""Number of images by (status, reason)."""


@dataclass(frozen=True)
class IngestPlan:
    """What a call would do: nothing is read or written yet."""

    spec: DatasetSpec
    root: Path
    found: list[ImageSource]
    """All sources of the dataset."""
    selected: list[ImageSource]
    """Those that --only and --limit ask for."""
    pending: list[ImageSource]
    """Those of `selected` that no earlier run has done, or that changed since."""
    origin: RemotePath | None = None
    """Where the images lie, if `root` only outlines them."""

    @property
    def pending_bytes(self) -> int:
        """Size of the pending files; one that is gone counts nothing, its task will say so."""
        return sum(max(stamp_of(source).size, 0) for source in self.pending)


@dataclass
class IngestReport:
    """Counts of one run, and of the dataset after it."""

    dataset: str
    sources_found: int
    sources_skipped: int
    run: Outcomes = field(default_factory=Counter)
    total: Outcomes = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    """One line for each failed image."""


Progress = Callable[[int, int, Outcomes], None]
"""Called with (sources done, sources to do, outcomes so far)."""


def plan_ingest(
    spec: DatasetSpec,
    raw: Path,
    corpus: Corpus,
    only: str | None = None,
    limit: int | None = None,
    names: NameKey | None = None,
    origin: RemotePath | None = None,
) -> IngestPlan:
    """Find the sources of a dataset and what is left to do.

    Args:
        only: regular expression; sources whose key matches somewhere are selected.
        limit: at most so many sources, the first by key.
        names: makes the ids of a dataset whose names are private.
        origin: where the images lie, if `raw` only outlines them.

    Raises:
        SetupError: missing or empty raw folder, bad regular expression.
    """
    root = dataset_root(spec, raw)
    found = find_sources(spec, root, names)
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise SetupError(f"--only {only!r} is no regular expression: {error}.") from error
    selected = list(islice((source for source in found if pattern.search(source.key)), limit))
    place = None if origin is None else origin / root.relative_to(raw.absolute()).as_posix()
    return IngestPlan(spec, root, found, selected, list(_pending(selected, spec, corpus)), place)


def ingest_dataset(plan: IngestPlan, corpus: Corpus, client: Client | None, progress: Progress) -> IngestReport:
    """Run a plan on a Dask cluster and merge the outcome into the catalog.

    What is done stays done whatever ends the run: KeyboardInterrupt and SetupError leave a valid catalog with
    all completed tasks, and the same call continues.

    Args:
        client: may be None when the plan has nothing pending.
        progress: told after every task.

    Raises:
        SetupError: the corpus cannot be written, or another ingest of the dataset is running.
    """
    from catalog.manifest import settle
    from catalog.split import hold_out
    from shards.write import remove_leftovers

    dataset = plan.spec.id
    journal = Journal(corpus, dataset)
    with _explained(dataset, corpus), journal.lock():
        settle(corpus, dataset)
        journal.merge()  # what a killed run left
        remove_leftovers(corpus.shards_folder, dataset)
        subjects: dict[str, set[str]] = defaultdict(set)
        for source in plan.found:
            for modality in source.modalities:
                subjects[modality].add(source.subject)
        held_out = hold_out(corpus, dataset, subjects)

        # Looked at again under the lock: a run that just ended, or was killed, may have done some of it.
        pending = list(_pending(plan.pending, plan.spec, corpus))
        tasks = _tasks(plan, pending, corpus, journal, held_out)
        report = IngestReport(dataset, len(plan.found), len(plan.selected) - len(pending))
        try:
            done = 0
            for task, outcomes in _run_on_cluster(tasks, client) if client is not None else ():
                done += len(task.sources)
                report.run += outcomes
                progress(done, len(pending), report.run)
        finally:
            journal.merge()
        report.total, report.messages = _summary(corpus, dataset, journal)
    return report


def _pending(selected: list[ImageSource], spec: DatasetSpec, corpus: Corpus) -> Iterator[ImageSource]:
    from ingest.image import NORMALISATION_VERSION

    done = Journal(corpus, spec.id).done()
    present = _present(corpus, spec.id) if done else set()
    entry_hash = spec.entry_hash()
    for source in selected:
        earlier = done.get(source.public_path)
        if (
            earlier is None
            or earlier.failed
            or earlier.entry_hash != entry_hash
            or earlier.normalisation_version != NORMALISATION_VERSION
            or earlier.stamp != stamp_of(source)
            or source.public_path not in present
        ):
            yield source


def _present(corpus: Corpus, dataset: str) -> set[str]:
    """Source paths whose rows are in the catalog and whose shards, if they have any, are on disk.

    A user may have deleted a damaged one so that ingest writes it anew.
    """
    from catalog.query import load_catalog
    from shards.check import arrays_there

    if not corpus.catalog_file(dataset).exists():
        return set()
    columns = ["source_path", "shard_path"]
    table = load_catalog(corpus, columns=columns, datasets=[dataset], status=None)
    shards = table["shard_path"].to_pylist()
    there = arrays_there(corpus.shards, dataset)
    gone = {shard for shard in set(shards) - {None} if not there(shard)}
    paths = table["source_path"].to_pylist()
    return set(paths) - {path for path, shard in zip(paths, shards, strict=True) if shard in gone}


def _tasks(
    plan: IngestPlan, pending: list[ImageSource], corpus: Corpus, journal: Journal, held_out: frozenset[str]
) -> list[IngestTask]:
    from shards.layout import PACK_SIZE

    groups: dict[str, list[ImageSource]] = defaultdict(list)
    flat = [source.public_path for source in plan.found if source.dimension == 2]
    packs = journal.packs(flat, PACK_SIZE) if flat else {}
    for source in pending:
        name = f"pack-{packs[source.public_path]:05d}" if source.dimension == 2 else task_name(source)
        groups[name].append(source)
    return [
        IngestTask(
            name=name,
            dataset=plan.spec.id,
            corpus=corpus,
            sources=tuple(sources),
            origin=plan.origin,
            validation_subjects=held_out & {source.subject for source in sources},
            entry_hash=plan.spec.entry_hash(),
        )
        for name, sources in groups.items()
    ]


def _run_on_cluster(tasks: list[IngestTask], client: Client) -> Iterator[tuple[IngestTask, Outcomes]]:
    """Keep a few tasks per worker thread in flight, so that the scheduler never holds the whole dataset.

    A worker that dies is blamed on every task that waited for it. These run again at the end, one at a time,
    and a pack in halves, so that only the image that kills its workers is lost.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    waiting = iter(tasks)
    running: dict[Future, IngestTask] = {}
    suspects: list[IngestTask] = []

    def submit(task: IngestTask) -> Future:
        future = client.submit(run_task, task, pure=False)
        running[future] = task
        return future

    width = 2 * max(1, sum(client.nthreads().values()))
    completed = as_completed([submit(task) for task in islice(waiting, width)])
    try:
        for future in completed:
            task = running.pop(future)
            try:
                outcomes = future.result()
            except KilledWorker:
                suspects.append(task)
            else:
                yield task, outcomes
            following = next(waiting, None)
            if following is not None:
                completed.add(submit(following))
        suspects.sort(key=lambda task: task.name, reverse=True)
        while suspects:
            task = suspects.pop()
            try:
                outcomes = submit(task).result()
            except KilledWorker:
                if len(task.sources) > 1:
                    suspects.extend(reversed(halves(task)))
                else:
                    yield task, record_lost_task(task)
            else:
                yield task, outcomes
    finally:
        client.cancel(list(running))


@contextmanager
def _explained(dataset: str, corpus: Corpus) -> Iterator[None]:
    """Turn an OSError on the corpus into one line that says what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or corpus.place
        if isinstance(error, StoreError):
            advice = "Repeat the command once this is mended: it goes on where it stopped."
            problem = f"{error}."
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space and repeat the command: it goes on where it stopped."
            problem = f"no space left while writing {where}. What was written before stays valid."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "Choose another folder with --data, or change its permissions."
            problem = f"no permission to write {where}."
        else:
            advice = "Repeat the command once this is mended: it goes on where it stopped."
            problem = f"cannot write {where}: {error.strerror or error}."
        raise SetupError(f"{dataset}: {problem} {advice}") from error


def _summary(corpus: Corpus, dataset: str, journal: Journal) -> tuple[Outcomes, list[str]]:
    from catalog.query import load_catalog

    columns = ["dataset", "status", "reason", "message", "shard_path"]
    if not corpus.catalog_file(dataset).exists():
        return Counter(), []
    table = load_catalog(corpus, columns=columns, datasets=[dataset], status=None)
    statuses, reasons = table["status"].to_pylist(), table["reason"].to_pylist()
    failures = [
        message
        for status, message in zip(statuses, table["message"].to_pylist(), strict=True)
        if status == "failed"
    ]
    journal.remove_unreferenced_shards(set(table["shard_path"].to_pylist()))
    outcomes = zip(statuses, (reason or "" for reason in reasons), strict=True)
    return Counter(outcomes), failures
