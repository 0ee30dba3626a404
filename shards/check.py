"""Is a stored array what it was when it was written? Nothing is decoded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.manifest import digest_of
from catalog.store import Location, RemotePath
from shards.layout import (
    LAYOUT_VERSION,
    METADATA_FILE,
    PROFILES,
    SHARD_FILE,
    Shape,
    array_chunk,
    array_metadata,
    chunk_bytes,
    chunk_grid,
    dataset_folder,
    refuse_newer_layout,
)


def arrays_there(shards_root: Location, dataset: str) -> Callable[[str], bool]:
    """Tells of the path of an array, relative to the shards folder, whether it lies there.

    Of an object store, all names are listed first: asking for each would take hours.
    """
    if isinstance(shards_root, Path):
        return lambda path: (shards_root / path).is_dir()
    folder = dataset_folder(dataset)
    end = f"/{METADATA_FILE}"
    listed = (item.name for item in (shards_root / folder).walk())
    found = {f"{folder}/{name.removesuffix(end)}" for name in listed if name.endswith(end)}
    return found.__contains__


def checked_digest(shard_file: Location, grid: Shape) -> tuple[npt.NDArray[np.int64], str]:
    """Bytes of the inner chunks (shape `grid`), and the sha256 of a shard file of which every byte is proven.

    The file is read once, and the checksum of each chunk and of the index compared. For files that nobody
    knows the sha256 of. Raises ValueError if it is damaged, OSError if it cannot be read.
    """
    digest = hashlib.sha256()
    for _ in proven_chunks(shard_file, grid, digest.update):
        pass
    return chunk_bytes(shard_file, grid), digest.hexdigest()


def proven_chunks(shard_file: Location, grid: Shape, read: Callable[[bytes], None]) -> Iterator[bytes]:
    """The encoded inner chunks of a shard file one by one, without their checksums, which were compared.

    `read` is called with every byte of the file in order, and after the last chunk the index has been proven.
    Raises as `checked_digest`.
    """
    sizes = chunk_bytes(shard_file, grid).ravel()
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
    with shard_file.open("rb") as file:
        for size in sizes:
            _check(shard_file, encoded := file.read(int(size)))
            read(encoded)
            yield encoded[:-4]
        _check(shard_file, end := file.read())
    if end[:-4] != index:
        raise ValueError(f"{shard_file}: its chunks do not follow each other as its index tells")
    read(end)


def problems_of_array(
    folder: Location,
    shape: Shape,
    dtype: str,
    *,
    is_pack: bool,
    stored_bytes: list[int | None],
    sha256: str | None,
) -> tuple[list[str], list[str]]:
    """What is wrong with an array: (what is damaged or missing, names of files that do not belong there).

    Args:
        folder: the array's.
        shape: (C, D, H, W) of a volume, (N, C, H, W) of a pack, as the catalog has it.
        dtype: numpy name.
        stored_bytes: of the volume, or of each image of a pack; None where the catalog names no such image.
        sha256: of the shard file, by the catalog; None where it does not know, and each chunk's checksum is
            compared instead.

    Raises OSError if a file cannot be read.
    """
    names = _names_in(folder)
    if not names:
        return ["the array is missing"], []
    problems = [f"{name} is missing" for name in (METADATA_FILE, SHARD_FILE) if name not in names]
    chunk = array_chunk(shape, is_pack=is_pack)
    if METADATA_FILE in names:
        content = (folder / METADATA_FILE).read_bytes()
        if content not in metadata_forms(shape, dtype, chunk):
            try:
                refuse_newer_layout(folder, content)
                problems.append(f"{METADATA_FILE} is not that of {dtype} {shape}")
            except SetupError as error:  # or a flipped bit in the number
                problems.append(f"{METADATA_FILE}: {error}")
    if SHARD_FILE in names:
        problems += _problems_of_shard(folder / SHARD_FILE, chunk_grid(shape, chunk), stored_bytes, sha256)
    return problems, sorted(names - {METADATA_FILE, SHARD_FILE})


def _names_in(folder: Location) -> set[str]:
    """The files of an array; on a web server, which cannot list them, those that it should have."""
    if isinstance(folder, RemotePath) and folder.is_web:
        return {name for name in (METADATA_FILE, SHARD_FILE) if (folder / name).is_file()}
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def metadata_forms(shape: Shape, dtype: str, chunk: Shape) -> list[bytes]:
    """The bytes that `zarr.json` may have for an array, for every codec profile and version of the layout."""
    return [
        json.dumps(array_metadata(shape, dtype, chunk, profile, version)).encode()
        for profile in PROFILES
        for version in range(1, LAYOUT_VERSION + 1)
    ]


def _problems_of_shard(
    file: Location, grid: Shape, stored_bytes: list[int | None], sha256: str | None
) -> list[str]:
    try:
        if sha256 is None:
            sizes, _ = checked_digest(file, grid)
        elif digest_of(file) != sha256:
            return [f"{file.name} does not have the sha256 that the catalog tells"]
        else:
            sizes = chunk_bytes(file, grid)
    except ValueError as error:
        return [str(error)]
    found = sizes.reshape(len(stored_bytes), -1).sum(axis=1).tolist()
    told = [found[number] if size is None else size for number, size in enumerate(stored_bytes)]
    return [] if found == told else ["the catalog's stored_bytes are not those of the file"]


def _check(shard_file: Location, encoded: bytes) -> None:
    if len(encoded) < 4 or google_crc32c.value(encoded[:-4]).to_bytes(4, "little") != encoded[-4:]:
        raise ValueError(f"{shard_file} is damaged: the checksum of a chunk does not agree")
