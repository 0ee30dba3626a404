"""What a `download` entry stands for: the files that a host's interface lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from catalog.errors import SetupError
from ingest.access import Download
from ingest.download.http import Http, Remote


@dataclass(frozen=True)
class Hosts:
    """Addresses of the interfaces, without a slash at the end."""

    zenodo: str = "https://zenodo.org/api"
    figshare: str = "https://api.figshare.com/v2"
    nbia: str = "https://nbia.cancerimagingarchive.net/nbia-api/services/v4"
    s3: str = "https://{bucket}.s3.amazonaws.com"


def list_files(download: Download, hosts: Hosts, http: Http) -> list[Remote]:
    """All files of a download that is no TCIA collection, in the host's order.

    Raises:
        SetupError: the host does not answer, answers in another form, or has no such file; two files with one
            name.
    """
    if download.zenodo:
        found = [file for record in download.zenodo for file in _zenodo(record, hosts, http)]
    elif download.figshare:
        found = list(_figshare(download.figshare, hosts, http))
    elif download.s3:
        found = list(_s3(download.s3, download.into, hosts, http))
    else:
        found = [_offered(file) for file in download.files]
    wanted = [file for file in found if re.search(download.only or "", file.name, re.IGNORECASE)]
    if not wanted:
        unwanted = f", and none that `only` {download.only!r} wants" if found else ""
        raise SetupError(f"The host lists {len(found)} files{unwanted}.")
    names = [file.name for file in wanted]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SetupError(f"The host lists two files of the name {twice!r}. `only` may choose one of them.")
    return [
        Remote(file.name, file.url, file.size, file.checksum, file.into or download.into, file.unpack)
        for file in wanted
    ]


def _zenodo(record: int, hosts: Hosts, http: Http) -> Iterator[Remote]:
    address = f"{hosts.zenodo}/records/{record}"
    for file in _items(address, http.json(address), "files"):
        name, checksum = str(file["key"]), str(file.get("checksum", ""))
        algorithm, _, digest = checksum.partition(":")
        yield Remote(
            _checked_name(name, address),
            f"{address}/files/{quote(name)}/content",
            int(file["size"]),
            (algorithm, digest) if algorithm in ("md5", "sha256") and digest else None,
        )


def _figshare(article: int, hosts: Hosts, http: Http) -> Iterator[Remote]:
    address = f"{hosts.figshare}/articles/{article}/files"
    for page in range(1, 1000):
        files = _items(address, http.json(address, {"page": str(page), "page_size": "100"}))
        for file in files:
            md5 = file.get("supplied_md5") or file.get("computed_md5")
            yield Remote(
                _checked_name(str(file["name"]), address),
                str(file["download_url"]),
                int(file["size"]),
                ("md5", str(md5)) if md5 else None,
            )
        if len(files) < 100:
            return


def _s3(place: str, into: str | None, hosts: Hosts, http: Http) -> Iterator[Remote]:
    """Objects below a prefix; each keeps its whole key as its path below `into`."""
    bucket, _, prefix = place.partition("/")
    address = hosts.s3.format(bucket=bucket)
    query = {"list-type": "2", "prefix": prefix}
    while True:
        try:
            listing = ElementTree.fromstring(http.text(f"{address}/", query))  # noqa: S314 (expat bounds entities)
        except ElementTree.ParseError as error:
            raise SetupError(f"{address}: the list of files cannot be read: {error}.") from error
        fields = {node.tag.rpartition("}")[2]: node.text or "" for node in listing}
        for node in listing.iterfind("{*}Contents"):
            key, size = node.findtext("{*}Key") or "", node.findtext("{*}Size") or ""
            if not key.endswith("/"):
                folder, _, _ = _checked_name(key, address).rpartition("/")
                below = "/".join(filter(None, (into, folder)))
                yield Remote(key, f"{address}/{quote(key)}", int(size), into=below or None)
        if fields.get("IsTruncated") != "true":
            return
        query["continuation-token"] = fields["NextContinuationToken"]


def _offered(file: Any) -> Remote:
    name = file.name or unquote(PurePosixPath(urlsplit(file.url).path).name)
    checksum = ("sha256", file.sha256) if file.sha256 else ("md5", file.md5) if file.md5 else None
    return Remote(_checked_name(name, file.url), file.url, file.size, checksum, file.into, file.unpack)


def _items(address: str, answer: Any, field: str | None = None) -> list[dict[str, Any]]:
    items = answer.get(field) if field is not None and isinstance(answer, dict) else answer
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SetupError(
            f"{address} lists no files: its interface may have changed, or the files are restricted."
        )
    return items


def _checked_name(name: str, address: str) -> str:
    """A server's word for a path is not trusted."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or "\\" in name:
        raise SetupError(f"{address} lists a file of the name {name!r}, which is none.")
    return name
