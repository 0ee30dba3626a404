"""Who waits too long says for what. Nothing is stopped: a store that comes back finds the run still there."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

_LOG = logging.getLogger(__name__)
NOTICE_SECONDS = 30.0
"""A wait of so long is worth a line, and of twice, four times ... so long another."""


class Watch:
    """Watches one thread's waiting from another one, which ends with the context."""

    def __init__(self, who: str, notice_seconds: float = NOTICE_SECONDS) -> None:
        self._who, self._notice = who, notice_seconds
        self._waiting: tuple[str, float] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="pumit-watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what may take long; `what` completes "waits for"."""
        self._waiting = what, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def _look(self) -> None:
        seen: tuple[str, float] | None = None
        limit = self._notice
        while not self._end.wait(min(self._notice / 4, 1.0)):
            waiting = self._waiting
            if waiting is not seen:
                seen, limit = waiting, self._notice
            if waiting is not None and (seconds := time.monotonic() - waiting[1]) >= limit:
                limit *= 2
                since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
                _LOG.warning("%s has waited %.0f s, since %s, for %s", self._who, seconds, since, waiting[0])
