"""Merging in pieces gives what sorting everything at once gives, to the byte."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import catalog.write
from catalog.corpus import Corpus
from catalog.manifest import NewFile, publish
from catalog.merge import SortedRuns, merged, regrouped
from catalog.scratch import NameSet
from catalog.write import merge_batches

SCHEMA = pa.schema([pa.field("key", pa.string()), pa.field("number", pa.int64())])
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table(names: list[str]) -> pa.Table:
    return pa.table([names, list(range(len(names)))], schema=SCHEMA)


def cut(names: list[str], cuts: list[int]) -> list[list[str]]:
    edges = [0, *sorted({at % (len(names) + 1) for at in cuts}), len(names)]
    return [names[start:end] for start, end in pairwise(edges)]


@many
@given(names=st.lists(keys, unique=True), cuts=st.lists(st.integers(0, 50)), held=st.integers(1, 10))
def test_runs_on_disk_come_back_sorted(
    names: list[str], cuts: list[int], held: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    runs = SortedRuns(SCHEMA, folder, held)
    for part in cut(names, cuts):
        runs.add(table(part))
    found = [key for piece in runs.sorted() for key in piece["key"].to_pylist()]
    assert found == sorted(names)
    assert not list(folder.iterdir()), "what waits on disk has no name"


@many
@given(streams=st.lists(st.lists(keys, unique=True), max_size=5), cuts=st.lists(st.integers(0, 50)))
def test_equal_keys_of_several_streams_come_together(streams: list[list[str]], cuts: list[int]) -> None:
    sorted_streams = [iter([table(part) for part in cut(sorted(names), cuts)]) for names in streams]
    pieces = [piece["key"].to_pylist() for piece in merged(sorted_streams)]
    assert [key for piece in pieces for key in piece] == sorted(key for names in streams for key in names)
    for before, after in pairwise(pieces):
        assert before[-1] < after[0]


@many
@given(names=st.lists(keys), asked=st.lists(keys | st.none()))
@example(names=[""], asked=["\0", "a\0b", None])
def test_a_set_of_names(names: list[str], asked: list[str | None]) -> None:
    members = NameSet()
    members.add(names)
    assert members.mask(pa.chunked_array([pa.array(asked, pa.string())])).to_pylist() == [
        name in names for name in asked
    ]
    assert all(name in members for name in names)


@many
@given(names=st.lists(keys, unique=True, min_size=1), cuts=st.lists(st.integers(0, 50)), rows=st.integers(1, 9))
def test_bytes_do_not_show_the_cuts_of_the_stream(
    names: list[str], cuts: list[int], rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    digests = set()
    corpus = Corpus(folder)
    for parts in ([names], cut(names, cuts)):
        whole = table(names)
        start = 0
        pieces = []
        for part in parts:
            pieces.append(whole.slice(start, len(part)))
            start += len(part)
        publish(corpus, "demo", [NewFile(corpus.split_file("demo"), pieces, SCHEMA, rows)])
        digests.add(hashlib.sha256(corpus.split_file("demo").read_bytes()).hexdigest())
    assert len(digests) == 1
    file = pq.ParquetFile(corpus.split_file("demo"))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [
        piece.num_rows for piece in regrouped([table(names)], rows)
    ]


def rows_of(numbers: list[int], message: str) -> list[dict[str, object]]:
    return [
        {
            "dataset": "demo",
            "key": f"k{number:03d}",
            "subject": "s",
            "status": "ingested",
            "split": "train",
            "source_path": f"file{number // 3}",
            "entry_hash": "e",
            "normalisation_version": 1,
            "message": message,
        }
        for number in numbers
    ]


@many
@given(
    stages=st.lists(
        st.lists(st.lists(st.integers(0, 60), unique=True, max_size=20), min_size=1, max_size=3), max_size=3
    ),
    reread=st.sets(st.integers(0, 20)),
)
def test_any_merge_gives_what_a_dictionary_would(
    stages: list[list[list[int]]], reread: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    expected: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, rows in (
            ("_GROUP_ROWS", 7),
            ("_PREVIEWS_HELD", 5),
            ("_PREVIEW_GROUP_ROWS", 4),
            ("_BATCH_ROWS", 3),
        ):
            patch.setattr(catalog.write, name, rows)
        for stage, parts in enumerate(stages):
            given_already: set[int] = set()
            batches = []
            for part in parts:
                new = [number for number in part if number not in given_already]
                given_already |= set(new)
                rows_now = rows_of(new, f"stage {stage}")
                previews = [
                    {"dataset": "demo", "key": row["key"], "preview": str(row["message"]).encode()}
                    for row in rows_now
                ]
                features = [
                    {
                        "dataset": "demo",
                        "key": row["key"],
                        "features_version": 1,
                        "voxel_hash": str(row["message"]).encode().ljust(16),
                        "pictures": b"",
                    }
                    for row in rows_now
                ]
                batches.append((rows_now, previews, features, {f"file{number}" for number in reread}))
            merge_batches(corpus, "demo", batches)
            expected = {key: told for key, told in expected.items() if int(key[1:]) // 3 not in reread} | {
                f"k{number:03d}": f"stage {stage}" for number in given_already
            }
            found = pq.read_table(corpus.catalog_file("demo"), partitioning=None)
            assert dict(zip(found["key"].to_pylist(), found["message"].to_pylist(), strict=True)) == expected
            assert found["key"].to_pylist() == sorted(expected)
            pictures = pq.read_table(corpus.preview_file("demo"), partitioning=None)
            assert pictures["key"].to_pylist() == sorted(expected)
            assert [picture.decode() for picture in pictures["preview"].to_pylist()] == [
                expected[key] for key in sorted(expected)
            ]
            hashes = pq.read_table(corpus.features_file("demo"), partitioning=None)
            assert [(row["key"], row["voxel_hash"].decode().strip()) for row in hashes.to_pylist()] == sorted(
                expected.items()
            )
            assert len(list(Path(corpus.catalog_file("demo").parent).iterdir())) == 4, "with the manifest"
