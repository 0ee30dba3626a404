"""Groups of duplicates as a reader sees them: some of them with pictures, on a page of their own and in the
report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catalog.corpus import Corpus
from catalog.duplicates import load_groups
from catalog.duplicates.groups import Found, summary
from catalog.durable import replacing
from catalog.report.pictures import BYTES_OF_ONE, pictures_of

_MOST_GROUPS, _MOST_OF_A_GROUP = 60, 6
_MOST_IN_REPORT = 6
_BYTES = 2_400_000


def write_duplicates_page(corpus: Corpus, found: Found, path: Path) -> int:
    """Write a page of all counts and of some groups with pictures, by one rename. Returns its bytes.

    Shown first are groups with images for training and for validation, then those across datasets, then others.
    The same corpus gives the same page, below 5 MB.
    """
    from catalog.report.page import render_template

    described = summary(found)
    straddling = np.isin(np.arange(found.groups), described["straddling"])
    datasets = found.members.group_by("group").aggregate([("dataset", "count_distinct")]).sort_by("group")
    alone = datasets["dataset_count_distinct"].to_numpy() == 1
    shown = []
    for number in np.lexsort((alone, ~straddling))[:_MOST_GROUPS].tolist():
        members = sorted(found.group(number), key=lambda member: not member["kept"])
        shown.append(
            {
                "number": number,
                "size": len(members),
                "straddles": bool(straddling[number]),
                "members": members[:_MOST_OF_A_GROUP],
            }
        )
    _add_pictures(corpus, shown)
    page = render_template("duplicates.html", described | {"shown": shown}).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return len(page)


def duplicates_facts(corpus: Corpus) -> dict[str, Any] | None:
    """What the report tells of the recorded groups; None where nobody has looked for duplicates.

    Returns groups, images, superfluous, exact (groups without a near member), and `shown`: a few groups across
    datasets, or within, with their members.

    Raises SetupError if the recorded file is damaged.
    """
    table = load_groups(corpus)
    if table is None:
        return None
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["group"], []).append(row)
    order = sorted(groups, key=lambda number: (len({row["dataset"] for row in groups[number]}) == 1, number))
    shown: list[dict[str, Any]] = [
        {
            "number": number,
            "size": len(groups[number]),
            "members": sorted(groups[number], key=lambda row: not row["kept"])[:_MOST_OF_A_GROUP],
        }
        for number in order[:_MOST_IN_REPORT]
    ]
    _add_pictures(corpus, shown)
    return {
        "groups": len(groups),
        "images": table.num_rows,
        "superfluous": table.num_rows - len(groups),
        "exact": sum(all(row["kind"] == "exact" for row in rows) for rows in groups.values()),
        "shown": shown,
    }


def _add_pictures(corpus: Corpus, shown: Sequence[dict[str, Any]]) -> None:
    members: list[dict[str, Any]] = [member for group in shown for member in group["members"]]
    limit = min(BYTES_OF_ONE, _BYTES // max(1, len(members)))
    for dataset in sorted({member["dataset"] for member in members}):
        here = [member for member in members if member["dataset"] == dataset]
        pictures = pictures_of(corpus, dataset, [member["key"] for member in here], limit)
        for member in here:
            member["picture"] = pictures.get(member["key"])
