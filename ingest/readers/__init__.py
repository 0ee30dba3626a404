"""From the files of one `ImageSource` to its volumes: one module per format, loaded only when it is needed.

Every message starts with `dataset/key (path)`, the path exactly as `source.public_path` holds it, and carries
neither an absolute path nor a name below it, nor text from inside a file: library errors may quote patient
data, so only their type is told.
"""

from __future__ import annotations

import errno
import importlib
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.volume import Volume

MAX_VOXELS = 2**33
"""Largest number of voxels of one volume that a header may announce: 16 GiB of 16-bit voxels, some ten times
the largest clinical scans. Beyond it a corrupt or hostile header is the likelier explanation."""
MAX_IMAGES = 2**15
"""Largest number of images that one file may announce; each costs a row, however small it is."""
MAX_REST = 64 << 20
"""Bytes that may precede the voxels of a file, or follow them; what is beyond is not read to its end."""
_MAX_EXPANSION = 200
"""How many times its size a compressed file may inflate to. Scans reach 50; zeros reach 1000."""
_ALWAYS_INFLATED = 1 << 30  # bytes


def read_volumes(source: ImageSource) -> Iterator[Volume | ExcludedImage]:
    """Yield the volumes of one source, reading as few at a time as its format allows.

    `Volume.index` and `Volume.count` say which of how many a volume is; an `ExcludedImage` that is yielded
    stands for the volume at its place in the sequence. A source of a single volume never yields one: its
    problem is raised. A stream that breaks (a truncated 4-D file) may do so after some volumes were yielded;
    the raise then speaks for the whole source.

    Raises:
        ExcludedImage: a rule leaves the whole source out.
        FailedImage: the source cannot be read (`unreadable`, `no_permission`, `vanished`, `too_large`), or
            leads outside its dataset's folder (`outside_root`).
    """
    read: Callable[[ImageSource], Iterator[Volume | ExcludedImage]]
    read = importlib.import_module(f"ingest.readers.{source.format}").read
    yield from read(source)


def name(source: ImageSource) -> str:
    """How messages call a source."""
    return f"{source.dataset}/{source.key} ({source.public_path})"


def inside_root(source: ImageSource, path: Path) -> Path:
    """The real path behind `path`, once it is known to lie in the dataset's folder.

    Raises:
        FailedImage: `outside_root` if a link or `..` leads elsewhere; `not_a_file` for what would block or
            never end when it is read, and for a folder where the format has none; `vanished`, `no_permission`.
    """
    with reading(source):
        try:
            root, target = source.root.resolve(strict=True), path.resolve(strict=True)
        except (RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ELOOP:
                raise
            raise _not_a_file(source, "a link that leads back to itself") from None
        mode = target.stat().st_mode
    if not target.is_relative_to(root):
        raise FailedImage(
            "outside_root",
            f"{name(source)}: a link or '..' leads outside the dataset's folder. Copy the file into it.",
        )
    if stat.S_ISDIR(mode):
        if source.format != "dicom":
            raise _not_a_file(source, "a folder")
    elif not stat.S_ISREG(mode):
        raise _not_a_file(source, "a pipe, a socket or a device")
    return target


def _not_a_file(source: ImageSource, what: str) -> FailedImage:
    return FailedImage(
        "not_a_file",
        f"{name(source)}: {what}, not a file. Move it away, or extend `ignore` in datasets.yaml.",
    )


def check_size(source: ImageSource, voxels: int) -> None:
    """Refuse a volume of more than `MAX_VOXELS` before any memory is asked for.

    Raises:
        FailedImage: `too_large`.
    """
    if voxels > MAX_VOXELS:
        raise FailedImage(
            "too_large",
            f"{name(source)}: the header announces {voxels} voxels, the limit is {MAX_VOXELS}. "
            "Check whether the file is whole; if it is, split or crop it.",
        )


def check_count(source: ImageSource, images: int) -> None:
    """Refuse a file of more than `MAX_IMAGES` volumes or frames before any of them is looked at.

    Raises:
        FailedImage: `too_large`.
    """
    if images > MAX_IMAGES:
        raise FailedImage(
            "too_large",
            f"{name(source)}: the header announces {images} images, the limit is {MAX_IMAGES}. "
            "Check whether the file is whole; if it is, split it.",
        )


def check_inflated(source: ImageSource, inflated: int, stored: int) -> None:
    """Refuse a decompression bomb: `stored` bytes that stand for many more than scans are ever compressed to.

    Raises:
        FailedImage: `too_large`.
    """
    if inflated > max(_ALWAYS_INFLATED, _MAX_EXPANSION * stored):
        raise FailedImage(
            "too_large",
            f"{name(source)}: {stored} compressed bytes stand for {inflated} or more, as no scan does. "
            "Check whether the file is whole; if it is, store it uncompressed.",
        )


@contextmanager
def reading(source: ImageSource, part: str = "") -> Iterator[None]:
    """Turn what opening, decoding and parsing may raise into the outcome of the image; `part` says where.

    It wraps calls into libraries and the file system only. Decoders meet hostile bytes and raise errors of
    any type, hence the broad clause; the chain is cut because their text may quote the file.
    """
    where = f"{name(source)}{part}"
    try:
        yield
    except (ExcludedImage, FailedImage):
        raise
    except PermissionError:
        raise FailedImage(
            "no_permission",
            f"{where}: the process may not read it. Check owner and mode of file and folders.",
        ) from None
    except FileNotFoundError:
        raise FailedImage(
            "vanished",
            f"{where}: gone since the dataset was listed, or a dangling link. Restore it, rerun.",
        ) from None
    except MemoryError:
        raise FailedImage(
            "too_large",
            f"{where}: memory does not hold one volume. Use fewer workers or a larger machine.",
        ) from None
    except Exception as error:
        raise FailedImage(
            "unreadable",
            f"{where}: truncated, damaged or of another format ({type(error).__name__}). "
            "Compare its checksum with the publisher's, or download it again.",
        ) from None
