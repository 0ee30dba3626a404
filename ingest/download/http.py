"""One file over HTTP: resumed where it stopped, tried again when the fault may pass, and checked at the end."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from catalog.errors import SetupError

if TYPE_CHECKING:
    import requests

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_CHUNK = 1 << 16
"""Bytes that a broken connection can cost at most."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""HTTP states that another try may cure."""

FileProgress = Callable[[int, int | None], None]
"""Called with (bytes of the file that are here, its size or None)."""


@dataclass(frozen=True)
class Remote:
    """One file on a server."""

    name: str
    """Relative path under which it is kept; unique within a dataset."""
    url: str
    size: int | None = None
    """Bytes, where the publisher tells."""
    checksum: tuple[str, str] | None = None
    """Name in hashlib and hexadecimal digest, where published."""
    into: str | None = None
    """Folder inside the dataset's."""
    unpack: bool = True
    params: Mapping[str, str] = field(default_factory=dict)


class _PassingError(Exception):
    """What another try may cure; `wait` is what the server asked for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Http:
    """How patient we are. Proxies and certificates are those of the environment (HTTPS_PROXY and so on)."""

    tries: int = 6
    """Tries in a row that bring nothing before we give up."""
    backoff: float = 1.0
    """Seconds before the second try; doubled before each further one, up to a minute."""
    timeout: float = 60.0
    """Seconds without a byte after which a connection counts as lost."""

    def json(self, url: str, params: Mapping[str, str] | None = None) -> Any:
        """The body of an answer, parsed.

        Raises:
            SetupError: refused, gone, no answer after all tries, or no JSON.
        """
        try:
            return self._text(url, params or {}).json()
        except ValueError as error:
            raise SetupError(f"{url} did not answer with JSON. Its interface may have changed.") from error

    def text(self, url: str, params: Mapping[str, str] | None = None) -> str:
        """The body of an answer as text. Raises SetupError as `json`."""
        return self._text(url, params or {}).text

    def fetch(self, remote: Remote, target: Path, progress: FileProgress) -> None:
        """Bring a file to `target`, which exists only when it is whole and its checksum is right.

        What an earlier call left in `target.part` is not fetched again, if the server can send parts and still
        has the same file.

        Raises:
            SetupError: refused, gone, wrong size or checksum, a web page instead of the file, or no progress.
            OSError: the disk.
        """
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        in_vain, most = 0, _size(part)
        while True:
            try:
                self._transfer(remote, part, progress)
                break
            except _PassingError as fault:
                # A try that begins anew and breaks earlier than the last one brings nothing.
                in_vain = 0 if _size(part) > most else in_vain + 1
                most = max(most, _size(part))
                self._wait(remote.url, in_vain, fault)
        _check(remote, part)
        part.replace(target)
        _validator_file(part).unlink(missing_ok=True)

    def _text(self, url: str, params: Mapping[str, str]) -> requests.Response:
        in_vain = 0
        while True:
            try:
                return self._get(url, params, {}, stream=False)
            except _PassingError as fault:
                in_vain += 1
                self._wait(url, in_vain, fault)

    def _wait(self, url: str, in_vain: int, fault: _PassingError) -> None:
        if in_vain >= self.tries:
            raise SetupError(
                f"{url}: {fault}, {in_vain} times in a row. Repeat the command later: it goes on where it "
                "stopped."
            ) from fault
        seconds = min(60.0, self.backoff * 2 ** max(in_vain - 1, 0))
        seconds = max(seconds, min(fault.wait or 0.0, 300.0))
        _log.info("%s: %s; trying again in %.1f s", url, fault, seconds)
        time.sleep(seconds)

    def _get(
        self, url: str, params: Mapping[str, str], headers: Mapping[str, str], *, stream: bool
    ) -> requests.Response:
        import requests

        try:
            answer = requests.get(
                url,
                params=dict(params),
                # Compression on the way would make sizes and ranges mean something else.
                headers={"User-Agent": "pumit-data", "Accept-Encoding": "identity", **headers},
                stream=stream,
                timeout=self.timeout,
            )
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise _PassingError(f"no connection ({_root_cause(error)})") from error
        except requests.RequestException as error:
            raise SetupError(f"{url} cannot be fetched: {error}.") from error
        status = answer.status_code
        if status in _PASSING:
            answer.close()
            wait = answer.headers.get("Retry-After", "")
            raise _PassingError(f"HTTP {status}", float(wait) if wait.isdecimal() else None)
        if status in (401, 403):
            raise SetupError(
                f"{url}: the server refuses (HTTP {status}). Its publisher may have put it behind a login."
            )
        if status >= 400 and status != 416:
            raise SetupError(
                f"{url}: not to be had (HTTP {status}). Its publisher may have moved it: look at the dataset's "
                "page."
            )
        return answer

    def _transfer(self, remote: Remote, part: Path, progress: FileProgress) -> None:
        """Append what is missing, or begin anew where the server cannot continue."""
        start = _resumable(remote, part)
        if start and start == remote.size:
            return
        headers: dict[str, str] = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if validator := _stored_validator(part):
                headers["If-Range"] = validator
        with self._get(remote.url, remote.params, headers, stream=True) as answer:
            total = _total(answer, start)
            if answer.status_code == 416 or (answer.status_code == 206 and _first_byte(answer) != start):
                if answer.status_code == 416 and total == start:
                    return
                part.unlink()
                raise _PassingError("the server has another file than before")
            if answer.status_code == 200:
                start = 0
                if answer.headers.get("Content-Type", "").startswith("text/html"):
                    raise SetupError(
                        f"{remote.url} answered with a web page instead of {remote.name}: a login or a licence "
                        "may stand before it. Download it with a browser."
                    )
                part.unlink(missing_ok=True)
                _store_validator(part, answer)
            self._receive(remote, answer, part, start, total, progress)

    def _receive(
        self,
        remote: Remote,
        answer: requests.Response,
        part: Path,
        start: int,
        total: int | None,
        progress: FileProgress,
    ) -> None:
        import requests

        done = start
        with part.open("ab") as file:
            try:
                for chunk in answer.iter_content(_CHUNK):
                    done += len(chunk)
                    if remote.size is not None and done > remote.size:
                        raise SetupError(
                            f"{remote.url}: more bytes than the {remote.size} that are announced. The "
                            "publisher may have changed the file: look at the dataset's page."
                        )
                    file.write(chunk)
                    progress(done, remote.size or total)
            except requests.RequestException as error:
                raise _PassingError(f"the connection broke ({_root_cause(error)})") from error
        if total is not None and done < total:
            raise _PassingError(f"the connection ended after {done} of {total} bytes")


def _resumable(remote: Remote, part: Path) -> int:
    """Bytes of an earlier call that can be built upon; what cannot is removed."""
    start = _size(part)
    usable = remote.checksum is not None or _stored_validator(part) is not None
    if start and (not usable or (remote.size is not None and start > remote.size)):
        part.unlink()
        return 0
    return start


def _check(remote: Remote, part: Path) -> None:
    """Compare size and checksum with what is published, and remove a file that is wrong."""
    size = _size(part)
    if remote.size is not None and size != remote.size:
        part.unlink(missing_ok=True)
        raise SetupError(f"{remote.url}: {size} bytes came, {remote.size} are announced. Repeat the command.")
    if remote.checksum is None:
        return
    algorithm, expected = remote.checksum
    with part.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        part.unlink()
        raise SetupError(
            f"{remote.url}: the {algorithm} of what came is {found}, published is {expected}. What came is "
            "deleted. Repeat the command; if it happens again, the publisher may have changed the file."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _total(answer: requests.Response, start: int) -> int | None:
    """Size of the whole file by an answer's headers."""
    if match := re.fullmatch(r"bytes [^/]*/(\d+)", answer.headers.get("Content-Range", "")):
        return int(match[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) + (start if answer.status_code == 206 else 0) if length.isdecimal() else None


def _first_byte(answer: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _stored_validator(part: Path) -> str | None:
    file = _validator_file(part)
    return (file.read_text(encoding="latin-1").strip() or None) if file.exists() else None


def _store_validator(part: Path, answer: requests.Response) -> None:
    """Remember which version of the file this is: a weak ETag does not say that bytes are the same."""
    etag = answer.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
    _validator_file(part).write_text(validator, encoding="latin-1")


def _root_cause(error: BaseException) -> str:
    """The innermost reason: the outer ones repeat addresses and object names."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__
