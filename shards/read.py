"""One box of one stored image: only the inner chunks it touches are read and decoded."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.store import (
    Location,
    RemotePath,
    store_error,
    tensorstore_context,
    tensorstore_kvstore,
)
from shards.check import metadata_forms
from shards.layout import METADATA_FILE, Shape, array_chunk, array_metadata, refuse_newer_layout

_log = logging.getLogger(__name__)

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(start, stop) along depth, height and width, in voxels."""

_Stored: TypeAlias = "Callable[[tuple[slice, ...]], npt.NDArray[Any]]"
"""Reads a box of an open array."""

_CONTEXT: dict[str, Any] = {
    # Decoded chunks kept in memory made random crops slower, and each worker would hold its own.
    "cache_pool": {"total_bytes_limit": 0},
    # Parallelism comes from worker processes; more threads in each would only compete.
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 4},
}
_REMOTE_CONTEXT: dict[str, Any] = {
    # Room for the indexes of the arrays in use: each read anew would be a request of its own.
    "cache_pool": {"total_bytes_limit": 32 << 20},
    "data_copy_concurrency": {"limit": 1},
    "s3_request_concurrency": {"limit": 16},
}
_DAMAGE = re.compile("NOT_FOUND|DATA_LOSS|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE")
"""How TensorStore begins what it says of an object that is there and wrong, or not there."""
_first_user: int | None = None
_thread = threading.local()


def refuse_fork() -> None:
    """Call before any use of TensorStore: its threads do not survive a fork, and it aborts the child.

    Raises RuntimeError in a process forked from one that has used TensorStore.
    """
    global _first_user
    if _first_user is None:
        _first_user = os.getpid()
    if _first_user != os.getpid():
        raise RuntimeError(
            f"shards were used in process {_first_user} before it forked process {os.getpid()}, and cannot be "
            "used in both. Start workers by 'spawn' or 'forkserver' "
            "(DataLoader(multiprocessing_context='spawn'))."
        )


class ShardReader:
    """Reads boxes of the arrays below `shards_root`. Cheap to make, to pickle and to send to a worker.

    Handles of the `open_limit` arrays used last stay open: about 0.2 MB of memory each, no file descriptor.
    Each thread has its own, so that none waits for another.
    """

    def __init__(self, shards_root: Location, open_limit: int = 128) -> None:
        self._root = shards_root
        self._open_limit = open_limit
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Location, int]]:
        return type(self), (self._root, self._open_limit)

    def read(
        self, path: str, shape: Shape, dtype: npt.DTypeLike, index: int | None, box: Box
    ) -> npt.NDArray[Any]:
        """Return the voxels of a box as a new C-contiguous array (C, d, h, w) of `dtype`.

        `path`, `shape`, `dtype` and `index` are the catalog's shard_path, shard_shape, stored_dtype and
        shard_index. `index` is None for a volume (C, D, H, W); in a pack (N, C, H, W) it names the image,
        whose depth is 1.

        Only the shard's index and the chunks that the box touches are read. Raises SetupError if these are
        missing, damaged, not what the catalog says or of a later version, OSError if the operating system, or
        StoreError if an object store, refuses to read them, ValueError if the box or the index lies outside the
        array, RuntimeError after a fork.
        """
        refuse_fork()
        depth, height, width = (slice(start, stop) for start, stop in box)
        if index is None:
            extent, where = shape[1:], (slice(None), depth, height, width)
        else:
            extent, where = (1, *shape[2:]), (slice(index, index + 1), slice(None), height, width)
        inside = all(0 <= start < stop <= size for (start, stop), size in zip(box, extent, strict=True))
        if not inside or not 0 <= (index or 0) < shape[0]:
            raise ValueError(f"{path}: box {box} of image {index} is not inside the array of shape {shape}")
        folder = self._root / path
        try:
            stored = self._open(path, tuple(shape), np.dtype(dtype).name, index is not None)
            voxels = stored(where)
        except (ValueError, FileNotFoundError) as error:
            reason = str(error).split(" [", 1)[0]  # the rest repeats the whole specification
            outer = _outer_error(error, folder) if isinstance(error, ValueError) else None
            raise outer or _explanation(folder, shape, dtype, index is not None, reason) from error
        return voxels if index is None else voxels.transpose(1, 0, 2, 3)

    @property
    def _open(self) -> Callable[[str, Shape, str, bool], _Stored]:
        """`_open_array`, which remembers what this thread opened last."""
        opened: Callable[[str, Shape, str, bool], _Stored] | None = getattr(self._of_thread, "open", None)
        if opened is None:
            opened = functools.lru_cache(maxsize=self._open_limit)(self._open_array)
            self._of_thread.open = opened
        return opened

    def _open_array(self, path: str, shape: Shape, dtype: str, is_pack: bool) -> _Stored:
        """What reads boxes of an array. Its metadata follow from the catalog: `zarr.json` is not looked at."""
        folder = self._root / path
        if not _has_tensorstore():
            from shards.fallback import open_with_zarr

            return open_with_zarr(folder, shape, dtype, is_pack=is_pack)
        import tensorstore  # 50 ms that a listing of the catalog need not pay

        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(folder),
            "open": True,
            # What blosc wrote tells how it did, so whatever profile is named here.
            "metadata": array_metadata(shape, dtype, array_chunk(shape, is_pack=is_pack), "fast"),
            "assume_metadata": True,
            # Every chunk is stored, so a missing one is damage and not background.
            "fill_missing_data_reads": False,
            # An array never changes under its name.
            **({"recheck_cached_data": False} if isinstance(folder, RemotePath) else {}),
        }
        array = tensorstore.open(spec, context=_context(folder)).result()

        def read(where: tuple[slice, ...]) -> npt.NDArray[Any]:
            voxels: npt.NDArray[Any] = array[where].read(order="C").result()
            return voxels

        return read


def _context(folder: Location) -> Any:
    return _remote_context() if isinstance(folder, RemotePath) else _local_context()


def _local_context() -> Any:
    """The limits of memory and threads of all that one thread reads: shared, threads would take turns."""
    import tensorstore

    if not hasattr(_thread, "context"):
        _thread.context = tensorstore.Context(_CONTEXT)
    return _thread.context


@functools.cache
def _remote_context() -> Any:
    """The limits that all of a process's reading from stores shares."""
    import tensorstore

    return tensorstore.Context(_REMOTE_CONTEXT | tensorstore_context())


def _kvstore(folder: Location) -> dict[str, Any]:
    if isinstance(folder, RemotePath):
        return tensorstore_kvstore(folder)
    return {"driver": "file", "path": str(folder)}


def _outer_error(error: ValueError, folder: Location) -> OSError | None:
    """What kept TensorStore from reading, if that is no fault of the array."""
    if isinstance(folder, RemotePath):
        return None if _DAMAGE.match(str(error)) else store_error(folder, str(error))
    return system_error(error, folder)


def system_error(error: ValueError, path: Location) -> OSError | None:
    """The OSError that TensorStore hides in the text of a ValueError, if there is one: disk full, say."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def _explanation(
    folder: Location, shape: Shape, dtype: npt.DTypeLike, is_pack: bool, reason: str
) -> SetupError:
    """Why an array could not be read, by what its `zarr.json` tells; `reason` is what the reader said."""
    kind = np.dtype(dtype).name
    again = f"`pumit-data ingest {folder.parent.name}` again, which writes it anew."
    if not folder.is_dir():
        return SetupError(
            f"cannot read the shard {folder}: it does not exist. If the dataset was repacked or ingested since "
            f"this process read the catalog, start anew (a training with --resume). Otherwise run {again}"
        )
    with contextlib.suppress(OSError):
        metadata = (folder / METADATA_FILE).read_bytes()
        refuse_newer_layout(folder, metadata)
        if metadata not in metadata_forms(tuple(shape), kind, array_chunk(shape, is_pack=is_pack)):
            reason = (
                f"its {METADATA_FILE} is not that of {kind} {tuple(shape)}, which the catalog says; {reason}"
            )
    return SetupError(f"cannot read the shard {folder}: {reason}. Delete that folder and run {again}")


@functools.cache
def _has_tensorstore() -> bool:
    """Whether TensorStore can be imported; says so once if it cannot."""
    try:
        import tensorstore  # noqa: F401
    except ImportError as error:
        _log.warning(
            "TensorStore cannot be imported (%s): zarr-python reads shards, several times slower", error
        )
        return False
    return True
