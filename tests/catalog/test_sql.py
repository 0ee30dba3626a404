"""SQL over the catalog: what it answers, and what it can not reach."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.output import SHOWN_ROWS, printable, write_csv, write_file, write_json
from catalog.schema import CATALOG_SCHEMA, SCHEMA_VERSION
from catalog.sql import TABLE_FUNCTIONS, query, select
from catalog.survey import survey_corpus
from catalog.write import merge_dataset, write_table


def row(dataset: str, key: str, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "key": key,
        "subject": f"s-{key}",
        "status": "ingested",
        "modality": "CT",
        "split": "train",
        "source_path": key,
        "entry_hash": "e",
        "normalisation_version": 1,
        **changes,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path / "corpus")
    for dataset in ("amos", "brats"):
        spacings: list[float | None] = [5.0, 0.5, None]
        rows = [
            row(dataset, f"k{at}", spacing_z=spacing, body_part=["chest", "neck"])
            for at, spacing in enumerate(spacings)
        ]
        merge_dataset(corpus, dataset, rows, [])
    return corpus


def answer(corpus: Corpus, sql: str) -> list[dict[str, Any]]:
    return pa.Table.from_batches(query(corpus, sql)).to_pylist()  # type: ignore[no-any-return]


def test_every_row_and_column_is_there(corpus: Corpus) -> None:
    rows = answer(corpus, "SELECT * FROM images ORDER BY dataset, key")
    assert [(one["dataset"], one["key"]) for one in rows] == [
        (dataset, f"k{at}") for dataset in ("amos", "brats") for at in range(3)
    ]
    assert list(rows[0]) == CATALOG_SCHEMA.names
    assert rows[0]["body_part"] == ["chest", "neck"]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("WITH a AS (SELECT count(*) n FROM images) SELECT n FROM a", [{"n": 6}]),
        (
            "SELECT DISTINCT part FROM images, unnest(body_part) t(part) ORDER BY 1",
            [{"part": "chest"}, {"part": "neck"}],
        ),
        ("SELECT median(spacing_z) m FROM images", [{"m": 2.75}]),
        ("SELECT range r FROM range(2)", [{"r": 0}, {"r": 1}]),
        ("SELECT key FROM images WHERE false", []),
    ],
)
def test_queries(corpus: Corpus, sql: str, expected: list[dict[str, Any]]) -> None:
    assert answer(corpus, sql) == expected


SECRET = "do-not-read-me"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM read_json('{secret}')",
        "SELECT * FROM read_parquet('{catalog}')",
        "SELECT * FROM parquet_metadata('{catalog}')",
        "SELECT * FROM sniff_csv('{secret}')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM '{catalog}'",
        "SELECT (SELECT count(*) FROM '{secret}')",
        "SELECT * FROM 'http://localhost:1/a.csv'",
        "SELECT * FROM read_csv('s3://bucket/a.csv')",
        "SELECT getenv('HOME')",
        "SELECT * FROM query('SELECT 1')",
        "SELECT * FROM query_table('images')",
        "SELECT * FROM json_execute_serialized_sql('{{}}')",
        "SELECT * FROM arrow_scan_dumb(1, 2, 3)",
        "SELECT * FROM python_arrow_scan(1, 2, 3)",
        "SELECT * FROM pandas_scan(1)",
        "SELECT * FROM seq_scan('images')",
        "SELECT * FROM enable_logging(storage => 'file', storage_path => '{out}')",
        "SELECT * FROM enable_profiling(save_location => '{out}')",
        "SELECT * FROM corpus",
        "SELECT * FROM previews",
        "COPY images TO '{out}'",
        "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
        "COPY images FROM '{secret}'",
        "EXPORT DATABASE '{out}'",
        "IMPORT DATABASE '{folder}'",
        "ATTACH '{out}'",
        "ATTACH ':memory:' AS other",
        "INSTALL httpfs",
        "LOAD httpfs",
        "LOAD '{out}'",
        "SET threads = 1",
        "SET enable_external_access = true",
        "RESET memory_limit",
        "PRAGMA database_list",
        "PRAGMA enable_profiling = 'json'",
        "CALL enable_logging()",
        "CREATE TABLE t AS SELECT 1",
        "CREATE SECRET s (TYPE s3)",
        "CREATE MACRO f() AS 1",
        "DROP VIEW images",
        "DELETE FROM images",
        "INSERT INTO images SELECT * FROM images",
        "UPDATE images SET key = 'x'",
        "EXPLAIN ANALYZE SELECT 1",
        "PREPARE p AS SELECT 1",
        "CHECKPOINT",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY images TO '{out}'",
        "",
    ],
)
def test_nothing_else_can_be_reached(corpus: Corpus, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text(f"a\n{SECRET}\n")
    catalog, out = corpus.catalog_file("amos"), tmp_path / "out"
    before = catalog.read_bytes()
    statement = sql.format(secret=secret, catalog=catalog, out=out, folder=tmp_path)
    with pytest.raises(SetupError) as error:
        answer(corpus, statement)
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert catalog.read_bytes() == before


@pytest.mark.parametrize("name", ["read_csv('{secret}')", "glob('{secret}')", "'{secret}'"])
def test_a_condition_is_in_the_same_sandbox(corpus: Corpus, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text(f"a\n{SECRET}\n")
    with pytest.raises(SetupError) as error:
        select(corpus, ["key"], f"key IN (SELECT a FROM {name})".format(secret=secret))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "where",
    [
        "true) UNION ALL SELECT * FROM images WHERE (true",
        "true; SELECT 1",
        "true ORDER BY key",
        "true, false",
        "count(*) > 1",
        "spacing_z <",
        "",
    ],
)
def test_a_condition_is_one_expression(corpus: Corpus, where: str) -> None:
    with pytest.raises(SetupError):
        select(corpus, ["key"], where)


def test_a_condition_keeps_the_rows_for_which_it_is_true(corpus: Corpus) -> None:
    # A null is not true; a comment at the end comments nothing else out.
    found = select(corpus, ["spacing_z", "key"], "spacing_z < 2 AND dataset = 'amos' -- thin")
    assert found.to_pylist() == [{"spacing_z": 0.5, "key": "k1"}]


def test_a_wrong_name_is_answered_with_the_right_ones(corpus: Corpus) -> None:
    names = r"modalty.*Columns of images: dataset, key, .*normalisation_version\.$"
    with pytest.raises(SetupError, match=names):
        answer(corpus, "SELECT modalty FROM images")
    with pytest.raises(SetupError, match=names):
        select(corpus, ["key"], "modalty = 'CT'")


def test_the_functions_that_may_be_called_are_named(corpus: Corpus) -> None:
    with pytest.raises(SetupError, match=rf"glob\(\) cannot be used.*{TABLE_FUNCTIONS[0]}"):
        answer(corpus, "FROM glob('*')")


def test_columns_of_one_name_must_be_told_apart(corpus: Corpus) -> None:
    with pytest.raises(SetupError, match=r"'key'.*AS"):
        answer(corpus, "SELECT key, key FROM images")


def test_a_query_that_needs_too_much_memory_is_ended(corpus: Corpus) -> None:
    with pytest.raises(SetupError, match="memory"):
        answer(corpus, "SELECT list(repeat('x', 1000) || a.range) FROM range(10000000) a")


def test_a_flipped_bit_is_found(corpus: Corpus) -> None:
    """The lowest bit of one spacing, as it lies in the file: nothing but a checksum can tell."""
    file = corpus.catalog_file("brats")
    write_table(file, pq.read_table(file, partitioning=None), compression="none", use_dictionary=False)
    column = pq.ParquetFile(file).metadata.row_group(0).column(CATALOG_SCHEMA.get_field_index("spacing_z"))
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 8] ^= 1
    file.write_bytes(data)
    assert pq.read_table(file, columns=["spacing_z"], partitioning=None)["spacing_z"].to_pylist()[1] != 0.5
    with pytest.raises(SetupError, match=rf"{file} is damaged"):
        answer(corpus, "SELECT sum(spacing_z) FROM images")
    with pytest.raises(SetupError, match=rf"{file} is damaged"):
        select(corpus, ["key"], "spacing_z > 0")
    with pytest.raises(SetupError, match=rf"{file} is damaged"):
        survey_corpus(corpus, ["modality"])


def test_a_newer_catalog_is_refused(corpus: Corpus) -> None:
    file = corpus.catalog_file("amos")
    newer = pq.read_table(file, partitioning=None).replace_schema_metadata(
        {"pumit_schema_version": str(SCHEMA_VERSION + 1)}
    )
    write_table(file, newer)
    with pytest.raises(SetupError, match=f"version {SCHEMA_VERSION + 1}"):
        answer(corpus, "SELECT 1")


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="make ingest"):
        answer(Corpus(tmp_path), "SELECT 1")


MIXED = """SELECT 'a,"b"' AS text, 1.5 AS number, NULL::INT AS nothing, ['x', 'y'] AS parts,
    'NaN'::DOUBLE AS nan, sum(range) AS total, DATE '2026-11-22' AS day FROM range(10)"""


def test_csv(corpus: Corpus) -> None:
    stream = io.BytesIO()
    write_csv(query(corpus, MIXED), stream)
    (found,) = pacsv.read_csv(io.BytesIO(stream.getvalue())).to_pylist()
    assert found["text"] == 'a,"b"'
    assert found["nothing"] is None
    assert json.loads(found["parts"]) == ["x", "y"]
    assert found["total"] == 45


def test_json(corpus: Corpus) -> None:
    stream = io.BytesIO()
    write_json(query(corpus, MIXED), stream)
    assert json.loads(stream.getvalue()) == [
        {"text": 'a,"b"', "number": 1.5, "nothing": None, "parts": ["x", "y"], "nan": None, "total": 45,
         "day": "2026-11-22"},
    ]  # fmt: skip
    for rows in (0, 1, 3):
        stream = io.BytesIO()
        write_json(query(corpus, f"SELECT range FROM range({rows})"), stream)
        assert json.loads(stream.getvalue()) == [{"range": at} for at in range(rows)]


@pytest.mark.parametrize("rows", [0, 200_000])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet", ".PARQUET"])
def test_files_hold_all_rows(corpus: Corpus, tmp_path: Path, suffix: str, rows: int) -> None:
    file = tmp_path / f"result{suffix}"
    write_file(query(corpus, f"SELECT range AS n FROM range({rows})"), file)
    read: dict[str, Callable[[], pa.Table]] = {
        ".csv": lambda: pacsv.read_csv(file),
        ".json": lambda: pa.Table.from_pylist(json.loads(file.read_text()), pa.schema([("n", pa.int64())])),
        ".parquet": lambda: pq.read_table(file),
    }
    table = read[suffix.lower()]()
    assert table.column_names == ["n"]
    assert table["n"].to_pylist() == list(range(rows))


def test_a_file_is_replaced_only_by_a_whole_one(corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "result.csv"
    file.write_text("before")
    with pytest.raises(SetupError):
        write_file(query(corpus, "SELECT error('half-way') FROM range(200000) t(n) WHERE n > 15e4"), file)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["result.csv"]
    assert file.read_text() == "before"
    with pytest.raises(SetupError, match=r"\.csv, \.json, \.parquet"):
        write_file(query(corpus, "SELECT 1"), tmp_path / "result.txt")


@pytest.mark.parametrize(("rows", "captioned"), [(0, False), (SHOWN_ROWS, False), (SHOWN_ROWS + 1, True)])
def test_a_printed_table_says_where_it_ends(corpus: Corpus, rows: int, captioned: bool) -> None:
    table = printable(query(corpus, f"SELECT range AS n, '[red]' AS colour FROM range({rows})"))
    assert table.row_count == min(rows, SHOWN_ROWS)
    assert (table.caption is not None) == captioned
