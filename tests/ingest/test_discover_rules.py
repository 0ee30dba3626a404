"""What an entry can say beyond paths: tables, channels, shares of a weight, copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import load_catalog
from ingest.found import find_sources
from ingest.source import ImageSource, shared_weight
from ingest.spec import DatasetSpec
from tests.commands import run


def spec_of(*, spec: dict[str, Any] | None = None, **group: Any) -> DatasetSpec:
    """An entry with one group of NIfTI files `<patient>/<name>.nii.gz`."""
    rule = {
        "globs": ["*/*.nii.gz"],
        "format": "nifti",
        "dimension": 3,
        "path": r"(?P<patient>[^/]+)/(?P<name>.+)\.nii\.gz",
        "key": "{patient}-{name}",
        "subject": "{patient}",
        "modality": "MRI",
    }
    rule = {name: value for name, value in (rule | group).items() if value is not None}
    return DatasetSpec.model_validate(
        {"id": "own", "title": "Own", "folder": "Own", "images": [rule], "private_names": False, **(spec or {})}
    )


def of_series(**changes: Any) -> DatasetSpec:
    """An entry whose images a table lists, with cells of the table in every rule."""
    table = {
        "files": ["metadata.csv"],
        "folder_column": "File Location",
        "where": {"Modality": ["CT", "MR"]},
        "columns": {"series": "Series UID", "description": "Series Description", "images": "Number of Images"},
        "unique": "Series UID",
    }
    return spec_of(
        globs=None,
        table=table,
        format="dicom",
        path="(?P<patient>[^/]+)/(?P<folder>[^/]+)",
        key="{series}",
        modality=[
            {"match": "^CT", "field": "description", "modality": "CT"},
            {
                "match": "POST|T1 C",
                "field": "description",
                "modality": "MRI/T1c",
                "upstream_modality": "MRI/T1",
            },
            {"match": "T2", "field": "description", "modality": "MRI/T2"},
        ],
        spec={"exclusions": [{"match": "^[0-2]$", "field": "images", "reason": "no volume"}]},
        **changes,
    )


def write_table(root: Path, *rows: str) -> None:
    header = "Series UID,Modality,Series Description,Number of Images,File Location"
    (root / "metadata.csv").write_text("\n".join([header, *rows]))
    for row in rows:
        (root / row.rpartition(",")[2]).mkdir(parents=True, exist_ok=True)


def test_cells_of_a_table_fill_templates_and_rules(tmp_path: Path) -> None:
    write_table(
        tmp_path,
        "1.2.3,CT,CT NECK,90,./p1/a",
        "1.2.4,MR,ax t1 post gad,40,./p1/b",
        "1.2.5,mr,T2 AX,2,./p2/a",
        "1.2.6,RTSTRUCT,contours,1,./p2/b",
        "1.2.3,CT,CT NECK,90,./p1/a-again",
    )
    found = find_sources(of_series(), tmp_path)
    assert [(s.key, s.path, s.subject, s.modality, s.upstream_modality) for s in found] == [
        ("1.2.3", "p1/a-again", "p1", "CT", "CT"),
        ("1.2.4", "p1/b", "p1", "MRI/T1c", "MRI/T1"),
        ("1.2.5", "p2/a", "p2", "MRI/T2", "MRI/T2"),
    ]
    assert [s.exclude and s.exclude[0] for s in found] == [None, None, "declared"]
    assert found[2].exclude is not None
    assert found[2].exclude[1].startswith("no volume. ")


def test_a_description_that_no_rule_knows_is_shown(tmp_path: Path) -> None:
    write_table(tmp_path, "1.2.3,MR,SCOUT,90,p1/a")
    with pytest.raises(SetupError, match=r"no `modality` rule .* matches p1/a \(description 'SCOUT'\)"):
        find_sources(of_series(), tmp_path)


def test_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("Series UID,Modality,File Location\n")
    with pytest.raises(SetupError, match="no column 'Series Description', only: series uid, modality"):
        find_sources(of_series(), tmp_path)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            {"modality": [{"match": "x", "field": "series", "modality": "CT"}]},
            "`modality` uses the field 'series'",
        ),
        ({"share_among": "{series}"}, "share_among '{series}' uses {series}; allowed: {patient}, {name}"),
        ({"volumes": ["CT"]}, "one of `modality`, `volumes` and `channels`"),
        ({"modality": None}, "one of `modality`, `volumes` and `channels`"),
        (
            {"spec": {"exclusions": [{"match": "x", "field": "n", "reason": "y"}]}},
            "`exclusions` uses the field 'n'",
        ),
    ],
)
def test_rules_name_only_fields_that_exist(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|one of") as caught:
        spec_of(**group)
    assert message in str(caught.value)


def channels(root: Path, told: object) -> list[ImageSource]:
    (root / "p1").mkdir(exist_ok=True)
    (root / "p1/a.nii.gz").touch()
    (root / "dataset.json").write_text(told if isinstance(told, str) else json.dumps(told))
    names = {"CT": "CT", "T2": "MRI/T2", "ADC": "MRI/ADC"}
    return find_sources(spec_of(modality=None, channels={"file": "dataset.json", "names": names}), root)


def test_dataset_json_names_the_channels(tmp_path: Path) -> None:
    (several,) = channels(tmp_path, {"modality": {"0": "T2", "1": "ADC "}})
    assert several.modalities == several.volume_modalities == ("MRI/T2", "MRI/ADC")
    (one,) = channels(tmp_path, {"channel_names": {"0": "ct"}, "modality": {"0": "T2"}})
    assert one.modalities == ("CT",)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "must be JSON with `modality`"),
        ("[]", "must be JSON with `modality`"),
        ({"modality": {"1": "CT"}}, "must be JSON with `modality`"),
        ({"modality": {"0": "PET"}}, "names the channel 'PET'; known: CT, T2, ADC"),
        ({"modality": {}}, "names no channel; known: CT"),
    ],
)
def test_a_dataset_json_that_does_not_serve(tmp_path: Path, told: object, message: str) -> None:
    with pytest.raises(SetupError, match=r"dataset\.json") as caught:
        channels(tmp_path, told)
    assert message in str(caught.value)


def test_no_dataset_json(tmp_path: Path) -> None:
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1/a.nii.gz").touch()
    with pytest.raises(SetupError, match=r"has no dataset\.json"):
        find_sources(spec_of(modality=None, channels={"file": "dataset.json", "names": {"CT": "CT"}}), tmp_path)


def test_files_of_one_group_share_a_weight(tmp_path: Path) -> None:
    for name in ("p1/DTI-01", "p1/DTI-02", "p1/DTI-03", "p1/DTI-04", "p2/DTI-01"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    spec = spec_of(
        share_among="{patient}",
        spec={"sampling_weight": 0.5, "exclusions": [{"match": "p1/DTI-04", "reason": "moved"}]},
    )
    weights = [source.weight for source in find_sources(spec, tmp_path)]
    assert weights[:3] == pytest.approx([0.5 * 5 / 9] * 3)
    assert weights[4] == 0.5


@given(count=st.integers(1, 300), weight=st.floats(0.001, 10))
def test_volumes_of_a_file_weigh_between_one_and_two(count: int, weight: float) -> None:
    def total(share: Any) -> float:
        source = ImageSource(
            dataset="own", key="a", subject="a", path="a", root=Path(), format="nifti", dimension=3,
            modality="MRI", weight=weight, share_weight=share,
        )  # fmt: skip
        return sum(source.volume_weight(index, count) for index in range(count)) / weight

    assert total(False) == pytest.approx(count)
    assert total(True) == pytest.approx(2 - 1 / count)
    assert 1 <= total(True) < 2
    rest = count - 1
    assert total("after-first") == pytest.approx(1 + (rest * shared_weight(rest) if rest else 0))


def test_of_copies_the_first_is_kept(tmp_path: Path) -> None:
    """Groups in their order, then globs in theirs: not the order of keys."""
    files = {"b/z": b"one", "a/y": b"one", "a/x": b"two", "c/w": b"ten", "a/longer": b"one more"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").write_bytes(content)
    spec = spec_of(globs=["b/*.nii.gz", "*/*.nii.gz"], spec={"one_copy": True})
    found = find_sources(spec, tmp_path)
    assert [source.key for source in found] == ["a-longer", "a-x", "a-y", "b-z", "c-w"]
    assert [source.exclude for source in found if source.exclude] == [
        ("duplicate", "it has the same bytes as b/z.nii.gz, which is kept.")
    ]
    assert found[2].exclude is not None


def test_catalog_rows_of_volumes_with_modalities_of_their_own(tmp_path: Path) -> None:
    """Through the command: modality and weight per volume, held-out subjects per modality, a wrong count."""
    noise = np.random.default_rng(0)
    raw = tmp_path / "raw"
    for case, volumes in {"p1": 2, "p2": 2, "p3": 3}.items():
        voxels = noise.integers(0, 900, (9, 10, 5, volumes), dtype=np.int16)
        (raw / "Own" / case).mkdir(parents=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 3, 1])), raw / "Own" / case / "image.nii.gz")
    (raw / "Own/p4").mkdir()
    shutil.copy(raw / "Own/p1/image.nii.gz", raw / "Own/p4/image.nii.gz")
    spec = spec_of(
        modality=None, volumes=["MRI/T2", "MRI/ADC"], share_weight="after-first", spec={"one_copy": True}
    )
    (raw / "datasets.yaml").write_text(json.dumps([spec.model_dump(mode="json", exclude_unset=True)]))

    result = run("pumit-data", "ingest", "own", "--raw", raw, "--data", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    rows = load_catalog(Corpus(tmp_path / "data"), status=None).to_pylist()
    told = {row["key"]: (row["modality"], row["status"], row["reason"]) for row in rows}
    assert told == {
        "p1-image#0000": ("MRI/T2", "ingested", None),
        "p1-image#0001": ("MRI/ADC", "ingested", None),
        "p2-image#0000": ("MRI/T2", "ingested", None),
        "p2-image#0001": ("MRI/ADC", "ingested", None),
        **{f"p3-image#000{index}": ("MRI/T2", "excluded", "volume_count") for index in range(3)},
        "p4-image": ("MRI/T2", "excluded", "duplicate"),
    }
    assert {row["upstream_modality"] for row in rows} == {"MRI/T2", "MRI/ADC"}
    assert {row["sampling_weight"] for row in rows if row["status"] == "ingested"} == {1.0}
