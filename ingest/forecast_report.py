"""A forecast as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from ingest.forecast import Figure, Forecast, Speeds, total

_UNKNOWN = "unknown"
_MARKS = {"estimated": "~", "download": "≥ ", "published": "", "on disk": "", "catalog": ""}
"""Before a number: how far it can be trusted."""


def render(forecasts: Sequence[Forecast], speeds: Speeds, console: Console) -> None:
    """Print one line a dataset, the sums, the expected mix, and where the figures come from."""
    columns = ("now", "images", "raw", "prepared", "ingest", "licence", "how to get it")
    table = Table(Column("id", no_wrap=True), *columns, title="Plan", title_justify="left")
    for one in forecasts:
        table.add_row(
            one.dataset,
            one.state,
            _number(one.images),
            _bytes(one.raw_bytes),
            _bytes(one.prepared_bytes),
            _hours(one.hours),
            Text(one.licence or "not stated"),
            _way(one),
        )
    sums = total(forecasts)
    shown = {name: _at_least(name, *figure) for name, figure in sums.figures.items()}
    table.add_section()
    table.add_row(
        "all", "", shown["images"], shown["raw_bytes"], shown["prepared_bytes"], shown["hours"], "", ""
    )
    console.print(table)
    console.print(f"Still to fetch: {shown['raw_bytes_missing']}.")
    mix = Table("kind", "images", "share of draws", title="Expected mix, as far as known", title_justify="left")
    for kind, images in sums.modalities.items():
        share = sums.shares.get(kind)
        mix.add_row(kind, f"{images:,.0f}" if images else _UNKNOWN, f"{share:.1%}" if share else _UNKNOWN)
    console.print(mix)
    levels = ", ".join(f"{level}: {images:,.0f}" for level, images in sums.da_levels.items())
    console.print(
        f"Images by DA level (5 is 2-D), as far as known: {levels or _UNKNOWN}. Of volumes it is known when "
        "they are ingested.",
        soft_wrap=True,
    )
    for one in forecasts:
        if one.problem is not None:
            console.print(Text(one.problem))
    if speeds.measured:
        measured = ", ".join(
            f"{kind} {decimal(round(speed.bytes_per_second))}/s" for kind, speed in speeds.measured.items()
        )
        console.print(
            f"~ is estimated from a generated image that was ingested just now: {measured} of processor time, "
            f"on {speeds.workers} cores, without waiting for disks. Compressed DICOM takes up to ten times as "
            "long.",
            soft_wrap=True,
        )
    if any(one.raw_bytes is not None and one.raw_bytes.source == "download" for one in forecasts):
        console.print("≥ is the size of the download, which may grow when it is unpacked.")


def _way(one: Forecast) -> str:
    if one.state in ("ingested", "part ingested", "on disk"):
        return "is here"
    return "pumit-data download" if one.downloadable else one.access


def _number(figure: Figure | None) -> str:
    return _UNKNOWN if figure is None else f"{figure.value:,.0f}"


def _bytes(figure: Figure | None) -> str:
    return _UNKNOWN if figure is None else _MARKS[figure.source] + decimal(round(figure.value))


def _hours(figure: Figure | None) -> str:
    return _UNKNOWN if figure is None else _MARKS[figure.source] + _duration(figure.value)


def _duration(hours: float) -> str:
    if not hours:
        return "done"
    return f"{hours:.1f} h" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} min"


def _at_least(name: str, value: float, unknown: int) -> str:
    """A sum; of several datasets of which one is unknown it is a lower bound."""
    text = (
        f"{value:,.0f}" if name == "images" else _duration(value) if name == "hours" else decimal(round(value))
    )
    if not unknown:
        return text
    return f"at least {text} ({unknown} unknown)" if value else f"unknown ({unknown})"
