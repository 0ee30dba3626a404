"""From raw images to findings and back: broken scans are found, left out, and come back to the same bytes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from PIL import Image

from catalog.corpus import Corpus
from catalog.doctor.codes import CODES
from catalog.doctor.examine import Diagnosis, diagnose
from ingest.overrides import load_overrides, overrides_file
from ingest.verify import verify
from tests.commands import published_files, run
from tests.demo import DEMO, ingest_demo

WHOLE, PICTURES = 44, 24


def scans(raw: Path, samples: Path) -> Path:
    """Parts of a real chest CT and of a real radiograph, each another, and of each kind of fault one."""
    folder = raw / "demo"
    folder.mkdir(parents=True)
    chest = nib.load(samples / "CT/totalsegmentator/chest.nii.gz")
    voxels, spacing = np.asarray(chest.dataobj)[::2, ::2, ::2], chest.header.get_zooms()[0] * 2
    side = [size - 6 for size in voxels.shape]

    def write(name: str, part: np.ndarray, factors: tuple[float, float, float] = (1, 1, 1)) -> None:
        affine = np.diag([-spacing * factors[0], -spacing * factors[1], 1.5 * spacing * factors[2], 1.0])
        nib.Nifti1Image(part, affine).to_filename(folder / f"{name}.nii.gz")

    def part(number: int) -> np.ndarray:
        start = [number % 3, number // 3 % 3, number // 9]
        return voxels[*(slice(a, a + b) for a, b in zip(start, side, strict=True))].copy()

    for number in range(WHOLE):
        write(f"ct-{number:02}", part(number))
    write("ct-centimetres", part(1), (1, 1, 10))
    write("ct-no-intercept", (part(2) + np.int16(1024)).clip(0))
    write("ct-turned", np.ascontiguousarray(part(3).transpose(2, 0, 1)[:20]))
    empty = np.full(side, -1024, np.int16)
    empty[20:26, 20:26, 8:12] = part(4)[20:26, 20:26, 8:12]
    write("ct-empty", empty)
    grey = np.asarray(Image.open(next((samples / "XR").glob("*/chest.png"))).convert("L"))
    for number in range(PICTURES):
        Image.fromarray(grey[number : 120 + number, :110]).save(folder / f"xr-{number:02}.png")
    rng = np.random.default_rng(0)
    noisy = np.repeat(grey[:120, :110, None].astype(int), 3, axis=2) + rng.integers(-2, 3, (120, 110, 3))
    Image.fromarray(noisy.clip(1, 255).astype(np.uint8)).save(folder / "xr-colour.png")
    return raw


EXPECTED = {
    ("ct_masked", "ct-empty"),
    ("spacing_outlier", "ct-centimetres"),
    ("ct_intercept", "ct-no-intercept"),
    ("intensity_outlier", "ct-no-intercept"),
    ("shape_outlier", "ct-turned"),
    ("mostly_empty", "ct-empty"),
    ("shape_outlier", "ct-empty"),
    ("intensity_outlier", "ct-empty"),
    ("grey_as_colour", "xr-colour"),
}


def told(found: Diagnosis) -> set[tuple[str, str]]:
    return {(finding.code, suspect.key) for finding in found.findings for suspect in finding.suspects}


def test_broken_scans_are_found_left_out_and_taken_back(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, data = scans(tmp_path / "raw", samples), tmp_path / "data"
    _, before = ingest_demo(raw, data, monkeypatch)
    assert all(row["status"] == "ingested" for row in before.values())
    files = published_files(data)
    found = diagnose(Corpus(data))
    assert told(found) == EXPECTED
    assert {finding.typical for finding in found.findings} <= before.keys()

    file = overrides_file(raw)
    page = tmp_path / "suspects.html"
    codes = sorted({code for code, _ in EXPECTED})
    excluded = [argument for code in codes for argument in ("--exclude", f"{code}:demo")]
    result = run("pumit-data", "doctor", "--data", data, *excluded, "--write-overrides", file, "--out", page)
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert text.count("<img ") == len(EXPECTED) + len(
        {(code, key[:2]) for code, key in EXPECTED}
    )  # and of each finding a usual image
    keys = {key for _, key in EXPECTED}
    assert {entry.key for entry in load_overrides(file)["demo"].entries} == keys

    report, after = ingest_demo(raw, data, monkeypatch)
    # Of the pictures, which share a pack, the others are written again; of the volumes none.
    assert report.sources_found - report.sources_skipped == len(keys) + PICTURES
    assert {key for key, row in after.items() if row["status"] == "excluded"} == keys
    assert {row["reason"] for key, row in after.items() if key in keys} == {"excluded_by_user"}
    assert sum(report.total.values()) == len(before) == WHOLE + PICTURES + 5
    assert not told(diagnose(Corpus(data)))
    overrides = load_overrides(file)
    assert not verify(Corpus(data), {"demo": DEMO}, overrides=overrides, deep=True, workers=1).findings
    assert {path for path in files if path.startswith("shards/demo/ct-")} > {
        path for path in published_files(data) if path.startswith("shards/demo/ct-")
    }

    file.unlink()
    stale = verify(Corpus(data), {"demo": DEMO}, overrides={}, workers=1).findings
    assert [(finding.kind, finding.images) for finding in stale] == [("stale", len(keys))]
    ingest_demo(raw, data, monkeypatch)
    assert published_files(data) == files
    report, _ = ingest_demo(raw, data, monkeypatch)
    assert report.sources_skipped == report.sources_found
    assert codes <= list(CODES)


def test_the_shipped_images_have_two_true_findings(tmp_path: Path, samples: Path) -> None:
    """A sagittal scan whose pixels are 5 % longer than wide and its slices; ultrasound coloured by its JPEG."""
    arguments = ("sample", "--raw", samples.parent, "--data", tmp_path, "--only", "brain_T1|heart|chest|retina")
    assert run("pumit-data", "ingest", *arguments).returncode == 0
    found = {(code, key.partition("#")[0]) for code, key in told(diagnose(Corpus(tmp_path)))}
    assert found == {("depth_rule_disagrees", "datalad-brain_T1"), ("grey_as_colour", "pydicom-echo-heart")}


def test_the_command_in_every_form(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, data = scans(tmp_path / "raw", samples), tmp_path / "data"
    ingest_demo(raw, data, monkeypatch)
    table = run("pumit-data", "doctor", "--data", data)
    assert table.returncode == 0, table.stderr
    for word in ("ct_intercept", "ct-no-intercept", "pumit-data view", "1 of 48"):
        assert word in table.stdout
    told_json = json.loads(run("pumit-data", "doctor", "demo", "--data", data, "--json").stdout)
    assert {
        (finding["code"], suspect["key"])
        for finding in told_json["findings"]
        for suspect in finding["suspects"]
    } == EXPECTED
    lines = run("pumit-data", "doctor", "--data", data, "--csv", "--severity", "error").stdout
    assert [row["key"] for row in csv.DictReader(io.StringIO(lines))] == ["ct-no-intercept"]
    one = run("pumit-data", "doctor", "--data", data, "--code", "mostly_empty", "--json").stdout
    assert [finding["code"] for finding in json.loads(one)["findings"]] == ["mostly_empty"]
    for wrong, word in (
        (["--code", "mostly_emty"], "'mostly_empty'"),
        (["--exclude", "ct_intercept"], "--write-overrides"),
        (["--exclude", "ct_intercept:nothing", "--write-overrides", tmp_path / "o.yaml"], "'nothing'"),
        (["nothing"], "nothing"),
    ):
        result = run("pumit-data", "doctor", "--data", data, *wrong)
        assert result.returncode == 2
        assert word in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "o.yaml").exists()
    file = tmp_path / "overrides.yaml"
    file.write_text("# mine\n- {dataset: demo, key: ct-no-intercept, reason: seen}\n")
    arguments = ("--exclude", "ct_intercept", "--exclude", "mostly_empty", "--write-overrides", file)
    told_of = run("pumit-data", "doctor", "--data", data, *arguments)
    assert "1 images to leave out (1 stood there already)" in told_of.stdout
    assert file.read_text().startswith("# mine\n")
    assert [entry["key"] for entry in yaml.safe_load(file.read_text())] == ["ct-no-intercept", "ct-empty"]
