"""Spoiled files of every format: the readers end each with a row, whatever is in it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from itertools import count, islice
from pathlib import Path

import pytest

from ingest.source import Format
from tests.fuzz_readers import REPOSITORY, RESIDENT, Finding, Fuzzer, all_seeds, fuzz, ingest_case
from tests.seeds import Seed, seeds

QUICK, LONG = 300, 15_000
"""Cases. Another number is another case, so what a longer run finds is not found by a shorter one."""


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: seed.name)
def test_the_seeds_themselves_are_sound(seed: Seed, tmp_path: Path) -> None:
    assert {status for status, _ in ingest_case(seed, tmp_path)} == {"ingested"}


def findings(pool: list[Seed], first: int, number: int) -> tuple[list[Finding], Counter[str]]:
    found: list[Finding] = []
    statuses: Counter[str] = Counter()
    for finding, outcomes in fuzz(pool, islice(count(first), number)):
        found += [finding] if finding else []
        statuses.update({status: number for (status, _), number in outcomes.items()})
    return found, statuses


def test_no_spoiled_file_gets_through() -> None:
    found, statuses = findings(all_seeds(), 0, QUICK)
    assert found == []
    # Were all refused at the first look, nothing behind the headers would be tried.
    assert min(statuses[status] for status in ("ingested", "failed")) > QUICK // 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_spoiled_file_gets_through_a_longer_run(samples: Path) -> None:
    found, _ = findings(all_seeds([samples]), 10**6, LONG)
    assert found == []


REGRESSED = REPOSITORY / "tests" / "regressions"
REGRESSIONS: dict[str, tuple[Format, int, str, set[tuple[str, str]]]] = {
    # folder of tests/regressions: format, dimension, path, outcome
    "label-is-a-list": ("dicom", 3, ".", {("ingested", "")}),
    "more-axes-than-room": ("itk", 3, "case.mhd", {("failed", "unreadable")}),
    "pixels-of-4-gigabytes": ("dicom", 2, ".", {("failed", "unreadable")}),
    "element-of-4-gigabytes": ("dicom", 2, ".", {("failed", "unreadable")}),
    "big-endian-element-of-4-gigabytes": ("dicom", 3, ".", {("failed", "unreadable")}),
}
"""What longer runs have found, and what must become of it."""


def test_what_was_found_before_stays_mended() -> None:
    fuzzer = Fuzzer()
    try:
        for name, (image_format, dimension, path, expected) in REGRESSIONS.items():
            files = {file.name: file.read_bytes() for file in (REGRESSED / name).iterdir()}
            problem, outcomes = fuzzer.try_out(Seed(name, image_format, dimension, files, path))
            assert (name, problem, set(outcomes)) == (name, None, expected)
    finally:
        fuzzer.close()


def test_every_kept_file_is_tried() -> None:
    assert {folder.name for folder in REGRESSED.iterdir()} == REGRESSIONS.keys()


def misbehave(seed: Seed, folder: Path) -> Counter[tuple[str, str]]:
    """In place of an ingest: what the harness is there to find."""
    if seed.name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed.name == "error":
        raise OSError
    if seed.name == "memory":
        bytearray(RESIDENT + (64 << 20))
    return ingest_case(seed, folder)


def test_the_harness_notices_what_it_is_for() -> None:
    noticed = {
        "crash": "ends the process with -11",
        "error": "stops the run: OSError",
        "memory": "MiB",
        "none": None,
    }
    fuzzer = Fuzzer(misbehave)
    try:
        for what, expected in noticed.items():
            problem, _ = fuzzer.try_out(Seed(what, "raster", 2, {"case.png": b""}, "case.png"))
            assert (problem is None) if expected is None else (problem and expected in problem)
    finally:
        fuzzer.close()
