"""A wait that is too long is told, ever more rarely; a short one is not."""

from __future__ import annotations

import logging
import time

import pytest

from training.watch import Watch


def test_a_long_wait_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Watch("rank 3, worker 1", notice_seconds=0.1) as watch:
        with watch.waiting("step 7"):
            time.sleep(0.7)
        for _ in range(20):
            with watch.waiting("something short"):
                time.sleep(0.01)
    told = [record.getMessage() for record in caplog.records]
    assert 1 <= len(told) <= 3, "after 0.1, 0.2 and 0.4 s"
    assert all(line.startswith("rank 3, worker 1 has waited") and line.endswith("for step 7") for line in told)
