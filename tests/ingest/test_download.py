"""Downloads against a server on loopback that breaks off, lies, and vanishes."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import SetupError
from ingest.discover import dataset_root
from ingest.download.hosts import Hosts
from ingest.download.http import Http, Remote
from ingest.download.run import DownloadReport, download_dataset, needs_consent
from ingest.download.unpack import unpack
from ingest.found import find_sources
from ingest.spec import DatasetSpec, own_file
from tests.commands import command, run
from tests.web import Web, serve

IMPATIENT = Http(tries=3, backoff=0.01, timeout=5)
LARGE = random.Random(1).randbytes(3_000_000)
CHUNK = 1 << 16
"""What a broken connection may cost."""
ENTRY: dict[str, Any] = {
    "id": "thing",
    "title": "Things",
    "folder": "Thing",
    "images": [
        {
            "globs": ["images/*.png"],
            "format": "raster",
            "dimension": 2,
            "path": r"images/(?P<name>.+)\.png",
            "key": "{name}",
            "modality": "XR",
        }
    ],
    "licence": "CC BY 4.0",
}


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as served:
        yield served


def silent(done: int, total: int | None) -> None:
    return


def entry(**download: Any) -> DatasetSpec:
    return DatasetSpec.model_validate(ENTRY | {"download": download})


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def download(spec: DatasetSpec, raw: Path, hosts: Hosts | None = None, **options: Any) -> DownloadReport:
    raw.mkdir(exist_ok=True)
    return download_dataset(spec, raw, silent, hosts=hosts or Hosts(), http=IMPATIENT, **options)


def start_of(asked: str | None) -> int:
    """The first byte of a range that was asked for; 0 where the whole was."""
    return int(asked.removeprefix("bytes=").removesuffix("-")) if asked is not None else 0


def refused(spec: DatasetSpec, raw: Path, hosts: Hosts | None = None) -> str:
    """The message; nothing that looks like the dataset may be left."""
    with pytest.raises(SetupError) as caught:
        download(spec, raw, hosts)
    assert not (raw / spec.folder).exists()
    with pytest.raises(SetupError, match="has no folder"):
        dataset_root(spec, raw)
    assert str(caught.value).startswith("thing: ")
    return str(caught.value)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# One file over HTTP


def test_a_broken_transfer_goes_on_where_it_broke(web: Web, tmp_path: Path) -> None:
    url = web.put("/big.bin", LARGE, breaks_after=[1_200_000, 900_000])
    IMPATIENT.fetch(Remote("big.bin", url, len(LARGE)), tmp_path / "big.bin", silent)
    assert (tmp_path / "big.bin").read_bytes() == LARGE
    first, second, third = map(start_of, web.ranges("/big.bin"))
    assert first == 0
    assert 1_200_000 - CHUNK < second <= 1_200_000
    assert second + 900_000 - CHUNK < third <= second + 900_000
    assert [path.name for path in tmp_path.iterdir()] == ["big.bin"]


def test_a_later_call_goes_on_where_the_last_one_gave_up(web: Web, tmp_path: Path) -> None:
    url = web.put("/big.bin", LARGE, breaks_after=[1_000_000, 0, 0, 0])
    remote = Remote("big.bin", url)
    with pytest.raises(SetupError, match=r"the connection .*, 3 times in a row\. Repeat the command"):
        IMPATIENT.fetch(remote, tmp_path / "big.bin", silent)
    assert not (tmp_path / "big.bin").exists()
    IMPATIENT.fetch(remote, tmp_path / "big.bin", silent)
    assert (tmp_path / "big.bin").read_bytes() == LARGE
    first, *others = map(start_of, web.ranges("/big.bin"))
    assert first == 0
    assert len(others) == 4
    assert all(1_000_000 - CHUNK < start <= 1_000_000 for start in others)


@pytest.mark.parametrize("behaviour", [{"ranges": False}, {"version": None}, {"version": 'W/"1"'}])
def test_without_safe_resume_the_file_is_fetched_anew(
    web: Web, tmp_path: Path, behaviour: dict[str, Any]
) -> None:
    url = web.put("/big.bin", LARGE, breaks_after=[1_200_000], **behaviour)
    IMPATIENT.fetch(Remote("big.bin", url), tmp_path / "big.bin", silent)
    assert (tmp_path / "big.bin").read_bytes() == LARGE


def test_a_checksum_makes_resume_safe_where_the_server_names_no_version(web: Web, tmp_path: Path) -> None:
    url = web.put("/big.bin", LARGE, breaks_after=[1_200_000], version=None)
    IMPATIENT.fetch(Remote("big.bin", url, checksum=("md5", md5(LARGE))), tmp_path / "big.bin", silent)
    assert start_of(web.ranges("/big.bin")[1]) > 1_200_000 - CHUNK


def test_a_file_that_changed_between_two_calls_is_not_mixed(web: Web, tmp_path: Path) -> None:
    url = web.put("/big.bin", LARGE, breaks_after=[1_000_000, 0, 0, 0])
    with pytest.raises(SetupError):
        IMPATIENT.fetch(Remote("big.bin", url), tmp_path / "big.bin", silent)
    web.put("/big.bin", LARGE[::-1], version='"2"')
    IMPATIENT.fetch(Remote("big.bin", url), tmp_path / "big.bin", silent)
    assert (tmp_path / "big.bin").read_bytes() == LARGE[::-1]


def test_a_file_that_shrank_between_two_calls_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    (tmp_path / "big.bin.part").write_bytes(LARGE)
    url = web.put("/big.bin", b"small")
    IMPATIENT.fetch(Remote("big.bin", url, checksum=("md5", md5(b"small"))), tmp_path / "big.bin", silent)
    assert (tmp_path / "big.bin").read_bytes() == b"small"


def test_a_part_that_was_whole_is_not_fetched_again(web: Web, tmp_path: Path) -> None:
    (tmp_path / "big.bin.part").write_bytes(LARGE)
    url = web.put("/big.bin", LARGE)
    remote = Remote("big.bin", url, len(LARGE), ("sha256", hashlib.sha256(LARGE).hexdigest()))
    IMPATIENT.fetch(remote, tmp_path / "big.bin", silent)
    assert (tmp_path / "big.bin").read_bytes() == LARGE
    assert web.requests == []


@pytest.mark.parametrize("states", [[503], [500, 502], [429, 504]])
def test_passing_faults_are_tried_again(web: Web, tmp_path: Path, states: list[int]) -> None:
    url = web.put("/small.bin", b"content", states=list(states))
    IMPATIENT.fetch(Remote("small.bin", url), tmp_path / "small.bin", silent)
    assert len(web.requests) == len(states) + 1


@pytest.mark.parametrize(
    ("states", "tries", "words"),
    [([503] * 9, 3, "HTTP 503, 3 times"), ([404], 1, "moved"), ([403], 1, "behind a login")],
)
def test_lasting_faults_are_told(web: Web, tmp_path: Path, states: list[int], tries: int, words: str) -> None:
    url = web.put("/small.bin", b"content", states=states)
    with pytest.raises(SetupError, match=words):
        IMPATIENT.fetch(Remote("small.bin", url), tmp_path / "small.bin", silent)
    assert len(web.requests) == tries
    assert not (tmp_path / "small.bin").exists()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no connection .*refused"):
        IMPATIENT.fetch(Remote("a", "http://127.0.0.1:9/a"), tmp_path / "a", silent)


def test_a_login_page_is_no_archive(web: Web, tmp_path: Path) -> None:
    url = web.put("/a.zip", b"<html>Please log in</html>", kind="text/html; charset=utf-8")
    with pytest.raises(SetupError, match="web page instead of"):
        IMPATIENT.fetch(Remote("a.zip", url), tmp_path / "a.zip", silent)


@pytest.mark.parametrize(("size", "words"), [(2_999_999, "more bytes"), (3_000_001, "3000001 are announced")])
def test_another_size_than_announced(web: Web, tmp_path: Path, size: int, words: str) -> None:
    url = web.put("/big.bin", LARGE)
    with pytest.raises(SetupError, match=words):
        IMPATIENT.fetch(Remote("big.bin", url, size), tmp_path / "big.bin", silent)
    assert not (tmp_path / "big.bin").exists()


# A dataset


@pytest.fixture
def pictures() -> dict[str, bytes]:
    return {"images/a.png": b"A" * 1000, "images/b.png": b"B" * 1000, "readme.txt": b"hello"}


def test_archives_and_files_become_the_folder_and_a_rerun_asks_for_nothing(
    web: Web, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    one, two = zipped(pictures), tarred((tarfile.TarInfo("images/c.png"), b"C"), (tarfile.TarInfo("._c"), b"x"))
    spec = entry(
        files=[
            {"url": web.put("/one.zip", one), "md5": md5(one), "size": len(one)},
            {"url": web.put("/two%20parts.tar.gz".replace("%20", " "), two).replace(" ", "%20")},
            {"url": web.put("/d.png", b"D"), "into": "images"},
            {"url": web.put("/as-is.zip", two), "unpack": False, "name": "kept.zip"},
        ]
    )
    report = download(spec, tmp_path)
    assert (report.state, report.images, report.problem) == ("downloaded", 4, None)
    assert report.folder == tmp_path / "Thing"
    names = ["images/a.png", "images/b.png", "images/c.png", "images/d.png", "kept.zip", "readme.txt"]
    assert files_below(report.folder) == [".pumit-download.json", *names]
    assert [source.key for source in find_sources(spec, report.folder)] == ["a", "b", "c", "d"]
    assert [path.name for path in tmp_path.iterdir()] == ["Thing"], "neither archives nor unfinished work stay"
    web.requests.clear()
    assert download(spec, tmp_path).state == "complete"
    assert web.requests == []


def test_archives_are_kept_where_asked_for(web: Web, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    content = zipped(pictures)
    download(entry(files=[{"url": web.put("/one.zip", content)}]), tmp_path, keep_archives=True)
    assert (tmp_path / "archives" / "thing" / "one.zip").read_bytes() == content


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_only_wanted_members_of_an_archive_take_room(web: Web, tmp_path: Path, ending: str) -> None:
    files = {"top/images/a.png": b"A", "top/masks/a.png": bytes(100_000_000)}
    members = [(tarfile.TarInfo(name), content) for name, content in files.items()]
    content = zipped(files) if ending == "zip" else tarred(*members)
    spec = entry(files=[{"url": web.put(f"/one.{ending}", content)}], members="/IMAGES/")
    report = download(spec, tmp_path)
    assert files_below(report.folder) == [".pumit-download.json", "top/images/a.png"]


def test_an_empty_folder_is_used_and_a_filled_one_left_alone(
    web: Web, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    spec = entry(files=[{"url": web.put("/one.zip", zipped(pictures))}])
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "mine.txt").touch()
    assert download(spec, tmp_path).state == "foreign"
    assert web.requests == []
    (tmp_path / "thing" / "mine.txt").unlink()
    assert download(spec, tmp_path).folder == tmp_path / "thing"


def test_a_layout_that_the_entry_does_not_expect_is_told(web: Web, tmp_path: Path) -> None:
    report = download(entry(files=[{"url": web.put("/one.zip", zipped({"other/a.png": b""}))}]), tmp_path)
    assert report.images is None
    assert "no image found" in str(report.problem)


def test_what_has_come_is_kept_when_a_later_file_fails(
    web: Web, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    one = web.put("/one.zip", zipped(pictures))
    spec = entry(files=[{"url": one}, {"url": f"{web.url}/two.zip"}])
    assert "HTTP 404" in refused(spec, tmp_path)
    web.put("/two.zip", zipped({"images/c.png": b"C"}))
    assert download(spec, tmp_path).images == 3
    assert web.ranges("/one.zip") == [None], "fetched once"


def test_another_recipe_begins_anew(web: Web, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    old = web.put("/old.zip", zipped({"images/old.png": b""}))
    refused(entry(files=[{"url": old}, {"url": f"{web.url}/gone.zip"}]), tmp_path)
    report = download(entry(files=[{"url": web.put("/new.zip", zipped(pictures))}]), tmp_path)
    assert "images/old.png" not in files_below(report.folder)


def test_a_wrong_checksum_is_told_and_the_file_removed(web: Web, tmp_path: Path) -> None:
    content = zipped({"images/a.png": b"A"})
    url = web.put("/one.zip", content[:-1] + b"?")
    message = refused(entry(files=[{"url": url, "md5": md5(content)}]), tmp_path)
    assert md5(content) in message
    assert "md5" in message
    web.put("/one.zip", content)
    assert download(entry(files=[{"url": url, "md5": md5(content)}]), tmp_path).images == 1


def test_a_damaged_archive_is_fetched_again(web: Web, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    content = zipped(pictures)
    spec = entry(files=[{"url": web.put("/one.zip", content[:-30])}])
    assert "damaged or no archive" in refused(spec, tmp_path)
    web.put("/one.zip", content)
    assert download(spec, tmp_path).images == 2


def test_two_downloads_of_one_dataset_do_not_meet(web: Web, tmp_path: Path) -> None:
    from ingest.download.staging import Staging

    with Staging(tmp_path, "thing").lock():
        message = refused(entry(files=[{"url": web.put("/one.zip", b"")}]), tmp_path)
    assert "another download" in message


def test_too_little_space_is_told_before_anything_is_fetched(web: Web, tmp_path: Path) -> None:
    spec = entry(files=[{"url": web.put("/one.zip", b""), "size": 10**16}])
    assert "needs at least 2e+07 GB more" in refused(spec, tmp_path)
    assert web.requests == []


def test_a_full_disk_is_one_line_and_the_next_call_goes_on(web: Web, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", raw]
    if os.getuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        spec = entry(files=[{"url": web.put("/a.png", LARGE), "into": "images"}])
        assert "no space left" in refused(spec, raw)
        subprocess.run(["mount", "-o", "remount,size=20m", raw], check=True)
        assert download(spec, raw).images == 1
        first, second = map(start_of, web.ranges("/a.png"))
        assert first == 0
        assert second > 1_000_000
    finally:
        subprocess.run(["umount", raw], check=True)


# Hostile archives


def linked(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def device() -> tarfile.TarInfo:
    member = tarfile.TarInfo("images/null")
    member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, 3
    return member


HOSTILE = {
    "up.zip": zipped({"../../escaped.png": b"x"}),
    "up-windows.zip": zipped({"..\\..\\escaped.png": b"x"}),
    "absolute.zip": zipped({"/tmp/escaped.png": b"x"}),
    "drive.zip": zipped({"C:/escaped.png": b"x"}),
    "up.tar.gz": tarred((tarfile.TarInfo("../../escaped.png"), b"x")),
    "link.tar.gz": tarred((linked("images", "/tmp"), b""), (tarfile.TarInfo("images/escaped.png"), b"x")),
    "up-link.tar.gz": tarred((linked("images", "../.."), b""), (tarfile.TarInfo("images/escaped.png"), b"x")),
    "hard-link.tar.gz": tarred((linked("passwd.png", "/etc/passwd", tarfile.LNKTYPE), b"")),
    "device.tar.gz": tarred((device(), b"")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_written_outside(web: Web, tmp_path: Path, name: str) -> None:
    message = refused(entry(files=[{"url": web.put(f"/{name}", HOSTILE[name])}]), tmp_path / "raw")
    assert "would write elsewhere" in message
    assert name in message
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/tmp/escaped.png").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "/", "\\", "C:", "..\\.."]), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_no_name_leads_out_of_the_folder(parts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        inner = Path(place) / "one" / "two"
        inner.mkdir(parents=True)
        archive = Path(place) / "x.zip"
        archive.write_bytes(zipped({f"{'/'.join(parts)}.png": b"x"}))
        with contextlib.suppress(SetupError, OSError):
            unpack(archive, inner, 1000)
        outside = [path for path in Path(place).rglob("*") if path.is_file() and inner not in path.parents]
        assert outside == [archive]


def test_a_link_in_a_zip_is_left_out(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("images/link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "x.zip", tmp_path / "out", 1000)
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_a_bomb_is_refused_before_it_fills_the_disk(web: Web, tmp_path: Path, ending: str) -> None:
    content = bytes(100_000_000)
    bomb = zipped({"a.png": content}) if ending == "zip" else tarred((tarfile.TarInfo("a.png"), content))
    assert len(bomb) < 200_000
    message = refused(entry(files=[{"url": web.put(f"/bomb.{ending}", bomb)}]), tmp_path)
    assert "0.1 GB would come out of it, and at most 0.0671 GB are expected" in message
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 300_000


def test_a_zip_that_lies_about_its_size_is_cut_off(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.png": bytes(1_000_000)}))
    position = content.index(b"PK\x01\x02") + 24
    assert int.from_bytes(content[position : position + 4], "little") == 1_000_000
    content[position : position + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(SetupError, match="damaged"):
        unpack(tmp_path / "x.zip", tmp_path / "out", 2000)
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) <= 1000


# Hosts


def test_zenodo_tells_names_sizes_and_checksums(web: Web, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    content = zipped(pictures)
    names = {"images 1.zip": content, "labels.zip": b"never fetched"}
    web.put_json(
        "/api/records/42",
        {
            "files": [
                {"key": name, "size": len(body), "checksum": f"md5:{md5(body)}", "links": {"self": "x"}}
                for name, body in names.items()
            ]
        },
    )
    for name, body in names.items():
        web.put(f"/api/records/42/files/{name}/content", body)
    hosts = Hosts(zenodo=f"{web.url}/api")
    assert download(entry(zenodo=[42], only="^images"), tmp_path, hosts).images == 2
    assert not web.ranges("/api/records/42/files/labels.zip/content")
    record = json.loads((tmp_path / "Thing" / ".pumit-download.json").read_text())
    assert record["files"][0]["checksum"] == f"md5:{md5(content)}"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"message": "restricted"}, "lists no files"),
        ({"files": [{"key": "../x.zip", "size": 1}]}, "which is none"),
        ({"files": [{"key": "a.zip", "size": 1}, {"key": "a.zip", "size": 1}]}, "two files of the name"),
        ({"files": []}, "lists 0 files"),
    ],
)
def test_answers_that_are_not_trusted(web: Web, tmp_path: Path, answer: Any, words: str) -> None:
    web.put_json("/api/records/42", answer)
    assert words in refused(entry(zenodo=[42]), tmp_path, Hosts(zenodo=f"{web.url}/api"))


def test_figshare_lists_page_by_page(web: Web, tmp_path: Path) -> None:
    files = [
        {
            "name": f"{number}.png",
            "size": 1,
            "download_url": web.put(f"/{number}", b"x"),
            "computed_md5": md5(b"x"),
            "supplied_md5": "",
        }
        for number in range(103)
    ]
    web.put_json("/v2/articles/7/files?page=1&page_size=100", files[:100])
    web.put_json("/v2/articles/7/files?page=2&page_size=100", files[100:])
    hosts = Hosts(figshare=f"{web.url}/v2")
    assert download(entry(figshare=7, into="images"), tmp_path, hosts).images == 103


def test_a_bucket_is_listed_to_its_end(web: Web, tmp_path: Path) -> None:
    def listing(keys: list[str], more: str) -> bytes:
        rows = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
        return (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{more}{rows}</ListBucketResult>'
        ).encode()

    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"
    first = "/bucket-of-things/?list-type=2&prefix=images/"
    web.put(first, listing(["images/", "images/a.png", "images/b c.png"], more))
    web.put(f"{first}&continuation-token=next", listing(["images/d.png"], "<IsTruncated>false</IsTruncated>"))
    for name in ("a", "b c", "d"):
        web.put(f"/bucket-of-things/images/{name}.png", b"x")
    hosts = Hosts(s3=web.url + "/{bucket}")
    report = download(entry(s3="bucket-of-things/images/"), tmp_path, hosts)
    assert [source.key for source in find_sources(entry(s3="b-b"), report.folder)] == ["a", "b c", "d"]


# The Cancer Imaging Archive

TCIA = DatasetSpec.model_validate(
    ENTRY
    | {
        "images": [
            {
                "table": {
                    "files": ["metadata.csv"],
                    "folder_column": "File Location",
                    "where": {"Modality": "MR"},
                },
                "format": "dicom",
                "dimension": 3,
                "path": "Brains/(?P<patient>[^/]+)/(?P<study>[^/]+)/(?P<series>[^/]+)",
                "key": "{patient}-{study}-{series}",
                "subject": "{patient}",
                "modality": "MRI/T1",
            }
        ],
        "download": {"tcia": "Brains"},
    }
)


def archive_of(series: Path, spoil: bool = False, drop: int = 0) -> bytes:
    images = {path.name: path.read_bytes() for path in sorted(series.iterdir())}
    hashes = "Filename,MD5Hash\n" + "".join(f"{name},{md5(body)}\n" for name, body in images.items())
    if spoil:
        name = min(images)
        images[name] = images[name][:-1] + b"!"
    kept = dict(list(images.items())[drop:])
    return zipped(kept | {"LICENSE": b"CC BY", "md5hashes.csv": hashes.encode()})


@pytest.fixture
def archive(web: Web, samples: Path) -> Hosts:
    """An archive with an MR and a CT series, as the search interface describes them."""
    found = []
    for patient, folder in (("B-002", "MRI/datalad/brain_T1"), ("B-001", "CT/dcm-qa-ct/head")):
        series = samples / folder
        first = pydicom.dcmread(min(series.iterdir()))
        found.append(
            {
                "SeriesInstanceUID": str(first.SeriesInstanceUID),
                "StudyInstanceUID": str(first.StudyInstanceUID),
                "Modality": first.Modality,
                "SeriesNumber": 5,
                "SeriesDescription": "T1 / axial_(2)",
                "Collection": "Brains",
                "PatientID": patient,
                "ImageCount": len(list(series.iterdir())),
                "FileSize": sum(path.stat().st_size for path in series.iterdir()),
                "CollectionURI": "https://doi.org/10.1000/x",
            }
        )
        address = f"/nbia/getImageWithMD5Hash?SeriesInstanceUID={first.SeriesInstanceUID}"
        # The real one makes its zips on the fly: no length, no version, no parts.
        web.put(address, archive_of(series), announces_length=False, version=None, ranges=False)
    web.put_json("/nbia/getSeries?Collection=Brains&format=json", found)
    return Hosts(nbia=f"{web.url}/nbia")


def test_a_collection_gets_the_retrievers_folders_and_table(
    web: Web, archive: Hosts, tmp_path: Path, samples: Path
) -> None:
    report = download(TCIA, tmp_path, archive)
    assert (report.images, report.problem) == (1, None)
    with (report.folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Subject ID"] for row in rows] == ["B-001", "B-002"]
    row = rows[1]
    uid, study = row["Series UID"], row["Study UID"]
    number_of = len(list((samples / "MRI/datalad/brain_T1").iterdir()))
    assert (row["Modality"], row["Number of Images"], row["Collection"]) == ("MR", str(number_of), "Brains")
    assert row["Series Description"] == "T1  axial2"
    parts = row["File Location"].split("/")
    assert parts[:3] == [".", "Brains", "B-002"]
    assert parts[3].endswith(f"-{study[-5:]}")
    assert parts[4] == f"5.000000-T1  axial2-{uid[-5:]}"
    folder = report.folder / row["File Location"]
    assert len(list(folder.iterdir())) == number_of
    assert {path.suffix for path in folder.iterdir()} == {".dcm"}
    [source] = find_sources(TCIA, report.folder)
    assert source.subject == "B-002"


def test_only_series_of_the_modalities_asked_for_are_fetched(web: Web, archive: Hosts, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"download": {"tcia": "Brains", "modalities": ["MR"]}}
    report = download(DatasetSpec.model_validate(TCIA.model_dump() | recipe), tmp_path, archive)
    assert report.images == 1
    assert len([request for request in web.requests if "getImage" in request.path]) == 1
    recipe["download"]["modalities"] = ["XA"]
    other = DatasetSpec.model_validate(TCIA.model_dump() | recipe)
    assert "modality XA" in refused(other, tmp_path / "other", archive)


def test_a_rerun_fetches_only_the_series_that_is_missing(web: Web, archive: Hosts, tmp_path: Path) -> None:
    first, second = (page for page in web.pages if "getImage" in page)
    web.pages[first].states = [404]
    assert "HTTP 404" in refused(TCIA, tmp_path, archive)
    assert download(TCIA, tmp_path, archive).images == 1
    asked = [request.query["SeriesInstanceUID"] for request in web.requests if "getImage" in request.path]
    assert len(asked) == 3
    assert asked.count(second.partition("=")[2]) == 1


@pytest.mark.parametrize("damage", [{"spoil": True}, {"drop": 1}])
def test_a_series_that_is_not_what_its_hashes_say(
    web: Web, archive: Hosts, tmp_path: Path, samples: Path, damage: dict[str, Any]
) -> None:
    page = next(page for name, page in web.pages.items() if "getImage" in name)
    whole, page.content = page.content, archive_of(samples / "MRI/datalad/brain_T1", **damage)
    assert "Repeat the command" in refused(TCIA, tmp_path, archive)
    page.content = whole
    assert download(TCIA, tmp_path, archive).images == 1


def test_a_collection_that_is_not_public(web: Web, tmp_path: Path) -> None:
    web.put_json("/nbia/getSeries", [])
    assert "not be public" in refused(TCIA, tmp_path, Hosts(nbia=f"{web.url}/nbia"))


# The command


def own_entry(raw: Path, **changes: Any) -> None:
    raw.mkdir(exist_ok=True)
    own_file(raw).write_text(yaml.safe_dump([ENTRY | changes]))


def test_the_command_tells_the_licence_and_then_downloads(
    web: Web, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    own_entry(tmp_path, download={"files": [{"url": web.put("/one.zip", zipped(pictures))}]})
    done = run("pumit-data", "download", "thing", "--raw", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("CC BY 4.0") < done.stdout.index("2 files or series")
    again = run("pumit-data", "download", "thing", "--raw", tmp_path)
    assert again.returncode == 0
    assert "complete" in again.stdout


@pytest.mark.parametrize("licence", ["CC BY-NC 4.0", None])
def test_a_restrictive_or_unknown_licence_wants_a_yes(
    web: Web, tmp_path: Path, pictures: dict[str, bytes], licence: str | None
) -> None:
    own_entry(tmp_path, licence=licence, download={"files": [{"url": web.put("/one.zip", zipped(pictures))}]})
    asked = run("pumit-data", "download", "thing", "--raw", tmp_path)
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    assert web.requests == []
    assert run("pumit-data", "download", "thing", "--raw", tmp_path, "--yes").returncode == 0


@pytest.mark.parametrize(
    ("licence", "asks"),
    [
        ("CC BY 4.0", False),
        ("CC0 1.0", False),
        ("CC BY-SA 3.0", False),
        ("CC BY-NC 4.0", True),
        ("CC BY-NC-ND 4.0", True),
        ("CC BY-ND 4.0", True),
        ("research use only", True),
        (None, True),
    ],
)
def test_which_licences_are_asked_about(licence: str | None, asks: bool) -> None:
    assert needs_consent(licence) is asks


def test_where_a_login_is_needed_the_steps_are_told(tmp_path: Path) -> None:
    access = {
        "kind": "registration",
        "host": "Example",
        "page": "https://example.org/things",
        "steps": ["Open the page and register."],
    }
    own_entry(tmp_path, access=access)
    told = run("pumit-data", "download", "thing", "--raw", tmp_path)
    assert told.returncode == 2
    for words in ("https://example.org/things", "1. Open the page", str(tmp_path / "Thing"), "images/*.png"):
        assert words in told.stdout


def test_a_killed_download_goes_on(web: Web, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    own_entry(
        tmp_path,
        download={
            "files": [
                {"url": web.put("/one.zip", zipped(pictures))},
                {"url": web.put("/slow.png", LARGE, states=[503] * 3), "into": "images"},
            ]
        },
    )
    # The second file is refused for seconds: time to kill the process while the first one is unpacked.
    process = subprocess.Popen(
        command("pumit-data", "download", "thing", "--raw", tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not web.ranges("/slow.png"):
            assert time.monotonic() < deadline, "the second file was never asked for"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "Thing").exists()
    web.pages["/slow.png"].states.clear()
    again = run("pumit-data", "download", "thing", "--raw", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "3 files or series" in again.stdout
    assert web.ranges("/one.zip") == [None]
    assert not (tmp_path / ".pumit-download").exists()


def test_an_unpacking_that_was_killed_half_way_is_begun_anew(
    web: Web, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    from ingest.download.staging import Staging

    spec = entry(files=[{"url": web.put("/one.zip", zipped(pictures))}, {"url": f"{web.url}/gone.zip"}])
    refused(spec, tmp_path)
    # As a kill would leave it: half of the archive moved, nothing noted, and debris of the unpacking.
    staging = Staging(tmp_path, "thing")
    (staging.tree / "images" / "b.png").unlink()
    shutil.rmtree(staging.root / "done")
    (staging.root / "unpacking" / "images").mkdir(parents=True)
    (staging.root / "unpacking" / "images" / "half.png").write_bytes(b"half")
    web.put("/gone.zip", zipped({"images/c.png": b""}))
    assert download(spec, tmp_path).images == 3
    assert "images/half.png" not in files_below(tmp_path / "Thing")
