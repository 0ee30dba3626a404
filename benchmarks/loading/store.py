"""A folder as an S3-compatible store on loopback that answers after a while: GET and HEAD, with ranges.

The name of the bucket says after what while: `after-20-ms` holds the same as `after-0-ms`. The store runs in a
process of its own, so that its work is not counted as a reader's.
"""

from __future__ import annotations

import contextlib
import email.utils
import multiprocessing
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    root: Path

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        wanted = re.fullmatch(r"/after-(\d+)-ms/(.+)", unquote(urlsplit(self.path).path))
        if wanted:
            time.sleep(int(wanted[1]) / 1e3)
        path = self.root / (wanted[2] if wanted else "")
        if not path.is_file():
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", {}, with_content=with_content)
            return
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        start, stop = 0, size
        if span and not span[1]:
            start = max(size - int(span[2]), 0)
        elif span:
            start, stop = int(span[1]), min(int(span[2] or size) + 1, size)
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start) if with_content else b""
        headers = {
            "ETag": f'"{size:x}"',
            "Last-Modified": email.utils.formatdate(0, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if span:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(206 if span else 200, content, headers, length=stop - start, with_content=with_content)

    def _send(
        self, state: int, body: bytes, headers: dict[str, str], *, with_content: bool, length: int | None = None
    ) -> None:
        self.send_response(state)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if with_content:
            self.wfile.write(body)
        self.wfile.flush()


def _serve(root: Path, answer: Connection) -> None:
    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    answer.send(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """URL of a store whose buckets all hold what lies below `root`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(root, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()
