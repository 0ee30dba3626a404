"""How long an ingest will take, and how much disk: from earlier runs of the corpus, else from benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ingest.runs import PastRun

_BYTES_PER_SECOND = {"nifti": 80e6, "itk": 80e6, "dicom": 27e6, "raster": 10e6}
"""Bytes of files that one core takes per second (benchmarks/RESULTS.md): CT, DICOM with lossless JPEG, and
between radiographs as PNG and photographs as JPEG."""
_STORED_PER_BYTE = 1.0
"""Shards are about as large as compressed files, and less than half of uncompressed ones."""


_TELLING_SECONDS = 60
"""Earlier runs that together took less show how long workers take to start."""


@dataclass(frozen=True)
class Estimate:
    seconds: float
    stored_bytes: float
    basis: str
    """What it was told from, in words."""


def estimate(
    dataset: str, bytes_by_format: Mapping[str, int], workers: int, runs: Sequence[PastRun]
) -> Estimate:
    """Estimate the time and disk that files of so many bytes will take.

    Runs of the dataset itself count before those of others.
    """
    own = _telling([run for run in runs if run.dataset == dataset])
    pending = sum(bytes_by_format.values())
    if chosen := own or _telling(runs):
        read = sum(run.source_bytes for run in chosen)
        worker_seconds = sum(run.seconds * run.workers for run in chosen)
        stored = sum(run.stored_bytes for run in chosen)
        of = "this dataset" if own else "other datasets"
        basis = f"{len(chosen)} earlier {'run' if len(chosen) == 1 else 'runs'} of {of} in this corpus"
        return Estimate(pending * worker_seconds / read / workers, pending * stored / read, basis)
    seconds = sum(size / _BYTES_PER_SECOND[name] for name, size in bytes_by_format.items()) / workers
    return Estimate(seconds, pending * _STORED_PER_BYTE, "the figures of benchmarks/RESULTS.md")


def _telling(runs: Sequence[PastRun]) -> list[PastRun]:
    chosen = [run for run in runs if run.source_bytes and run.workers]
    return chosen if sum(run.seconds for run in chosen) >= _TELLING_SECONDS else []
