"""Conditions in SQL that look at one row of the catalog alone, so that it can be read piece by piece.

They are those of `catalog.sql`, in the same sandbox, less all that depends on other rows, on the time or on
chance: an image's answer is the same whoever asks, and how many rows come with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catalog.errors import SetupError
from catalog.schema import CATALOG_SCHEMA
from catalog.sql import VIEW, in_words, parsed, sandbox

EXAMPLE = "\"modality = 'CT' and spacing_z < 2\""

_ROW_BY_ROW = {
    *("COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "FUNCTION", "OPERATOR", "CAST", "CASE", "BETWEEN"),
    *("TYPE", "COLLATE"),
}
"""Classes of expressions that may occur."""

_UNSTABLE = {"hash"}
"""Functions whose results may differ between versions of DuckDB, which calls them consistent."""


class Conditions:
    """C conditions over the columns of CATALOG_SCHEMA."""

    columns: list[str]
    """Columns that the conditions look at, in the order of the schema."""

    def __init__(self, conditions: Sequence[str]) -> None:
        """Raises SetupError if one of them is no condition, or looks at more than a row."""
        import duckdb

        self._connection = sandbox(CATALOG_SCHEMA.empty_table())
        known = {name.casefold(): name for name in CATALOG_SCHEMA.names}
        found: set[str] = set()
        for condition in conditions:
            try:
                found |= {known[name] for name in _columns_of(self._connection, condition, known)}
                kind = self._connection.sql(f"SELECT (\n{condition}\n) FROM {VIEW}").types[0]  # noqa: S608 (checked)
                if str(kind) != "BOOLEAN":
                    raise SetupError(f"this is no condition, such as {EXAMPLE}.")
            except SetupError as error:
                raise SetupError(f"condition {condition!r}: {error}") from error
            except duckdb.Error as error:
                raise SetupError(f"condition {condition!r}: {in_words(error)}") from error
        self._conditions = list(conditions)
        self.columns = [name for name in CATALOG_SCHEMA.names if name in found]

    def of(self, table: pa.Table) -> list[npt.NDArray[np.bool_]]:
        """For each condition, which of the n rows it holds for, (n,); unknown is no.

        `table` has `columns`; texts may be dictionary arrays. Raises SetupError where a value cannot be
        computed.
        """
        import duckdb

        if not self._conditions:
            return []
        columns = self.columns or table.column_names[:1]  # a table without columns has no rows
        try:
            return self._answers(table.select(columns), self._conditions)
        except duckdb.Error as error:
            raise SetupError(f"conditions {'; '.join(self._conditions)}: {in_words(error)}") from error

    def _answers(self, table: pa.Table, conditions: Sequence[str]) -> list[npt.NDArray[np.bool_]]:
        self._connection.register(VIEW, table)
        cases = ", ".join(f"CASE WHEN (\n{condition}\n) THEN true ELSE false END" for condition in conditions)
        answers = self._connection.sql(f"SELECT {cases} FROM {VIEW}").to_arrow_table()  # noqa: S608 (checked)
        return [np.asarray(column.to_numpy(), np.bool_) for column in answers.columns]


def literal(value: str | int) -> str:
    """A constant in SQL."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _columns_of(connection: Any, condition: str, known: dict[str, str]) -> set[str]:
    """Columns in lower case; SetupError unless the condition is one, about one row."""
    tree = _without_places(parsed(connection, f"SELECT * FROM {VIEW} WHERE (\n{condition}\n)"))  # noqa: S608
    plain = _without_places(parsed(connection, f"SELECT * FROM {VIEW} WHERE (true)"))  # noqa: S608
    if len(tree["statements"]) != 1 or tree["statements"][0]["node"].get("where_clause") is None:
        raise SetupError(f"this is no condition, such as {EXAMPLE}.")
    where = tree["statements"][0]["node"].pop("where_clause")
    plain["statements"][0]["node"].pop("where_clause")
    if tree != plain:
        raise SetupError(f"this is more than a condition, such as {EXAMPLE}.")
    columns = set()
    consistent = _consistent_functions()
    for node in _nodes(where):
        kind = node.get("class")
        if kind is not None and kind not in _ROW_BY_ROW:
            raise SetupError(f"a mix looks at one row at a time, which {kind.lower()} expressions do not.")
        if kind == "FUNCTION" and node["function_name"].lower() not in consistent:
            raise SetupError(
                f"{node['function_name']}() cannot be used in a mix: it does not give one result for one row, "
                "at any time, or is unknown."
            )
        if kind == "COLUMN_REF":
            name = node["column_names"][-1].casefold()
            if name not in known or node["column_names"][:-1] not in ([], [VIEW]):
                columns_there = ", ".join(CATALOG_SCHEMA.names)
                raise SetupError(
                    f"there is no column {'.'.join(node['column_names'])}. Columns: {columns_there}."
                )
            columns.add(name)
    return columns


@functools.cache
def _consistent_functions() -> frozenset[str]:
    connection = sandbox(CATALOG_SCHEMA.empty_table())
    functions = connection.execute(
        "SELECT lower(function_name) FROM duckdb_functions() GROUP BY 1 "
        "HAVING bool_and(function_type = 'scalar' AND stability = 'CONSISTENT')"
    ).fetchall()
    return frozenset(name for (name,) in functions) - _UNSTABLE


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _without_places(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without what says where in the text a part stands."""
    for node in _nodes(tree):
        node.pop("query_location", None)
        node.pop("query_location_length", None)
    return tree
