"""The runs of a comparison, put together by all but their seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from training.downstream.compare import GridCell
from training.downstream.task import TASKS, Metric, Result, prefix_of


class Row(NamedTuple):
    """Runs that differ by their seed alone."""

    task: str
    fraction: float
    mode: str
    name: str
    results: dict[int, Result]
    """By seed."""

    def values(self, metric: Metric) -> dict[int, float]:
        """The metric as tables show it, by seed; without the runs that could not measure it."""
        return {
            seed: metric.scale * result.metrics[metric.name]
            for seed, result in self.results.items()
            if metric.name in result.metrics
        }


def rows_of(results: Iterable[tuple[GridCell, Result]]) -> list[Row]:
    """The results by all but their seed, in the order of the grid."""
    rows: dict[tuple[str, float, str, str], Row] = {}
    for each, result in results:
        cell = each.cell
        key = (cell.task, cell.fraction, cell.mode, each.name)
        rows.setdefault(key, Row(*key, results={})).results[cell.seed] = result
    return sorted(rows.values(), key=lambda row: (_task_order(row.task), row.task, row.fraction))


def headed(metric: Metric) -> str:
    return f"{metric.name} {'↑' if metric.higher_is_better else '↓'}"


def _task_order(task: str) -> int:
    return list(TASKS).index(prefix_of(task))
