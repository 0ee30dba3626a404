"""The facts of the report as one HTML page that needs nothing else: no network, no font, no library."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catalog.durable import replacing
from catalog.report.charts import intensity_scale, level_chart, size_scale, spacing_chart
from catalog.report.facts import INTENSITIES, SHAPES

if TYPE_CHECKING:
    from markupsafe import Markup


def write_page(facts: dict[str, Any], path: Path) -> int:
    """Write the page of `catalog.report.facts.report_facts`, by one rename. Returns its bytes."""
    page = render_page(facts).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return len(page)


def render_page(facts: dict[str, Any]) -> str:
    """The page. The same facts give the same text."""
    images = facts["totals"]["ingested"]
    marks = facts["spacings"]["marks"]
    shown = facts | {
        "scatter": spacing_chart(facts["spacings"]) if marks else None,
        "columns": level_chart(facts["levels"], images) if images else None,
        "size_axis": size_scale(facts["datasets"], SHAPES),
        "intensity_axis": intensity_scale(facts["intensities"], INTENSITIES),
        "shape_names": SHAPES,
        "known": lambda value: value is not None and math.isfinite(value),
    }
    return render_template("report.html", shown)


def render_template(name: str, values: Mapping[str, Any]) -> str:
    """One of the packaged pages, with the style, the script and the policy that are common to them.

    Texts of the catalog are escaped, and the page's own policy lets a browser run no script and load no style
    but those that are packaged here, known by their hash.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from rich.filesize import decimal

    environment = Environment(
        loader=PackageLoader("catalog.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "number": _number, "percent": _percent, "bytes": decimal}
    environment.filters["with_code"] = with_code
    style, script = _packaged("report.css"), _packaged("report.js")
    return environment.get_template(name).render(
        **values,
        style=Markup(style),  # noqa: S704 (packaged, not of the catalog)
        script=Markup(script),  # noqa: S704
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
    )


def with_code(text: str) -> Markup:
    """The text, escaped, with what stands between two backticks as code."""
    from markupsafe import Markup, escape

    escaped = str(escape(text))
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))  # noqa: S704 (escaped before)


def _packaged(name: str) -> str:
    return resources.files("catalog.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    """Three significant digits, whole numbers whole."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"
