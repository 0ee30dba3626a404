"""Ingest of one dataset: plan what is left to do, hand it to Dask, merge what came back.

`discovered = ingested + excluded + failed` holds per dataset at the end of every run, also of one that was
interrupted: what was not reached has no row, and the next run finds it.

The driver holds no list that grows with the number of images: sources, what is done and packs lie in SQLite,
records are merged in a stream, and a few tasks are in flight.
"""

from __future__ import annotations

import errno
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.scratch import NameSet
from catalog.store import RemotePath, StoreError
from ingest.discover import dataset_root
from ingest.drive import run_tasks
from ingest.found import FoundSources, Group
from ingest.journal import Journal, Stamp
from ingest.ledger import as_known_error
from ingest.names import NameKey
from ingest.overrides import overrides_of
from ingest.runs import run_log
from ingest.spec import DatasetSpec
from ingest.task import IngestTask, Outcomes, TaskResult, task_name

if TYPE_CHECKING:
    from distributed import Client

    from shards.layout import Profile

_VOLUMES_AT_ONCE = 64
"""So many small volumes make one task at most, ..."""
_TASKS_OF_A_WORKER = 8
"""... and fewer where there would be less than so many tasks for each worker."""
_KEPT_MESSAGES = 1000
_MERGE_SECONDS = 300
"""A run that takes long merges so often, ..."""
_MERGE_SHARE = 0.05
"""... but spends no more than this share of its time on it."""


@dataclass(frozen=True)
class IngestPlan:
    """What a call would do: no image is read, and nothing is written to the corpus yet."""

    spec: DatasetSpec
    root: Path
    sources: FoundSources
    found: int
    """Number of all sources of the dataset."""
    selected: int
    """Of those that --only and --limit ask for."""
    pending: int
    """Of those of `selected` that no earlier run has done, or that changed since."""
    pending_bytes: int
    """Size of the pending files; one that is gone counts nothing, its task will say so."""
    arguments: tuple[str, ...]
    """The options that narrowed it down."""
    origin: RemotePath | None = None
    """Where the images lie, if `root` only outlines them."""
    lossless: bool = False
    """Keep true floats as they are."""


@dataclass
class IngestReport:
    """Counts of one run, and of the dataset after it."""

    dataset: str
    sources_found: int
    sources_skipped: int
    run: Outcomes = field(default_factory=Counter)
    total: Outcomes = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    """One line for each failed image, of the first 1,000 by key."""


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
    lossless: bool | None = None,
) -> IngestPlan:
    """Find the sources of a dataset and what is left to do.

    Args:
        only: regular expression; sources whose key matches somewhere are selected.
        limit: at most so many sources, the first by key.
        names: makes the ids of a dataset whose names are private.
        origin: where the images lie, if `raw` only outlines them.
        lossless: keep true floats as they are, or not; by default as the dataset's last ingest did.

    Raises:
        SetupError: missing or empty raw folder, bad regular expression, wrong overrides.yaml.
    """
    root = dataset_root(spec, raw)
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise SetupError(f"--only {only!r} is no regular expression: {error}.") from error
    sources = FoundSources(spec, root, names, overrides_of(spec.id, raw))
    sources.select(pattern, limit)
    options = {"--only": only, "--limit": limit}
    arguments = tuple(f"{name}={value}" for name, value in options.items() if value is not None)
    place = None if origin is None else origin / root.relative_to(raw.absolute()).as_posix()
    return replace(planned(spec, corpus, sources, arguments, lossless), origin=place)


def planned(
    spec: DatasetSpec,
    corpus: Corpus,
    sources: FoundSources,
    arguments: tuple[str, ...] = (),
    lossless: bool | None = None,
) -> IngestPlan:
    """The plan for what is selected of `sources`; `lossless` as of `plan_ingest`."""
    from ingest.image import NORMALISATION_VERSION

    journal = Journal(corpus, spec.id)
    lossless = journal.lossless if lossless is None else lossless
    sources.compare(journal, corpus, NORMALISATION_VERSION, lossless=lossless)
    return IngestPlan(
        spec=spec,
        root=sources.root,
        sources=sources,
        found=sources.found,
        selected=sources.selected,
        pending=sources.pending,
        pending_bytes=sources.pending_bytes,
        arguments=arguments,
        lossless=lossless,
    )


def ingest_dataset(plan: IngestPlan, corpus: Corpus, client: Client | None, progress: Progress) -> IngestReport:
    """Run a plan on a Dask cluster and merge the outcome into the catalog.

    What is done stays done whatever ends the run: KeyboardInterrupt and SetupError leave a valid catalog with
    all completed tasks, and the same call continues.

    Args:
        client: may be None when the plan has nothing pending.
        progress: told after every task.

    Raises:
        SetupError: the corpus cannot be written, another ingest of the dataset is running, or the scheduler
            is gone.
    """
    from catalog.index import write_index
    from catalog.manifest import settle
    from catalog.split import hold_out
    from ingest.image import NORMALISATION_VERSION
    from shards.layout import PACK_SIZE
    from shards.write import remove_leftovers

    dataset, sources = plan.spec.id, plan.sources
    corpus = replace(corpus, root=corpus.root.absolute())  # workers may have been started elsewhere
    journal = Journal(corpus, dataset)
    with (
        explained(dataset, corpus),
        journal.lock(),
        run_log(corpus, dataset, plan.arguments, workers=_workers(client), pending=plan.pending) as log,
    ):
        settle(corpus, dataset)
        with journal.run() as run:
            remove_leftovers(corpus.shards_folder, dataset)
            held_out = hold_out(corpus, dataset, sources.subjects())
            # Looked at again under the lock: a run that just ended, or was killed, may have done some of it.
            sources.compare(journal, corpus, NORMALISATION_VERSION, lossless=plan.lossless)
            sources.assign_packs(journal, PACK_SIZE)
            sources.note_aliases(journal)
            pending = sources.pending
            at_once = min(_VOLUMES_AT_ONCE, max(1, pending // (_TASKS_OF_A_WORKER * max(1, _workers(client)))))
            report = IngestReport(dataset, plan.found, plan.selected - pending)
            if plan.lossless != journal.lossless:
                journal.choose_lossless(plan.lossless)
            profile = journal.profile
            tasks = (_task(plan, group, corpus, run, held_out, profile) for group in sources.groups(at_once))
            with _merging(journal) as merge_if_due:
                done = 0
                for task, result in _run_on_cluster(tasks, client) if client is not None else ():
                    if result.record is not None:
                        journal.record(run, task.name, *result.record)
                    done += len(task.places)
                    report.run += result.outcomes
                    log.task_done(len(task.places), result)
                    progress(done, pending, report.run)
                    merge_if_due()
        report.total, report.messages = _summary(corpus, dataset, journal)
        if corpus.origin is None:
            write_index(corpus.root)
        log.end("done", report.total)
    return report


def _task(
    plan: IngestPlan, group: Group, corpus: Corpus, run: str, held_out: frozenset[str], profile: Profile
) -> IngestTask:
    task = IngestTask(
        name=task_name(group.places[0].path) if group.pack is None else f"pack-{group.pack:05d}",
        run=run,
        dataset=plan.spec.id,
        corpus=corpus,
        root=plan.root,
        origin=plan.origin,
        kinds=group.kinds,
        places=group.places,
        validation_subjects=held_out & {place.subject for place in group.places},
        entry_hash=plan.spec.entry_hash(lossless=plan.lossless),
        profile=profile,
        lossless=plan.lossless,
    )
    if plan.origin is None:
        return task
    return replace(task, stamps={source.public_path: Stamp.if_any(source.file) for source in task.sources})


def _workers(client: Client | None) -> int:
    from ingest.cluster import threads_of

    return threads_of(client) if client is not None else 0


def _run_on_cluster(tasks: Iterator[IngestTask], client: Client) -> Iterator[tuple[IngestTask, TaskResult]]:
    from ingest.cluster import DaskPool

    pool = DaskPool(client)
    try:
        yield from run_tasks(tasks, pool)
    finally:
        pool.cancel()


@contextmanager
def _merging(journal: Journal) -> Iterator[Callable[[], None]]:
    """Merges from time to time while tasks go on, so that a run of many hours that is killed keeps its catalog.

    Yields what is to be called often; it raises what a merge raised.
    """
    with ThreadPoolExecutor(1) as thread:
        merge: Future[float] | None = None
        due = time.monotonic() + _MERGE_SECONDS

        def timed() -> float:
            start = time.monotonic()
            journal.merge()
            return time.monotonic() - start

        def merge_if_due() -> None:
            nonlocal merge, due
            if merge is not None and merge.done():
                due = time.monotonic() + max(_MERGE_SECONDS, merge.result() / _MERGE_SHARE)
                merge = None
            if merge is None and time.monotonic() >= due:
                merge = thread.submit(timed)

        yield merge_if_due


@contextmanager
def explained(dataset: str, corpus: Corpus) -> Iterator[None]:
    """Turn an OSError on the corpus into one line that says what to do."""
    try:
        try:
            yield
        except sqlite3.Error as error:
            raise as_known_error(error) from error
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
    """What the catalog now has of the dataset; arrays that it does not name are deleted."""
    from catalog.query import read_batches, remedy_of

    file = corpus.catalog_file(dataset)
    outcomes: Outcomes = Counter()
    failures: list[str] = []
    if not file.exists():
        return outcomes, failures
    referenced = NameSet()
    for table in read_batches(file, remedy_of(dataset), ["status", "reason", "message", "shard_path"]):
        statuses, reasons = table["status"].to_pylist(), table["reason"].to_pylist()
        outcomes.update(zip(statuses, (reason or "" for reason in reasons), strict=True))
        if "failed" in statuses and len(failures) < _KEPT_MESSAGES:
            messages = zip(statuses, table["message"].to_pylist(), strict=True)
            failures += [message for status, message in messages if status == "failed"]
        referenced.add(table["shard_path"].drop_null().to_pylist())
    journal.remove_unreferenced_shards(referenced)
    return outcomes, failures[:_KEPT_MESSAGES]
