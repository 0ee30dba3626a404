"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def samples() -> Path:
    """The real images shipped with the repository."""
    return REPOSITORY / "samples"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Numeric references and further real images, which lie beside some checkouts."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder with numeric references beside this checkout")
    return folder
