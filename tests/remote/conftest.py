"""A store for each test, and a small corpus to put there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import catalog.store
import ingest.run
from catalog.store import RemotePath
from ingest.task import IngestTask, run_task
from tests.demo import DEMO, ingest_demo
from tests.object_store import Proxy, make_bucket, make_raw, proxy_to, s3_server, upload

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "a-known-user",
    "AWS_SECRET_ACCESS_KEY": "a-secret-nobody-may-see",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """The store, by the environment of this process and its children; retried without long pauses."""
    with proxy_to(server) as proxy:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setattr(catalog.store, "RETRIES", 2)
        monkeypatch.setattr(catalog.store, "STALL_SECONDS", 1)
        yield proxy


@pytest.fixture
def bucket(server: int, proxy: Proxy) -> RemotePath:
    name = f"bucket-{secrets.token_hex(4)}"
    make_bucket(server, name)
    return RemotePath("s3", name, "")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two volumes, of which one has many chunks, and a pack."""
    raw, data = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data")
    make_raw(raw)
    with pytest.MonkeyPatch.context() as monkeypatch:
        ingest_demo(raw, data, monkeypatch)
    return data


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(tasks: Iterator[IngestTask], client: object) -> Iterator[tuple[IngestTask, Any]]:
        for task in tasks:
            yield task, run_task(task)

    monkeypatch.setattr(ingest.run, "_run_on_cluster", run_here)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    make_raw(folder)
    entry = DEMO.model_dump(mode="json", exclude_defaults=True) | {"private_names": False}
    (folder / "datasets.yaml").write_text(yaml.safe_dump([entry]), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(local: Path, bucket: RemotePath, proxy: Proxy) -> RemotePath:
    upload(local, bucket / "some/corpus")
    proxy.requests.clear()
    return bucket / "some/corpus"
