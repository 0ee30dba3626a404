"""A made-up dataset in a temporary folder, ingested without worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ingest.run
from catalog.corpus import Corpus
from catalog.query import load_catalog
from ingest.run import IngestReport, ingest_dataset, plan_ingest
from ingest.spec import DatasetSpec
from ingest.task import IngestTask, run_task

_NAME = r"(?P<name>[^/.]+)(?:\.\w+)*"


def _group(image_format: str, dimension: int, *globs: str) -> dict[str, Any]:
    return {
        "globs": globs,
        "format": image_format,
        "dimension": dimension,
        "path": _NAME,
        "key": "{name}",
        "modality": "CT" if dimension == 3 else "XR",
    }


DEMO = DatasetSpec.model_validate(
    {
        "id": "demo",
        "title": "Files of a test",
        "folder": "demo",
        "images": [
            _group("nifti", 3, "*.nii", "*.nii.gz"),
            _group("itk", 3, "*.mha", "*.mhd", "*.nrrd"),
            _group("dicom", 3, "series*/"),
            _group("raster", 2, "*.png", "*.jpg", "*.tif"),
            _group("dicom", 2, "picture*/"),
        ],
        "exclusions": [{"match": "^left_out", "reason": "a copy of another image"}],
    }
)


class NoCluster:
    def nthreads(self) -> dict[str, int]:
        return {}


def ingest_demo(
    raw: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *, backwards: bool = False
) -> tuple[IngestReport, dict[str, dict[str, Any]]]:
    """Ingest `raw`/demo into `data` in this process; returns the report and the catalog's rows by key."""

    def in_this_process(tasks: Iterator[IngestTask], client: object) -> Iterator[tuple[IngestTask, Any]]:
        for task in reversed(list(tasks)) if backwards else tasks:
            yield task, run_task(task)

    monkeypatch.setattr(ingest.run, "_run_on_cluster", in_this_process)
    corpus = Corpus(data)
    report = ingest_dataset(plan_ingest(DEMO, raw, corpus), corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]
    rows = load_catalog(corpus, status=None).to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return report, by_key
