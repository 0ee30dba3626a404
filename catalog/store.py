"""A place that may be a folder or the URL of an object store, and the objects of the latter.

What tells the kinds of stores apart is in `catalog.providers`. An object is there whole or not at all; what a
timeout, a dropped connection or a 5xx cut short is asked for again.
"""

from __future__ import annotations

import errno
import functools
import io
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from catalog import providers
from catalog.errors import SetupError
from catalog.providers import PROVIDERS, Provider
from catalog.providers import library as _library

_T = TypeVar("_T")

_CONNECT_SECONDS = 10
STALL_SECONDS = 30
"""A connection that brings nothing for so long is given up, and the request made again."""
RETRIES = 5
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5
_BLOCK = 8 << 20
"""Bytes of one request, down or up: small enough to come through a slow line before it counts as stalled."""
_UPLOADS_AT_ONCE = 4
_NAMES_AT_ONCE = 1000
GAP = 1 << 17
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

    scheme: str
    """One of `catalog.providers.PROVIDERS`."""
    bucket: str
    """Or container, or host."""
    key: str
    """Without a slash at either end; empty for the whole bucket."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def provider(self) -> Provider:
        return PROVIDERS[self.scheme]

    @property
    def is_web(self) -> bool:
        """On a plain web server: neither listed nor written."""
        return self.provider.is_web

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return replace(self, key=self.key.rpartition("/")[0])

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """ValueError if it does not lie below `other`."""
        if (self.scheme, self.bucket) != (other.scheme, other.bucket):
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
        return next(self.walk(), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """Objects and prefixes one level below."""
        obstore = _library()
        self._refuse_web("a web server does not tell what lies in a folder")
        found = self._asked(lambda client: obstore.list_with_delimiter(client, self._prefix))
        yield from (replace(self, key=prefix.rstrip("/")) for prefix in found["common_prefixes"])
        yield from (replace(self, key=item["path"]) for item in found["objects"])

    def files(self) -> list[str]:
        """Names of the objects one level below, without what lies deeper."""
        obstore = _library()
        self._refuse_web("a web server does not tell what lies in a folder")
        found = self._asked(lambda client: obstore.list_with_delimiter(client, self._prefix))
        names = (item["path"][len(self._prefix or "") :] for item in found["objects"])
        return [name for name in names if name]  # some tools make an empty object of the name of a folder

    def walk(self) -> Iterator[ObjectInfo]:
        """All objects below by name, page by page."""
        obstore = _library()
        self._refuse_web("a web server does not tell what lies in a folder")
        start = len(self._prefix or "")
        last: str | None = None
        pages: Iterator[Any] | None = None

        def page(client: Any) -> Any:
            """The next one; after a fault, a new listing goes on where the last one broke off."""
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(client, self._prefix, offset=last, chunk_size=_NAMES_AT_ONCE))
            try:
                return next(pages, [])
            except BaseException:
                pages = None
                raise

        while found := self._asked(page):
            for item in found:
                yield ObjectInfo(item["path"][start:], item["size"], item["last_modified"], item["e_tag"] or "")
            last = found[-1]["path"]

    def size(self) -> int:
        """Bytes; FileNotFoundError if there is no such object."""
        return self._head().size

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file that can be read from any position; it must not be replaced meanwhile."""
        if mode != "rb":
            raise ValueError(f"an object is opened for reading only, not {mode!r}")
        return io.BufferedReader(_ObjectReader(self), _BLOCK)

    def read_bytes(self) -> bytes:
        return self.read_with_state()[0]

    def read_with_state(self) -> tuple[bytes, str]:
        """Content, and what `write_if` knows its state by."""
        obstore = _library()

        def get(client: Any) -> tuple[bytes, str]:
            answer = obstore.get(client, self.key)
            return answer.bytes().to_bytes(), answer.meta[self._state_name] or ""

        return self._asked(get)

    def ranges(self, starts: Sequence[int], stops: Sequence[int]) -> list[memoryview]:
        """Parts of the object, asked for ten at a time; FileNotFoundError if there is no such object.

        Parts with no more than `GAP` bytes between them come in one answer, of which they are views. They are
        of one version only if the object is never replaced.
        """
        obstore = _library()

        def get(client: Any) -> list[memoryview]:
            parts = obstore.get_ranges(client, self.key, starts=starts, ends=stops, coalesce=GAP)
            return [memoryview(part) for part in parts]

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
        self._refuse_web("a web server is only read from")
        self._asked(
            lambda client: obstore.put(
                client, self.key, content, chunk_size=_BLOCK, max_concurrency=_UPLOADS_AT_ONCE
            )
        )

    def write_if(self, content: bytes, state: str | None) -> str | None:
        """Write if the object still is what it was: in this `state`, or absent where that is None.

        Returns the new state, or None if another was faster. Raises SetupError if the store knows no such
        condition.
        """
        obstore = _library()
        self._refuse_web("a web server is only read from")
        mode: Any = "create" if state is None else {self._state_name: state}
        errors = obstore.exceptions
        faster = (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError)

        def put(client: Any) -> str | None:
            try:
                done: str | None = obstore.put(client, self.key, content, mode=mode)[self._state_name]
            except faster as error:
                if _lacks_container(str(error)):
                    raise store_error(self, str(error)) from None
                return None
            except (errors.NotSupportedError, NotImplementedError):
                raise no_conditions(self) from None
            return done

        return self._asked(put, again=False)

    def unlink(self) -> None:
        """Delete the object, if it is there."""
        obstore = _library()
        self._refuse_web("a web server is only read from")
        with suppress(FileNotFoundError):
            self._asked(lambda client: obstore.delete(client, self.key))

    @property
    def _state_name(self) -> str:
        return "version" if self.provider.versions else "e_tag"

    def _refuse_web(self, why: str) -> None:
        if self.is_web:
            forms = ", ".join(dict.fromkeys(kind.form for kind in PROVIDERS.values() if not kind.is_web))
            raise StoreError(errno.EROFS, f"{why}; give a folder or one of {forms}", str(self))

    @property
    def _prefix(self) -> str | None:
        return f"{self.key}/" if self.key else None

    def _head(self) -> ObjectInfo:
        obstore = _library()
        return _info(self._asked(lambda client: obstore.head(client, self.key)))

    def _read(self, start: int, stop: int, expected: ObjectInfo) -> bytes:
        """Bytes of the version of the object that is `expected`."""
        obstore = _library()
        # A web server's etag may be a weak one, which no condition holds for.
        condition = {} if self.is_web else {"if_match": expected.etag}

        def get(client: Any) -> bytes:
            answer = obstore.get(client, self.key, options={"range": (start, stop), **condition})
            if self.is_web and _info(answer.meta) != expected:
                raise store_error(self, "status code 412")
            content: bytes = answer.bytes().to_bytes()
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
                return request(_client(self.scheme, self.bucket))
            except FileNotFoundError as error:
                if _lacks_container(str(error)):
                    raise store_error(self, str(error)) from None
                raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self)) from None
            except errors.BaseError as error:
                exhausted = re.search(r"after \d+ retries", str(error)) or _status(str(error))
                broke_off = isinstance(error, errors.GenericError) and not exhausted
                if not (again and broke_off) or attempt == RETRIES:
                    raise store_error(self, str(error)) from None
            time.sleep(min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS))
        raise AssertionError("the last attempt returns or raises")


_SERVERS_OF_CREDENTIALS = ("169.254.", "metadata.google.internal")
"""Where the libraries look in vain for the identity of a cloud's machine, if nothing else names a user."""

Location: TypeAlias = "Path | RemotePath"


def location(text: str | Path) -> Location:
    """A folder, or the place that a URL names, such as `s3://bucket/prefix`.

    Raises SetupError for a URL of another kind.
    """
    if isinstance(text, Path) or "://" not in text:
        return Path(text)
    return RemotePath(*providers.parse(text))


def folder(text: str | Path) -> Path:
    """A folder; SetupError for a URL, of which a command would make a strange folder."""
    if "://" in str(text):
        raise SetupError(f"{text}: give a folder on this machine; `download` and `add` write there alone.")
    return Path(text)


def store_error(path: RemotePath, text: str) -> StoreError:
    """What a library's `text` about an object means, and what to do. The text itself may quote credentials."""
    code, provider = _status(text), path.provider
    if _lacks_container(text):
        return StoreError(
            errno.ENOENT,
            f"there is no {provider.container} {path.bucket}; make it, or correct the URL",
            str(path),
        )
    if any(server in text for server in _SERVERS_OF_CREDENTIALS):
        why = f"no credentials were found; {provider.credentials}"
        return StoreError(errno.EACCES, why, str(path))
    if code in (401, 403) or "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text:
        return StoreError(errno.EACCES, f"access denied; {provider.credentials}", str(path))
    if code == 412:
        return StoreError(errno.ESTALE, "it was replaced while it was read", str(path))
    if "Range request not supported" in text:
        why = "the server does not give parts of files (range requests), as nginx, Apache and all stores do"
        return StoreError(errno.EIO, f"{why}; publish the corpus with one of these", str(path))
    if code:
        why = f"the store answered with status {code}, also when asked again"
    else:
        why = "the store does not answer, or breaks off, also when asked again"
    return StoreError(errno.EIO, f"{why}; is {provider.endpoint or 'the network'} up and reachable?", str(path))


def no_conditions(path: RemotePath) -> SetupError:
    """The error for a store of which two writers could write one object at a time."""
    return SetupError(
        f"{path}: this store does not heed the conditions of a write (If-None-Match, If-Match), and so cannot "
        "keep two ingests from writing one dataset. Ingest into a folder and copy it there."
    )


def _lacks_container(text: str) -> bool:
    return "NoSuchBucket" in text or "ContainerNotFound" in text


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"], meta["e_tag"] or "")


def _status(text: str) -> int:
    """HTTP status that a library's message quotes; 0 if none."""
    found = re.search(r"(?:status|response)[ _]code\D{0,3}(\d{3})", text)
    return int(found[1]) if found else 0


class _ObjectReader(io.RawIOBase):
    """Reads ranges of one version of an object."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._version = path._head()
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._version.size}[whence]
        return self._at

    def readall(self) -> bytes:
        """The rest, in large requests: the inherited one makes a request for every 8 kB."""
        blocks = []
        while (count := min(_BLOCK, self._version.size - self._at)) > 0:
            blocks.append(self._path._read(self._at, self._at + count, self._version))
            self._at += count
        return b"".join(blocks)

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._version.size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._path._read(self._at, self._at + count, self._version)
        self._at += count
        return count


def _client(scheme: str, bucket: str) -> Any:
    return _client_of(scheme, bucket, providers.environment(scheme))


@functools.cache
def _client_of(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """One for each process, bucket and environment."""
    return providers.client(
        scheme,
        bucket,
        {
            "client_options": {
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=STALL_SECONDS),
                "timeout": timedelta(seconds=20 * STALL_SECONDS),
            },
            "retry_config": {
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=(RETRIES + 1) * STALL_SECONDS),
                "backoff": {
                    "init_backoff": timedelta(seconds=_FIRST_PAUSE_SECONDS),
                    "max_backoff": timedelta(seconds=_LONGEST_PAUSE_SECONDS),
                    "base": 2,
                },
            },
        },
    )
