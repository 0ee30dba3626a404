"""`add`: from a user's folder to an entry that finds just its images, and ingests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image

from catalog.errors import SetupError
from ingest.add import Proposal, propose, write_entry
from ingest.discover import dataset_root
from ingest.found import find_sources
from ingest.spec import get_spec, load_specs
from tests.commands import run

REPOSITORY = Path(__file__).resolve().parents[2]


def put(source: Path, *targets: Path) -> None:
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def export(source: Path, folder: Path, person: str) -> None:
    """A DICOM export as a hospital's system writes it: nested folders, names without ending."""
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        dataset = pydicom.dcmread(file)
        dataset.PatientID = person
        dataset.save_as(folder / f"IM{number:05d}")


def picture(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(1, 255, (16, 16), np.uint8)).save(file)


def volume(file: Path, shape: tuple[int, ...] = (8, 9, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(0).integers(0, 100, shape, np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 3, 1])), file)


def found(proposal: Proposal) -> dict[str, tuple[str, str]]:
    return {source.key: (source.subject, source.modality) for source in proposal.sources}


def subject_folders(folder: Path, samples: Path) -> None:
    for subject in ("patient_01", "patient_02"):
        put(samples / "MRI/sct-tutorial/spine_T2.nii.gz", folder / subject / "scans" / "T2.nii.gz")
        put(samples / "MRI/sct-tutorial/spine_T2.nii.gz", folder / subject / "scans" / "T2_mask.nii.gz")
    put(samples / "MRI/sct-testing/spine_fMRI.nii.gz", folder / "patient_02" / "scans" / "bold.nii.gz")
    (folder / "notes.txt").write_text("nothing")


def flat_pictures(folder: Path, samples: Path) -> None:
    for number, source in enumerate(sorted((samples / "XR").glob("ml-*/chest.png"))):
        put(source, folder / f"chest{number}.png")
    put(samples / "XR/ml-workgroup-0957ce54/chest.png", folder / "chest0 mask.png")


def dicom_export(folder: Path, samples: Path) -> None:
    export(samples / "CT/dcm-qa-ct/head", folder / "PA000000/ST000000/SE000000", "A")
    export(samples / "MRI/datalad/brain_T1", folder / "PA000001/ST000000/SE000000", "B")
    export(samples / "MRI/datalad/brain_T1", folder / "PA000001/ST000001/SE000004", "B")
    export(samples / "XR/pydicom-rg3/leg", folder / "PA000002/ST000000/SE000000", "C")
    (folder / "DICOMDIR").write_text("an index")
    (folder / "PA000000" / "README.TXT").write_text("a viewer")


LAYOUTS: dict[str, tuple[Callable[[Path, Path], None], dict[str, tuple[str, str]]]] = {
    "Subject Folders": (
        subject_folders,
        {
            "patient_01-T2": ("patient_01", "MRI/T2"),
            "patient_02-T2": ("patient_02", "MRI/T2"),
            "patient_02-bold": ("patient_02", "MRI/fMRI"),
        },
    ),
    "my_XR": (flat_pictures, {f"chest{number}": (f"chest{number}", "XR") for number in range(3)}),
    "export": (
        dicom_export,
        {
            "PA000000-ST000000-SE000000": ("PA000000", "CT"),
            "PA000001-ST000000-SE000000": ("PA000001", "MRI"),
            "PA000001-ST000001-SE000004": ("PA000001", "MRI"),
            "PA000002-ST000000-SE000000-IM00000": ("PA000002", "XR"),
        },
    ),
}


def test_real_images_from_folder_to_catalog(tmp_path: Path, samples: Path) -> None:
    raw = tmp_path / "raw"
    ids = []
    for name, (lay_out, expected) in LAYOUTS.items():
        lay_out(raw / name, samples)
        added = run("pumit-data", "add", raw / name, "--write")
        assert added.returncode == 0, added.stderr
        assert f"--raw {raw}" in added.stdout
        (spec,) = (spec for spec in load_specs(raw=raw).values() if spec.folder == name)
        sources = find_sources(spec, dataset_root(spec, raw))
        assert {source.key: (source.subject, source.modality) for source in sources} == expected
        ids.append(spec.id)
    result = run(
        *("pumit-data", "ingest", *ids, "--raw", raw, "--data", tmp_path / "data"),
        *("--workers", "1", "--json"),
    )
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert [report["dataset"] for report in reports] == ids
    assert all(report["total"].keys() == {"ingested"} for report in reports)


def test_bids(tmp_path: Path) -> None:
    for subject in ("sub-01", "sub-02"):
        volume(tmp_path / "study" / subject / "anat" / f"{subject}_T1w.nii.gz")
        volume(tmp_path / "study" / subject / "func" / f"{subject}_task-rest_bold.nii.gz", (8, 9, 10, 3))
    (tmp_path / "study" / "dataset_description.json").write_text("{}")
    proposal = propose(tmp_path / "study")
    assert found(proposal) == {
        f"{subject}_{name}": (subject, modality)
        for subject in ("sub-01", "sub-02")
        for name, modality in (("T1w", "MRI/T1"), ("task-rest_bold", "MRI/fMRI"))
    }
    assert proposal.spec.images[0].share_weight


def test_numbered_channels_share_a_subject(tmp_path: Path) -> None:
    for case in ("001", "002"):
        for channel in ("0000", "0001"):
            volume(tmp_path / "task" / "imagesTr" / f"case_{case}_{channel}.nii.gz")
        volume(tmp_path / "task" / "labelsTr" / f"case_{case}.nii.gz")
    proposal = propose(tmp_path / "task")
    assert {source.subject for source in proposal.sources} == {"case_001", "case_002"}
    assert len(proposal.sources) == 4
    assert len(proposal.labels) == 2
    assert any("modality" in warning for warning in proposal.warnings)


def test_class_folders_are_no_persons(tmp_path: Path) -> None:
    for kind in ("COVID", "Pneumonia"):
        for number in range(8):
            picture(tmp_path / "cxr" / kind / f"{number}.png", number)
    proposal = propose(tmp_path / "cxr")
    assert len({source.subject for source in proposal.sources}) == 16
    assert {source.modality for source in proposal.sources} == {"XR"}


def test_formats_and_depths_may_be_mixed(tmp_path: Path, samples: Path) -> None:
    folder = tmp_path / "mixed"
    export(samples / "CT/dcm-qa-ct/head", folder / "p1/ct/s1", "A")
    export(samples / "MRI/datalad/brain_T1", folder / "p2/s1", "B")
    put(samples / "CT/elastix/chest.mha", folder / "p2/lung.mha")
    volume(folder / "p2/lung.nii")
    picture(folder / "p2/shot.png")
    (folder / "p1/ct/doc").mkdir()
    (folder / "p1/ct/doc/x.txt").write_text("x")
    proposal = propose(folder)
    assert {source.path for source in proposal.sources} == {
        *("p1/ct/s1", "p2/s1", "p2/lung.mha", "p2/lung.nii", "p2/shot.png")
    }
    assert {source.subject for source in proposal.sources} == {"p1", "p2"}
    assert any("screenshots" in warning for warning in proposal.warnings)


def test_patients_that_share_a_folder_are_told(tmp_path: Path, samples: Path) -> None:
    files = sorted((samples / "CT/dcm-qa-ct/head").iterdir())
    (tmp_path / "all" / "series").mkdir(parents=True)
    for number, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        dataset.PatientID = "Smith" if number else "Jones"
        dataset.save_as(tmp_path / "all" / "series" / file.name)
    proposal = propose(tmp_path / "all")
    assert any("several patients" in warning for warning in proposal.warnings)
    assert "Smith" not in proposal.text + repr(proposal)


def test_names_with_special_characters(tmp_path: Path) -> None:
    picture(tmp_path / "it's [1]" / "a {b} (1)*.png")
    picture(tmp_path / "it's [1]" / "naïve #2.png", 1)
    proposal = propose(tmp_path / "it's [1]", title="true")
    assert {source.path for source in proposal.sources} == {"a {b} (1)*.png", "naïve #2.png"}
    assert proposal.spec.title == "true"
    assert proposal.spec.id == "it-s-1"


def test_entry_is_appended_and_read_back(tmp_path: Path) -> None:
    picture(tmp_path / "one" / "a.png")
    picture(tmp_path / "deep" / "two" / "a.png")
    file = tmp_path / "datasets.yaml"
    write_entry(propose(tmp_path / "one"))
    before = file.read_text()
    write_entry(propose(tmp_path / "deep" / "two", raw=tmp_path))
    assert file.read_text().startswith(before.rstrip())
    assert [*load_specs(), "one", "two"] == list(load_specs(raw=tmp_path))
    assert get_spec("two", tmp_path).folder == "deep/two"
    assert yaml.safe_load(file.read_text())[0]["id"] == "one"
    assert list(tmp_path.glob(".tmp*")) == []


def test_without_write_nothing_is_written(tmp_path: Path) -> None:
    picture(tmp_path / "one" / "a.png")
    shown = run("pumit-data", "add", tmp_path / "one")
    assert shown.returncode == 0
    assert "- id: one" in shown.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


def test_mistakes_are_told_in_one_line(tmp_path: Path, samples: Path) -> None:
    picture(tmp_path / "amos" / "a.png")
    (tmp_path / "empty").mkdir()
    put(samples / "CT/dcm-qa-ct/head", tmp_path / "series")
    picture(tmp_path / "ok" / "a.png")
    (tmp_path / "else").mkdir()
    for call, words in (
        (lambda: propose(tmp_path / "none"), "no folder"),
        (lambda: propose(tmp_path / "empty"), "no image"),
        (lambda: propose(tmp_path / "amos"), "--id"),
        (lambda: propose(tmp_path / "series"), "a folder for each series"),
        (lambda: propose(tmp_path / "ok", raw=tmp_path / "else"), "ln -s"),
        (lambda: propose(tmp_path / "ok", dataset="No Id"), "id: "),
    ):
        with pytest.raises(SetupError, match=words):
            call()
    write_entry(propose(tmp_path / "ok"))
    with pytest.raises(SetupError, match="taken"):
        propose(tmp_path / "ok")


def test_shipped_file_is_never_written(samples: Path) -> None:
    before = (REPOSITORY / "datasets.yaml").read_bytes()
    with pytest.raises(SetupError, match="comes with PUMIT-data"):
        write_entry(propose(samples / "XR", raw=REPOSITORY))
    assert (REPOSITORY / "datasets.yaml").read_bytes() == before


def test_own_entry_may_not_take_a_shipped_id(tmp_path: Path) -> None:
    text = (REPOSITORY / "datasets.yaml").read_text()
    (tmp_path / "datasets.yaml").write_text(text)
    assert load_specs(raw=tmp_path) == load_specs()  # equal entries are no clash
    (tmp_path / "datasets.yaml").write_text(text.replace("folder: AMOS22", "folder: Mine"))
    with pytest.raises(SetupError, match=r"'amos'.*has this id"):
        load_specs(raw=tmp_path)


def test_list_shows_own_datasets(tmp_path: Path) -> None:
    picture(tmp_path / "one" / "a.png")
    write_entry(propose(tmp_path / "one"))
    listed = run("pumit-data", "list", "--raw", tmp_path, "--data", tmp_path / "data", "--json")
    assert "one" in {row["id"] for row in json.loads(listed.stdout)}
