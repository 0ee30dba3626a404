"""SQL over the catalog, in a sandbox: one SELECT at a time, and nothing within reach but the view `images`.

DuckDB executes, pyarrow reads: so every page's checksum is compared, and DuckDB itself needs no access to
files. Its settings shut out files, network, extensions, Python's variables and changes of the settings. Since
some of its table functions take addresses in memory, those that may be called are listed here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import check_version, dataset_ids, load_dataset
from catalog.schema import CATALOG_SCHEMA

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

VIEW = "images"
"""The one table there is: all rows of the catalog, with the columns of CATALOG_SCHEMA."""
MEMORY_LIMIT = "1GB"
TABLE_FUNCTIONS = ("generate_series", "json_each", "json_tree", "range", "repeat", "unnest")

_BATCH_ROWS = 65_536
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "temp_directory": "",  # nothing is spilled to disk
    "memory_limit": MEMORY_LIMIT,
}


def query(corpus: Corpus, sql: str) -> Iterator[pa.RecordBatch]:
    """Yield the result of one SELECT over `images`, at least one batch of it (of no rows, if there are none).

    Raises SetupError if the statement is wrong (the message names the columns that exist), is no SELECT, calls
    a table function that is not in TABLE_FUNCTIONS, needs more than MEMORY_LIMIT or has two columns of one
    name; if a file of the catalog is damaged; or as `catalog.query.dataset_ids`.
    """
    connection = _sandbox(corpus)
    with _explained(corpus), _interruptible(connection) as run:
        _check(connection, sql)
        reader = run(lambda: connection.sql(sql).to_arrow_reader(_BATCH_ROWS))
        names = reader.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SetupError(f"the result has several columns {twice[0]!r}: name them apart with AS.")
        yield pa.RecordBatch.from_pylist([], schema=reader.schema)
        while (batch := run(lambda: next(reader, None))) is not None:
            yield batch


def select(corpus: Corpus, columns: Sequence[str], where: str) -> pa.Table:
    """The columns of the rows for which `where`, a condition in SQL over the columns of `images`, is true.

    Raises SetupError as `query`.
    """
    connection = _sandbox(corpus)
    with _explained(corpus), _interruptible(connection) as run:
        _check(connection, f"SELECT * FROM {VIEW} WHERE (\n{where}\n)")  # noqa: S608 (the user's own SQL, boxed in)
        # `filter` takes an expression and nothing behind it, whatever brackets it closes.
        rows = connection.view(VIEW).filter(where).select(*columns)
        return run(rows.to_arrow_table).select(list(columns))


def _sandbox(corpus: Corpus) -> DuckDBPyConnection:
    files = [corpus.catalog_file(dataset) for dataset in dataset_ids(corpus)]
    for file in files:
        check_version(file)
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    images = ds.dataset(
        [str(file) for file in files],
        schema=CATALOG_SCHEMA,
        format=ds.ParquetFileFormat(default_fragment_scan_options=options),
    )
    return sandbox(images)


def sandbox(images: pa.Table | ds.Dataset) -> DuckDBPyConnection:
    """A connection that sees VIEW, which is `images`, and nothing else."""
    import duckdb

    connection = duckdb.connect(":memory:", config=_SETTINGS | {"threads": str(os.cpu_count() or 1)})
    connection.register(VIEW, images)
    connection.execute("SET lock_configuration = true")
    return connection


def _check(connection: DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if [statement.type.name for statement in statements] != ["SELECT"]:
        raise SetupError(f"one SELECT statement is needed, got {sql.strip()!r}. The catalog can only be read.")
    tree = parsed(connection, sql)
    for name in _table_functions(tree):
        if name not in TABLE_FUNCTIONS:
            allowed = ", ".join(TABLE_FUNCTIONS)
            raise SetupError(
                f"{name}() cannot be used here: the only table is {VIEW}, the only functions {allowed}."
            )


def parsed(connection: DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """The tree of a SELECT statement, as DuckDB's parser gives it. Raises SetupError if it is none."""
    (serialized,) = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchall()[0]
    tree: dict[str, Any] = json.loads(serialized)
    if tree["error"]:
        raise SetupError(f"{tree['error_message']}. Write it as one plain SELECT statement.")
    return tree


def _table_functions(tree: Any) -> Iterator[str]:
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if node.get("type") == "TABLE_FUNCTION":
                yield str(node["function"]["function_name"]).lower()
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


@contextmanager
def _interruptible(connection: DuckDBPyConnection) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs calls beside the main thread: while DuckDB computes there, no signal would be looked at."""
    with ThreadPoolExecutor(1) as thread:

        def run(call: Callable[[], Any]) -> Any:
            running = thread.submit(call)
            try:
                return running.result()
            except BaseException:
                connection.interrupt()
                raise

        yield run


@contextmanager
def _explained(corpus: Corpus) -> Iterator[None]:
    """Turn an error of DuckDB, or of the reader below it, into one line."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise SetupError(
            f"the query needs more than {MEMORY_LIMIT} of memory. Select fewer columns or rows, or aggregate."
        ) from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        if "stream registered as" in str(error):
            # The reader's own words name no file: reading one after the other ends at the damaged one.
            for dataset in dataset_ids(corpus):
                load_dataset(corpus, dataset)
        raise SetupError(in_words(error)) from error


def in_words(error: Exception) -> str:
    """What DuckDB has to say, in one line, with the columns there are where it is about names or grammar."""
    import duckdb

    message = " ".join(str(error).split())
    what = re.sub("^[A-Z][A-Za-z ]*Error: |(Candidate|Did you mean|LINE [0-9]+:).*", "", message).strip()
    what = what.rstrip(".!") + "."
    if isinstance(error, duckdb.BinderException | duckdb.CatalogException | duckdb.ParserException):
        what += f" Columns of {VIEW}: {', '.join(CATALOG_SCHEMA.names)}."
    return what
