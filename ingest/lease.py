"""One writer of a dataset in an object store: who holds the lease, an object that only one can write.

It is taken and renewed by conditional writes, and ends by itself when its holder dies. The clocks of two
machines may differ by some minutes.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from catalog.errors import SetupError
from catalog.store import RemotePath, StoreError, no_conditions

LEASE_SECONDS = 300.0
_RENEWALS = 5
"""So often a lease is renewed before it would end."""
_ATTEMPTS = 3


class Lease:
    """A lease that this process holds."""

    def __init__(self, file: RemotePath, dataset: str, owner: str) -> None:
        self._file = file
        self._dataset = dataset
        self._owner = owner
        self._state: str | None = None
        self._until = 0.0
        self._ended = threading.Event()

    def check(self) -> None:
        """Raises SetupError if the lease has ended, so that nothing more may be written."""
        if time.time() >= self._until:
            raise SetupError(
                f"{self._dataset}: {self._file} could not be renewed, so that another ingest may have begun. "
                "Repeat the command."
            )

    def take(self, dead: Collection[str]) -> None:
        """Make the lease one's own. `dead`: former owners of which one is the heir."""
        content, self._state = _read(self._file)
        if _is_live(content) and content["owner"] not in dead:
            raise SetupError(
                f"{self._dataset}: another ingest into {self._file.parent.parent.parent} is running on "
                f"{content['host']}. Wait for it to end; if it was killed, try again in "
                f"{max(1, round(float(str(content['until'])) - time.time()))} s."
            )
        if not self._write(LEASE_SECONDS):
            raise SetupError(f"{self._dataset}: another ingest has just begun. Wait for it to end.")
        self._prove_conditions()

    def _prove_conditions(self) -> None:
        """Raises SetupError if the store writes what it must refuse: then nobody can hold a lease there."""
        for attempt in range(_ATTEMPTS):
            try:
                if self._file.write_if(b"{}", None) is not None:
                    raise no_conditions(self._file)
            except StoreError:
                if attempt == _ATTEMPTS - 1:
                    raise
            else:
                return

    def keep(self) -> None:
        """Renew until `end`; runs in a thread."""
        while not self._ended.wait(LEASE_SECONDS / _RENEWALS):
            try:
                if not self._write(LEASE_SECONDS):
                    self._until = 0.0
                    return
            except StoreError:
                continue  # there is time for some more attempts

    def end(self) -> None:
        """Let `keep` return."""
        self._ended.set()

    def release(self) -> None:
        """Let others have it at once. To be called when `keep` has returned."""
        if time.time() < self._until:
            self._write(0.0)

    def _write(self, seconds: float) -> bool:
        until = time.time() + seconds
        content = json.dumps({"owner": self._owner, "host": socket.gethostname(), "until": until}).encode()
        for _ in range(_ATTEMPTS):
            try:
                state = self._file.write_if(content, self._state)
            except StoreError:
                state = None
            if state is not None:
                self._state, self._until = state, until
                return True
            # It may have come through all the same, though its answer did not.
            told, found = _read(self._file)
            if told.get("owner") != self._owner and found != self._state:
                return False
            self._state = found
        return False


@contextmanager
def lease(place: RemotePath, dataset: str, folder: Path) -> Iterator[Lease]:
    """Hold the lease of a dataset.

    Args:
        place: of the corpus.
        folder: of this machine; the lease of a process that was killed here goes to the next one here.

    Raises SetupError if another process has it, here or elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{dataset}.lease").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(
                f"{dataset}: another ingest into {place} is running on this machine. Wait for it to end."
            ) from error
        handle.seek(0)
        dead, owner = handle.read().split(), secrets.token_hex(16)
        held = Lease(_lease_file(place, dataset), dataset, owner)
        handle.write(f"{owner}\n")  # before it may be needed by an heir
        handle.flush()
        held.take(dead)
        handle.truncate(0)
        handle.write(f"{owner}\n")
        handle.flush()
        thread = threading.Thread(target=held.keep, daemon=True)
        thread.start()
        try:
            yield held
        finally:
            held.end()
            thread.join()
            held.release()


def refuse_writer(place: RemotePath, dataset: str) -> None:
    """Raises SetupError while somebody writes the dataset."""
    content, _ = _read(_lease_file(place, dataset))
    if _is_live(content):
        raise SetupError(
            f"{dataset}: an ingest into {place} is running on {content['host']}. Verify when it has ended."
        )


def _lease_file(place: RemotePath, dataset: str) -> RemotePath:
    return place / "private" / "leases" / dataset


def _read(file: RemotePath) -> tuple[dict[str, object], str | None]:
    """What the lease says, if anything, and its state."""
    try:
        content, state = file.read_with_state()
    except FileNotFoundError:
        return {}, None
    try:
        told = json.loads(content)
    except ValueError:
        return {}, state
    known = isinstance(told, dict) and {"owner", "host", "until"} <= told.keys()
    return (told if known else {}), state


def _is_live(content: dict[str, object]) -> bool:
    return bool(content) and float(str(content["until"])) > time.time()
