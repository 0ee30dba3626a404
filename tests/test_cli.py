"""What a user sees of the command lines: help, errors in one line, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import SCRIPTS, command, run

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
                "stats",
                "inspect",
                "view",
                "add",
                "verify",
            ],
        ),
        ("pumit-train", ["tokenizer", "mim"]),
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
    tasks = tmp_path / "data" / "private" / "journal" / "sample" / "tasks"
    while process.poll() is None and not list(tasks.glob("*.parquet")):
        pass
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "Traceback" not in errors
    finished = run("pumit-data", "ingest", "sample", "--raw", samples.parent, "--data", tmp_path / "data")
    assert finished.returncode == 0
