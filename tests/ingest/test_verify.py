"""Verify finds every flipped bit, and repair gives back the bytes that were."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ingest.image
import ingest.run
import ingest.verify
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.manifest import publish
from catalog.query import load_catalog
from catalog.schema import CATALOG_SCHEMA, PREVIEW_SCHEMA
from catalog.split import SPLIT_SCHEMA
from catalog.write import catalog_file
from ingest.findings import Verification
from ingest.journal import Journal
from ingest.outline import RawFolder
from ingest.repair import calls_of, repair
from ingest.run import IngestPlan, IngestReport, ingest_dataset, plan_ingest
from ingest.spec import DatasetSpec
from ingest.task import IngestTask, run_task
from ingest.verify import problems_of_row, verify
from shards.check import metadata_forms
from shards.layout import METADATA_FILE, SHARD_FILE, volume_chunk
from tests.commands import published_files, run
from tests.demo import DEMO, NoCluster

REPOSITORY = Path(__file__).resolve().parents[2]
SPECS = {"demo": DEMO}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an ingest run here, not in worker processes."""

    def run_here(tasks: list[IngestTask], client: object) -> Iterator[tuple[IngestTask, Any]]:
        for task in tasks:
            yield task, run_task(task)

    monkeypatch.setattr(ingest.run, "_run_on_cluster", run_here)


def ingest_all(plans: list[IngestPlan], corpus: Corpus) -> list[IngestReport]:
    return [ingest_dataset(plan, corpus, NoCluster(), lambda *_: None) for plan in plans]  # type: ignore[arg-type]


def make_raw(folder: Path) -> Path:
    """Three volumes, six pictures of two kinds, and one file that is left out by name."""
    rng = np.random.default_rng(0)
    demo = folder / "demo"
    demo.mkdir(parents=True)
    for number in range(3):
        voxels = rng.integers(-1000, 1000, (12, 11, 10 + number), np.int16)
        nib.Nifti1Image(voxels, np.diag([0.5, 0.5, 2.0, 1.0])).to_filename(demo / f"ct{number}.nii.gz")
    for number in range(6):
        shape = (30, 20 + number, 3)[: 2 + number % 2]
        Image.fromarray(rng.integers(1, 255, shape, np.uint8)).save(demo / f"xr{number}.png")
    shutil.copy(demo / "ct0.nii.gz", demo / "left_out.nii.gz")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Raw folder, and its corpus: the pictures ingested in two calls, so that a pack lies in parts."""
    folder = tmp_path_factory.mktemp("made")
    raw, corpus = make_raw(folder / "raw"), Corpus(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        in_this_process.__wrapped__(patch)  # type: ignore[attr-defined]
        for only in ("xr[014]", None):
            ingest_all([plan_ingest(DEMO, raw, corpus, only)], corpus)
    return raw, corpus.root


@pytest.fixture
def raw(made: tuple[Path, Path]) -> Path:
    return made[0]


@pytest.fixture
def corpus(made: tuple[Path, Path], tmp_path: Path) -> Corpus:
    """A copy that a test may spoil."""
    shutil.copytree(made[1], tmp_path / "data")
    return Corpus(tmp_path / "data")


def found(corpus: Corpus, **options: Any) -> set[tuple[str, str]]:
    """(kind, file) of all findings."""
    return {(finding.kind, finding.file) for finding in verify(corpus, SPECS, **options).findings}


def mend(corpus: Corpus, raw: Path, *, deep: bool = False) -> tuple[Verification, list[str]]:
    before = verify(corpus, SPECS, deep=deep, workers=1)
    problems = repair(corpus, SPECS, RawFolder(raw), before, 1, lambda plans: ingest_all(plans, corpus))
    return before.after_repair(lambda chosen: verify(corpus, SPECS, chosen, deep=deep, workers=1))[0], problems


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files(corpus: Corpus) -> list[Path]:
    return [corpus.root / name for name in published_files(corpus.root)]


def one_of_each(corpus: Corpus) -> dict[str, Path]:
    arrays = sorted((corpus.shards / "demo").iterdir())
    volume, pack = arrays[0], arrays[-1]
    assert volume.name.startswith("ct")
    assert pack.name.startswith("pack")
    return {
        "catalog": corpus.catalog_file("demo"),
        "previews": corpus.preview_file("demo"),
        "features": corpus.features_file("demo"),
        "split": corpus.split_file("demo"),
        "manifest": corpus.manifest_file("demo"),
        "metadata of a volume": volume / METADATA_FILE,
        "voxels of a volume": volume / SHARD_FILE,
        "metadata of a pack": pack / METADATA_FILE,
        "voxels of a pack": pack / SHARD_FILE,
    }


KINDS = [
    *("catalog", "previews", "features", "split", "manifest"),
    *("metadata of a volume", "voxels of a volume", "metadata of a pack", "voxels of a pack"),
]


# finding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_corpus_is_sound(corpus: Corpus, deep: bool) -> None:
    before = published_files(corpus.root)
    outcome = verify(corpus, SPECS, deep=deep, workers=1)
    assert outcome.findings == []
    assert outcome.notes == []
    assert outcome.read["demo"].rows == 10
    assert outcome.read["demo"].arrays == len(list((corpus.shards / "demo").iterdir())) == 7
    sizes = {path.name: path.stat().st_size for path in files(corpus)}
    assert outcome.read["demo"].size > sizes["images.parquet"] + sizes["previews.parquet"]
    assert published_files(corpus.root) == before


def assert_flips_are_found(corpus: Corpus, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for path in files(corpus):
        whole = path.read_bytes()
        bits = 8 * len(whole)
        # Both ends hold what no checksum of a format covers: magic bytes, footers, an index.
        chosen = [
            *rng.sample(range(bits), min(count, bits)),
            0,
            bits - 1,
            rng.randrange(max(0, bits - 512), bits),
        ]
        for bit in chosen:
            flip(path, bit)
            findings = verify(corpus, SPECS, workers=1).findings
            assert findings, f"bit {bit} of {path}"
            name = path.relative_to(corpus.root).as_posix()
            assert any(name.startswith(finding.file) for finding in findings), f"bit {bit} of {path}"
            path.write_bytes(whole)
    assert verify(corpus, SPECS).findings == []


def test_every_flipped_bit_is_found(corpus: Corpus) -> None:
    assert_flips_are_found(corpus, count=6, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_every_flipped_bit_is_found_many(corpus: Corpus, seed: int) -> None:
    assert_flips_are_found(corpus, count=150, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_found(corpus: Corpus, kind: str) -> None:
    path = one_of_each(corpus)[kind]
    path.unlink()
    name = path.relative_to(corpus.root).as_posix()
    assert any(what == "missing" and name.startswith(file) for what, file in found(corpus))


def test_missing_folders_are_found(corpus: Corpus) -> None:
    shutil.rmtree(corpus.catalog_file("demo").parent)
    missing = {file for kind, file in found(corpus) if kind == "missing"}
    assert missing == {"catalog/dataset=demo/images.parquet", "catalog/dataset=demo/manifest.sha256"}


def test_stray_files_are_found_and_only_in_folders_of_the_corpus(corpus: Corpus) -> None:
    volume = one_of_each(corpus)["voxels of a volume"].parent
    names = [
        *("catalog/notes.txt", "catalog/dataset=demo/copy.parquet", "splits/.tmp-demo.parquet"),
        *("shards/notes.txt", "shards/demo/old.zarr", f"shards/demo/{volume.name}/c.1.0.0.0"),
    ]
    for name in names:
        (corpus.root / name).write_text("?")
    (corpus.root / "audit.png").write_text("a picture of the audit may lie here")
    assert found(corpus) == {("stray", name) for name in names}


def test_damage_names_every_image_of_a_pack(corpus: Corpus) -> None:
    path = one_of_each(corpus)["voxels of a pack"]
    flip(path, 100)
    (finding,) = verify(corpus, SPECS).findings
    rows = load_catalog(corpus).to_pylist()
    assert set(finding.keys) == {row["key"] for row in rows if row["shard_path"].endswith(path.parent.name)}
    assert "--repair" in finding.remedy


def test_a_disk_that_fails_is_a_finding(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    hurt = one_of_each(corpus)["voxels of a volume"]

    def failing(path: Path) -> str:
        if path == hurt:
            raise OSError(5, "Input/output error", str(path))
        return true_digest(path)

    true_digest = ingest.verify.digest_of
    monkeypatch.setattr("shards.check.digest_of", failing)
    (finding,) = verify(corpus, SPECS).findings
    assert finding.kind == "damaged"
    assert "Input/output error" in finding.problem


def test_stale_rows_are_told_and_vanished_sources_are_none(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = DatasetSpec.model_validate(DEMO.model_dump() | {"sampling_weight": 2.0})
    (finding,) = verify(corpus, {"demo": changed}).findings
    assert (finding.kind, finding.images) == ("stale", 10)
    assert "entry" in finding.problem
    monkeypatch.setattr(ingest.image, "NORMALISATION_VERSION", 2)
    (finding,) = verify(corpus, SPECS).findings
    assert (finding.kind, finding.images) == ("stale", 10)
    assert "normalisation" in finding.problem
    assert "ingest demo" in finding.remedy
    (note,) = verify(corpus, {}).notes
    assert "--raw" in note


def rewrite_rows(corpus: Corpus, **changes: Any) -> None:
    """Change columns of the first ingested row, with a manifest that agrees."""
    table = load_catalog(corpus, status=None)
    rows = table.to_pylist()
    next(row for row in rows if row["status"] == "ingested").update(changes)
    publish(corpus, "demo", [catalog_file(corpus, "demo", [pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)])])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"shape_d": 9}, "shape"),
        ({"intensity_mean": None}, "statistics"),
        ({"intensity_min": 1e9}, "statistics"),
        ({"window_low": float("nan")}, "statistics"),
        ({"da_level": 4}, "anisotropy"),
        ({"stored_bytes": 7}, "stored_bytes"),
        ({"stored_dtype": "uint16"}, METADATA_FILE),
        ({"shard_path": None}, "without"),
    ],
)
def test_a_row_that_cannot_be_true_is_found(corpus: Corpus, changes: dict[str, Any], word: str) -> None:
    rewrite_rows(corpus, **changes)
    assert any(word in finding.problem for finding in verify(corpus, SPECS).findings)


@pytest.mark.parametrize("name", ["mean", "std", "median", "min", "max", "p0_5", "p99_5"])
def test_only_a_deep_look_finds_plausible_but_wrong_statistics(corpus: Corpus, raw: Path, name: str) -> None:
    row = load_catalog(corpus).to_pylist()[0]
    before = published_files(corpus.root)
    rewrite_rows(corpus, **{f"intensity_{name}": row[f"intensity_{name}"] + (0.5 if name != "max" else 1)})
    if name != "min":
        assert verify(corpus, SPECS).findings == []
    (finding,) = verify(corpus, SPECS, deep=True, workers=1).findings
    assert finding.keys == (row["key"],)
    assert name == "min" or f"intensity_{name}" in finding.problem
    if name == "mean":
        assert mend(corpus, raw, deep=True)[0].findings == []
        assert published_files(corpus.root) == before


def test_rows_of_a_sound_corpus_have_no_problems(corpus: Corpus) -> None:
    assert [problems_of_row(row) for row in load_catalog(corpus).to_pylist()] == [[]] * 9


# repairing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flipped", "missing", "cut short"])
@pytest.mark.parametrize("kind", KINDS)
def test_repair_gives_back_the_bytes(corpus: Corpus, raw: Path, kind: str, how: str) -> None:
    before = published_files(corpus.root)
    path = one_of_each(corpus)[kind]
    if how == "flipped":
        # Of a catalog a page, which leaves the other columns readable.
        flip(path, 8 * 60 if kind == "catalog" else 4 * path.stat().st_size)
    elif how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    after, problems = mend(corpus, raw)
    assert (after.findings, problems) == ([], [])
    if kind == "catalog" and how != "flipped":
        # Which pictures were ingested together is lost with it: those of a pack come back in one array.
        others = [name for name in before if "/ct" in name or name.startswith("splits")]
        now = published_files(corpus.root)
        assert {name: now[name] for name in others} == {name: before[name] for name in others}
        assert load_catalog(corpus).num_rows == 9
    else:
        assert published_files(corpus.root) == before


def test_repair_mends_much_damage_at_once(corpus: Corpus, raw: Path) -> None:
    before = published_files(corpus.root)
    kinds = one_of_each(corpus)
    for kind in ("split", "metadata of a volume", "voxels of a pack"):
        flip(kinds[kind], 4 * kinds[kind].stat().st_size)
    shutil.rmtree(sorted((corpus.shards / "demo").glob("ct*"))[1])
    (corpus.shards / "demo" / "stray.zarr").mkdir()
    after, problems = mend(corpus, raw)
    assert (after.findings, problems) == ([], [])
    assert published_files(corpus.root) == before


def test_repair_takes_nothing_away_that_it_cannot_make_again(corpus: Corpus, raw: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "raw"
    shutil.copytree(raw, fewer)
    (fewer / "demo" / "ct0.nii.gz").unlink()
    kinds = one_of_each(corpus)
    flip(kinds["voxels of a volume"], 100)
    hurt = published_files(corpus.root)
    after, problems = mend(corpus, fewer)
    assert len(after.findings) == len(problems) == 1
    assert "ct0" in problems[0]
    assert published_files(corpus.root) == hurt
    flip(kinds["catalog"], 8000)
    hurt = published_files(corpus.root)
    with pytest.raises(SetupError, match=r"ct0\.nii\.gz.*Restore"):
        mend(corpus, fewer)
    assert published_files(corpus.root) == hurt


def test_repair_refuses_a_raw_file_that_has_changed(corpus: Corpus, raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "raw"
    shutil.copytree(raw, other)
    shutil.copy(other / "demo" / "ct1.nii.gz", other / "demo" / "ct0.nii.gz")
    flip(one_of_each(corpus)["voxels of a volume"], 100)
    after, (problem,) = mend(corpus, other)
    assert len(after.findings) == 1
    assert "has changed" in problem


def test_a_split_that_grew_is_not_drawn_again_otherwise(tmp_path: Path, raw: Path) -> None:
    few = tmp_path / "raw"
    (few / "demo").mkdir(parents=True)
    corpus = Corpus(tmp_path / "data")
    # The public hash decides; two of the three let the third come later.
    drawn: set[bytes] = set()
    for first in ("ct0", "ct1", "ct2"):
        shutil.rmtree(few / "demo")
        shutil.rmtree(corpus.root, ignore_errors=True)
        (few / "demo").mkdir()
        for names in ([name for name in ("ct0", "ct1", "ct2") if name != first], [first]):
            for name in names:
                shutil.copy(raw / "demo" / f"{name}.nii.gz", few / "demo")
            ingest_all([plan_ingest(DEMO, few, corpus)], corpus)
        whole = corpus.split_file("demo").read_bytes()
        drawn.add(whole)
        flip(corpus.split_file("demo"), 4000)
        hurt = corpus.split_file("demo").read_bytes()
        after, problems = mend(corpus, few)
        if problems:
            assert "Restore" in problems[0]
            assert corpus.split_file("demo").read_bytes() == hurt
            assert len(after.findings) == 1
        else:
            assert corpus.split_file("demo").read_bytes() == whole
    assert len(drawn) == 2, "whoever came last was never held out: nothing was tried"


def test_which_pictures_were_ingested_together(corpus: Corpus) -> None:
    numbers = calls_of(load_catalog(corpus))
    first, second = ({numbers[f"xr{n}.png"] for n in part} for part in ((0, 4), (2,)))
    assert first != second
    assert "ct0.nii.gz" not in numbers


# a run that was stopped -------------------------------------------------------------------------------------

STOPPED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ingest.run
from catalog.corpus import Corpus
from ingest.task import run_task
from tests.demo import DEMO, NoCluster
raw, data, count = Path(sys.argv[2]), Corpus(Path(sys.argv[3])), int(sys.argv[4])
ingest.run._run_on_cluster = lambda tasks, client: ((task, run_task(task)) for task in tasks)
replace = Path.replace

def counted(self, target):
    global count
    if data.private not in self.parents:
        if count == 0:
            os._exit(9)
        count -= 1
    return replace(self, target)

Path.replace = counted
ingest.run.ingest_dataset(ingest.run.plan_ingest(DEMO, raw, data), data, NoCluster(), lambda *_: None)
"""
RENAMES = 9  # next manifest, split, manifest; next manifest, previews, features, catalog, manifest; index


@pytest.mark.parametrize("count", range(RENAMES + 1))
def test_killed_between_two_renames(tmp_path: Path, raw: Path, count: int) -> None:
    """For each file that is put in its place: killed just before, verified, run again, the same bytes."""
    undisturbed, corpus = Corpus(tmp_path / "undisturbed"), Corpus(tmp_path / "data")
    ingest_all([plan_ingest(DEMO, raw, undisturbed)], undisturbed)
    arguments = [str(REPOSITORY), str(raw), str(corpus.root), str(count)]
    killed = subprocess.run([sys.executable, "-c", STOPPED, *arguments], check=False)
    assert killed.returncode == (9 if count < RENAMES else 0)
    if count < RENAMES and any(corpus.root.glob("catalog/*/*")):
        kinds = {kind for kind, _ in found(corpus)}
        assert kinds <= {"unfinished", "stray"}
        assert "unfinished" in kinds or count in (0, 3, 8)
    ingest_all([plan_ingest(DEMO, raw, corpus)], corpus)
    assert published_files(corpus.root) == published_files(undisturbed.root)
    assert verify(corpus, SPECS).findings == []


def test_repair_ends_a_stopped_run(tmp_path: Path, raw: Path) -> None:
    corpus = Corpus(tmp_path / "data")
    arguments = [str(REPOSITORY), str(raw), str(corpus.root), "5"]
    subprocess.run([sys.executable, "-c", STOPPED, *arguments], check=False)
    assert ("unfinished", "catalog/dataset=demo/manifest.next.sha256") in found(corpus)
    after, problems = mend(corpus, raw)
    assert (after.findings, problems) == ([], [])


# versions ---------------------------------------------------------------------------------------------------


def make_version_1(corpus: Corpus) -> None:
    """What the program wrote before there were manifests, and before arrays told of their layout."""
    zstd, plain = {"compression": "zstd"}, {"compression": "none", "row_group_size": 1024}
    without = pa.schema([field for field in CATALOG_SCHEMA if field.name != "shard_sha256"])
    for path, schema, options in (
        (corpus.catalog_file("demo"), without, zstd),
        (corpus.preview_file("demo"), PREVIEW_SCHEMA, plain),
        (corpus.split_file("demo"), SPLIT_SCHEMA, zstd),
    ):
        table = pq.read_table(path, partitioning=None).select(schema.names)
        old = table.cast(schema.with_metadata({"pumit_schema_version": "1"}))
        pq.write_table(old.combine_chunks(), path, write_page_checksum=True, **options)  # type: ignore[arg-type]
    corpus.manifest_file("demo").unlink()
    for path in (corpus.shards / "demo").glob(f"*/{METADATA_FILE}"):
        metadata = json.loads(path.read_text())
        del metadata["attributes"]
        path.write_text(json.dumps(metadata))


def test_a_corpus_of_version_1_is_read_reported_and_migrated(corpus: Corpus, raw: Path) -> None:
    rows = load_catalog(corpus).to_pylist()
    make_version_1(corpus)
    old = load_catalog(corpus)
    assert old.column_names == CATALOG_SCHEMA.names
    assert old.to_pylist() == [row | {"shard_sha256": None} for row in rows]
    assert load_catalog(corpus, columns=["shard_sha256", "key"]).to_pylist()[0] == {
        "shard_sha256": None,
        "key": rows[0]["key"],
    }
    assert {kind for kind, _ in found(corpus)} == {"missing", "unproven"}
    flip(one_of_each(corpus)["voxels of a volume"], 100)
    assert "damaged" in {kind for kind, _ in found(corpus)}
    flip(one_of_each(corpus)["voxels of a volume"], 100)
    after, problems = mend(corpus, raw / "not needed")
    assert (after.findings, problems) == ([], [])
    assert load_catalog(corpus).to_pylist() == rows


def test_a_later_version_is_refused(corpus: Corpus) -> None:
    path = corpus.catalog_file("demo")
    table = pq.read_table(path, partitioning=None)
    later = table.replace_schema_metadata({"pumit_schema_version": "3"})
    publish(corpus, "demo", [replace(catalog_file(corpus, "demo", [later]), schema=later.schema)])
    result = run("pumit-data", "verify", "--data", corpus.root)
    assert result.returncode == 2
    assert "version 3" in result.stderr
    assert "Install the version" in result.stderr


@pytest.mark.parametrize("text", ["", "two", "0", "-1"])
def test_a_version_that_is_none_is_refused(corpus: Corpus, text: str) -> None:
    path = corpus.catalog_file("demo")
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.replace_schema_metadata({"pumit_schema_version": text}), path)
    with pytest.raises(SetupError, match="does not say of which version"):
        load_catalog(corpus)


def test_an_array_of_a_later_layout_is_told_apart(corpus: Corpus) -> None:
    path = one_of_each(corpus)["metadata of a volume"]
    metadata = json.loads(path.read_text())
    metadata["attributes"]["pumit_layout_version"] = 3
    path.write_text(json.dumps(metadata))
    (finding,) = verify(corpus, SPECS).findings
    assert "version 3 of the shard layout" in finding.problem


def test_metadata_are_known_for_every_version() -> None:
    shape = (1, 20, 70, 70)
    forms = metadata_forms(shape, "int16", volume_chunk(shape))
    assert len(set(forms)) == len(forms) == 6


# the command ------------------------------------------------------------------------------------------------


def test_the_command_in_a_users_hands(tmp_path: Path, samples: Path) -> None:
    data = tmp_path / "data"
    arguments = ("--raw", samples.parent, "--data", data)
    assert (
        run("pumit-data", "ingest", "sample", *arguments, "--only", "XR|retina", "--workers", "1").returncode
        == 0
    )
    before = published_files(data)
    sound = run("pumit-data", "verify", "--deep", "--workers", "1", *arguments)
    assert sound.returncode == 0, sound.stdout
    assert sound.stdout.startswith("sound: ")
    checksums = subprocess.run(
        ["sha256sum", "--check", "--quiet", "--strict", "catalog/dataset=sample/manifest.sha256"],
        cwd=data,
        check=False,
    )
    assert checksums.returncode == 0

    arrays = sorted((data / "shards" / "sample").iterdir())
    flip(arrays[0] / SHARD_FILE, 4242)
    hurt = run("pumit-data", "verify", "sample", *arguments)
    assert hurt.returncode == 1
    for word in ("sample", arrays[0].name[:12], "damaged", "sha256", "--repair"):
        assert word in hurt.stdout
    flip(data / "catalog" / "dataset=sample" / "images.parquet", 30_000)
    report = json.loads(run("pumit-data", "verify", *arguments, "--json").stdout)
    assert not report["sound"]
    assert report["findings"][0]["file"] == "catalog/dataset=sample/images.parquet"

    mended = run("pumit-data", "verify", "--repair", "--workers", "1", *arguments)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "Repaired" in mended.stdout
    assert published_files(data) == before


def test_wrong_calls_end_in_one_line(tmp_path: Path, corpus: Corpus) -> None:
    for arguments, words in (
        (("--data", tmp_path / "none"), "make ingest"),
        (("amos", "--data", corpus.root), "demo"),
        (("--repair", "--data", corpus.root, "--raw", tmp_path), "Give --raw"),
    ):
        if "--repair" in arguments:
            flip(one_of_each(corpus)["voxels of a volume"], 9)
        result = run("pumit-data", "verify", *arguments)
        assert result.returncode == 2, result.stdout
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_neither_verify_nor_ingest_runs_beside_the_other(corpus: Corpus) -> None:
    with Journal(corpus, "demo").lock(), pytest.raises(SetupError, match="an ingest into"):
        verify(corpus, SPECS)


def test_a_corpus_that_cannot_be_written_is_verified(corpus: Corpus) -> None:
    subprocess.run(["chmod", "-R", "a-w", corpus.root], check=True)
    result = run("pumit-data", "verify", "--data", corpus.root, unprivileged=True)
    subprocess.run(["chmod", "-R", "u+w", corpus.root], check=True)
    assert result.returncode == 0, result.stderr
