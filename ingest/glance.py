"""What files are, from names, first bytes and headers alone: where no entry of datasets.yaml says it.

Ingest never guesses: it goes by an entry. These guesses serve who has no entry yet, and each tells its ground.
What identifies a patient is compared, and never shown.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from catalog.errors import SetupError
from catalog.store import Location
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import Format, ImageSource
from ingest.volume import Volume

SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".nii", ".nii.gz"), "nifti"),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "dicom"),
    **dict.fromkeys((".mha", ".mhd", ".nrrd", ".nhdr"), "itk"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"), "raster"),
}
"""Formats by the ending of a name, in lower case."""
_MAGIC: list[tuple[int, bytes, Format]] = [
    (128, b"DICM", "dicom"),
    (344, b"n+1\0", "nifti"),
    (4, b"n+2\0", "nifti"),
    (0, b"NRRD0", "itk"),
    (0, b"ObjectType", "itk"),
    (0, b"\x89PNG", "raster"),
    (0, b"\xff\xd8\xff", "raster"),
    (0, b"BM", "raster"),
    (0, b"II*\0", "raster"),
    (0, b"MM\0*", "raster"),
]

_KIND_OF_TAG = {
    **dict.fromkeys(("CT",), "CT"),
    **dict.fromkeys(("MR",), "MRI"),
    **dict.fromkeys(("PT",), "PET"),
    **dict.fromkeys(("CR", "DX", "MG", "RF", "XA", "IO", "PX"), "XR"),
    **dict.fromkeys(("US", "IVUS"), "US"),
    **dict.fromkeys(("OPT", "OCT"), "OCT"),
    **dict.fromkeys(("OP",), "fundus"),
}
"""DICOM's Modality (0008,0060) to the words of the catalog; what is not here is no image for this corpus."""
_AIR = -900
"""Below this many HU there is air in a scan; other modalities seldom have such values."""
_REDDISH = 0.3
"""Part of the red of a fundus photograph, on average, by which its blue is darker; less for all else."""
_VOLUMETRIC_TAGS = ("CT", "MR", "PT")

MODALITY_WORDS: list[tuple[str, str]] = [
    ("MRI/T2-FLAIR", "flair|t2f|t2-flair"),
    ("MRI/T1c", "t1c|t1ce|t1gd|t1post|t1wce|t1-ce|t1-gd"),
    ("MRI/T1", "t1|t1w|t1n|mprage|mp-rage"),
    ("MRI/T2", "t2|t2w"),
    ("MRI/PD", "pd|pdw"),
    ("MRI/ADC", "adc"),
    ("MRI/DTI", "dti"),
    ("MRI/DWI", "dwi"),
    ("MRI/MRA", "mra|tof"),
    ("MRI/fMRI", "fmri|bold"),
    ("CT", "ct|cta|cbct|ncct|cect|hrct|ldct"),
    ("PET", "pet|fdg|suv"),
    ("XR", "xr|cxr|xray|x-ray|xrays|x-rays|dx|radiograph|radiographs|mammo|mammography"),
    ("US", "us|ultrasound|sono|echo"),
    ("OCT", "oct"),
    ("fundus", "fundus|retina|cfp"),
    ("MRI", "mr|mri|mrt"),
]
"""Modality and the words of a path that mean it. The first that occurs decides: sequences before their kind."""

LABEL_WORDS: list[str] = [
    "masks?",
    "labels?(?:tr|ts|va)?",
    "seg|segs|aseg|segmentations?",
    "gt|ground[-_ ]?truths?",
    "annotations?|contours?|rois?",
]
"""Words of a path that mean labels, not images."""


def whole_word(words: str) -> str:
    """Regular expression for words that stand alone: `t1` in `p01_T1.nii`, not in `t10`."""
    return f"(?<![a-z0-9])(?:{words})(?![a-z0-9])"


def modality_in(path: str) -> str | None:
    """The modality that the words of a path mean, if any."""
    found = (kind for kind, words in MODALITY_WORDS if re.search(whole_word(words), path, re.IGNORECASE))
    return next(found, None)


def is_label(path: str) -> bool:
    """Whether the words of a path mean a mask or another annotation."""
    return any(re.search(whole_word(words), path, re.IGNORECASE) for words in LABEL_WORDS)


@dataclass(frozen=True, kw_only=True)
class Glance:
    """One file, or one folder of a DICOM series, that looks like an image."""

    path: str
    """Relative to the folder that was looked at, with forward slashes, in the file system's own spelling."""
    is_folder: bool
    format: Format
    dimension: Literal[2, 3]
    several: bool
    """It holds several volumes or frames."""
    modality: str | None
    """By DICOM's Modality tag; null for other formats."""
    dimension_reason: str
    persons: frozenset[str] = field(default=frozenset(), repr=False)
    """DICOM's patient identifiers of the files looked at: to be compared, never shown."""

    @property
    def name(self) -> str:
        """The path in Unicode NFC, which the rules of datasets.yaml go by."""
        return unicodedata.normalize("NFC", self.path)


@dataclass(frozen=True)
class Survey:
    """Everything below a folder."""

    images: list[Glance]
    labels: list[Glance]
    """Images by format, masks or annotations by name."""
    files: list[str]
    """All files, relative, hidden ones left out."""
    folders: list[str]
    """All folders below it, relative."""
    others: list[str]
    """Files that are no image that ingest reads, and what is damaged."""


def survey(folder: Path) -> Survey:
    """Look at everything below `folder`: names, first bytes, headers; no voxel is read.

    DICOM slices of CT, MR and PET count as one image a folder, as series are exported; of each folder a few
    headers are read. All other DICOM files and all other formats count as one image a file.

    Raises:
        SetupError: a folder cannot be listed.
    """
    files, folders = listing(folder)
    images: list[Glance] = []
    others: list[str] = []
    dicom: dict[str, list[str]] = defaultdict(list)
    for path in files:
        kind = format_or_none(folder / path)
        if kind == "dicom":
            dicom[path.rpartition("/")[0]].append(path)
            continue
        seen = _glance_file(folder, path, kind) if kind else None
        if seen is None:
            others.append(path)
        else:
            images.append(seen)
    for place, members in dicom.items():
        found = _glance_dicom(folder, place, members)
        images += found
        if not found:
            others += members
    images.sort(key=lambda image: image.name)
    return Survey(
        images=[image for image in images if not is_label(image.name)],
        labels=[image for image in images if is_label(image.name)],
        files=files,
        folders=folders,
        others=sorted(others),
    )


def glance_file(file: Path) -> Glance | None:
    """The same of one file by itself: a DICOM file stands for itself, not for its series.

    Null if it is no image that ingest reads. Raises SetupError if it cannot be opened.
    """
    kind = format_of(file)
    if kind == "dicom":
        header = _dicom_header(file)
        return None if header is None else _one_dicom(file.name, header)
    return _glance_file(file.parent, file.name, kind) if kind else None


def series_folder(file: Path) -> Glance | None:
    """The folder that a DICOM file belongs to, if it is one slice among others there; else null.

    Raises:
        SetupError: the folder cannot be listed.
    """
    if format_of(file) != "dicom":
        return None
    header = _dicom_header(file)
    if header is None or header.tag not in _VOLUMETRIC_TAGS or header.frames > 1:
        return None
    folder = file.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise SetupError(f"Cannot list the folder {folder}: {error.strerror}.") from error
    members = [name for name in names if not name.startswith(".") and format_or_none(folder / name) == "dicom"]
    seen = _glance_dicom(folder, "", members) if len(members) > 1 else []
    return seen[0] if seen and seen[0].is_folder else None


def format_of(file: Location) -> Format | None:
    """The format of a file by its first bytes, else by its name; null if it is none that ingest reads.

    Raises:
        SetupError: the file cannot be opened.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}.") from error
    for offset, magic, kind in _MAGIC:
        if start[offset : offset + len(magic)] == magic:
            return kind
    suffix = suffix_of(file.name).lower()
    if not suffix and start[:2] == b"\x08\x00" and len(start) > 132:
        return "dicom"  # a data set without preamble: it begins with group 0008
    return SUFFIXES.get(suffix)


def suffix_of(name: str) -> str:
    """The ending of a file's name, `.nii.gz` in one piece; of a DICOM name like `1.2.840.1`, none."""
    lowered = name.lower()
    if lowered.endswith(".nii.gz"):
        return name[-len(".nii.gz") :]
    stem, dot, last = name.rpartition(".")
    return dot + last if stem and last and not last.isdigit() else ""


def stem_of(name: str) -> str:
    """A file's name without its ending."""
    return name.removesuffix(suffix_of(name))


def format_or_none(file: Location) -> Format | None:
    """As `format_of`; of a file that cannot be opened, by its name alone."""
    try:
        return format_of(file)
    except SetupError:
        return SUFFIXES.get(suffix_of(file.name).lower())


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """All files and all folders below a folder, hidden ones left out, in one walk.

    Paths are relative, with forward slashes; the names of a folder are sorted. Links are followed, except in
    circles.

    Raises:
        SetupError: a folder cannot be listed.
    """
    files: list[str] = []
    folders: list[str] = []

    def visit(place: Path, prefix: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(place)
        if real in above:
            return
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise SetupError(f"Cannot list the folder {place}: {error.strerror}.") from error
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                continue
            if is_folder:
                folders.append(prefix + entry.name)
                visit(place / entry.name, f"{prefix}{entry.name}/", (*above, real))
            elif is_file:
                files.append(prefix + entry.name)

    visit(folder, "", ())
    return files, folders


def _glance_file(folder: Path, path: str, kind: Format) -> Glance | None:
    if kind == "raster":
        return _seen(path, kind, 2, False, "a picture file")
    try:
        shape, volumes = _nifti_shape(folder / path) if kind == "nifti" else _itk_shape(folder, path)
    except Exception:
        # Damaged, or named as what it is not: reading it tells why, in the words of its reader.
        return _seen(path, kind, 3, False, "its header cannot be read: taken as 3-D")
    size = " x ".join(map(str, shape))
    if shape[2] == 1 and volumes == 1:
        return _seen(path, kind, 2, False, f"the header says {size}")
    told = f"the header says {size}" + (f", {volumes} volumes" if volumes > 1 else "")
    return _seen(path, kind, 2 if shape[2] == 1 else 3, volumes > 1, told)


def _seen(path: str, kind: Format, dimension: Literal[2, 3], several: bool, reason: str) -> Glance:
    return Glance(
        path=path,
        is_folder=False,
        format=kind,
        dimension=dimension,
        several=several,
        modality=None,
        dimension_reason=reason,
    )


def _nifti_shape(file: Path) -> tuple[tuple[int, int, int], int]:
    import nibabel as nib

    return _spatial(nib.load(file).header.get_data_shape())


def _itk_shape(folder: Path, path: str) -> tuple[tuple[int, int, int], int]:
    from ingest.readers.itk import announced_shape

    image = _seen(path, "itk", 3, False, "")
    lengths, components = announced_shape(as_source(folder, image, dataset="guess", key="guess"))
    shape, volumes = _spatial(lengths)
    colours = components == 3 and shape[2] == 1
    return shape, volumes * (1 if colours else components)


def _spatial(lengths: Sequence[int]) -> tuple[tuple[int, int, int], int]:
    padded = [*map(int, lengths), 1, 1, 1]
    volumes = 1
    for length in lengths[3:]:
        volumes *= int(length)
    return (padded[0], padded[1], padded[2]), volumes


@dataclass(frozen=True)
class _Header:
    tag: str
    frames: int
    person: str = field(repr=False)


def _dicom_header(file: Path) -> _Header | None:
    """What one DICOM file says of itself; null for what holds no image (reports, structures, DICOMDIR)."""
    from ingest.readers.dicom_frames import parse

    wanted = ["Modality", "NumberOfFrames", "PatientID", "PatientName", "Rows", "SOPClassUID"]
    options: dict[str, Any] = {"force": True, "stop_before_pixels": True, "specific_tags": wanted}
    try:
        dataset = parse(file, **options)
        tag = str(dataset.get("Modality") or "").upper()
        frames = int(dataset.get("NumberOfFrames") or 1)
        person = f"{dataset.get('PatientID') or ''}\0{dataset.get('PatientName') or ''}"
        if not dataset.get("Rows") or "SOPClassUID" not in dataset or tag in ("SEG", "RTDOSE"):
            return None
    except Exception:
        return None
    return _Header(tag, frames, person if person != "\0" else "")


def _glance_dicom(folder: Path, place: str, files: list[str]) -> list[Glance]:
    """The images of one folder of DICOM files: the folder itself if it holds slices, else each file."""
    first = next((header for path in files if (header := _dicom_header(folder / path))), None)
    if first is None:
        return []
    if first.tag not in _VOLUMETRIC_TAGS:
        headers = ((path, _dicom_header(folder / path)) for path in files)
        return [_one_dicom(path, header) for path, header in headers if header]
    # Three headers tell the persons apart well enough to warn; a series may have thousands of files.
    looked_at = {files[0], files[len(files) // 2], files[-1]}
    headers3 = [header for path in sorted(looked_at) if (header := _dicom_header(folder / path))]
    return [
        Glance(
            path=place or ".",
            is_folder=True,
            format="dicom",
            dimension=3,
            several=False,
            modality=_KIND_OF_TAG[first.tag],
            dimension_reason=f"a folder of {first.tag} slices",
            persons=frozenset(header.person for header in headers3 if header.person),
        )
    ]


def _one_dicom(path: str, header: _Header) -> Glance:
    volumetric = header.tag in _VOLUMETRIC_TAGS
    return Glance(
        path=path,
        is_folder=False,
        format="dicom",
        dimension=3 if volumetric else 2,
        several=header.frames > 1 and not volumetric,
        modality=_KIND_OF_TAG.get(header.tag),
        dimension_reason=f"DICOM modality {header.tag}" if header.tag.isalnum() else "no DICOM modality",
        persons=frozenset({header.person} if header.person else ()),
    )


def guess_modality(folder: Path, image: Glance) -> tuple[str, str]:
    """Modality of one image below `folder` and its ground: DICOM tag, words of its path, else its values.

    The last reads the image: Hounsfield units reach down to -1000 in air, and a reddish picture is one of the
    fundus more often than not. If that fails too, MRI for volumes and XR for pictures.
    """
    words = modality_in(image.name)
    if image.modality is not None:
        finer = words is not None and words.startswith(f"{image.modality}/")
        return (words or "", "DICOM tag and path") if finer else (image.modality, "DICOM tag")
    if words is not None:
        return words, "a word of the path"
    words = modality_in(folder.name)
    if words is not None:
        return words, "a word of the folder's name"
    return _by_values(folder, image)


def as_source(folder: Path, image: Glance, *, dataset: str, key: str, **declared: Any) -> ImageSource:
    """The `ImageSource` of an image that no entry describes; `declared` as its other fields."""
    defaults: dict[str, Any] = {"modality": "", "upstream_modality": declared.get("modality", "")}
    return ImageSource(
        dataset=dataset,
        key=key,
        subject=key,
        path=image.path,
        root=folder,
        format=image.format,
        dimension=image.dimension,
        **defaults | declared,
    )


def _by_values(folder: Path, image: Glance) -> tuple[str, str]:
    from ingest.readers import read_volumes

    fallback = "MRI" if image.dimension == 3 else "XR"
    try:
        volume = next(iter(read_volumes(as_source(folder, image, dataset="guess", key="guess"))), None)
    except (ExcludedImage, FailedImage):
        volume = None
    if not isinstance(volume, Volume):
        return fallback, "a bare guess: nothing tells"
    if image.dimension == 2:
        red, blue = volume.voxels[0].astype(np.float64), volume.voxels[-1].astype(np.float64)
        # Grey pictures saved in colour differ by little; a fundus is red.
        is_red = float(np.mean(red - blue)) > _REDDISH * float(np.mean(red))
        return ("fundus", "a guess: a reddish picture") if is_red else (fallback, "a bare guess: nothing tells")
    lowest = volume.slope * float(volume.voxels.min()) + volume.intercept
    if lowest <= _AIR:
        return "CT", f"a guess: values reach down to {lowest:g}, as Hounsfield units do"
    return fallback, f"a bare guess: values from {lowest:g}, so hardly CT"
