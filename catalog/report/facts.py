"""What the report says, as plain dicts, lists, numbers and texts: no markup, no places of marks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.doctor.examine import diagnose
from catalog.doctor.sheet import picture_sheet
from catalog.query import load_dataset
from catalog.report.duplicates import duplicates_facts
from catalog.report.pictures import DESCRIBED, allotment, contact_sheet, sampled_rows
from catalog.stats import AUDITED, audit, summarise_cells
from catalog.survey import MEASURES, Cells, GroupColumn, Measure, in_threads, survey_corpus

REPORTED: tuple[GroupColumn, ...] = (*AUDITED, "dimension")
"""The groupings that the report needs of a survey."""
SHAPES: tuple[Measure, ...] = ("shape_d", "shape_h", "shape_w")
INTENSITIES = ("intensity_p0_5", "intensity_median", "intensity_p99_5")
SPREAD = (0.05, 0.5, 0.95)
"""Quantiles over the images that are shown of each of INTENSITIES."""

SUSPECTS = (60, 30, 3, 4_000)
"""Findings that are listed; pictures of suspects in all and of a finding, and bytes of one."""
FINEST_STEP, MOST_MARKS = 16, 2_500
"""Marks of the spacing chart: steps an octave at first, and how many marks make them coarser."""
_NAMED_DATASETS = 3

_Place = tuple[str, int, int]
"""Family, spacing in-plane and between slices, these in steps of a part of an octave from 1 mm."""
_ROWS = ["dataset", "key", "modality", "status", *DESCRIBED, *INTENSITIES]


def report_facts(
    corpus: Corpus, where: str | None = None, meanings: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return all that the page shows. The same corpus gives the same facts.

    Args:
        where: a condition in SQL; only rows for which it holds are reported.
        meanings: of the reason codes, by code.

    Returns:
        where; totals, modalities, levels as `catalog.stats.audit` has them; datasets (outcomes, counts, and
        quantiles of shapes); spacings (see `spacing_marks`); intensities (per dataset and modality, SPREAD of
        each of INTENSITIES over its images); reasons; doctor (see `catalog.doctor.sheet.picture_sheet`); sheet
        (see `catalog.report.pictures.contact_sheet`); duplicates (of the whole corpus, see
        `catalog.report.duplicates.duplicates_facts`).

    Raises SetupError as `catalog.survey.survey_corpus`, and if a preview is damaged.
    """
    survey = survey_corpus(corpus, REPORTED, MEASURES, where)
    summary = audit(survey)
    sizes = _group_sizes(survey)
    allotted = allotment(sizes)
    intensities: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    for found, sampled in _of_images(corpus, [cells.dataset for cells in survey], allotted, where):
        intensities += found
        chosen += sampled
    return {
        "where": where,
        "totals": summary["totals"],
        "modalities": sorted(summary["by_modality"], key=lambda row: (-row["images"], str(row["modality"]))),
        "levels": summary["by_da_level"],
        "datasets": _datasets(survey, summary),
        "spacings": spacing_marks(survey),
        "intensities": intensities,
        "reasons": _reasons(survey, meanings or {}),
        "doctor": picture_sheet(corpus, diagnose(corpus, where=where), *SUSPECTS),
        "sheet": contact_sheet(corpus, chosen, sizes),
        "duplicates": duplicates_facts(corpus),
    }


def spacing_marks(survey: Sequence[Cells]) -> dict[str, Any]:
    """The 3-D images by spacing: every one is counted, and those that lie close together share a mark.

    Returns `images`, how many there are; `step`, marks an octave; and `marks`, largest first: `family` (what
    stands before the slash of the modality), `in_plane` and `between` in mm, `images`, and `datasets`, pairs of
    id and images. The step is FINEST_STEP, or as much coarser as keeps within MOST_MARKS.
    """
    step, counted = FINEST_STEP, _counted(survey)
    while len(counted) > MOST_MARKS and step > 1:
        step, counted = step // 2, _coarser(counted)
    marks: list[dict[str, Any]] = [
        {
            "family": family,
            "in_plane": 2 ** (across / step),
            "between": 2 ** (deep / step),
            "images": sum(datasets.values()),
            "datasets": _most(datasets),
        }
        for (family, across, deep), datasets in counted.items()
    ]
    marks.sort(key=lambda mark: (-mark["images"], mark["family"], mark["in_plane"], mark["between"]))
    return {"images": sum(mark["images"] for mark in marks), "step": step, "marks": marks}


def family_of(modality: str | None) -> str:
    """What stands before the slash of a modality."""
    return (modality or "unknown").partition("/")[0]


def _counted(survey: Sequence[Cells]) -> dict[_Place, dict[str, int]]:
    """Images by place and then by dataset."""

    def of_dataset(cells: Cells) -> dict[_Place, int]:
        places: dict[_Place, int] = {}
        for labels, run in zip(cells.labels, cells.runs(range(len(cells.labels))), strict=True):
            pairs = [_octaves(cells.values[name][run]) for name in ("spacing_in_plane", "spacing_z")]
            known = np.isfinite(pairs[0]) & np.isfinite(pairs[1])
            if labels["dimension"] != (3,) or not known.any():
                continue
            across, deep = (pair[known].astype(np.int64) for pair in pairs)
            (modality,) = labels["modality"]
            for code, count in zip(*np.unique((across << 32) + deep, return_counts=True), strict=True):
                high = int(code + (1 << 31)) >> 32
                place = (family_of(None if modality is None else str(modality)), high, int(code) - (high << 32))
                places[place] = places.get(place, 0) + int(count)
        return places

    counted: dict[_Place, dict[str, int]] = {}
    for cells, places in zip(survey, in_threads(of_dataset, survey), strict=True):
        for place, count in places.items():
            counted.setdefault(place, {})[cells.dataset] = count
    return counted


def _coarser(counted: Mapping[_Place, Mapping[str, int]]) -> dict[_Place, dict[str, int]]:
    merged: dict[_Place, dict[str, int]] = {}
    for (family, across, deep), datasets in counted.items():
        there = merged.setdefault((family, round(across / 2), round(deep / 2)), {})
        for dataset, count in datasets.items():
            there[dataset] = there.get(dataset, 0) + count
    return merged


def _octaves(spacing: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.rint(np.log2(spacing) * FINEST_STEP)  # type: ignore[no-any-return]


def _most(datasets: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(datasets.items(), key=lambda pair: (-pair[1], pair[0]))[:_NAMED_DATASETS]


def _datasets(survey: Sequence[Cells], summary: dict[str, Any]) -> list[dict[str, Any]]:
    counts = {row["dataset"]: row for row in summary["by_dataset"]}
    shapes = {row["dataset"]: row for row in summarise_cells(survey, ["dataset"], SHAPES).to_pylist()}
    return [
        outcome | {"counts": counts.get(outcome["dataset"]), "shapes": shapes.get(outcome["dataset"])}
        for outcome in summary["datasets"]
    ]


def _reasons(survey: Sequence[Cells], meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Images that were not ingested, by status and reason, the most frequent first."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for cells in survey:
        for (status, reason), count in cells.outcomes.items():
            if status != "ingested":
                found.setdefault((status, reason or "not stated"), {})[cells.dataset] = count
    rows = [
        {
            "status": status,
            "reason": reason,
            "meaning": meanings.get(reason),
            "images": sum(datasets.values()),
            "datasets": sorted(datasets.items(), key=lambda pair: (-pair[1], pair[0])),
        }
        for (status, reason), datasets in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["images"], row["status"], row["reason"]))


def _group_sizes(survey: Sequence[Cells]) -> dict[tuple[str, str | None], int]:
    sizes: dict[tuple[str, str | None], int] = {}
    for cells in survey:
        for labels, images in zip(cells.labels, cells.sums["images"], strict=True):
            (modality,) = labels["modality"]
            group = (cells.dataset, None if modality is None else str(modality))
            sizes[group] = sizes.get(group, 0) + int(images)
    return sizes


def _of_images(
    corpus: Corpus,
    datasets: Sequence[str],
    allotted: Mapping[tuple[str, str | None], int],
    where: str | None,
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Intensities by modality and the sampled rows of each dataset, whose tables are held one a thread."""

    def facts(dataset: str, table: pa.Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = table.filter(pc.equal(table["status"], "ingested"))
        modalities = sorted(
            pc.unique(rows["modality"]).to_pylist(), key=lambda name: (name is None, name or "")
        )
        intensities, sampled = [], []
        for modality in modalities:
            same = rows["modality"].is_null() if modality is None else pc.equal(rows["modality"], modality)
            images = rows.filter(same)
            intensities.append(_intensities(dataset, modality, images))
            sampled += sampled_rows(images, allotted[dataset, modality])
        return intensities, sampled

    if where is None:
        yield from in_threads(lambda dataset: facts(dataset, load_dataset(corpus, dataset, _ROWS)), datasets)
    else:
        from catalog.sql import select

        table = select(corpus, _ROWS, where).sort_by([("dataset", "ascending"), ("key", "ascending")])
        for dataset in datasets:
            yield facts(dataset, table.filter(pc.equal(table["dataset"], dataset)))


def _intensities(dataset: str, modality: str | None, images: pa.Table) -> dict[str, Any]:
    row: dict[str, Any] = {"dataset": dataset, "modality": modality, "images": images.num_rows}
    for name in INTENSITIES:
        values = pc.drop_null(images[name]).to_numpy()
        values = values[np.isfinite(values)]
        row[name] = [float(value) for value in np.quantile(values, SPREAD)] if len(values) else [math.nan] * 3
    return row
