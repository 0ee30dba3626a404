"""One box of an image stored in a folder: only the inner chunks it touches are read and decoded."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from shards.check import metadata_forms
from shards.layout import METADATA_FILE, Shape, array_chunk, array_metadata, refuse_newer_layout

_log = logging.getLogger(__name__)

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(start, stop) along depth, height and width, in voxels."""

Opened: TypeAlias = "Callable[[tuple[slice, ...], npt.NDArray[Any]], Callable[[], object]]"
"""Starts to read a box of an open array into another one, and returns what waits for it."""

_CONTEXT: dict[str, Any] = {
    # Decoded chunks kept in memory made random crops slower, and each worker would hold its own.
    "cache_pool": {"total_bytes_limit": 0},
    # Parallelism comes from worker processes; more threads in each would only compete.
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 4},
}
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

    def __init__(self, shards_root: Path, open_limit: int = 128) -> None:
        self._root = shards_root
        self._open_limit = open_limit
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, int]]:
        return type(self), (self._root, self._open_limit)

    def read(
        self, path: str, shape: Shape, dtype: npt.DTypeLike, index: int | None, box: Box
    ) -> npt.NDArray[Any]:
        """Return the voxels of a box as a new C-contiguous array (C, d, h, w) of `dtype`.

        `path`, `shape`, `dtype` and `index` are the catalog's shard_path, shard_shape, stored_dtype and
        shard_index. `index` is None for a volume (C, D, H, W); in a pack (N, C, H, W) it names the image,
        whose depth is 1.

        Only the shard's index and the chunks that the box touches are read. Raises SetupError if these are
        missing, damaged, not what the catalog says or of a later version, OSError if the operating system
        refuses to read them, ValueError if the box or the index lies outside the array, RuntimeError after a
        fork.
        """
        channels = shape[0] if index is None else shape[1]
        voxels = np.empty((channels, *(max(stop - start, 0) for start, stop in box)), dtype)
        self.begin(path, shape, dtype, index, box, voxels)()
        return voxels

    def begin(
        self,
        path: str,
        shape: Shape,
        dtype: npt.DTypeLike,
        index: int | None,
        box: Box,
        into: npt.NDArray[Any],
    ) -> Callable[[], None]:
        """Start to read a box into an array (C, d, h, w) of `dtype`; the call of what is returned waits for it.

        While one box is decoded, those begun after it are read. The arguments and errors are those of `read`;
        what concerns the array as a whole is raised at once, what concerns its voxels by the call.
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
        folder, is_pack = self._root / path, index is not None
        with _explained(folder, shape, dtype, is_pack):
            begin = self._open(path, tuple(shape), np.dtype(dtype).name, is_pack)
            finish = begin(where, into.transpose(1, 0, 2, 3) if is_pack else into)

        def wait() -> None:
            with _explained(folder, shape, dtype, is_pack):
                finish()

        return wait

    @property
    def _open(self) -> Callable[[str, Shape, str, bool], Opened]:
        """`_open_array`, which remembers what this thread opened last."""
        opened: Callable[[str, Shape, str, bool], Opened] | None = getattr(self._of_thread, "open", None)
        if opened is None:
            opened = functools.lru_cache(maxsize=self._open_limit)(self._open_array)
            self._of_thread.open = opened
        return opened

    def _open_array(self, path: str, shape: Shape, dtype: str, is_pack: bool) -> Opened:
        """What reads boxes of an array. Its metadata follow from the catalog: `zarr.json` is not looked at."""
        folder = self._root / path
        if not _has_tensorstore():
            from shards.fallback import open_with_zarr

            return open_with_zarr(folder, shape, dtype, is_pack=is_pack)
        import tensorstore  # 50 ms that a listing of the catalog need not pay

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "open": True,
            # What blosc wrote tells how it did, so whatever profile is named here.
            "metadata": array_metadata(shape, dtype, array_chunk(shape, is_pack=is_pack), "fast"),
            "assume_metadata": True,
            # Every chunk is stored, so a missing one is damage and not background.
            "fill_missing_data_reads": False,
        }
        array = tensorstore.open(spec, context=context()).result()

        def begin(where: tuple[slice, ...], into: npt.NDArray[Any]) -> Callable[[], object]:
            # Decoded straight to where it belongs: what its own `read` returns would have to be copied.
            wait: Callable[[], object] = tensorstore.array(into, context=context()).write(array[where]).result
            return wait

        return begin


def context() -> Any:
    """The limits of memory and threads of all that one thread reads: shared, threads would take turns."""
    import tensorstore

    if not hasattr(_thread, "context"):
        _thread.context = tensorstore.Context(_CONTEXT)
    return _thread.context


@contextlib.contextmanager
def _explained(folder: Path, shape: Shape, dtype: npt.DTypeLike, is_pack: bool) -> Iterator[None]:
    """What a library says of an array, as an error that says what to do."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).split(" [", 1)[0]  # the rest repeats the whole specification
        outer = system_error(error, folder) if isinstance(error, ValueError) else None
        raise outer or _explanation(folder, shape, dtype, is_pack, reason) from error


def system_error(error: ValueError, path: Path) -> OSError | None:
    """The OSError that TensorStore hides in the text of a ValueError, if there is one: disk full, say."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def _explanation(folder: Path, shape: Shape, dtype: npt.DTypeLike, is_pack: bool, reason: str) -> SetupError:
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
