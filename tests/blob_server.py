"""A store on loopback that speaks what clients of Google's, of Azure's and of plain web servers speak.

No emulator was found that serves the interfaces that obstore uses: Google's XML interface with conditions on
generations, and Azure's blobs. This is as much of them as a corpus needs, in memory, in threads of the test.
"""

from __future__ import annotations

import hashlib
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 7
"""Names in one answer to a listing: small, so that every listing takes several."""


@dataclass
class Blob:
    content: bytes
    generation: int
    modified: float

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content, usedforsecurity=False).hexdigest()}-{self.generation}"'


@dataclass
class Blobs:
    """What the server holds, by `/bucket/key`."""

    found: dict[str, Blob] = field(default_factory=dict)
    parts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of uploads that are not complete."""
    buckets: set[str] = field(default_factory=set)
    generation: int = 1_700_000_000
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, path: str, content: bytes) -> Blob:
        self.generation += 1
        self.found[path] = Blob(content, self.generation, float(self.generation))
        return self.found[path]

    def listed(self, bucket: str, prefix: str, delimiter: str, after: str) -> tuple[list[str], str]:
        """Names and common prefixes of one answer, and where the next one begins."""
        start = f"/{bucket}/"
        names: dict[str, None] = {}
        for path in sorted(self.found):
            name = path.removeprefix(start)
            if not path.startswith(start) or not name.startswith(prefix):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            name = name if cut < 0 else name[: cut + len(delimiter)]
            if name > after:
                names[name] = None
        ordered = list(names)
        return ordered[:PAGE], ordered[PAGE - 1] if len(ordered) > PAGE else ""


class _Handler(BaseHTTPRequestHandler):
    """What all dialects share."""

    protocol_version = "HTTP/1.1"
    blobs: Blobs
    no_bucket = "NoSuchBucket"

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    @property
    def path_asked(self) -> str:
        return unquote(urlsplit(self.path).path)

    @property
    def query(self) -> dict[str, str]:
        told = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values[0] for name, values in told.items()}

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        with self.blobs.lock:
            blob = self.blobs.found.get(self.path_asked)
        if blob is None:
            known = self.path_asked.split("/")[1] in self.blobs.buckets
            self.refuse(404, "NoSuchKey" if known else self.no_bucket)
            return
        if self.headers.get("If-Match", blob.etag) != blob.etag:
            self.refuse(412, "ConditionNotMet")
            return
        start, stop = 0, len(blob.content)
        headers = self.facts(blob)
        asked = re.fullmatch(
            r"bytes=(\d*)-(\d*)", self.headers.get("Range") or self.headers.get("x-ms-range") or ""
        )
        if asked:
            start = int(asked[1]) if asked[1] else max(0, stop - int(asked[2]))
            stop = min(stop, int(asked[2]) + 1) if asked[1] and asked[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(blob.content)}"
        self.answer(206 if asked else 200, blob.content[start:stop], headers)

    do_HEAD = do_GET  # noqa: N815

    def facts(self, blob: Blob) -> dict[str, str]:
        return {
            "ETag": blob.etag,
            "Last-Modified": formatdate(blob.modified, usegmt=True),
            "x-goog-generation": str(blob.generation),
            "Accept-Ranges": "bytes",
        }

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code></Error>".encode(), {"x-ms-error-code": code})

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Google(_Handler):
    """https://cloud.google.com/storage/docs/xml-api"""

    def do_GET(self) -> None:
        if "list-type" in self.query:
            self.list_names()
        else:
            super().do_GET()

    def do_PUT(self) -> None:
        path, query, content = self.path_asked, self.query, self.body()
        if path.split("/")[1] not in self.blobs.buckets:
            self.refuse(404, self.no_bucket)
        elif "uploadId" in query:
            self.blobs.parts[query["uploadId"]][query["partNumber"].zfill(6)] = content
            self.answer(200, headers={"ETag": f'"{query["partNumber"]}"'})
        else:
            with self.blobs.lock:
                there = self.blobs.found.get(path)
                wanted = self.headers.get("x-goog-if-generation-match")
                if wanted is not None and int(wanted) != (there.generation if there else 0):
                    self.refuse(412, "PreconditionFailed")
                    return
                blob = self.blobs.put(path, content)
            self.answer(200, headers=self.facts(blob))

    def do_POST(self) -> None:
        path, query = self.path_asked, self.query
        self.body()
        if "uploads" in query:
            name = str(len(self.blobs.parts))
            self.blobs.parts[name] = {}
            told = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            self.answer(200, told.encode())
            return
        parts = self.blobs.parts.pop(query["uploadId"])
        with self.blobs.lock:
            blob = self.blobs.put(path, b"".join(parts[name] for name in sorted(parts)))
        told = (
            f"<CompleteMultipartUploadResult><ETag>{escape(blob.etag)}</ETag></CompleteMultipartUploadResult>"
        )
        self.answer(200, told.encode(), self.facts(blob))

    def do_DELETE(self) -> None:
        self.body()
        with self.blobs.lock:
            upload = self.query.get("uploadId")
            gone: object = (
                self.blobs.found.pop(self.path_asked, None)
                if upload is None
                else self.blobs.parts.pop(upload, None)
            )
        if gone is None:
            self.refuse(404, "NoSuchKey")
        else:
            self.answer(204)

    def list_names(self) -> None:
        bucket, query = self.path_asked.strip("/"), self.query
        if bucket not in self.blobs.buckets:
            self.refuse(404, self.no_bucket)
            return
        after = max(query.get("start-after", ""), query.get("continuation-token", ""))
        delimiter = query.get("delimiter", "")
        with self.blobs.lock:
            names, following = self.blobs.listed(bucket, query.get("prefix", ""), delimiter, after)
            told = "".join(self.entry(bucket, name, delimiter) for name in names)
        if following:
            told += f"<NextContinuationToken>{escape(following)}</NextContinuationToken>"
        self.answer(200, f"<ListBucketResult>{told}</ListBucketResult>".encode())

    def entry(self, bucket: str, name: str, delimiter: str) -> str:
        if delimiter and name.endswith(delimiter):
            return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        blob = self.blobs.found[f"/{bucket}/{name}"]
        modified = f"2026-01-01T00:{blob.generation // 60 % 60:02}:{blob.generation % 60:02}.000Z"
        return (
            f"<Contents><Key>{escape(name)}</Key><Size>{len(blob.content)}</Size>"
            f"<LastModified>{modified}</LastModified><ETag>{escape(blob.etag)}</ETag></Contents>"
        )


class Azure(_Handler):
    """https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api"""

    no_bucket = "ContainerNotFound"

    def do_GET(self) -> None:
        if self.query.get("comp") == "list":
            self.list_names()
        else:
            super().do_GET()

    def do_PUT(self) -> None:
        path, query, content = self.path_asked, self.query, self.body()
        if path.split("/")[1] not in self.blobs.buckets:
            self.refuse(404, self.no_bucket)
        elif query.get("comp") == "block":
            with self.blobs.lock:
                self.blobs.parts.setdefault(path, {})[query["blockid"]] = content
            self.answer(201)
        else:
            with self.blobs.lock:
                there = self.blobs.found.get(path)
                if there is not None and self.headers.get("If-None-Match") == "*":
                    self.refuse(409, "BlobAlreadyExists")
                    return
                if (wanted := self.headers.get("If-Match")) and (there is None or there.etag != wanted):
                    self.refuse(412, "ConditionNotMet")
                    return
                if query.get("comp") == "blocklist":
                    parts = self.blobs.parts.pop(path)
                    order = [item.text or "" for item in ElementTree.fromstring(content)]
                    content = b"".join(parts[name] for name in order)
                blob = self.blobs.put(path, content)
            self.answer(201, headers=self.facts(blob))

    def do_POST(self) -> None:
        """A batch, by which clients delete: many requests in one."""
        asked = re.findall(rb"Content-ID: (\d+).*?DELETE (\S+) HTTP", self.body(), re.DOTALL)
        told = ""
        for number, path in asked:
            with self.blobs.lock:
                gone = self.blobs.found.pop(unquote(urlsplit(path.decode()).path), None)
            status = "404 Not Found\r\nx-ms-error-code: BlobNotFound" if gone is None else "202 Accepted"
            told += "--batch\r\nContent-Type: application/http\r\n"
            told += f"Content-ID: {number.decode()}\r\n\r\nHTTP/1.1 {status}\r\nServer: test\r\n\r\n"
        kind = {"Content-Type": "multipart/mixed; boundary=batch"}
        self.answer(202, f"{told}--batch--\r\n".encode(), kind)

    def list_names(self) -> None:
        bucket, query = self.path_asked.strip("/"), self.query
        if bucket not in self.blobs.buckets:
            self.refuse(404, self.no_bucket)
            return
        delimiter = query.get("delimiter", "")
        with self.blobs.lock:
            names, following = self.blobs.listed(
                bucket, query.get("prefix", ""), delimiter, query.get("marker", "")
            )
            told = "".join(self.entry(bucket, name, delimiter) for name in names)
        answer = f"<Blobs>{told}</Blobs><NextMarker>{escape(following)}</NextMarker>"
        self.answer(200, f"<EnumerationResults>{answer}</EnumerationResults>".encode())

    def entry(self, bucket: str, name: str, delimiter: str) -> str:
        if delimiter and name.endswith(delimiter):
            return f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>"
        blob = self.blobs.found[f"/{bucket}/{name}"]
        return (
            f"<Blob><Name>{escape(name)}</Name><Properties>"
            f"<Last-Modified>{formatdate(blob.modified, usegmt=True)}</Last-Modified>"
            f"<Content-Length>{len(blob.content)}</Content-Length><Content-Type>x/y</Content-Type>"
            f"<Etag>{escape(blob.etag)}</Etag></Properties></Blob>"
        )


class Web(_Handler):
    """Files of a plain web server: GET and HEAD, with ranges; its etags are weak, as those of some are."""

    no_bucket = "NoSuchKey"

    def facts(self, blob: Blob) -> dict[str, str]:
        return super().facts(blob) | {"ETag": f"W/{blob.etag}"}

    def do_POST(self) -> None:
        self.body()
        self.refuse(405, "NoSuchMethod")

    do_PUT = do_DELETE = do_PROPFIND = do_POST  # noqa: N815


@contextmanager
def blob_server(dialect: type[_Handler], blobs: Blobs) -> Iterator[int]:
    """A server for as long as the block lasts; yields its port."""
    handler = type("Handler", (dialect,), {"blobs": blobs})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield int(listening.server_address[1])
        finally:
            listening.shutdown()
