"""An S3-compatible server on loopback, and a proxy before it that lets requests fail as networks do."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import nibabel as nib
import numpy as np
from PIL import Image

from catalog.store import RemotePath

_SENT_BEFORE_A_RESET = 0.5
_LONGER_THAN_ANY_PATIENCE = 100  # seconds


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path matches."""

    kind: Literal["status", "stall", "reset", "reset-upload"]
    method: str = "GET"
    path: str = ""
    times: int = 1
    status: int = 503
    body: bytes = b"<Error><Code>SlowDown</Code></Error>"


@dataclass
class Request:
    """One request that came through."""

    method: str
    path: str
    sent: int
    """Bytes of the body that the client sent."""
    received: int
    """Bytes of the body that it was given."""


@dataclass
class Proxy:
    """Where clients connect to."""

    server: int
    """Port of the real one."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, unquote(path)):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _forward(self) -> None:
        fault = self.proxy.fault_of(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind == "reset-upload":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault is not None and fault.kind == "stall":
            self.proxy.closing.wait(_LONGER_THAN_ANY_PATIENCE)
            self._reset()
            return
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, [("Content-Type", "application/xml")], fault.body)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.server, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        cut = int(len(content) * _SENT_BEFORE_A_RESET) if fault is not None else None
        self.proxy.requests.append(Request(self.command, self.path, length, len(content)))
        dropped = {"connection", "transfer-encoding", "date", "server"}
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in dropped]
        self._answer(answer.status, headers, content, cut)
        if fault is not None:
            self._reset()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
            self.wfile.flush()

    def _reset(self) -> None:
        """Drop the connection as a crashed server does: no goodbye."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
        self.close_connection = True


@contextmanager
def proxy_to(server: int) -> Iterator[Proxy]:
    """A proxy that runs in threads of this process."""
    proxy = Proxy(server)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        proxy.port = listening.server_address[1]
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            listening.shutdown()


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server as a process; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def make_bucket(port: int, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()


def make_folder_marker(port: int, folder: RemotePath) -> None:
    """The empty object that web consoles make for a folder."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("PUT", f"/{folder.bucket}/{folder.key}/", b"")
    assert connection.getresponse().status == 200
    connection.close()


def make_raw(raw: Path) -> None:
    folder = raw / "demo"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, shape in {"large 100%": (260, 200, 48), "small": (40, 30, 20)}.items():
        voxels = draw.integers(-1000, 1000, shape).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1])), folder / f"{name}.nii.gz")
    for number in range(3):
        pixels = draw.integers(0, 256, (60, 50 + number)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{number}.png")


def upload(folder: Path, target: RemotePath) -> None:
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith("private/"):
            (target / name).write(file)


def download(source: RemotePath, folder: Path) -> Path:
    """All objects below a place, but those of `private/`, as files."""
    for item in source.walk():
        if not item.name.startswith("private/"):
            file = folder / item.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((source / item.name).read_bytes())
    return folder
