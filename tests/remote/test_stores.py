"""Stores that are not S3's: the same corpus, faults and refusals on Google's, Azure's and plain web servers."""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catalog.store
import cli
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.index import write_index
from catalog.query import load_catalog
from catalog.remote import open_corpus, whole_copy
from catalog.store import RemotePath, StoreError
from ingest.lease import lease
from ingest.outline import raw_folder
from ingest.remote import working_copy
from ingest.run import ingest_dataset, plan_ingest
from ingest.verify import verify
from shards.chunks import Wanted
from shards.read import ShardReader
from shards.remote import RemoteReader
from tests.blob_server import Azure, Blobs, Google, Web, blob_server
from tests.commands import published_files, run
from tests.demo import DEMO, NoCluster
from tests.object_store import Fault, Proxy, download, proxy_to

SECRET = "a-secret-nobody-may-see"
BIG = (8 << 20) + (1 << 16)
"""Bytes that take two requests, up and down."""


@dataclass
class Store:
    place: RemotePath
    """Empty at the beginning."""
    proxy: Proxy
    blobs: Blobs

    def fill(self, folder: Path) -> None:
        """Put the files of a folder there, by no client."""
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and not name.startswith("private/"):
                self.put(name, file.read_bytes())

    def put(self, name: str, content: bytes) -> None:
        self.blobs.put(f"/{self.path_of(name)}", content)

    def path_of(self, name: str) -> str:
        place = self.place / name
        return place.key if place.is_web else f"{place.bucket}/{place.key}"


def make_store(scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dialect: Any) -> Iterator[Store]:
    blobs = Blobs(buckets={"bucket"})
    with blob_server(dialect, blobs) as port, proxy_to(port) as proxy:
        environment = {
            "GOOGLE_BASE_URL": proxy.url,
            "GOOGLE_BEARER_TOKEN": SECRET,
            "AZURE_STORAGE_ENDPOINT": proxy.url,
            "AZURE_STORAGE_ACCOUNT_NAME": "lab",
            "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(SECRET.encode()).decode(),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(catalog.store, "RETRIES", 2)
        monkeypatch.setattr(catalog.store, "STALL_SECONDS", 1)
        is_web = scheme == "http"
        bucket = RemotePath(scheme, f"127.0.0.1:{proxy.port}" if is_web else "bucket", "")
        yield Store(bucket / "some place/corpus", proxy, blobs)


DIALECTS = {"gs": Google, "az": Azure, "http": Web}


@pytest.fixture(params=["gs", "az"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    yield from make_store(request.param, monkeypatch, tmp_path, DIALECTS[request.param])


@pytest.fixture(params=["gs", "az", "http"])
def readable(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Store]:
    yield from make_store(request.param, monkeypatch, tmp_path, DIALECTS[request.param])


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    yield from make_store("http", monkeypatch, tmp_path, Web)


def findings(place: RemotePath) -> list[str]:
    with whole_copy(place) as corpus:
        return [f"{finding.kind} {finding.file}" for finding in verify(corpus, {"demo": DEMO}).findings]


def test_objects_are_written_listed_and_deleted(store: Store) -> None:
    place = store.place
    names = [f"n{number:02}%/x=1" for number in range(20)]
    for name in names:
        (place / name).write(name.encode())
    (place / "big").write(b"ab" * (BIG // 2))
    assert {item.name: item.size for item in place.walk()} == dict.fromkeys(names, 8) | {"big": BIG}
    assert {path.name for path in place.iterdir()} == {name.partition("/")[0] for name in names} | {"big"}
    assert (place / "big").read_bytes() == b"ab" * (BIG // 2)
    assert (place / names[3]).is_file()
    assert (place / "n03%").is_dir()
    assert not (place / "n").exists()
    for _ in range(2):
        (place / names[3]).unlink()
    assert not (place / names[3]).exists()
    assert len(list(place.walk())) == 20


def test_of_two_conditional_writes_one_comes_through(store: Store) -> None:
    target = store.place / "object"
    first = target.write_if(b"1", None)
    assert first is not None
    assert target.write_if(b"other", None) is None
    assert target.read_with_state() == (b"1", first)
    second = target.write_if(b"2", first)
    assert second not in (None, first)
    assert target.write_if(b"other", first) is None
    assert target.read_bytes() == b"2"


def test_one_writer_at_a_time(store: Store, tmp_path: Path) -> None:
    with lease(store.place, "demo", tmp_path / "here") as held:
        held.check()
        with pytest.raises(SetupError, match="another ingest"), lease(store.place, "demo", tmp_path / "there"):
            pass
    with lease(store.place, "demo", tmp_path / "there"):
        pass


def test_a_store_that_heeds_no_conditions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Heedless(Google):
        def parse_request(self) -> bool:
            parsed = super().parse_request()
            if parsed:
                del self.headers["x-goog-if-generation-match"]
            return parsed

    for store in make_store("gs", monkeypatch, tmp_path, Heedless):
        with pytest.raises(SetupError, match="does not heed"), lease(store.place, "demo", tmp_path):
            pass


@pytest.mark.parametrize("fault", [Fault("status"), Fault("reset"), Fault("stall")], ids=lambda one: one.kind)
def test_what_fails_once_while_it_is_read_is_asked_for_again(readable: Store, fault: Fault) -> None:
    content = np.random.default_rng(0).bytes(BIG)
    readable.put("object", content)
    readable.proxy.faults.append(Fault(fault.kind, path="object"))
    assert (readable.place / "object").open().read() == content
    assert readable.proxy.faults[0].times == 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("status"), "status 503"),
        (Fault("reset"), "breaks off"),
        (Fault("status", status=403, body=b"<Error>a-secret-nobody-may-see</Error>"), "access denied"),
    ],
    ids=["503", "reset", "403"],
)
def test_what_keeps_failing_ends_in_one_clear_error(readable: Store, fault: Fault, told: str) -> None:
    readable.put("object", b"x" * BIG)
    readable.proxy.faults.append(
        Fault(fault.kind, path="object", times=99, status=fault.status, body=fault.body)
    )
    with pytest.raises(StoreError, match=told) as caught:
        (readable.place / "object").open().read()
    assert str(readable.place / "object") in str(caught.value)
    assert SECRET not in str(caught.value)
    names = {"gs": "GOOGLE_", "az": "AZURE_", "http": "login"}
    assert (names[readable.place.scheme] in str(caught.value)) == (fault.status == 403)


def test_an_object_replaced_while_it_is_read_is_no_mixture(readable: Store) -> None:
    readable.put("object", b"a" * BIG)
    with (readable.place / "object").open() as stream:
        assert stream.read(10) == b"a" * 10
        readable.put("object", b"b" * BIG)
        with pytest.raises(StoreError, match="replaced while it was read"):
            stream.read()


@pytest.mark.parametrize("kind", ["status", "reset-upload", "reset", "stall"])
def test_an_upload_that_fails_once_is_made_again(store: Store, kind: Any) -> None:
    content = np.random.default_rng(0).bytes(BIG)
    store.proxy.faults.append(Fault(kind, method="PUT", path="object"))
    (store.place / "object").write(content)
    assert store.proxy.faults[0].times == 0
    assert (store.place / "object").read_bytes() == content


def test_nothing_is_there_of_an_upload_that_keeps_failing(store: Store) -> None:
    store.proxy.faults.append(Fault("status", method="PUT", path="object", times=99))
    with pytest.raises(StoreError, match="status 503"):
        (store.place / "object").write(b"x" * BIG)
    assert not (store.place / "object").exists()


def test_a_bucket_that_is_not_there(store: Store) -> None:
    there = RemotePath(store.place.scheme, "no-such-bucket", "x")
    for request in (
        partial(there.write, b"1"),
        there.read_bytes,
        there.is_dir,
        partial(there.write_if, b"", None),
    ):
        with pytest.raises(StoreError, match=r"no (bucket|container) no-such-bucket"):
            request()


@pytest.mark.usefixtures("in_this_process")
def test_a_store_holds_byte_for_byte_what_a_folder_would(
    local: Path, store: Store, raw: Path, tmp_path: Path
) -> None:
    for file in raw.rglob("*.*"):
        (store.place.parent / "raw" / file.relative_to(raw).as_posix()).write(file)
    store.proxy.faults.append(Fault("status", method="PUT", path="images.parquet"))
    store.proxy.faults.append(Fault("reset", path="raw.*large"))
    for expected in (5, 0):
        with (
            raw_folder(store.place.parent / "raw") as outlined,
            working_copy(store.place, ["demo"], write=True) as corpus,
        ):
            outlined.outline(DEMO)
            plan = plan_ingest(DEMO, outlined.folder, corpus, origin=outlined.origin)
            report = ingest_dataset(plan, corpus, NoCluster(), lambda *_: None)  # type: ignore[arg-type]
            assert sum(report.run.values()) == expected
    assert [fault.times for fault in store.proxy.faults] == [0, 0], {r.path for r in store.proxy.requests}
    assert published_files(download(store.place, tmp_path / "got")) == published_files(local)
    assert load_catalog(open_corpus(store.place)).equals(load_catalog(open_corpus(local)))
    assert findings(store.place) == []


def test_a_corpus_on_a_web_server_is_read_to_the_last_voxel(local: Path, web: Store) -> None:
    web.fill(local)
    there, here = open_corpus(web.place), open_corpus(local)
    assert load_catalog(there).equals(load_catalog(here))
    far, near = pickle.loads(pickle.dumps(RemoteReader(there.shards))), ShardReader(here.shards)
    for row in load_catalog(here).to_pylist():
        box = ((0, row["shape_d"]), (0, row["shape_h"]), (0, row["shape_w"]))
        told = (row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], row["shard_index"], box)
        assert np.array_equal(far.read(Wanted(*told)), near.read(*told))
    assert findings(web.place) == []
    web.proxy.requests.clear()
    open_corpus(web.place)
    assert not any("images.parquet" in request.path for request in web.proxy.requests)


def test_damage_on_a_web_server_is_found(local: Path, web: Store) -> None:
    web.fill(local)
    row = load_catalog(open_corpus(local)).to_pylist()[0]
    web.put(f"shards/{row['shard_path']}/c.0.0.0.0", b"damaged")
    web.put("catalog/dataset=demo/previews.parquet", b"damaged")
    del web.blobs.found[f"/{web.path_of('splits/demo.parquet')}"]
    assert sorted(findings(web.place)) == [
        "damaged catalog/dataset=demo/previews.parquet",
        f"damaged shards/{row['shard_path']}",
        "missing splits/demo.parquet",
    ]


def test_a_corpus_that_changes_on_a_web_server_is_seen(local: Path, web: Store, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"datasets\.txt"):
        open_corpus(web.place)
    web.put("catalog/datasets.txt", b"demo\ngone\n")
    with pytest.raises(SetupError, match="no catalog"):
        load_catalog(open_corpus(web.place))
    web.fill(local)
    assert load_catalog(open_corpus(web.place)).num_rows == 5
    web.put("catalog/datasets.txt", b"")
    with pytest.raises(SetupError, match="no catalog"):
        load_catalog(open_corpus(web.place))


def test_a_web_server_is_neither_written_nor_listed(web: Store) -> None:
    for request in (
        partial((web.place / "x").write, b"1"),
        partial((web.place / "x").write_if, b"1", None),
        (web.place / "x").unlink,
        partial(next, web.place.walk()),
        partial(next, web.place.iterdir()),
    ):
        with pytest.raises(StoreError, match="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX"):
            request()
    with pytest.raises(SetupError, match="only read from"), working_copy(web.place, ["demo"], write=True):
        pass
    assert web.proxy.requests == []


def test_a_web_server_without_ranges_is_named_as_the_fault(web: Store, local: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(local))
    handler.func.log_message = lambda *_: None  # type: ignore[method-assign]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(StoreError, match="range requests"):
            open_corpus(RemotePath("http", f"127.0.0.1:{listening.server_address[1]}", ""))
        listening.shutdown()


def test_commands_read_a_web_server(web: Store, local: Path, tmp_path: Path) -> None:
    web.fill(local)
    stats = run("pumit-data", "stats", "--data", str(web.place), "--json")
    assert stats.returncode == cli.DONE, stats.stderr
    key = load_catalog(open_corpus(local)).to_pylist()[0]["key"]
    viewed = run("pumit-data", "view", key, "--data", str(web.place), "--save", tmp_path / "seen.png")
    assert viewed.returncode == cli.DONE, viewed.stderr


def test_the_index_names_what_is_there(tmp_path: Path, store: Store, local: Path) -> None:
    assert (local / "catalog/datasets.txt").read_text() == "demo\n"
    for place in (tmp_path, store.place):
        for dataset in ("b", "a"):
            (place / f"catalog/dataset={dataset}").mkdir(parents=True) if isinstance(place, Path) else None
            file = place / f"catalog/dataset={dataset}/images.parquet"
            file.write_bytes(b"") if isinstance(file, Path) else file.write(b"")
        write_index(place)
        assert (place / "catalog/datasets.txt").read_bytes() == b"a\nb\n"


def test_a_wrong_index_is_damage(local: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(local, copy)
    assert verify(Corpus(copy), {"demo": DEMO}).findings == []
    (copy / "catalog/datasets.txt").write_text("other\n")
    assert [finding.file for finding in verify(Corpus(copy), {"demo": DEMO}).findings] == [
        "catalog/datasets.txt"
    ]
    (copy / "catalog/datasets.txt").unlink()
    assert verify(Corpus(copy), {"demo": DEMO}).findings == []
