"""What is published depends on the files alone: same bytes in any environment, order and number of threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import pyarrow.parquet as pq
import pytest

import ingest.run
import ingest.task
from ingest.journal import Journal
from tests.commands import published_files
from tests.demo import ingest_demo

FILES = {
    # sample: its name in the demonstration dataset
    "CT/pyradiomics-lung1/chest.nrrd": "lung.nrrd",
    "MRI/nibabel/brain_fMRI.nii": "İstanbul ılık.nii",
    "MRI/datalad/brain_T1": "series T1",
    "US/pydicom-echo/heart": "picture heart",
    "XR/ml-workgroup-0957ce54/chest.png": "chest.png",
    "US/monai/neck.png": "Neck.png",
}


def copy(samples: Path, raw: Path, order: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """The samples as a dataset, written to disk in another order and at another time."""
    for sample in order(sorted(FILES)):
        source, target = samples / sample, raw / "demo" / FILES[sample]
        target.mkdir(parents=True) if source.is_dir() else target.parent.mkdir(parents=True, exist_ok=True)
        files = order(sorted(source.iterdir())) if source.is_dir() else [source]  # type: ignore[type-var]
        for file in files:
            shutil.copyfile(file, target / Path(file).name if source.is_dir() else target)
    return raw


def forwards(items: Sequence[str]) -> Sequence[str]:
    return items


def mixed(items: Sequence[str]) -> Sequence[str]:
    return [*items[1::2], *reversed(items[::2])]


@pytest.fixture
def expected(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Made in this process with one thread."""
    _, rows = ingest_demo(copy(samples, tmp_path / "raw", forwards), tmp_path / "data", monkeypatch)
    assert {row["status"] for row in rows.values()} == {"ingested"}
    assert {row["resize_factor"] < 1 for row in rows.values()} == {True, False}
    return published_files(tmp_path / "data")


def test_order_of_files_and_tasks_and_number_of_threads(
    expected: dict[str, str], samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = copy(samples, tmp_path / "elsewhere" / "raw", mixed)
    for threads in (1, 4):
        data = tmp_path / f"data-{threads}"
        monkeypatch.setattr(ingest.task, "use_one_thread", lambda threads=threads: cv2.setNumThreads(threads))
        ingest_demo(raw, data, monkeypatch, backwards=True)
        assert published_files(data) == expected
    cv2.setNumThreads(1)


def test_merging_on_the_way(
    expected: dict[str, str], samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of many hours merges from time to time; here after every task, beside the next ones."""
    merge, sizes = Journal.merge, []

    def observed(journal: Journal) -> None:
        merge(journal)
        file = journal.corpus.catalog_file(journal.dataset)
        sizes.append(pq.ParquetFile(file).metadata.num_rows if file.exists() else 0)

    monkeypatch.setattr(Journal, "merge", observed)
    monkeypatch.setattr(ingest.run, "_MERGE_SECONDS", 0)
    monkeypatch.setattr(ingest.run, "_MERGE_SHARE", 1e9)
    ingest_demo(copy(samples, tmp_path / "elsewhere" / "raw", mixed), tmp_path / "merged", monkeypatch)
    assert published_files(tmp_path / "merged") == expected
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2, "the catalog grew in steps"


def turkish(folder: Path) -> dict[str, str]:
    """A locale whose lower case of I is no i, and whose decimal point is a comma."""
    made = subprocess.run(
        ["localedef", "-i", "tr_TR", "-f", "UTF-8", folder / "tr_TR.UTF-8"], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this machine cannot make a Turkish locale")
    return {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "LOCPATH": str(folder)}


def many_threads(_: Path) -> dict[str, str]:
    names = ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "ITK_GLOBAL_DEFAULT_NUMBER_OF")
    threads = {f"{name}_THREADS": "4" for name in names}
    return threads | {"BLOSC_NTHREADS": "4", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "4711"}


def bare(_: Path) -> dict[str, str]:
    return {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


SCRIPT = """
import sys
from pathlib import Path
import pytest
from tests.demo import ingest_demo
ingest_demo(Path(sys.argv[1]), Path(sys.argv[2]), pytest.MonkeyPatch())
"""


@pytest.mark.parametrize(("environment", "umask"), [(bare, 0o022), (turkish, 0o077), (many_threads, 0o002)])
def test_environment_of_the_process(
    environment: Callable[[Path], dict[str, str]], umask: int, expected: dict[str, str], tmp_path: Path
) -> None:
    """Locale, hash seed, time zone, umask, working directory, threads of the libraries, relative paths."""
    folder = tmp_path / "somewhere" / "else"
    folder.mkdir(parents=True)
    checkout = str(Path(__file__).resolve().parents[2])
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, "../../raw", "data"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": checkout} | environment(folder),
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert published_files(folder / "data") == expected
