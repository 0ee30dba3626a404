"""What a dataset will take before anything is downloaded: disk, hours, logins, and what training will see.

Every figure says where it comes from, and an unknown one stays unknown.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from catalog.corpus import Corpus
from catalog.errors import SetupError
from ingest.discover import dataset_root, existing_roots
from ingest.probe import FileKind, Speed, kind_of_group, kind_of_source, measure
from ingest.spec import DatasetSpec

State = Literal["absent", "part downloaded", "on disk", "part ingested", "ingested"]

FLAT_LEVEL = 5
"""Degree-of-anisotropy level of every 2-D image."""


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: Literal["on disk", "published", "download", "catalog", "estimated"]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One dataset. None is unknown; an empty mix is one of which nothing is known."""

    dataset: str
    title: str
    state: State
    problem: str | None
    """Why what is on disk cannot be ingested as it is."""
    access: str
    licence: str | None
    downloadable: bool
    """Whether `pumit-data download` gets it."""
    weight: float
    images: Figure | None
    """Files or series, and images once they are ingested."""
    raw_bytes: Figure | None
    """Of the unpacked files; `download`: of the transfer."""
    raw_bytes_missing: float | None
    """What has to be fetched."""
    prepared_bytes: Figure | None
    """The shards of the whole dataset."""
    hours: Figure | None
    """Until it is ingested, from now on."""
    modalities: Mapping[str, float | None]
    """Images by kind (CT, MRI ...)."""
    da_levels: Mapping[int, float]
    """Images by level of anisotropy: of volumes it is unknown until they are ingested."""


@dataclass(frozen=True)
class Totals:
    """Sums over datasets; with the number of datasets of which the figure is unknown."""

    figures: Mapping[str, tuple[float, int]]
    modalities: Mapping[str, float]
    """Images by kind, as far as known."""
    shares: Mapping[str, float]
    """Part of the draws in training by kind, as far as known: images times the weight of their dataset, without
    what volumes of one file share."""
    da_levels: Mapping[int, float]
    """Images by level of anisotropy, as far as known."""


class Speeds:
    """Speed of this machine by kind of file; `measured` once for each kind that is asked for."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.measured: dict[FileKind, Speed] = {}

    def of(self, kind: FileKind) -> Speed:
        return self.measured.setdefault(kind, measure(kind))

    def hours(self, sizes: Mapping[FileKind, float]) -> float:
        """Hours for so many bytes of each kind, on all cores."""
        seconds = sum(size / self.of(kind).bytes_per_second for kind, size in sizes.items() if size)
        return seconds / self.workers / 3600

    def prepared(self, sizes: Mapping[FileKind, float]) -> float:
        return sum(size * self.of(kind).growth for kind, size in sizes.items() if size)


def forecast(spec: DatasetSpec, raw: Path, corpus: Corpus, speeds: Speeds) -> Forecast:
    """All that can be said of one dataset now. Reads names, sizes and the catalog; no image is opened."""
    from ingest.names import name_key
    from ingest.run import plan_ingest

    images = _figure(spec.published.images, "published")
    raw_bytes = _announced(spec)
    missing = None if raw_bytes is None else raw_bytes.value
    modalities: dict[str, float | None] = _published_mix(spec)
    pending: dict[FileKind, float] | None = None
    prepared: Figure | None = None
    state: State = "part downloaded" if (raw / ".pumit-download" / spec.id).exists() else "absent"
    problem: str | None = None
    da_levels: dict[int, float] = {}
    if spec.dimensions == [2] and images is not None:
        da_levels = {FLAT_LEVEL: images.value}
    if raw.is_dir() and existing_roots(spec, raw):
        try:
            root = dataset_root(spec, raw)
            names = name_key(corpus, keep=False) if spec.private_names else None
            plan = plan_ingest(spec, raw, corpus, names=names)
        except SetupError as error:
            problem = str(error)
        else:
            state = "on disk" if plan.pending == plan.found else "part ingested"
            if not plan.pending:
                state = "ingested"
            raw_bytes, missing = Figure(_size(root), "on disk"), 0.0
            images = Figure(plan.found, "on disk")
            modalities = dict(Counter(source.modality.split("/")[0] for source in plan.sources))
            da_levels = {FLAT_LEVEL: flat} if (flat := sum(one.dimension == 2 for one in plan.sources)) else {}
            everything, pending = _sizes(plan.sources), _sizes(plan.sources.still_to_do())
            prepared = Figure(speeds.prepared(everything), "estimated")
    elif raw_bytes is not None:
        # The publisher does not tell how much of it is labels: this is rather too much than too little.
        slowest = min(map(kind_of_group, spec.images), key=lambda kind: speeds.of(kind).bytes_per_second)
        pending = {slowest: raw_bytes.value}
        prepared = Figure(speeds.prepared(pending), "estimated")
    if state == "ingested" or (state == "absent" and corpus.catalog_file(spec.id).exists()):
        known = _ingested(spec, corpus)
        if known is not None:
            images, prepared, modalities, da_levels = known
            if state == "absent":  # the raw files are gone, and no longer needed
                state, missing, pending = "ingested", 0.0, {}
    return Forecast(
        dataset=spec.id,
        title=spec.title,
        state=state,
        problem=problem,
        access=spec.access.kind if spec.access is not None else "unknown",
        licence=spec.licence,
        downloadable=spec.download is not None,
        weight=spec.sampling_weight,
        images=images,
        raw_bytes=raw_bytes,
        raw_bytes_missing=missing,
        prepared_bytes=prepared,
        hours=None if pending is None else Figure(speeds.hours(pending), "estimated"),
        modalities=modalities,
        da_levels=da_levels,
    )


def total(forecasts: Sequence[Forecast]) -> Totals:
    """Sums of what is known, and how many datasets are not in them."""

    def summed(values: Iterable[float | None]) -> tuple[float, int]:
        listed = list(values)
        return sum(value for value in listed if value is not None), listed.count(None)

    kinds: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    levels: Counter[int] = Counter()
    for one in forecasts:
        for kind, images in one.modalities.items():
            kinds[kind] += images or 0  # type: ignore[assignment]
            weights[kind] += (images or 0) * one.weight  # type: ignore[assignment]
        for level, images in one.da_levels.items():
            levels[level] += images  # type: ignore[assignment]
    drawn = sum(weights.values())
    figures = {
        "images": summed(_value(one.images) for one in forecasts),
        "raw_bytes": summed(_value(one.raw_bytes) for one in forecasts),
        "raw_bytes_missing": summed(one.raw_bytes_missing for one in forecasts),
        "prepared_bytes": summed(_value(one.prepared_bytes) for one in forecasts),
        "hours": summed(_value(one.hours) for one in forecasts),
    }
    shares = {kind: weight / drawn for kind, weight in weights.items() if weight}
    return Totals(figures, dict(kinds), shares, dict(sorted(levels.items())))


def as_json(forecasts: Sequence[Forecast], speeds: Speeds) -> dict[str, Any]:
    """Everything, with null for what is unknown."""
    sums = total(forecasts)
    return {
        "datasets": [asdict(one) for one in forecasts],
        "totals": {
            name: {"at_least": value, "unknown_datasets": unknown}
            for name, (value, unknown) in sums.figures.items()
        },
        "modalities": sums.modalities,
        "shares": sums.shares,
        "da_levels": sums.da_levels,
        "speeds": {kind: asdict(speed) for kind, speed in speeds.measured.items()},
        "workers": speeds.workers,
    }


def _announced(spec: DatasetSpec) -> Figure | None:
    if spec.published.gigabytes is not None:
        return Figure(spec.published.gigabytes * 1e9, "published")
    return _figure(spec.download.bytes if spec.download is not None else None, "download")


def _figure(value: float | None, source: Literal["published", "download"]) -> Figure | None:
    return None if value is None else Figure(value, source)


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value


def _published_mix(spec: DatasetSpec) -> dict[str, float | None]:
    """The published number of images where all are of one kind; else only the kinds."""
    kinds = list(dict.fromkeys(modality.split("/")[0] for modality in spec.modalities))
    return {kind: spec.published.images if len(kinds) == 1 else None for kind in kinds}


def _ingested(
    spec: DatasetSpec, corpus: Corpus
) -> tuple[Figure, Figure, dict[str, float | None], dict[int, float]] | None:
    """What the catalog says of a dataset that is in it."""
    from catalog.query import load_catalog
    from catalog.stats import summarise
    from catalog.survey import SURVEY_COLUMNS

    table = load_catalog(corpus, columns=SURVEY_COLUMNS, datasets=[spec.id], status=None)
    by_modality = summarise(table, ["modality"]).to_pylist()
    if not by_modality:
        return None
    kinds: Counter[str] = Counter()
    for row in by_modality:
        kinds[row["modality"].split("/")[0]] += row["images"]
    levels = {row["da_level"]: row["images"] for row in summarise(table, ["da_level"]).to_pylist()}
    images = Figure(sum(kinds.values()), "catalog")
    prepared = Figure(sum(row["stored_bytes"] for row in by_modality), "catalog")
    return images, prepared, dict(kinds), levels


def _sizes(sources: Iterable[Any]) -> dict[FileKind, float]:
    from ingest.journal import Stamp

    sizes: Counter[FileKind] = Counter()
    for source in sources:
        sizes[kind_of_source(source)] += max(Stamp.if_any(source.file).size, 0)
    return dict(sizes)


def _size(folder: Path) -> float:
    """Bytes of all files below a folder; links are not followed."""
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)
