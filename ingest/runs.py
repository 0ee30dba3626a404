"""The log of every ingest, as JSON lines in `private/runs/`: beside the catalog, for it has times.

Keys and reason codes stand in it, as in the catalog; no absolute path, no host, nothing out of a file.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from catalog.corpus import Corpus
from ingest.task import Outcomes, TaskResult

_PROGRESS_SECONDS = 60


class RunLog:
    """The log of one run while it is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = self._told = time.monotonic()
        self._sources = self._source_bytes = self._stored_bytes = 0
        self._outcomes: Outcomes = Outcomes()
        self.ended = False

    def write(self, event: str, **facts: Any) -> None:
        line = {"event": event, "seconds": round(time.monotonic() - self._start, 3)} | facts
        self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream.flush()

    def task_done(self, sources: int, result: TaskResult) -> None:
        """Note what was not ingested, and from time to time how far the run is."""
        self._sources += sources
        self._source_bytes += result.source_bytes
        self._stored_bytes += result.stored_bytes
        self._outcomes += result.outcomes
        for key, status, reason in result.unfit:
            self.write("image", key=key, status=status, reason=reason)
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self._told = time.monotonic()
            self.write("progress", **self._counts())

    def end(self, state: Literal["done", "stopped", "interrupted"], total: Outcomes | None = None) -> None:
        """Close the log: `stopped` by an error, `interrupted` by a signal."""
        after = {"total": _by_status(total)} if total is not None else {}
        self.write("end", state=state, **self._counts(), **after)
        self.ended = True

    def _counts(self) -> dict[str, Any]:
        return {
            "sources": self._sources,
            "run": _by_status(self._outcomes),
            "source_bytes": self._source_bytes,
            "stored_bytes": self._stored_bytes,
        }


@contextmanager
def run_log(corpus: Corpus, dataset: str, arguments: Sequence[str], **facts: Any) -> Iterator[RunLog]:
    """Open the log of a run. What leaves the block before `end` was called is noted as its end."""
    folder = runs_folder(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    file = folder / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}.jsonl"
    with file.open("x", encoding="utf-8") as stream:
        file.chmod(0o600)
        log = RunLog(stream)
        started = now.isoformat(timespec="seconds")
        command = ["ingest", dataset, *arguments]
        log.write(
            "start", time=started, version=version("pumit-data"), command=command, dataset=dataset, **facts
        )
        try:
            yield log
        except BaseException as error:
            if not log.ended:
                log.end("stopped" if isinstance(error, Exception) else "interrupted")
            raise


@dataclass(frozen=True)
class PastRun:
    """What the log of a run says."""

    run: str
    """Name of the log: when it began (UTC) and some digits."""
    dataset: str
    version: str
    command: list[str]
    state: str
    """done, stopped, interrupted; or `not ended`: it goes on, or was killed."""
    started: str
    seconds: float
    workers: int
    sources: int
    """Files and series read."""
    images: Mapping[str, int]
    """Of this run, by status."""
    source_bytes: int
    stored_bytes: int


def runs_folder(corpus: Corpus) -> Path:
    return corpus.private / "runs"


def past_runs(corpus: Corpus) -> Iterator[PastRun]:
    """All runs of a corpus, the oldest first; a log that is cut short tells what it has."""
    for file in sorted(runs_folder(corpus).glob("*.jsonl")):
        start: dict[str, Any] = {}
        last: dict[str, Any] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                break
            if event["event"] == "start":
                start = event
            elif event["event"] != "image":
                last = event
        if start:
            yield PastRun(
                run=file.stem,
                dataset=start["dataset"],
                version=start["version"],
                command=start["command"],
                state=last.get("state", "not ended"),
                started=start["time"],
                seconds=last.get("seconds", 0.0),
                workers=start["workers"],
                sources=last.get("sources", 0),
                images=last.get("run", {}),
                source_bytes=last.get("source_bytes", 0),
                stored_bytes=last.get("stored_bytes", 0),
            )


def render(runs: Sequence[PastRun], console: Console) -> None:
    """Print past runs as a table."""
    columns = ("run", "dataset", "version", "state", "ingested", "excluded", "failed", "read", "time")
    table = Table(*columns, title="Runs", title_justify="left")
    for run in runs:
        images = (str(run.images.get(status, 0)) for status in ("ingested", "excluded", "failed"))
        table.add_row(
            run.run,
            run.dataset,
            run.version,
            run.state,
            *images,
            decimal(run.source_bytes),
            duration(run.seconds),
        )
    console.print(table)


def duration(seconds: float) -> str:
    """Such as 3.2 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    return f"{hours} h {minutes_of_hour:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _by_status(outcomes: Outcomes) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (status, _), number in sorted(outcomes.items()):
        counts[status] = counts.get(status, 0) + number
    return counts
