"""What a user sees of the command lines: help, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catalog.corpus import Corpus
from catalog.write import merge_dataset
from tests.commands import SCRIPTS, command, recorded_tasks, run

HEAVY = {"torch", "dask", "distributed", "matplotlib", "pyarrow", "zarr", "tensorstore", "SimpleITK", "cv2"}


@pytest.mark.parametrize(
    ("script", "subcommands"),
    [
        (
            "pumit-data",
            [
                "list",
                "show",
                "check",
                "plan",
                "download",
                "ingest",
                "runs",
                "stats",
                "query",
                "doctor",
                "inspect",
                "view",
                "add",
                "verify",
            ],
        ),
        ("pumit-train", ["tokenizer", "mim", "doctor"]),
    ],
)
def test_every_command_has_help(script: str, subcommands: list[str]) -> None:
    overview = run(script, "--help")
    assert overview.returncode == 0
    for name in subcommands:
        assert name in overview.stdout
        assert run(script, name, "--help").returncode == 0


@pytest.mark.parametrize("entry", ["data", "train"])
def test_help_loads_nothing_heavy(entry: str) -> None:
    code = f"import sys, cli\ntry: cli.{entry}(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(modules.stdout.split())


def test_list_names_all_datasets() -> None:
    listed = json.loads(run("pumit-data", "list", "--json").stdout)
    assert {"amos", "busi", "lidc-idri", "nih-chestxray", "sample"} <= {row["id"] for row in listed}
    assert "amos" in run("pumit-data", "list").stdout


def one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


def test_unknown_dataset_names_the_closest_first(tmp_path: Path) -> None:
    result = run("pumit-data", "ingest", "amoss", "--raw", tmp_path, "--data", tmp_path / "data")
    one_line_error(result, "amoss", "'amos'", "busi", "nih-chestxray")


def test_missing_raw_folder(tmp_path: Path) -> None:
    result = run("pumit-data", "ingest", "amos", "--raw", tmp_path / "none", "--data", tmp_path / "data")
    one_line_error(result, "--raw", str(tmp_path / "none"))
    assert not (tmp_path / "data").exists()


def test_empty_dataset_folder(tmp_path: Path) -> None:
    (tmp_path / "raw" / "amos").mkdir(parents=True)
    result = run("pumit-data", "ingest", "amos", "--raw", tmp_path / "raw", "--data", tmp_path / "data")
    one_line_error(result, "amos", "images")


def test_stats_without_a_corpus_says_what_to_type(tmp_path: Path) -> None:
    one_line_error(run("pumit-data", "stats", "--data", tmp_path / "data"), "make ingest")


def test_stats_in_every_form(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    assert (
        run(
            "pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data, "--only", "XR|retina|T2"
        ).returncode
        == 0
    )
    audit = json.loads(run("pumit-data", "stats", "--data", data, "--json").stdout)
    assert audit["totals"]["ingested"] == sum(row["images"] for row in audit["by_modality"]) > 0
    groups = json.loads(
        run("pumit-data", "stats", "--data", data, "--json", "--by", "da_level,modality").stdout
    )
    assert sum(row["images"] for row in groups) == audit["totals"]["ingested"]
    shown = run("pumit-data", "stats", "--data", data, "--plot", tmp_path / "audit.png")
    assert "fundus" in shown.stdout
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    one_line_error(run("pumit-data", "stats", "--data", data, "--by", "modalty"), "modalty", "'modality'")

    only_2d = run(
        "pumit-data", "stats", "--data", data, "--json", "--by", "modality", "--where", "dimension = 2"
    )
    assert {row["modality"] for row in json.loads(only_2d.stdout)} == {"fundus"}
    by_dataset = run("pumit-data", "stats", "--data", data, "--csv").stdout.splitlines()
    assert len(by_dataset) == 2
    assert by_dataset[0].startswith('"dataset","images","subjects"')
    assert "| **Total** |" in run("pumit-data", "stats", "--data", data, "--markdown").stdout
    by_split = run("pumit-data", "stats", "--data", data, "--markdown", "--by", "split").stdout
    assert "| train |" in by_split
    one_line_error(run("pumit-data", "stats", "--data", data, "--where", "modalty = 1"), "modalty", "modality,")
    one_line_error(run("pumit-data", "stats", "--data", data, "--csv", "--json"), "--json", "--csv")
    empty = run("pumit-data", "stats", "--data", data, "--where", "false", "--plot", tmp_path / "none.png")
    one_line_error(empty, "--plot")


def test_a_long_query_can_be_interrupted(tmp_path: Path) -> None:
    row = {"dataset": "amos", "key": "k", "subject": "s", "status": "ingested", "split": "train"}
    row |= {"source_path": "p", "entry_hash": "e", "normalisation_version": 1}
    merge_dataset(Corpus(tmp_path), "amos", [row], [])
    endless = "SELECT count(*) FROM range(1000000000000) WHERE range * 7 % 1000003 = 5"
    process = subprocess.Popen(
        command("pumit-data", "query", endless, "--data", tmp_path), stderr=subprocess.PIPE, text=True
    )
    ticks = os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        user_time = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11])
        if user_time > 3 * ticks:  # seconds: it starts within one
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert "Traceback" not in errors


def test_query_in_every_form(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    ingest = run("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data, "--only", "retina")
    assert ingest.returncode == 0
    sql = "SELECT modality, count(*) AS n, list(DISTINCT dataset) AS datasets FROM images GROUP BY ALL"
    expected = [{"modality": "fundus", "n": 2, "datasets": ["sample"]}]
    assert json.loads(run("pumit-data", "query", sql, "--data", data, "--json").stdout) == expected
    csv = run("pumit-data", "query", sql, "--data", data, "--csv").stdout
    assert csv == '"modality","n","datasets"\n"fundus",2,"[""sample""]"\n'
    assert "fundus" in run("pumit-data", "query", sql, "--data", data).stdout
    assert run("pumit-data", "query", sql, "--data", data, "--output", tmp_path / "a.json").stdout == ""
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    one_line_error(run("pumit-data", "query", "SELECT x FROM images", "--data", data), "modality, ")
    one_line_error(run("pumit-data", "query", "DROP TABLE images", "--data", data), "SELECT")
    lost = run("pumit-data", "query", sql, "--data", data, "--output", tmp_path / "none" / "a.csv")
    one_line_error(lost, "a.csv", "cannot be written")


def test_training_without_a_corpus_says_what_to_type(tmp_path: Path) -> None:
    result = run("pumit-train", "tokenizer", "--data", tmp_path / "data", "--run", tmp_path / "run")
    one_line_error(result, "make ingest")


def test_unknown_setting_names_the_closest(tmp_path: Path) -> None:
    result = run("pumit-train", "tokenizer", "--run", tmp_path, "--set", "step=3")
    one_line_error(result, "step", "'steps'")


def test_data_folder_without_write_permission(tmp_path: Path, samples: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = run(
        "pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", locked / "data", unprivileged=True
    )
    one_line_error(result, "permission", str(locked))


@pytest.mark.slow
def test_run_folder_without_write_permission(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    run("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", data, "--only", "retina|chest")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    settings = ("--data", data, "--run", locked / "run")
    result = run("pumit-train", "tokenizer", *settings, unprivileged=True)
    one_line_error(result, str(locked), "Permission denied")


def test_a_folder_that_shadows_a_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    result = run("pumit-train", "--help", env={"PYTHONPATH": str(tmp_path)})
    one_line_error(result, "training", str(tmp_path))


def test_start_in_a_folder_with_the_same_names_is_fine(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise RuntimeError('not this one')")
    assert run("pumit-train", "--help", cwd=tmp_path).returncode == 0


def test_make_ingest_without_and_with_a_wrong_dataset() -> None:
    checkout = Path(__file__).resolve().parent.parent
    if shutil.which("make") is None:
        pytest.fail("make is needed by the README's commands")
    for name, words in (("", ("amos", "busi")), ("amoss", ("'amos'", "busi"))):
        result = subprocess.run(
            ["make", "ingest", f"DATASET={name}", f"BIN={SCRIPTS}", "--assume-old=.venv/.installed"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        for word in words:
            assert word in result.stderr
        assert "Traceback" not in result.stderr


def test_interrupt_ends_with_its_own_code(tmp_path: Path, samples: Path) -> None:
    process = subprocess.Popen(
        command("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", tmp_path / "data"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not recorded_tasks(tmp_path / "data", "sample"):
        pass
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "Traceback" not in errors
    finished = run("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", tmp_path / "data")
    assert finished.returncode == 0
