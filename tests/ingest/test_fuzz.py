"""Spoiled files of every format: the readers end each with a row, whatever is in it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from itertools import count, islice
from pathlib import Path

import pytest

from tests.fuzz_readers import RESIDENT, Finding, Fuzzer, all_seeds, fuzz, ingest_case
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


def test_no_spoiled_file_gets_through(samples: Path) -> None:
    found, statuses = findings(all_seeds(), 0, QUICK)
    assert found == []
    # Were all refused at the first look, nothing behind the headers would be tried.
    assert min(statuses[status] for status in ("ingested", "failed")) > QUICK // 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_spoiled_file_gets_through_a_longer_run(samples: Path) -> None:
    found, _ = findings(all_seeds([samples]), 10**6, LONG)
    assert found == []


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
