"""docs/catalog.md is made from the schema, and its examples work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from catalog.corpus import Corpus
from catalog.schema import CATALOG_SCHEMA, DUPLICATES_SCHEMA, FEATURES_SCHEMA, PREVIEW_SCHEMA, page
from catalog.write import merge_dataset
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "catalog.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `python -m catalog.schema > docs/catalog.md`"


def test_every_column_has_a_line_with_its_meaning() -> None:
    text = PAGE.read_text()
    for field in [*CATALOG_SCHEMA, *PREVIEW_SCHEMA, *FEATURES_SCHEMA, *DUPLICATES_SCHEMA]:
        description = field.metadata[b"description"].decode().replace("|", "\\|")
        assert re.search(rf"^\| `{field.name}` \|.*{re.escape(description)} \|$", text, re.MULTILINE)


@pytest.mark.parametrize("library", ["load_catalog", "pandas", "polars", "duckdb"])
def test_the_catalog_is_read_as_the_page_says(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if f"import {library}" in block)
    row = {"subject": "s", "status": "ingested", "split": "train", "source_path": "p", "entry_hash": "e"}
    for dataset in ("amos", "brats"):
        rows = [row | {"dataset": dataset, "key": key, "normalisation_version": 1} for key in "ab"]
        merge_dataset(
            Corpus(tmp_path / "corpus"), dataset, rows, [{"dataset": dataset, "key": "a", "preview": b"x"}]
        )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    if library == "load_catalog":
        columns, keys = names["images"].column_names, names["images"]["key"].to_pylist()
    elif library == "duckdb":
        columns, keys = names["frame"].columns, [key for (key,) in names["frame"].select("key").fetchall()]
    else:
        columns, keys = list(names["frame"].columns), list(names["frame"]["key"])
    assert columns == CATALOG_SCHEMA.names
    assert sorted(keys) == ["a", "a", "b", "b"]
