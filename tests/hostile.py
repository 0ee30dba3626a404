"""Broken and hostile files, each with what must become of it: one list, made anew in a few seconds."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from isal import igzip
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from tests.seeds import dicom, itk, nifti, numbers, picture, slice_of

INGESTED = ""
DIM, DATATYPE, PIXDIM, VOX_OFFSET, MAGIC = 40, 70, 76, 108, 344  # offsets in a NIfTI-1 header
GOOD = nifti(numbers(8, 7, 6))
GREY = numbers(24, 30, dtype=np.uint8)
COLOUR = numbers(24, 30, 3, dtype=np.uint8)
STACK = numbers(3, 10, 12, dtype=np.uint16)
UNORIENTED = {"sform_code": 0, "qform_code": 0}

ENTRY = r"""
- id: hostile
  title: Files that no publisher means to send
  folder: hostile
  private_names: false
  images:
    - &volumes
      globs: ["volumes/*.nii", "volumes/*.nii.gz"]
      format: nifti
      dimension: 3
      path: '(?P<folder>[^/]+)/(?P<name>.+)'
      key: '{folder}-{name}'
      modality: MRI
    - {<<: *volumes, format: itk, globs: ["volumes/*.mha", "volumes/*.mhd", "volumes/*.nrrd", "volumes/*.nhdr"]}
    - {<<: *volumes, format: dicom, globs: ["series/*/"]}
    - {<<: *volumes, format: raster, dimension: 2, globs: ["pictures/*"]}
    - {<<: *volumes, format: dicom, dimension: 2, globs: ["frames/*.dcm"]}
    - format: dicom
      dimension: 3
      table: {files: [listed/metadata.csv], folder_column: File Location}
      path: '[^/]+/(?P<name>.+)'
      key: '{name}'
      modality: CT
"""
"""The user's own datasets.yaml."""


@dataclass(frozen=True)
class Hostile:
    """One image file or series of the dataset."""

    path: str
    """Relative to the dataset's folder."""
    code: str
    """Reason code, or `INGESTED`."""
    make: Callable[[Path], None]
    """Writes what belongs at the path."""
    images: int = 1
    """How many rows it gives, all with this code."""
    row_path: str | None = None
    """`source_path` of its rows where it differs from `path`."""
    possible: Callable[[Path], bool] = lambda _: True
    """Whether the machine lets a test make it, tried in a folder for the purpose."""


def make_all(root: Path) -> list[Hostile]:
    """Write all files below the dataset's folder; returns those that could be made."""
    for folder in ("volumes", "series", "pictures", "frames", "listed"):
        (root / folder).mkdir(parents=True)
    made = [hostile for hostile in hostile_files() if hostile.possible(root)]
    for hostile in made:
        hostile.make(root / hostile.path)
    return made


# --- makers


def holds(data: bytes) -> Callable[[Path], None]:
    return lambda path: _write(path, data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def patched(data: bytes, fields: dict[int, bytes]) -> bytes:
    """`data` with bytes replaced at offsets."""
    content = bytearray(data)
    for offset, value in fields.items():
        content[offset : offset + len(value)] = value
    return bytes(content)


def dims(*lengths: int) -> bytes:
    return struct.pack(f"<{len(lengths) + 1}h", len(lengths), *lengths)


def zeros_gzipped(mebibytes: int) -> bytes:
    """Members of 16 MiB of zeros, 16 KiB each."""
    return igzip.compress(bytes(16 << 20), 3) * (mebibytes // 16)


def gzip_bomb(header: bytes, mebibytes: int = 10 << 10) -> Callable[[Path], None]:
    """A small file that inflates to `header` and zeros."""
    return lambda path: _write(path, igzip.compress(header) + zeros_gzipped(mebibytes))


def spacing(*pixdim: float) -> Callable[[Path], None]:
    return holds(patched(nifti(numbers(8, 7, 6), **UNORIENTED), {PIXDIM + 4: struct.pack("<3f", *pixdim)}))


def affine(*rows: tuple[float, float, float]) -> Callable[[Path], None]:
    fields = {f"srow_{axis}": (*row, 0.0) for axis, row in zip("xyz", rows, strict=True)}
    return holds(nifti(numbers(8, 7, 6), **fields))


def header_text(name: str, **lines: str) -> Callable[[Path], None]:
    """A MetaImage or NRRD file, with `Key = value` lines or `field: value` lines replaced."""
    mark = ": " if name.endswith(("nrrd", "nhdr")) else " = "

    def make(path: Path) -> None:
        for file, content in itk(numbers(6, 7, 8), name).items():
            for key, value in lines.items():
                key = key.replace("_", " ") if mark == ": " else key
                start = content.find(f"{key}{mark}".encode())
                if start >= 0:
                    end = content.index(b"\n", start)
                    content = content[:start] + f"{key}{mark}{value}".encode() + content[end:]
            (path.parent / file.replace("case", path.stem, 1)).write_bytes(content)

    return make


def deflated(start: bytes, mebibytes: int, wbits: int) -> bytes:
    """A deflate stream of `start` and zeros, without an end."""
    deflate = zlib.compressobj(wbits=wbits)
    parts = [deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH) for data in (start, bytes(1 << 20))]
    return parts[0] + parts[1] * mebibytes


def zlib_bomb(path: Path) -> None:
    """The zlib stream of a MetaImage goes on for 8 GiB after the voxels."""
    data = deflated(numbers(6, 7, 8).tobytes(), 8 << 10, zlib.MAX_WBITS)
    header = itk(numbers(6, 7, 8), "case.mha", compress=True)["case.mha"]
    text = header[: header.index(b"ElementDataFile")].splitlines()
    text = [
        b"CompressedDataSize = %d" % len(data) if line.startswith(b"CompressedDataSize") else line
        for line in text
    ]
    path.write_bytes(b"\n".join([*text, b"ElementDataFile = LOCAL\n"]) + data)


def series(*files: Dataset | bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for number, file in enumerate(files):
            (path / f"{number}.dcm").write_bytes(file if isinstance(file, bytes) else dicom(file))

    return make


def stack(syntax: str | None = None, **tags: Any) -> list[Dataset]:
    """Three slices, all with the tags given."""
    options = {"syntax": syntax} if syntax else {}
    return [slice_of(number, pixels, **options, **tags) for number, pixels in enumerate(STACK)]


def odd_one(**tags: Any) -> list[Dataset]:
    """Three slices, the second with the tags given."""
    slices = stack()
    return [slices[0], slice_of(1, STACK[1], **tags), slices[2]]


def other_series(count: int) -> list[Dataset]:
    tags = {"SeriesInstanceUID": "1.2.4", "SeriesNumber": 2}
    return [slice_of(n, STACK[n], **tags, SOPInstanceUID=f"1.2.9.{n + 1}") for n in range(count)]


def nested(depth: int) -> Dataset:
    innermost = Dataset()
    innermost.PatientID = "x"
    for _ in range(depth):
        outer = Dataset()
        outer.ReferencedStudySequence = [innermost]
        innermost = outer
    return innermost


def nested_bytes(depth: int) -> bytes:
    """A slice that starts with a sequence in a sequence ..., deeper than the writer would go."""
    start = struct.pack("<HH2sHI", 0x0008, 0x1110, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return after_class(start * depth + end * depth)


def after_class(inserted: bytes) -> bytes:
    """A slice with raw elements inserted behind its SOP class."""
    data = dicom(slice_of(1, STACK[1]))
    place = data.index(struct.pack("<HH", 0x0008, 0x0018), 132 + 12 + struct.unpack_from("<I", data, 140)[0])
    return data[:place] + inserted + data[place:]


def deflated_bomb() -> bytes:
    data = dicom(slice_of(1, STACK[1], DeflatedExplicitVRLittleEndian))
    start = 132 + 12 + struct.unpack_from("<I", data, 140)[0]
    element = struct.pack("<HH2sHI", 0x0009, 0x1010, b"OB", 0, 0xFFFFFFF0)
    return data[:start] + deflated(element, 8 << 10, -zlib.MAX_WBITS)


def offset_table(*offsets: int) -> Dataset:
    """Encapsulated frames behind a basic offset table that leads nowhere."""
    dataset = slice_of(0, numbers(2, 24, 30, dtype=np.uint8), JPEGBaseline8Bit)
    (length,) = struct.unpack_from("<I", dataset.PixelData, 4)
    table = struct.pack(f"<{len(offsets)}I", *offsets)
    head = struct.pack("<HHI", 0xFFFE, 0xE000, len(table))
    dataset.PixelData = head + table + dataset.PixelData[8 + length :]
    return dataset


def jpeg_of(rows: int, columns: int) -> Dataset:
    """A JPEG frame that announces another size than the header, as a small file may."""
    dataset = slice_of(0, GREY, JPEGBaseline8Bit)
    place = dataset.PixelData.index(b"\xff\xc0") + 5
    dataset.PixelData = patched(dataset.PixelData, {place: struct.pack(">2H", rows, columns)})
    return dataset


def with_meta(dataset: Dataset, **tags: Any) -> Dataset:
    for keyword, value in tags.items():
        setattr(dataset.file_meta, keyword, value)
    return dataset


def png_of(width: int, height: int, kind: int = 2) -> bytes:
    """A PNG that announces a size it has no pixels for."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">2I5B", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(10000)))
        + chunk(b"IEND", b"")
    )


def png_text_bomb() -> bytes:
    text = PngImagePlugin.PngInfo()
    for number in range(8):
        text.add_text(f"k{number}", "\0" * (4 << 20), zip=True)
    return picture(GREY, "PNG", pnginfo=text)


def tiff(*entries: tuple[int, int, int, int], following: int = 0, data: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory; an entry is (tag, type, count, value)."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + struct.pack("<I", following) + data


def tiff_of(width: int, height: int, following: int = 0) -> bytes:
    strip = 8 + 2 + 9 * 12 + 4
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: strip, 277: 1, 278: height, 279: 720}
    return tiff(*((tag, 4, 1, value) for tag, value in tags.items()), following=following, data=GREY.tobytes())


def tiff_chain(pages: int) -> bytes:
    """A picture, then empty directories, each naming the next."""
    start = len(tiff_of(30, 24))
    chain = (struct.pack("<HI", 0, start + 6 * (page + 1)) for page in range(pages - 1))
    return tiff_of(30, 24, following=start) + b"".join(chain) + struct.pack("<HI", 0, 0)


def tiled_tiff() -> bytes:
    import imagecodecs

    return bytes(imagecodecs.tiff_encode(numbers(64, 80, dtype=np.uint8), tile=(16, 16)))


def sparse(gibibytes: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(picture(GREY, "PNG"))
        os.truncate(path, gibibytes << 30)

    return make


def linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def locked(path: Path) -> None:
    path.write_bytes(GOOD)
    path.chmod(0)


def listening(path: Path) -> None:
    """A socket; its path would be too long for the call."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def endless(path: Path) -> None:
    os.mknod(path, 0o644 | 0o020000, os.makedev(1, 5))  # a zero device


def device_possible(folder: Path) -> bool:
    trial = folder / "device"
    try:
        endless(trial)
        trial.open("rb").close()
    except PermissionError:
        return False
    finally:
        trial.unlink(missing_ok=True)
    return True


def pipe_inside(path: Path) -> None:
    series(*stack())(path)
    os.mkfifo(path / "9.dcm")


def table(path: Path) -> None:
    """A table of a good series and one that is not the dataset's."""
    series(*stack())(path.parent / "good")
    path.write_text("File Location\ngood\n../../elsewhere\n")


def folder_of(*files: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for number, data in enumerate(files):
            (path / f"inside{number}.txt").write_bytes(data)

    return make


def _volumes() -> Iterable[Hostile]:
    def volume(name: str, code: str, make: Callable[[Path], None] | bytes, **options: Any) -> Hostile:
        return Hostile(f"volumes/{name}", code, holds(make) if isinstance(make, bytes) else make, **options)

    gz = igzip.compress(GOOD, 3)
    yield volume("good.nii", INGESTED, GOOD)
    yield volume("empty.nii.gz", "unreadable", b"")
    yield volume("truncated-gzip.nii.gz", "unreadable", gz[: len(gz) // 2])
    yield volume("truncated-header.nii", "unreadable", GOOD[:100])
    yield volume("truncated.nii", "unreadable", GOOD[:-100])
    yield volume("checksum.nii.gz", "unreadable", patched(gz, {len(gz) - 8: b"\0\0\0\0"}))
    yield volume("gzip-garbage.nii.gz", "unreadable", gz[:20] + bytes(range(256)) * 4)
    yield volume("web-page.nii.gz", "unreadable", b"<!DOCTYPE html><title>Please log in</title>" * 20)
    yield volume("bomb-behind.nii.gz", "unreadable", gzip_bomb(GOOD))
    yield volume(
        "bomb-before.nii.gz", "unreadable", gzip_bomb(patched(GOOD, {VOX_OFFSET: struct.pack("<f", 2.0**33)}))
    )
    big = patched(GOOD, {DIM: dims(2000, 2000, 2000), DATATYPE: struct.pack("<2h", 2, 8)})
    yield volume("bomb-of-voxels.nii.gz", "too_large", gzip_bomb(big[:352]))
    many = patched(GOOD, {DIM: dims(2, 2, 2, 32767, 32767)})
    yield volume("bomb-of-volumes.nii.gz", "too_large", gzip_bomb(many[:352]))
    yield volume("wrong-magic.nii", "unreadable", patched(GOOD, {MAGIC: b"nope"}))
    yield volume("half-a-pair.nii", "unreadable", patched(GOOD, {MAGIC: b"ni1\0"}))
    yield volume("absurd-dims.nii", "too_large", patched(GOOD, {DIM: dims(32767, 32767, 32767)}))
    yield volume("negative-dims.nii", "unreadable", patched(GOOD, {DIM: dims(8, -7, 6)}))
    yield volume("many-axes.nii", "unreadable", patched(GOOD, {DIM: struct.pack("<h", 99)}))
    yield volume("zero-dim.nii", "no_pixels", patched(GOOD, {DIM: dims(8, 0, 6)}))
    overflow = patched(
        nifti(numbers(8, 7, 6), version=2), {16: struct.pack("<4q", 3, 1 << 31, 1 << 31, 1 << 2)}
    )
    yield volume("overflowing-dims.nii", "too_large", overflow)
    yield volume("one-slice.nii", "single_slice", nifti(numbers(8, 7, 1)))
    yield volume("offset-beyond.nii", "unreadable", patched(GOOD, {VOX_OFFSET: struct.pack("<f", 1e6)}))
    yield volume("offset-negative.nii", "unreadable", patched(GOOD, {VOX_OFFSET: struct.pack("<f", -352)}))
    yield volume("offset-nan.nii", "unreadable", patched(GOOD, {VOX_OFFSET: struct.pack("<f", np.nan)}))
    floats = numbers(8, 7, 6, dtype=np.float32) / 7
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        voxels = floats.copy()
        voxels[1, 2, 3] = value
        yield volume(f"{name}-voxel.nii", "not_finite", nifti(voxels))
    yield volume("constant.nii", "constant", nifti(np.full((8, 7, 6), 7, np.int16)))
    yield volume("immense-voxels.nii", "not_finite", nifti(floats.astype(np.float64) * 5e306))
    yield volume("zero-spacing.nii", "spacing_invalid", spacing(0.5, 0, 2))
    yield volume("no-spacing.nii", "spacing_missing", spacing(0, 0, 0))
    yield volume("negative-spacing.nii", "spacing_invalid", spacing(0.5, 0.5, -2))
    yield volume("nan-spacing.nii", "spacing_invalid", spacing(np.nan, 0.5, 2))
    yield volume("sheared.nii", "sheared_affine", affine((0.5, 0.3, 0), (0, 0.5, 0), (0, 0, 2)))
    yield volume("singular.nii", "spacing_invalid", affine((0.5, 0, 0), (0, 0, 0), (0, 0, 2)))
    yield volume("parallel-axes.nii", "sheared_affine", affine((0.5, 0.5, 0), (0, 0, 0), (0, 0, 2)))
    yield volume("immense-affine.nii", "spacing_invalid", affine((1e38, 0, 0), (0, np.inf, 0), (0, 0, 2)))
    yield volume("unknown-type.nii", "unreadable", patched(GOOD, {DATATYPE: struct.pack("<2h", 9999, 16)}))
    yield volume("complex.nii", "unsupported_layout", nifti(floats.astype(np.complex64)))
    long_double = patched(GOOD, {DATATYPE: struct.pack("<2h", 1536, 128)}) + bytes(16 * 8 * 7 * 6)
    yield volume("long-double.nii", "unreadable", long_double)
    rgb = np.zeros((8, 7, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    yield volume("colours.nii", "colour_volume", nifti(rgb))
    # The lengths of the axes tell the byte order where the first number contradicts them.
    yield volume("swapped-length.nii", INGESTED, patched(GOOD, {0: (348).to_bytes(4, "big")}))
    yield volume("swapped-dims.nii", "unreadable", patched(GOOD, {DIM: struct.pack(">4h", 3, 8, 7, 6)}))

    yield volume("missing-data.mhd", "vanished", header_text("case.mhd", ElementDataFile="gone.raw"))
    yield volume(
        "data-outside.mhd",
        "outside_root",
        header_text("case.mhd", ElementDataFile="../" * 20 + "etc/passwd"),
    )
    yield volume("data-absolute.mhd", "outside_root", header_text("case.mhd", ElementDataFile="/etc/passwd"))
    for separator, key in (
        ("colon", "ElementDataFile : {}"),
        ("lower-case", "elementdatafile = LOCAL\nElementDataFile = {}"),
    ):
        header = itk(numbers(6, 7, 8), "case.mha")["case.mha"]
        disguised = header.replace(
            b"ElementDataFile", key.format("/etc/passwd").encode() + b"\nElementDataFile", 1
        )
        yield volume(f"data-outside-by-{separator}.mha", "unreadable", disguised)
    yield volume("data-in-list.mhd", "unsupported_layout", header_text("case.mhd", ElementDataFile="LIST"))
    yield volume("data-is-pipe.mhd", "not_a_file", header_text("case.mhd", ElementDataFile="pipe.nii"))
    yield volume("data-nowhere.mhd", "unreadable", header_text("case.mhd", ElementDataFile=""))
    yield volume("no-data.mha", "unreadable", b"ObjectType = Image\nNDims = 3\nDimSize = 8 7 6\n")
    yield volume("absurd.mha", "too_large", header_text("case.mha", DimSize="999999 999999 999999"))
    yield volume("overflowing.mha", "too_large", header_text("case.mha", DimSize="4294967304 7 6"))
    yield volume("more-axes-than-room.mha", "unreadable", header_text("case.mha", NDims="65535"))
    yield volume("negative.mha", "unreadable", header_text("case.mha", DimSize="-8 7 6"))
    yield volume("itk-zero-spacing.mha", "spacing_invalid", header_text("case.mha", ElementSpacing="0.5 0 2"))
    yield volume("zlib-bomb.mha", "unreadable", zlib_bomb)
    yield volume(
        "nrrd-outside.nhdr", "outside_root", header_text("case.nhdr", data_file="../" * 20 + "etc/passwd")
    )
    twice = header_text("case.nhdr", data_file="case.raw\ndatafile: /etc/passwd")
    yield volume("nrrd-two-files.nhdr", "unreadable", twice)
    yield volume("nrrd-absurd.nrrd", "too_large", header_text("case.nrrd", sizes="99999 99999 99999"))
    yield volume("nrrd-negative.nrrd", "unreadable", header_text("case.nrrd", sizes="8 -7 6"))
    yield volume("nrrd-text.nrrd", "unreadable", header_text("case.nrrd", sizes="many 7 6"))
    yield volume("nrrd-garbage.nrrd", "unreadable", header_text("case.nrrd", encoding="gzip"))
    yield volume("nrrd-nothing.nrrd", "unreadable", b"NRRD0004\n\n")

    yield volume("link-outside.nii", "outside_root", linked("/etc/passwd"))
    yield volume("link-to-device.nii", "outside_root", linked("/dev/zero"))
    yield volume("link-nowhere.nii", "vanished", linked("gone.nii"))
    yield volume("link-to-itself.nii", "not_a_file", linked("link-to-itself.nii"))
    yield volume("pipe.nii", "not_a_file", os.mkfifo)
    yield volume("socket.nii", "not_a_file", listening)
    yield volume("device.nii", "not_a_file", endless, possible=device_possible)
    yield volume("folder.nii.gz", "not_a_file", folder_of(b"nothing"))
    yield volume("locked.nii", "no_permission", locked)
    yield volume("line\nbreak.nii", "unusable_name", holds(GOOD), row_path=r"volumes/line\nbreak.nii")
    yield volume("\x1b[31mred\x07.nii", "unusable_name", holds(GOOD), row_path=r"volumes/\x1b[31mred\x07.nii")
    yield volume("latin-\udce9.nii", "unusable_name", holds(GOOD), row_path=r"volumes/latin-\udce9.nii")
    yield volume("[bold] [link=x].nii", "unreadable", b"markup that a terminal might interpret")
    yield volume("%s {} $HOME `id` ';--.nii", "unreadable", b"what a shell or a template might interpret")
    yield volume(f"long-{'x' * 246}.nii", INGESTED, GOOD)


def _series() -> Iterable[Hostile]:
    def case(name: str, code: str, *files: Dataset | bytes, images: int = 1) -> Hostile:
        return Hostile(f"series/{name}", code, series(*files), images)

    good = [dicom(dataset) for dataset in stack()]
    yield case("good-series", INGESTED, *good)
    yield case("empty-folder", "no_pixels")
    yield case("no-pixel-data", "no_pixels", *(slice_of(n, None) for n in range(3)))
    yield case("no-rows", "no_pixels", *stack(Rows=None))
    yield case("no-columns", "no_pixels", *stack(Columns=None))
    yield case("no-position", "spacing_missing", *odd_one(ImagePositionPatient=None))
    yield case("no-orientation", "spacing_missing", *odd_one(ImageOrientationPatient=None))
    yield case("no-pixel-spacing", "spacing_missing", *odd_one(PixelSpacing=None))
    yield case("zero-pixel-spacing", "spacing_invalid", *stack(PixelSpacing=[0, 0.5]))
    yield case("zero-orientation", "sheared_affine", *stack(ImageOrientationPatient=[0] * 6))
    yield case("two-series", INGESTED, *stack(), *other_series(3), images=2)
    yield case("one-file", "single_slice", good[0])
    yield case("copies", "duplicate_slices", *good, good[1])
    yield case("truncated-pixels", "unreadable", good[0], good[1][:-50], good[2])
    yield case("truncated-header", "unreadable", good[0], good[1][:200], good[2])
    yield case("few-bits", "unreadable", *stack(BitsAllocated=12))
    yield case("more-bits-than-there-are", "unreadable", *stack(BitsAllocated=8, BitsStored=16, HighBit=15))
    yield case(
        "unknown-syntax",
        "unreadable",
        *(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.3.4.5.6.7.8.9.0\0") for data in good),
    )
    yield case("film", "unreadable", *(with_meta(d, TransferSyntaxUID=MPEG2MPML) for d in stack(RLELossless)))
    yield case(
        "wrong-codec",
        "unreadable",
        *(with_meta(d, TransferSyntaxUID=JPEGLSLossless) for d in stack(RLELossless)),
    )
    yield case("deflated-bomb", "too_large", good[0], deflated_bomb(), good[2])
    yield case("index-alone", "no_pixels", dicomdir())
    yield case("text", "unreadable", *good, b"Notes of the night shift\n" * 20)
    yield case("empty-file", "unreadable", *good, b"")
    yield case(
        "nested", INGESTED, good[0], dicom(slice_of(1, STACK[1], ReferencedStudySequence=[nested(40)])), good[2]
    )
    yield case("nested-deeply", "unreadable", good[0], nested_bytes(3000), good[2])
    yield case(
        "one-element-of-4-GiB",
        "unreadable",
        good[0],
        after_class(struct.pack("<HH2sHI", 8, 0x17, b"UN", 0, 0xFFFFFFF0)),
        good[2],
    )
    yield Hostile("series/pipe-inside", "not_a_file", pipe_inside)
    yield Hostile("listed/metadata.csv", INGESTED, table, row_path="listed/good")
    yield Hostile("elsewhere", "outside_root", lambda _: None, row_path="../../elsewhere")

    def frame(name: str, code: str, dataset: Dataset | bytes, images: int = 1) -> Hostile:
        return Hostile(
            f"frames/{name}.dcm", code, holds(dataset if isinstance(dataset, bytes) else dicom(dataset)), images
        )

    yield frame("billions-of-frames", "too_large", slice_of(0, GREY, NumberOfFrames=2_000_000_000))
    yield frame("negative-frames", "unreadable", slice_of(0, GREY, NumberOfFrames=-3))
    yield frame("text-for-frames", "unreadable", text_for_frames())
    yield frame("broken-offsets", "unreadable", offset_table(0, 4_000_000_000))
    yield frame("zero-offsets", "unreadable", offset_table(0, 0))
    yield frame(
        "one-frame-missing", "unreadable", slice_of(0, numbers(3, 24, 30, dtype=np.uint8), NumberOfFrames=4)
    )
    yield frame("jpeg-of-4-gigapixels", "unreadable", jpeg_of(65500, 65500))
    yield frame(
        "palette-without-colours", "unreadable", slice_of(0, GREY, PhotometricInterpretation="PALETTE COLOR")
    )


def text_for_frames() -> bytes:
    data = dicom(slice_of(0, GREY, NumberOfFrames=77))
    return data.replace(b"77", b"x?")


def dicomdir() -> Dataset:
    dataset = slice_of(0, None)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    return dataset


def _pictures() -> Iterable[Hostile]:
    def case(name: str, code: str, data: bytes | Callable[[Path], None]) -> Hostile:
        return Hostile(f"pictures/{name}", code, holds(data) if isinstance(data, bytes) else data)

    png, jpeg = picture(COLOUR, "PNG"), picture(COLOUR, "JPEG")
    yield case("good.png", INGESTED, png)
    yield case("empty.png", "unreadable", b"")
    yield case("truncated.png", "unreadable", png[: len(png) // 2])
    yield case("truncated.jpg", "unreadable", jpeg[: len(jpeg) // 2])
    yield case("gigapixels.png", "too_large", png_of(60000, 60000))
    yield case("overflowing.png", "too_large", png_of(0x7FFFFFFF, 0x7FFFFFFF))
    yield case("many-pixels-few-bytes.png", "unreadable", png_of(13000, 13000, kind=0))
    yield case("text-bomb.png", "unreadable", png_text_bomb())
    yield case("no-pixels.png", "unreadable", png_of(0, 100))
    yield case("sparse.png", "too_large", sparse(1 << 10))
    animation = picture(GREY, "GIF", save_all=True, append_images=[Image.fromarray(GREY[::-1])])
    yield case("animation.png", "unreadable", animation)
    yield case("drawing.png", "unreadable", b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    yield case("ink.jpg", "unsupported_layout", picture(COLOUR, "JPEG", "CMYK"))
    yield case("transparent.png", "transparent", picture(np.dstack([COLOUR, GREY]), "PNG"))
    yield case("one-pixel.png", "constant", picture(GREY[:1, :1], "PNG"))
    yield case("black.png", "constant", picture(np.zeros_like(GREY), "PNG"))
    deep = cv2.imencode(".tif", numbers(24, 30, 3, dtype=np.uint16) * 100)[1]
    yield case("deep-colour.tif", INGESTED, bytes(deep))
    yield case("tiled.tif", INGESTED, tiled_tiff())
    pages = picture(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY[::-1])])
    yield case("pages.tif", "unsupported_layout", pages)
    yield case("gigapixels.tif", "too_large", tiff_of(60000, 60000))
    yield case("many-pixels-few-bytes.tif", "unreadable", tiff_of(13000, 13000))
    yield case("cyclic.tif", INGESTED, tiff_of(30, 24, following=8))
    yield case("pages-without-end.tif", "unreadable", tiff_chain(100_000))
    yield case("no-directory.tif", "unreadable", struct.pack("<2sHI", b"II", 42, 0xFFFFFFF0))
    lzw = bytearray(picture(GREY, "TIFF", compression="tiff_lzw"))
    lzw[300:340] = bytes(range(200, 240))
    yield case("lzw-garbage.tif", "unreadable", bytes(lzw))
    yield case("no-tags.tif", "unreadable", tiff())


@cache
def hostile_files() -> tuple[Hostile, ...]:
    """All of them."""
    return (*_volumes(), *_series(), *_pictures())
