"""The log of runs, what is told from it, and the options that choose datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from catalog.corpus import Corpus
from ingest.estimate import estimate
from ingest.runs import PastRun, duration, past_runs
from tests.commands import run

OPTIONS = ("--only", "retina|neck|chest", "--workers", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, samples: Path) -> Path:
    """A corpus with a broken file: one run that failed in part, one that mended it, one that did nothing."""
    folder = tmp_path_factory.mktemp("runs")
    raw, data = folder / "raw", folder / "data"
    shutil.copytree(samples, raw / "samples")
    victim = next(iter(sorted(raw.rglob("neck.png"))))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:1000])
    for content, code in ((whole[:1000], 1), (whole, 0), (whole, 0)):
        victim.write_bytes(content) if victim.read_bytes() != content else None
        result = run("pumit-data", "ingest", "--all", "--raw", raw, "--data", data, *OPTIONS)
        assert result.returncode == code, result.stderr
        assert "Left out, no folder" in result.stderr
        assert "amos" in result.stderr
    return data


def test_runs_are_listed(data: Path) -> None:
    listed = json.loads(run("pumit-data", "runs", "--data", data, "--json").stdout)
    assert [row["state"] for row in listed] == ["done"] * 3
    assert [row["dataset"] for row in listed] == ["sample"] * 3
    first, second, third = listed
    assert first["images"]["failed"] == 1
    assert first["images"]["ingested"] > 0
    assert (second["sources"], second["images"]) == (1, {"ingested": 1})
    assert (third["sources"], third["images"], third["source_bytes"]) == (0, {}, 0)
    assert first["stored_bytes"] > 0
    assert first["command"] == ["ingest", "sample", "--only=retina|neck|chest"]
    shown = run("pumit-data", "runs", "--data", data).stdout
    assert "sample" in shown
    assert first["run"] in shown


def test_a_corpus_that_was_moved_lists_the_same(data: Path, tmp_path: Path) -> None:
    before = list(past_runs(Corpus(data)))
    shutil.copytree(data, tmp_path / "elsewhere")
    assert list(past_runs(Corpus(tmp_path / "elsewhere"))) == before


def test_a_log_names_keys_and_no_place(data: Path) -> None:
    logs = sorted((data / "private" / "runs").iterdir())
    assert {log.stat().st_mode & 0o777 for log in logs} == {0o600}
    text = "".join(log.read_text() for log in logs)
    assert str(data.parent) not in text
    events = [json.loads(line) for line in logs[0].read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "image", "end"]
    assert events[1]["status"] == "failed"
    assert events[1]["key"].endswith("neck")
    assert events[-1]["total"] == events[-1]["run"]


def test_a_log_that_is_cut_short_is_listed(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "killed")
    log = min((tmp_path / "killed/private/runs").iterdir())
    log.write_text(log.read_text().rsplit('{"event": "end"', 1)[0] + '{"event": "pro')
    first = next(past_runs(Corpus(tmp_path / "killed")))
    assert (first.state, first.sources) == ("not ended", 0)


def test_no_runs(tmp_path: Path) -> None:
    assert json.loads(run("pumit-data", "runs", "--data", tmp_path, "--json").stdout) == []
    assert "No ingest" in run("pumit-data", "runs", "--data", tmp_path).stdout


def test_ids_and_all_exclude_each_other(tmp_path: Path) -> None:
    for arguments in (["sample", "--all"], []):
        result = run("pumit-data", "ingest", *arguments, "--raw", tmp_path)
        assert result.returncode == 2
        assert "either ids" in result.stderr
    result = run("pumit-data", "ingest", "--all", "--raw", tmp_path)
    assert result.returncode == 2
    assert "no folder of any dataset" in result.stderr


def past(dataset: str, seconds: float, source_bytes: int, workers: int = 2) -> PastRun:
    return PastRun("r", dataset, "1", [], "done", "", seconds, workers, 9, {}, source_bytes, source_bytes // 2)


def test_estimates_follow_the_runs_of_the_dataset_then_of_others() -> None:
    sizes = {"nifti": 80_000_000, "raster": 20_000_000}
    from_figures = estimate("amos", sizes, 2, [past("amos", 59, 10)])
    assert "benchmarks" in from_figures.basis
    assert from_figures.seconds == pytest.approx((1 + 2) / 2)

    others = [past("busi", 100, 10_000_000)]
    from_others = estimate("amos", sizes, 4, others)
    assert "1 earlier run of other datasets" in from_others.basis
    assert from_others.seconds == pytest.approx(100e6 / 10e6 * 200 / 4)
    assert from_others.stored_bytes == pytest.approx(50e6)

    own = [*others, past("amos", 60, 50_000_000), past("amos", 40, 50_000_000)]
    from_own = estimate("amos", sizes, 2, own)
    assert "2 earlier runs of this dataset" in from_own.basis
    assert from_own.seconds == pytest.approx(100)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.21, 250, 7500)] == ["3.2 s", "4 min 10 s", "2 h 05 min"]
