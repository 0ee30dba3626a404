"""overrides.yaml: what it says is checked, done to just the images it names, and undone to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catalog.corpus import Corpus
from catalog.errors import SetupError
from ingest.overrides import (
    Override,
    Overrides,
    append_overrides,
    as_text,
    from_text,
    load_overrides,
    overrides_file,
    source_key,
)
from ingest.run import plan_ingest
from ingest.verify import verify
from tests.commands import published_files, run
from tests.demo import DEMO, ingest_demo

PICTURES = 9


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three volumes, a file with four volumes, a file that cannot be read, and pictures that share a pack."""
    folder = tmp_path / "raw" / "demo"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in {"a": (9, 8, 7), "b": (9, 8, 7), "c": (9, 8, 7), "series": (9, 8, 7, 4)}.items():
        voxels = rng.integers(1, 1000, shape, dtype=np.int16)
        nib.Nifti1Image(voxels, np.diag([0.5, 0.5, 2.0, 1.0])).to_filename(folder / f"{name}.nii.gz")
    (folder / "torn.nii.gz").write_bytes(b"\x1f\x8b")
    for number in range(PICTURES):
        pixels = rng.integers(1, 255, (30, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}.png")
    return tmp_path / "raw"


def override(raw: Path, *entries: dict[str, Any]) -> None:
    complete = [{"dataset": "demo", "reason": "seen"} | entry for entry in entries]
    overrides_file(raw).write_text(yaml.safe_dump(complete))


def outcomes(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {key: row["reason"] or row["status"] for key, row in rows.items()}


def done(report: Any) -> int:
    return int(report.sources_found - report.sources_skipped)


def test_volumes_go_and_come_back_alone(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    _, before = ingest_demo(raw, data, monkeypatch)
    files = published_files(data)
    override(raw, {"key": "a"}, {"key": "series#0002", "reason": "moved", "finding": "mostly_empty"})
    report, after = ingest_demo(raw, data, monkeypatch)
    assert done(report) == 3  # the two, and the one that failed
    changed = {key for key, reason in outcomes(after).items() if reason != outcomes(before)[key]}
    assert changed == {"a", "series#0002"}
    assert {after[key]["reason"] for key in changed} == {"excluded_by_user"}
    assert after["series#0002"]["message"].startswith(
        "demo/series (series.nii.gz), volume 2: moved (mostly_empty)."
    )
    assert after["series#0002"]["original_shape"] == [9, 8, 7]
    for key in before.keys() - changed:
        hashed = {"entry_hash": None}  # all volumes of a file were decided together
        assert after[key] | hashed == before[key] | hashed
    assert not (data / "shards" / before["a"]["shard_path"]).exists()
    assert sum(report.total.values()) == len(before)
    report, _ = ingest_demo(raw, data, monkeypatch)
    assert done(report) == 1
    override(raw, {"key": "a", "reason": "another"}, {"key": "series#0002", "reason": "moved", "finding": "x"})
    report, again = ingest_demo(raw, data, monkeypatch)
    assert done(report) == 3
    assert "another" in again["a"]["message"]
    overrides_file(raw).unlink()
    report, _ = ingest_demo(raw, data, monkeypatch)
    assert done(report) == 3
    assert published_files(data) == files


def test_a_picture_leaves_its_pack_and_comes_back(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    _, before = ingest_demo(raw, data, monkeypatch)
    files = published_files(data)
    override(raw, {"glob": "p[35]"})
    report, after = ingest_demo(raw, data, monkeypatch)
    assert done(report) == PICTURES + 1
    assert {key for key, why in outcomes(after).items() if why == "excluded_by_user"} == {"p3", "p5"}
    assert {tuple(row["shard_shape"]) for key, row in after.items() if row["shard_index"] is not None} == {
        (PICTURES - 2, 1, 30, 40)
    }
    assert not (data / "shards" / before["p3"]["shard_path"]).exists()  # nobody can look at them any more
    fresh = tmp_path / "fresh"
    ingest_demo(raw, fresh, monkeypatch)
    assert published_files(fresh) == published_files(data)
    override(raw)
    plan = plan_ingest(DEMO, raw, Corpus(data), only="p3")
    assert (plan.selected, plan.pending) == (PICTURES, PICTURES)
    ingest_demo(raw, data, monkeypatch)
    assert published_files(data) == files


def test_what_cannot_be_read_may_be_left_out(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    override(raw, {"key": "torn"})
    report, rows = ingest_demo(raw, tmp_path / "data", monkeypatch)
    assert rows["torn"]["reason"] == "excluded_by_user"
    assert not report.messages
    report, _ = ingest_demo(raw, tmp_path / "data", monkeypatch)
    assert done(report) == 0


def test_verify_compares_overrides(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override(raw, {"key": "a"}, {"glob": "ser*#0001"})
    ingest_demo(raw, tmp_path / "data", monkeypatch)
    corpus, specs = Corpus(tmp_path / "data"), {"demo": DEMO}

    def found(overrides: dict[str, Overrides] | None) -> list[tuple[str, str, int]]:
        findings = verify(corpus, specs, overrides=overrides, workers=1).findings
        return [(finding.kind, finding.problem, finding.images) for finding in findings]

    present = load_overrides(overrides_file(raw))
    assert found(present) == found(None) == []
    assert any("overrides.yaml" in note for note in verify(corpus, specs, overrides=None, workers=1).notes)
    ((kind, problem, images),) = found({})
    assert (kind, images) == ("stale", 5)  # `a`, and the four volumes of `series`
    assert "overrides.yaml" in problem
    override(raw, {"key": "a"}, {"glob": "ser*#0001"}, {"key": "b"})
    assert [images for _, _, images in found(load_overrides(overrides_file(raw)))] == [1]


def test_an_entry_that_names_nothing_is_told_of(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    override(raw, {"key": "a"}, {"key": "nobody"}, {"glob": "x*"})
    plan_ingest(DEMO, raw, Corpus(tmp_path / "data"))
    assert [record.getMessage() for record in caplog.records] == [
        "overrides.yaml: demo has no image nobody; the entry does nothing.",
        "overrides.yaml: demo has no image x*; the entry does nothing.",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {dataset: sample, key: a}", ["entry 1", "reason"]),
        ("- {dataset: sample, reason: r}", ["entry 1", "`key` or `glob`"]),
        ("- {dataset: sample, reason: r, key: a, glob: b}", ["entry 1", "`key` or `glob`"]),
        ("- {dataset: sample, reason: r, key: a, action: keep}", ["entry 1", "action", "'exclude'"]),
        ("- {dataset: sample, reason: r, kye: a}", ["entry 1", "'kye'", "'key'"]),
        ("- {dataset: sampel, reason: r, key: a}", ["entry 1, dataset", "'sampel'", "'sample'"]),
        ("- {dataset: sample, reason: r, key: 7}", ["entry 1", "key"]),
        ("dataset: sample", ["must be a list"]),
        ("- {dataset: sample, key: a, key: b, reason: r}", ["'key' stands twice"]),
        ("- [", ["line"]),
    ],
)
def test_a_wrong_file_stops_before_anything_is_done(
    tmp_path: Path, samples: Path, text: str, words: list[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "samples").symlink_to(samples)
    (raw / "overrides.yaml").write_text(text)
    result = run("pumit-data", "ingest", "sample", "--raw", raw, "--data", tmp_path / "data")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()
    for word in [*words, "overrides.yaml"]:
        assert word in result.stderr


@pytest.mark.slow
def test_keys_of_private_datasets_are_ids(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from catalog.query import load_catalog

    entry = DEMO.model_dump(mode="json", exclude_defaults=True, exclude={"exclusions"})
    group = {"globs": ["?.nii.gz"], "format": "nifti", "dimension": 3, "path": r"(?P<name>\w)\.nii\.gz"}
    own = entry | {"id": "own-scans", "images": [group | {"key": "{name}", "modality": "CT"}]}
    (raw / "datasets.yaml").write_text(yaml.safe_dump([own]))
    data = tmp_path / "data"
    arguments = ("pumit-data", "ingest", "own-scans", "--raw", raw, "--data", data)
    assert run(*arguments).returncode == 0
    keys = load_catalog(Corpus(data), ["key"])["key"].to_pylist()
    files = published_files(data)
    override(raw, {"dataset": "own-scans", "key": keys[1]})
    assert run(*arguments).returncode == 0
    table = load_catalog(Corpus(data), ["key", "reason", "message"], status="excluded").to_pylist()
    assert [row["key"] for row in table] == [keys[1]]
    assert ".nii" not in table[0]["message"]
    assert run("pumit-data", "verify", "--raw", raw, "--data", data).returncode == 0
    overrides_file(raw).unlink()
    assert run("pumit-data", "verify", "--raw", raw, "--data", data).returncode == 1
    assert run(*arguments).returncode == 0
    assert published_files(data) == files


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(deadline=None)
@given(names, names, st.text(max_size=40))
def test_what_is_appended_is_read_again(tmp_path_factory: Any, key: str, reason: str, comment: str) -> None:
    file = tmp_path_factory.mktemp("overrides") / "overrides.yaml"
    entry = Override(dataset="demo", key=key, reason=reason)
    assert append_overrides(file, [(entry, comment), (entry, comment)]) == (1, 1)
    assert append_overrides(file, [(Override(dataset="demo", key=key + "!", reason="r"), comment)]) == (1, 0)
    (first, _) = load_overrides(file)["demo"].entries
    assert first == entry
    verdict = Overrides((entry,)).of(source_key(key))
    assert from_text(as_text(verdict)) == verdict
    assert verdict


def test_a_file_that_leaves_no_room_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "overrides.yaml"
    file.write_text("[]")
    with pytest.raises(SetupError):
        append_overrides(file, [(Override(dataset="demo", key="a", reason="r"), "")])
    assert file.read_text() == "[]"
