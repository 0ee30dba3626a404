"""The reason codes and their page."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ingest.reasons import EXCLUSIONS, FAILURES, ExcludedImage, FailedImage, as_markdown


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "exclusions.md"
    assert page.read_text() == as_markdown() + "\n", "run `python -m ingest.reasons > docs/exclusions.md`"


def test_codes_are_distinct() -> None:
    assert not EXCLUSIONS.keys() & FAILURES.keys()


@pytest.mark.parametrize(("outcome", "codes"), [(ExcludedImage, EXCLUSIONS), (FailedImage, FAILURES)])
def test_outcomes_know_their_codes_and_travel(
    outcome: type[ExcludedImage] | type[FailedImage], codes: dict[str, str]
) -> None:
    for code in codes:
        copy = pickle.loads(pickle.dumps(outcome(code, "what was found")))
        assert (copy.reason, copy.message) == (code, "what was found")
    with pytest.raises(ValueError, match="no_such_code"):
        outcome("no_such_code", "")
