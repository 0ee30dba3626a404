"""Broken and hostile files through the command that a user types: all is told, and nothing stops the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from catalog.corpus import Corpus
from catalog.query import load_catalog
from tests.commands import command
from tests.hostile import ENTRY, GOOD, INGESTED, Hostile, make_all

MEMORY = 1 << 30
"""Bytes that no process of an ingest of small files may come to hold, whatever they announce."""
VANISHES, GROWS = "volumes/zz-vanishes.nii", "volumes/zz-grows.nii"


@dataclass(frozen=True)
class Outcome:
    """One run of the command."""

    exit_code: int
    stderr: str
    report: dict[str, Any]
    """As --json prints it."""
    rows: dict[str, list[dict[str, Any]]]
    """By source path."""
    largest_process: int
    """Bytes of resident memory."""


def ingest(raw: Path, data: Path) -> Outcome:
    """Ingest `hostile` as a user without root's rights, and watch the memory of all processes."""
    call = command(
        *("pumit-data", "ingest", "hostile", "--workers", "1", "--json"),
        *("--raw", raw, "--data", data),
        unprivileged=True,
    )
    process = subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    largest = 0
    while True:
        try:
            stdout, stderr = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            largest = max(largest, *_largest_resident(process.pid))
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in load_catalog(Corpus(data), status=None).to_pylist():
        rows.setdefault(row["source_path"], []).append(row)
    return Outcome(process.returncode, stderr, json.loads(stdout)[0], rows, largest)


def _largest_resident(session: int) -> Iterator[int]:
    """Peak resident size of each process that a session's leader started; 0 to begin with."""
    yield 0
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or os.getsid(int(folder.name)) != session:
                continue
            status = (folder / "status").read_text()
        except (OSError, ProcessLookupError):
            continue
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            yield int(found[1]) << 10


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "datasets.yaml").write_text(ENTRY)
    return folder


@pytest.fixture(scope="module")
def made(raw: Path) -> list[Hostile]:
    return make_all(raw / "hostile")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def outcome(raw: Path, made: list[Hostile], data: Path) -> Outcome:
    """A run during which, beside all that, one file vanishes and one grows."""
    vanishes, grows = (raw / "hostile" / path for path in (VANISHES, GROWS))
    vanishes.write_bytes(GOOD)
    grows.write_bytes(GOOD)
    ended = threading.Event()

    def meddle() -> None:
        # Sources are read in the order of their keys, and these two have the last.
        while not list(data.glob("private/journal/hostile/tasks/*/*.parquet")) and not ended.wait(0.002):
            pass
        vanishes.unlink()
        with grows.open("ab", buffering=0) as file:
            while not ended.wait(0.002):
                file.write(bytes(1000))

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        return ingest(raw, data)
    finally:
        ended.set()
        meddler.join()


def test_each_file_gets_its_reason(made: list[Hostile], outcome: Outcome) -> None:
    expected = {hostile.row_path or hostile.path: (hostile.code, hostile.images) for hostile in made}
    expected |= {VANISHES: ("vanished", 1), GROWS: (INGESTED, 1)}
    found = {
        path: ("/".join(sorted({row["reason"] or INGESTED for row in rows})), len(rows))
        for path, rows in outcome.rows.items()
    }
    assert found == expected


def test_codes_are_never_the_fault_of_the_program(outcome: Outcome) -> None:
    reasons = {row["reason"] for rows in outcome.rows.values() for row in rows}
    assert not reasons & {"internal", "worker_lost"}
    assert len(reasons) > 15


def test_counts_add_up(made: list[Hostile], outcome: Outcome) -> None:
    images = sum(hostile.images for hostile in made) + 2
    counts = Counter(row["status"] for rows in outcome.rows.values() for row in rows)
    total = {status: sum(reasons.values()) for status, reasons in outcome.report["total"].items()}
    assert outcome.report["sources_found"] == len(made) + 2
    assert total == counts
    assert sum(total.values()) == images
    assert outcome.exit_code == 1


def test_messages_name_the_image_and_what_to_do(raw: Path, outcome: Outcome) -> None:
    for path, rows in outcome.rows.items():
        for row in rows:
            if row["status"] == "ingested":
                continue
            message = row["message"]
            assert message.startswith(f"hostile/{row['key']} ({path})"), message
            explanation = message.removeprefix(f"hostile/{row['key']} ({path})")
            assert re.search(r"\. [A-Z][^.]+.*\.$", explanation), f"no advice: {message}"
            assert str(raw) not in message
            assert message.isprintable()


def test_a_failed_image_is_told_on_the_terminal(outcome: Outcome) -> None:
    failed = [row for rows in outcome.rows.values() for row in rows if row["status"] == "failed"]
    assert sorted(outcome.report["failures"]) == sorted(row["message"] for row in failed)
    assert "Traceback" not in outcome.stderr
    assert "Warning" not in outcome.stderr


def test_memory_is_bounded(outcome: Outcome) -> None:
    assert 0 < outcome.largest_process < MEMORY


def test_a_rerun_tries_what_failed_and_what_changed(raw: Path, data: Path, outcome: Outcome) -> None:
    (raw / "hostile" / VANISHES).write_bytes(GOOD)
    again = ingest(raw, data)
    failed = {path for path, rows in outcome.rows.items() if rows[0]["status"] == "failed"}
    assert again.report["sources_skipped"] == len(outcome.rows) - len(failed | {GROWS})
    assert again.rows[VANISHES][0]["status"] == "ingested"
    steady = outcome.rows.keys() - {VANISHES, GROWS}
    assert {path: again.rows[path] for path in steady} == {path: outcome.rows[path] for path in steady}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_flood_of_empty_files_is_counted(tmp_path: Path) -> None:
    pictures, volumes = (tmp_path / "raw" / "hostile" / folder for folder in ("pictures", "volumes"))
    for folder, number in ((pictures, 100_000), (volumes, 1_000)):
        folder.mkdir(parents=True)
        for index in range(number):
            (folder / f"{index:06d}{'.png' if folder is pictures else '.nii.gz'}").touch()
    (tmp_path / "raw" / "datasets.yaml").write_text(ENTRY.split("    - format: dicom")[0])
    found = ingest(tmp_path / "raw", tmp_path / "data")
    assert found.report["total"] == {"failed": {"unreadable": 101_000}}
    assert found.largest_process < MEMORY
