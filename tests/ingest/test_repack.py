"""Another codec profile: the same voxels and rows, whatever is killed, full or damaged on the way."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

import ingest.repack
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import catalog_fingerprint, load_catalog
from ingest.journal import Journal
from ingest.repack import RepackReport, estimate_repack, repack_dataset
from ingest.verify import verify
from shards.layout import METADATA_FILE, PROFILES, SHARD_FILE, Profile
from tests.commands import command, published_files, run
from tests.demo import DEMO, ingest_demo

VOLUMES, PICTURES = 3, 5


def make_raw(folder: Path, volumes: int = VOLUMES, side: int = 40) -> Path:
    """Volumes that compress by half, and pictures of two kinds."""
    rng = np.random.default_rng(0)
    demo = folder / "demo"
    demo.mkdir(parents=True)
    for number in range(volumes):
        voxels = rng.normal(0, 60, (side, side, side // 2 + number)).astype(np.int16)
        nib.Nifti1Image(voxels, np.diag([0.5, 0.5, 2.0, 1.0])).to_filename(demo / f"ct{number:03}.nii")
    for number in range(PICTURES):
        shape = (60, 50 + number, 3)[: 2 + number % 2]
        Image.fromarray(rng.integers(100, 130, shape, np.uint8)).save(demo / f"xr{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Raw folder and its corpus."""
    folder = tmp_path_factory.mktemp("made")
    make_raw(folder / "raw")
    with pytest.MonkeyPatch.context() as patch:
        ingest_demo(folder / "raw", folder / "data", patch)
    return folder / "raw", folder / "data"


@pytest.fixture
def corpus(made: tuple[Path, Path], tmp_path: Path) -> Corpus:
    """A copy that a test may change."""
    return Corpus(Path(shutil.copytree(made[1], tmp_path / "data")))


def repack(corpus: Corpus, profile: Profile) -> RepackReport:
    return repack_dataset(corpus, "demo", profile, 1, lambda *_: None)


def voxels(corpus: Corpus) -> dict[str, np.ndarray[Any, Any]]:
    """Of every image by key, read by zarr-python alone."""
    found = {}
    for row in load_catalog(corpus).to_pylist():
        array = zarr.open_array(corpus.shards_folder / row["shard_path"], mode="r")
        found[row["key"]] = array[...] if row["shard_index"] is None else array[row["shard_index"]]
    return found


def problems(corpus: Corpus) -> list[str]:
    outcome = verify(corpus, {"demo": DEMO}, deep=True, workers=1)
    return [f"{finding.kind} {finding.file}: {finding.problem}" for finding in outcome.findings]


@pytest.mark.parametrize("profile", ["train", "small"])
def test_every_voxel_stays_and_the_corpus_is_sound(corpus: Corpus, profile: Profile) -> None:
    before, fingerprint = voxels(corpus), catalog_fingerprint(corpus)
    stored = sum(load_catalog(corpus)["stored_bytes"].to_pylist())
    report = repack(corpus, profile)
    after = voxels(corpus)
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array)
    assert problems(corpus) == []
    assert catalog_fingerprint(corpus) == fingerprint, "a training could not go on"
    table = load_catalog(corpus)
    for path in set(table["shard_path"].to_pylist()):
        metadata = json.loads((corpus.shards_folder / path / METADATA_FILE).read_text())
        codec = metadata["codecs"][0]["configuration"]["codecs"][1]["configuration"]
        assert codec.items() >= PROFILES[profile].items()
    assert (report.arrays, report.pending) == (VOLUMES + 2, VOLUMES + 2)
    assert (report.bytes_before, report.bytes_after) == (stored, sum(table["stored_bytes"].to_pylist()))
    arrays = corpus.shards_folder / "demo"
    assert {f"demo/{path.name}" for path in arrays.iterdir()} == set(table["shard_path"].to_pylist())


def test_there_and_back_gives_the_bytes_that_were(corpus: Corpus) -> None:
    before = published_files(corpus.root)
    repack(corpus, "train")
    assert published_files(corpus.root) != before
    repack(corpus, "small")
    assert repack(corpus, "small").pending == 0
    repack(corpus, "fast")
    assert published_files(corpus.root) == before


def test_an_ingest_in_the_profile_gives_the_bytes_that_a_repack_does(
    made: tuple[Path, Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack(corpus, "train")
    other = Corpus(tmp_path / "other")
    Journal(other, "demo").folder.mkdir(parents=True)
    Journal(other, "demo").choose_profile("train")
    ingest_demo(made[0], other.root, monkeypatch)
    assert published_files(other.root) == published_files(corpus.root)


def test_a_later_ingest_does_nothing_again_and_follows_the_profile(
    made: tuple[Path, Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack(corpus, "train")
    before = published_files(corpus.root)
    report, _ = ingest_demo(made[0], corpus.root, monkeypatch)
    assert not report.run
    assert published_files(corpus.root) == before

    raw = Path(shutil.copytree(made[0], tmp_path / "raw"))
    shutil.copy(raw / "demo/ct000.nii", raw / "demo/new.nii")
    shutil.copy(raw / "demo/xr0.png", raw / "demo/xr1.png")  # its pack keeps a slot that no row names
    _, rows = ingest_demo(raw, corpus.root, monkeypatch)
    assert all(row["shard_path"].endswith(".train.zarr") for row in rows.values())
    assert problems(corpus) == []

    kept = voxels(corpus)
    repack(corpus, "small")
    assert problems(corpus) == []
    assert all((voxels(corpus)[key] == array).all() for key, array in kept.items())


def test_arrays_of_the_first_layout_are_taken(corpus: Corpus) -> None:
    for path in corpus.shards_folder.rglob(METADATA_FILE):
        metadata = json.loads(path.read_text())
        del metadata["attributes"]
        path.write_text(json.dumps(metadata))
    before = voxels(corpus)
    repack(corpus, "small")
    assert problems(corpus) == []
    assert all((voxels(corpus)[key] == array).all() for key, array in before.items())


@pytest.mark.parametrize("damage", ["bit", "missing", "later"])
def test_a_damaged_array_stops_it_and_is_not_carried_over(corpus: Corpus, damage: str) -> None:
    path = corpus.shards_folder / load_catalog(corpus)["shard_path"][1].as_py()
    if damage == "bit":
        content = bytearray((path / SHARD_FILE).read_bytes())
        content[len(content) // 2] ^= 1
        (path / SHARD_FILE).write_bytes(content)
    elif damage == "missing":
        shutil.rmtree(path)
    else:
        metadata = json.loads((path / METADATA_FILE).read_text())
        metadata["attributes"] = {"pumit_layout_version": 3}
        (path / METADATA_FILE).write_text(json.dumps(metadata))
    catalog = corpus.catalog_file("demo").read_bytes()
    remedy = "Install the version" if damage == "later" else "verify demo --repair"
    with pytest.raises(SetupError, match=remedy) as caught:
        repack(corpus, "train")
    assert str(path) in str(caught.value)
    assert corpus.catalog_file("demo").read_bytes() == catalog
    assert Journal(corpus, "demo").profile == "fast"


def test_a_damaged_catalog_is_refused(corpus: Corpus) -> None:
    file = corpus.catalog_file("demo")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SetupError, match="damaged"):
        repack(corpus, "train")


def test_what_was_stopped_before_publishing_is_told_and_not_done_again(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = voxels(corpus)
    with monkeypatch.context() as patch:
        patch.setattr(ingest.repack, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            repack(corpus, "train")
    assert len(problems(corpus)) == VOLUMES + 2
    assert all("repack that was stopped" in problem for problem in problems(corpus))
    assert all((voxels(corpus)[key] == array).all() for key, array in before.items())
    inodes = {path.name: path.stat().st_ino for path in (corpus.shards_folder / "demo").iterdir()}
    repack(corpus, "train")
    assert problems(corpus) == []
    assert all(path.stat().st_ino == inodes[path.name] for path in (corpus.shards_folder / "demo").iterdir())


def test_only_one_writer_at_a_time(
    corpus: Corpus, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(corpus, "demo").lock(), pytest.raises(SetupError, match="is running"):
        repack(corpus, "train")

    def meanwhile(*_: object) -> None:
        with pytest.raises(SetupError, match="is running"):
            ingest_demo(made[0], corpus.root, monkeypatch)
        with pytest.raises(SetupError, match="is running"):
            verify(corpus, {"demo": DEMO})
        asked.append(1)

    asked: list[int] = []
    repack_dataset(corpus, "demo", "train", 1, meanwhile)
    assert asked


def test_an_estimate_is_close_and_writes_nothing(corpus: Corpus) -> None:
    before = published_files(corpus.root)
    expected = estimate_repack(corpus, "demo", "small")
    assert published_files(corpus.root) == before
    report = repack(corpus, "small")
    assert abs(expected.bytes_after / report.bytes_after - 1) < 0.05
    assert (expected.arrays, expected.pending, expected.bytes_before) == (
        report.arrays,
        report.pending,
        report.bytes_before,
    )
    assert expected.bytes_needed == expected.bytes_after
    assert expected.cpu_seconds > 0
    done = estimate_repack(corpus, "demo", "small")
    assert (done.pending, done.bytes_needed, done.cpu_seconds) == (0, 0, 0)
    assert done.bytes_after == report.bytes_after


def test_the_command_line(corpus: Corpus) -> None:
    before = published_files(corpus.root)
    dry = run("pumit-data", "repack", "--profile", "small", "--dry-run", "--json", "--data", corpus.root)
    assert dry.returncode == 0, dry.stderr
    assert published_files(corpus.root) == before
    (expected,) = json.loads(dry.stdout)
    done = run("pumit-data", "repack", "demo", "--profile", "small", "--workers", "2", "--data", corpus.root)
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout
    assert expected["dataset"] == "demo"
    assert problems(corpus) == []
    refused = run("pumit-data", "repack", "nothing", "--profile", "small", "--data", corpus.root)
    assert refused.returncode == 2
    assert "no catalog of nothing" in refused.stderr


def test_a_full_disk_is_one_message_and_the_corpus_stays_whole(made: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "disk"
    data.mkdir()
    size = sum(path.stat().st_size for path in made[1].rglob("*") if path.is_file()) // 1024
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + 250}k", "tmpfs", data]
    if os.getuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        corpus = Corpus(Path(shutil.copytree(made[1], data / "corpus")))
        before = voxels(corpus)
        full = run("pumit-data", "repack", "--profile", "train", "--data", corpus.root)
        assert full.returncode == 2, full.stdout
        assert "no space left" in full.stderr
        assert "Traceback" not in full.stderr
        assert all((voxels(corpus)[key] == array).all() for key, array in before.items())
        subprocess.run(["mount", "-o", "remount,size=50m", data], check=True)
        again = run("pumit-data", "repack", "--profile", "train", "--data", corpus.root)
        assert again.returncode == 0, again.stderr
        assert problems(corpus) == []
        assert all((voxels(corpus)[key] == array).all() for key, array in before.items())
    finally:
        subprocess.run(["umount", data], check=True)


# Killed at any moment


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A corpus that takes a second to repack, and its files when nobody disturbs that."""
    folder = tmp_path_factory.mktemp("many")
    make_raw(folder / "raw", volumes=24, side=110)
    with pytest.MonkeyPatch.context() as patch:
        ingest_demo(folder / "raw", folder / "data", patch)
    undisturbed = Corpus(Path(shutil.copytree(folder / "data", folder / "undisturbed")))
    repack(undisturbed, "train")
    return folder / "data", published_files(undisturbed.root)


class Reader:
    """Reads the catalog all the time, and looks whether the arrays that it names are there."""

    def __init__(self, corpus: Corpus) -> None:
        self.reads, self.faults = 0, list[str]()
        self._corpus = corpus
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        file = self._corpus.catalog_file("demo")
        while not self._ended.is_set():
            content = file.read_bytes()
            paths = set(pq.read_table(io.BytesIO(content), columns=["shard_path"])["shard_path"].to_pylist())
            missing = [path for path in paths if not (self._corpus.shards_folder / path / SHARD_FILE).is_file()]
            if missing and file.read_bytes() == content:  # else it was replaced meanwhile
                self.faults += missing
            self.reads += 1


def kill_at_random(corpus: Corpus, chance: random.Random) -> None:
    """A repack of which the driver or one worker is killed."""
    driver = subprocess.Popen(
        command("pumit-data", "repack", "--profile", "train", "--workers", "2", "--data", corpus.root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    number, deadline = chance.randrange(1, 27), time.monotonic() + 60
    arrays = corpus.shards_folder / "demo"
    while driver.poll() is None and time.monotonic() < deadline:
        if len(list(arrays.glob("*.train.zarr"))) >= number:
            break
        time.sleep(0.002)
    time.sleep(chance.random() * 0.1)
    driver.kill()
    driver.wait()


def disturb(many: tuple[Path, dict[str, str]], tmp_path: Path, seed: int, kills: int) -> None:
    chance = random.Random(seed)
    corpus = Corpus(Path(shutil.copytree(many[0], tmp_path / "data")))
    with Reader(corpus) as reader:
        for _ in range(kills):
            kill_at_random(corpus, chance)
            assert load_catalog(corpus).num_rows == 24 + PICTURES
        done = run("pumit-data", "repack", "--profile", "train", "--workers", "2", "--data", corpus.root)
        assert done.returncode == 0, done.stderr
    assert published_files(corpus.root) == many[1]
    assert not reader.faults
    assert reader.reads


def test_killed_it_goes_on_to_the_same_bytes(many: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    disturb(many, tmp_path, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_many_moments(many: tuple[Path, dict[str, str]], tmp_path: Path, seed: int) -> None:
    """30 kills in all."""
    disturb(many, tmp_path, seed, kills=3)


def test_workers_end_with_a_killed_driver(many: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    corpus = Corpus(Path(shutil.copytree(many[0], tmp_path / "data")))
    with subprocess.Popen(
        command("pumit-data", "repack", "--profile", "train", "--workers", "2", "--data", corpus.root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as driver:
        while driver.poll() is None and not list(corpus.shards_folder.glob("demo/*.train.zarr")):
            time.sleep(0.005)
        workers = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=30)[1]
