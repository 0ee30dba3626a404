"""A file server on loopback that misbehaves when told to."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Page:
    """What the server has at one address."""

    content: bytes
    ranges: bool = True
    """Whether parts can be asked for."""
    version: str | None = '"1"'
    """ETag; None sends none."""
    breaks_after: list[int] = field(default_factory=list)
    """For each of the first answers: after how many bytes of its body the connection breaks."""
    states: list[int] = field(default_factory=list)
    """For each of the first answers: the HTTP state instead of the content."""
    announces_length: bool = True
    kind: str = "application/octet-stream"


@dataclass
class Request:
    path: str
    query: dict[str, str]
    range: str | None


class Web:
    """Pages by path; the path may carry the query, where pages differ by it."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.url = ""

    def put(self, path: str, content: bytes, **behaviour: Any) -> str:
        self.pages[path] = Page(content, **behaviour)
        return self.url + path

    def put_json(self, path: str, value: Any) -> str:
        return self.put(path, json.dumps(value).encode(), kind="application/json")

    def ranges(self, path: str) -> list[str | None]:
        """What was asked for of a page, in order."""
        return [request.range for request in self.requests if request.path == path]


@contextlib.contextmanager
def serve() -> Iterator[Web]:
    """A server for as long as the context lasts."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            path = unquote(parts.path)
            web.requests.append(Request(path, query, self.headers.get("Range")))
            page = web.pages.get(unquote(self.path)) or web.pages.get(path)
            if page is None:
                self.answer(404, b"")
            elif page.states:
                self.answer(page.states.pop(0), b"")
            else:
                self.send_page(page)

        def send_page(self, page: Page) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            fresh = self.headers.get("If-Range") in (None, page.version)
            start = int(wanted[1]) if wanted and page.ranges and fresh else 0
            headers = {"Content-Type": page.kind} | ({"ETag": page.version} if page.version else {})
            if start >= len(page.content) and start:
                self.answer(416, b"", {"Content-Range": f"bytes */{len(page.content)}"})
                return
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(page.content) - 1}/{len(page.content)}"
            stop = page.breaks_after.pop(0) if page.breaks_after else None
            self.answer(206 if start else 200, page.content[start:], headers, stop, page.announces_length)

        def answer(
            self,
            state: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            stop: int | None = None,
            announces_length: bool = True,
        ) -> None:
            self.send_response(state)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if announces_length:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[:stop])
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
