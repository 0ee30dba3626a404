"""Fuzz the readers: spoiled files, each ingested in a worker process with limits of memory and time.

    python -m tests.fuzz_readers --minutes 30 --seed 1 --findings build/fuzz

Every case is made from a number alone, so the number of a finding is all that it takes to see it again. What
counts as a finding: the worker dies or hangs, takes more memory or time than a small file may ask for, the run
would stop (an error leaves the task), or the code is `internal`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.mutations import mutated
from tests.seeds import Seed, seeds

MEMORY = 2 << 30
"""Address space in bytes that a worker may add to what it has when all readers are loaded."""
RESIDENT = 1 << 30
"""Growth of the largest resident size beyond which a case is a finding."""
CPU_SECONDS = 10.0
HANG_SECONDS = 120.0
"""Wall clock: generous, for the machine may be busy."""
_SMALL = 450_000
"""Bytes of a real file that is small enough to be a seed."""

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finding:
    """What went wrong with a case."""

    case: int
    seed: str
    what: str


def all_seeds(folders: Sequence[Path] = ()) -> list[Seed]:
    """The made-up seeds, then real small files of the folders, by path."""
    return [*seeds(), *(seed for folder in folders for seed in _real(folder))]


def _real(folder: Path) -> Iterator[Seed]:
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.stat().st_size > _SMALL:
            continue
        kind = {".nii": "nifti", ".gz": "nifti", ".dcm": "dicom", ".mha": "itk", ".nrrd": "itk"}.get(
            file.suffix
        )
        kind = kind or {".png": "raster", ".jpg": "raster", ".jpeg": "raster", ".tif": "raster"}.get(
            file.suffix
        )
        if kind is None or (kind == "dicom" and file != sorted(file.parent.glob("*.dcm"))[0]):
            continue
        dimension = 2 if kind in ("raster", "dicom") else 3
        path = "." if kind == "dicom" else file.name
        yield Seed(
            f"{folder.name}/{file.relative_to(folder)}", kind, dimension, {file.name: file.read_bytes()}, path
        )  # type: ignore[arg-type]


def spoiled(pool: Sequence[Seed], case: int) -> Seed:
    """The files of case number `case`, one of them spoiled."""
    random = np.random.default_rng(case)
    seed = pool[case % len(pool)]
    name = sorted(seed.files)[random.integers(len(seed.files))]
    return replace(seed, files=seed.files | {name: mutated(seed.files[name], name, random)})


RECORDS = Path("private", "journal", "fuzz", "tasks", "run")


def ingest_case(seed: Seed, folder: Path) -> Counter[tuple[str, str]]:
    """Run the task of one source in this process, shards and record included; what it raises stops a run."""
    from catalog.corpus import Corpus
    from ingest.source import ImageSource
    from ingest.task import IngestTask, Place, run_task

    raw, data = folder / "raw", folder / "data"
    raw.mkdir(parents=True)
    for name, content in seed.files.items():
        (raw / name).write_bytes(content)
    source = ImageSource(
        dataset="fuzz",
        key="case",
        subject="case",
        path=seed.path,
        root=raw,
        format=seed.format,
        dimension=3 if seed.dimension == 3 else 2,
        modality="CT",
        upstream_modality="CT",
    )
    (data / RECORDS).mkdir(parents=True)
    task = IngestTask(
        name="task",
        run=RECORDS.name,
        dataset=source.dataset,
        corpus=Corpus(data),
        root=raw,
        kinds=(source,),
        places=(Place(source.path, source.key, source.subject, kind=0),),
        validation_subjects=frozenset(),
        entry_hash="0" * 64,
    )
    return run_task(task).outcomes


def messages_of(folder: Path) -> list[str]:
    """Messages in the record that `ingest_case` left."""
    import pyarrow.parquet as pq

    file = folder / "data" / RECORDS / "task.parquet"
    return [message or "" for message in pq.read_table(file)["message"].to_pylist()]


Ingest = Callable[[Seed, Path], Counter[tuple[str, str]]]


def _work(pipe: Connection, ingest: Ingest) -> None:
    """Worker process: takes seeds, answers with what went wrong, or None, and the outcomes."""
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        for number, seed in enumerate(
            _one_of_each_format()
        ):  # all libraries are loaded before memory is counted
            ingest_case(seed, Path(name, str(number)))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    pipe.send(None)
    while True:
        seed = pipe.recv()
        if seed is None:
            return
        with tempfile.TemporaryDirectory() as name:
            pipe.send(_judged(seed, Path(name), ingest))


@cache
def _one_of_each_format() -> tuple[Seed, ...]:
    return tuple(seed for seed in seeds() if not seed.name.startswith("picture-tiff"))


def _judged(seed: Seed, folder: Path, ingest: Ingest) -> tuple[str | None, Counter[tuple[str, str]]]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the largest resident size
    resident, cpu = _largest_resident(), time.process_time()
    try:
        outcomes = ingest(seed, folder / "case")
    except Exception as error:
        return f"stops the run: {type(error).__name__}", Counter()
    cpu = time.process_time() - cpu
    resident = _largest_resident() - resident
    texts = messages_of(folder / "case")
    if any(reason == "internal" for _, reason in outcomes):
        return f"internal: {texts[0]}", outcomes
    if any("memory" in text for text in texts):
        return f"asks for over {MEMORY >> 30} GiB: {texts[0]}", outcomes
    if resident > RESIDENT:
        return f"takes {resident >> 20} MiB", outcomes
    if cpu > CPU_SECONDS:
        return f"takes {cpu:.0f} s", outcomes
    return None, outcomes


def _largest_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise LookupError("VmHWM")


class Fuzzer:
    """One worker process that is started anew when a case ends it."""

    def __init__(self, ingest: Ingest = ingest_case) -> None:
        self._ingest = ingest
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._pipe, far = self._context.Pipe()
        self._process: Any = self._context.Process(target=_work, args=(far, self._ingest), daemon=True)
        self._process.start()
        far.close()
        self._pipe.recv()

    def try_out(self, seed: Seed) -> tuple[str | None, Counter[tuple[str, str]]]:
        """What is wrong with the ingest of a seed's files, or None; and its outcomes."""
        try:
            self._pipe.send(seed)
            if self._pipe.poll(HANG_SECONDS):
                answer: tuple[str | None, Counter[tuple[str, str]]] = self._pipe.recv()
                return answer
            problem = "hangs"
        except (EOFError, ConnectionError):
            self._process.join()
            problem = f"ends the process with {self._process.exitcode}"
        self._process.kill()
        self._start()
        return problem, Counter()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(10)


def fuzz(
    pool: Sequence[Seed], cases: Iterator[int]
) -> Iterator[tuple[Finding | None, Counter[tuple[str, str]]]]:
    """Try out the cases one by one."""
    fuzzer = Fuzzer()
    try:
        for case in cases:
            seed = spoiled(pool, case)
            problem, outcomes = fuzzer.try_out(seed)
            yield Finding(case, seed.name, problem) if problem else None, outcomes
    finally:
        fuzzer.close()


def _until(end: float, first: int) -> Iterator[int]:
    case = first
    while time.monotonic() < end:
        yield case
        case += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="cases are numbered from seed * 1e9 on")
    parser.add_argument("--findings", type=Path, help="folder for the files of what is found")
    parser.add_argument("--real", type=Path, action="append", help="folders with real files to spoil as well")
    options = parser.parse_args()
    pool = all_seeds(options.real or [REPOSITORY / "samples"])
    cases = _until(time.monotonic() + 60 * options.minutes, options.seed * 10**9)
    tried, total, kinds = 0, Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for finding, outcomes in fuzz(pool, cases):
        tried += 1
        total += outcomes
        if finding is not None:
            kinds[finding.seed, finding.what] += 1
            print(f"case {finding.case} of {finding.seed}: {finding.what}", flush=True)
            if options.findings and kinds[finding.seed, finding.what] == 1:
                folder = options.findings / str(finding.case)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                for name, content in spoiled(pool, finding.case).files.items():
                    (folder / name).write_bytes(content)
    print(f"{tried} cases, {sum(kinds.values())} findings")
    for (status, reason), number in sorted(total.items()):
        print(f"{number:8d} {status} {reason}")


if __name__ == "__main__":
    main()
