"""A whole ingest: counts add up, reruns do nothing, bytes do not depend on how the run went."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from catalog.corpus import Corpus
from catalog.query import load_catalog
from ingest.journal import Journal
from shards.read import ShardReader
from tests.commands import command, published_files, recorded_tasks, run


def ingest(raw: Path, data: Path, *options: str) -> dict[str, Any]:
    """Ingest the samples; returns the report of the run."""
    result = run("pumit-data", "ingest", "sample", "--raw", raw, "--data", data, "--json", *options)
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout)[0] | {"exit_code": result.returncode}


def number(outcomes: dict[str, dict[str, int]], *statuses: str) -> int:
    return sum(
        sum(reasons.values()) for status, reasons in outcomes.items() if not statuses or status in statuses
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the shipped samples, made with one worker."""
    checkout = Path(__file__).resolve().parents[2]
    data = tmp_path_factory.mktemp("prepared")
    report = ingest(checkout, data, "--workers", "1")
    assert report["exit_code"] == 0
    return data


def rows(data: Path, status: str | None = None) -> pa.Table:
    return load_catalog(Corpus(data), status=status)


def test_every_image_has_a_row_and_its_voxels(prepared: Path) -> None:
    table = rows(prepared)
    assert len(table) == len(set(table["key"].to_pylist()))
    assert {"CT", "XR", "US", "fundus"} <= set(table["modality"].to_pylist())
    reader = ShardReader(Corpus(prepared).shards)
    for row in rows(prepared, "ingested").to_pylist():
        size = row["shape_d"], row["shape_h"], row["shape_w"]
        voxels = reader.read(
            row["shard_path"],
            tuple(row["shard_shape"]),
            np.dtype(row["stored_dtype"]),
            row["shard_index"],
            tuple((0, side) for side in size),
        )
        real = voxels.astype(np.float64) * row["slope"] + row["intercept"]
        assert voxels.shape == (row["shape_c"], *size)
        assert real.min() == pytest.approx(row["intensity_min"])
        assert real.max() == pytest.approx(row["intensity_max"])
        assert real.mean() == pytest.approx(row["intensity_mean"])


def test_validation_holds_whole_subjects(prepared: Path) -> None:
    by_split: dict[str, set[str]] = {"train": set(), "validation": set()}
    for row in rows(prepared).to_pylist():
        by_split[row["split"]].add(row["subject"])
    assert by_split["train"]
    assert by_split["validation"]
    assert not by_split["train"] & by_split["validation"]


def test_a_rerun_does_nothing(prepared: Path, tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    before = published_files(data)
    report = ingest(samples.parent, data)
    assert report["sources_skipped"] == report["sources_found"]
    assert number(report["run"]) == 0
    assert published_files(data) == before


def test_bytes_do_not_depend_on_the_number_of_workers(prepared: Path, tmp_path: Path, samples: Path) -> None:
    ingest(samples.parent, tmp_path / "data", "--workers", "2")
    assert published_files(tmp_path / "data") == published_files(prepared)


@pytest.mark.slow
def test_parts_first_then_the_whole(prepared: Path, tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    first = ingest(samples.parent, data, "--limit", "3")
    assert number(first["total"]) >= 3
    second = ingest(samples.parent, data, "--only", "(?i)ct")
    third = ingest(samples.parent, data)
    assert number(second["total"]) <= number(third["total"]) == len(rows(prepared))
    assert set(rows(data)["key"].to_pylist()) == set(rows(prepared)["key"].to_pylist())


@pytest.mark.parametrize("records", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 8))])
def test_killed_driver_resumes_to_the_same_bytes(
    records: int, prepared: Path, tmp_path: Path, samples: Path
) -> None:
    data = tmp_path / "data"
    driver = subprocess.Popen(
        command("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while driver.poll() is None and recorded_tasks(data, "sample") < records:
        time.sleep(0.005)
    os.killpg(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, "the driver ended before it could be killed"
    ingest(samples.parent, data)
    assert published_files(data) == published_files(prepared)


@pytest.fixture
def raw(tmp_path: Path, samples: Path) -> Path:
    """A folder with a copy of the samples that a test may spoil."""
    shutil.copytree(samples, tmp_path / "raw" / "samples")
    return tmp_path / "raw"


def test_a_broken_file_fails_alone_and_is_tried_again(prepared: Path, tmp_path: Path, raw: Path) -> None:
    data = tmp_path / "data"
    victim = next(iter(sorted((raw / "samples").rglob("*.nii.gz"))))
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    broken = ingest(raw, data)
    assert broken["exit_code"] == 1
    assert list(broken["total"]["failed"]) == ["unreadable"]
    assert victim.name in broken["failures"][0]

    victim.write_bytes(whole)
    mended = ingest(raw, data)
    assert mended["exit_code"] == 0
    assert mended["sources_skipped"] == mended["sources_found"] - 1
    assert set(rows(data)["key"].to_pylist()) == set(rows(prepared)["key"].to_pylist())


def test_an_unreadable_file_fails_alone(tmp_path: Path, raw: Path) -> None:
    victim = next(iter(sorted((raw / "samples").rglob("*.png"))))
    victim.chmod(0)
    result = run("pumit-data", "ingest", "sample", "--raw", raw, "--data", tmp_path / "data", unprivileged=True)
    assert result.returncode == 1
    assert "no_permission" in result.stdout
    assert victim.name in result.stdout
    assert "Traceback" not in result.stderr


def test_a_changed_file_replaces_its_shard(tmp_path: Path, raw: Path) -> None:
    data = tmp_path / "data"
    ingest(raw, data)
    before = {row["source_path"]: row["shard_path"] for row in rows(data, "ingested").to_pylist()}
    volumes = sorted((raw / "samples").rglob("*.nii.gz"))
    old, new = volumes[0], volumes[-1]
    old.write_bytes(new.read_bytes())
    ingest(raw, data)
    after = {row["source_path"]: row["shard_path"] for row in rows(data, "ingested").to_pylist()}
    changed = {path for path in before if before[path] != after.get(path)}
    assert changed == {old.relative_to(raw / "samples").as_posix()}
    for path in before:
        assert (data / "shards" / before[path]).exists() == (path not in changed)


@pytest.mark.slow
def test_what_was_deleted_is_written_anew(prepared: Path, tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    volume = next(row for row in rows(data).to_pylist() if row["shard_index"] is None)
    shutil.rmtree(data / "shards" / volume["shard_path"])
    report = ingest(samples.parent, data)
    assert report["sources_found"] - report["sources_skipped"] == 1
    assert published_files(data) == published_files(prepared)
    Corpus(data).catalog_file("sample").unlink()
    assert ingest(samples.parent, data)["sources_skipped"] == 0
    assert published_files(data) == published_files(prepared)


@pytest.mark.slow
def test_full_disk_is_one_line_and_what_was_written_stays(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", data], check=False).returncode
    ):
        pytest.skip("only root may mount a small file system")
    try:
        full = run("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data, "--workers", "1")
        assert full.returncode == 2
        assert "no space left" in full.stderr
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", data], check=True)
        report = ingest(samples.parent, data)
        assert report["exit_code"] == 0
        assert number(report["total"], "ingested") > 0
        assert not list(data.rglob(".tmp-*"))
    finally:
        subprocess.run(["umount", data], check=True)


def test_a_second_ingest_of_a_dataset_says_so_and_stops(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    with Journal(Corpus(data), "sample").lock():
        second = run("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data)
    assert second.returncode == 2
    assert "another ingest" in second.stderr
    assert not (data / "catalog").exists()


def test_dry_run_writes_nothing(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    result = run(
        "pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data, "--dry-run", "--json"
    )
    plan = json.loads(result.stdout)[0]
    assert plan["pending"] == plan["found"] > 0
    assert plan["pending_bytes"] > 0
    assert not data.exists()
