"""Raw images in a store: found, checked, planned and inspected by URL, and read by workers without a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

import cli
import ingest.run
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.store import RemotePath
from ingest.cluster import DaskPool, open_client
from ingest.fetched import fetched
from ingest.inspect import inspect_path
from ingest.outline import raw_folder
from ingest.remote import working_copy
from ingest.run import IngestReport, ingest_dataset, plan_ingest
from ingest.task import IngestTask, run_task
from tests.blob_server import Blobs, Web, blob_server
from tests.commands import published_files, run
from tests.demo import DEMO, NoCluster
from tests.object_store import Proxy, download, upload

NOWHERE = Path("/no/such/folder")
SLICES = sorted((Path(__file__).parents[2] / "samples").glob("CT/*/head/*"))


@pytest.fixture
def there(bucket: RemotePath, raw: Path) -> RemotePath:
    upload(raw, bucket / "raw")
    return bucket / "raw"


def from_afar(task: IngestTask) -> IngestTask:
    """The task as a machine sees it that shares no folder with the driver."""
    return replace(task, corpus=Corpus(NOWHERE, task.corpus.origin), root=NOWHERE)


def ingest_between(there: RemotePath, place: RemotePath, client: Any) -> IngestReport:
    with raw_folder(there) as outlined, working_copy(place, ["demo"], write=True) as corpus:
        outlined.outline(DEMO)
        plan = plan_ingest(DEMO, outlined.folder, corpus, origin=outlined.origin)
        return ingest_dataset(plan, corpus, client, lambda *_: None)


def test_a_worker_needs_the_store_and_no_folder_of_the_driver(
    local: Path,
    raw: Path,
    bucket: RemotePath,
    there: RemotePath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_afar(tasks: Iterator[IngestTask], client: object) -> Iterator[tuple[IngestTask, Any]]:
        for task in tasks:
            with pytest.MonkeyPatch.context() as elsewhere:
                for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
                    elsewhere.setenv(variable, str(NOWHERE))
                yield task, run_task(from_afar(task))

    monkeypatch.setattr(ingest.run, "_run_on_cluster", run_afar)
    report = ingest_between(there, bucket / "corpus", NoCluster())
    assert report.total == {("ingested", ""): 5}
    assert published_files(download(bucket / "corpus", tmp_path / "got")) == published_files(local)
    assert ingest_between(there, bucket / "corpus", NoCluster()).run == {}


@pytest.mark.slow
def test_workers_with_folders_of_their_own(
    local: Path,
    bucket: RemotePath,
    there: RemotePath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proxy: Proxy,
) -> None:
    from distributed import LocalCluster

    submit = DaskPool.submit
    monkeypatch.setattr(DaskPool, "submit", lambda pool, task: submit(pool, from_afar(task)))
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(n_workers=0, dashboard_address=":0"))
        for name in ("one", "two"):
            home = tmp_path / name
            home.mkdir()
            own = {
                "XDG_STATE_HOME": str(home / "state"),
                "XDG_CACHE_HOME": str(home / "cache"),
                "TMPDIR": str(home),
            }
            worker = subprocess.Popen(
                [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--no-nanny"],
                env=os.environ | own | {"PYTHONPATH": str(Path(__file__).parents[2])},
                cwd=home,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
        client = stack.enter_context(open_client(scheduler=cluster.scheduler_address))
        client.wait_for_workers(2, timeout=60)
        report = ingest_between(there, bucket / "corpus", client)
        ran = {address for address, _ in client.run(time.time).items()}
    assert len(ran) == 2
    assert report.total == {("ingested", ""): 5}
    assert published_files(download(bucket / "corpus", tmp_path / "got")) == published_files(local)


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_raw_folder_says_so(
    raw: Path, bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = DaskPool.submit
    monkeypatch.setattr(DaskPool, "submit", lambda pool, task: submit(pool, replace(task, root=NOWHERE)))
    with (
        open_client(workers=1) as client,
        working_copy(bucket / "corpus", ["demo"], write=True) as corpus,
        pytest.raises(SetupError, match="does not see /no/such/folder"),
    ):
        ingest_dataset(plan_ingest(DEMO, raw, corpus), corpus, client, lambda *_: None)


@pytest.mark.slow
def test_check_and_plan_by_url(raw: Path, there: RemotePath, bucket: RemotePath, tmp_path: Path) -> None:
    (there / "demo/deeper/late.png").write((raw / "demo/picture_0.png").read_bytes())
    checked = run("pumit-data", "check", "demo", "--raw", str(there), "--json")
    (told,) = json.loads(checked.stdout)
    assert (told["folder"], told["found"], told["files"]) == (f"{there}/demo", 5, 6)
    assert any("deeper" in finding["message"] for finding in told["findings"])
    assert str(tmp_path) not in checked.stdout
    planned = run("pumit-data", "plan", "demo", "--raw", str(there), "--data", str(bucket / "corpus"), "--json")
    assert planned.returncode == cli.DONE, planned.stderr
    (forecast,) = json.loads(planned.stdout)["datasets"]
    assert (forecast["state"], forecast["images"]["value"]) == ("on disk", 5)
    size = sum(file.stat().st_size for file in (raw / "demo").iterdir())
    assert forecast["raw_bytes"]["value"] == size + (raw / "demo/picture_0.png").stat().st_size
    absent = run("pumit-data", "check", "demo", "--raw", str(bucket / "elsewhere"))
    assert absent.returncode == cli.WRONG_CALL
    assert "cache" not in absent.stdout + absent.stderr


def test_an_archive_in_a_store_is_looked_into(raw: Path, there: RemotePath, tmp_path: Path) -> None:
    import zipfile

    from ingest.check import check_dataset

    archive = tmp_path / "more.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.write(raw / "demo/picture_0.png", "unseen.png")
    (there / "demo/more.zip").write(archive)
    with raw_folder(there) as outlined:
        outlined.outline(DEMO)
        found = check_dataset(DEMO, outlined.folder, outlined.origin)
    (told,) = (finding.message for finding in found.findings if finding.kind == "archive")
    assert told.startswith("more.zip is not unpacked")


def test_inspect_takes_what_belongs_to_a_file(bucket: RemotePath, tmp_path: Path) -> None:
    voxels = np.random.default_rng(1).integers(0, 1000, (12, 20, 24)).astype(np.int16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(tmp_path / "parted.mhd"))
    for name in ("parted.mhd", "parted.raw"):
        (bucket / "CT" / name).write(tmp_path / name)
    for file in SLICES:
        (bucket / "CT/series" / file.name).write(file)
    (bucket / "CT/series/deeper/other.txt").write(b"x")
    for name in ("CT/parted.mhd", f"CT/series/{SLICES[3].name}", "CT/series", "CT"):
        with fetched(bucket / name) as path:
            seen = inspect_path(path)
        assert set(seen.outcomes) == {"ingested"}, name
        assert seen.sources[0].source.modality == "CT"
    with pytest.raises(SetupError, match=f"no file or folder {bucket}/nothing"), fetched(bucket / "nothing"):
        pass
    (bucket / "words.txt").write(b"words")
    with pytest.raises(SetupError, match=f"{bucket}/words.txt is no"), fetched(bucket / "words.txt") as path:
        inspect_path(path)


def test_inspect_by_url(there: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("pumit-data", "inspect", str(there / "demo/small.nii.gz"), cwd=tmp_path)
    assert done.returncode == cli.DONE, done.stderr
    assert (tmp_path / "small-inspect.png").is_file()


def test_a_scan_on_a_web_server(tmp_path: Path) -> None:
    nib.save(
        nib.Nifti1Image(np.arange(24000, dtype=np.int16).reshape(20, 30, 40), np.eye(4)), tmp_path / "a.nii"
    )
    blobs = Blobs()
    blobs.put("/CT/a.nii", (tmp_path / "a.nii").read_bytes())
    with blob_server(Web, blobs) as port:
        place = RemotePath("http", f"127.0.0.1:{port}", "CT/a.nii")
        with fetched(place) as path:
            assert inspect_path(path).outcomes == {"ingested": 1}
        with pytest.raises(SetupError, match="name one file"), fetched(place.parent):
            pass
        with pytest.raises(SetupError, match="lists no folder"), raw_folder(place.parent):
            pass
