"""One unit of work of an ingest: some volume files or series, or the 2-D sources of one pack.

A task runs in a worker process and is complete when its record lies in the journal. It can run twice: arrays
are named by their content, and the record is replaced by an equal one.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from catalog.corpus import Corpus
from catalog.store import RemotePath
from ingest.journal import Journal, Stamp
from ingest.overrides import REASON, declared_hash, from_text
from ingest.readers import name
from ingest.reasons import ExcludedImage, FailedImage, full_message
from ingest.source import ImageSource, shared_weight

if TYPE_CHECKING:
    from ingest.image import Normalised
    from ingest.volume import Volume
    from shards.layout import Profile

_SIZE_BUCKET = 128
"""2-D images share a pack when their sides round up to the same multiple: little padding, few packs."""


Outcomes = Counter[tuple[str, str]]
"""Number of images by (status, reason)."""


class Place(NamedTuple):
    """What tells a source from others of its kind."""

    path: str
    key: str
    subject: str
    kind: int
    """Index of the source that has all the rest."""
    alias: str | None = None
    """As of the source."""
    sharing: int = 1
    """Number of files that share the weight."""
    copy_of: str | None = None
    """Name of the file that has the same bytes, and is kept."""
    override: str | None = None
    """What the user's overrides.yaml says of it, as `ingest.overrides.as_text` has it."""

    def source(self, kind: ImageSource, root: Path) -> ImageSource:
        """The source at this place."""
        weight = kind.weight * shared_weight(self.sharing)
        exclude = kind.exclude
        if self.copy_of is not None:
            exclude = ("duplicate", f"it has the same bytes as {self.copy_of}, which is kept.")
        return replace(
            kind,
            root=root,
            path=self.path,
            key=self.key,
            subject=self.subject,
            alias=self.alias,
            weight=weight,
            overrides=from_text(self.override),
            exclude=exclude,
        )


@dataclass(frozen=True)
class IngestTask:
    """What a worker needs: paths and rules, no voxels."""

    name: str
    run: str
    """The run of the journal it belongs to."""
    dataset: str
    corpus: Corpus
    root: Path
    """Folder of the dataset."""
    kinds: tuple[ImageSource, ...]
    places: tuple[Place, ...]
    """Together the sources: what they share, once, and what tells them apart."""
    validation_subjects: frozenset[str]
    """Held-out subjects among those of `sources`."""
    entry_hash: str
    origin: RemotePath | None = None
    """Where the images lie, if the folder of `sources` only outlines them."""
    stamps: Mapping[str, Stamp] | None = None
    """By public path, as the outline tells them, which a worker may not see; None where there is none."""
    profile: Profile = "fast"
    """Codec of the arrays."""
    lossless: bool = False
    """Keep true floats as they are."""

    @property
    def sources(self) -> list[ImageSource]:
        return [place.source(self.kinds[place.kind], self.root) for place in self.places]

    @property
    def is_pack(self) -> bool:
        return self.kinds[0].dimension == 2


@dataclass(frozen=True)
class TaskResult:
    """What a task tells the driver; its rows are in the journal."""

    outcomes: Outcomes
    unfit: list[tuple[str, str, str]]
    """Key, status and reason of each image that was not ingested."""
    source_bytes: int
    stored_bytes: int
    record: Record | None = None
    """What the driver is to put into the journal, of a corpus in a store; else the worker has done so."""


class Record(NamedTuple):
    """The outcome of a task, as `Journal.record` takes it."""

    rows: list[dict[str, Any]]
    stamps: Mapping[str, Stamp]


class UnseenFolderError(OSError):
    """The folder of the raw images is not there: this machine has it elsewhere, or not at all."""


def run_task(task: IngestTask) -> TaskResult:
    """Ingest the sources of one task and record the outcome.

    Where the corpus is in a store, arrays go there, and the outcome goes back to the driver: nothing but the
    store, and the raw images, need be in reach of the worker.

    An image that cannot be read or used becomes a row with its reason. Raises OSError only when the corpus
    cannot be written (no space, no permission, or RunEndedError: the driver of the task is gone), and
    UnseenFolderError.
    """
    use_one_thread()
    with _taking_part(task):
        if task.origin is None and not task.root.is_dir():
            raise UnseenFolderError(errno.ENOENT, "there is no such folder", str(task.root))
        stamps = _stamps(task)
        try:
            rows = list(_pack_rows(task) if task.is_pack else _volume_rows(task))
        except OSError:
            raise
        except Exception as error:  # a fault on the way from image to shard must not end the run
            rows = [_failed_row(source, _failure(source, error)) for source in task.sources]
        return _record(task, rows, stamps)


@contextmanager
def _taking_part(task: IngestTask) -> Iterator[None]:
    """As `Journal.taking_part`. A store needs none: what a worker still writes there when its run has ended is
    an array without a row, and harmless."""
    if task.corpus.origin is not None:
        yield
        return
    with Journal(task.corpus, task.dataset).taking_part(task.run):
        yield


def _check_open(task: IngestTask) -> None:
    if task.corpus.origin is None:
        Journal(task.corpus, task.dataset).check_open(task.run)


def _stamps(task: IngestTask) -> Mapping[str, Stamp]:
    if task.stamps is not None:
        return task.stamps
    return {source.public_path: Stamp.if_any(source.file) for source in task.sources}


def halves(task: IngestTask) -> tuple[IngestTask, IngestTask]:
    """A task as two, to find the image that kills its workers."""
    middle = len(task.places) // 2
    return (
        replace(task, name=f"{task.name}a", places=task.places[:middle]),
        replace(task, name=f"{task.name}b", places=task.places[middle:]),
    )


def record_lost_task(task: IngestTask) -> TaskResult:
    """Record that a task's workers died, so that none of its images is without a row."""
    rows = [
        _failed_row(
            source,
            FailedImage(
                "worker_lost",
                f"{name(source)}: every worker process that read it died, most "
                "likely for lack of memory. Try again with fewer --workers.",
            ),
        )
        for source in task.sources
    ]
    return _record(task, rows, _stamps(task))


def _record(task: IngestTask, rows: list[dict[str, Any]], stamps: Mapping[str, Stamp]) -> TaskResult:
    declared = {
        place.alias or place.path: declared_hash(task.entry_hash, place.override) for place in task.places
    }
    complete = [
        row
        | {
            "entry_hash": declared[row["source_path"]],
            "split": "validation" if row["subject"] in task.validation_subjects else "train",
        }
        for row in rows
    ]
    is_far = task.corpus.origin is not None
    if not is_far:
        Journal(task.corpus, task.dataset).record(task.run, task.name, complete, stamps)
    return TaskResult(
        outcomes=Counter((row["status"], row["reason"] or "") for row in complete),
        unfit=[(row["key"], row["status"], row["reason"]) for row in complete if row["status"] != "ingested"],
        source_bytes=sum(max(stamp.size, 0) for stamp in stamps.values()),
        stored_bytes=sum(row.get("stored_bytes") or 0 for row in complete),
        record=Record(complete, stamps) if is_far else None,
    )


@functools.cache
def use_one_thread() -> None:
    """Workers are the parallelism; threads inside them would only fight for the cores."""
    import cv2

    cv2.setNumThreads(1)


def images_of(source: ImageSource, *, lossless: bool = False) -> Iterator[Normalised | dict[str, Any]]:
    """Each image of a source, normalised; or, for an unfit one, its finished row.

    Raises FailedImage, perhaps after some images: it speaks for the whole source, and none of them is to be
    kept. The checksum of a compressed file, for one, is behind its last volume.
    """
    from ingest.image import excluded_row, normalise
    from ingest.readers import read_volumes

    def unfit(outcome: ExcludedImage, index: int | None, count: int, volume: Volume | None) -> dict[str, Any]:
        explained = ExcludedImage(outcome.reason, full_message(outcome))
        return excluded_row(source, explained, index, count, volume)

    try:
        if source.exclude is not None:
            reason, why = source.exclude
            raise ExcludedImage(reason, f"{name(source)}: {why}")
        if (overridden := _if_overridden(source, None)) is not None:
            raise overridden
        if source.failure is not None:
            reason, why = source.failure
            raise FailedImage(reason, f"{name(source)}: {why}")
        count = 2  # only one of several is yielded as excluded; a single one is raised
        for position, volume in enumerate(read_volumes(source)):
            if isinstance(volume, ExcludedImage):
                yield unfit(_if_overridden(source, position) or volume, position, count, None)
                continue
            try:
                if volume.count > 1 and (outcome := _if_overridden(source, volume.index)) is not None:
                    raise outcome
                yield normalise(volume, source, lossless=lossless)
            except ExcludedImage as outcome:
                yield unfit(outcome, volume.index, volume.count, volume)
    except ExcludedImage as outcome:
        yield unfit(outcome, None, 1, None)
    except Exception as error:
        # Not even an OSError gets out: outside of here it means that the corpus cannot be written.
        raise _failure(source, error) from None


def _if_overridden(source: ImageSource, index: int | None) -> ExcludedImage | None:
    """Set if the user leaves out a volume of the source, or, for null, the whole."""
    why = source.overridden(index)
    which = "" if index is None else f", volume {index}"
    return None if why is None else ExcludedImage(REASON, f"{name(source)}{which}: {why}")


def _fetched_images(task: IngestTask, source: ImageSource) -> Iterator[Normalised | dict[str, Any]]:
    """As `images_of`, wherever the files lie. Raises also StoreError."""
    from ingest.outline import at_hand

    with at_hand(source, task.origin) as local:
        yield from images_of(local, lossless=task.lossless)


def _failure(source: ImageSource, error: Exception) -> FailedImage:
    """The outcome of an image that met `error`. Its text may quote the file, so only its type is told."""
    if isinstance(error, FailedImage):
        return error
    where = name(source)
    if isinstance(error, MemoryError):
        return FailedImage("too_large", f"{where}: not enough memory. Use fewer --workers.")
    return FailedImage(
        "internal",
        f"{where}: {type(error).__name__} in this program. Please report it, with what kind of file it is.",
    )


def _failed_row(source: ImageSource, outcome: FailedImage) -> dict[str, Any]:
    from ingest.image import excluded_row

    return excluded_row(source, outcome, index=None, count=1, volume=None)


def _volume_rows(task: IngestTask) -> Iterator[dict[str, Any]]:
    for source in task.sources:
        try:
            yield from [
                image if isinstance(image, dict) else _write_volume(task, image)
                for image in _fetched_images(task, source)
            ]
        except OSError:
            raise
        except Exception as error:
            # Arrays already written have no row then, and are removed at the end of the run.
            yield _failed_row(source, _failure(source, error))


def _write_volume(task: IngestTask, image: Normalised) -> dict[str, Any]:
    from shards.layout import array_name
    from shards.write import write_volume

    _check_open(task)
    name = array_name(task.dataset, image.row["key"], _identity(task, [image.row]), task.profile)
    stored = write_volume(task.corpus.shards, name, image.voxels, task.profile)
    return image.row | {
        **image.beside(),
        "shard_path": stored.path,
        "shard_shape": list(stored.shape),
        "stored_bytes": stored.stored_bytes[0],
        "shard_sha256": stored.sha256,
    }


def _pack_rows(task: IngestTask) -> Iterator[dict[str, Any]]:
    from shards.layout import PACK_SIZE

    waiting: dict[tuple[Any, ...], list[Normalised]] = defaultdict(list)
    written: Counter[tuple[Any, ...]] = Counter()

    def flush(bucket: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
        images = waiting.pop(bucket)
        name = f"{task.name}-{'x'.join(map(str, bucket))}-{written[bucket]}"
        written[bucket] += 1
        yield from _write_pack(task, name, images)

    for source in task.sources:
        try:
            images = list(_fetched_images(task, source))  # whole, for only then it is known to be good
        except FailedImage as outcome:
            yield _failed_row(source, outcome)
            continue
        for image in images:
            if isinstance(image, dict):
                yield image
                continue
            channels, _, height, width = image.voxels.shape
            sides = (-(-side // _SIZE_BUCKET) * _SIZE_BUCKET for side in (height, width))
            bucket = (image.voxels.dtype.name, channels, *sides)
            waiting[bucket].append(image)
            if len(waiting[bucket]) == PACK_SIZE:
                yield from flush(bucket)
    for bucket in sorted(waiting):
        yield from flush(bucket)


def _write_pack(task: IngestTask, pack: str, images: list[Normalised]) -> Iterator[dict[str, Any]]:
    from shards.layout import array_name
    from shards.write import write_pack

    _check_open(task)
    identity = _identity(task, [image.row for image in images])
    name = array_name(task.dataset, pack, identity, task.profile)
    stored = write_pack(task.corpus.shards, name, [image.voxels for image in images], task.profile)
    for index, image in enumerate(images):
        yield image.row | {
            **image.beside(),
            "shard_path": stored.path,
            "shard_shape": list(stored.shape),
            "shard_index": index,
            "stored_bytes": stored.stored_bytes[index],
            "shard_sha256": stored.sha256,
        }


def _identity(task: IngestTask, rows: list[dict[str, Any]]) -> str:
    """Names an array by what went into it, so that a changed image never overwrites one in use."""
    digest = hashlib.sha256(task.entry_hash.encode())
    for row in rows:
        digest.update(f"\0{row['key']}\0{row['source_hash']}\0{row['normalisation_version']}".encode())
    return digest.hexdigest()


def task_name(path: str) -> str:
    """File-name-safe name of a task of 3-D sources; `path` is that of the first."""
    return "volume-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
