"""A place that may be a folder or the URL of an S3-compatible object store, and the objects of the latter.

Endpoint, region and credentials come from the environment, by the names that every S3 tool knows:
AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN. An object is there
whole or not at all; what a timeout, a dropped connection or a 5xx cut short is asked for again.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from catalog.errors import SetupError

_T = TypeVar("_T")

_SCHEME = "s3://"
_CONNECT_SECONDS = 10
STALL_SECONDS = 30
"""A connection that brings nothing for so long is given up, and the request made again."""
RETRIES = 5
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5
_BLOCK = 8 << 20
"""Bytes of one request, down or up: small enough to come through a slow line before it counts as stalled."""
_UPLOADS_AT_ONCE = 4
_GAP = 1 << 17
"""Bytes between two wanted ranges that are read along, for another request takes longer."""


class StoreError(OSError):
    """An object store did not do what was asked, after all attempts. The message holds no credentials."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells of an object."""

    name: str
    """Relative to what was listed, with forward slashes."""
    size: int
    modified: datetime
    etag: str
    """Changes with the content."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """An object, or the objects that share a prefix: what a reader needs of `pathlib.Path`, over HTTP.

    All methods raise StoreError when the store does not answer or denies access. Cheap to pickle: each process
    has connections of its own.
    """

    bucket: str
    key: str
    """Without a slash at either end; empty for the whole bucket."""

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """ValueError if it does not lie below `other`."""
        if self.bucket != other.bucket:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(self.key).relative_to(other.key)

    def is_file(self) -> bool:
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether an object has a name below this one."""
        return next(self._page(None), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """Objects and prefixes one level below."""
        obstore = _library()
        found = self._asked(lambda client: obstore.list_with_delimiter(client, self._prefix))
        yield from (RemotePath(self.bucket, prefix.rstrip("/")) for prefix in found["common_prefixes"])
        yield from (RemotePath(self.bucket, item["path"]) for item in found["objects"])

    def walk(self) -> Iterator[ObjectInfo]:
        """All objects below by name, page by page."""
        last: str | None = None
        while True:
            page = list(self._page(last))
            yield from page
            if not page:
                return
            last = page[-1].name

    def size(self) -> int:
        """Bytes; FileNotFoundError if there is no such object."""
        return self._head()[0]

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file that can be read from any position; it must not be replaced meanwhile."""
        if mode != "rb":
            raise ValueError(f"an object is opened for reading only, not {mode!r}")
        return io.BufferedReader(_ObjectReader(self), _BLOCK)

    def read_bytes(self) -> bytes:
        return self.read_with_etag()[0]

    def read_with_etag(self) -> tuple[bytes, str]:
        """Content, and what tells it from later ones."""
        obstore = _library()

        def get(client: Any) -> tuple[bytes, str]:
            answer = obstore.get(client, self.key)
            return answer.bytes().to_bytes(), answer.meta["e_tag"] or ""

        return self._asked(get)

    def ranges(self, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Parts of the object, asked for at the same time; FileNotFoundError if there is no such object.

        Neighbours come in one answer. They are of one version only if the object is never replaced.
        """
        obstore = _library()

        def get(client: Any) -> list[bytes]:
            parts = obstore.get_ranges(client, self.key, starts=starts, ends=stops, coalesce=_GAP)
            return [part.to_bytes() for part in parts]

        return self._asked(get)

    def end(self, count: int) -> bytes:
        """The last `count` bytes of the object, or all of a smaller one, in one request where the store can."""
        obstore = _library()
        errors = obstore.exceptions

        def get(client: Any) -> bytes:
            try:
                answer = obstore.get(client, self.key, options={"range": {"suffix": count}})
                content: bytes = answer.bytes().to_bytes()
            except errors.NotSupportedError:  # as Azure's
                size = obstore.head(client, self.key)["size"]
                part = obstore.get_range(client, self.key, start=max(size - count, 0), end=size)
                content = part.to_bytes()
            return content

        return self._asked(get)

    def download(self, target: Path) -> None:
        """Copy the object into a file; one version of it, or an error."""
        with self.open() as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK)

    def write(self, content: bytes | Path) -> None:
        """Replace the object whole."""
        obstore = _library()
        self._asked(
            lambda client: obstore.put(
                client, self.key, content, chunk_size=_BLOCK, max_concurrency=_UPLOADS_AT_ONCE
            )
        )

    def write_if(self, content: bytes, etag: str | None) -> str | None:
        """Write if the object still is what it was: `etag`, or absent where that is None.

        Returns the new etag, or None if another was faster.
        """
        obstore = _library()
        mode: Any = "create" if etag is None else {"e_tag": etag}
        errors = obstore.exceptions
        faster = (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError)

        def put(client: Any) -> str | None:
            try:
                done: str | None = obstore.put(client, self.key, content, mode=mode)["e_tag"]
            except faster:
                return None
            return done

        return self._asked(put, again=False)

    def unlink(self) -> None:
        """Delete the object, if it is there."""
        obstore = _library()
        self._asked(lambda client: obstore.delete(client, self.key))

    @property
    def _prefix(self) -> str | None:
        return f"{self.key}/" if self.key else None

    def _page(self, last: str | None) -> Iterator[ObjectInfo]:
        """The objects below that follow the one of the name `last`: as many as one answer tells."""
        obstore = _library()
        start = len(self._prefix or "")
        after = None if last is None else f"{self._prefix or ''}{last}"
        page: list[Any] = self._asked(
            lambda client: next(iter(obstore.list(client, self._prefix, offset=after)), [])
        )
        for item in page:
            yield ObjectInfo(item["path"][start:], item["size"], item["last_modified"], item["e_tag"] or "")

    def _head(self) -> tuple[int, str]:
        obstore = _library()
        found = self._asked(lambda client: obstore.head(client, self.key))
        return found["size"], found["e_tag"] or ""

    def _read(self, start: int, stop: int, etag: str) -> bytes:
        obstore = _library()
        options = {"range": (start, stop), "if_match": etag}

        def get(client: Any) -> bytes:
            content: bytes = obstore.get(client, self.key, options=options).bytes().to_bytes()
            return content

        return self._asked(get)

    def _asked(self, request: Callable[[Any], _T], *, again: bool = True) -> _T:
        """The answer to a request, in terms of this module's errors.

        The library itself repeats what is safe to repeat as long as no answer has begun. `again` repeats the
        rest: an answer that broke off, and a deletion.
        """
        errors = _library().exceptions
        for attempt in range(RETRIES + 1):
            try:
                return request(_client(self.bucket))
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self)) from None
            except errors.BaseError as error:
                exhausted = re.search(r"after \d+ retries", str(error)) or _status(str(error))
                broke_off = isinstance(error, errors.GenericError) and not exhausted
                if not (again and broke_off) or attempt == RETRIES:
                    raise store_error(self, str(error)) from None
            time.sleep(min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS))
        raise AssertionError("the last attempt returns or raises")


Location: TypeAlias = "Path | RemotePath"


def location(text: str | Path) -> Location:
    """A folder, or the place that a URL names: `s3://bucket/prefix`.

    Raises SetupError for a URL of another kind.
    """
    if isinstance(text, Path) or "://" not in text:
        return Path(text)
    match = re.fullmatch(r"s3://([^/?#]+)/*([^?#]*)", text)
    if match is None:
        raise SetupError(
            f"{text} is no place for a corpus or raw images: give a folder, or s3://BUCKET/PREFIX. Any "
            "S3-compatible store will do: AWS_ENDPOINT_URL says where it is."
        )
    key = "/".join(filter(None, match[2].split("/")))
    if {".", ".."} & set(key.split("/")):
        raise SetupError(f"{text} must not have '.' or '..' in it.")
    return RemotePath(match[1], key)


def folder(text: str | Path) -> Path:
    """A folder; SetupError for a URL, of which a command would make a strange folder."""
    if "://" in str(text):
        raise SetupError(f"{text}: give a folder on this machine. Of stores, only ingest reads raw images.")
    return Path(text)


def endpoint() -> str | None:
    """URL of the store; None for that of Amazon."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region() -> str | None:
    """Region of the store. Those who run their own rarely name one, and any will do there."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or ("us-east-1" if endpoint() else None)


def tensorstore_kvstore(path: RemotePath) -> dict[str, Any]:
    """Where TensorStore finds the objects below `path`."""
    # The library's default looks for ~/.aws first, and complains on stderr that there is none.
    kind = "environment" if "AWS_ACCESS_KEY_ID" in os.environ else "default"
    spec = {"driver": "s3", "bucket": path.bucket, "path": f"{path.key}/", "aws_credentials": {"type": kind}}
    named = {"endpoint": endpoint(), "aws_region": region()}
    return spec | {name: value for name, value in named.items() if value is not None}


def tensorstore_context() -> dict[str, Any]:
    """How often TensorStore asks again. Call it before the first request: patience goes by environment."""
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(STALL_SECONDS))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    return {
        "s3_request_retries": {
            "max_retries": RETRIES,
            "initial_delay": f"{_FIRST_PAUSE_SECONDS}s",
            "max_delay": f"{_LONGEST_PAUSE_SECONDS}s",
        }
    }


def store_error(path: RemotePath, text: str) -> StoreError:
    """What a library's `text` about an object means, and what to do. The text itself may quote credentials."""
    code = _status(text)
    if "NoSuchBucket" in text:
        return StoreError(
            errno.ENOENT, f"there is no bucket {path.bucket}; make it, or correct the URL", str(path)
        )
    if code in (401, 403) or "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text:
        why = "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of that user"
        return StoreError(errno.EACCES, why, str(path))
    if code == 412:
        return StoreError(errno.ESTALE, "it was replaced while it was read", str(path))
    if code:
        why = f"the store answered with status {code}, also when asked again"
    else:
        why = "the store does not answer, or breaks off, also when asked again"
    return StoreError(errno.EIO, f"{why}; is {endpoint() or 'the network'} up and reachable?", str(path))


def _status(text: str) -> int:
    """HTTP status that a library's message quotes; 0 if none."""
    found = re.search(r"(?:status|response)[ _]code\D{0,3}(\d{3})", text)
    return int(found[1]) if found else 0


class _ObjectReader(io.RawIOBase):
    """Reads ranges of one version of an object."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._size, self._etag = path._head()
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._path._read(self._at, self._at + count, self._etag)
        self._at += count
        return count


def _library() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise SetupError(
            "an object store takes the package obstore. Install it: pip install 'pumit-data[remote]'."
        ) from error
    return obstore


def _client(bucket: str) -> Any:
    return _client_of(bucket, endpoint(), region())


@functools.cache
def _client_of(bucket: str, url: str | None, where: str | None) -> Any:
    given = {"endpoint": url, "region": where}
    return _library().store.S3Store(
        bucket,
        **{name: value for name, value in given.items() if value is not None},
        client_options={
            "allow_http": (url or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=STALL_SECONDS),
            "timeout": timedelta(seconds=20 * STALL_SECONDS),
        },
        retry_config={
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=(RETRIES + 1) * STALL_SECONDS),
            "backoff": {
                "init_backoff": timedelta(seconds=_FIRST_PAUSE_SECONDS),
                "max_backoff": timedelta(seconds=_LONGEST_PAUSE_SECONDS),
                "base": 2,
            },
        },
    )
