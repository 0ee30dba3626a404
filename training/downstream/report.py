"""What a comparison shows: tables in Markdown and HTML, curves over the share of labels, figures in JSON.

report.md, report.html    mean and deviation over seeds, paired tests, the paper's figures beside
curves.png                the first metric over the share of labels
results.csv               a line for each run
summary.json              the rows of the tables
"""

from __future__ import annotations

import csv
import importlib.resources
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from training.downstream.compare import Grid, GridCell, Outcome
from training.downstream.curves import draw_curves
from training.downstream.paired import Paired, compare_paired, holm, mean_and_deviation, smallest_p
from training.downstream.rows import Row, headed, rows_of
from training.downstream.task import Metric, Result, prefix_of, task_of
from training.run import write_json

SIGNIFICANT = 0.05


class PairedTest(NamedTuple):
    """A start against the baseline."""

    row: Row
    baseline: Row
    metric: Metric
    paired: Paired
    p_t_holm: float
    p_wilcoxon_holm: float


class Table(NamedTuple):
    """A table of texts."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def result_lines(result: Result) -> list[str]:
    """A finished run in a few lines."""
    cell = result.cell
    figures = ", ".join(
        f"{metric.name} {metric.scale * result.metrics[metric.name]:.2f}"
        for metric in task_of(cell.task).METRICS
        if metric.name in result.metrics
    )
    chosen = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in result.chosen.items())
    return [
        f"{cell.task} from {cell.init}, {cell.mode}, {cell.fraction:.0%} of labels, seed {cell.seed}:",
        figures,
        f"{result.trained_parameters:,} trained parameters, {result.training_cases} training cases, "
        f"{result.seconds:.0f} s" + (f"; {chosen}" if chosen else ""),
    ]


def paper_results(prefix: str) -> dict[str, Any]:
    """The paper's metrics and rows (method -> name of the task behind the colon -> figures), or nothing."""
    file = importlib.resources.files("training.downstream") / "paper_results.yaml"
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")).get(prefix, {})
    return found


def write_report(grid: Grid, outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Write the files of this module's head into `folder`; returns what summary.json holds."""
    rows = rows_of(outcome.results)
    tests = paired_tests(rows, grid.baseline)
    tables = [*_result_tables(rows), *_paper_tables(rows), *_test_tables(tests, grid.baseline)]
    if outcome.failures:
        failed = [(str(each.folder), reason) for each, reason in outcome.failures]
        tables.append(Table("Not run", ("run", "why"), failed))
    done, total = len(outcome.results), len(outcome.results) + len(outcome.failures) + len(outcome.missing)
    title = f"{done} of {total} runs"
    origins = _origins(outcome.results)
    folder.mkdir(parents=True, exist_ok=True)
    has_curves = bool(rows)
    if has_curves:
        draw_curves(rows, folder / "curves.png")
    _whole(folder / "report.md", markdown(title, tables, origins, has_curves))
    _whole(folder / "report.html", html(title, tables, origins, has_curves))
    _write_results(folder / "results.csv", outcome.results)
    summary = {
        "runs": {"done": done, "failed": len(outcome.failures), "missing": len(outcome.missing)},
        "rows": [_summary_of(row) for row in rows],
        "tests": [_test_summary(test) for test in tests],
    }
    write_json(folder / "summary.json", summary)
    return summary


def paired_tests(rows: Sequence[Row], baseline: str) -> list[PairedTest]:
    """Each start against the baseline of the same task, share and mode, in the first metric of its task.

    p values are corrected for the number of all these tests.
    """
    bases = {(row.task, row.fraction, row.mode): row for row in rows if row.name == baseline}
    compared = []
    for row in rows:
        base = bases.get((row.task, row.fraction, row.mode))
        if base is None or row.name == baseline:
            continue
        metric = task_of(row.task).METRICS[0]
        ours, theirs = row.values(metric), base.values(metric)
        seeds = sorted(ours.keys() & theirs.keys())
        if len(seeds) >= 2:
            paired = compare_paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            compared.append((row, base, metric, paired))
    by_t = holm([paired.p_t for *_, paired in compared])
    by_wilcoxon = holm([paired.p_wilcoxon for *_, paired in compared])
    return [PairedTest(*each, p_t, p_w) for each, p_t, p_w in zip(compared, by_t, by_wilcoxon, strict=True)]


def _result_tables(rows: Sequence[Row]) -> list[Table]:
    """One table a task and share: starts and modes down, metrics across."""
    tables = []
    for task, fraction in dict.fromkeys((row.task, row.fraction) for row in rows):
        here = [row for row in rows if (row.task, row.fraction) == (task, fraction)]
        metrics = task_of(task).METRICS
        best = {metric: _best(here, metric) for metric in metrics}
        lines = [
            (
                row.name,
                row.mode,
                *(_spread(row.values(metric).values(), bold=row is best[metric]) for metric in metrics),
                f"{_any(row).trained_parameters:,}",
                str(len(row.results)),
                f"{sum(result.seconds for result in row.results.values()) / len(row.results):,.0f}",
            )
            for row in here
        ]
        head = ("start", "mode", *map(headed, metrics), "trained parameters", "seeds", "seconds a run")
        cases = sorted({result.training_cases for row in here for result in row.results.values()})
        counted = " to ".join(map(str, sorted({cases[0], cases[-1]})))
        tables.append(Table(f"{task}, {fraction:.0%} of the labels ({counted} training cases)", head, lines))
    return tables


def _paper_tables(rows: Sequence[Row]) -> list[Table]:
    """With all labels: the paper's methods and our rows, tasks across, as in its tables."""
    tables = []
    for prefix in dict.fromkeys(prefix_of(row.task) for row in rows):
        paper = paper_results(prefix)
        here = [row for row in rows if prefix_of(row.task) == prefix and row.fraction == 1]
        if not paper or not here:
            continue
        metrics = [metric for metric in task_of(here[0].task).METRICS if metric.name in paper["metrics"]]
        at = [paper["metrics"].index(metric.name) for metric in metrics]
        names = list(next(iter(paper["rows"].values())))
        lines = []
        for method, figures in paper["rows"].items():
            values = [[figures[name][number] for number in at] for name in names]
            lines.append((f"{method} (paper)", *_with_mean(values, ".4g")))
        for name, mode in dict.fromkeys((row.name, row.mode) for row in here):
            ours = {row.task.partition(":")[2]: row for row in here if (row.name, row.mode) == (name, mode)}
            means = [
                [mean_and_deviation(list(ours[each].values(metric).values()))[0] for metric in metrics]
                if each in ours and all(ours[each].values(metric) for metric in metrics)
                else None
                for each in names
            ]
            lines.append((f"{name}, {mode}", *_with_mean(means, ".2f")))
        head = (
            " / ".join(map(headed, metrics)),
            *(name or prefix for name in names),
            *["mean"] * (len(names) > 1),
        )
        note = "The paper's figures are those of its settings (preset paper); others are not to be compared."
        tables.append(Table(f"{prefix}: beside the paper", head, lines, (note,)))
    return tables


def _with_mean(values: Sequence[Sequence[float] | None], form: str) -> list[str]:
    """Figures of each task as text, and where there are several tasks, their means if none lacks."""
    known = [each for each in values if each is not None]
    texts = ["–" if each is None else " / ".join(f"{value:{form}}" for value in each) for each in values]
    if len(values) == 1:
        return texts
    if len(known) < len(values):
        return [*texts, "–"]
    means = [sum(each) / len(each) for each in zip(*known, strict=True)]
    return [*texts, " / ".join(f"{mean:.1f}" for mean in means)]


def _test_tables(tests: Sequence[PairedTest], baseline: str) -> list[Table]:
    if not tests:
        return []
    lines = [
        (
            *(test.row.task, f"{test.row.fraction:.0%}", test.row.mode, test.row.name),
            f"{test.paired.difference:+.2f} {test.metric.name}",
            str(test.paired.pairs),
            *(_p(p) for p in (test.paired.p_t, test.p_t_holm, test.paired.p_wilcoxon, test.p_wilcoxon_holm)),
        )
        for test in tests
    ]
    fewest = min(test.paired.pairs for test in tests)
    notes = [
        f"Runs are paired by seed; {len(tests)} tests, corrected by Holm's method. The tests are about seeds, "
        "not about other patients.",
        f"With {fewest} pairs the Wilcoxon test cannot give a p below {smallest_p(fewest):.3g}"
        + (", so it cannot find anything here." if smallest_p(fewest) > SIGNIFICANT else "."),
    ]
    about = ("task", "labels", "mode", "start", f"difference to {baseline}", "pairs")
    head = (*about, "p, paired t", "Holm", "p, Wilcoxon", "Holm")
    return [Table(f"Against {baseline}", head, lines, tuple(notes))]


def _best(rows: Sequence[Row], metric: Metric) -> Row | None:
    """The row with the best mean; None where there is nothing to choose from."""
    if len(rows) < 2:
        return None
    measured = [row for row in rows if row.values(metric)]
    sign = 1 if metric.higher_is_better else -1
    return max(
        measured, key=lambda row: sign * mean_and_deviation(list(row.values(metric).values()))[0], default=None
    )


def _any(row: Row) -> Result:
    return next(iter(row.results.values()))


def _spread(values: Iterable[float], bold: bool = False) -> str:
    known = list(values)
    if not known:
        return "–"
    mean, deviation = mean_and_deviation(known)
    text = f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"
    return f"**{text}**" if bold else text


def _p(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _origins(results: Sequence[tuple[GridCell, Result]]) -> list[str]:
    """What is known of where each start comes from."""
    known = {each.name: (each.cell.init, result.origin) for each, result in results}
    return [
        f"{name}: {init}"
        + "".join(
            f", {what.replace('_', ' ')} {str(value)[:16]}"
            for what, value in origin.items()
            if value is not None
        )
        for name, (init, origin) in known.items()
    ]


def markdown(title: str, tables: Sequence[Table], origins: Sequence[str], curves: bool) -> str:
    """The report as Markdown."""
    parts = [f"# Comparison: {title}\n"]
    for table in tables:
        lines = [" | ".join(_plain(text) for text in row) for row in (table.head, *table.rows)]
        rule = "|".join([" --- "] * len(table.head))
        parts.append(
            "\n".join(
                [f"## {table.title}\n", f"| {lines[0]} |", f"|{rule}|", *(f"| {one} |" for one in lines[1:])]
            )
        )
        parts += [f"\n{note}" for note in table.notes]
        parts.append("")
    if curves:
        parts.append("![Curves](curves.png)\n")
    parts.append("## Starts\n")
    parts += [f"- {line}" for line in origins]
    return "\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def html(title: str, tables: Sequence[Table], origins: Sequence[str], curves: bool) -> str:
    """The report as one page, whose picture lies beside it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("training.downstream", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    return template.render(title=title, tables=tables, origins=origins, curves=curves)


def _summary_of(row: Row) -> dict[str, Any]:
    metrics = {}
    for metric in task_of(row.task).METRICS:
        if not (values := list(row.values(metric).values())):
            continue
        mean, deviation = mean_and_deviation(values)
        metrics[metric.name] = {"mean": mean, "deviation": None if math.isnan(deviation) else deviation}
    return {
        "task": row.task,
        "fraction": row.fraction,
        "mode": row.mode,
        "start": row.name,
        "seeds": sorted(row.results),
        "metrics": metrics,
        "trained_parameters": _any(row).trained_parameters,
    }


def _test_summary(test: PairedTest) -> dict[str, Any]:
    figures = {
        "difference": test.paired.difference,
        "p_t": test.paired.p_t,
        "p_t_holm": test.p_t_holm,
        "p_wilcoxon": test.paired.p_wilcoxon,
        "p_wilcoxon_holm": test.p_wilcoxon_holm,
    }
    row = test.row
    return {
        "task": row.task,
        "fraction": row.fraction,
        "mode": row.mode,
        "start": row.name,
        "baseline": test.baseline.name,
        "metric": test.metric.name,
        "pairs": test.paired.pairs,
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
    }


def _write_results(file: Path, results: Sequence[tuple[GridCell, Result]]) -> None:
    names = sorted({name for _, result in results for name in result.metrics})
    head = ["task", "start", "init", "mode", "fraction", "seed", *names]
    temporary = file.with_name(f".{file.name}.partial")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow([*head, "trained_parameters", "training_cases", "seconds"])
        for each, result in results:
            cell = each.cell
            table.writerow(
                [
                    *(cell.task, each.name, cell.init, cell.mode, cell.fraction, cell.seed),
                    *(result.metrics.get(name, "") for name in names),
                    *(result.trained_parameters, result.training_cases, f"{result.seconds:.1f}"),
                ]
            )
    temporary.replace(file)


def _whole(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
