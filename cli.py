"""The two command lines, `pumit-data` and `pumit-train`: parse, call, print.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from catalog.errors import SetupError
from catalog.store import Location, folder, location

if TYPE_CHECKING:
    from catalog.corpus import Corpus
    from catalog.doctor.examine import Diagnosis
    from catalog.mix import Mix
    from ingest.estimate import Estimate
    from ingest.findings import Finding, Verification
    from ingest.outline import RawFolder
    from ingest.overrides import Override
    from ingest.run import IngestPlan, IngestReport
    from ingest.spec import DatasetSpec
    from ingest.task import Outcomes

_WIDTH_OF_A_FILE = 140
"""Columns of tables that go to a file or a pipe."""

DONE, SOME_FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 3

data = typer.Typer(
    name="pumit-data",
    help="Turn public medical image collections into one audited, streamable corpus.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
mix = typer.Typer(help="Name which images training draws, and how often.", no_args_is_help=True)
data.add_typer(mix, name="mix")
train = typer.Typer(
    name="pumit-train",
    help="Pre-train the tokenizer and the ViT on a prepared corpus.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RawOption = Annotated[
    Path,
    typer.Option(
        "--raw",
        envvar="PUMIT_RAW",
        parser=folder,
        metavar="FOLDER",
        help="Folder that holds one folder per dataset.",
    ),
]
DataOption = Annotated[
    Any,  # a Location: Typer knows no unions
    typer.Option(
        "--data",
        envvar="PUMIT_DATA",
        parser=location,
        metavar="FOLDER|URL",
        help="The prepared corpus: a folder, or a URL (s3, gs, az; to read, also https).",
    ),
]
RawPlaceOption = Annotated[
    Any,
    typer.Option(
        "--raw",
        envvar="PUMIT_RAW",
        parser=location,
        metavar="FOLDER|URL",
        help="Holds one folder per dataset: a folder, or a URL (s3, gs, az).",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        envvar="PUMIT_CACHE",
        metavar="FOLDER",
        help="Keep on this disk what is read of a corpus in a store; shared by all processes of the machine.",
        show_default=False,
    ),
]
CacheLimitOption = Annotated[
    float | None,
    typer.Option(
        "--cache-gb",
        envvar="PUMIT_CACHE_GB",
        metavar="GB",
        help="Limit of the cache; by default 100. What was read longest ago goes first.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@data.command("list")
def list_datasets(
    raw: RawPlaceOption = Path("raw"),
    data_dir: DataOption = Path("data"),
    modality: Annotated[
        str | None, typer.Option(help="Only datasets that have it: CT, MRI, MRI/T1 ...", show_default=False)
    ] = None,
    body_part: Annotated[
        str | None, typer.Option(help="Only datasets that show it: chest, brain ...", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the datasets of datasets.yaml, shipped and own, and which of them are ingested.

    A wide terminal shows more columns; --json has them all.
    """
    from catalog.remote import open_corpus
    from ingest.outline import raw_folder
    from ingest.show import chosen, list_as_json, list_table
    from ingest.spec import load_specs

    ingested = set(open_corpus(data_dir).datasets())
    with raw_folder(raw) as own:
        specs = chosen(load_specs(raw=own.folder).values(), modality, body_part)
    if as_json:
        _print_json(list_as_json(specs, ingested))
    else:
        _print(list_table(specs, ingested, _console().width))


@data.command()
def show(
    dataset: Annotated[str, typer.Argument(metavar="ID", help="Id as `pumit-data list` shows it.")],
    raw: RawPlaceOption = Path("raw"),
    data_dir: DataOption = Path("data"),
    as_json: JsonOption = False,
) -> None:
    """Show all that is known of a dataset: where to get it, how to lay it out, what to cite."""
    from catalog.remote import open_corpus
    from ingest.outline import raw_folder
    from ingest.show import as_json as spec_as_json
    from ingest.show import render
    from ingest.spec import get_spec

    with raw_folder(raw) as own:
        spec = get_spec(dataset, own.folder)
    ingested = spec.id in open_corpus(data_dir).datasets()
    _print_json(spec_as_json(spec, ingested)) if as_json else render(spec, ingested, _console())


@data.command()
def check(
    datasets: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Ids as `pumit-data list` shows them.")
    ],
    raw_place: RawPlaceOption = Path("raw"),
    as_json: JsonOption = False,
) -> None:
    """Compare folders with what ingest expects, before it runs for hours.

    Ends with 2 if something must be fixed: ingest would stop, or pass over
    images that are there. What is missing or too much is a warning.
    """
    from ingest.check import check_dataset, render
    from ingest.outline import raw_folder
    from ingest.spec import get_spec

    with raw_folder(raw_place) as raw:
        specs = [get_spec(name, raw.folder) for name in dict.fromkeys(datasets)]
        for spec in specs:
            raw.outline(spec)
        checks = [check_dataset(spec, raw.folder, raw.origin) for spec in specs]
    if as_json:
        _print_json([checked.as_json() for checked in checks])
    else:
        for checked in checks:
            render(checked, _console())
    if not all(checked.fine for checked in checks):
        raise typer.Exit(WRONG_CALL)


@data.command()
def plan(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID...", help="Ids as `pumit-data list` shows them.", show_default=False),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All datasets but those that the default mix leaves out.")
    ] = False,
    raw_place: RawPlaceOption = Path("raw"),
    data_dir: DataOption = Path("data"),
    as_json: JsonOption = False,
) -> None:
    """Say what datasets will take before anything is downloaded: disk, hours, licences and logins.

    Figures are what is on disk, in the catalog or published; what nobody tells is shown as unknown.
    """
    from contextlib import ExitStack

    from catalog.remote import open_corpus
    from ingest.forecast import Speeds, forecast
    from ingest.forecast import as_json as forecasts_as_json
    from ingest.forecast_report import render
    from ingest.outline import raw_folder
    from ingest.remote import working_copy
    from ingest.spec import get_spec, load_specs

    if bool(datasets) == everything:
        raise SetupError("Name datasets, or ask for all of them with --all; see `pumit-data list`.")
    with ExitStack() as stack:
        raw = stack.enter_context(raw_folder(raw_place))
        specs = [get_spec(name, raw.folder) for name in dict.fromkeys(datasets or ())]
        if everything:
            specs = [spec for spec in load_specs(raw=raw.folder).values() if spec.left_out is None]
        for spec in specs:
            raw.outline(spec)
        if isinstance(data_dir, Path) or data_dir.is_web:
            corpus = open_corpus(data_dir)
        else:  # what has been done is in the journal, which is no part of a corpus that is only read
            ids = [spec.id for spec in specs]
            corpus = stack.enter_context(working_copy(data_dir, ids, write=False))
        speeds = Speeds()
        forecasts = [forecast(spec, raw.folder, corpus, speeds) for spec in specs]
    _print_json(forecasts_as_json(forecasts, speeds)) if as_json else render(forecasts, speeds, _console())


@data.command()
def download(
    datasets: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Ids as `pumit-data list` shows them.")
    ],
    raw: RawOption = Path("raw"),
    yes: Annotated[bool, typer.Option("--yes", help="Accept licences that restrict the use.")] = False,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep archives after unpacking, in RAW/archives.")
    ] = False,
) -> None:
    """Fetch and unpack datasets that anybody may have; for the others, say how to get them.

    Repeat the call to go on after an interruption. What is there already is left alone.
    """
    from ingest.download.notice import consent_question, notice, steps
    from ingest.download.run import download_dataset, existing_download
    from ingest.spec import get_spec

    wanted, refused = [], False
    for spec in [get_spec(name, raw) for name in dict.fromkeys(datasets)]:
        if (existing := existing_download(spec, raw)) is not None:
            whose = "complete" if existing.state == "complete" else "there, though not by this command"
            _print(f"{spec.id}: {whose}, and left as it is: {existing.folder}")
        elif spec.download is None:
            _print(steps(spec, raw))
            refused = True
        else:
            _print(notice(spec, raw))
            if (question := consent_question(spec)) is not None and not yes:
                if not sys.stdin.isatty():
                    raise SetupError(f"{spec.id}: {question} Answer with --yes.")
                if not typer.confirm(question):
                    raise SetupError(f"{spec.id}: not downloaded.")
            wanted.append(spec)
    for spec in wanted:
        raw.mkdir(parents=True, exist_ok=True)
        with _byte_bar(spec.id) as show:
            report = download_dataset(spec, raw, show, keep_archives=keep_archives)
        if report.problem is None:
            _print(f"{spec.id}: {report.images} files or series in {report.folder}.")
        else:
            _print(f"{spec.id}: is in {report.folder}, but not as its entry expects. {report.problem}")
            refused = True
    if refused:
        raise typer.Exit(WRONG_CALL)


@data.command()
def ingest(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID...]", help="Ids as `pumit-data list` shows them.", show_default=False),
    ] = None,
    all_datasets: Annotated[
        bool, typer.Option("--all", help="Every dataset whose folder is there, instead of ids.")
    ] = False,
    raw_place: RawPlaceOption = Path("raw"),
    data_dir: DataOption = Path("data"),
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Worker processes; by default as many as cores and memory allow.", show_default=False
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Use this Dask scheduler (tcp://host:port) instead of this machine.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="REGEX", help="Only images whose key matches.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many files or series each.")] = None,
    names_key: Annotated[
        Path | None,
        typer.Option(
            envvar="PUMIT_NAMES_KEY",
            help="File with the key that turns private names into ids; by default made once, in private/.",
            show_default=False,
        ),
    ] = None,
    lossless: Annotated[
        bool | None,
        typer.Option(
            "--lossless/--no-lossless",
            help="Keep true floats as they are, not in 16-bit steps; by default as the dataset's last ingest.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Normalise images into shards and catalog. Repeat the call to go on, or to add new files."""
    from contextlib import ExitStack

    from ingest.names import name_key
    from ingest.outline import raw_folder
    from ingest.overrides import load_overrides, overrides_file
    from ingest.remote import working_copy
    from ingest.report import plans_as_json, render_plans, render_reports, reports_as_json
    from ingest.run import plan_ingest
    from ingest.spec import get_spec, load_specs

    if all_datasets == bool(datasets):
        raise SetupError("say which datasets: either ids, as `pumit-data list` shows them, or --all.")
    with ExitStack() as stack:
        raw = stack.enter_context(raw_folder(raw_place))
        specs = (
            _specs_present(raw)
            if all_datasets
            else [get_spec(name, raw.folder) for name in dict.fromkeys(datasets or ())]
        )
        load_overrides(overrides_file(raw.folder), load_specs(raw=raw.folder))  # before anything is done
        for spec in specs:
            raw.outline(spec)
        corpus = stack.enter_context(working_copy(data_dir, [spec.id for spec in specs], write=not dry_run))
        private = any(spec.private_names for spec in specs)
        names = name_key(corpus, names_key, keep=not dry_run) if private else None
        plans = [
            plan_ingest(spec, raw.folder, corpus, only, limit, names, raw.origin, lossless) for spec in specs
        ]
        if dry_run:
            estimates = _estimates(plans, corpus, workers)
            if as_json:
                _print_json(plans_as_json(plans, estimates))
            else:
                render_plans(plans, estimates, _console())
            return
        reports = _run_plans(plans, corpus, workers, scheduler)
    _print_json(reports_as_json(reports)) if as_json else render_reports(reports, _console())
    if any(status == "failed" for report in reports for status, _ in report.total):
        raise typer.Exit(SOME_FAILED)


CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")]


@data.command()
def verify(
    datasets: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Only these datasets.", show_default=False)
    ] = None,
    raw_place: RawPlaceOption = Path("raw"),
    data_dir: DataOption = Path("data"),
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode all voxels and compute their statistics anew.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make what is damaged anew, from the images in --raw.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads or processes; by default one per core.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that every row of the corpus has its voxels, shapes, checksums and statistics; exit code 1 if not.

    The raw folder is needed for --repair, and for entries of your own in its datasets.yaml.
    """
    from catalog.remote import whole_copy
    from ingest.findings import render_verification, verification_as_json
    from ingest.outline import raw_folder
    from ingest.overrides import load_overrides, overrides_file
    from ingest.remote import working_copy
    from ingest.repair import repair as mend
    from ingest.spec import load_specs
    from ingest.verify import verify as read_back

    def checked(chosen: list[str] | None) -> Verification:
        with whole_copy(data_dir) as corpus, _byte_bar("verify") as progress:
            return read_back(
                corpus, specs, chosen, overrides=overrides, deep=deep, workers=workers, progress=progress
            )

    repaired: list[Finding] = []
    problems: list[str] = []
    with raw_folder(raw_place) as raw:
        specs = load_specs(raw=raw.folder)
        overrides = load_overrides(overrides_file(raw.folder), specs) if raw.folder.is_dir() else None
        outcome = checked(datasets or None)
        if repair and outcome.findings:
            hurt = {finding.dataset for finding in outcome.findings if finding.dataset}
            with working_copy(data_dir, hurt, write=True, whole=True) as corpus:
                problems = mend(
                    corpus, specs, raw, outcome, workers, lambda plans: _run_plans(plans, corpus, workers, None)
                )
            outcome, repaired = outcome.after_repair(checked)
            outcome.notes += problems
    if as_json:
        _print_json(verification_as_json(outcome, repaired))
    else:
        render_verification(outcome, repaired, _console())
    if outcome.findings or problems:
        raise typer.Exit(SOME_FAILED)


@data.command()
def repack(
    profile: Annotated[
        Literal["fast", "train", "small"],
        typer.Option(help="fast: quick to write. train: quickest to read. small: least disk."),
    ],
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID...]", help="Only these datasets.", show_default=False),
    ] = None,
    data_dir: DataOption = Path("data"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one per core.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be saved, judged by a sample, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Store the voxels of ingested datasets with another codec; not one of them changes.

    Repeat the call to go on after an interruption. The old arrays stay until all new ones of a dataset are
    there. Trainings that go on meanwhile then stop, and go on with --resume.
    """
    from dataclasses import asdict

    from catalog.query import dataset_ids
    from catalog.remote import open_corpus
    from ingest.remote import working_copy
    from ingest.repack import estimate_repack, repack_dataset
    from ingest.repack_report import render_estimates, render_repacks

    ids = dataset_ids(open_corpus(data_dir), datasets or None)
    with working_copy(data_dir, ids, write=not dry_run) as corpus:
        if dry_run:
            estimates = [estimate_repack(corpus, dataset, profile) for dataset in ids]
            if as_json:
                _print_json([asdict(estimate) for estimate in estimates])
            else:
                render_estimates(estimates, _console())
            return
        reports = []
        for dataset in ids:
            with _byte_bar(dataset) as progress:
                reports.append(repack_dataset(corpus, dataset, profile, workers, progress))
    _print_json([asdict(report) for report in reports]) if as_json else render_repacks(reports, _console())


@data.command()
def runs(data_dir: DataOption = Path("data"), as_json: JsonOption = False) -> None:
    """List past ingests of a corpus: what, how many, how long, with which version."""
    from dataclasses import asdict

    from ingest.remote import kept_copy
    from ingest.runs import past_runs, render, runs_folder

    corpus = kept_copy(data_dir)
    found = list(past_runs(corpus))
    if as_json:
        _print_json([asdict(run) for run in found])
    elif found:
        render(found, _console())
        _print(f"Logs: {runs_folder(corpus)}")
    else:
        _print(f"No ingest into {data_dir} yet.")


@data.command()
def stats(
    data_dir: DataOption = Path("data"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also write the audit picture.", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="One table by these columns instead, such as modality,da_level."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL", help="Only rows for which this holds, such as \"modality = 'CT' and spacing_z < 2\"."
        ),
    ] = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, as for a paper, instead of tables.")
    ] = False,
) -> None:
    """Audit the modality and spacing mix: by modality, dataset and DA level.

    --by groups by any of dataset, modality, body_part, dimension, da_level and split, and adds shapes. --csv
    without it is by dataset; --markdown without it is the table of datasets that papers have.
    """
    from catalog.output import batches_of, write_csv
    from catalog.remote import open_corpus
    from catalog.stats import AUDITED, PAPER, SPACINGS, audit, grouping, summarise_cells
    from catalog.stats_tables import markdown_groups, markdown_paper, render, render_groups
    from catalog.survey import survey_corpus

    _one_format({"--json": as_json, "--csv": as_csv, "--markdown": as_markdown})
    corpus = open_corpus(data_dir)
    if by is None and as_csv:
        by = "dataset"
    if by is not None:
        columns = grouping(by)
        groups = summarise_cells(survey_corpus(corpus, columns, where=where), columns)
        if as_json:
            _print_json(groups.to_pylist())
        elif as_csv:
            write_csv(batches_of(groups), sys.stdout.buffer)
        elif as_markdown:
            typer.echo(markdown_groups(groups.to_pylist(), columns), nl=False)
        else:
            _print(render_groups(groups.to_pylist(), columns))
    elif as_markdown:
        typer.echo(markdown_paper(survey_corpus(corpus, PAPER, (), where)), nl=False)
    else:
        summary = audit(survey_corpus(corpus, AUDITED, SPACINGS, where))
        _print_json(summary) if as_json else render(summary, _console())
    if plot is not None:
        from catalog.plot import PICTURED, audit_picture
        from catalog.survey import load_survey_table

        audit_picture(load_survey_table(corpus, PICTURED, where), plot)
        if not (as_json or as_csv or as_markdown):
            _print(f"Audit picture: {plot}")


@data.command()
def report(
    data_dir: DataOption = Path("data"),
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="Where the page goes.")] = Path(
        "report.html"
    ),
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only rows for which this holds, as of `stats`.", show_default=False),
    ] = None,
) -> None:
    """Write one HTML page that shows the corpus: numbers, charts and pictures, to read in any browser.

    It loads nothing from elsewhere, stays below 5 MB, and comes out the same for the same corpus.
    """
    from rich.filesize import decimal

    from catalog.remote import open_corpus
    from catalog.report.facts import report_facts
    from catalog.report.page import write_page
    from ingest.reasons import EXCLUSIONS, FAILURES

    facts = report_facts(open_corpus(data_dir), where, EXCLUSIONS | FAILURES)
    with _writing(output):
        size = write_page(facts, output)
    shown, images = facts["sheet"]["shown"], facts["sheet"]["images"]
    _print(f"Report: {output} ({decimal(size)}), with pictures of {shown:,} of {images:,} images.")


@data.command()
def doctor(
    datasets: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Only these datasets.", show_default=False)
    ] = None,
    data_dir: DataOption = Path("data"),
    code: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Only this finding; may be repeated.", show_default=False),
    ] = None,
    severity: Annotated[
        Literal["error", "warning", "note"], typer.Option(help="Only findings that are at least so severe.")
    ] = "note",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write a page with pictures.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE[:ID]",
            help="Leave out the images of this finding, with --write-overrides; may be repeated.",
            show_default=False,
        ),
    ] = None,
    write_overrides: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append them to this file: RAW/overrides.yaml.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Tell which images look wrong by their numbers: outliers, suspicious axes, modalities and intensities.

    Nothing but the catalog and a few previews is read. A finding is no proof and no failure: the exit code is
    0. docs/doctor.md lists the codes.
    """
    from catalog.doctor.codes import check_codes
    from catalog.doctor.examine import diagnose
    from catalog.doctor.show import as_json as diagnosis_as_json
    from catalog.doctor.show import render, write_csv
    from catalog.remote import open_corpus

    _one_format({"--csv": as_csv, "--json": as_json})
    if bool(exclude) != (write_overrides is not None):
        raise SetupError("--exclude says what to leave out and --write-overrides where: give both, or neither.")
    check_codes(code or ())
    corpus = open_corpus(data_dir)
    found = diagnose(corpus, datasets or None)
    proposals = _proposed(found, exclude or [], corpus.datasets())
    shown = found.chosen(code, severity)
    if as_json:
        _print_json(diagnosis_as_json(shown))
    elif as_csv:
        write_csv(shown, sys.stdout)
    else:
        render(shown, _console())
    console = _console(stderr=as_json or as_csv)
    if out is not None:
        from rich.filesize import decimal

        from catalog.doctor.sheet import write_sheet

        with _writing(out):
            size = write_sheet(corpus, shown, out)
        console.print(f"Pictures: {out} ({decimal(size)})", markup=False)
    if write_overrides is not None:
        from ingest.overrides import append_overrides

        with _writing(write_overrides):
            new, present = append_overrides(write_overrides, proposals)
        known = f" ({present} stood there already)" if present else ""
        console.print(
            f"{write_overrides}: {new} images to leave out{known}. Look at it, then ingest.", markup=False
        )


def _proposed(found: Diagnosis, exclude: list[str], known: list[str]) -> list[tuple[Override, str]]:
    """The entries of overrides.yaml for what --exclude asks for, each with its comment."""
    from catalog.doctor.codes import CODES, check_codes
    from ingest.overrides import Override

    proposals = []
    for asked in exclude:
        code, _, dataset = asked.partition(":")
        check_codes([code])
        if dataset and dataset not in known:
            raise SetupError(
                f"--exclude {asked}: the corpus has no dataset {dataset!r}, only {', '.join(known)}."
            )
        for finding in found.findings:
            if finding.code != code or dataset not in ("", finding.dataset):
                continue
            if finding.images > len(finding.suspects) > 0:
                raise SetupError(
                    f"--exclude {asked}: {finding.images:,} images of {finding.dataset} have it, more than are "
                    "told by key. Leave them out with a `glob` in overrides.yaml, or in the dataset's entry."
                )
            for suspect in finding.suspects:
                usual = f" (usual: {suspect.usual})" if suspect.usual else ""
                reason = f"{CODES[code].title}: {suspect.value}"
                entry = Override(dataset=finding.dataset, key=suspect.key, reason=reason, finding=code)
                proposals.append((entry, f"{finding.severity}: {reason}{usual}. {CODES[code].advice}"))
    return proposals


@data.command()
def duplicates(
    data_dir: DataOption = Path("data"),
    leakage: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID",
            help="Compare with an evaluation set instead: a dataset's id, another corpus, raw images, or .npz.",
            show_default=False,
        ),
    ] = None,
    exact_only: Annotated[
        bool, typer.Option("--exact-only", help="Equal values only, no other sizes, crops, flips or windows.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Also write a page of groups with pictures.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do not record the groups in the corpus.")] = False,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find images that occur twice, within datasets and across them, and record which one of each to keep.

    With --leakage nothing is recorded, and the exit code is 1 if the evaluation set shares images with the
    corpus.
    """
    from catalog.duplicates import state_of, write_groups
    from catalog.duplicates.groups import as_json as groups_as_json
    from catalog.duplicates.groups import find_groups
    from catalog.duplicates.tables import render, render_leaks
    from catalog.output import batches_of, write_csv
    from catalog.remote import features_copy
    from catalog.report.duplicates import write_duplicates_page
    from ingest.backfill import ensure_features
    from ingest.leakage import find_leaks

    _one_format({"--json": as_json, "--csv": as_csv})
    if leakage is not None and (html is not None or as_csv):
        raise SetupError("--leakage prints a table, or JSON: it goes with neither --html nor --csv.")
    with features_copy(data_dir) as corpus, _count_bar() as show:
        ensure_features(corpus, show)
        if leakage is not None:
            leaks = find_leaks(corpus, leakage, show, exact_only=exact_only)
        else:
            state = state_of(corpus)
            found = find_groups(corpus, show, exact_only=exact_only)
            if not dry_run:
                write_groups(corpus, found.table(), state)
        if html is not None:
            with _writing(html):
                write_duplicates_page(corpus, found, html)
    if leakage is not None:
        _print_json(leaks.as_json()) if as_json else render_leaks(leaks.as_json(), _console())
        if leaks.leaks:
            raise typer.Exit(SOME_FAILED)
        return
    if as_json:
        _print_json(groups_as_json(found))
    elif as_csv:
        write_csv(batches_of(found.table()), sys.stdout.buffer)
    else:
        render(found, _console())
        if html is not None:
            _print(f"Page: {html}")
        if not dry_run:
            _print(f"Recorded: {data_dir / 'catalog' / corpus.duplicates_file.name}")


@data.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over the table `images`.")],
    data_dir: DataOption = Path("data"),
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the result here: .csv, .json or .parquet.", show_default=False
        ),
    ] = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask the catalog in SQL (DuckDB's). The table `images` has all rows and the columns of docs/catalog.md.

    Nothing but the catalog can be read, and nothing written: no other files, no network, no settings.
    """
    from catalog import output as formats
    from catalog.remote import open_corpus
    from catalog.sql import query as run_query

    _one_format({"--output": output is not None, "--csv": as_csv, "--json": as_json})
    result = run_query(open_corpus(data_dir), sql)
    if output is not None:
        with _writing(output):
            formats.write_file(result, output)
    elif as_csv:
        formats.write_csv(result, sys.stdout.buffer)
    elif as_json:
        formats.write_json(result, sys.stdout.buffer)
    else:
        _print(formats.printable(result))


MixName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the mix.")]


@mix.command("list")
def list_mixes(data_dir: DataOption = Path("data"), as_json: JsonOption = False) -> None:
    """List the mixes that come with PUMIT-data, and those of the corpus."""
    from catalog.mix import load_mix, mix_names
    from catalog.mix_tables import list_as_json, list_table
    from catalog.remote import open_corpus

    corpus = open_corpus(data_dir)
    mixes = {name: load_mix(corpus, name) for name in mix_names(corpus)}
    _print_json(list_as_json(mixes)) if as_json else _print(list_table(mixes))


@mix.command("show")
def show_mix(name: MixName, data_dir: DataOption = Path("data"), as_json: JsonOption = False) -> None:
    """Show a mix, and how often training draws what without it and with it."""
    from catalog.mix import load_mix
    from catalog.remote import open_corpus

    corpus = open_corpus(data_dir)
    _show_mix(corpus, name, load_mix(corpus, name), as_json)


@mix.command("write")
def write_mix(
    name: MixName,
    data_dir: DataOption = Path("data"),
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL",
            help="Only images for which this holds, such as \"modality <> 'US'\".",
            show_default=False,
        ),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="A dataset to leave out; may be repeated.", show_default=False),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="SQL=FACTOR",
            help="Factor on the weight of images, such as \"modality = 'CT' = 0.5\"; may be repeated.",
            show_default=False,
        ),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help='Factors that give these shares of draws: "modality: CT=0.4, MRI=0.4, XR=0.2".',
            show_default=False,
        ),
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Of images that show the same, draw only one.")
    ] = False,
    description: Annotated[str | None, typer.Option(help="What it is for.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the mix of this name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a mix into the corpus, where trainers take it by its name, and show what it does.

    --balance takes a target for modality, dataset, dimension or da_level, and comes on top of the rest. MRI
    means all its sequences; values that are not named share what is left as they did.
    """
    from catalog.balance import balancing, parse_target
    from catalog.mix import checked_name, make_mix, parse_weight
    from catalog.mix import write_mix as put_mix
    from catalog.remote import open_corpus
    from catalog.selection import Selection
    from catalog.shares import tally

    corpus = open_corpus(data_dir)
    fields = {
        "description": description,
        "where": where,
        "leave_out": leave_out or [],
        "weights": [parse_weight(text) for text in weights or ()],
        "dedup": dedup,
    }
    wanted = make_mix(fields, f"mix {checked_name(name)}")
    if balance is not None:
        rule = balancing(tally(corpus, Selection(corpus, wanted)), parse_target(balance))
        wanted = wanted.model_copy(update={"weights": (*wanted.weights, rule)})
    put_mix(corpus, name, wanted, force=force)
    _show_mix(corpus, name, wanted, as_json)


@data.command()
def lock(
    data_dir: DataOption = Path("data"),
    raw: RawPlaceOption = Path("raw"),
    mix_name: Annotated[str, typer.Option("--mix", help="The mix to lock with the corpus.")] = "all",
    output: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the lock goes.")] = Path(
        "corpus.lock"
    ),
    check_file: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="FILE", help="Compare the corpus with this lock instead.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one file that says which corpus this is, or compare a corpus with such a file.

    It holds hashes and counts of sources, voxels, exclusions, split, weights and mix. Checkpoints hold one.
    With --check, exit code 1 if anything differs. --raw is where your own entries say their licence.
    """
    from catalog.durable import replacing
    from catalog.lock import check_lock, lock_corpus, lock_text, read_lock
    from catalog.mix import load_mix
    from catalog.remote import open_corpus
    from catalog.selection import Selection
    from ingest.outline import raw_folder
    from ingest.spec import load_specs
    from shards.layout import LAYOUT_VERSION

    corpus = open_corpus(data_dir)
    if check_file is not None:
        with _reading(check_file):
            locked = read_lock(check_file.read_text(encoding="utf-8"), str(check_file))
        found = check_lock(corpus, locked, LAYOUT_VERSION)
        if as_json:
            _print_json({"same": not found, "differences": [one._asdict() for one in found]})
        elif found:
            _print("\n".join(": ".join(filter(None, (one.dataset, one.text))) for one in found))
            _print(f"{corpus.place} is not the corpus of {check_file}.")
        else:
            _print(f"{corpus.place} is the corpus of {check_file}, fingerprint {locked['fingerprint'][:12]}.")
        if found:
            raise typer.Exit(SOME_FAILED)
        return
    with raw_folder(raw) as own:
        licences = {name: spec.licence for name, spec in load_specs(raw=own.folder).items()}
    wanted = load_mix(corpus, mix_name)
    locked = lock_corpus(
        corpus,
        mix_name,
        wanted,
        Selection(corpus, wanted),
        shards_version=LAYOUT_VERSION,
        licences=licences,
    )
    with _writing(output), replacing(output) as temporary:
        temporary.write_text(lock_text(locked), encoding="utf-8")
    if as_json:
        _print_json(locked)
    else:
        _print(f"Lock: {output}, fingerprint {locked['fingerprint'][:12]}.")


def _show_mix(corpus: Corpus, name: str, wanted: Mix, as_json: bool) -> None:
    from catalog.mix_tables import mix_as_json, render_mix
    from catalog.selection import Selection
    from catalog.shares import tally

    counted = tally(corpus, Selection(corpus, wanted))
    if as_json:
        _print_json(mix_as_json(name, wanted, counted))
    else:
        render_mix(name, wanted, counted, _console())


@data.command()
def inspect(
    place: Annotated[
        Any,
        typer.Argument(
            parser=location, metavar="FILE_OR_FOLDER", help="Any scan, or its URL; no entry is needed."
        ),
    ],
    modality: Annotated[
        str | None, typer.Option(help="CT, MRI/T1, XR ...; guessed where not given.", show_default=False)
    ] = None,
    depth_axis: Annotated[
        Literal["SI", "AP", "LR"] | None,
        typer.Option(help="Direction in which it was scanned, as an entry may declare it.", show_default=False),
    ] = None,
    montage: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Picture to write; by default NAME-inspect.png.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what ingest would decide about a scan, and draw the image that training would see.

    Nothing of the corpus is read or written. With --json, a picture is written only where --montage asks.
    """
    from ingest.fetched import fetched
    from ingest.glance import stem_of
    from ingest.inspect import as_json as inspection_as_json
    from ingest.inspect import inspect_path, montage_of, render

    with fetched(place) as path:
        inspection = inspect_path(path, modality, depth_axis)
        target = montage or (None if as_json else Path(f"{stem_of(path.resolve().name)}-inspect.png"))
    picture = montage_of(inspection) if target else None
    if target and picture:
        with _writing(target):
            picture.save(target, format="PNG")
    if as_json:
        _print_json(inspection_as_json(inspection) | {"montage": str(target) if picture else None})
    else:
        render(inspection, _console())
        _print(f"Picture: {target}" if picture else "No picture: no image here would be ingested.")
    if inspection.outcomes["failed"]:
        raise typer.Exit(SOME_FAILED)


@data.command()
def add(
    folder: Annotated[
        Path, typer.Argument(parser=folder, metavar="FOLDER", help="A folder with images of your own.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option("--id", help="Id of the entry; by default the folder's name.", show_default=False),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Title; by default the folder's name.", show_default=False)
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Append the entry to datasets.yaml in the raw folder.")
    ] = False,
    raw: Annotated[
        Path | None,
        typer.Option(
            "--raw",
            envvar="PUMIT_RAW",
            parser=folder,
            help="Raw folder that holds FOLDER; by default the folder above it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Propose an entry of datasets.yaml for your own folder, guessed from its names and headers.

    The entry is printed with the ground of each guess. With --write it goes into datasets.yaml in the raw
    folder, which every command reads beside the datasets that come with PUMIT-data.
    """
    from ingest.add import propose, render, write_entry

    proposal = propose(folder, raw, dataset, title)
    typer.echo(proposal.text)
    render(proposal, _console())
    if write:
        write_entry(proposal)
        _print(f"Written to {proposal.file}. Next: pumit-data ingest {proposal.spec.id} --raw {proposal.raw}")
    else:
        _print(f"Nothing is written yet: --write appends the entry to {proposal.file}.")


@data.command()
def view(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of an image, or DATASET/KEY.")],
    data_dir: DataOption = Path("data"),
    dataset: Annotated[
        str | None, typer.Option(help="Where several datasets have the key.", show_default=False)
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Where the preview goes; by default DATASET-KEY.png.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one image's catalog row, and save its stored preview as a PNG. No shard is read.

    With --json, the preview is saved only where --save asks.
    """
    from catalog.remote import open_corpus
    from catalog.view import find_image, picture_name, render
    from ingest.journal import Journal
    from ingest.ledger import path_behind
    from ingest.remote import kept_copy

    image = find_image(open_corpus(data_dir), key, dataset)
    if save is not None and image.preview is None:
        raise SetupError(
            f"{image.row['dataset']}/{image.row['key']} has no preview, for it is {image.row['status']} "
            f"({image.row['reason']}). Leave --save out to see its row."
        )
    target = save or (None if as_json else Path(picture_name(image)))
    if target is not None and image.preview is not None:
        with _writing(target):
            target.write_bytes(image.preview)
    saved = str(target) if target is not None and image.preview is not None else None
    if as_json:
        _print_json(image.row | {"preview": saved})
        return
    render(image, _console())
    ledger = Journal(kept_copy(data_dir), image.row["dataset"]).ledger_file
    if os.access(ledger, os.R_OK | os.W_OK) and (path := path_behind(ledger, image.row["source_path"])):
        _print(f"File, known to this corpus alone: {path}")
    _print(f"Preview: {saved}" if saved else "No preview: the image was not ingested.")


@data.command("bench-loader")
def bench_loader(
    data_dir: DataOption = Path("data"),
    kind: Annotated[
        Literal["tokenizer", "mim"], typer.Option(help="What the crops would be for.")
    ] = "tokenizer",
    preset: Annotated[str, typer.Option(help="Named settings; see training/presets.")] = "paper",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Crops in a step; by default the preset's.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read; by default the cores.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="About a third of the time that it takes.")] = 10,
    cache: CacheOption = None,
    cache_gb: CacheLimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the loader on your own shards; say what limits it, and what to change."""
    from training.config import load_preset

    overrides = _cached(cache, cache_gb)
    config = (
        load_preset("tokenizer", preset, overrides)
        if kind == "tokenizer"
        else load_preset("mim", preset, overrides)
    )
    from training import limits

    figures = limits.measure(
        data_dir,
        config,
        workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        batch_size=batch or config.data.batch_size,
        seconds=seconds,
    )
    if as_json:
        _print_json(limits.as_json(figures))
    else:
        for line in limits.report(figures):
            _print(line)


PresetOption = Annotated[str, typer.Option(help="Named settings; see training/presets.")]
RunOption = Annotated[Path, typer.Option("--run", help="Folder for checkpoints, logs and pictures.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.", show_default=False),
]
MixOption = Annotated[
    str | None,
    typer.Option("--mix", metavar="NAME", help="Which images are drawn, and how often.", show_default=False),
]
DedupOption = Annotated[
    bool, typer.Option("--dedup", help="Of images that show the same, draw only one; see `duplicates`.")
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="Run folder of the tokenizer.", show_default=False)
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on exactly where this run stopped.")]
ProcessesOption = Annotated[
    int, typer.Option("--nproc", metavar="N", min=1, help="Processes of this machine that train together.")
]


@train.command()
def tokenizer(
    run: RunOption,
    preset: PresetOption = "tiny",
    data_dir: DataOption = Path("data"),
    mix_name: MixOption = None,
    dedup: DedupOption = False,
    settings: SetOption = None,
    resume: ResumeOption = False,
    cache: CacheOption = None,
    cache_gb: CacheLimitOption = None,
    processes: ProcessesOption = 1,
) -> None:
    """Train the visual tokenizer (spatially adaptive convolutions, soft codebook)."""
    overrides = [*(settings or ()), *_drawn_from(mix_name, dedup), *_cached(cache, cache_gb)]
    _train("tokenizer", preset, overrides, data_dir, run, resume, processes)


@train.command()
def mim(
    run: RunOption,
    objective: Annotated[
        Literal["tokens", "pixels", "contrastive", "distillation"] | None,
        typer.Option(help="What to learn; by default the preset's, mostly tokens.", show_default=False),
    ] = None,
    tokenizer_run: TokenizerOption = None,
    preset: PresetOption = "tiny",
    data_dir: DataOption = Path("data"),
    mix_name: MixOption = None,
    dedup: DedupOption = False,
    settings: SetOption = None,
    resume: ResumeOption = False,
    cache: CacheOption = None,
    cache_gb: CacheLimitOption = None,
    processes: ProcessesOption = 1,
) -> None:
    """Train the ViT by masked image modelling against a trained tokenizer, or by what to compare that with."""
    overrides = [*(settings or ()), *_drawn_from(mix_name, dedup), *_cached(cache, cache_gb)]
    if objective is not None:
        overrides.append(f"objective={objective}")
    if tokenizer_run is not None:
        overrides.append(_tokenizer_setting(tokenizer_run))
    _train("mim", preset, overrides, data_dir, run, resume, processes)


@train.command()
def targets(
    output: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Targets go here; repeat the call to go on.")
    ],
    tokenizer_run: TokenizerOption = None,
    preset: PresetOption = "tiny",
    data_dir: DataOption = Path("data"),
    mix_name: MixOption = None,
    dedup: DedupOption = False,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how large they will be.")] = False,
) -> None:
    """Let the tokenizer look at all crops of a `mim` run ahead of it, for runs that learn from the same crops.

    Take the preset and the settings of these runs, and give them `--set targets=FOLDER`. It pays where the
    networks are small; the targets of the paper's training would be terabytes.
    """
    from training.config import load_preset

    overrides = [*(settings or ()), *_drawn_from(mix_name, dedup)]
    if tokenizer_run is not None:
        overrides.append(_tokenizer_setting(tokenizer_run))
    config = load_preset("mim", preset, overrides)
    from training.targets import plan_targets

    work = plan_targets(config, data_dir)
    size = f"{config.steps} steps, about {work.bytes_expected / 1e9:.3g} GB"
    if dry_run:
        _print(f"targets of {size}; nothing was written")
        return
    with _writing(output), _count_bar() as show:
        computed = work.write(output, show)
    _print(f"targets of {size}, {computed} of them new: {output}. Train with --set targets={output}")


@train.command()
def finetune(
    run: Annotated[Path, typer.Option("--run", help="Folder for the result.")],
    task: Annotated[str, typer.Option(help="medmnist3d:NAME, catalog:COLUMN ... (docs/downstream.md).")],
    init: Annotated[
        str, typer.Option(help="Run, export or hub id; scratch, eva02, swin-unetr:FILE, FILE.py:function.")
    ],
    mode: Annotated[
        str, typer.Option(help="full, linear, last-K, lora, adapter, adaptformer; of classes also knn.")
    ] = "full",
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of the labels that is used.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of new weights, of the share, of the order.")] = 0,
    preset: PresetOption = "paper",
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where the task's images lie.", show_default=False),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a pre-trained network on a task with labels, and measure it; repeated, it goes on."""
    from training.downstream.cells import run_cell, settings_of
    from training.downstream.report import result_lines
    from training.downstream.task import Cell

    if not fraction > 0:
        raise SetupError("--fraction must be above 0")
    cell = Cell(task=task, init=init, mode=mode, fraction=fraction, seed=seed)
    with _writing(run):
        result = run_cell(cell, settings_of(task, preset, data, settings or []), run)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        for line in result_lines(result):
            _print(line)
        _print(f"Result: {run}")


@train.command()
def compare(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="What to compare; docs/downstream.md.")],
    output: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Runs, tables and pictures.")],
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing; write the tables of what is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run all of a grid of starts, modes, shares of labels and seeds; repeated, only what is missing."""
    from training.downstream.compare import load_grid, run_grid
    from training.downstream.report import write_report

    wanted = load_grid(grid)
    with _writing(output):
        outcome = run_grid(wanted, output, run=not report_only)
        summary = write_report(wanted, outcome, output)
    if as_json:
        _print_json(summary)
    else:
        _print((output / "report.md").read_text(encoding="utf-8").rstrip())
        _print(f"Report: {output / 'report.html'}")
    if outcome.failures:
        sys.exit(SOME_FAILED)


@train.command("doctor")
def train_doctor(
    run: RunOption = Path("runs/new"),
    kind: Annotated[Literal["tokenizer", "mim"], typer.Option(help="What would be trained.")] = "tokenizer",
    tokenizer_run: TokenizerOption = None,
    preset: PresetOption = "tiny",
    data_dir: DataOption = Path("data"),
    mix_name: MixOption = None,
    dedup: DedupOption = False,
    settings: SetOption = None,
    cache: CacheOption = None,
    cache_gb: CacheLimitOption = None,
    processes: ProcessesOption = 1,
    other_corpus: Annotated[
        bool, typer.Option("--other-corpus", help="The tokenizer may have been trained on another corpus.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, help="About what it may take.")] = 120,
    as_json: JsonOption = False,
) -> None:
    """Make a run's first steps on your machine and corpus: what speaks against it, and what it will take.

    A run that cannot end well is refused with exit code 2. docs/preflight.md lists what is looked for.
    """
    from training.config import load_preset

    overrides = [*(settings or ()), *_drawn_from(mix_name, dedup), *_cached(cache, cache_gb)]
    if tokenizer_run is not None:
        overrides.append(_tokenizer_setting(tokenizer_run))
    config = (
        load_preset("tokenizer", preset, overrides)
        if kind == "tokenizer"
        else load_preset("mim", preset, overrides)
    )
    from training.preflight import show
    from training.preflight.examine import examine

    found = examine(
        config, data_dir, run, preset=preset, processes=processes, seconds=seconds, other_corpus=other_corpus
    )
    _print_json(show.as_json(found)) if as_json else show.render(found, _console())
    if found.refused():
        raise typer.Exit(WRONG_CALL)


evaluate_app = typer.Typer(help="Measure what a trained model can do.", no_args_is_help=True)
train.add_typer(evaluate_app, name="evaluate")

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Run folder, checkpoint, export, or id of a model on a hub."),
]


@evaluate_app.command("tokenizer")
def evaluate_a_tokenizer(
    model: ModelArgument,
    data_dir: DataOption = Path("data"),
    images: Annotated[int, typer.Option(min=1, help="Held-out images to measure on, of every kind.")] = 64,
    output: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Table and pictures go here.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a tokenizer's reconstructions and use of its codebook, by modality and DA level."""
    from catalog.output import batches_of, printable, write_csv, write_json
    from training.data import open_validation
    from training.evaluate import draw_codebook, draw_reconstructions, evaluate_tokenizer
    from training.pretrained import load_tokenizer
    from training.run import choose_device

    where = choose_device(device)
    network = load_tokenizer(model).to(where)
    held_out = open_validation(data_dir, images)
    if not held_out.held_out:
        typer.echo("note: nobody is held out in this corpus; these are training images", err=True)
    evaluation = evaluate_tokenizer(network, held_out.batches, held_out.modalities, where)
    table = evaluation.table()
    if as_json:
        write_json(batches_of(table), sys.stdout.buffer)
    else:
        _print(printable(batches_of(table)))
    if output is not None:
        with _writing(output):
            output.mkdir(parents=True, exist_ok=True)
            draw_reconstructions(evaluation, output / "reconstructions.png")
            draw_codebook(evaluation, output / "codebook.png")
            with (output / "table.csv").open("wb") as stream:
                write_csv(batches_of(table), stream)
        if not as_json:
            _print(f"Table and pictures: {output}")


@train.command()
def embed(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Features go here; repeat the call to go on.")
    ],
    data_dir: DataOption = Path("data"),
    mix_name: MixOption = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="CONDITION", help="Only images for which this holds.", show_default=False),
    ] = None,
    split: Annotated[
        Literal["train", "validation"] | None, typer.Option(help="Only this split.", show_default=False)
    ] = None,
    level: Annotated[
        Literal["class", "tokens"],
        typer.Option(help="One vector an image (class token, mean of patch tokens); or one a patch token too."),
    ] = "class",
    number: Annotated[
        Literal["float16", "float32"], typer.Option("--dtype", help="How they are stored.")
    ] = "float16",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="How they are computed.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Tiles at once.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the features of a corpus's images, as a trained ViT sees them, into Parquet (and Zarr)."""
    from training.embed import EmbeddingConfig, plan_embedding, summary_lines
    from training.run import choose_device

    on = choose_device(device)
    config = EmbeddingConfig(
        mix=mix_name or "all", where=where, split=split, level=level, number=number, precision=precision
    )
    work = plan_embedding(data_dir, model, config)
    if dry_run:
        summary = work.identity
    else:
        with _count_bar() as show:
            summary = work.write(output, on, batch_size=batch_size, workers=workers, progress=show)
    if as_json:
        _print_json(summary)
    else:
        for line in summary_lines(summary):
            _print(line)
    if summary.get("failed"):
        sys.exit(SOME_FAILED)


@train.command("export")
def export_model(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder for the export.")],
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Of a ViT, leave out the head of its pre-training.")
    ] = False,
    average: Annotated[
        bool, typer.Option("--ema", help="Take the moving average of the weights, if the run kept one.")
    ] = False,
) -> None:
    """Write a trained model as weights (safetensors), configuration (JSON) and model card."""
    from training.mim import MaskedImageModel
    from training.pretrained import (
        export_pretrained,
        find_pretrained,
        load_pretrained,
        lock_of,
        training_of,
    )

    place = find_pretrained(model)
    trained = load_pretrained(place, average=average)
    if encoder:
        if not isinstance(trained, MaskedImageModel):
            raise SetupError(f"{model} has no head to leave out: export it without --encoder")
        trained = trained.vit
    with _writing(output):
        export_pretrained(trained, output, training_of(place), lock_of(place))
    _print(f"Exported: {output}")


@train.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors, .pt, .pth, .bin or .ckpt")],
    output: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder for the model.")],
    kind: Annotated[
        Literal["tokenizer", "mim", "vit"],
        typer.Option(help="What the file holds; vit takes the encoder alone, from EVA-02 too."),
    ],
    preset: Annotated[str, typer.Option(help="How large the model is.")] = "paper",
    settings: SetOption = None,
) -> None:
    """Read weights of others: published PUMIT checkpoints, or EVA-02. Nothing in the file is executed."""
    from training.convert import import_weights

    with _writing(output):
        report = import_weights(kind, file, output, preset, settings or [])
    _print(str(report))
    _print(f"Imported: {output}")


def _tokenizer_setting(run: Path) -> str:
    return f"tokenizer={json.dumps(str(run))}"  # quoted: the value is read as YAML


def _drawn_from(mix_name: str | None, dedup: bool) -> list[str]:
    """--mix and --dedup as settings; the name is quoted, for the value is read as YAML."""
    named = [] if mix_name is None else [f"data.mix={json.dumps(mix_name)}"]
    return named + ["data.dedup=true"] * dedup


def _train(
    kind: Literal["tokenizer", "mim"],
    preset: str,
    settings: list[str],
    data_dir: Location,
    run: Path,
    resume: bool,
    processes: int,
) -> None:
    from ingest.spec import load_specs
    from training.config import load_preset

    config = load_preset(kind, preset, settings)  # a wrong setting is told before torch is loaded
    if processes > 1 and "RANK" not in os.environ:
        from training.launch import launch

        sys.exit(launch([sys.executable, *sys.orig_argv[1:]], processes))
    if processes > 1 and os.environ.get("WORLD_SIZE") != str(processes):
        raise SetupError(
            f"--nproc {processes} starts processes, but something else (torchrun?) already started "
            f"{os.environ.get('WORLD_SIZE', 'an unknown number of them')}: leave --nproc out."
        )
    from training.world import PeerLost, joined

    module = importlib.import_module(f"training.train_{kind}")
    licences = {name: spec.licence for name, spec in load_specs().items()}
    try:
        with joined(config.device) as world:
            summary = module.train(config, data_dir, run, resume=resume, licences=licences, world=world)
    except PeerLost as lost:
        typer.echo(f"error: {lost}", err=True)
        raise
    if world.rank > 0:
        return
    speed = summary["images_per_second"]
    _print(
        f"{kind}: {summary['steps']} steps, loss {summary['first_loss']:.4g} -> {summary['last_loss']:.4g}"
        f"{'' if speed is None else f', {speed:.3g} images/s'}. Checkpoints, logs and pictures: {run}"
    )


def _cached(folder: Path | None, gigabytes: float | None) -> list[str]:
    """The settings that --cache and --cache-gb stand for."""
    given = {"cache_dir": folder and str(folder.absolute()), "cache_gb": gigabytes}
    return [f"data.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]


def _specs_present(raw: RawFolder) -> list[DatasetSpec]:
    """The datasets that --all stands for; says which it leaves out."""
    from ingest.discover import why_left_out
    from ingest.spec import load_specs

    specs = load_specs(raw=raw.folder).values()
    for spec in specs:
        raw.outline(spec)
    reasons = {spec.id: why_left_out(spec, raw.folder) for spec in specs}
    for reason in sorted({reason for reason in reasons.values() if reason is not None}):
        ids = ", ".join(name for name, why in reasons.items() if why == reason)
        _console(stderr=True).print(f"Left out, {reason} in {raw.place}: {ids}", markup=False)
    if not (present := [spec for spec in specs if reasons[spec.id] is None]):
        raise SetupError(f"{raw.place} has no folder of any dataset. `pumit-data list` shows what is known.")
    return present


def _estimates(plans: list[IngestPlan], corpus: Any, workers: int | None) -> list[Estimate]:
    from ingest.cluster import workers_that_fit
    from ingest.estimate import estimate
    from ingest.runs import past_runs

    earlier = list(past_runs(corpus))
    return [
        estimate(
            plan.spec.id,
            plan.sources.pending_bytes_by_format(),
            workers or workers_that_fit(plan.sources.largest_bytes),
            earlier,
        )
        for plan in plans
    ]


def _run_plans(
    plans: list[IngestPlan], corpus: Any, workers: int | None, scheduler: str | None
) -> list[IngestReport]:
    from contextlib import ExitStack

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ingest.cluster import dashboard_of, open_client
    from ingest.report import by_status
    from ingest.run import ingest_dataset

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    ]
    with ExitStack() as stack:
        # A cluster takes a second to start: not for a rerun that finds everything done.
        idle = not any(plan.pending for plan in plans)
        largest = max(plan.sources.largest_bytes for plan in plans)
        client = None if idle else stack.enter_context(open_client(workers, scheduler, largest))
        if client is not None and (dashboard := dashboard_of(client)):
            _console(stderr=True).print(f"Dashboard: {dashboard}", markup=False)
        bars = stack.enter_context(Progress(*columns, console=_console(stderr=True)))
        reports = []
        for plan in plans:
            bar = bars.add_task(plan.spec.id, total=plan.pending, counts="")

            def show(done: int, total: int, outcomes: Outcomes, bar: Any = bar) -> None:
                counts = ", ".join(f"{number} {status}" for status, number in by_status(outcomes).items())
                bars.update(bar, completed=done, total=total, counts=counts)

            reports.append(ingest_dataset(plan, corpus, client, show))
    return reports


@contextmanager
def _byte_bar(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on the terminal; yields what to call with (bytes done, bytes in all or None)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=_console(stderr=True)) as bars:
        bar = bars.add_task(description, total=None)

        def show(done: int, total: int | None) -> None:
            bars.update(bar, completed=done, total=None if total is None else max(done, total))

        yield show


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an error on a text file that the user named into one line."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise SetupError(f"{path} cannot be read: {what}. Name another file.") from error


@contextmanager
def _count_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the terminal; yields what to call with (what is done, how many, of how many or 0)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=_console(stderr=True)) as bars:
        known: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=None)
            bars.update(known[what], completed=done, total=total or None)

        yield show


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError on a file that the user named into one line."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {error.strerror or error}. Name another file.") from error


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_FILE
    return console


def _print(what: Any) -> None:
    _console().print(what, markup=False) if isinstance(what, str) else _console().print(what)


def _one_format(asked: dict[str, bool]) -> None:
    given = [name for name, wanted in asked.items() if wanted]
    if len(given) > 1:
        raise SetupError(f"{' and '.join(given)} exclude each other. Give one of them.")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _refuse_shadowed_packages() -> None:
    """The packages have plain names: a folder `training` on the path could stand in front of ours."""
    home = Path(__file__).resolve().parent
    for name in ("catalog", "shards", "ingest", "training"):
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve().parent.parent != home:
            raise SetupError(
                f"the package {name!r} was found at {origin or 'a bare folder'}, not beside {__file__}: "
                "a folder of that name comes first on the Python path. Start from another folder, with the "
                "console scripts `pumit-data` and `pumit-train`, and without PYTHONPATH."
            )


class _Interrupted(BaseException):
    """SIGINT or SIGTERM came. Not KeyboardInterrupt, for which the command-line library has its own code."""


_signals: list[int] = []


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _signals.append(signum)
    raise _Interrupted


def _main(app: typer.Typer) -> None:
    """Run a command line; a user's mistake ends in one line and the exit code, never in a traceback."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _refuse_shadowed_packages()
        app()
    except SetupError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(WRONG_CALL)
    except OSError as error:
        # The world's faults (no permission, no space), wherever they come up; a closed pipe is none.
        if isinstance(error, BrokenPipeError):
            raise
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {where}{error.strerror or error}. Mend that and repeat the command.", err=True)
        sys.exit(WRONG_CALL)
    except (_Interrupted, RuntimeError) as error:
        # DuckDB puts an error of its own in the place of ours when a signal ends a query.
        if not (isinstance(error, _Interrupted) or _signals):
            raise
        typer.echo("interrupted: repeat the command to go on.", err=True)
        sys.exit(INTERRUPTED)


def data_main() -> None:
    """Console script `pumit-data`."""
    _main(data)


def train_main() -> None:
    """Console script `pumit-train`."""
    _main(train)
