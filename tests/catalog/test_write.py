"""Merging rows into a dataset's catalog: whole, sorted, in bytes that depend on the content alone."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA, PREVIEW_SCHEMA
from catalog.write import merge_dataset

REPOSITORY = Path(__file__).parents[2]


def row(key: str, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "demo",
        "key": key,
        "subject": "s1",
        "status": "ingested",
        "split": "train",
        "source_path": key.split("#")[0],
        "entry_hash": "e",
        "normalisation_version": 1,
        "body_part": ["head", "neck"],
        "spacing_z": 2.5,
        **changes,
    }


def preview(key: str, content: bytes = b"png") -> dict[str, Any]:
    return {"dataset": "demo", "key": key, "preview": content}


def read(corpus: Corpus) -> pa.Table:
    return pq.read_table(corpus.catalog_file("demo"), partitioning=None)


def keys(corpus: Corpus) -> list[str]:
    return list(read(corpus)["key"].to_pylist())


def preview_keys(corpus: Corpus) -> list[str]:
    return list(pq.read_table(corpus.preview_file("demo"), partitioning=None)["key"].to_pylist())


def digest(corpus: Corpus) -> tuple[str, str]:
    files = (corpus.catalog_file("demo"), corpus.preview_file("demo"))
    first, second = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return first, second


def assert_same_schema(found: pa.Schema, expected: pa.Schema) -> None:
    """Equal but for the name that Parquet gives the elements of a list."""
    assert found.equals(expected)
    assert found.metadata == expected.metadata
    assert [field.metadata for field in found] == [field.metadata for field in expected]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def test_rows_are_sorted_and_of_the_schema(corpus: Corpus) -> None:
    merge_dataset(corpus, "demo", [row("b"), row("a"), row("ä"), row("B")], [preview("b")])
    table = read(corpus)
    assert table["key"].to_pylist() == ["B", "a", "b", "ä"]
    assert_same_schema(table.schema, CATALOG_SCHEMA)
    pictures = pq.read_table(corpus.preview_file("demo"), partitioning=None)
    assert_same_schema(pictures.schema, PREVIEW_SCHEMA)
    assert sorted(path.name for path in corpus.catalog_file("demo").parent.iterdir()) == [
        "features.parquet",
        "images.parquet",
        "manifest.sha256",
        "previews.parquet",
    ]


def test_a_new_row_replaces_the_one_of_its_key_and_its_preview(corpus: Corpus) -> None:
    merge_dataset(corpus, "demo", [row("a"), row("b")], [preview("a"), preview("b")])
    merge_dataset(corpus, "demo", [row("a", status="excluded", reason="constant")], [])
    assert read(corpus)["status"].to_pylist() == ["excluded", "ingested"]
    assert preview_keys(corpus) == ["b"]


def test_a_file_read_again_with_fewer_volumes_keeps_no_old_row(corpus: Corpus) -> None:
    volumes = [row(f"cine#{number:04d}") for number in range(4)]
    merge_dataset(corpus, "demo", [*volumes, row("other")], [preview(volume["key"]) for volume in volumes])
    merge_dataset(corpus, "demo", volumes[:2], [preview("cine#0000")], reread={"cine"})
    assert keys(corpus) == ["cine#0000", "cine#0001", "other"]
    assert preview_keys(corpus) == ["cine#0000"]
    merge_dataset(corpus, "demo", [], [], reread=["cine"])
    assert keys(corpus) == ["other"]


def test_without_reread_the_volumes_of_other_parts_stay(corpus: Corpus) -> None:
    merge_dataset(corpus, "demo", [row("cine#0000")], [])
    merge_dataset(corpus, "demo", [row("cine#0001")], [])
    assert keys(corpus) == ["cine#0000", "cine#0001"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), cut=st.integers(0, 12))
def test_bytes_do_not_show_how_the_catalog_grew(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cut: int
) -> None:
    rows = [row(f"k{number}", spacing_z=number / 7) for number in range(12)]
    at_once, piecewise = (Corpus(tmp_path_factory.mktemp("corpus")) for _ in range(2))
    merge_dataset(at_once, "demo", rows, [preview(one["key"]) for one in rows])
    for part in (order[:cut], order[cut:]):
        given_rows = [rows[number] for number in part]
        as_table = pa.Table.from_pylist(given_rows, schema=CATALOG_SCHEMA)
        merge_dataset(piecewise, "demo", as_table, [preview(one["key"]) for one in given_rows])
    assert digest(at_once) == digest(piecewise)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", colour="red")], "no such columns.*colour"),
        ([row("a", subject=None)], "subject has no value"),
        ([row("a", dataset="other")], "rows of other datasets.*other"),
        ([row("a"), row("b"), row("a")], "twice.*'a'"),
        ([row("a", status="done")], "status must be one of"),
        ([row("a", split="test")], "split must be one of"),
        ([row("a", shape_d=2**40)], "too large"),
    ],
)
def test_rows_that_break_the_schema_change_nothing(
    corpus: Corpus, rows: list[dict[str, Any]], message: str
) -> None:
    merge_dataset(corpus, "demo", [row("z")], [preview("z")])
    before = digest(corpus)
    with pytest.raises(ValueError, match=message):
        merge_dataset(corpus, "demo", rows, [])
    assert digest(corpus) == before


def test_a_preview_needs_a_row(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"previews without a row.*'b'"):
        merge_dataset(corpus, "demo", [row("a")], [preview("b")])


def test_a_damaged_catalog_is_not_merged_into(corpus: Corpus) -> None:
    merge_dataset(corpus, "demo", [row("a")], [])
    os.truncate(corpus.catalog_file("demo"), 100)
    with pytest.raises(SetupError, match="is damaged"):
        merge_dataset(corpus, "demo", [row("b")], [])
    assert corpus.catalog_file("demo").stat().st_size == 100


def test_a_refusal_of_the_operating_system_keeps_the_old_files(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_dataset(corpus, "demo", [row("a")], [])
    before = digest(corpus)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        merge_dataset(corpus, "demo", [row("b")], [preview("b")])
    assert digest(corpus) == before
    assert len(list(corpus.catalog_file("demo").parent.iterdir())) == 4


MERGE_FOREVER = """
import sys
from pathlib import Path
from catalog.corpus import Corpus
from catalog.write import merge_dataset
from test_write import preview, row
for number in range(10_000):
    keys = [f"k{n:05d}" for n in range(3000)]
    rows = [row(key, message=f"round {number}") for key in keys]
    merge_dataset(Corpus(Path(sys.argv[1])), "demo", rows, [preview(key, bytes(200)) for key in keys])
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05])
def test_a_killed_merge_leaves_the_catalog_before_or_after(corpus: Corpus, delay_s: float) -> None:
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE_FOREVER, str(corpus.root)], env=os.environ | {"PYTHONPATH": path}
    )
    folder, deadline = corpus.catalog_file("demo").parent, time.monotonic() + 60
    while not corpus.catalog_file("demo").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    while not list(folder.glob(".tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()

    table = pq.read_table(corpus.catalog_file("demo"), partitioning=None, page_checksum_verification=True)
    assert table.num_rows == 3000
    assert len(set(table["message"].to_pylist())) == 1
    assert corpus.datasets() == ["demo"]
    merge_dataset(corpus, "demo", [row("k00000")], [])
    assert len(list(folder.iterdir())) == 4
