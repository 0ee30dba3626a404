"""datasets.yaml: what ships is sound, and what is wrong is told by file, entry and field."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from catalog.errors import SetupError
from ingest.spec import DatasetSpec, get_spec, load_specs

REPOSITORY = Path(__file__).resolve().parents[2]

ENTRY: dict[str, Any] = {
    "id": "own-scans",
    "title": "Own scans",
    "folder": "OwnScans",
    "images": [
        {
            "globs": ["*/*.nii.gz"],
            "format": "nifti",
            "dimension": 3,
            "path": r"(?P<patient>[^/]+)/(?P<name>[^/]+)\.nii\.gz",
            "key": "{patient}-{name}",
            "subject": "{patient}",
            "modality": "CT",
        }
    ],
}


def entry(**changes: Any) -> dict[str, Any]:
    return ENTRY | changes


def with_group(**changes: Any) -> dict[str, Any]:
    return entry(images=[ENTRY["images"][0] | changes])


def load(folder: Path, *entries: Any) -> dict[str, DatasetSpec]:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(list(entries), sort_keys=False))
    return load_specs(file)


def problem(folder: Path, *entries: Any) -> str:
    with pytest.raises(SetupError) as caught:
        load(folder, *entries)
    return str(caught.value)


def test_the_shipped_file_is_valid() -> None:
    *published, last = load_specs().values()
    assert {"amos", "busi", "lidc-idri", "nih-chestxray"} <= {spec.id for spec in published}
    assert last.id == "sample"
    assert [spec.dimensions for spec in published] == sorted(spec.dimensions for spec in published)


def test_shipped_facts_agree_with_what_was_gathered(shared: Path) -> None:
    facts = {fact["id"]: fact for fact in yaml.safe_load((shared / "datasets-facts.yaml").read_text())}
    for spec in load_specs().values():
        if spec.id == "sample":
            continue
        fact = facts[spec.id]
        assert spec.folder in (fact["upstream_name"], fact["layout"]["upstream_root"])
        assert spec.sampling_weight == fact["sampling_weight"]
        assert spec.dimensions == [int(fact["dimension"][0])]
        assert spec.body_parts == fact["body_parts"]
        assert spec.licence == fact["licence"]
        known = fact["access"] or {}
        assert spec.access is not None
        assert spec.access.doi == known.get("doi")
        assert (spec.download is None) or "open download" in known["kind"]
        assert (spec.download is None) is bool(spec.access.steps), "a recipe, or steps for a person"
        upstream = {
            rule.upstream_modality or group.upstream_modality or rule.modality
            for group in spec.images
            for rule in group.modality
        }
        for group in spec.images:
            upstream |= {*group.volumes, *(group.channels.names.values() if group.channels else ())}
        # The plain kind is for what no other rule matches, where the reference implementation gives up.
        unforeseen = {"MRI"} | ({"MRI/T1"} if spec.id == "prostate-mri" else set())  # a single series
        assert upstream - unforeseen == set(fact["modalities"]) - unforeseen
        assert (spec.left_out is not None) == fact["excluded_by_default"]


def test_overview_of_an_entry() -> None:
    sample = get_spec("sample")
    assert {modality.split("/")[0] for modality in sample.modalities} == {"CT", "MRI", "XR", "US", "fundus"}
    assert sample.dimensions == [2, 3]
    assert set(sample.formats) == {"nifti", "dicom", "itk", "raster"}
    assert get_spec("amos").modalities == ["MRI", "CT"]


@pytest.mark.parametrize(("wrong", "right"), [("amoss", "amos"), ("AMOS22", "amos"), ("lidc", "lidc-idri")])
def test_unknown_id_names_the_closest_and_all(wrong: str, right: str) -> None:
    with pytest.raises(
        SetupError, match=f"'{wrong}'.*mean '{right}'.*amos, .*busi, .*lidc-idri, .*nih-chestxray, .*sample"
    ):
        get_spec(wrong)


def test_constant_modality_and_rules_mean_the_same(tmp_path: Path) -> None:
    short = load(tmp_path, ENTRY)["own-scans"]
    long = load(tmp_path, with_group(modality=[{"match": "", "modality": "CT"}]))["own-scans"]
    assert short == long
    assert short.entry_hash() == long.entry_hash()


def test_entries_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        get_spec("amos").title = "changed"


@pytest.mark.parametrize(
    ("changed", "same_hash"),
    [
        (entry(title="Another title"), True),
        (
            entry(
                licence="CC0",
                access={"kind": "registration", "host": "a shelf"},
                download={"tcia": "Brains"},
                citation=[{"authors": "Body, Some", "title": "Scans", "year": 2020}],
            ),
            True,
        ),
        (entry(ignore=["_seg"]), True),
        (entry(sampling_weight=1), True),
        (entry(sampling_weight=0.5), False),
        (entry(exclusions=[{"match": "p7/", "reason": "withdrew consent"}]), False),
        (with_group(modality="MRI"), False),
        (with_group(depth_axis="SI"), False),
        (with_group(subject="{name}"), False),
        (with_group(upstream_modality="ct"), False),
        (with_group(body_parts=["chest"]), False),
        (entry(id="other-scans"), False),
    ],
)
def test_entry_hash_follows_what_shapes_the_result(
    tmp_path: Path, changed: dict[str, Any], same_hash: bool
) -> None:
    before = load(tmp_path, ENTRY)["own-scans"].entry_hash()
    (spec,) = load(tmp_path, changed).values()
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert (spec.entry_hash() == before) is same_hash


@pytest.mark.parametrize(
    ("wrong", "field", "message"),
    [
        (entry(id="Own Scans"), "id", "pattern"),
        (entry(titel="x"), "", "unknown field 'titel'; did you mean 'title'? allowed: id, title"),
        (entry(folder="../other"), "folder", "'../other' must be relative"),
        (entry(folder="a//b"), "folder", "must be relative"),
        (entry(sampling_weight=0), "sampling_weight", "greater than 0, not 0"),
        (entry(sampling_weight=float("nan")), "sampling_weight", "finite"),
        (entry(access={"kind": "maybe"}), "access.kind", "'included' or 'unknown', not 'maybe'"),
        (entry(access={"kind": "unknown", "page": "http://x.org"}), "access.page", "https"),
        (entry(download={}), "download", "exactly one of `zenodo`, `figshare`, `files`, `tcia` and `s3`"),
        (entry(download={"zenodo": [1], "tcia": "A"}), "download", "exactly one of"),
        (entry(download={"files": [{"url": "ftp://x.org/a"}]}), "download.files[0].url", "https"),
        (entry(download={"zenodo": [1], "into": "../up"}), "download.into", "'..'"),
        (entry(images=[]), "images", "at least one"),
        (
            entry(exclusions=[{"match": "(", "reason": "x"}]),
            "exclusions[0].match",
            "'(' is no regular expression",
        ),
        (entry(exclusions=[{"match": "x"}]), "exclusions[0].reason", "Field required"),
        (with_group(format="nifty"), "images[0].format", "'nifti', 'dicom', 'itk' or 'raster', not 'nifty'"),
        (with_group(dimension=4), "images[0].dimension", "2 or 3, not 4"),
        (with_group(depth_axis="z"), "images[0].depth_axis", "'SI', 'AP' or 'LR', not 'z'"),
        (with_group(modality="MR"), "images[0].modality[0].modality", "'MR' must be one of CT, MRI, PET, XR"),
        (with_group(modality=[]), "images[0]", "one of `modality`, `volumes` and `channels`"),
        (with_group(path="("), "images[0].path", "no regular expression"),
        (with_group(key="{case}"), "images[0]", "key '{case}' uses {case}; allowed: {patient}, {name}"),
        (with_group(key="{name.__class__}"), "images[0]", "allowed: {patient}, {name}"),
        (with_group(key="{name!r}"), "images[0]", "allowed"),
        (with_group(subject="{"), "images[0]", "is no template"),
        (with_group(globs=["/data/*.nii"]), "images[0].globs[0]", "must be relative"),
        (with_group(globs=["../*.nii"]), "images[0].globs[0]", "must be relative"),
        (with_group(globs=["a\\*.nii"]), "images[0].globs[0]", "forward slashes"),
        (with_group(globs=["a**/*.nii"]), "images[0].globs[0]", "'**' must stand alone"),
        (with_group(globs=["a/**"]), "images[0].globs[0]", "not at the end"),
        (with_group(globs=["a/*/"]), "images[0]", "only format 'dicom'"),
        (with_group(globs=[]), "images[0]", "either `globs` or `table`"),
        (
            with_group(table={"files": ["metadata.csv"], "folder_column": "File Location"}),
            "images[0]",
            "either `globs` or `table`",
        ),
    ],
)
def test_errors_name_file_entry_field_and_what_is_allowed(
    tmp_path: Path, wrong: dict[str, Any], field: str, message: str
) -> None:
    told = problem(tmp_path, wrong)
    assert len(told.splitlines()) == 1
    where = f"{tmp_path / 'own.yaml'}: entry {wrong['id']!r}"
    assert told.startswith(f"{where}, {field}: " if field else f"{where}: ")
    assert message in told


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    told = problem(tmp_path, entry(title=""), entry(id="other", licence=3), "nonsense").splitlines()
    assert len(told) == 3
    assert "entry 'own-scans', title" in told[0]
    assert "entry 'other', licence" in told[1]
    assert "entry number 3" in told[2]


def test_an_id_may_stand_once(tmp_path: Path) -> None:
    assert "entry 'own-scans': the id is used twice" in problem(tmp_path, ENTRY, ENTRY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- id: a\n  title: x\n  title: y\n", "line 3: the key 'title' stands twice"),
        ("- id: [a\n", "line 2"),
        ("id: a\n", "must be a list"),
        ("", "must be a list"),
        ("- !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_no_list_of_entries(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(SetupError) as caught:
        load_specs(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [None, b"- id: \xff\xfe"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "own.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SetupError, match=r"own\.yaml: cannot be read"):
        load_specs(file)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    group = yaml.safe_dump(ENTRY["images"][0], default_flow_style=True).strip()
    file.write_text(
        f"- id: own\n  title: Own\n  folder: Own\n  images:\n    - &first {group}\n"
        "    - {<<: *first, modality: MRI, globs: ['*/*.nii']}\n"
    )
    assert load_specs(file)["own"].modalities == ["CT", "MRI"]


def test_an_installed_package_finds_its_own_copy(tmp_path: Path) -> None:
    """As the wheel lays it out: the file lies inside the package, no checkout is near."""
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as wheel:
        for file in [
            "catalog/__init__.py",
            "catalog/errors.py",
            *(f"ingest/{n}.py" for n in ("spec", "source", "declared", "access", "citation")),
        ]:
            wheel.write(REPOSITORY / file, file)
        wheel.write(REPOSITORY / "ingest/__init__.py", "ingest/__init__.py")
        wheel.write(REPOSITORY / "datasets.yaml", "ingest/datasets.yaml")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(tmp_path / "site")
    path = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})"
    code = f"{path}; import ingest.spec as s; print(*s.load_specs())"
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert shown.stdout.split() == list(load_specs())
