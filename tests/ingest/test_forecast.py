"""What `pumit-data plan` says before, between and after: known figures are right, unknown ones stay unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from catalog.corpus import Corpus
from ingest.forecast import FLAT_LEVEL, Figure, Forecast, Speeds, forecast, total
from ingest.probe import FileKind, Speed, measure
from ingest.spec import DatasetSpec, own_file
from tests.commands import run

ENTRY: dict[str, Any] = {
    "id": "thing",
    "title": "Things",
    "folder": "Thing",
    "images": [
        {
            "globs": ["*.png"],
            "format": "raster",
            "dimension": 2,
            "path": r"(?P<name>.+)\.png",
            "key": "{name}",
            "modality": "XR",
        }
    ],
}


class KnownSpeeds(Speeds):
    """2 MB in a second of one core, and half as many bytes prepared."""

    def of(self, kind: FileKind) -> Speed:
        return Speed(2e6, 0.5)


def spec(**changes: Any) -> DatasetSpec:
    return DatasetSpec.model_validate(ENTRY | changes)


def told(entry: DatasetSpec, folder: Path) -> Forecast:
    return forecast(entry, folder / "raw", Corpus(folder / "data"), KnownSpeeds(workers=4))


def test_nothing_is_invented(tmp_path: Path) -> None:
    one = told(spec(), tmp_path)
    assert (one.state, one.access, one.licence) == ("absent", "unknown", None)
    figures = (one.images, one.raw_bytes, one.raw_bytes_missing, one.prepared_bytes, one.hours)
    assert figures == (None,) * 5
    assert one.modalities == {"XR": None}
    assert one.da_levels == {}


def test_published_figures_are_taken(tmp_path: Path) -> None:
    one = told(spec(published={"images": 400, "gigabytes": 28.8}), tmp_path)
    assert one.images == Figure(400, "published")
    assert one.raw_bytes == Figure(28.8e9, "published")
    assert one.raw_bytes_missing == 28.8e9
    assert one.prepared_bytes == Figure(14.4e9, "estimated")
    assert one.hours == Figure(1.0, "estimated")  # 28.8e9 bytes / (4 cores x 2e6 bytes/s) = 3600 s
    assert one.modalities == {"XR": 400}
    assert one.da_levels == {FLAT_LEVEL: 400}


def test_sizes_of_the_download_are_a_lower_bound_that_says_so(tmp_path: Path) -> None:
    files = [{"url": "https://example.org/a.zip", "size": 1000}, {"url": "https://example.org/b.zip"}]
    assert told(spec(download={"files": files}), tmp_path).raw_bytes is None
    files[1]["size"] = 500
    assert told(spec(download={"files": files}), tmp_path).raw_bytes == Figure(1500, "download")
    assert told(spec(download={"zenodo": [1], "gigabytes": 2}), tmp_path).raw_bytes == Figure(2e9, "download")


def test_what_is_on_disk_counts_more_than_what_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "Thing"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("L", (40, 30), 128).save(folder / f"{name}.png")
    (folder / "labels.txt").write_bytes(bytes(1000))
    one = told(spec(published={"images": 400, "gigabytes": 1}), tmp_path)
    pictures = sum(path.stat().st_size for path in folder.glob("*.png"))
    assert (one.state, one.images, one.raw_bytes_missing) == ("on disk", Figure(2, "on disk"), 0)
    assert one.raw_bytes == Figure(pictures + 1000, "on disk")
    assert one.hours is not None
    assert one.hours.value == pytest.approx(pictures / 2e6 / 4 / 3600), "labels are not ingested"


def test_a_folder_that_cannot_be_ingested_is_told(tmp_path: Path) -> None:
    (tmp_path / "raw" / "Thing").mkdir(parents=True)
    (tmp_path / "raw" / "Thing" / "readme.txt").touch()
    one = told(spec(), tmp_path)
    assert one.state == "absent"
    assert "no image found" in str(one.problem)


def test_an_unfinished_download_is_told(tmp_path: Path) -> None:
    (tmp_path / "raw" / ".pumit-download" / "thing").mkdir(parents=True)
    assert told(spec(), tmp_path).state == "part downloaded"


def test_totals_tell_how_many_are_unknown(tmp_path: Path) -> None:
    known = told(spec(published={"images": 300, "gigabytes": 1}, sampling_weight=0.5), tmp_path)
    volumes = ENTRY["images"][0] | {"modality": "CT", "dimension": 3, "format": "nifti"}
    scans = told(spec(id="scans", images=[volumes], published={"images": 50}), tmp_path)
    sums = total([known, scans, told(spec(id="dark"), tmp_path)])
    assert sums.figures["images"] == (350, 1)
    assert sums.figures["raw_bytes"] == (1e9, 2)
    assert sums.modalities == {"XR": 300, "CT": 50}
    assert sums.shares == {"XR": 0.75, "CT": 0.25}
    assert sums.da_levels == {FLAT_LEVEL: 300}


@pytest.mark.parametrize("kind", ["nifti", "itk", "dicom", "png", "jpeg"])
def test_every_kind_of_file_can_be_measured(kind: FileKind) -> None:
    speed = measure(kind)
    assert 1e4 < speed.bytes_per_second < 1e11
    assert 0.01 < speed.growth < 10


@pytest.mark.slow
def test_the_command_before_and_after_an_ingest(tmp_path: Path, samples: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    shutil.copytree(samples / "XR", raw / "Thing")
    entry = ENTRY | {
        "images": [ENTRY["images"][0] | {"globs": ["*/*.png"], "path": r"(?P<name>.+)/chest\.png"}],
        "access": {"kind": "registration"},
    }
    absent = ENTRY | {"id": "far-away", "folder": "Far"}
    own_file(raw).write_text(yaml.safe_dump([entry, absent]))
    arguments = ("plan", "thing", "far-away", "--raw", raw, "--data", data)

    before = json.loads(run("pumit-data", *arguments, "--json").stdout)
    assert [one["state"] for one in before["datasets"]] == ["on disk", "absent"]
    assert before["totals"]["raw_bytes"]["unknown_datasets"] == 1
    assert set(before["speeds"]) == {"png"}

    assert run("pumit-data", "ingest", "thing", "--raw", raw, "--data", data).returncode == 0
    after = json.loads(run("pumit-data", *arguments, "--json").stdout)
    [thing, _] = after["datasets"]
    assert thing["state"] == "ingested"
    assert thing["hours"]["value"] == 0
    assert thing["images"] == {"value": len(list(samples.glob("XR/*/chest.png"))), "source": "catalog"}
    audit = json.loads(run("pumit-data", "stats", "--data", data, "--json").stdout)
    assert thing["prepared_bytes"] == {"value": audit["totals"]["stored_bytes"], "source": "catalog"}
    assert thing["da_levels"] == {"5": thing["images"]["value"]}

    shutil.rmtree(raw / "Thing")
    shown = run("pumit-data", *arguments)
    assert shown.returncode == 0, shown.stderr
    assert "ingested" in shown.stdout
    assert "unknown" in shown.stdout


def test_the_command_wants_ids_or_all(tmp_path: Path) -> None:
    for arguments in ((), ("amos", "--all")):
        refused = run("pumit-data", "plan", *arguments, "--raw", tmp_path)
        assert refused.returncode == 2
        assert "--all" in refused.stderr
    listed = json.loads(run("pumit-data", "plan", "--all", "--json", "--raw", tmp_path).stdout)
    assert {"amos", "busi"} <= {one["dataset"] for one in listed["datasets"]}
