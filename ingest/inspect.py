"""What ingest would decide about a file or folder that no entry of datasets.yaml describes.

The decisions are those of `read_volumes` and `normalise`. Only what an entry would declare is guessed here
(format, dimension, modality), and every guess is told with its ground.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from catalog.errors import SetupError
from ingest.geometry import DISPLAY_CODES
from ingest.glance import Glance, as_source, glance_file, guess_modality, series_folder, survey
from ingest.image import Normalised, excluded_row, normalise
from ingest.readers import read_volumes
from ingest.reasons import EXCLUSIONS, FAILURES, GEOMETRY_FLAGS, ExcludedImage, FailedImage, full_message
from ingest.source import DepthAxis, ImageSource
from ingest.spec import checked_modality
from ingest.volume import Volume

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SOURCES = 8
"""Files or series of one folder that are looked at: enough to see whether they are read as they should."""
_MAX_SHOWN = 4
"""Volumes of one file or series that are shown; of more, the first, the middle and the last."""

_NOT_TOLD = {"dataset", "subject", "upstream_modality", "body_part", "sampling_weight"}
"""Columns of a catalog row that only an entry of datasets.yaml gives."""

_RULES = {
    "declared": "as declared",
    "metadata": "the slice direction that the file states",
    "anisotropy": "the axis whose spacing differs most",
    "default": "nothing tells: SI for CT, else the slowest-varying axis of the file",
    "overridden": "another axis than stated: the in-plane spacings would differ too much",
}


@dataclass(frozen=True)
class InspectedImage:
    """One image and the row it would get."""

    row: dict[str, Any]
    """The columns of the catalog that need no entry."""
    file: dict[str, Any]
    """dtype, slope, intercept, padding_value as the file has them; empty if it was not read that far."""
    picture: Image | None
    """Set on those images that are shown."""

    @property
    def is_shown(self) -> bool:
        return self.picture is not None


@dataclass(frozen=True)
class InspectedSource:
    """One file, or folder of a DICOM series."""

    source: ImageSource
    grounds: dict[str, str]
    """Why this format, dimension and modality."""
    images: list[InspectedImage]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_path` found."""

    sources: list[InspectedSource]
    not_looked_at: int
    """Further files and series of the folder."""
    labels: int
    """Masks and other annotations, by their names, that were passed over."""

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(image.row["status"] for source in self.sources for image in source.images)


def inspect_path(path: Path, modality: str | None = None, depth_axis: DepthAxis | None = None) -> Inspection:
    """Read and normalise what lies at `path`, a file or a folder, as ingest would; nothing is written.

    A single slice of a DICOM series stands for the series in its folder. Of a folder with many files or
    series, MAX_SOURCES are looked at.

    Args:
        modality: instead of the guessed one.
        depth_axis: as an entry would declare it.

    Raises:
        SetupError: nothing is there, or nothing that looks like an image; an unknown modality.
    """
    if modality is not None:
        try:
            checked_modality(modality)
        except ValueError as error:
            raise SetupError(f"--modality: {error}.") from error
    if not path.exists():
        raise SetupError(f"There is no file or folder {path}.")
    root, found, labels = _find(path.resolve())
    sources = []
    for number, image in enumerate(found[:MAX_SOURCES], start=1):
        given = (modality, "as given") if modality is not None else guess_modality(root, image)
        source = as_source(
            root, image, dataset="inspect", key=image.name, modality=given[0], depth_axis=depth_axis
        )
        grounds = {
            "format": "a folder" if image.is_folder else "its content",
            "dimension": image.dimension_reason,
            "modality": given[1],
        }
        place = f"No. {number}: " if len(found) > 1 else ""
        sources.append(InspectedSource(source, grounds, _images(source, place)))
    return Inspection(sources, max(len(found) - MAX_SOURCES, 0), labels)


def montage_of(inspection: Inspection) -> Image | None:
    """All pictures below each other; null where no image would be ingested."""
    from ingest.montage import stack

    images = [image for source in inspection.sources for image in source.images]
    if not any(image.row["status"] == "ingested" for image in images):
        return None
    return stack([image.picture for image in images if image.picture is not None])


def as_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection as plain dicts and lists: per source what was guessed, per image the row it would get."""
    return {
        "sources": [
            {
                "path": seen.source.path,
                "format": seen.source.format,
                "dimension": seen.source.dimension,
                "modality": seen.source.modality,
                "grounds": seen.grounds,
                "images": [image.row | {"file": image.file or None} for image in seen.images],
            }
            for seen in inspection.sources
        ],
        "not_looked_at": inspection.not_looked_at,
        "labels": inspection.labels,
    }


def render(inspection: Inspection, console: Console) -> None:
    """Print the inspection: a table a source, a column an image."""
    for seen in inspection.sources:
        shown = [image for image in seen.images if image.is_shown]
        table = Table(
            title=seen.source.path, title_justify="left", title_style="bold", show_header=len(shown) > 1
        )
        table.add_column("")
        for image in shown:
            table.add_column(_volume_name(image, len(seen.images)), overflow="fold")
        for section in _sections(seen, shown):
            for label, values in section:
                # A value that all volumes have is said once.
                cells = values if len(set(values)) > 1 else [values[0], *("" for _ in values[1:])]
                table.add_row(label, *map(Text, cells))
            table.add_section()
        console.print(table)
        if len(shown) < len(seen.images):
            console.print(_all_of(seen.images), markup=False)
    if inspection.labels:
        console.print(f"{inspection.labels} masks or other annotations, by their names: not looked at.")
    if inspection.not_looked_at:
        console.print(f"{inspection.not_looked_at} further files or series: not looked at. Name one to see it.")


def _find(path: Path) -> tuple[Path, list[Glance], int]:
    """The folder that the images are relative to, the images, the number of labels among them."""
    if path.is_file():
        folder = series_folder(path)
        if folder is not None:
            reason = f"one of {folder.dimension_reason.removeprefix('a ')}, all of it"
            return path.parent.parent, [_renamed(folder, path.parent.name, reason)], 0
        seen = glance_file(path)
        if seen is None:
            raise SetupError(f"{path} is no NIfTI, DICOM, MHA, NRRD, PNG, JPEG, BMP or TIFF image.")
        return path.parent, [seen], 0
    below = survey(path)
    # A folder of masks only is looked at all the same: that is what was asked for.
    images, labels = (below.images, len(below.labels)) if below.images else (below.labels, 0)
    if not images:
        raise SetupError(f"{path} holds no image that ingest reads; it has {len(below.files)} files.")
    if images[0].path == ".":
        inner = [replace(image, path=f"{path.name}/{image.path}") for image in images[1:]]
        return path.parent, [_renamed(images[0], path.name, images[0].dimension_reason), *inner], labels
    return path, images, labels


def _renamed(image: Glance, path: str, reason: str) -> Glance:
    return replace(image, path=path, dimension_reason=reason)


def _images(source: ImageSource, place: str) -> list[InspectedImage]:
    """All images of a source. A failure speaks for the whole source, as it does in ingest."""
    try:
        return list(_readable_images(source, place))
    except (ExcludedImage, FailedImage) as outcome:
        return [_refused(source, place, outcome, None, 1, None)]
    except MemoryError:
        failure = FailedImage("too_large", f"{source.path}: not enough memory. Use a larger machine.")
        return [_refused(source, place, failure, None, 1, None)]


def _readable_images(source: ImageSource, place: str) -> Iterator[InspectedImage]:
    for position, volume in enumerate(read_volumes(source)):
        if isinstance(volume, ExcludedImage):
            # One of several: the only one of a source is raised.
            yield _refused(source, place, volume, position, 2, None)
            continue
        try:
            image = normalise(volume, source)
        except ExcludedImage as outcome:
            yield _refused(source, place, outcome, volume.index, volume.count, volume)
            continue
        picture = _picture(image, volume, place) if _is_shown(volume.index, volume.count) else None
        yield InspectedImage(_told(image.row), _file_facts(volume), picture)


def _is_shown(index: int, count: int) -> bool:
    return count <= _MAX_SHOWN or index in (0, count // 2, count - 1)


def _refused(
    source: ImageSource,
    place: str,
    outcome: ExcludedImage | FailedImage,
    index: int | None,
    count: int,
    volume: Volume | None,
) -> InspectedImage:
    from ingest.montage import draw_note

    explained = type(outcome)(outcome.reason, full_message(outcome))
    row = _told(excluded_row(source, explained, index, count, volume))
    which = "" if index is None else f"image {index + 1}, "
    picture = draw_note(
        [f"{place}{which}{row['status']}: {outcome.reason}", (EXCLUSIONS | FAILURES)[outcome.reason]]
    )
    return InspectedImage(row, {} if volume is None else _file_facts(volume), picture)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _NOT_TOLD}


def _file_facts(volume: Volume) -> dict[str, Any]:
    return {
        "dtype": volume.voxels.dtype.name,
        "slope": volume.slope,
        "intercept": volume.intercept,
        "padding_value": volume.padding_value,
    }


def _picture(image: Normalised, volume: Volume, place: str) -> Image:
    from ingest.montage import draw_image

    row = image.row
    kind = "volume" if volume.dimension == 3 else "image"
    which = f"{kind} {volume.index + 1} of {volume.count}, " if volume.count > 1 else ""
    low, high = ((row[f"window_{end}"] - row["intercept"]) / row["slope"] for end in ("low", "high"))
    caption = [f"{place}{which}{row['modality']}, {_shape(row)}", f"{_spacing(row)}; {_anisotropy(row)}"]
    if row["depth_rule"] is not None:
        caption.append(f"depth axis {_depth(row)}")
    return draw_image(
        image.voxels,
        spacing=(row["spacing_z"], row["spacing_y"], row["spacing_x"]),
        window=(low, high),
        codes=DISPLAY_CODES[row["depth_axis"]] if row["depth_axis"] else None,
        caption=[*caption, f"window {row['window_low']:.5g} .. {row['window_high']:.5g}"],
    )


def _volume_name(image: InspectedImage, count: int) -> str:
    return f"volume {image.row['key'].rpartition('#')[2]}" if count > 1 else ""


def _all_of(images: list[InspectedImage]) -> str:
    outcomes = Counter(
        image.row["status"] + (f" as {image.row['reason']}" if image.row["reason"] else "") for image in images
    )
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return f"All {len(images)} volumes: {counts}. The first, the middle and the last are shown."


def _sections(seen: InspectedSource, shown: list[InspectedImage]) -> Iterator[list[tuple[str, list[str]]]]:
    """Lines of the table, each a label and a cell per image; lines on which nothing is known are left out."""
    guessed = {
        "format": seen.source.format,
        "dimension": f"{seen.source.dimension}-D",
        "modality": seen.source.modality,
    }
    yield [(label, [f"{value}  ({seen.grounds[label]})"] * len(shown)) for label, value in guessed.items()]
    for section in _SECTIONS:
        lines = [(label, [cell(image.row, image.file) for image in shown]) for label, cell in section.items()]
        yield [(label, values) for label, values in lines if any(values)]


def _shape(row: dict[str, Any]) -> str:
    depth, height, width = (row[f"shape_{axis}"] for axis in "dhw")
    size = f"{height} x {width}" if row["dimension"] == 2 else f"{depth} x {height} x {width}"
    return f"{size} {'voxels' if row['dimension'] == 3 else 'pixels'}" + (
        f", {row['shape_c']} channels" if row["shape_c"] > 1 else ""
    )


def _spacing(row: dict[str, Any]) -> str:
    known = [f"{row[f'spacing_{axis}']:.4g}" for axis in "zyx" if row[f"spacing_{axis}"] is not None]
    if not known:
        return "no spacing"
    return f"{' x '.join(known)} mm ({', '.join('zyx'[-len(known) :])})"


def _anisotropy(row: dict[str, Any]) -> str:
    if row["da_level"] is None:
        return ""
    return (
        f"level {row['da_level']} (2-D)"
        if row["da"] is None
        else f"DA {row['da']:.3g}, level {row['da_level']}"
    )


def _depth(row: dict[str, Any]) -> str:
    if row["depth_rule"] is None:
        return ""
    axis = row["depth_axis"] or "of unknown direction"
    return f"{axis}: {row['depth_rule']} ({_RULES[row['depth_rule']]})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _numbers(values: list[float] | None, unit: str = "") -> str:
    return "" if values is None else " x ".join(map(_number, values)) + unit


def _crop(row: dict[str, Any]) -> str:
    if row["crop_box"] is None:
        return ""
    z0, z1, y0, y1, x0, x1 = row["crop_box"]
    return f"z {z0}:{z1}, y {y0}:{y1}, x {x0}:{x1}"


def _resize(row: dict[str, Any]) -> str:
    factor = row["resize_factor"]
    return "" if factor is None else "no" if factor == 1 else f"in-plane to {factor:.4g} of its size"


def _statistics(row: dict[str, Any]) -> str:
    names = ("mean", "std", "median", "min", "max", "p0_5", "p99_5")
    if row["intensity_mean"] is None:
        return ""
    return ", ".join(f"{name.replace('_', '.')} {row[f'intensity_{name}']:.5g}" for name in names)


def _window(row: dict[str, Any]) -> str:
    return "" if row["window_low"] is None else f"{row['window_low']:.6g} .. {row['window_high']:.6g}"


def _scaling(slope: float | None, intercept: float | None) -> str:
    return "" if slope is None else f"real value = {_number(slope)} * stored + {_number(intercept)}"


def _flags(row: dict[str, Any]) -> str:
    flags = row["geometry_flags"] or []
    return "\n".join(f"{flag}: {GEOMETRY_FLAGS[flag]}" for flag in flags)


_Cell = Callable[[dict[str, Any], dict[str, Any]], str]

_SECTIONS: list[dict[str, _Cell]] = [
    {
        "file's dtype": lambda row, file: file.get("dtype", ""),
        "file's scaling": lambda row, file: _scaling(file.get("slope"), file.get("intercept")),
        "padding value": lambda row, file: _number(file.get("padding_value")),
        "file's shape": lambda row, file: _numbers(row["original_shape"]),
        "file's spacing": lambda row, file: _numbers(row["original_spacing"], " mm"),
        "file's axes": lambda row, file: row["original_orientation"] or "",
        "flags": lambda row, file: _flags(row),
    },
    {
        "depth axis": lambda row, file: _depth(row),
        "spacing": lambda row, file: _spacing(row) if row["da_level"] is not None else "",
        "anisotropy": lambda row, file: _anisotropy(row),
        "crop box": lambda row, file: _crop(row),
        "resized": lambda row, file: _resize(row),
    },
    {
        "image": lambda row, file: _shape(row) if row["shape_h"] else "",
        "dtype": lambda row, file: row["stored_dtype"] or "",
        "scaling": lambda row, file: _scaling(row["slope"], row["intercept"]),
        "window": lambda row, file: _window(row),
        "statistics": lambda row, file: _statistics(row),
    },
    {
        "decision": lambda row, file: row["status"] + (f": {row['reason']}" if row["reason"] else ""),
        "found": lambda row, file: row["message"] or "",
    },
]
"""Label of a line to the text of its cell, from the catalog row and the facts of the file."""
