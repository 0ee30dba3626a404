"""NIfTI-1 and NIfTI-2 single files: header by nibabel, data by isal, never a look at files beside.

Compression and byte order are told by content, not by name, so `x.nii.gz` is never answered from `x.nii`.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip
from nibabel.spatialimages import HeaderDataError

from ingest.readers import MAX_REST, check_count, check_inflated, check_size, inside_root, name, reading
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume, Voxels

_FIRST_DATA_BYTE = {348: 352, 540: 544}
"""Length of the header (NIfTI-1, NIfTI-2) -> lowest `vox_offset` of a single file."""
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
"""Code of the spatial unit in `xyzt_units` -> length in mm; an unknown unit is mm by custom."""
_COLOURS = (128, 2304)
_DISAGREEMENT = 0.01
_BLOCK = 1 << 20  # bytes: `readinto` of a gzip stream goes through a copy of what it is asked for


def read(source: ImageSource) -> Iterator[Volume]:
    """Yield one volume per index of axes 3 and up, each (1, I, J, K) in Fortran order, in the file's order.

    `index` counts time (axis 3) slowest, `count` all of them. A 2-D source gives (1, 1, H, W) with the file's
    first axis as W. A stream of several volumes is hashed first and then inflated volume by volume.

    Raises:
        ExcludedImage: `no_pixels`, `single_slice`, `colour_volume`, `unsupported_layout`, `spacing_missing`,
            `spacing_invalid`.
        FailedImage: see `ingest.readers.read_volumes`.
    """
    path = inside_root(source, source.file)
    with reading(source), _open(path) as (stream, source_hash):
        header = _read_header(source, stream)
        shape = _shape(source, header)
        dtype = _dtype(source, header)
        slope, intercept = _scaling(source, header)
        geometry = _geometry(source, header)
        _check_announced(source, path, stream, math.prod(shape) * dtype.itemsize)
        times, others = shape[3], math.prod(shape[4:])
        slice_axis = header.get_dim_info()[2] if source.dimension == 3 else None

        for position in range(times * others):
            voxels = _read_voxels(source, stream, shape[:3], dtype)
            if position == times * others - 1:
                _finish(source, stream)
            if source.dimension == 2:
                voxels = voxels.transpose(2, 1, 0)
            yield Volume(
                voxels=voxels[np.newaxis],
                dimension=source.dimension,
                slope=slope,
                intercept=intercept,
                slice_axis=slice_axis,
                index=position % times * others + position // times,
                count=times * others,
                source_hash=source_hash,
                **geometry,
            )


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The inflated stream of a file and the sha256 of the bytes on disk."""
    with path.open("rb") as file:
        source_hash = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if compressed:
            with igzip.IGzipFile(fileobj=file, mode="rb") as stream:
                yield cast(BinaryIO, stream), source_hash
        else:
            yield file, source_hash


def _read_header(source: ImageSource, stream: BinaryIO) -> Any:
    """nibabel's header, with the stream left at the first voxel."""
    start = stream.read(4)
    size = next((n for n in _FIRST_DATA_BYTE for order in ("<", ">") if start == _int32(n, order)), None)
    if size is None:
        raise FailedImage(
            "unreadable", f"{name(source)}: not a NIfTI-1 or NIfTI-2 file. Convert it to .nii.gz."
        )
    block = start + stream.read(size - 4)
    if len(block) < size:
        raise FailedImage("unreadable", f"{name(source)}: ends inside its header. Download it again.")
    header = (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(block, check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise FailedImage(
            "unreadable",
            f"{name(source)}: a header whose voxels lie in another file. Convert the pair to one .nii.gz.",
        )
    first = float(header["vox_offset"]) or _FIRST_DATA_BYTE[size]
    if not _FIRST_DATA_BYTE[size] <= first <= MAX_REST or first != int(first):
        raise FailedImage(
            "unreadable", f"{name(source)}: vox_offset {first:g} is no place for voxels. Repair it."
        )
    _skip(stream, int(first) - size)
    return header


def _int32(number: int, order: str) -> bytes:
    return number.to_bytes(4, "little" if order == "<" else "big")


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        skipped = len(stream.read(min(count, 1 << 20)))
        if not skipped:
            raise EOFError
        count -= skipped


def _shape(source: ImageSource, header: Any) -> tuple[int, ...]:
    """Seven lengths: three of space, time, and three more."""
    axes = int(header["dim"][0])
    lengths = [int(n) for n in header["dim"][1 : max(axes, 0) + 1]]
    if not 1 <= axes <= 7 or min(lengths) < 0:
        raise FailedImage(
            "unreadable",
            f"{name(source)}: {axes} axes of lengths {lengths}. The header is damaged: download it again.",
        )
    if 0 in lengths:
        raise ExcludedImage("no_pixels", f"{name(source)}: shape {tuple(lengths)} has an axis of length zero.")
    shape = tuple(lengths + [1] * (7 - axes))
    check_size(source, math.prod(shape[:3]))
    check_count(source, math.prod(shape[3:]))
    if source.dimension == 3 and min(shape[:3]) == 1:
        raise ExcludedImage("single_slice", f"{name(source)}: shape {shape[:3]} has one slice. {_declare(2)}")
    if source.dimension == 2 and shape[2] > 1:
        raise ExcludedImage(
            "unsupported_layout", f"{name(source)}: shape {shape[:3]} is a volume. {_declare(3)}"
        )
    return shape


def _check_announced(source: ImageSource, path: Path, stream: BinaryIO, announced: int) -> None:
    """Compare the bytes of all voxels with those of the file before memory is asked for."""
    stored = path.stat().st_size
    if isinstance(stream, igzip.IGzipFile):
        check_inflated(source, announced, stored)
    elif announced > stored:
        raise FailedImage(
            "unreadable",
            f"{name(source)}: truncated, {announced} bytes of voxels are announced, the file has {stored}. "
            "Compare its checksum with the publisher's, or download it again.",
        )


def _declare(dimension: int) -> str:
    return f"If the dataset is {dimension}-D, declare `dimension: {dimension}` in datasets.yaml."


def _dtype(source: ImageSource, header: Any) -> np.dtype[Any]:
    """dtype of the voxels as they lie in the file."""
    if int(header["datatype"]) in _COLOURS:
        raise ExcludedImage("colour_volume", f"{name(source)}: voxels are colours. Find the grey original.")
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind == "c":
        raise ExcludedImage(
            "unsupported_layout", f"{name(source)}: voxels are complex. Store magnitudes instead."
        )
    if dtype.kind not in "iuf":
        raise FailedImage(
            "unreadable",
            f"{name(source)}: data type {int(header['datatype'])} has no reader here. "
            "Convert it to int16 or float32.",
        )
    return dtype


def _scaling(source: ImageSource, header: Any) -> tuple[float, float]:
    """(slope, intercept); a slope of 0 or NaN means that there is no scaling (NIfTI-1 standard)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise FailedImage(
            "unreadable", f"{name(source)}: scl_inter is {intercept}. The header is damaged: download it again."
        )
    return slope, intercept


def _geometry(source: ImageSource, header: Any) -> dict[str, Any]:
    """`spacing`, `affine` and `flags` of the volume."""
    unit = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    stated = header["pixdim"][1:4].astype(np.float64) * unit
    if source.dimension == 2:
        spacing = (math.nan, float(stated[1]), float(stated[0])) if np.any(stated[:2]) else None
        return {"spacing": spacing, "affine": None}

    flags = ["unit_converted"] if unit != 1.0 else []
    affine = _affine(source, header)
    if affine is None:
        steps = stated
    else:
        affine[:3] *= unit
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        if not np.allclose(steps, stated, rtol=_DISAGREEMENT, atol=0):
            flags.append("pixdim_disagrees")
    if affine is None and not np.any(stated):
        raise ExcludedImage("spacing_missing", f"{name(source)}: no sform, no qform, and pixdim is zero.")
    if not np.all(np.isfinite(steps) & (steps > 0)) or (affine is not None and not np.isfinite(affine).all()):
        raise ExcludedImage("spacing_invalid", f"{name(source)}: spacing {steps.tolist()} mm.")
    spacing = (float(steps[0]), float(steps[1]), float(steps[2]))
    return {"spacing": spacing, "affine": affine, "flags": tuple(flags)}


def _affine(source: ImageSource, header: Any) -> npt.NDArray[np.float64] | None:
    """sform before qform, as nibabel and ITK choose; none if neither is set. In the file's unit."""
    if int(header["sform_code"]) > 0:
        return np.array(header.get_sform(), dtype=np.float64)
    if int(header["qform_code"]) <= 0:
        return None
    fixed = header.copy()
    if fixed["pixdim"][0] not in (-1, 1):
        fixed["pixdim"][0] = 1  # the standard reads any other qfac as 1
    try:
        return np.array(fixed.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        raise ExcludedImage(
            "spacing_invalid",
            f"{name(source)}: qform with pixdim {header['pixdim'][:4].tolist()} is no rotation.",
        ) from None


def _read_voxels(source: ImageSource, stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Voxels:
    """The next volume of the stream, (I, J, K) in Fortran order and native byte order."""
    voxels = np.empty(math.prod(shape), dtype=dtype)
    target = voxels.view(np.uint8).data
    done = 0
    while done < len(target):
        got = cast(io.BufferedIOBase, stream).readinto(target[done : done + _BLOCK])
        if not got:
            raise FailedImage(
                "unreadable",
                f"{name(source)}: truncated, {done} of the {len(target)} bytes of a volume are there. "
                "Compare its checksum with the publisher's, or download it again.",
            )
        done += got
    if not dtype.isnative:
        voxels.byteswap(inplace=True)
    return voxels.view(dtype.newbyteorder("=")).reshape(shape, order="F")


def _finish(source: ImageSource, stream: BinaryIO) -> None:
    """Read on to the end: the checksum of a gzip member follows its data."""
    if isinstance(stream, igzip.IGzipFile):
        rest = 0
        while block := stream.read(1 << 20):
            rest += len(block)
            if rest > MAX_REST:
                raise FailedImage(
                    "unreadable",
                    f"{name(source)}: goes on for over {MAX_REST} bytes after its last voxel. "
                    "The header is damaged: download it again.",
                )
