"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): voxels and geometry by SimpleITK.

SimpleITK fills in what a header does not state (spacing 1, identity direction) and takes a corrupt compressed
MetaImage for a good one, so the text of the header is read here too, and compressed data are checked.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - the name its documentation uses
from isal import igzip, isal_zlib

from ingest.readers import MAX_REST, check_count, check_inflated, check_size, inside_root, name, reading
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume

_MAX_HEADER = 1 << 20
_MAX_AXES = 10
_ORIENTED_SPACES = {
    *("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las"),
    *("left-posterior-superior-time", "lpst", "right-anterior-superior-time", "rast"),
    *("left-anterior-superior-time", "last"),
}
"""Values of NRRD's `space` that SimpleITK turns into LPS; in any other the directions are not anatomical."""


@dataclass(frozen=True)
class _Header:
    """What the text of a header states, whatever the format."""

    io: str
    """SimpleITK's reader for the format; named so that none is guessed from the file name."""
    axes: int
    spacing: tuple[float, ...]
    """Voxel lengths that the header states, along as many axes as it does."""
    oriented: bool
    colour: bool
    data_file: Path
    """The file with the voxels: the header's own, or another one."""
    data_start: int
    compression: str | None


def read(source: ImageSource) -> Iterator[Volume]:
    """Yield one volume per time step or vector component, each (1, K, J, I): SimpleITK's axes reversed.

    `affine` goes with that order and is in RAS+; it is null where the file states no orientation. A 2-D source
    gives (C, 1, H, W), C = 3 for 8-bit colour. The source hash is the file's sha256, or, with voxels in a
    second file, sha256 over the sorted sha256 of both.

    Raises:
        ExcludedImage: `spacing_missing`, `spacing_invalid`, `single_slice`, `colour_volume`, `no_pixels`,
            `unsupported_layout` (complex voxels, voxels spread over many files).
        FailedImage: see `ingest.readers.read_volumes`.
    """
    path = inside_root(source, source.file)
    with reading(source):
        header = _read_header(source, path)
    inside_root(source, header.data_file)
    with reading(source):
        source_hash = _hash([path] if header.data_file == path else [path, header.data_file])
    if source.dimension == 3:
        _check_stated_spacing(source, header)
    with reading(source):
        reader = _reader(header, path)
        geometry = _geometry(source, header, reader)
        _check_compressed(source, header, _announced(reader))
        image = reader.Execute()
        voxels = sitk.GetArrayFromImage(image)
    del image  # the array is a copy; two of them need not stay in memory

    # (T, K, J, I, C), whichever of these axes the file has
    components = reader.GetNumberOfComponents()
    voxels = voxels.reshape(*_spatial(reader)[::-1], components)
    if source.dimension == 2 and components == 3 and voxels.dtype == np.uint8:
        volumes = [voxels[frame].transpose(3, 0, 1, 2) for frame in range(len(voxels))]
    else:
        volumes = [voxels[t, ..., c][np.newaxis] for t in range(len(voxels)) for c in range(components)]
    for index, volume in enumerate(volumes):
        yield Volume(
            voxels=volume,
            dimension=source.dimension,
            index=index,
            count=len(volumes),
            source_hash=source_hash,
            **geometry,
        )


def announced_shape(source: ImageSource) -> tuple[tuple[int, ...], int]:
    """Lengths of the axes, the file's first axis first, and number of components, by the header alone.

    Raises:
        ExcludedImage, FailedImage: as `read` does.
    """
    path = inside_root(source, source.file)
    with reading(source):
        reader = _reader(_read_header(source, path), path)
        return tuple(map(int, reader.GetSize())), int(reader.GetNumberOfComponents())


def _reader(header: _Header, path: Path) -> Any:
    """SimpleITK's reader, with the information of the header read."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(header.io)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _read_header(source: ImageSource, path: Path) -> _Header:
    with path.open("rb") as file:
        if file.read(4) == b"NRRD":
            file.seek(0)
            return _nrrd_header(source, path, file)
        file.seek(0)
        return _meta_header(source, path, file)


def _meta_header(source: ImageSource, path: Path, file: BinaryIO) -> _Header:
    """MetaImage: lines `Key = value`; the last one, ElementDataFile, says where the voxels lie."""
    fields: dict[str, str] = {}
    while "elementdatafile" not in fields:
        line = file.readline(_MAX_HEADER)
        if not line or file.tell() > _MAX_HEADER:
            raise FailedImage(
                "unreadable", f"{name(source)}: neither MetaImage nor NRRD. Convert it to .nii.gz."
            )
        key, _, value = line.decode("latin-1").partition("=")
        # SimpleITK takes `:` for `=` and minds the case: what it reads must be the file that was looked at.
        if line.strip().lower().startswith(b"elementdatafile") and key.strip() != "ElementDataFile":
            raise FailedImage("unreadable", f"{name(source)}: ElementDataFile is misspelt. Correct the header.")
        fields[key.strip().lower()] = value.strip()

    lengths = fields.get("dimsize", "").split()
    # SimpleITK writes beyond its memory when there are more axes than it has room for.
    if fields.get("ndims") != str(len(lengths)) or len(lengths) > _MAX_AXES or not "".join(lengths).isdecimal():
        raise FailedImage(
            "unreadable", f"{name(source)}: NDims and DimSize contradict each other. Download it again."
        )
    check_size(source, math.prod(map(int, lengths)))  # SimpleITK would wrap a number around
    local = fields["elementdatafile"] in ("LOCAL", "Local", "local")
    stated = fields.get("elementspacing") or fields.get("elementsize") or ""
    return _Header(
        io="MetaImageIO",
        axes=len(lengths),
        spacing=tuple(float(word) for word in stated.split()),
        oriented=any(key in fields for key in ("transformmatrix", "rotation", "orientation")),
        colour=fields.get("elementnumberofchannels", "1") in ("3", "4")
        and "uchar" in fields.get("elementtype", "").lower(),
        data_file=path if local else _data_file(source, path, fields["elementdatafile"]),
        data_start=file.tell() if local else 0,
        compression="zlib" if fields.get("compresseddata", "").lower() in ("true", "1") else None,
    )


def _nrrd_header(source: ImageSource, path: Path, file: BinaryIO) -> _Header:
    """NRRD: lines `field: value`, up to an empty line or the end of a detached header."""
    fields: dict[str, str] = {}
    data_files = 0
    while line := file.readline(_MAX_HEADER).strip():
        if file.tell() > _MAX_HEADER:
            raise FailedImage("unreadable", f"{name(source)}: a NRRD header without end. Download it again.")
        key, separator, value = line.decode("latin-1").partition(": ")
        if separator and not key.startswith("#"):
            fields[key.lower()] = value.strip()
        data_files += line.lower().startswith((b"data file", b"datafile"))

    if data_files != len(fields.keys() & {"data file", "datafile"}) or data_files > 1:
        raise FailedImage(
            "unreadable", f"{name(source)}: `data file` is misspelt or stands twice. Correct the header."
        )
    detached = fields.get("data file") or fields.get("datafile")
    skips = any(int(fields.get(key, "0")) for key in ("byte skip", "byteskip", "line skip", "lineskip"))
    directions = fields.get("space directions", "")
    encoding = fields.get("encoding", "").lower()
    compression = {"gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}.get(encoding)
    return _Header(
        io="NrrdImageIO",
        axes=len(fields.get("sizes", "").split()),
        spacing=_direction_lengths(directions) if directions else _lengths(fields.get("spacings", "")),
        oriented=bool(directions) and fields.get("space", "").lower() in _ORIENTED_SPACES,
        colour=any("color" in kind.lower() for kind in fields.get("kinds", "").split()),
        data_file=_data_file(source, path, detached) if detached else path,
        data_start=0 if detached else file.tell(),
        compression=None if skips else compression,
    )


def _lengths(text: str) -> tuple[float, ...]:
    """NRRD's per-axis lengths; NaN stands for an axis without one."""
    return tuple(float(word) for word in text.split() if word.lower() != "nan")


def _direction_lengths(text: str) -> tuple[float, ...]:
    vectors = [part.strip("() ") for part in text.replace(") (", ")|(").replace("none", "").split("|")]
    return tuple(float(np.linalg.norm([float(x) for x in vector.split(",")])) for vector in vectors if vector)


def _data_file(source: ImageSource, path: Path, value: str) -> Path:
    if not value:
        raise FailedImage("unreadable", f"{name(source)}: no file of voxels is named. Correct the header.")
    if value.upper().startswith("LIST") or "%" in value:
        raise ExcludedImage(
            "unsupported_layout",
            f"{name(source)}: voxels lie in many files. Convert it to one .nrrd or .nii.gz.",
        )
    return path.parent / value


def _hash(paths: list[Path]) -> str:
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _announced(reader: Any) -> int:
    """Bytes of all voxels."""
    words = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    bits = next((int(number) for number in re.findall(r"\d+", words)), 64)
    return int(np.prod(_spatial(reader), dtype=object)) * int(reader.GetNumberOfComponents()) * bits // 8


def _check_compressed(source: ImageSource, header: _Header, announced: int) -> None:
    """Inflate to the end and drop the result: zlib and bzip2 raise where data and checksum disagree."""
    if header.compression is None:
        return
    check_inflated(source, announced, header.data_file.stat().st_size)
    inflated = 0
    with header.data_file.open("rb") as file:
        file.seek(header.data_start)
        for size in _inflated(file, header.compression):
            inflated += size
            if inflated > announced + MAX_REST:
                raise FailedImage(
                    "unreadable",
                    f"{name(source)}: goes on for over {MAX_REST} bytes after its last voxel. "
                    "The header is damaged: download it again.",
                )


def _inflated(file: BinaryIO, compression: str) -> Iterator[int]:
    """Sizes of the blocks, none over a few MiB, that the rest of a file inflates to."""
    if compression != "zlib":
        stream = igzip.IGzipFile(fileobj=file) if compression == "gzip" else bz2.BZ2File(file)
        with cast(io.BufferedIOBase, stream):
            while block := stream.read(1 << 20):
                yield len(block)
        return
    inflate = isal_zlib.decompressobj()
    while not inflate.eof:
        block = inflate.unconsumed_tail or file.read(1 << 20)
        if not block:
            raise EOFError
        yield len(inflate.decompress(block, 1 << 20))


def _check_stated_spacing(source: ImageSource, header: _Header) -> None:
    if len(header.spacing) < min(header.axes, 3):
        stated = len(header.spacing)
        raise ExcludedImage(
            "spacing_missing", f"{name(source)}: the header states the spacing of {stated} axes."
        )
    if not all(np.isfinite(length) and length > 0 for length in header.spacing):
        raise ExcludedImage("spacing_invalid", f"{name(source)}: spacing {list(header.spacing)} mm.")


def _spatial(reader: Any) -> tuple[int, int, int, int]:
    """Lengths of the axes (I, J, K, T) in SimpleITK's order, 1 where the file has fewer."""
    i, j, k, t = (*reader.GetSize(), 1, 1)[:4]
    return int(i), int(j), int(k), int(t)


def _geometry(source: ImageSource, header: _Header, reader: Any) -> dict[str, Any]:
    """`spacing` and `affine` for the reversed axes (k, j, i), after a check of shape and voxel type."""
    axes, size = reader.GetDimension(), _spatial(reader)
    if axes not in (2, 3, 4):
        raise ExcludedImage("unsupported_layout", f"{name(source)}: {axes} axes. Store one volume a file.")
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise ExcludedImage(
            "unsupported_layout", f"{name(source)}: voxels are complex. Store magnitudes instead."
        )
    if 0 in size:
        raise ExcludedImage(
            "no_pixels", f"{name(source)}: shape {reader.GetSize()} has an axis of length zero."
        )
    check_size(source, int(np.prod(size, dtype=object)) * reader.GetNumberOfComponents())
    check_count(source, size[3] * reader.GetNumberOfComponents())
    if source.dimension == 2:
        if size[2] > 1:
            raise ExcludedImage(
                "unsupported_layout", f"{name(source)}: a volume. Declare `dimension: 3` in datasets.yaml."
            )
        x, y = reader.GetSpacing()[:2]
        if len(header.spacing) < 2:
            return {"spacing": None, "affine": None}
        if not all(np.isfinite(mm) and mm > 0 for mm in header.spacing):
            x, y = header.spacing[:2]  # SimpleITK has put something valid in their place
        return {"spacing": (float("nan"), y, x), "affine": None}
    if header.colour:
        raise ExcludedImage("colour_volume", f"{name(source)}: voxels are colours. Find the grey original.")
    if min(size[:3]) == 1:
        raise ExcludedImage(
            "single_slice",
            f"{name(source)}: shape {size[:3]} has one slice. For a 2-D dataset, declare `dimension: 2`.",
        )
    i_mm, j_mm, k_mm = reader.GetSpacing()[:3]
    return {"spacing": (k_mm, j_mm, i_mm), "affine": _affine(reader, axes) if header.oriented else None}


def _affine(reader: Any, axes: int) -> npt.NDArray[np.float64]:
    """4 x 4 from (k, j, i) to RAS+ mm; ITK's own is from (i, j, k) to LPS+."""
    direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = (direction * reader.GetSpacing()[:3])[:, ::-1]
    affine[:3, 3] = reader.GetOrigin()[:3]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
