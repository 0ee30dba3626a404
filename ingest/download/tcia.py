"""Collections of The Cancer Imaging Archive, series by series, in the folders its own retriever makes.

    metadata.csv                                        one row a series, the retriever's columns
    <collection>/<patient>/<study>/<series>/*.dcm

A study is named `date-study id-description-last five digits of its UID`, a series `number-description-last five
digits`; NA stands for what is missing, and only letters, digits, blanks, dots and dashes are kept.

The archive's REST interface serves one zip a series, with an md5 of every image, and cannot send parts of it.
"""

from __future__ import annotations

import csv
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catalog.errors import SetupError
from ingest.download.hosts import Hosts
from ingest.download.http import FileProgress, Http, Remote
from ingest.download.staging import Staging
from ingest.download.unpack import DamagedArchiveError

COLUMNS = (
    "Series UID",
    "Collection",
    "3rd Party Analysis",
    "Data Description URI",
    "Subject ID",
    "Study UID",
    "Study Description",
    "Study Date",
    "Series Description",
    "Manufacturer",
    "Modality",
    "SOP Class Name",
    "SOP Class UID",
    "Number of Images",
    "File Size",
    "File Location",
    "Download Timestamp",
)
"""Of metadata.csv."""

_HASHES = "md5hashes.csv"
_UID = re.compile(r"[0-9.]{1,64}")


def list_series(collection: str, modalities: Sequence[str], hosts: Hosts, http: Http) -> list[dict[str, Any]]:
    """What the archive says of the series of a public collection, by patient and UID.

    Args:
        modalities: only series of these, or all if there are none.

    Raises:
        SetupError: no answer, no such public collection, or none of the modalities in it.
    """
    answer = http.json(f"{hosts.nbia}/getSeries", {"Collection": collection, "format": "json"})
    if not isinstance(answer, list) or not answer:
        raise SetupError(f"{hosts.nbia} lists no series of {collection!r}: it may not be public any more.")
    for series in answer:
        if not isinstance(series, dict) or not _UID.fullmatch(str(series.get("SeriesInstanceUID", ""))):
            raise SetupError(f"{hosts.nbia} describes a series of {collection!r} without its UID.")
    wanted = [one for one in answer if not modalities or one.get("Modality") in modalities]
    if not wanted:
        raise SetupError(
            f"{hosts.nbia} lists no series of {collection!r} with modality {' or '.join(modalities)}."
        )
    return sorted(wanted, key=lambda series: (str(series.get("PatientID")), series["SeriesInstanceUID"]))


def series_bytes(series: Mapping[str, Any]) -> int:
    """Size of the images of a series, as the archive tells it."""
    return int(series.get("FileSize") or 0)


def fetch_series(
    series: Mapping[str, Any],
    staging: Staging,
    hosts: Hosts,
    http: Http,
    limit: int,
    progress: FileProgress,
) -> None:
    """Bring one series into the tree, unless it is there.

    Raises:
        DamagedArchiveError: an image is missing or is not what its md5 says.
        SetupError, OSError: as `Http.fetch` and `unpack`.
    """
    uid = series["SeriesInstanceUID"]
    if staging.note(uid) is not None:
        return
    remote = Remote(f"{uid}.zip", f"{hosts.nbia}/getImageWithMD5Hash", params={"SeriesInstanceUID": uid})
    archive = staging.archives / remote.name
    http.fetch(remote, archive, progress)
    with staging.unpacked(archive, limit) as folder:
        images = _checked_images(folder, archive, series)
        row = _row(series, images)
        staging.move_in(folder, row["File Location"].removeprefix("./"))
    staging.finish(uid, row)
    archive.unlink()


def write_metadata(series: list[dict[str, Any]], staging: Staging) -> None:
    """Write metadata.csv into the tree."""
    with (staging.tree / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(staging.note(item["SeriesInstanceUID"]) for item in series)


def _checked_images(folder: Path, archive: Path, series: Mapping[str, Any]) -> list[Path]:
    """Hold images against their md5, and leave nothing but images in the folder."""
    hashes = folder / _HASHES
    if not hashes.is_file():
        raise DamagedArchiveError(f"{archive}: has no {_HASHES}. Repeat the command.")
    with hashes.open(encoding="utf-8", newline="") as file:
        rows = [row for row in list(csv.reader(file))[1:] if len(row) > 1]
    published = {Path(row[0]).name: row[1].strip().lower() for row in rows}
    images = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        if path.name not in published:  # the licence, the hashes
            path.unlink()
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != published[path.name]:
                raise DamagedArchiveError(
                    f"{archive}: {path.name} is not what its md5 says. Repeat the command."
                )
        images.append(path)
    announced = int(series.get("ImageCount") or len(published))
    if not images or len(images) != len(published) or len(images) < announced:
        raise DamagedArchiveError(
            f"{archive}: {len(images)} images came, {max(len(published), announced)} are announced. "
            "Repeat the command."
        )
    return images


def _row(series: Mapping[str, Any], images: list[Path]) -> dict[str, Any]:
    """The row of metadata.csv. The headers tell what the interface does not: study id, number and SOP class."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    uid = series["SeriesInstanceUID"]
    try:
        header = pydicom.dcmread(images[0], stop_before_pixels=True)
    except InvalidDicomError as error:
        raise SetupError(f"{images[0].name} of series {uid} is no DICOM file.") from error
    study_uid = str(series.get("StudyInstanceUID") or header.get("StudyInstanceUID", ""))
    described = _kept(series.get("StudyDesc") or header.get("StudyDescription"))
    series_described = _kept(series.get("SeriesDescription") or header.get("SeriesDescription"))
    date = str(header.get("StudyDate") or "")
    date = f"{date[4:6]}-{date[6:8]}-{date[:4]}" if len(date) == 8 else "NA"
    number = series.get("SeriesNumber") or header.get("SeriesNumber") or 0
    folders = (
        _kept(series.get("Collection")),
        _kept(series.get("PatientID") or header.get("PatientID"), more="_"),
        f"{date}-{_kept(header.get('StudyID'))}-{described}-{study_uid[-5:]}",
        f"{float(number):.6f}-{series_described}-{uid[-5:]}",
    )
    sop_class = header.get("SOPClassUID")
    return {
        "Series UID": uid,
        "Collection": series.get("Collection", ""),
        "3rd Party Analysis": series.get("ThirdPartyAnalysis", ""),
        "Data Description URI": series.get("CollectionURI", ""),
        "Subject ID": series.get("PatientID", ""),
        "Study UID": study_uid,
        "Study Description": described,
        "Study Date": date,
        "Series Description": series_described,
        "Manufacturer": series.get("Manufacturer", ""),
        "Modality": series.get("Modality") or str(header.get("Modality", "")),
        "SOP Class Name": sop_class.name if sop_class is not None else "",
        "SOP Class UID": str(sop_class or ""),
        "Number of Images": len(images),
        "File Size": f"{sum(path.stat().st_size for path in images) / 1e6:.2f} MB",
        "File Location": "./" + "/".join(folders),
        "Download Timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
    }


def _kept(value: Any, more: str = "") -> str:
    """A part of a folder's name; never empty, never `..`."""
    text = re.sub(rf"[^A-Za-z0-9 .{more}-]", "", str(value or "")).strip(" .")
    return text or "NA"
