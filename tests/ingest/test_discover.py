"""How discovery applies rules to paths, and what it says of folders that are not as expected.

What it finds in the official layout of every source: test_official_layouts.py.
"""

from __future__ import annotations

import csv
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ingest.discover
from catalog.errors import SetupError
from ingest.discover import dataset_root
from ingest.found import find_sources
from ingest.spec import DatasetSpec, get_spec


def spec_of(**group: Any) -> DatasetSpec:
    """An entry with one group of NIfTI files `<patient>/<name>.nii.gz`."""
    rule = {
        "globs": ["*/*.nii.gz"],
        "format": "nifti",
        "dimension": 3,
        "path": r"(?P<patient>[^/]+)/(?P<name>.+)\.nii\.gz",
        "key": "{patient}-{name}",
        "subject": "{patient}",
        "modality": "CT",
    }
    return DatasetSpec.model_validate({"id": "own", "title": "Own", "folder": "Own", "images": [rule | group]})


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def keys(spec: DatasetSpec, root: Path) -> list[str]:
    return [source.key for source in find_sources(spec, root)]


@pytest.mark.parametrize(
    ("number", "modality", "upstream"),
    [
        *((number, "CT", "CT") for number in (1, 99, 499, 500)),
        *((number, "MRI", "MRI") for number in (501, 509, 510, 599, 600)),
        *((number, "CT", "MRI") for number in (601, 700, 5000, 6899)),
    ],
)
def test_amos_numbers_tell_the_modality(tmp_path: Path, number: int, modality: str, upstream: str) -> None:
    touch(tmp_path, f"imagesTr/amos_{number:04d}.nii.gz")
    (source,) = find_sources(get_spec("amos"), tmp_path)
    assert (source.modality, source.upstream_modality) == (modality, upstream)


@pytest.mark.parametrize("path", ["images/00000001_000.png", "images_012/images/00000001_000.png"])
def test_nih_chestxray_as_mirrors_unpack_it(tmp_path: Path, path: str) -> None:
    touch(tmp_path, path)
    assert keys(get_spec("nih-chestxray"), tmp_path) == ["00000001_000"]


def test_order_of_the_file_system_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{patient}/{name}.nii.gz" for patient in "cab" for name in "zxy"))
    expected = find_sources(spec_of(), tmp_path)
    assert expected == sorted(expected, key=lambda source: source.key)
    listed = ingest.discover._entries

    def shuffled(folder: Path) -> list[Any]:
        entries = list(listed(folder))
        random.Random(7).shuffle(entries)
        return entries

    monkeypatch.setattr(ingest.discover, "_entries", shuffled)
    assert find_sources(spec_of(), tmp_path) == expected


NAMES = st.text("aA1éÉßz- ().#ä", min_size=1, max_size=6).filter(lambda name: not name.startswith("."))


@given(names=st.sets(NAMES, min_size=1, max_size=8))
def test_any_file_names(names: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any")
    touch(root, *(f"p/{name}.nii.gz" for name in names))
    expected = sorted(f"p-{unicodedata.normalize('NFC', name)}" for name in names)
    assert keys(spec_of(), root) == expected
    assert all(source.file.exists() for source in find_sources(spec_of(), root))


def test_case_and_unicode_form_do_not_matter(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Chákṣu")
    touch(tmp_path, f"{decomposed}/A.NII.GZ", f"{decomposed}/b.nii.Gz")
    spec = spec_of(globs=["cháKṣu/*.nii.gz"])
    sources = find_sources(spec, tmp_path)
    assert [source.key for source in sources] == ["Chákṣu-A", "Chákṣu-b"]
    assert [source.path for source in sources] == [f"{decomposed}/A.NII.GZ", f"{decomposed}/b.nii.Gz"]


def test_keys_are_sorted_by_code_point(tmp_path: Path) -> None:
    touch(tmp_path, *(f"p/{name}.nii.gz" for name in ["é", "b", "B", "a10", "a9"]))
    assert keys(spec_of(), tmp_path) == ["p-B", "p-a10", "p-a9", "p-b", "p-é"]


def test_hidden_names_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.nii.gz", "p/._a.nii.gz", ".cache/a.nii.gz", "__MACOSX/a.nii.gz")
    assert keys(spec_of(), tmp_path) == ["p-a"]


def test_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "x/b.nii.gz", "x/y/c.nii.gz")
    spec = spec_of(
        globs=["**/*.nii.gz"], path=r"(?:.*/)?(?P<name>[^/]+)\.nii\.gz", key="{name}", subject="{name}"
    )
    assert keys(spec, tmp_path) == ["a", "b", "c"]


def test_folders_and_files_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "p1/series/1.dcm", "p2/series")
    spec = spec_of(globs=["*/series/"], format="dicom", path="(?P<patient>[^/]+)/(?P<name>[^/]+)")
    assert keys(spec, tmp_path) == ["p1-series"]
    spec = spec_of(globs=["*/series"], format="dicom", path="(?P<patient>[^/]+)/(?P<name>[^/]+)")
    assert keys(spec, tmp_path) == ["p2-series"]


def test_absent_splits_are_tolerated(tmp_path: Path) -> None:
    touch(tmp_path, "amos22/imagesVa/amos_0008.nii.gz")
    assert keys(get_spec("amos"), tmp_path) == ["amos_0008"]


def test_equal_keys_name_both_files(tmp_path: Path) -> None:
    touch(tmp_path, "amos22/imagesTr/amos_0001.nii.gz", "imagesTr/amos_0001.nii.gz")
    with pytest.raises(SetupError) as caught:
        find_sources(get_spec("amos"), tmp_path)
    assert "amos22/imagesTr/amos_0001.nii.gz and imagesTr/amos_0001.nii.gz" in str(caught.value)
    assert "key 'amos_0001'" in str(caught.value)


def test_a_file_belongs_to_one_group(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.nii.gz")
    group = spec_of().model_dump()["images"][0]
    entry = {"id": "own", "title": "Own", "folder": "Own", "images": [group, group]}
    with pytest.raises(SetupError, match=r"p/a\.nii\.gz is found by two of the `images` groups"):
        find_sources(DatasetSpec.model_validate(entry), tmp_path)


@pytest.mark.parametrize(
    ("group", "path", "message"),
    [
        (
            {"path": "(?P<patient>p[0-9])/(?P<name>.).nii.gz"},
            "q/a.nii.gz",
            "q/a.nii.gz .*does not match `path`",
        ),
        (
            {"modality": [{"match": "_ct", "modality": "CT"}]},
            "p/a.nii.gz",
            "no `modality` rule .*matches p/a.nii.gz",
        ),
        ({"key": "{extra}", "path": "(?P<patient>.)(?P<extra>x)?/.*"}, "p/a.nii.gz", "the key ''"),
    ],
)
def test_paths_that_the_rules_cannot_describe(
    tmp_path: Path, group: dict[str, Any], path: str, message: str
) -> None:
    touch(tmp_path, path)
    with pytest.raises(SetupError, match=message) as caught:
        find_sources(spec_of(**({"subject": None} if "key" in group else {}), **group), tmp_path)
    assert str(caught.value).startswith("own: ")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("p/a#0003.nii.gz", "p/a#0003.nii.gz"),
        ("p/a\n.nii.gz", r"p/a\n.nii.gz"),
        ("p/a\udcff.nii.gz", r"p/a\udcff.nii.gz"),
        ("p\x1b[2J/\u202ea.nii.gz", r"p\x1b[2J/\u202ea.nii.gz"),
    ],
)
def test_a_name_that_no_row_can_hold_fails_alone(tmp_path: Path, path: str, key: str) -> None:
    touch(tmp_path, path, "p/good.nii.gz")
    sources = {source.key: source for source in find_sources(spec_of(), tmp_path)}
    assert sources.keys() == {key, "p-good"}
    assert sources[key].failure is not None
    assert sources[key].failure[0] == "unusable_name"
    assert sources[key].path == key
    assert sources["p-good"].failure is None


def test_what_is_no_file_is_listed_like_one(tmp_path: Path) -> None:
    """Reading it fails with a reason; a folder that an unpacker made around an image is no image of its own."""
    touch(tmp_path, "p/a.nii.gz", "p/b.nii.gz/b.nii.gz", "p/c.nii.gz/readme.txt")
    os.mkfifo(tmp_path / "p/d.nii.gz")
    spec = spec_of(
        globs=["**/*.nii.gz"], path=r"p/(?:[^/]+/)?(?P<name>[^/.]+)\.nii\.gz", key="{name}", subject=None
    )
    assert keys(spec, tmp_path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("beside", [[], ["amos22/labelsTr/amos_0001.nii.gz", "readme.md"]])
def test_nothing_found_tells_the_layout(tmp_path: Path, beside: list[str]) -> None:
    (tmp_path / "AMOS22").mkdir()
    touch(tmp_path / "AMOS22", *beside)
    spec = get_spec("amos")
    with pytest.raises(SetupError) as caught:
        find_sources(spec, dataset_root(spec, tmp_path))
    assert ("no image found" if beside else "is empty") in str(caught.value)
    assert "AMOS22/: amos22/images*/*.nii.gz; images*/*.nii.gz" in str(caught.value)
    assert "10.5281/zenodo.7262581" in str(caught.value)


@pytest.mark.parametrize("name", ["amos", "AMOS22", "Amos22", "AMOS"])
def test_root_by_id_or_published_name_in_any_case(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}/x")
    assert dataset_root(get_spec("amos"), tmp_path) == tmp_path / name


def test_root_may_be_a_link_and_lie_deep(tmp_path: Path) -> None:
    touch(tmp_path, "disk/x")
    (tmp_path / "raw/MSD").mkdir(parents=True)
    (tmp_path / "raw/MSD/Task02_Heart").symlink_to(tmp_path / "disk")
    spec = spec_of().model_copy(update={"folder": "MSD/Task02_Heart"})
    assert dataset_root(spec, tmp_path / "raw") == tmp_path / "raw/MSD/Task02_Heart"


def test_root_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "samples/x")
    monkeypatch.chdir(tmp_path)
    assert dataset_root(get_spec("sample"), Path()) == tmp_path / "samples"


def test_no_root(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"does not exist.*--raw"):
        dataset_root(get_spec("amos"), tmp_path / "nowhere")
    with pytest.raises(
        SetupError, match=r"has no folder amos or AMOS22\. Expected below AMOS22/: amos22/images"
    ):
        dataset_root(get_spec("amos"), tmp_path)
    touch(tmp_path, "amos/x", "AMOS22/x")
    with pytest.raises(SetupError, match=r"AMOS22 and .*amos exist\. Keep one"):
        dataset_root(get_spec("amos"), tmp_path)


def test_links_are_listed_wherever_they_lead(tmp_path: Path) -> None:
    """None disappears: the reader gives each its row, and refuses those that lead outside."""
    root = tmp_path / "own"
    touch(tmp_path, "elsewhere/secret.nii.gz", "own/p/a.nii.gz")
    (root / "p/inside.nii.gz").symlink_to("a.nii.gz")
    (root / "p/outside.nii.gz").symlink_to(tmp_path / "elsewhere/secret.nii.gz")
    (root / "p/dangling.nii.gz").symlink_to("gone")
    (root / "q").symlink_to(tmp_path / "elsewhere")
    assert keys(spec_of(), root) == ["p-a", "p-dangling", "p-inside", "p-outside", "q-secret"]


def test_links_in_circles_end(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.nii.gz")
    (tmp_path / "p/up").symlink_to("..")
    (tmp_path / "p/self.nii.gz").symlink_to("self.nii.gz")
    spec = spec_of(globs=["**/*.nii.gz"])
    assert keys(spec, tmp_path) == ["p-a", "p-self"]


def test_a_folder_link_that_leads_nowhere_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "p/a.nii.gz")
    (tmp_path / "q").symlink_to("unmounted")
    assert keys(spec_of(), tmp_path) == ["p-a"]
    assert "q is a link that leads nowhere" in caplog.text


def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    touch(tmp_path, "p/a.nii.gz")
    monkeypatch.setattr("ingest.discover.os.scandir", refuse)
    with pytest.raises(SetupError, match=r"Cannot list the folder .*: Permission denied\."):
        find_sources(spec_of(), tmp_path)


def write_tcia_table(file: Path, rows: list[list[str]]) -> None:
    """A metadata.csv as TCIA's downloader writes it, byte order mark included."""
    columns = ["Series UID", "Collection", "Subject ID", "Study UID", "Study Date", "Series Description"]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([[*columns, "Modality", "Number of Images", "File Location"], *rows])


def series_row(location: str, modality: str = "CT") -> list[str]:
    return ["1.2.3", "LIDC-IDRI", "", "", "", "", modality, "1", location]


SERIES = "LIDC-IDRI/LIDC-IDRI-0001/study/series"


@pytest.mark.parametrize(
    "location", [f"./{SERIES}", f".\\{SERIES}".replace("/", "\\"), f"{SERIES}/", f" {SERIES} ", f".//{SERIES}"]
)
def test_locations_in_a_table_are_written_in_many_ways(tmp_path: Path, location: str) -> None:
    touch(tmp_path, f"{SERIES}/1.dcm")
    write_tcia_table(tmp_path / "metadata.csv", [series_row(location), series_row(f"./{SERIES}", " ct ")])
    (source,) = find_sources(get_spec("lidc-idri"), tmp_path)
    assert source.path == SERIES


def test_listed_series_that_are_not_there_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, f"{SERIES}/1.dcm")
    write_tcia_table(tmp_path / "metadata.csv", [series_row(SERIES), series_row(f"{SERIES}-2")])
    assert len(find_sources(get_spec("lidc-idri"), tmp_path)) == 1
    assert "lidc-idri: 1 of 2 listed series are not there" in caplog.text


@pytest.mark.parametrize(
    "location", ["../elsewhere", f"./LIDC-IDRI/../../{SERIES}", "/etc", "\\\\server\\scans", "../missing"]
)
def test_a_table_cannot_lead_outside(tmp_path: Path, location: str) -> None:
    touch(tmp_path, f"lidc-idri/{SERIES}/1.dcm", "elsewhere/1.dcm")
    write_tcia_table(tmp_path / "lidc-idri/metadata.csv", [series_row(SERIES), series_row(location)])
    sources = find_sources(get_spec("lidc-idri"), tmp_path / "lidc-idri")
    failures = {source.path == SERIES: source.failure and source.failure[0] for source in sources}
    assert failures == {True: None, False: "outside_root"}


@pytest.mark.parametrize("location", ["", "./"])
def test_a_row_of_a_table_must_name_a_folder(tmp_path: Path, location: str) -> None:
    touch(tmp_path, f"{SERIES}/1.dcm")
    write_tcia_table(tmp_path / "metadata.csv", [series_row(SERIES), series_row(location)])
    with pytest.raises(SetupError, match=r"metadata\.csv, line 3: 'File Location' must name a folder below"):
        find_sources(get_spec("lidc-idri"), tmp_path)


def test_rows_of_other_modalities_may_hold_anything(tmp_path: Path) -> None:
    touch(tmp_path, f"{SERIES}/1.dcm")
    rows = [series_row(SERIES), series_row("", "SR"), series_row("../../x", "SEG"), ["short row"], []]
    write_tcia_table(tmp_path / "metadata.csv", rows)
    assert keys(get_spec("lidc-idri"), tmp_path) == ["LIDC-IDRI-0001_study_series"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no metadata\.csv or \*/metadata\.csv"),
        (b"", "no column 'File Location', only: nothing"),
        (b"Series UID,Modality\n1,CT\n", "no column 'File Location', only: series uid, modality"),
        (b"File Location,Modality\n\xff,CT\n", "cannot be read as CSV"),
        (b"File Location,Modality\n", "no image found"),
    ],
)
def test_a_table_that_does_not_serve(tmp_path: Path, content: bytes | None, message: str) -> None:
    touch(tmp_path, f"{SERIES}/1.dcm")
    if content is not None:
        (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(SetupError, match=message):
        find_sources(get_spec("lidc-idri"), tmp_path)
