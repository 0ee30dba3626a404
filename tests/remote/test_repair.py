"""`verify --repair` of a corpus in a store: just what is damaged is made anew there, to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

import cli
from catalog.errors import SetupError
from catalog.query import load_catalog
from catalog.remote import open_corpus, whole_copy
from catalog.store import Location, RemotePath
from ingest.outline import raw_folder
from ingest.remote import working_copy
from ingest.repair import repair
from ingest.run import IngestPlan, IngestReport, ingest_dataset, plan_ingest
from ingest.verify import verify
from tests.commands import published_files, run
from tests.demo import DEMO, NoCluster
from tests.object_store import Proxy, download, upload

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def place(bucket: RemotePath, raw: Path) -> RemotePath:
    """A corpus that this machine has ingested."""
    place = bucket / "corpus"
    with working_copy(place, ["demo"], write=True) as corpus:
        ingest_dataset(plan_ingest(DEMO, raw, corpus), corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]
    return place


def findings(place: RemotePath) -> list[str]:
    with whole_copy(place) as corpus:
        return [f"{found.kind} {found.file}" for found in verify(corpus, {"demo": DEMO}, workers=1).findings]


def mend(place: RemotePath, raw_place: Location) -> list[str]:
    with whole_copy(place) as corpus:
        outcome = verify(corpus, {"demo": DEMO}, workers=1)
    assert outcome.findings
    with raw_folder(raw_place) as raw, working_copy(place, ["demo"], write=True, whole=True) as corpus:

        def ingest_all(plans: list[IngestPlan]) -> list[IngestReport]:
            return [ingest_dataset(plan, corpus, NoCluster(), lambda *_: None) for plan in plans]  # type: ignore[arg-type]

        return repair(corpus, {"demo": DEMO}, raw, outcome, 1, ingest_all)


def flip(target: RemotePath) -> None:
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write(bytes(content))


def arrays(place: RemotePath) -> list[str]:
    return sorted({row["shard_path"] for row in load_catalog(open_corpus(place)).to_pylist()})


@pytest.mark.parametrize("elsewhere", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "damage",
    [
        ["arrays"],
        ["catalog/dataset=demo/previews.parquet"],
        ["catalog/dataset=demo/images.parquet"],
        ["catalog/dataset=demo/manifest.sha256", "catalog/datasets.txt"],
        ["splits/demo.parquet", "arrays"],
    ],
    ids=lambda names: names[0].rpartition("/")[2],
)
def test_what_is_damaged_comes_back_to_the_same_bytes(
    local: Path,
    place: RemotePath,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: list[str],
    elsewhere: bool,
) -> None:
    if elsewhere:  # on a machine that has nothing of it
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of another"))
    for name in damage:
        if name == "arrays":
            first, second, _ = arrays(place)
            flip(place / "shards" / first / "c.0.0.0.0")
            (place / "shards" / second / "zarr.json").unlink()
            (place / "shards" / second / "notes.txt").write(b"stray")
            (place / "shards/demo/left-0123456789ab.zarr/zarr.json").write(b"{}")
        elif name.endswith("datasets.txt"):
            (place / name).write(b"other\n")
        else:
            flip(place / name)
    assert mend(place, raw) == []
    assert findings(place) == []
    assert published_files(download(place, tmp_path / "got")) == published_files(local)


def test_what_is_gone_is_sent_again(local: Path, place: RemotePath, raw: Path, tmp_path: Path) -> None:
    for name in ("catalog/dataset=demo/previews.parquet", "splits/demo.parquet"):
        (place / name).unlink()
    assert mend(place, raw) == []
    assert published_files(download(place, tmp_path / "got")) == published_files(local)


def test_without_the_raw_images_nothing_is_lost(place: RemotePath, raw: Path, tmp_path: Path) -> None:
    flip(place / "shards" / arrays(place)[0] / "c.0.0.0.0")
    before = findings(place)
    with pytest.raises(SetupError, match="raw folder"):
        mend(place, tmp_path / "nothing")
    assert findings(place) == before


def test_from_raw_images_in_the_store(local: Path, place: RemotePath, raw: Path, tmp_path: Path) -> None:
    upload(raw, place.parent / "raw")
    for array in arrays(place):
        (place / "shards" / array / "c.0.0.0.0").unlink()
    assert mend(place, place.parent / "raw") == []
    assert published_files(download(place, tmp_path / "got")) == published_files(local)


@pytest.mark.slow
def test_the_command(local: Path, place: RemotePath, raw: Path, tmp_path: Path, proxy: Proxy) -> None:
    upload(raw, place.parent / "raw")
    flip(place / "shards" / arrays(place)[0] / "c.0.0.0.0")
    done = run(
        *("pumit-data", "verify", "demo", "--repair", "--workers", "1"),
        *("--data", str(place), "--raw", str(place.parent / "raw")),
    )
    assert done.returncode == cli.DONE, done.stdout + done.stderr
    assert published_files(download(place, tmp_path / "got")) == published_files(local)
