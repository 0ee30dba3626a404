"""Stored values of DICOM frames: raw by numpy, JPEG family by imagecodecs, else by pydicom."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Literal

import imagecodecs
import numpy as np
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, convert_color_space, pixel_array

from ingest.readers.dicom_frames import PixelFormat
from ingest.volume import Voxels

_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_RAW = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", _BIG_ENDIAN}
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Second bytes of the markers of JPEG and JPEG-LS that the size follows."""
_FLOATS = {"FloatPixelData": np.float32, "DoubleFloatPixelData": np.float64}


def decode(dataset: Any, number: int, pixel_format: PixelFormat) -> Voxels:
    """Stored values of one frame: (rows, columns) with the header's bits and sign, or (rows, columns, 3) RGB.

    Args:
        dataset: pydicom data set of the file, with its pixels.
        number: of the frame, from 0.
        pixel_format: what the header states.

    Raises:
        ValueError: size or type of the data contradict the header; decoders raise errors of their own.
    """
    syntax = _transfer_syntax(dataset)
    grey = pixel_format.channels == 1
    if grey and syntax in _RAW and pixel_format.bits_allocated in (8, 16, 32, 64):
        pixels = _raw(dataset, number, pixel_format, ">" if syntax == _BIG_ENDIAN else "<")
    elif syntax in _CODECS:
        encoded = get_frame(dataset.PixelData, number, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
        _check_frame_size(encoded, pixel_format)
        pixels = _CODECS[syntax](encoded, pixel_format)
        if pixels.dtype.kind in "iu" and grey:
            pixels = _interpret(pixels, pixel_format, shift=0)
    else:
        pixels = pixel_array(dataset, index=number)

    expected = (pixel_format.rows, pixel_format.columns) + (() if grey else (3,))
    if pixels.shape != expected:
        raise ValueError(f"decoded {pixels.shape}, the header states {expected}")
    if pixel_format.photometric == "PALETTE COLOR":
        colours = np.asarray(apply_color_lut(pixels, dataset))
        return (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours
    return pixels


def _transfer_syntax(dataset: Any) -> str:
    """As the file meta information states; where there is none, as pydicom found the data set to be encoded."""
    stated = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if stated:
        return str(stated)
    little_endian = dataset.original_encoding[1]
    return "1.2.840.10008.1.2" if little_endian else _BIG_ENDIAN


def _raw(dataset: Any, number: int, pixel_format: PixelFormat, order: Literal["<", ">"]) -> Voxels:
    for keyword, kind in _FLOATS.items():
        if keyword in dataset:
            dtype, data = np.dtype(kind).newbyteorder(order), dataset[keyword].value
            break
    else:
        dtype, data = np.dtype(f"{order}u{pixel_format.bits_allocated // 8}"), dataset.PixelData
    count = pixel_format.rows * pixel_format.columns
    flat = np.frombuffer(data, dtype=dtype, count=count, offset=number * count * dtype.itemsize)
    pixels: Voxels = flat.reshape(pixel_format.rows, pixel_format.columns)
    pixels = pixels.astype(dtype.newbyteorder("="), copy=False)
    if pixels.dtype.kind == "f":
        return pixels
    return _interpret(pixels, pixel_format, shift=pixel_format.high_bit + 1 - pixel_format.bits_stored)


def _interpret(pixels: Voxels, pixel_format: PixelFormat, shift: int) -> Voxels:
    """Keep the stored bits, which start at bit `shift`, and give them their sign."""
    bits = pixel_format.bits_allocated
    unsigned = pixels.astype(f"u{bits // 8}", copy=False)
    unused = bits - pixel_format.bits_stored
    if not pixel_format.signed:
        shifted = unsigned >> shift if shift else unsigned
        return shifted & ((1 << pixel_format.bits_stored) - 1) if unused else unsigned
    # Pushed to the top and back down, the sign bit fills the bits above it.
    return np.asarray((unsigned << (unused - shift)).view(f"i{bits // 8}") >> unused)


def _check_frame_size(encoded: bytes, pixel_format: PixelFormat) -> None:
    """Compare the size that an encoded frame announces with the header's: decoders take memory for theirs."""
    if encoded.startswith(b"\xff\xd8"):
        place = 2
        while encoded[place + 1] not in _FRAME_HEADERS:
            # 0xFF may be repeated before a marker; any other segment tells its length.
            fill = encoded[place + 1] == 0xFF
            place += 1 if fill else 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
        size = struct.unpack_from(">2H", encoded, place + 5)
    else:  # JPEG 2000: the whole less its offset
        start = encoded.index(b"\xff\x4f\xff\x51")
        right, bottom, left, top = struct.unpack_from(">4I", encoded, start + 8)
        size = bottom - top, right - left
    if size != (pixel_format.rows, pixel_format.columns):
        raise ValueError(f"a frame of {size}, the header states {pixel_format.rows, pixel_format.columns}")


def _jpeg(encoded: bytes, pixel_format: PixelFormat) -> Voxels:
    if pixel_format.channels == 1:
        return np.asarray(imagecodecs.jpeg8_decode(encoded))
    if b"JFIF" in encoded[:64] or b"Adobe" in encoded[:1024]:
        # The stream names its colours; headers are often wrong after recompression.
        return np.asarray(imagecodecs.jpeg8_decode(encoded, outcolorspace="RGB"))
    stored = "YCBCR" if pixel_format.photometric.startswith("YBR") else "RGB"
    return np.asarray(imagecodecs.jpeg8_decode(encoded, colorspace=stored, outcolorspace="RGB"))


def _jpeg_ls(encoded: bytes, pixel_format: PixelFormat) -> Voxels:
    return _to_rgb(np.asarray(imagecodecs.jpegls_decode(encoded)), pixel_format)


def _jpeg_2000(encoded: bytes, pixel_format: PixelFormat) -> Voxels:
    # YBR_ICT and YBR_RCT are undone by the decoder itself.
    return _to_rgb(np.asarray(imagecodecs.jpeg2k_decode(encoded)), pixel_format)


def _to_rgb(pixels: Voxels, pixel_format: PixelFormat) -> Voxels:
    if pixel_format.photometric in ("YBR_FULL", "YBR_FULL_422"):
        return np.asarray(convert_color_space(pixels, "YBR_FULL", "RGB"))
    return pixels


_CODECS: dict[str, Callable[[bytes, PixelFormat], Voxels]] = {
    "1.2.840.10008.1.2.4.50": _jpeg,  # baseline
    "1.2.840.10008.1.2.4.51": _jpeg,  # extended, 12 bits
    "1.2.840.10008.1.2.4.57": _jpeg,  # lossless
    "1.2.840.10008.1.2.4.70": _jpeg,  # lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": _jpeg_ls,
    "1.2.840.10008.1.2.4.81": _jpeg_ls,
    "1.2.840.10008.1.2.4.90": _jpeg_2000,
    "1.2.840.10008.1.2.4.91": _jpeg_2000,
    "1.2.840.10008.1.2.4.201": _jpeg_2000,  # high-throughput
    "1.2.840.10008.1.2.4.202": _jpeg_2000,
    "1.2.840.10008.1.2.4.203": _jpeg_2000,
}
