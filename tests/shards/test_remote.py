"""Which requests a reader of a store makes, and how many of them at a time: counted by a server."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from catalog.store import RemotePath
from shards.chunks import Wanted, index_bytes
from shards.remote import RemoteReader
from shards.write import write_volume

SHAPE = (1, 48, 384, 192)
"""3 x 6 x 3 chunks, each larger than the gaps that are read along."""
LONGEST_WAIT = 20  # seconds; reached only by a reader that asks for too little at a time


@dataclass
class Store:
    """A web server that holds back its answers about chunks until `together` of them are asked for."""

    folder: Path
    together: int = 1
    indexes: int = 0
    sizes: list[int] = field(default_factory=list)
    """Bytes of each request for chunks."""
    waiting: int = 0
    most: int = 0
    change: threading.Condition = field(default_factory=threading.Condition)

    def answer(self, path: str, span: str) -> tuple[int, int, bytes]:
        """Start and content of a part of a file, and the size of all of it."""
        content = (self.folder / path).read_bytes()
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", span).groups()  # type: ignore[union-attr]
        with self.change:
            if not first:
                self.indexes += 1
                start = len(content) - int(last)
                return start, len(content), content[start:]
            start, stop = int(first), int(last) + 1
            self.sizes.append(stop - start)
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            self.change.notify_all()
            self.change.wait_for(lambda: self.most >= self.together, LONGEST_WAIT)
            self.waiting -= 1
        return start, len(content), content[start:stop]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        start, size, content = self.store.answer(self.path.lstrip("/"), self.headers["Range"])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-32768, 32768, SHAPE, np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, voxels: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_volume(folder, f"noise/{number}.zarr", voxels)
    return folder


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(folder)


@pytest.fixture
def reader(store: Store) -> Iterator[RemoteReader]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 512

    with Server(("127.0.0.1", 0), type("Bound", (Handler,), {"store": store})) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield RemoteReader(RemotePath("http", f"127.0.0.1:{server.server_address[1]}", ""))
        server.shutdown()


def wanted(z: tuple[int, int], y: tuple[int, int], x: tuple[int, int], number: int = 0) -> Wanted:
    return Wanted(f"noise/{number}.zarr", SHAPE, "int16", None, (z, y, x))


def test_all_requests_of_all_boxes_are_under_way_at_a_time(
    store: Store, reader: RemoteReader, voxels: np.ndarray
) -> None:
    column = (0, 48), (0, 384), (0, 64)
    store.together = 2 * 3 * 6
    found = [coming.result() for coming in reader.request([wanted(*column), wanted(*column, number=1)])]
    assert all(np.array_equal(box, voxels[..., :64]) for box in found)
    assert store.most == len(store.sizes) == store.together


def test_neighbours_share_requests_of_a_limited_size(
    store: Store, reader: RemoteReader, voxels: np.ndarray
) -> None:
    found = reader.read(wanted((0, 48), (0, 384), (0, 192)))
    assert np.array_equal(found, voxels)
    size = (store.folder / "noise/0.zarr/c.0.0.0.0").stat().st_size
    assert sum(store.sizes) == size - index_bytes(54)
    assert len(store.sizes) == 4
    assert max(store.sizes) <= 2 << 20
    assert reader.traffic.received_bytes == size


def test_connections_are_bounded(store: Store, reader: RemoteReader) -> None:
    store.together = 32 * 6  # so many calls, each for a column of one chunk in depth
    columns = [wanted((z, z + 1), (0, 384), (0, 64)) for z in range(0, 48, 16)]
    coming = [reader.request([column])[0] for column in columns * 20]
    for box in coming:
        box.result()
    assert len(store.sizes) == 6 * len(coming)
    assert store.most == store.together


def test_an_index_is_asked_for_once(store: Store, reader: RemoteReader) -> None:
    for first in range(0, 48, 8):
        reader.read(wanted((first, first + 8), (0, 10), (0, 10)))
    assert store.indexes == 1
    reader.read(wanted((0, 8), (0, 10), (0, 10), number=1))
    assert store.indexes == 2
