"""One image of the catalog, row and preview, for a human to read; no shard is opened."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import load_catalog, load_dataset, read_table, remedy_of
from catalog.schema import CATALOG_SCHEMA

_SUGGESTIONS = 5
_WIDTH_FOR_MEANINGS = 110

_SECTIONS: dict[str, list[str]] = {
    "Image": [
        *("dataset", "key", "subject", "status", "reason", "message", "modality", "upstream_modality"),
        *("body_part", "dimension", "split", "sampling_weight"),
    ],
    "As stored": [
        *("shape_c", "shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x", "da", "da_level"),
        *("stored_dtype", "slope", "intercept", "window_low", "window_high"),
    ],
    "Intensities": [
        *("intensity_mean", "intensity_std", "intensity_median", "intensity_min", "intensity_max"),
        *("intensity_p0_5", "intensity_p99_5"),
    ],
    "In the file": ["original_shape", "original_spacing", "original_orientation"],
    "Decisions": ["depth_axis", "depth_rule", "geometry_flags", "crop_box", "resize_factor"],
}
"""Columns by what they speak of; those not named here come last, as where the image lies and came from."""


@dataclass(frozen=True)
class ViewedImage:
    """One image as the catalog has it."""

    row: dict[str, Any]
    """All columns of CATALOG_SCHEMA."""
    preview: bytes | None
    """PNG of the mid-planes; null for an image that was not ingested."""


def find_image(corpus: Corpus, key: str, dataset: str | None = None) -> ViewedImage:
    """The row and the preview of one image.

    Args:
        key: as the catalog has it, or `dataset/key`.
        dataset: id, where several datasets have the key.

    Raises:
        SetupError: no such image (the closest keys are named), or several datasets have it; or as
            `load_catalog`.
    """
    wanted = [(dataset, key)] if dataset is not None else _readings(corpus, key)
    found = [row for where, name in wanted for row in _rows(corpus, where, name)]
    if not found:
        raise SetupError(_unknown(corpus, key, dataset))
    if len(found) > 1:
        ids = sorted(row["dataset"] for row in found)
        raise SetupError(f"The key {key!r} is in {', '.join(ids)}. Say which: --dataset {ids[0]}.")
    row = found[0]
    return ViewedImage(row, _preview(corpus, row["dataset"], row["key"]))


def render(image: ViewedImage, console: Console) -> None:
    """Print the row: columns in groups, with units and meanings; what is null is left out."""
    grouped = {name for names in _SECTIONS.values() for name in names}
    rest = [name for name in CATALOG_SCHEMA.names if name not in grouped]
    title = Text(f"{image.row['dataset']}/{image.row['key']}", style="bold")
    table = Table(title=title, title_justify="left", show_header=False)
    # On a narrow screen the meanings would leave no room for the values.
    columns = 3 if console.width >= _WIDTH_FOR_MEANINGS else 2
    for _ in range(columns):
        table.add_column(overflow="fold")
    for section, names in (_SECTIONS | {"Origin and place": rest}).items():
        known = [name for name in names if image.row[name] not in (None, [])]
        if not known:
            continue
        table.add_row(Text(section, style="bold"))
        for name in known:
            metadata = CATALOG_SCHEMA.field(name).metadata
            unit = metadata.get(b"unit", b"").decode()
            value = f"{_shown(image.row[name])} {unit}".rstrip()
            meaning = metadata[b"description"].decode()
            cells = [Text(f"  {name}"), Text(value), Text(meaning, style="dim")]
            table.add_row(*cells[:columns])
        table.add_section()
    console.print(table)


def picture_name(image: ViewedImage) -> str:
    """A file name for the preview, of plain characters."""
    return re.sub("[^A-Za-z0-9._-]+", "_", f"{image.row['dataset']}-{image.row['key']}")[:120] + ".png"


def _readings(corpus: Corpus, key: str) -> list[tuple[str, str]]:
    """Datasets and keys that the given key may mean: a key of any dataset, or `dataset/key`."""
    datasets = corpus.datasets()
    before, slash, after = key.partition("/")
    qualified = [(before, after)] if slash and before in datasets else []
    return [*((name, key) for name in datasets), *qualified]


def _rows(corpus: Corpus, dataset: str, key: str) -> list[dict[str, Any]]:
    if dataset not in corpus.datasets():
        load_catalog(corpus, columns=["key"], datasets=[dataset])  # says what is missing
    table = load_dataset(corpus, dataset, CATALOG_SCHEMA.names, [pc.field("key") == key])
    return table.to_pylist()  # type: ignore[no-any-return]


def _preview(corpus: Corpus, dataset: str, key: str) -> bytes | None:
    file = corpus.published(corpus.preview_file(dataset))
    if not file.exists():
        return None
    found: pa.Table = read_table(file, remedy_of(dataset), ["preview"], [pc.field("key") == key])
    return found["preview"][0].as_py() if found.num_rows else None


def _unknown(corpus: Corpus, key: str, dataset: str | None) -> str:
    """That no image has the key, with the closest ones: those that contain it, else those spelt alike."""
    datasets = None if dataset is None else [dataset]
    table = load_catalog(corpus, columns=["dataset", "key"], datasets=datasets, status=None)
    names = [f"{row['dataset']}/{row['key']}" for row in table.to_pylist()]
    close = [name for name in names if key.casefold() in name.casefold()][:_SUGGESTIONS]
    if not close:
        by_key: dict[str, str] = {}
        for name in names:
            by_key.setdefault(name, name)
            by_key.setdefault(name.partition("/")[2], name)
        alike = difflib.get_close_matches(key, by_key, n=_SUGGESTIONS, cutoff=0.4)
        close = list(dict.fromkeys(by_key[match] for match in alike))
    hint = f" Closest: {', '.join(close)}." if close else ""
    where = f"dataset {dataset!r}" if dataset is not None else "the catalog"
    return f"There is no image {key!r} in {where} ({len(names)} images).{hint}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_shown, value))
    return str(value)
