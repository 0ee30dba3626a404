"""PNG, JPEG, BMP and TIFF pictures: Pillow, and OpenCV for 16-bit colour, which Pillow would cut to 8 bits."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFile

from ingest.readers import inside_root, name, reading
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume, Voxels

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_ORIENTATION = 0x0112
_AS_RGB = ("P", "PA", "RGBA", "RGBX", "RGBa", "YCbCr", "HSV", "LAB")
_AS_GREY = ("1", "LA", "La")
_BAND = 256  # rows
_MAX_BYTES = 4 << 30
"""More than the largest picture that Pillow opens takes without any compression."""


def read(source: ImageSource) -> Iterator[Volume]:
    """Yield one 2-D volume, (C, 1, H, W) with C = 3 for colour, upright as EXIF says.

    dtype uint8, uint16, int32 or float32 as the file's depth asks; 1-bit becomes 0 and 255. Opaque alpha is
    dropped. Spacing is null: the resolution a picture states is one of print, not of anatomy.

    Raises:
        ExcludedImage: `transparent`, `single_slice` in a 3-D dataset, `unsupported_layout` (pages, CMYK).
        FailedImage: see `ingest.readers.read_volumes`; `too_large` beyond Pillow's limit against decompression
            bombs (2 * `Image.MAX_IMAGE_PIXELS`, 179 megapixels).
    """
    path = inside_root(source, source.file)
    if source.dimension == 3:
        raise ExcludedImage(
            "single_slice",
            f"{name(source)}: a picture in a 3-D dataset. Declare `dimension: 2` in datasets.yaml.",
        )
    with reading(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a bomb only the error is the limit; others quote odd tags
        if path.stat().st_size > _MAX_BYTES:
            raise FailedImage("too_large", f"{name(source)}: over {_MAX_BYTES} bytes. Reduce or split it.")
        data = path.read_bytes()
        pixels, flags = _pixels(source, data)
        source_hash = hashlib.sha256(data).hexdigest()
        del data  # it would stay until the next picture
    if pixels.ndim == 3 and all(np.array_equal(pixels[..., 0], pixels[..., c]) for c in (1, 2)):
        pixels = np.ascontiguousarray(pixels[..., 0])
        flags = (*flags, "equal_channels")
    channels_first = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[np.newaxis]
    yield Volume(
        voxels=channels_first[:, np.newaxis],
        dimension=2,
        spacing=None,
        affine=None,
        flags=flags,
        source_hash=source_hash,
    )


def _pixels(source: ImageSource, data: bytes) -> tuple[Voxels, tuple[str, ...]]:
    """(H, W) grey or (H, W, 3) colour, upright, and flags."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise FailedImage(
            "too_large",
            f"{name(source)}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels. Reduce or split it.",
        ) from None
    # The further pictures of an MPO are a camera's previews and second views; pages of a TIFF are not.
    pages = getattr(image, "n_frames", 1)
    if image.format != "MPO" and pages > 1:
        raise ExcludedImage("unsupported_layout", f"{name(source)}: {pages} pages. Store one image a file.")

    if _is_deep_colour(image):
        orientation = image.getexif().get(_ORIENTATION, 1)
        pixels = _deep_colour(source, data)
    else:
        image.load()
        # Read after loading: Pillow turns a TIFF itself and then removes the tag.
        orientation = image.getexif().get(_ORIENTATION, 1)
        pixels = _shallow(source, image)
    return _upright(pixels, orientation), (("exif_rotated",) if orientation in range(2, 9) else ())


def _is_deep_colour(image: ImageFile.ImageFile) -> bool:
    """Whether the file holds 16 bits a channel that Pillow's mode has no room for."""
    raw_mode = image.tile[0][3] if image.tile else ""
    if isinstance(raw_mode, tuple):
        raw_mode = raw_mode[0]
    return image.mode in ("RGB", "RGBA", "RGBX", "LA") and ";16" in str(raw_mode)


def _deep_colour(source: ImageSource, data: bytes) -> Voxels:
    pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise FailedImage(
            "unreadable", f"{name(source)}: 16-bit colour of a kind without reader. Save it as PNG."
        )
    if pixels.shape[-1] == 4:
        _demand_opaque(source, pixels[..., 3])
    return np.ascontiguousarray(pixels[..., 2::-1])


def _shallow(source: ImageSource, image: Image.Image) -> Voxels:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if "transparency" in image.info and np.any(pixels == image.info["transparency"]):
            _demand_opaque(source, np.zeros(1))
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if image.has_transparency_data:
        _demand_opaque(source, np.asarray(image.convert("RGBA").getchannel("A")))
    if image.mode in _AS_RGB:
        return _pixels_of_bytes(image.convert("RGB"))
    if image.mode in _AS_GREY:
        return _pixels_of_bytes(image.convert("L"))
    if image.mode in ("L", "RGB"):
        return _pixels_of_bytes(image)
    if image.mode == "F":
        return np.asarray(image)
    raise ExcludedImage("unsupported_layout", f"{name(source)}: colour mode {image.mode}. Convert it to RGB.")


def _pixels_of_bytes(image: Image.Image) -> Voxels:
    """(H, W) of mode L, (H, W, 3) of RGB. In bands: what Pillow hands over lies in memory twice meanwhile."""
    width, height = image.size
    pixels = np.empty((height, width) if image.mode == "L" else (height, width, 3), dtype=np.uint8)
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _demand_opaque(source: ImageSource, alpha: Voxels) -> None:
    if np.any(alpha != (np.iinfo(alpha.dtype).max if alpha.dtype.kind == "u" else 1)):
        raise ExcludedImage(
            "transparent", f"{name(source)}: transparent pixels have no intensity. Compose it on a background."
        )


def _upright(pixels: Voxels, orientation: int) -> Voxels:
    """Undo the camera's turn; `orientation` as EXIF tag 0x0112 counts, 1 being upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
