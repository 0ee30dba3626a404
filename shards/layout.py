"""What a shard looks like on disk, written down once: names, chunks, codecs.

A shard is one Zarr v3 array that holds one volume (C, D, H, W), or a pack of 2-D images (N, C, H, W). The
sharding codec puts all its inner chunks into one file, each with its own checksum:

    <dataset>/<key>-<identity>.zarr/zarr.json      metadata
    <dataset>/<key>-<identity>.zarr/c.0.0.0.0      inner chunks, then an index of (offset, bytes) pairs

In another codec profile than `fast` the same array is called <key>-<identity>.<profile>.zarr.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.store import Location

Profile = Literal["fast", "train", "small"]
Shape = tuple[int, ...]

INNER_CHUNK = (1, 16, 64, 64)
"""What one read decodes at least: about two thirds of a crop along each axis."""

PACK_SIZE = 256
"""2-D images in one pack, at most."""

PROFILES: dict[Profile, dict[str, str | int]] = {
    "fast": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"},
    "train": {"cname": "lz4hc", "clevel": 5, "shuffle": "shuffle"},
    "small": {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle"},
}
"""Settings of the blosc codec: fast to write, fast to read, or small. A reader needs not know which."""

LAYOUT_VERSION = 2
"""Raised when an earlier version of this program would misread what is written. 1: the same, not saying so.

The catalog's SCHEMA_VERSION goes up with it: a reader takes an array's metadata from the catalog, and looks at
`zarr.json` only to say what is wrong.
"""

METADATA_FILE = "zarr.json"
SHARD_FILE = "c.0.0.0.0"
TEMPORARY_PREFIX = ".tmp-"
"""Folders that a killed writer may leave behind; no array name starts so."""

_VERSION_ATTRIBUTE = "pumit_layout_version"
_ARRAY_NAME = re.compile(r"(.*-[0-9a-f]{12})(?:\.[a-z]+)?\.zarr", re.DOTALL)

_NAME_LIMIT = 160
"""Bytes of the key's part of a name. File systems allow 255 in all."""


def array_name(dataset: str, key: str, identity: str, profile: Profile = "fast") -> str:
    """Path of an array relative to the shards folder: `<dataset>/<key>-<identity[:12]>.zarr`.

    Two images never share a name, and whatever the key holds, the result is two plain path components.
    `identity` is the hexadecimal digest of everything that shapes the stored voxels, so that a name
    stands for one content. Raises ValueError if it is not at least 12 hexadecimal digits.
    """
    if not re.fullmatch(r"[0-9a-f]{12,}", identity):
        raise ValueError(f"{dataset}/{key}: the identity {identity!r} is not a hexadecimal digest")
    return in_profile(f"{dataset_folder(dataset)}/{_component(key)}-{identity[:12]}.zarr", profile)


def in_profile(path: str, profile: Profile) -> str:
    """The path that the array at `path`, in whatever profile, has in `profile`: both can lie there at a time.

    Raises ValueError if `path` is none that `array_name` gives.
    """
    found = _ARRAY_NAME.fullmatch(path)
    if found is None:
        raise ValueError(f"{path!r} is not the name of an array")
    return f"{found[1]}.zarr" if profile == "fast" else f"{found[1]}.{profile}.zarr"


def dataset_folder(dataset: str) -> str:
    """Folder of a dataset's arrays, relative to the shards folder."""
    if not dataset:
        raise ValueError("a dataset needs a name")
    return _component(dataset)


def _component(text: str) -> str:
    """One file name that stands for `text` alone: percent-encoded, and if too long cut and hashed."""
    # File names that are no valid UTF-8 reach Python as lone surrogates.
    encoded = quote(text, safe="", errors="surrogatepass")
    if encoded.startswith("."):
        encoded = f"%2E{encoded[1:]}"
    if len(encoded) <= _NAME_LIMIT:
        return encoded
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
    # quote() escapes "+", so no short text can produce a name of this form.
    return f"{encoded[: _NAME_LIMIT - len(digest) - 1]}+{digest}"


def volume_chunk(shape: Shape) -> Shape:
    """Inner chunk of a volume (C, D, H, W): INNER_CHUNK, clipped where the volume is smaller."""
    return tuple(min(chunk, size) for chunk, size in zip(INNER_CHUNK, shape, strict=True))


def pack_chunk(shape: Shape) -> Shape:
    """Inner chunk of a pack (N, C, H, W): one image."""
    return (1, *shape[1:])


def array_chunk(shape: Shape, *, is_pack: bool) -> Shape:
    """Inner chunk of a pack or a volume."""
    return pack_chunk(shape) if is_pack else volume_chunk(shape)


def chunk_grid(shape: Shape, chunk: Shape) -> Shape:
    """Number of inner chunks along each axis."""
    return tuple(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def array_metadata(
    shape: Shape, dtype: npt.DTypeLike, chunk: Shape, profile: Profile, version: int = LAYOUT_VERSION
) -> dict[str, Any]:
    """The content of `zarr.json`. The one shard is the array rounded up to whole inner chunks."""
    kind = np.dtype(dtype)
    shard = [count * step for count, step in zip(chunk_grid(shape, chunk), chunk, strict=True)]
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {**PROFILES[profile], "typesize": kind.itemsize, "blocksize": 0}
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": [
            to_bytes if kind.itemsize > 1 else {"name": "bytes"},
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ],
        "index_codecs": [to_bytes, {"name": "crc32c"}],
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": kind.name,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        # With "." an array takes three inodes; the default "/" would take seven.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        **({"attributes": {_VERSION_ATTRIBUTE: version}} if version > 1 else {}),
    }


def refuse_newer_layout(folder: Location, metadata: bytes | Mapping[str, Any]) -> None:
    """Raise SetupError if `metadata`, the content of an array's `zarr.json`, is of a later version.

    Metadata that cannot be understood are left to who reads the array.
    """
    try:
        content = json.loads(metadata) if isinstance(metadata, bytes) else metadata
        version = int(content.get("attributes", {}).get(_VERSION_ATTRIBUTE, 1))
    except (ValueError, TypeError, AttributeError):
        return
    if version > LAYOUT_VERSION:
        raise SetupError(
            f"{folder} has version {version} of the shard layout, this program knows versions up to "
            f"{LAYOUT_VERSION}. Install the version of pumit-data that wrote it, or a later one."
        )


def chunk_bytes(shard_file: Location, grid: Shape) -> npt.NDArray[np.int64]:
    """Compressed bytes of every inner chunk, shape `grid`, from the index at the end of the shard file.

    Raises ValueError if the file is cut short or otherwise not of the size its index tells, OSError if it
    cannot be read.
    """
    index_bytes = 16 * int(np.prod(grid)) + 4  # (offset, bytes) as uint64 for each chunk, then a crc32c
    with shard_file.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - index_bytes, 0))
        index = file.read(index_bytes)
    if len(index) == index_bytes:
        sizes = np.frombuffer(index[:-4], "<u8").reshape(*grid, 2)[..., 1]
        # A sum of floats cannot wrap around to the right number, as one of garbage integers could.
        if float(sizes.astype(np.float64).sum()) == size - index_bytes:
            return sizes.astype(np.int64)
    raise ValueError(f"{shard_file} is cut short: its index does not account for its {size} bytes")
