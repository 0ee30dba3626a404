"""An object store on loopback that answers late: GET and HEAD of the files below a folder, in S3's words.

    python benchmarks/server/slow_store.py FOLDER

It prints its port and runs until its input ends. The name of the bucket says after what while it answers:
`after-20-ms` holds the same as `after-0-ms`. Latency is per request and costs no thread, so any number of
requests wait at the same time. A request takes 0.2 ms of its CPU. Hundreds may connect at once: the standard
library's server lets 5 wait to be taken, and the system has those who come then try again after seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

_QUEUE = 1024
"""Connections that wait to be taken."""


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, folder: Path) -> None:
    """All requests of one connection."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        request, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = request.split(" ")
        headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        wanted = re.fullmatch(r"/after-(\d+)-ms/(.+)", unquote(urlsplit(target).path))
        if wanted:
            await asyncio.sleep(int(wanted[1]) / 1e3)
        file = folder / (wanted[2] if wanted else "")
        if not file.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            continue
        size = file.stat().st_size
        start, stop = span(headers.get("range", ""), size)
        told = [
            "HTTP/1.1 206 Partial Content" if "range" in headers else "HTTP/1.1 200 OK",
            f"Content-Length: {stop - start}",
            f"Content-Range: bytes {start}-{stop - 1}/{size}",
            f'ETag: "{size:x}"',
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


async def serve(folder: Path) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            await answer(reader, writer, folder)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=_QUEUE)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """URL of such a store, in a process of its own, so that its work is not counted as a reader's."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    asyncio.run(serve(options.folder))


if __name__ == "__main__":
    main()
