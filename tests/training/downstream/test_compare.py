"""Comparisons: resumed after a kill they are what they would have been; what they say of figures is right."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from catalog.errors import SetupError
from tests.commands import command
from tests.training.downstream.labelled import QUICK, write_medmnist
from tests.training.downstream.toy import write_btcv
from training.downstream.compare import cells_of, load_grid, run_grid
from training.downstream.paired import compare_paired, holm, mean_and_deviation, smallest_p
from training.downstream.report import paired_tests, rows_of, write_report


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_medmnist(tmp_path_factory.mktemp("medmnist"))


def write_grid(file: Path, files: Path, **changes: Any) -> Path:
    content = {
        "tasks": [
            {"task": "medmnist3d:nodule", "preset": "tiny", "data": str(files), "set": {**QUICK, "epochs": 2}}
        ],
        "inits": ["scratch:tiny", {"init": "scratch:tiny", "name": "wider", "set": {"size": [16, 16, 32]}}],
        "modes": ["last-1"],
        "fractions": [0.5, 1.0],
        "seeds": [0, 1, 2],
        **changes,
    }
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid that was run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    grid = load_grid(write_grid(folder / "grid.yaml", files))
    write_report(grid, run_grid(grid, folder / "out"), folder / "out")
    return folder / "out"


def figures(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as stream:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)
        ]


def test_a_killed_grid_goes_on_and_ends_with_the_same_table(whole: Path, files: Path, tmp_path: Path) -> None:
    grid, out = write_grid(tmp_path / "grid.yaml", files), tmp_path / "out"
    process = subprocess.Popen(command("pumit-train", "compare", grid, "--out", out), stderr=subprocess.DEVNULL)
    while len(list(out.rglob("result.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    assert 3 <= len(done) < 12

    wanted = load_grid(grid)
    summary = write_report(wanted, run_grid(wanted, out), out)
    assert summary["runs"] == {"done": 12, "failed": 0, "missing": 0}
    assert all(file.stat().st_mtime_ns == before for file, before in done.items())
    assert figures(out) == figures(whole)
    mine, others = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    assert mine == others


def test_the_report(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    page = (whole / "report.html").read_text()
    assert text.startswith("# Comparison: 12 of 12 runs")
    for wanted in ("50% of the labels (12 training cases)", "PUMIT (paper)", "94.3 / 88.4", "With 3 pairs"):
        assert wanted in text
        assert wanted in page
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((whole / "summary.json").read_text())
    assert len(summary["rows"]) == 4
    assert len(summary["tests"]) == 2
    one = next(
        row for row in summary["rows"] if (row["start"], row["mode"], row["fraction"]) == ("wider", "last-1", 1)
    )
    values = [
        100 * float(row["AUC"])
        for row in figures(whole)
        if (row["start"], row["mode"], row["fraction"]) == ("wider", "last-1", "1.0")
    ]
    assert one["metrics"]["AUC"]["mean"] == pytest.approx(sum(values) / 3)
    assert one["seeds"] == [0, 1, 2]


def test_a_larger_grid_takes_over_a_smaller_one_and_tells_what_cannot_run(
    whole: Path, files: Path, tmp_path: Path
) -> None:
    grid = load_grid(write_grid(tmp_path / "grid.yaml", files, modes=["last-1", "last-9"], seeds=[0, 1, 2, 3]))
    outcome = run_grid(grid, whole, run=False)
    assert (len(outcome.results), len(outcome.missing)) == (12, 20)
    small = load_grid(write_grid(tmp_path / "small.yaml", files, modes=["last-1", "last-9"], fractions=[1.0]))
    outcome = run_grid(small, tmp_path / "out")
    assert len(outcome.results) == 6
    assert {reason for _, reason in outcome.failures} == {"mode last-9: the ViT has 4 blocks"}
    summary = write_report(small, outcome, tmp_path / "out")
    assert summary["runs"] == {"done": 6, "failed": 6, "missing": 0}
    assert "the ViT has 4 blocks" in (tmp_path / "out/report.html").read_text()


def test_tests_pair_seeds_and_name_the_difference(whole: Path, files: Path, tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path / "grid.yaml", files, baseline="wider"))
    rows = rows_of(run_grid(grid, whole, run=False).results)
    for test in paired_tests(rows, grid.baseline):
        assert (test.row.name, test.baseline.name) == ("scratch:tiny", "wider")
        ours, theirs = test.row.values(test.metric), test.baseline.values(test.metric)
        assert test.paired.pairs == 3
        assert test.paired.difference == pytest.approx(sum(ours[seed] - theirs[seed] for seed in range(3)) / 3)


@pytest.mark.slow
def test_a_grid_of_classes_and_segmentation(files: Path, tmp_path: Path) -> None:
    release = write_btcv(tmp_path / "raw")
    small = {
        "images.crop": [8, 64, 64],
        "images.spacing": [3, 1.5, 1.5],
        "images.cache_dir": str(tmp_path / "cache"),
        "steps": 2,
        "optim.warmup_steps": 0,
        "batch_size": 1,
        "width": 4,
        "inference.flips": False,
    }
    segmentation = {"task": "btcv", "preset": "tiny", "data": str(release), "set": small}
    classes = {"task": "medmnist3d:nodule", "preset": "tiny", "data": str(files), "set": QUICK}
    file = write_grid(
        tmp_path / "grid.yaml",
        files,
        tasks=[classes, segmentation],
        inits=["scratch:tiny"],
        modes=["linear"],
        fractions=[1.0],
        seeds=[0],
    )
    grid = load_grid(file)
    outcome = run_grid(grid, tmp_path / "out")
    assert not outcome.failures
    summary = write_report(grid, outcome, tmp_path / "out")
    assert {row["task"]: set(row["metrics"]) for row in summary["rows"]}["medmnist3d:nodule"] == {"AUC", "ACC"}
    assert {"Dice"} <= {row["task"]: set(row["metrics"]) for row in summary["rows"]}["btcv"]
    text = (tmp_path / "out/report.md").read_text()
    assert "| PUMIT (paper) | 87.31 / 0.74 / 13.12 |" in text
    assert run_grid(grid, tmp_path / "out", run=False).results == outcome.results


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ["halves"]}, "no mode 'halves'"),
        ({"tasks": ["mnist:organ"]}, "no task 'mnist:organ'"),
        ({"tasks": [{"task": "medmnist3d:nodule", "set": {"epoch": 3}}]}, "Did you mean 'epochs'"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"fractions": [0]}, "fractions.0"),
        ({"baseline": "none"}, "baseline must be one of"),
        ({"initialisations": ["scratch"]}, "initialisations"),
        ({"tasks": ["medmnist3d:nodule"]}, "needs nodulemnist3d.npz"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    file = write_grid(tmp_path / "grid.yaml", files, **changes)
    with pytest.raises(SetupError, match=message):
        run_grid(load_grid(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_are_outermost(files: Path, tmp_path: Path) -> None:
    cells = list(cells_of(load_grid(write_grid(tmp_path / "grid.yaml", files))))
    assert [each.cell.seed for each in cells] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({each.folder for each in cells}) == 12


def test_paired_tests_against_known_values() -> None:
    # Student's sleep data (1908): t = -4.0621, p = 0.002833; Wilcoxon without zeros and ties is exact.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    sleep = compare_paired(first, second)
    assert sleep.p_t == pytest.approx(0.002833, abs=1e-6)
    assert sleep.difference == pytest.approx(-1.58)
    for pairs in (3, 5, 6):
        found = compare_paired([2.0**k for k in range(pairs)], [0.0] * pairs)
        assert found.p_wilcoxon == pytest.approx(smallest_p(pairs))
    same = compare_paired([1.0, 2.0], [1.0, 2.0])
    assert math.isnan(same.p_t)
    assert math.isnan(same.p_wilcoxon)


def test_holm_and_deviation() -> None:
    corrected = holm([0.01, math.nan, 0.04, 0.03, 0.005])
    assert corrected[0] == pytest.approx(0.03)
    assert math.isnan(corrected[1])
    assert corrected[2:] == pytest.approx([0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(mean_and_deviation([1.0])[1])
