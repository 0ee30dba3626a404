"""True floats kept as they are, where the user asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

import ingest.run
from catalog.corpus import Corpus
from catalog.query import load_catalog
from ingest.outline import RawFolder
from ingest.repair import repair
from ingest.run import IngestPlan, IngestReport, ingest_dataset, plan_ingest
from ingest.task import IngestTask, TaskResult, run_task
from ingest.verify import verify
from shards.layout import SHARD_FILE
from shards.read import ShardReader
from tests.commands import published_files, run
from tests.demo import DEMO, NoCluster

SPECS = {"demo": DEMO}


def make_raw(folder: Path) -> dict[str, np.ndarray]:
    """A volume of float32, one of float64, and one of integers, which are integers either way."""
    rng = np.random.default_rng(0)
    volumes = {
        "single": rng.normal(0, 1, (20, 18, 8)).astype(np.float32),
        "double": rng.normal(0, 1, (20, 18, 8)),
        "whole": rng.integers(-1000, 1000, (20, 18, 8)).astype(np.int16),
    }
    (folder / "demo").mkdir(parents=True)
    for name, voxels in volumes.items():
        nib.Nifti1Image(voxels, np.diag([0.5, 0.5, 2.0, 1.0])).to_filename(folder / "demo" / f"{name}.nii")
    return volumes


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an ingest run here, not in worker processes."""

    def run_here(tasks: Iterator[IngestTask], client: object) -> Iterator[tuple[IngestTask, TaskResult]]:
        for task in tasks:
            yield task, run_task(task)

    monkeypatch.setattr(ingest.run, "_run_on_cluster", run_here)


def ingest_all(plans: list[IngestPlan], corpus: Corpus) -> list[IngestReport]:
    return [ingest_dataset(plan, corpus, NoCluster(), lambda *_: None) for plan in plans]  # type: ignore[arg-type]


def ingested(raw: Path, data: Path, lossless: bool | None = None) -> int:
    """Number of images that the call ingested."""
    corpus = Corpus(data)
    (report,) = ingest_all([plan_ingest(DEMO, raw, corpus, lossless=lossless)], corpus)
    return report.run["ingested", ""]


def dtypes(data: Path) -> dict[str, str]:
    table = load_catalog(Corpus(data))
    return dict(zip(table["key"].to_pylist(), table["stored_dtype"].to_pylist(), strict=True))


def test_floats_come_back_bit_by_bit_and_a_switch_ingests_again(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    volumes = make_raw(raw)
    assert ingested(raw, data) == 3
    assert set(dtypes(data).values()) == {"uint16", "int16"}
    as_steps = published_files(data)

    assert ingested(raw, data, lossless=True) == 3
    assert dtypes(data) == {"single": "float32", "double": "float64", "whole": "int16"}
    for row in load_catalog(Corpus(data)).to_pylist():
        box = ((0, row["shape_d"]), (0, row["shape_h"]), (0, row["shape_w"]))
        stored = ShardReader(Corpus(data).shards).read(
            row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], None, box
        )
        assert (row["slope"], row["intercept"]) == (1, 0)
        assert set(np.unique(stored)) <= set(np.unique(volumes[row["key"]]))
        assert stored.size > volumes[row["key"]].size / 2
    assert not verify(Corpus(data), SPECS, deep=True, workers=1).findings
    as_floats = published_files(data)

    assert ingested(raw, data) == 0, "a dataset remembers"
    assert published_files(data) == as_floats
    assert ingested(raw, data, lossless=False) == 3
    assert published_files(data) == as_steps


@pytest.mark.parametrize("lost", ["array", "catalog"])
def test_what_was_lost_comes_back_as_it_was(tmp_path: Path, lost: str) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    make_raw(raw)
    ingested(raw, data, lossless=True)
    before = published_files(data)
    if lost == "array":
        shutil.rmtree(next(data.glob("shards/demo/single-*")))
        (next(data.glob("shards/demo/double-*")) / SHARD_FILE).write_bytes(b"")
    else:
        Corpus(data).catalog_file("demo").write_bytes(b"nothing")
    corpus = Corpus(data)
    found = verify(corpus, SPECS, workers=1)
    assert found.findings
    assert repair(corpus, SPECS, RawFolder(raw), found, 1, lambda plans: ingest_all(plans, corpus)) == []
    assert published_files(data) == before


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    make_raw(raw)
    entry = DEMO.model_dump(mode="json", exclude_defaults=True) | {"private_names": False}
    (raw / "datasets.yaml").write_text(yaml.safe_dump([entry]), encoding="utf-8")
    done = run("pumit-data", "ingest", "demo", "--raw", raw, "--data", data, "--lossless", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert dtypes(data) == {"single": "float32", "double": "float64", "whole": "int16"}
