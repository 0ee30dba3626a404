"""`pumit-data check` on real folders: what it finds, what it says must be fixed, and its exit code."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingest.check import Finding, FolderCheck, check_dataset
from ingest.spec import get_spec
from tests.commands import run
from tests.layouts.official import Release

CT: dict[str, Any] = {"modality": "CT"}
OWN: dict[str, Any] = {
    "id": "own-ct",
    "title": "Own CT",
    "folder": "OwnCT",
    "images": [
        {
            "globs": ["OwnCT_release/images/train/*/*.nii.gz", "OwnCT_release/images/test/*/*.nii.gz"],
            "format": "nifti",
            "dimension": 3,
            "path": r"OwnCT_release/images/(?:train|test)/(?P<case>case\d+)/(?P<name>[^/]+)\.nii\.gz",
            "key": "{case}-{name}",
            "subject": "{case}",
            "modality": "CT",
        },
        {
            "globs": ["OwnCT_release/series/*/"],
            "format": "dicom",
            "dimension": 3,
            "path": r"OwnCT_release/series/(?P<case>case\d+)",
            "key": "{case}-series",
            "subject": "{case}",
            "modality": "CT",
        },
    ],
    "ignore": ["/labels/"],
    "published": {
        "images": 4,
        "subjects": 4,
        "parts": [
            {"name": "train", "match": "/train/", "images": 2},
            {"name": "test", "match": "/test/", "images": 1},
            {"name": "series", "match": "/series/", "images": 1},
        ],
    },
}
RELEASE = Release.model_validate(
    {
        "found": {
            "OwnCT_release/images/train/case1/ct.nii.gz": {"key": "case1-ct", "subject": "case1", **CT},
            "OwnCT_release/images/train/case2/ct.nii.gz": {"key": "case2-ct", "subject": "case2", **CT},
            "OwnCT_release/images/test/case3/ct.nii.gz": {"key": "case3-ct", "subject": "case3", **CT},
            "OwnCT_release/series/case4/": {
                "key": "case4-series",
                "subject": "case4",
                **CT,
                "names": "IM{:04d}",
            },
        },
        "beside": {
            "OwnCT_release/labels/case1.nii.gz": "label",
            "OwnCT_release/readme.txt": "text",
            "OwnCT_release/._case1.nii.gz": "debris",
        },
    }
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw folder with an entry of its own, and the complete release in place."""
    folder = tmp_path / "raw"
    RELEASE.write(folder / "OwnCT")
    (folder / "datasets.yaml").write_text(yaml.safe_dump([OWN]))
    return folder


def checked(raw: Path, code: int) -> FolderCheck:
    """The check, after the command has said the same with this exit code."""
    result = run("pumit-data", "check", "own-ct", "--raw", raw, "--json")
    assert result.returncode == code, result.stderr + result.stdout
    assert result.stderr == ""
    check = check_dataset(get_spec("own-ct", raw), raw)
    assert json.loads(result.stdout) == json.loads(json.dumps([check.as_json()]))
    assert check.fine == (code == 0)
    return check


def only(check: FolderCheck, kind: str) -> Finding:
    (finding,) = [finding for finding in check.findings if finding.kind == kind]
    return finding


def test_a_complete_release(raw: Path) -> None:
    check = checked(raw, 0)
    assert (check.found, check.subjects, check.excluded, check.findings) == (4, 4, 0, ())
    assert [(part.name, part.found, part.published) for part in check.parts] == [
        ("train", 2, 2),
        ("test", 1, 1),
        ("series", 1, 1),
    ]
    shown = run("pumit-data", "check", "own-ct", "--raw", raw)
    assert "4 of 4 images found" in shown.stdout
    assert "Ready: pumit-data ingest own-ct" in shown.stdout


def test_names_in_another_case_are_fine(raw: Path) -> None:
    (raw / "OwnCT").rename(raw / "OWN-ct")
    (raw / "OWN-ct/OwnCT_release").rename(raw / "OWN-ct/ownct_RELEASE")
    assert checked(raw, 0).findings == ()


def test_a_missing_part_is_a_warning(raw: Path) -> None:
    shutil.rmtree(raw / "OwnCT/OwnCT_release/images/test")
    (finding,) = checked(raw, 0).findings
    assert (finding.kind, finding.must_fix) == ("missing_part", False)
    assert "test is missing" in finding.message


def test_counts_that_differ_are_warnings(raw: Path) -> None:
    train = raw / "OwnCT/OwnCT_release/images/train"
    shutil.rmtree(train / "case2")
    shutil.copytree(
        raw / "OwnCT/OwnCT_release/images/test/case3", raw / "OwnCT/OwnCT_release/images/test/case9"
    )
    check = checked(raw, 0)
    assert "train has 1 images; published are 2" in only(check, "fewer").message
    assert "test has 2 images; published are 1" in only(check, "more").message


DOUBLED = "OwnCT_release/OwnCT_release"


@pytest.mark.parametrize(
    ("moves", "advice"),
    [
        ({"OwnCT_release": DOUBLED}, f"Move what is in {DOUBLED}/ up to OwnCT_release."),
        ({"OwnCT_release": "a/b/OwnCT_release"}, "Move what is in a/b/ up to the folder of the dataset."),
        (
            {"OwnCT_release/images": "OwnCT_release/images/images"},
            "Move what is in OwnCT_release/images/images/ up to OwnCT_release/images.",
        ),
        (
            {"OwnCT_release/images": "OwnCT_release/data/images"},
            "Move what is in OwnCT_release/data/ up to OwnCT_release.",
        ),
        ({"OwnCT_release/images": "images"}, "Make the folder OwnCT_release/ and move images into it."),
        (
            {"OwnCT_release/images/train": "OwnCT_release/train"},
            "Make the folder OwnCT_release/images/ and move OwnCT_release/train into it.",
        ),
        ({"OwnCT_release": "OwnCT_release (1)"}, "Rename OwnCT_release (1) to OwnCT_release."),
        (
            {"OwnCT_release/images/train": "OwnCT_release/images/training"},
            "Rename OwnCT_release/images/training to OwnCT_release/images/train.",
        ),
    ],
)
def test_files_in_the_wrong_place(raw: Path, moves: dict[str, str], advice: str) -> None:
    root = raw / "OwnCT"
    for source, target in moves.items():
        (root / source).rename(raw / "aside")
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (raw / "aside").rename(root / target)
    wrong = [finding for finding in checked(raw, 2).findings if finding.kind == "wrong_place"]
    assert advice in {finding.message.partition("looks. ")[2] for finding in wrong}
    assert all(finding.must_fix for finding in wrong)


def test_following_the_advice_mends_it(raw: Path) -> None:
    root = raw / "OwnCT"
    (root / "OwnCT_release").rename(root / "x")
    (root / "OwnCT_release").mkdir()
    (root / "x").rename(root / DOUBLED)
    assert DOUBLED in only(checked(raw, 2), "wrong_place").message
    for path in (root / DOUBLED).iterdir():
        path.rename(root / "OwnCT_release" / path.name)
    (root / DOUBLED).rmdir()
    assert checked(raw, 0).findings == ()


def test_labels_are_never_told_to_become_images(raw: Path) -> None:
    root = raw / "OwnCT/OwnCT_release"
    shutil.copytree(root / "images/train/case1", root / "masks/train/case7")
    finding = only(checked(raw, 0), "unexpected")
    assert "masks/train/case*" in finding.message


def test_a_folder_beside_the_images_is_not_told_to_be_renamed(raw: Path) -> None:
    train = raw / "OwnCT/OwnCT_release/images/train"
    (train / "case1").rename(train.parent / "case1")
    shutil.copytree(train.parent / "case1", train.parent / "smaller/case1")
    finding = only(checked(raw, 2), "unexpected")
    assert "images/smaller/case*" in finding.message
    assert not finding.must_fix


def test_copies_are_told_apart_from_what_is_missing(raw: Path) -> None:
    root = raw / "OwnCT"
    shutil.copytree(root / "OwnCT_release/images", root / "backup/OwnCT_release/images")
    finding = only(checked(raw, 0), "copy")
    assert finding.files == 3
    assert "OwnCT_release/images/" in finding.message


def test_stray_images_are_counted_by_folder_and_ending(raw: Path) -> None:
    root = raw / "OwnCT"
    for number in range(30):
        (root / f"extra/patient{number:02d}").mkdir(parents=True)
        (root / f"extra/patient{number:02d}/scan.PNG").write_bytes(b"\x89PNG")
    shutil.copyfile(root / "OwnCT_release/series/case4/IM0001", root / "extra/IM0001")
    (root / "extra/VERSION").write_text("no image")
    strays = [finding for finding in checked(raw, 0).findings if finding.kind == "unexpected"]
    assert [(finding.files, finding.examples[0]) for finding in strays] == [
        (30, "extra/patient00/scan.PNG"),
        (1, "extra/IM0001"),
    ]
    assert "30 .png files in extra/patient*" in strays[0].message
    assert len(strays[0].examples) == 3


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_is_not_unpacked(raw: Path, kind: str) -> None:
    root = raw / "OwnCT"
    archive = root / f"train.{kind}"
    _pack(archive, root, root / "OwnCT_release/images/train")
    assert checked(raw, 0).findings == ()  # all of it is there
    shutil.rmtree(root / "OwnCT_release/images/train")
    check = checked(raw, 2)
    assert f"train.{kind} is not unpacked" in only(check, "archive").message
    assert only(check, "missing_part").must_fix is False


def test_an_archive_of_something_else_is_a_warning(raw: Path) -> None:
    root = raw / "OwnCT"
    _pack(root / "labels.zip", root, root / "OwnCT_release/labels")
    (root / "part.7z").write_bytes(b"7z")
    (root / "damaged.zip").write_bytes(b"PK")
    findings = checked(raw, 0).findings
    assert {finding.kind for finding in findings} == {"archive"}
    assert len(findings) == 3


def _pack(archive: Path, root: Path, folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for file in files:
                packed.write(file, file.relative_to(root))
    else:
        with tarfile.open(archive, "w:gz") as stream:
            for file in files:
                stream.add(file, file.relative_to(root))


def test_nothing_but_an_archive(raw: Path) -> None:
    root = raw / "OwnCT"
    _pack(raw / "release.zip", root, root / "OwnCT_release")
    shutil.rmtree(root / "OwnCT_release")
    (raw / "release.zip").rename(root / "release.zip")
    (finding,) = checked(raw, 2).findings
    assert "release.zip is not unpacked" in finding.message


def test_no_folder_an_empty_one_and_one_of_another_name(raw: Path) -> None:
    (raw / "OwnCT").rename(raw / "Own_CT")
    assert f"Is it {raw / 'Own_CT'}? Rename that to OwnCT." in only(checked(raw, 2), "no_folder").message
    (raw / "Own_CT/OwnCT_release").rename(raw / "OwnCT_release")
    (raw / "Own_CT").rmdir()
    message = only(checked(raw, 2), "no_folder").message
    assert f"make the folder {raw / 'OwnCT'} and move OwnCT_release into it" in message
    (raw / "OwnCT").mkdir()
    assert "is empty" in only(checked(raw, 2), "no_folder").message


def test_what_stops_discovery_is_told_with_what_is_there(raw: Path) -> None:
    train = raw / "OwnCT/OwnCT_release/images/train"
    shutil.copytree(train / "case1", raw / "OwnCT/OwnCT_release/images/test/case1")
    check = checked(raw, 2)
    assert "both have the key 'case1-ct'" in only(check, "discovery").message
    assert (check.found, check.subjects) == (5, None)


def test_links_in_a_circle_and_links_to_nowhere(raw: Path) -> None:
    root = raw / "OwnCT"
    (root / "OwnCT_release/again").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "OwnCT_release/images/test/case8").symlink_to("unmounted")
    finding = only(checked(raw, 0), "discovery")
    assert "case8 is a link that leads nowhere" in finding.message


def test_a_wrong_call(tmp_path: Path) -> None:
    result = run("pumit-data", "check", "amos", "--raw", tmp_path / "none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: The raw folder")


def test_series_that_a_table_lists_are_explained(tmp_path: Path) -> None:
    series = "LIDC-IDRI/LIDC-IDRI-0001/study"
    release = Release.model_validate(
        {
            "found": {f"{series}/ct/": {"key": "k", "subject": "s", **CT}},
            "beside": {f"{series}/dx/": "unused", f"{series}/not-listed/": "unused"},
            "tables": {
                "metadata.csv": "Modality,File Location\n"
                f"CT,./{series}/ct\nDX,./{series}/dx\nCT,./{series}/gone\nSR,../../elsewhere\n"
            },
        }
    )
    release.write(tmp_path / "LIDC-IDRI")
    check = check_dataset(get_spec("lidc-idri"), tmp_path)
    assert check.found == 1
    assert "1 of 2 listed series are not there" in only(check, "discovery").message
    assert f"{series}/not-listed/1-001.dcm" in {
        example for finding in check.findings for example in finding.examples
    }
    shutil.move(tmp_path / "LIDC-IDRI/metadata.csv", tmp_path / "metadata.csv")
    assert "has no metadata.csv" in only(check_dataset(get_spec("lidc-idri"), tmp_path), "discovery").message
