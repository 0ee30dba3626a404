"""What the headers of DICOM files say of each frame: classic slices and multi-frame objects alike.

Identifiers, names, dates and times of the patient are used to group and order, never shown: they are left out
of every repr and message.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pydicom
from isal import isal_zlib
from pydicom.config import IGNORE, settings

from ingest.readers import check_count, check_inflated, inside_root, name, reading
from ingest.reasons import FailedImage
from ingest.source import ImageSource

# Warnings quote odd values and paths, and what they quote may be a patient's name.
settings.reading_validation_mode = IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_PIXEL_TAGS = {b"\xe0\x7f\x10\x00", b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\x7f\xe0\x00\x10"}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_DICOMDIR = "1.2.840.10008.1.3.10"
_FEW_SLICES = 8
"""A file of several volumes has more than so many frames for each."""
_SUFFIXES = (".dcm", ".dicom", ".ima")
_POSITION_POINTERS = {0x00200032, 0x00209056, 0x00209057, 0x00209128, 0x00209241}
"""Dimension indices that count slices, stacks and times: position, stack, place in stack, time."""


class PixelFormat(NamedTuple):
    """What must be equal for frames to form one image."""

    rows: int
    columns: int
    channels: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One 2-D frame of a DICOM file, its voxels not read yet. Vectors are in LPS+ mm, as DICOM has them."""

    file: Path = field(repr=False)
    place: str
    """Which file of the folder it is, by number: names of DICOM files may hold identifiers."""
    number: int
    """Place of the frame in its file, from 0."""
    has_pixels: bool
    format: PixelFormat
    orientation: tuple[float, ...] | None
    """Direction of a row (towards higher columns), then of a column."""
    position: tuple[float, ...] | None
    """Centre of the first voxel."""
    pixel_spacing: tuple[float, ...] | None
    """mm between rows, between columns."""
    slope: float
    intercept: float
    padding: int | None
    has_lookup: bool
    """A Modality LUT is stated instead of slope and intercept."""
    burned_in: bool | None
    """Whether text that may name the patient is drawn into the pixels; null where the header does not say."""
    scan_regions: tuple[tuple[int, int, int, int], ...] | None
    """Of an ultrasound image: (x0, y0, x1, y1), ends included, of the scans in the picture."""
    series: tuple[float, str] = field(repr=False)
    labels: tuple[Any, ...] = field(repr=False)
    """What may tell the volumes of a series apart: time, trigger, clock, b-value, dimension, echo, kind."""
    order: tuple[Any, ...] = field(repr=False)
    """Decides between frames that no label tells apart: clock, instance number, UID, frame number."""


def find_frames(source: ImageSource) -> tuple[list[Frame], str]:
    """The frames of all DICOM files of a source, and sha256 over the sorted sha256 of these files.

    Files that are no DICOM (a readme, a table), and DICOMDIR, are passed over.

    Raises:
        FailedImage: a file is named or marked as DICOM but cannot be parsed; or as `inside_root`.
    """
    path = inside_root(source, source.file)
    with reading(source):
        entries = sorted(path.iterdir()) if path.is_dir() else [path]
    frames: list[Frame] = []
    digests: list[str] = []
    for number, entry in enumerate(entries, start=1):
        file = inside_root(source, entry)
        place = f", file {number} of {len(entries)} by name" if len(entries) > 1 else ""
        with reading(source, place), quiet():
            header = _read_header(source, place, entry.name, file) if file.is_file() else None
            if header is None:
                continue
            dataset, has_pixels, digest = header
            frames.extend(_frames(source, dataset, file, place, has_pixels))
            digests.append(digest)
    return frames, hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def parse(file: Path | BinaryIO, **options: bool) -> Any:
    """`pydicom.dcmread` without its warnings."""
    with quiet():
        try:
            return pydicom.dcmread(file, **options)
        except MemoryError:  # asked for by the length that one element announces, not by what is there
            raise EOFError from None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, such as pydicom has for odd values, also when a value is first looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read_header(source: ImageSource, place: str, filename: str, file: Path) -> tuple[Any, bool, str] | None:
    """Data set up to the pixels, whether pixels follow, sha256 of the file; or None if it is no DICOM image."""
    if filename.startswith("."):  # macOS leaves `._name.dcm` beside `name.dcm`
        return None
    with file.open("rb") as stream:
        stream.seek(128)
        marked = stream.read(4) == b"DICM"
        _check_deflated(source, stream)
        stream.seek(0)
        try:
            dataset = parse(stream, stop_before_pixels=True, force=not marked)
        except Exception:
            if marked:
                raise
            dataset = None
        if dataset is None or not (marked or "SOPClassUID" in dataset):
            if filename.lower().endswith(_SUFFIXES):
                raise FailedImage(
                    "unreadable",
                    f"{name(source)}{place}: named as DICOM but is none, or is cut off. Download it again.",
                )
            return None
        meta = getattr(dataset, "file_meta", {})
        if _DICOMDIR in (meta.get("MediaStorageSOPClassUID"), dataset.get("SOPClassUID")):
            return None
        has_pixels = meta.get("TransferSyntaxUID") == _DEFLATED or stream.read(4) in _PIXEL_TAGS
        if not has_pixels and not ("SOPClassUID" in dataset and "SeriesInstanceUID" in dataset):
            # Every object has both; pydicom takes the end of a file for the end of its header.
            raise EOFError
        stream.seek(0)
        return dataset, has_pixels, hashlib.file_digest(stream, "sha256").hexdigest()


def _check_deflated(source: ImageSource, stream: BinaryIO) -> None:
    """Refuse a deflated file that is a bomb: pydicom would inflate it in memory whatever comes.

    `stream` stands behind the mark of a DICOM file.
    """
    head = stream.read(1 << 16)
    if _DEFLATED.encode() not in head:
        return
    (group_length,) = struct.unpack_from("<I", head, 8)  # the value of the first element
    stream.seek(132 + 12 + group_length)
    stored, inflated = os.fstat(stream.fileno()).st_size, 0
    inflate = isal_zlib.decompressobj(wbits=-15)
    while not inflate.eof:
        block = inflate.unconsumed_tail or stream.read(1 << 20)
        if not block:
            raise EOFError
        inflated += len(inflate.decompress(block, 1 << 20))
        check_inflated(source, inflated, stored)


def _frames(source: ImageSource, dataset: Any, file: Path, place: str, has_pixels: bool) -> Iterator[Frame]:
    signed = bool(dataset.get("PixelRepresentation") or 0)
    allocated = int(dataset.get("BitsAllocated") or 0)
    stored = int(dataset.get("BitsStored") or allocated)
    high = dataset.get("HighBit")
    pixel_format = PixelFormat(
        rows=int(dataset.get("Rows") or 0),
        columns=int(dataset.get("Columns") or 0),
        channels=int(dataset.get("SamplesPerPixel") or 1),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else int(high),
        signed=signed,
        photometric=str(dataset.get("PhotometricInterpretation") or ""),
    )
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    pointers = [int(item.DimensionIndexPointer) for item in dataset.get("DimensionIndexSequence") or ()]

    count = int(dataset.get("NumberOfFrames") or 1)
    if count < 0:
        raise ValueError("a negative number of frames")
    check_count(source, count if source.dimension == 2 else count // _FEW_SLICES)
    for number in range(count):
        look = _Lookup(dataset, shared, per_frame[number] if per_frame else None)
        clock = str(look("FrameContentSequence", "FrameAcquisitionDateTime") or _clock(dataset))
        yield Frame(
            file=file,
            place=place,
            number=number,
            has_pixels=has_pixels and pixel_format.rows * pixel_format.columns * allocated > 0,
            format=pixel_format,
            orientation=_vector(look("PlaneOrientationSequence", "ImageOrientationPatient"), 6),
            position=_vector(look("PlanePositionSequence", "ImagePositionPatient"), 3),
            pixel_spacing=_vector(look("PixelMeasuresSequence", "PixelSpacing"), 2),
            slope=_number(look("PixelValueTransformationSequence", "RescaleSlope"), 1.0),
            intercept=_number(look("PixelValueTransformationSequence", "RescaleIntercept"), 0.0),
            padding=_padding(dataset.get("PixelPaddingValue"), pixel_format),
            has_lookup=bool(dataset.get("ModalityLUTSequence")),
            burned_in={"YES": True, "NO": False}.get(str(dataset.get("BurnedInAnnotation") or "").upper()),
            scan_regions=_scan_regions(dataset) if dataset.get("Modality") == "US" else None,
            series=(
                _number(dataset.get("SeriesNumber"), math.inf),
                str(dataset.get("SeriesInstanceUID") or ""),
            ),
            labels=(
                look("FrameContentSequence", "TemporalPositionIndex")
                or dataset.get("TemporalPositionIdentifier"),
                look("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime")
                or dataset.get("TriggerTime"),
                clock,
                _b_value(look, dataset),
                _dimension_label(look("FrameContentSequence", "DimensionIndexValues"), pointers),
                look("MREchoSequence", "EffectiveEchoTime") or dataset.get("EchoTime"),
                _text(look("MRImageFrameTypeSequence", "FrameType") or dataset.get("ImageType")),
            ),
            order=(
                clock,
                _number(dataset.get("InstanceNumber"), math.inf),
                str(dataset.get("SOPInstanceUID") or ""),
                number,
            ),
        )


def _scan_regions(dataset: Any) -> tuple[tuple[int, int, int, int], ...]:
    corners = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    regions = dataset.get("SequenceOfUltrasoundRegions") or ()
    found = (tuple(int(region.get(corner) or 0) for corner in corners) for region in regions)
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in found)


class _Lookup:
    """Finds an attribute of a frame: in its own functional groups, the shared ones, or the data set itself."""

    def __init__(self, dataset: Any, shared: Any, own: Any) -> None:
        self._dataset = dataset
        self._groups = [groups for groups in (own, shared) if groups is not None]

    def __call__(self, sequence: str, keyword: str) -> Any:
        for groups in self._groups:
            item = _first(groups, sequence)
            if item is not None and keyword in item:
                return item.get(keyword)
        return self._dataset.get(keyword)


def _first(item: Any, sequence: str) -> Any:
    items = item.get(sequence)
    return items[0] if items else None


def _clock(dataset: Any) -> str:
    return str(
        dataset.get("AcquisitionDateTime")
        or f"{dataset.get('AcquisitionDate') or ''}{dataset.get('AcquisitionTime') or ''}"
    )


def _number(value: Any, default: float) -> float:
    return default if value is None or value == "" else float(value)


def _vector(value: Any, length: int) -> tuple[float, ...] | None:
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != length:
        return None
    return tuple(float(x) for x in value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\\".join(str(part) for part in value or ())


def _padding(value: Any, pixel_format: PixelFormat) -> int | None:
    """The padding value as the voxels hold it: writers disagree whether it is signed."""
    if value is None or value == "":
        return None
    number, bits = int(value), pixel_format.bits_allocated
    if pixel_format.signed and number >= 1 << (bits - 1):
        return number - (1 << bits)
    return number + (1 << bits) if not pixel_format.signed and number < 0 else number


def _b_value(look: _Lookup, dataset: Any) -> float | None:
    """Diffusion weighting in s/mm²: the standard's attribute, else those of Siemens, GE and Philips."""
    value = look("MRDiffusionSequence", "DiffusionBValue")
    tags = dataset.keys()
    groups = {tag.group for tag in tags}  # known first, for pydicom sorts all tags to look for one block
    for group, owner, element in (
        (0x0019, "SIEMENS MR HEADER", 0x0C),
        (0x0043, "GEMS_PARM_01", 0x39),
        (0x2001, "Philips Imaging DD 001", 0x03),
    ):
        if value is None and group in groups:
            try:
                value = dataset.private_block(group, owner)[element].value
            except KeyError:
                continue
    if isinstance(value, bytes):  # a private value whose type the file does not tell
        value = value.decode("latin-1").split("\\")
    if hasattr(value, "__len__") and not isinstance(value, str):
        value = value[0] if len(value) else None
    try:
        # GE adds multiples of 10^9 to mark how the value was made.
        return None if value is None else float(value) % 1e9
    except ValueError:
        return None


def _dimension_label(values: Any, pointers: list[int]) -> tuple[int, ...]:
    """The indices of a frame along dimensions other than place and time."""
    if values is None:
        return ()
    numbers = [int(values)] if isinstance(values, int) else [int(value) for value in values]
    return tuple(n for n, pointer in zip(numbers, pointers, strict=False) if pointer not in _POSITION_POINTERS)
