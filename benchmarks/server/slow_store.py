"""An object store on loopback that answers late: GET and HEAD of the files below a folder, in S3's words.

    python benchmarks/server/slow_store.py FOLDER [--latency-ms 50]

It prints its port and runs until its input ends. Latency is per request and costs no thread, so any number of
requests wait at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, folder: Path, wait: float) -> None:
    """All requests of one connection. The first component of a path, the bucket, may be any."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        await asyncio.sleep(wait)
        request, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = request.split(" ")
        headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        file = folder / unquote(urlsplit(target).path).lstrip("/").partition("/")[2]
        if not file.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            continue
        size = file.stat().st_size
        start, stop = span(headers.get("range", ""), size)
        told = [
            "HTTP/1.1 206 Partial Content" if "range" in headers else "HTTP/1.1 200 OK",
            f"Content-Length: {stop - start}",
            f"Content-Range: bytes {start}-{stop - 1}/{size}",
            'ETag: "1"',
            "Last-Modified: Sun, 22 Nov 2026 00:00:00 GMT",
        ]
        writer.write("\r\n".join([*told, "\r\n"]).encode())
        if method == "GET":
            with file.open("rb") as content:
                content.seek(start)
                writer.write(content.read(stop - start))
        await writer.drain()


def span(header: str, size: int) -> tuple[int, int]:
    """(start, stop) of a Range header; the whole without one."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not found:
        return 0, size
    if not found[1]:
        return max(size - int(found[2]), 0), size
    return int(found[1]), min(int(found[2] or size) + 1, size)


async def serve(folder: Path, wait: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer, folder, wait)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0)
    options = parser.parse_args()
    asyncio.run(serve(options.folder, options.latency_ms / 1e3))


if __name__ == "__main__":
    main()
