"""Download of one dataset: list, fetch, unpack, and show it only when it is whole."""

from __future__ import annotations

import errno
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from catalog.errors import SetupError
from ingest.access import Download
from ingest.discover import existing_roots
from ingest.download.hosts import Hosts, list_files
from ingest.download.http import FileProgress, Http, Remote
from ingest.download.staging import RECORD, Staging
from ingest.download.tcia import fetch_series, list_series, series_bytes, write_metadata
from ingest.download.unpack import is_archive
from ingest.found import find_sources
from ingest.spec import DatasetSpec

_FREE_LICENCES = re.compile(r"(CC0|CC BY|CC BY-SA|PDDL|ODC-BY)( \d\.\d)?", re.IGNORECASE)
_EXPANSION = 20
"""By which images may grow out of an archive where nobody tells their size: NIfTI without compression, and far
more for label maps, which are a small part."""
_SMALL_ARCHIVE = 1 << 26
"""Bytes that may come out of any archive."""
_HOSTS, _HTTP = Hosts(), Http()

Progress = Callable[[int, int | None], None]
"""Called with (bytes of the dataset that are here, bytes that it has or None)."""


@dataclass(frozen=True)
class DownloadReport:
    """How a call ended for one dataset."""

    dataset: str
    state: Literal["downloaded", "complete", "foreign"]
    """`complete`: an earlier call did it. `foreign`: the folder is there, but not from us."""
    folder: Path
    images: int | None = None
    """Files or series that ingest will find; None where the layout is not as the entry says."""
    problem: str | None = None
    """What discovery says of the layout, where it is not as the entry says."""


def needs_consent(licence: str | None) -> bool:
    """Whether a licence restricts what the data may be used for, or is not known: then the user is asked."""
    return licence is None or _FREE_LICENCES.fullmatch(licence) is None


def existing_download(spec: DatasetSpec, raw: Path) -> DownloadReport | None:
    """What is on disk of a dataset, if it has a folder that is not empty."""
    for root in existing_roots(spec, raw) if raw.is_dir() else []:
        if (root / RECORD).exists():
            return DownloadReport(spec.id, "complete", root)
        if any(root.iterdir()):
            return DownloadReport(spec.id, "foreign", root)
    return None


def download_dataset(
    spec: DatasetSpec,
    raw: Path,
    progress: Progress,
    *,
    keep_archives: bool = False,
    hosts: Hosts = _HOSTS,
    http: Http = _HTTP,
) -> DownloadReport:
    """Fetch and unpack a dataset into `<raw>/<folder>`, which appears only when everything is there.

    What a call that failed or was killed has brought stays in `<raw>/.pumit-download/`; the next one goes on.

    Args:
        keep_archives: keep the archives in `<raw>/archives/<id>/`.

    Raises:
        SetupError: the entry has no `download`, the host refuses or changed its files, a checksum is wrong, an
            archive is damaged or hostile, or the disk is full. Nothing that looks like the dataset is left.
    """
    if spec.download is None:
        raise SetupError(f"{spec.id}: has no open download.")
    if (existing := existing_download(spec, raw)) is not None:
        return existing
    staging = Staging(raw, spec.id)
    call = _Call(spec, spec.download, staging, hosts, http, progress, keep_archives)
    with _explained(spec, raw), staging.lock():
        if (existing := existing_download(spec, raw)) is not None:  # another call has just ended
            staging.remove()
            return existing
        target = next(iter(existing_roots(spec, raw)), raw / spec.folder)  # an empty folder is used
        recipe = spec.download.model_dump(mode="json", exclude_defaults=True)
        staging.begin(recipe)
        files = _fetch_collection(call, spec.download.tcia) if spec.download.tcia else _fetch_files(call)
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        staging.publish(target, {"dataset": spec.id, "finished": finished, "download": recipe, "files": files})
        if keep_archives and staging.archives.exists():
            (raw / "archives").mkdir(exist_ok=True)
            staging.archives.replace(raw / "archives" / spec.id)
        staging.remove()
    try:
        images = len(find_sources(spec, target))
    except SetupError as problem:
        return DownloadReport(spec.id, "downloaded", target, problem=str(problem))
    return DownloadReport(spec.id, "downloaded", target, images)


@dataclass(frozen=True)
class _Call:
    """What all steps of one download share."""

    spec: DatasetSpec
    download: Download
    staging: Staging
    hosts: Hosts
    http: Http
    progress: Progress
    keep_archives: bool


def _fetch_files(call: _Call) -> list[dict[str, Any]]:
    """One file after the other, each unpacked before the next comes, so that archives do not pile up."""
    staging = call.staging
    files = list_files(call.download, call.hosts, call.http)
    missing = [file for file in files if staging.note(file.name) is None]
    _check_space(call, files, missing)
    sizes = [file.size for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    here = 0
    for file in files:
        if file in missing:
            _fetch_file(call, file, _adding(call.progress, here, total))
        here += int(staging.note(file.name)["size"])
    return [{"name": file.name, "url": file.url, **staging.note(file.name)} for file in files]


def _fetch_file(call: _Call, file: Remote, progress: FileProgress) -> None:
    staging = call.staging
    arrived = staging.archives / file.name
    call.http.fetch(file, arrived, progress)
    size = arrived.stat().st_size
    if file.unpack and is_archive(file.name):
        limit = _unpack_limit(call.spec, size)
        with staging.unpacked(arrived, limit, call.download.members) as folder:
            staging.move_in(folder, file.into)
    else:
        staging.move_in(arrived, file.into)
    staging.finish(file.name, {"size": size, "checksum": ":".join(file.checksum or ())})
    if not call.keep_archives:
        arrived.unlink(missing_ok=True)


def _fetch_collection(call: _Call, collection: str) -> list[dict[str, Any]]:
    series = list_series(collection, call.download.modalities, call.hosts, call.http)
    missing = [item for item in series if call.staging.note(item["SeriesInstanceUID"]) is None]
    sizes = [series_bytes(item) for item in missing]
    _check_free(call, sum(sizes) + max(sizes, default=0))
    total = sum(map(series_bytes, series)) or None
    here = 0
    for item in series:
        limit = _unpack_limit(call.spec, 2 * series_bytes(item))
        fetch_series(item, call.staging, call.hosts, call.http, limit, _adding(call.progress, here, total))
        here += series_bytes(item)
    write_metadata(series, call.staging)
    return [{"name": item["SeriesInstanceUID"], "size": series_bytes(item)} for item in series]


def _adding(progress: Progress, here: int, total: int | None) -> FileProgress:
    def added(done: int, size: int | None) -> None:
        progress(here + done, total)

    return added


def _unpack_limit(spec: DatasetSpec, archive: int) -> int:
    if spec.published.gigabytes is not None:
        return max(round(1.5e9 * spec.published.gigabytes), _SMALL_ARCHIVE)
    return max(_EXPANSION * archive, _SMALL_ARCHIVE)


def _check_space(call: _Call, files: list[Remote], missing: list[Remote]) -> None:
    """Held against what will surely be needed: archives take at least their own size again when unpacked."""
    unpacked = sum(file.size or 0 for file in missing)
    if call.spec.published.gigabytes is not None:
        unpacked = max(unpacked, round(1e9 * call.spec.published.gigabytes * len(missing) / len(files)))
    archives = [file.size or 0 for file in missing if file.unpack and is_archive(file.name)]
    arrived = sum(_arrived(call.staging.archives / file.name) for file in missing)
    kept = sum(archives) if call.keep_archives else max(archives, default=0)
    _check_free(call, unpacked + kept - arrived)


def _check_free(call: _Call, need: int) -> None:
    free = shutil.disk_usage(call.staging.root).free
    if need > free:
        raise SetupError(
            f"{call.spec.id}: needs at least {need / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free. Free "
            "some space or choose another folder with --raw."
        )


def _arrived(path: Path) -> int:
    part = path.with_name(f"{path.name}.part")
    return next((file.stat().st_size for file in (path, part) if file.exists()), 0)


@contextmanager
def _explained(spec: DatasetSpec, raw: Path) -> Iterator[None]:
    """Name the dataset, and turn a fault of the disk into one line that says what to do."""
    try:
        yield
    except SetupError as error:
        text = str(error)
        raise SetupError(text if text.startswith(f"{spec.id}: ") else f"{spec.id}: {text}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no space left in {raw}. Free some and repeat the command: it goes on where it stopped."
        else:
            where = error.filename or raw
            problem = f"cannot write {where}: {error.strerror or error}. Mend that and repeat the command."
        raise SetupError(f"{spec.id}: {problem}") from error
