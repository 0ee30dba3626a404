"""Every source of datasets.yaml in its official layout: what is found, and what the catalog then says."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from catalog.corpus import Corpus
from catalog.query import load_catalog
from ingest.check import check_dataset
from ingest.discover import dataset_root
from ingest.found import find_sources
from ingest.source import ImageSource
from ingest.spec import get_spec, load_specs
from tests.commands import run
from tests.layouts.official import Found, Release, described, load_release

SOURCES = [dataset for dataset in load_specs() if dataset != "sample"]
"""`sample` is real in every checkout, with a test of its own."""
WITHOUT_LABELS = {
    "chexpert",
    "ixi",
    "kaggle-rdc",
    "nctct",
    "nih-chestxray",
    "pelvixnet",
    "prostate-diagnosis",
    "prostate-mri",
    "rsna-2020-ped",
    "stoic",
}
"""Sources whose publishers label images by tables, or not at all: no image-like file beside them is a label."""


def test_every_source_has_a_description_and_every_description_a_source() -> None:
    assert set(described()) == set(SOURCES)


@pytest.mark.parametrize("dataset", SOURCES)
def test_labels_lie_beside_the_images_of_a_source_that_has_them(dataset: str) -> None:
    assert ("label" in load_release(dataset).beside.values()) == (dataset not in WITHOUT_LABELS)


@pytest.mark.parametrize("dataset", SOURCES)
def test_discovery_finds_exactly_the_images(dataset: str, tmp_path: Path) -> None:
    found_as_described(dataset, load_release(dataset), tmp_path)


@pytest.mark.parametrize("dataset", SOURCES)
def test_discovery_finds_the_same_in_every_usual_way_to_unpack(dataset: str, tmp_path: Path) -> None:
    release = load_release(dataset)
    for number, name in enumerate(release.variants):
        found_as_described(dataset, release.variant(name), tmp_path / str(number))


@pytest.mark.parametrize("dataset", SOURCES)
def test_discovery_finds_a_part_that_is_there_alone(dataset: str, tmp_path: Path) -> None:
    release = load_release(dataset)
    for number, part in enumerate(get_spec(dataset).published.parts):
        kept = release.only(part.covers)
        assert kept.found, f"the description has no file of the part {part.name}"
        found_as_described(dataset, kept, tmp_path / str(number))


@pytest.mark.parametrize("dataset", SOURCES)
def test_discovery_knows_names_in_either_unicode_form(dataset: str, tmp_path: Path) -> None:
    release = load_release(dataset)
    names = [get_spec(dataset).folder, *release.found]
    if all(name.isascii() for name in names):
        return  # both forms are one
    found_as_described(dataset, release.decomposed(), tmp_path, form="NFD")


@pytest.mark.parametrize("dataset", SOURCES)
def test_check_explains_every_file_and_sees_a_release_that_lies_too_deep(dataset: str, tmp_path: Path) -> None:
    release, spec = load_release(dataset), get_spec(dataset)
    folder = release.write(tmp_path / "raw" / spec.folder)
    checked = check_dataset(spec, tmp_path / "raw")
    assert checked.fine, checked
    assert checked.found == len(release.found)
    assert not {"unexpected", "copy"} & {finding.kind for finding in checked.findings}, checked

    deeper = folder.rename(tmp_path / "release")
    (folder / "download").mkdir(parents=True)
    deeper.rename(folder / "download/release")
    checked = check_dataset(spec, tmp_path / "raw")
    if checked.found == len(release.found):
        return  # its rules take any folder above
    told = [finding.message for finding in checked.findings if finding.must_fix]
    assert any("Move what is in download" in message for message in told), checked


def found_as_described(dataset: str, release: Release, raw: Path, form: Any = "NFC") -> None:
    """Write the release and compare all that discovery says of it."""
    spec = get_spec(dataset)
    folder = release.write(raw / unicodedata.normalize(form, spec.folder))
    root = dataset_root(spec, raw)
    assert root.samefile(folder)
    sources = {source.path: source for source in find_sources(spec, root)}
    files = {path.removesuffix("/"): file for path, file in release.found.items()}
    assert sources.keys() == files.keys()
    for path, file in files.items():
        assert described_by(sources[path], file.volumes) == expected_of(file), path


def described_by(source: ImageSource, volumes: int) -> dict[str, Any]:
    """What discovery says of one file of so many volumes, in the words of a description."""
    modalities = source.volume_modalities or (source.modality,) * volumes
    return {
        "key": source.key,
        "subject": source.subject,
        "modality": modalities,
        "upstream": tuple(source.upstream_modality or modality for modality in modalities),
        "weight": [pytest.approx(source.volume_weight(index, volumes), rel=1e-3) for index in range(volumes)],
        "excluded": source.exclude and source.exclude[0],
    }


def expected_of(file: Found) -> dict[str, Any]:
    seen_at_discovery = file.excluded in ("declared", "duplicate")
    return {
        "key": file.key,
        "subject": file.subject,
        "modality": tuple(file.of_volume("modality", index) for index in range(file.volumes)),
        "upstream": tuple(file.of_volume("upstream", index) for index in range(file.volumes)),
        "weight": [file.of_volume("weight", index) for index in range(file.volumes)],
        "excluded": file.excluded if seen_at_discovery else None,
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[dict[str, Any]]]:
    """Catalog rows by dataset, after one run of the command over all layouts."""
    folder = tmp_path_factory.mktemp("official")
    for dataset in SOURCES:
        load_release(dataset).write(folder / "raw" / get_spec(dataset).folder)
    data = folder / "data"
    result = run("pumit-data", "ingest", *SOURCES, "--raw", folder / "raw", "--data", data, "--json")
    assert result.returncode == 0, result.stderr
    assert [report["dataset"] for report in json.loads(result.stdout)] == SOURCES
    by_dataset: dict[str, list[dict[str, Any]]] = {dataset: [] for dataset in SOURCES}
    for row in load_catalog(Corpus(data), status=None).to_pylist():
        assert row["status"] != "ingested" or (data / "shards" / row["shard_path"] / "zarr.json").is_file()
        by_dataset[row["dataset"]].append(row)
    return by_dataset


@pytest.mark.parametrize("dataset", SOURCES)
def test_the_catalog_has_exactly_the_described_rows(
    dataset: str, rows: Mapping[str, list[dict[str, Any]]]
) -> None:
    expected = {
        row["key"]: row | {"source_path": path.removesuffix("/")}
        for path, file in load_release(dataset).found.items()
        for row in file.rows()
    }
    columns = ["key", "subject", "status", "reason", "modality", "upstream_modality", "source_path"]
    found = {row["key"]: row for row in rows[dataset]}
    assert len(found) == len(rows[dataset])
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert {name: found[key][name] for name in columns} == {name: row[name] for name in columns}
        if row["status"] == "ingested":
            assert found[key]["sampling_weight"] == pytest.approx(row["sampling_weight"], rel=1e-3), key
            assert found[key]["body_part"] == list(get_spec(dataset).body_parts)
