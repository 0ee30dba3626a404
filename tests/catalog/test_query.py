"""Loading the catalog, and the fingerprint of its content."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import catalog_digests, catalog_fingerprint, fingerprint, load_catalog
from catalog.schema import CATALOG_SCHEMA
from catalog.write import merge_dataset


def row(dataset: str, key: str, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "key": key,
        "subject": f"s-{key}",
        "status": "ingested",
        "split": "train",
        "source_path": key,
        "entry_hash": "e",
        "normalisation_version": 1,
        **changes,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path)
    changes: list[dict[str, Any]] = [{}, {"split": "validation"}, {"status": "failed", "reason": "unreadable"}]
    for dataset in ("brats", "amos"):
        rows = [row(dataset, f"{number}", **change) for number, change in enumerate(changes)]
        merge_dataset(corpus, dataset, rows, [])
    return corpus


def test_the_default_is_every_ingested_image(corpus: Corpus) -> None:
    table = load_catalog(corpus)
    assert table.schema.equals(CATALOG_SCHEMA)
    assert table.select(["dataset", "key"]).to_pylist() == [
        {"dataset": dataset, "key": key} for dataset in ("amos", "brats") for key in ("0", "1")
    ]


def test_rows_and_columns_can_be_narrowed_down(corpus: Corpus) -> None:
    assert load_catalog(corpus, status=None).num_rows == 6
    assert load_catalog(corpus, status="failed")["reason"].to_pylist() == ["unreadable"] * 2
    train = load_catalog(corpus, columns=["key", "subject"], datasets=["amos"], split="train")
    assert train.to_pylist() == [{"key": "0", "subject": "s-0"}]
    assert load_catalog(corpus, columns=["key"], datasets=[]).num_rows == 0


def test_without_a_catalog_the_message_says_what_to_type(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(SetupError, match="make ingest DATASET="):
        load_catalog(Corpus(tmp_path / "elsewhere"))
    with pytest.raises(SetupError, match=r"no catalog of acdc, lidc.*`make ingest DATASET=lidc`"):
        load_catalog(corpus, datasets=["lidc", "amos", "acdc"])


def test_one_flipped_bit_in_a_page_is_noticed(corpus: Corpus) -> None:
    path = corpus.catalog_file("amos")
    metadata = pq.read_metadata(path).row_group(0)
    content = bytearray(path.read_bytes())
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        if column.path_in_schema == "subject":
            content[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"images\.parquet is damaged.*make ingest DATASET=amos"):
        load_catalog(corpus)


def test_a_flipped_bit_in_values_is_told_by_the_checksum(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    merge_dataset(corpus, "demo", [row("demo", f"{n:04d}", spacing_z=n / 7) for n in range(500)], [])
    path = corpus.catalog_file("demo")
    group = pq.read_metadata(path).row_group(0)
    column = next(
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "spacing_z"
    )
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"(?i)crc|checksum"):
        load_catalog(corpus)


@pytest.mark.parametrize("content", [b"", b"not a table", b"PAR1" * 10])
def test_a_file_that_is_no_parquet_is_called_damaged(corpus: Corpus, content: bytes) -> None:
    corpus.catalog_file("amos").write_bytes(content)
    with pytest.raises(SetupError, match="is damaged"):
        load_catalog(corpus)


def test_a_catalog_of_a_later_version_is_refused(corpus: Corpus) -> None:
    path = corpus.catalog_file("amos")
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.replace_schema_metadata({"pumit_schema_version": "999"}), path)
    with pytest.raises(SetupError, match="version 999"):
        load_catalog(corpus)
    with pytest.raises(SetupError, match="version 999"):
        merge_dataset(corpus, "amos", [row("amos", "new")], [])


# fingerprint ------------------------------------------------------------------------------------------------

cells = st.fixed_dictionaries(
    {
        "subject": st.text(max_size=5),
        "message": st.none() | st.text(max_size=5),
        "da_level": st.none() | st.integers(0, 5),
        "spacing_z": st.none() | st.floats(0.1, 10),
        "body_part": st.none() | st.lists(st.sampled_from(["head", "neck", ""]), max_size=3),
        "crop_box": st.none() | st.lists(st.integers(0, 9), max_size=3),
    }
)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(
        [row("demo", f"k{number}", **one) for number, one in enumerate(rows)], schema=CATALOG_SCHEMA
    )


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(cells, max_size=8), seed=st.integers(0, 99), cut=st.integers(0, 8))
def test_order_chunks_and_columns_do_not_show_in_the_fingerprint(
    rows: list[dict[str, Any]], seed: int, cut: int
) -> None:
    table = table_of(rows)
    shuffle = random.Random(seed)
    mixed = table.take(pa.array(shuffle.sample(range(len(rows)), len(rows)), pa.int64()))
    mixed = pa.concat_tables([mixed.slice(cut), mixed.slice(0, cut)])
    mixed = mixed.select(shuffle.sample(mixed.column_names, mixed.num_columns))
    assert fingerprint(mixed) == fingerprint(table)


@settings(max_examples=200, deadline=None)
@given(first=st.lists(cells, max_size=3), second=st.lists(cells, max_size=3))
def test_any_other_value_shows_in_the_fingerprint(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    assert (fingerprint(table_of(first)) == fingerprint(table_of(second))) == (first == second)


def test_the_fingerprint_survives_the_disk_and_the_order_of_files(corpus: Corpus) -> None:
    table = load_catalog(corpus, status=None)
    rows = table.to_pylist()
    again = pa.Table.from_pylist(rows[::-1], schema=CATALOG_SCHEMA)
    assert fingerprint(again) == fingerprint(table)
    assert fingerprint(table.slice(1)) != fingerprint(table)


def test_the_fingerprint_is_the_same_for_ever() -> None:
    rows = [{"spacing_z": 2.5, "body_part": ["head"], "da_level": 1}, {"message": "ä", "crop_box": [0, 1]}]
    table = table_of(rows).select(
        ["dataset", "key", "spacing_z", "body_part", "da_level", "message", "crop_box"]
    )
    assert fingerprint(table) == "ba82b83d9310b344d6173489ac555571e5b50aba4c3504de6fb6d38c0822e44a"


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1]])
@pytest.mark.parametrize("version", [1, 2])
def test_the_fingerprint_of_a_corpus_is_that_of_its_ingested_images(
    corpus: Corpus, order: list[int], version: int
) -> None:
    rows = [
        row("zoo", "a", body_part=["head", "neck"], spacing_z=1.5, message="ä"),
        row("zoo", "b", body_part=None, crop_box=[1, 2]),
        row("zoo", "c", status="excluded", spacing_z=9.0, body_part=["chest"]),
        row("zoo", "d", split="validation", body_part=[]),
    ]
    merge_dataset(corpus, "zoo", rows, [])
    table = pa.Table.from_pylist([rows[number] for number in order], schema=CATALOG_SCHEMA)
    if version == 1:
        table = table.drop_columns(["shard_sha256"])
    table = table.replace_schema_metadata({"pumit_schema_version": str(version)})
    pq.write_table(table, corpus.catalog_file("zoo"), row_group_size=3)
    digests = catalog_digests(corpus)
    for dataset, digest in digests.items():
        assert digest.fingerprint == fingerprint(load_catalog(corpus, datasets=[dataset]))
    assert digests["zoo"].outcomes == {"ingested": {"": 3}, "excluded": {"": 1}}
    of_others = ["dataset", "key", "status", "reason", "source_hash", "entry_hash", "normalisation_version"]
    others = load_catalog(corpus, of_others, ["zoo"], status="excluded")
    assert digests["zoo"].others == fingerprint(others)


def test_the_fingerprint_of_a_corpus_is_of_the_ingested_images_of_every_dataset(corpus: Corpus) -> None:
    before = catalog_fingerprint(corpus)
    merge_dataset(corpus, "zoo", [row("zoo", "a", status="excluded", reason="uneven_slices")], [])
    assert catalog_fingerprint(corpus) == before
    merge_dataset(corpus, "zoo", [row("zoo", "a")], [])
    with_zoo = catalog_fingerprint(corpus)
    merge_dataset(corpus, "amos", [row("amos", "0", spacing_z=2.0)], [])
    assert len({before, with_zoo, catalog_fingerprint(corpus)}) == 3


def test_the_fingerprint_of_a_damaged_corpus_is_refused(corpus: Corpus) -> None:
    path = corpus.catalog_file("amos")
    column = pq.read_metadata(path).row_group(0).column(CATALOG_SCHEMA.get_field_index("subject"))
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"images\.parquet is damaged.*make ingest DATASET=amos"):
        catalog_fingerprint(corpus)
    with pytest.raises(SetupError, match="make ingest DATASET="):
        catalog_fingerprint(Corpus(path))
