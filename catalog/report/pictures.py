"""The contact sheet: stored previews of some images of each dataset and modality, within a bound of bytes."""

from __future__ import annotations

import base64
import functools
import io
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import read_table, remedy_of
from catalog.survey import in_threads

MOST_PICTURES, MOST_OF_A_GROUP = 360, 6
BYTES_OF_ALL, BYTES_OF_ONE = 2_400_000, 12_000
"""Of the compressed pictures; the page holds four bytes for three of them."""
DESCRIBED = ["shape_d", "shape_h", "shape_w", "spacing_z", "spacing_y", "spacing_x"]
"""Columns that the text beside a picture is made of."""

_QUALITIES = (80, 60, 40, 20, 5)

Group = tuple[str, str | None]
"""Dataset and modality."""


def allotment(sizes: Mapping[Group, int]) -> dict[Group, int]:
    """How many pictures each group gets of MOST_PICTURES; none is left for small ones if there are too many."""
    largest = sorted(sizes, key=lambda group: (-sizes[group], group[0], group[1] or ""))
    each = min(MOST_OF_A_GROUP, max(1, MOST_PICTURES // max(1, len(sizes))))
    return {group: min(each, sizes[group]) if rank < MOST_PICTURES else 0 for rank, group in enumerate(largest)}


def sampled_rows(images: pa.Table, count: int) -> list[dict[str, Any]]:
    """`count` of the rows, evenly spaced in their order: the middles of as many equal parts."""
    rows = (2 * np.arange(count) + 1) * images.num_rows // (2 * max(1, count))
    return images.take(pa.array(rows, pa.int64())).to_pylist()  # type: ignore[no-any-return]


def contact_sheet(
    corpus: Corpus, rows: Sequence[Mapping[str, Any]], sizes: Mapping[Group, int]
) -> dict[str, Any]:
    """Pictures of the given catalog rows, with what a reader needs to know of each.

    Returns `shown` and `images`, how many of how many, and `datasets`: dataset, shown, images and `groups` of
    modality, images and pictures; a picture has key, width and height in pixels, the columns DESCRIBED, and
    `source`, a data address of WebP. A corpus without previews has a sheet without pictures.

    Raises SetupError if a preview is damaged.
    """
    keys: dict[str, list[str]] = {}
    for row in rows:
        keys.setdefault(row["dataset"], []).append(row["key"])
    limit = min(BYTES_OF_ONE, BYTES_OF_ALL // max(1, len(rows)))
    found = dict(
        zip(keys, in_threads(lambda name: _pictures(corpus, name, keys[name], limit), keys), strict=True)
    )
    by_group: dict[Group, list[dict[str, Any]]] = {}
    for row in rows:
        if (picture := found[row["dataset"]].get(row["key"])) is not None:
            described = {name: row[name] for name in ("key", *DESCRIBED)}
            by_group.setdefault((row["dataset"], row["modality"]), []).append(described | picture)
    datasets: list[dict[str, Any]] = []
    for dataset in sorted({dataset for dataset, _ in by_group}):
        groups: list[dict[str, Any]] = [
            {"modality": group[1], "images": sizes[group], "pictures": by_group[group]}
            for group in sorted(by_group, key=lambda group: (group[1] is None, group[1] or ""))
            if group[0] == dataset
        ]
        images = sum(size for group, size in sizes.items() if group[0] == dataset)
        shown = sum(len(group["pictures"]) for group in groups)
        datasets.append({"dataset": dataset, "shown": shown, "images": images, "groups": groups})
    return {
        "shown": sum(dataset["shown"] for dataset in datasets),
        "images": sum(sizes.values()),
        "datasets": datasets,
    }


def pictures_of(
    corpus: Corpus, rows: Sequence[Mapping[str, Any]], limit: int = BYTES_OF_ONE
) -> dict[tuple[str, str], dict[str, Any]]:
    """Width, height and source of the pictures of some hundred rows, by dataset and key, where there are any.

    Raises SetupError if a preview is damaged.
    """
    keys: dict[str, list[str]] = {}
    for row in rows:
        keys.setdefault(row["dataset"], []).append(row["key"])
    return {
        (dataset, key): picture
        for dataset, wanted in keys.items()
        for key, picture in _pictures(corpus, dataset, wanted, limit).items()
    }


def _pictures(corpus: Corpus, dataset: str, keys: Sequence[str], limit: int) -> dict[str, dict[str, Any]]:
    file = corpus.published(corpus.preview_file(dataset))
    if not file.exists():
        return {}
    # One comparison a key, not a set of them: these skip the row groups, of megabytes each, that cannot match.
    wanted = functools.reduce(operator.or_, (pc.field("key") == key for key in keys))
    table = read_table(file, remedy_of(dataset), ["key", "preview"], [wanted])
    return {row["key"]: _recompressed(dataset, row["key"], row["preview"], limit) for row in table.to_pylist()}


def _recompressed(dataset: str, key: str, png: bytes, limit: int) -> dict[str, Any]:
    """The preview as WebP of at most `limit` bytes: to get there of lower quality, at last of half the size."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture: Image.Image = Image.open(io.BytesIO(png), formats=["PNG"])
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise SetupError(f"the preview of {dataset}/{key} is no PNG: {error}. {remedy_of(dataset)}") from error
    width, height = picture.size
    while True:
        for quality in _QUALITIES:
            stream = io.BytesIO()
            picture.save(stream, "WEBP", quality=quality, method=4)
            if stream.tell() <= limit:
                source = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
                return {"width": width, "height": height, "source": source}
        picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))
