"""Ingest into an S3-compatible store: the corpus that a folder would hold, whatever fails or is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

import cli
import ingest.lease
import ingest.run
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import load_catalog
from catalog.remote import open_corpus, whole_copy
from catalog.split import hold_out
from catalog.store import RemotePath, StoreError
from ingest.found import find_sources
from ingest.journal import Stamp
from ingest.lease import lease
from ingest.names import name_key
from ingest.outline import at_hand, raw_folder
from ingest.remote import kept_copy, working_copy
from ingest.repack import estimate_repack, repack_dataset
from ingest.run import IngestReport, ingest_dataset, plan_ingest
from ingest.verify import verify
from tests.commands import command, published_files, run
from tests.demo import DEMO, NoCluster
from tests.object_store import Fault, Proxy, download, make_folder_marker, upload

SLICES = sorted((Path(__file__).parents[2] / "samples").glob("CT/*/head/*"))


@pytest.fixture
def place(bucket: RemotePath) -> RemotePath:
    return bucket / "corpus"


def bucket_of(place: RemotePath) -> RemotePath:
    return replace(place, key="")


def ingest_to(place: RemotePath, raw: Path, limit: int | None = None) -> IngestReport:
    with working_copy(place, ["demo"], write=True) as corpus:
        plan = plan_ingest(DEMO, raw, corpus, limit=limit)
        return ingest_dataset(plan, corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on this is another machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state of another"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache of another"))


def files_in(place: RemotePath, tmp_path: Path) -> dict[str, str]:
    return published_files(download(place, tmp_path / f"downloaded {time.monotonic_ns()}"))


def sent(proxy: Proxy, part: str) -> list[str]:
    return [request.path for request in proxy.requests if request.method == "PUT" and part in request.path]


def findings(place: RemotePath) -> list[str]:
    with whole_copy(place) as corpus:
        return [f"{finding.kind} {finding.file}" for finding in verify(corpus, {"demo": DEMO}).findings]


@pytest.mark.usefixtures("in_this_process")
def test_the_store_holds_byte_for_byte_what_a_folder_would(
    local: Path, place: RemotePath, raw: Path, proxy: Proxy, tmp_path: Path
) -> None:
    report = ingest_to(place, raw)
    assert report.total == {("ingested", ""): 5}
    assert files_in(place, tmp_path) == published_files(local)
    assert findings(place) == []
    order = [request.path.rpartition("/")[2] for request in proxy.requests if request.method == "PUT"]
    first = order.index("manifest.next.sha256")
    assert order[first:][:6] == [
        "manifest.next.sha256",
        "demo.parquet",
        "previews.parquet",
        "features.parquet",
        "images.parquet",
        "manifest.sha256",
    ]
    assert order[:first].count("zarr.json") == 3
    state = tmp_path / "state"
    assert not [file for file in state.rglob("*") if file.name in ("zarr.json", "c.0.0.0.0")]

    proxy.requests.clear()
    again = ingest_to(place, raw)
    assert again.run == {}
    assert sent(proxy, "/shards/") == sent(proxy, "/catalog/") == []


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["status", "reset-upload", "stall", "reset"])
@pytest.mark.parametrize("path", ["c.0.0.0.0", "zarr.json", "images.parquet", "manifest.sha256"])
def test_an_upload_that_fails_once_is_made_again(
    local: Path, place: RemotePath, raw: Path, proxy: Proxy, tmp_path: Path, kind: Any, path: str
) -> None:
    proxy.faults.append(Fault(kind, method="PUT", path=path))
    ingest_to(place, raw)
    assert proxy.faults[0].times == 0
    assert files_in(place, tmp_path) == published_files(local)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("status", [503, 403])
@pytest.mark.parametrize("path", ["c.0.0.0.0", "previews.parquet", "images.parquet", "/manifest.sha256"])
def test_an_upload_that_keeps_failing_ends_in_one_error_and_nothing_half(
    local: Path, place: RemotePath, raw: Path, proxy: Proxy, tmp_path: Path, path: str, status: int
) -> None:
    proxy.faults.append(Fault("status", method="PUT", path=path, times=99, status=status))
    with pytest.raises((SetupError, StoreError)) as caught:
        ingest_to(place, raw)
    assert str(place) in str(caught.value)
    assert "a-secret" not in str(caught.value)
    if path != "/manifest.sha256":
        with pytest.raises(SetupError, match="no catalog"):
            load_catalog(open_corpus(place))
    else:
        assert load_catalog(open_corpus(place)).num_rows == 5
    proxy.faults.clear()
    ingest_to(place, raw)
    assert files_in(place, tmp_path) == published_files(local)
    assert findings(place) == []


@pytest.mark.usefixtures("in_this_process")
def test_another_machine_goes_on(
    local: Path,
    place: RemotePath,
    raw: Path,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ingest_to(place, raw, limit=2)
    elsewhere(monkeypatch, tmp_path)
    report = ingest_to(place, raw, limit=4)
    assert (report.sources_skipped, sum(report.run.values())) == (2, 2)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # whose copy is stale by now
    report = ingest_to(place, raw)
    assert (report.sources_skipped, sum(report.run.values())) == (4, 1)
    assert report.total == {("ingested", ""): 5}
    assert findings(place) == []


@pytest.mark.usefixtures("in_this_process")
def test_what_nobody_names_is_removed_after_the_catalog_is_there(
    place: RemotePath, raw: Path, proxy: Proxy, tmp_path: Path
) -> None:
    for name in ("zarr.json", "c.0.0.0.0"):
        (place / "shards/demo/left-0123456789ab.zarr" / name).write(b"left by a killed run")
    (place / "shards/other/kept-0123456789ab.zarr/zarr.json").write(b"of another dataset")
    ingest_to(place, raw)
    assert not (place / "shards/demo/left-0123456789ab.zarr").exists()
    assert (place / "shards/other/kept-0123456789ab.zarr").exists()
    named = {row["shard_path"] for row in load_catalog(open_corpus(place)).to_pylist()}
    assert {f"demo/{path.name}" for path in (place / "shards/demo").iterdir()} == named


@pytest.mark.usefixtures("in_this_process")
def test_a_deleted_or_damaged_array_is_made_anew(
    local: Path, place: RemotePath, raw: Path, tmp_path: Path
) -> None:
    ingest_to(place, raw)
    paths = sorted({row["shard_path"] for row in load_catalog(open_corpus(place)).to_pylist()})
    for name in ("zarr.json", "c.0.0.0.0"):
        (place / "shards" / paths[0] / name).unlink()
    assert len(findings(place)) == 1
    ingest_to(place, raw)
    assert files_in(place, tmp_path) == published_files(local)


@pytest.mark.usefixtures("in_this_process")
def test_a_dry_run_writes_nothing(place: RemotePath, raw: Path, proxy: Proxy) -> None:
    ingest_to(place, raw, limit=2)
    proxy.requests.clear()
    with working_copy(place, ["demo"], write=False) as corpus:
        plan = plan_ingest(DEMO, raw, corpus)
    assert (plan.found, plan.pending) == (5, 3)
    assert {request.method for request in proxy.requests} <= {"GET", "HEAD"}


def ingest_from(source: RemotePath, place: RemotePath | Path) -> IngestReport:
    with raw_folder(source) as raw, working_copy(place, ["demo"], write=True) as corpus:
        raw.outline(DEMO)
        plan = plan_ingest(DEMO, raw.folder, corpus, origin=raw.origin)
        return ingest_dataset(plan, corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]


@pytest.fixture
def many_formats(raw: Path) -> Path:
    """A detached header and a series beside the rest."""
    voxels = np.random.default_rng(1).integers(0, 1000, (12, 20, 24)).astype(np.int16)
    for name in ("whole.mha", "parted.mhd"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels + len(name)), str(raw / "demo" / name))
    for file in SLICES:
        target = raw / "demo" / "series1" / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    return raw


@pytest.mark.usefixtures("in_this_process")
def test_raw_images_in_the_store_give_what_those_in_a_folder_give(
    many_formats: Path, bucket: RemotePath, proxy: Proxy, tmp_path: Path
) -> None:
    upload(many_formats, bucket / "raw")
    make_folder_marker(proxy.server, bucket / "raw/demo/series1")
    expected = tmp_path / "expected"
    with working_copy(expected, ["demo"], write=True) as corpus:
        plan = plan_ingest(DEMO, many_formats, corpus)
        ingest_dataset(plan, corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]
    fetched = [Fault(kind, path=r"raw/.*(large|parted|series|picture)") for kind in ("reset", "status")]
    proxy.faults += fetched
    report = ingest_from(bucket / "raw", bucket / "corpus")
    assert report.total == {("ingested", ""): 8}
    assert not any(fault.times for fault in fetched)
    assert files_in(bucket / "corpus", tmp_path) == published_files(expected)

    proxy.requests.clear()
    again = ingest_from(bucket / "raw", bucket / "corpus")
    assert again.run == {}
    assert not any(
        "/raw/demo/" in request.path for request in proxy.requests if "list-type" not in request.path
    )
    changed = bucket / "raw/demo/picture_1.png"
    changed.write((many_formats / "demo/picture_2.png").read_bytes())
    assert sum(ingest_from(bucket / "raw", bucket / "corpus").run.values()) == 1
    assert not list((tmp_path / "cache").rglob("outline-*"))


@pytest.mark.usefixtures("in_this_process")
def test_a_store_of_raw_images_that_dies_ends_the_run_and_loses_nothing(
    local: Path, raw: Path, bucket: RemotePath, proxy: Proxy, tmp_path: Path
) -> None:
    upload(raw, bucket / "raw")
    proxy.faults.append(Fault("status", path="raw/demo/small", times=99))
    with pytest.raises(SetupError, match="status 503") as caught:
        ingest_from(bucket / "raw", bucket / "corpus")
    assert f"{bucket}/raw/demo/small.nii.gz" in str(caught.value)
    proxy.faults.clear()
    ingest_from(bucket / "raw", bucket / "corpus")
    assert files_in(bucket / "corpus", tmp_path) == published_files(local)


@pytest.mark.usefixtures("in_this_process")
def test_an_image_that_vanishes_fails_alone(raw: Path, bucket: RemotePath, proxy: Proxy) -> None:
    upload(raw, bucket / "raw")
    proxy.faults.append(Fault("status", method="HEAD", path="raw/demo/small", status=404))
    report = ingest_from(bucket / "raw", bucket / "corpus")
    assert report.total == {("ingested", ""): 4, ("failed", "vanished"): 1}


@pytest.mark.usefixtures("in_this_process")
def test_overrides_beside_the_images_in_the_store(
    raw: Path, bucket: RemotePath, proxy: Proxy, tmp_path: Path
) -> None:
    upload(raw, bucket / "raw")
    before = ingest_from(bucket / "raw", bucket / "corpus").total
    files = files_in(bucket / "corpus", tmp_path / "before")
    entries = [b"- {dataset: demo, key: %s, reason: seen}\n" % key for key in (b"picture_1", b"small")]
    (bucket / "raw/overrides.yaml").write(b"".join(entries))
    proxy.requests.clear()
    report = ingest_from(bucket / "raw", bucket / "corpus")
    assert report.total[("excluded", "excluded_by_user")] == 2
    assert not any("raw/demo/small" in request.path for request in proxy.requests)
    (bucket / "raw/overrides.yaml").unlink()
    assert ingest_from(bucket / "raw", bucket / "corpus").total == before
    assert files_in(bucket / "corpus", tmp_path / "after") == files


def test_names_that_no_file_can_have(bucket: RemotePath, proxy: Proxy) -> None:
    (bucket / "raw/demo/x").write(b"1")
    (bucket / "raw/demo/x/y.png").write(b"1")
    with raw_folder(bucket / "raw") as raw, pytest.raises(SetupError, match="Rename"):
        raw.outline(DEMO)
    with raw_folder(bucket / "nothing") as raw:
        raw.outline(DEMO)
        with pytest.raises(SetupError, match="no folder demo"):
            plan_ingest(DEMO, raw.folder, Corpus(raw.folder / "none"), origin=raw.origin)


def test_tables_and_possible_copies_are_fetched_with_their_times(bucket: RemotePath, proxy: Proxy) -> None:
    for name, content in {"a.png": b"one", "b.png": b"one", "c.png": b"three"}.items():
        (bucket / "raw/demo" / name).write(content)
    with raw_folder(bucket / "raw") as raw:
        spec = DEMO.model_copy(update={"one_copy": True})
        raw.outline(spec)
        root = raw.folder / "demo"
        assert [file.read_bytes() for file in sorted(root.iterdir())] == [b"one", b"one", b"\0" * 5]
        copies = {source.key: source.exclude for source in find_sources(spec, root)}
        assert copies["a"] is None
        assert copies["b"] is not None
        stamps = {name: Stamp.of(root / name) for name in ("a.png", "c.png")}
    with raw_folder(bucket / "raw") as raw:
        raw.outline(DEMO)
        assert {name: Stamp.of(raw.folder / "demo" / name) for name in stamps} == stamps


@pytest.mark.usefixtures("in_this_process")
def test_nothing_overwrites_what_another_published_meanwhile(
    local: Path, place: RemotePath, raw: Path, tmp_path: Path, proxy: Proxy
) -> None:
    ingest_to(place, raw, limit=1)
    manifest = place / "catalog/dataset=demo/manifest.sha256"
    with ExitStack() as stack:
        corpus = stack.enter_context(working_copy(place, ["demo"], write=True))
        plan = plan_ingest(DEMO, raw, corpus)
        ingest_dataset(plan, corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]
        manifest.write(b"of somebody who took the lease while this process hung")
        before = files_in(place, tmp_path)
        with pytest.raises(SetupError, match="meanwhile"):
            stack.close()
    assert files_in(place, tmp_path) == before


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("path", ["c.0.0.0.0", "demo.parquet", "images.parquet", "/manifest.sha256"])
def test_another_machine_ends_what_one_left_half_published(
    local: Path,
    place: RemotePath,
    raw: Path,
    tmp_path: Path,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    proxy.faults.append(Fault("status", method="PUT", path=path, times=99))
    with pytest.raises((SetupError, StoreError)):
        ingest_to(place, raw)
    proxy.faults.clear()
    elsewhere(monkeypatch, tmp_path)
    ingest_to(place, raw)
    assert files_in(place, tmp_path) == published_files(local)
    assert findings(place) == []


def test_another_machine_needs_the_key_of_the_names(
    place: RemotePath, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    with working_copy(place, ["demo"], write=True) as corpus:
        key = name_key(corpus)
        hold_out(corpus, "demo", {"CT": ["one", "two"]})
    kept = kept_copy(place).private / "names.key"
    assert key.secret.hex().encode() not in (place / "private/names.sha256").read_bytes()
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(SetupError, match="another key"), working_copy(place, ["demo"], write=True) as corpus:
        name_key(corpus)
    with working_copy(place, ["demo"], write=True) as corpus:
        assert name_key(corpus, kept) == key
    with working_copy(place, ["demo"], write=False) as corpus:
        assert name_key(corpus, keep=False) == key
    assert not any(item.name.endswith(".key") for item in place.walk())


@pytest.mark.usefixtures("in_this_process")
def test_private_paths_stay_on_the_machine(place: RemotePath, raw: Path, tmp_path: Path, proxy: Proxy) -> None:
    spec = DEMO.model_copy(update={"private_names": True})
    with working_copy(place, ["demo"], write=True) as corpus:
        plan = plan_ingest(spec, raw, corpus, names=name_key(corpus))
        ingest_dataset(plan, corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]
    (bucket_of(place) / "raw/demo/small.nii.gz").write(b"x")
    proxy.faults.append(Fault("status", path="raw/demo/small", times=99))
    with raw_folder(bucket_of(place) / "raw") as outlined:
        outlined.outline(DEMO)
        source = find_sources(spec, outlined.folder / "demo", name_key(kept_copy(place)))[0]
        there = bucket_of(place) / "raw/demo"
        with pytest.raises(StoreError) as caught, at_hand(source, there):
            pass
    assert "small" not in str(caught.value)
    (bucket_of(place) / "raw/demo/small.nii.gz").unlink()
    assert b"small.nii.gz" in (kept_copy(place).private / "journal/demo/ledger.sqlite").read_bytes()
    for item in place.walk():
        assert b"small" not in (place / item.name).read_bytes(), item.name
        assert "small" not in item.name


def test_one_writer_at_a_time(
    place: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with lease(place, "demo", here) as held:
        held.check()
        for folder in (here, there):
            with pytest.raises(SetupError, match="another ingest"), lease(place, "demo", folder):
                pass
        with lease(place, "other", there):
            pass
        with pytest.raises(SetupError, match="is running"):
            verify_with_lock(place)
    with lease(place, "demo", there) as held:
        held.check()


def verify_with_lock(place: RemotePath) -> None:
    ingest.lease.refuse_writer(place, "demo")


def test_a_lease_is_renewed_and_ends_with_its_holder(
    place: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    monkeypatch.setattr(ingest.lease, "LEASE_SECONDS", 2.0)
    with lease(place, "demo", tmp_path / "here") as held:
        time.sleep(3)
        held.check()
        with pytest.raises(SetupError, match="another ingest"), lease(place, "demo", tmp_path / "there"):
            pass
        held.end()  # as if this process hung
        time.sleep(2.5)
        with lease(place, "demo", tmp_path / "there") as other:
            other.check()
            with pytest.raises(SetupError, match="not be renewed"):
                held.check()
    # Who lost it does not give back what is another's.
    with lease(place, "demo", tmp_path / "here") as held:
        held.check()


def test_a_lease_survives_answers_that_get_lost(place: RemotePath, tmp_path: Path, proxy: Proxy) -> None:
    proxy.faults.append(Fault("reset", method="PUT", path="leases"))
    with lease(place, "demo", tmp_path) as held:
        held.check()


def visible(place: RemotePath) -> set[str]:
    return {item.name for item in place.walk() if item.name.startswith(("catalog/", "splits/"))}


@pytest.mark.slow
@pytest.mark.parametrize("path", [r"c\.0\.0\.0\.0", "zarr.json", "previews.parquet", "images.parquet"])
def test_killed_while_it_sends_and_started_again(
    local: Path, place: RemotePath, raw: Path, proxy: Proxy, tmp_path: Path, path: str
) -> None:
    proxy.faults.append(Fault("stall", method="PUT", path=path))
    arguments = ["ingest", "demo", "--raw", str(raw), "--data", str(place), "--workers", "1"]
    process = subprocess.Popen(command("pumit-data", *arguments), start_new_session=True)
    for _ in range(1200):
        if not proxy.faults[0].times:
            break
        time.sleep(0.1)
    assert process.poll() is None
    other = run("pumit-data", *arguments, env={"XDG_STATE_HOME": str(tmp_path / "other")})
    assert other.returncode == cli.WRONG_CALL
    assert "another ingest" in other.stderr
    subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
    assert process.wait() == -signal.SIGKILL
    assert "catalog/dataset=demo/images.parquet" not in visible(place)
    again = run("pumit-data", *arguments)
    assert again.returncode == cli.DONE, again.stderr
    assert files_in(place, tmp_path) == published_files(local)
    assert findings(place) == []


@pytest.mark.slow
def test_from_raw_images_to_training_steps(
    place: RemotePath, proxy: Proxy, samples: Path, tmp_path: Path
) -> None:
    def pumit(name: str, *arguments: str) -> str:
        done = run(name, *arguments, "--data", str(place))
        assert done.returncode == cli.DONE, done.stderr
        return done.stdout + done.stderr

    upload(samples, place.parent / "raw/samples")
    pumit("pumit-data", "ingest", "sample", "--raw", str(place.parent / "raw"))
    assert "CT" in pumit("pumit-data", "stats")
    pumit("pumit-data", "verify", "sample", "--deep")
    settings = ("steps=3", "optim.warmup_steps=1", "data.workers=2")
    options = [part for setting in settings for part in ("--set", setting)]
    said = pumit("pumit-train", "tokenizer", "--run", str(tmp_path / "run"), *options)
    assert "3 steps" in said
    assert "a-secret" not in said


@pytest.mark.usefixtures("in_this_process")
def test_a_repack_in_a_store_gives_the_bytes_of_one_in_a_folder(
    local: Path, place: RemotePath, raw: Path, tmp_path: Path
) -> None:
    there = Corpus(Path(shutil.copytree(local, tmp_path / "there")))
    repack_dataset(there, "demo", "train", 1, lambda *_: None)
    ingest_to(place, raw)
    with working_copy(place, ["demo"], write=False) as corpus:
        expected = estimate_repack(corpus, "demo", "train")
    assert expected.pending == 3
    with working_copy(place, ["demo"], write=True) as corpus:
        report = repack_dataset(corpus, "demo", "train", 1, lambda *_: None)
    assert (report.pending, report.bytes_before) == (3, expected.bytes_before)
    assert files_in(place, tmp_path) == published_files(there.root)
    assert findings(place) == []
    assert ingest_to(place, raw).run == {}
    assert files_in(place, tmp_path) == published_files(there.root)


@pytest.mark.usefixtures("in_this_process")
def test_another_machine_follows_the_profile(
    place: RemotePath, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_to(place, raw, limit=2)
    with working_copy(place, ["demo"], write=True) as corpus:
        repack_dataset(corpus, "demo", "train", 1, lambda *_: None)
    elsewhere(monkeypatch, tmp_path)
    ingest_to(place, raw)
    paths = load_catalog(open_corpus(place))["shard_path"].to_pylist()
    assert all(path.endswith(".train.zarr") for path in paths)
