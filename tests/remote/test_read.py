"""A corpus in an S3-compatible store: read where it lies, through faults, and never half of it."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cli
from catalog.errors import SetupError
from catalog.mix import Mix, load_mix, write_mix
from catalog.query import load_catalog
from catalog.remote import open_corpus, whole_copy
from catalog.store import RemotePath, StoreError, location
from ingest.verify import verify
from shards.chunks import Wanted
from shards.read import ShardReader
from shards.remote import RemoteReader
from tests.commands import run
from tests.demo import DEMO
from tests.object_store import Fault, Proxy


def largest(place: RemotePath) -> dict[str, object]:
    rows = load_catalog(open_corpus(place)).to_pylist()
    return max(rows, key=lambda row: row["stored_bytes"])


def read_box(place: RemotePath, row: dict, box: tuple) -> np.ndarray:
    reader = pickle.loads(pickle.dumps(RemoteReader(open_corpus(place).shards)))
    return reader.read(
        Wanted(row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], row["shard_index"], box)
    )


def whole(row: dict) -> tuple:
    return ((0, row["shape_d"]), (0, row["shape_h"]), (0, row["shape_w"]))


def test_places() -> None:
    assert location("data") == Path("data")
    assert location("s3://bucket/a//b/") == RemotePath("s3", "bucket", "a/b")
    assert str(location("s3://bucket")) == "s3://bucket"
    assert location("gs://bucket/a") == RemotePath("gs", "bucket", "a")
    assert location("https://host:8080/a") == RemotePath("https", "host:8080", "a")
    for alias in ("az", "azure", "abfs", "abfss"):
        assert location(f"{alias}://box/a") == RemotePath("az", "box", "a")
    in_an_account = location("abfss://box@lab.dfs.core.windows.net/a")
    assert in_an_account == location(str(in_an_account)) == RemotePath("az", "box@lab", "a")


@pytest.mark.parametrize(
    "wrong", ["ftp://host/x", "s3:///x", "s3://bucket/a/../b", "s3://bucket/a?x=1", "file:///data"]
)
def test_no_places(wrong: str) -> None:
    with pytest.raises(SetupError) as caught:
        location(wrong)
    if "/../" not in wrong:
        assert all(f"{scheme}://" in str(caught.value) for scheme in ("s3", "gs", "az", "https"))


def test_a_login_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SetupError) as caught:
        location("https://me:secret@host/corpus")
    assert "secret" not in str(caught.value)


def test_catalog_and_every_voxel_are_those_of_the_folder(local: Path, corpus: RemotePath) -> None:
    there, here = load_catalog(open_corpus(corpus)), load_catalog(open_corpus(local))
    assert there.equals(here)
    assert there.num_rows == 5
    near = ShardReader(open_corpus(local).shards)
    for row in there.to_pylist():
        found = read_box(corpus, row, whole(row))
        told = (row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], row["shard_index"])
        assert np.array_equal(found, near.read(*told, whole(row)))


def test_a_box_takes_its_chunks_and_no_more(corpus: RemotePath, proxy: Proxy) -> None:
    row = largest(corpus)
    proxy.requests.clear()
    read_box(corpus, row, ((0, 8), (0, 32), (0, 32)))
    received = sum(request.received for request in proxy.requests if "/shards/" in request.path)
    assert 0 < received < row["stored_bytes"] / 10


def test_catalogs_are_copied_once(corpus: RemotePath, proxy: Proxy) -> None:
    load_catalog(open_corpus(corpus))
    told = [request.path for request in proxy.requests if "list-type" not in request.path]
    assert not any("previews" in path for path in told)
    proxy.requests.clear()
    load_catalog(open_corpus(corpus))
    assert all("list-type" in request.path for request in proxy.requests)


def test_a_replaced_catalog_is_seen_and_a_deleted_one_gone(local: Path, corpus: RemotePath) -> None:
    open_corpus(corpus)
    name = "catalog/dataset=demo/images.parquet"
    table = pq.read_table(local / name)
    part = local.parent / "part.parquet"
    pq.write_table(table.slice(0, 2), part)
    (corpus / name).write(part)
    assert load_catalog(open_corpus(corpus), status=None).num_rows == 2
    (corpus / name).unlink()
    with pytest.raises(SetupError, match="no catalog"):
        load_catalog(open_corpus(corpus))


@pytest.mark.parametrize(
    "fault", [Fault("status"), Fault("reset"), Fault("stall"), Fault("status", status=500)]
)
@pytest.mark.parametrize("path", ["list-type", "images.parquet", r"c\.0\.0\.0\.0"])
def test_what_fails_once_is_asked_for_again(
    local: Path, corpus: RemotePath, proxy: Proxy, fault: Fault, path: str
) -> None:
    """A stalled voxel is left to the library's own limits."""
    proxy.faults.append(Fault(fault.kind, path=path, status=fault.status))
    row = largest(corpus)
    found = read_box(corpus, row, whole(row))
    assert proxy.faults[0].times == 0
    told = (row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], row["shard_index"])
    assert np.array_equal(found, ShardReader(open_corpus(local).shards).read(*told, whole(row)))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("status", times=99), "status 503"),
        (Fault("reset", times=99), "breaks off"),
        (Fault("stall", times=99), "does not answer"),
        (
            Fault("status", times=99, status=403, body=b"<Error>AWSAccessKeyId a-known-user</Error>"),
            "access denied",
        ),
    ],
)
@pytest.mark.parametrize("path", ["images.parquet", r"c\.0\.0\.0\.0"])
def test_what_keeps_failing_ends_in_one_clear_error(
    corpus: RemotePath, proxy: Proxy, fault: Fault, told: str, path: str
) -> None:
    row = largest(corpus) if path != "images.parquet" else None
    proxy.faults.append(Fault(fault.kind, path=path, times=99, status=fault.status, body=fault.body))
    with pytest.raises(StoreError, match=told) as caught:
        read_box(corpus, row, whole(row)) if row else load_catalog(open_corpus(corpus))
    message = str(caught.value)
    assert str(corpus) in message
    assert "a-known-user" not in message
    assert "a-secret" not in message


def test_errors_cross_process_borders() -> None:
    error = StoreError(errno.EIO, "it is down", "s3://bucket/key")
    assert str(pickle.loads(pickle.dumps(error))) == "s3://bucket/key: it is down"


def test_missing_bucket_missing_corpus_and_missing_shard(corpus: RemotePath, bucket: RemotePath) -> None:
    with pytest.raises(StoreError, match="no bucket"):
        open_corpus(RemotePath("s3", "no-such-bucket", "x"))
    with pytest.raises(SetupError, match=f"no catalog below {bucket}/elsewhere/catalog"):
        load_catalog(open_corpus(bucket / "elsewhere"))
    row = largest(corpus)
    (corpus / "shards" / row["shard_path"] / "c.0.0.0.0").unlink()
    with pytest.raises(SetupError, match="cannot read the shard s3://"):
        read_box(corpus, row, whole(row))


def test_a_file_replaced_while_it_is_read_is_no_mixture(bucket: RemotePath) -> None:
    target = bucket / "object"
    target.write(b"a" * (20 << 20))
    with target.open() as stream:
        assert stream.read(10) == b"a" * 10
        target.write(b"b" * (20 << 20))
        with pytest.raises(StoreError, match="replaced while it was read"):
            stream.read()


def test_verify_proves_and_finds(local: Path, corpus: RemotePath) -> None:
    def outcome(deep: bool = False) -> list[tuple[str, str]]:
        with whole_copy(corpus) as copied:
            return [
                (finding.kind, finding.file)
                for finding in verify(copied, {"demo": DEMO}, deep=deep, workers=2).findings
            ]

    assert outcome() == []
    row = largest(corpus)
    shard = corpus / "shards" / row["shard_path"] / "c.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write(bytes(content))
    (corpus / "shards/demo/stray.zarr/zarr.json").write(b"{}")
    (corpus / "catalog/dataset=demo/notes.txt").write(b"mine")
    previews = corpus / "catalog/dataset=demo/previews.parquet"
    previews.write(previews.read_bytes() + b"x")
    assert sorted(outcome()) == [
        ("damaged", "catalog/dataset=demo/previews.parquet"),
        ("damaged", f"shards/{row['shard_path']}"),
        ("stray", "catalog/dataset=demo/notes.txt"),
        ("stray", "shards/demo/stray.zarr"),
    ]


def test_verify_does_not_call_damaged_what_it_could_not_read(corpus: RemotePath, proxy: Proxy) -> None:
    proxy.faults.append(Fault("status", path=r"c\.0\.0\.0\.0", times=99))
    with pytest.raises(StoreError, match="503"), whole_copy(corpus) as copied:
        verify(copied, {"demo": DEMO})


def test_commands(corpus: RemotePath, tmp_path: Path) -> None:
    stats = run("pumit-data", "stats", "--data", str(corpus), "--json")
    assert stats.returncode == 0, stats.stderr
    assert "demo" in stats.stdout
    row = largest(corpus)
    viewed = run("pumit-data", "view", row["key"], "--data", str(corpus), "--save", tmp_path / "seen.png")
    assert viewed.returncode == 0, viewed.stderr
    assert Image.open(tmp_path / "seen.png").size[0] > 0
    page = tmp_path / "suspects.html"
    doctor = run("pumit-data", "doctor", "--data", str(corpus), "--out", page)
    assert doctor.returncode == 0, doctor.stderr
    assert page.exists()
    wrong = run("pumit-data", "stats", "--data", "ftp://host/corpus")
    assert (wrong.returncode, wrong.stdout) == (cli.WRONG_CALL, "")
    assert "s3://BUCKET/PREFIX" in wrong.stderr
    dead = run("pumit-data", "stats", "--data", str(corpus), env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert dead.returncode == cli.WRONG_CALL
    assert dead.stderr.startswith(f"error: {corpus}")
    assert dead.stderr.count("\n") == 1


def test_a_mix_in_a_store_is_written_once_and_taken_by_name(corpus: RemotePath) -> None:
    opened = open_corpus(corpus)
    write_mix(opened, "mine", Mix(where="modality = 'CT'"))
    for one in (opened, open_corpus(corpus)):  # the first has not seen it yet
        with pytest.raises(SetupError, match="--force replaces it"):
            write_mix(one, "mine", Mix())
    shown = run("pumit-data", "mix", "show", "mine", "--data", str(corpus), "--json")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert told["where"] == "modality = 'CT'"
    assert told["images"]["after"] < told["images"]["before"]
    write_mix(opened, "mine", Mix(), force=True)
    assert load_mix(open_corpus(corpus), "mine") == Mix()
