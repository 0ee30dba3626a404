"""Real images in the official folder layout of each dataset, ingested by the command a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from catalog.corpus import Corpus
from catalog.query import load_catalog
from ingest.discover import find_sources
from ingest.spec import get_spec
from tests.commands import run
from tests.layouts.releases import write_layout

MODALITIES = {"amos": {"CT", "MRI"}, "busi": {"US"}, "lidc-idri": {"CT"}, "nih-chestxray": {"XR"}}


@pytest.mark.parametrize("dataset", MODALITIES)
def test_ingest_of_an_official_layout(dataset: str, tmp_path: Path, samples: Path) -> None:
    root = write_layout(dataset, tmp_path / "raw", samples)
    sources = find_sources(get_spec(dataset), root)
    result = run(
        "pumit-data", "ingest", dataset, "--raw", tmp_path / "raw", "--data", tmp_path / "data", "--json"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)[0]
    assert report["sources_found"] == len(sources)

    rows = load_catalog(Corpus(tmp_path / "data"), status=None).to_pylist()
    assert {row["source_path"] for row in rows} == {source.path for source in sources}
    ingested = [row for row in rows if row["status"] == "ingested"]
    assert {row["modality"] for row in ingested} == MODALITIES[dataset]
    assert all(row["reason"] == "declared" for row in rows if row["status"] != "ingested")
    for row in ingested:
        weight = get_spec(dataset).sampling_weight
        assert row["sampling_weight"] == pytest.approx(weight)
        assert (Corpus(tmp_path / "data").shards / row["shard_path"] / "zarr.json").is_file()
        assert "mask" not in row["key"]
        assert "label" not in row["source_path"]
