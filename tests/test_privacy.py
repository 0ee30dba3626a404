"""No patient identifier leaves the raw folder: every identifying attribute and every name carries a marker."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import load_catalog
from ingest.names import NameKey, name_key
from ingest.readers import read_volumes
from ingest.reasons import ExcludedImage
from ingest.source import ImageSource
from ingest.volume import Volume
from tests.commands import run

MARKER = "ZQXJ"
"""Stands in every value and name that could identify somebody; nothing of ours contains it."""
NEEDED = {
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"),
    *("Modality", "PhotometricInterpretation", "ImageOrientationPatient", "ImagePositionPatient"),
    *("PixelSpacing", "RescaleSlope", "RescaleIntercept", "BurnedInAnnotation", "ImageType"),
    *("SpecificCharacterSet", "PixelDataProviderURL", "LossyImageCompression", "RescaleType"),
}
"""Attributes that tell how to decode the image or where its voxels lie: kept as they are."""
TEXT = {"PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR"}
CODES = {"AE": 16, "CS": 16}


def marked(dataset: Dataset) -> Dataset:
    """The image with every textual attribute of the DICOM dictionary set: more than all of PS3.15, annex E."""
    for tag, (representation, _, _, retired, keyword) in DicomDictionary.items():
        if not keyword or keyword in NEEDED or retired or tag >> 16 in (0x0000, 0x0002, 0x7FE0, 0xFFFE):
            continue
        if representation in TEXT:
            dataset.add_new(tag, representation, MARKER if representation == "UR" else f"{MARKER}^{MARKER}")
        elif representation in CODES and tag >> 16 != 0x0028:
            dataset.add_new(tag, representation, f"{MARKER} {tag:08X}"[:16])
    dataset.PatientBirthDate = "19290521"
    dataset.AcquisitionDate = "19290522"
    other = Dataset()
    other.PatientID = f"{MARKER}-OTHER"
    dataset.OtherPatientIDsSequence = [other]
    private = dataset.private_block(0x0099, f"{MARKER} PRIVATE", create=True)
    private.add_new(0x01, "LO", f"{MARKER} in a private tag")
    dataset.file_meta.SourceApplicationEntityTitle = MARKER
    return dataset


def everything_in(folder: Path) -> list[tuple[str, str]]:
    """(file, its name and content as text) of all files, columns and metadata of tables decompressed."""
    texts: list[tuple[str, str]] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] == "private":
            continue
        content = name
        if path.is_file():
            content += path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                table = pq.ParquetFile(path).read()
                content += repr(table.to_pydict()) + repr(table.schema.metadata)
        texts.append((name, content))
    return texts


@pytest.fixture
def raw(tmp_path: Path, samples: Path) -> Path:
    """A hospital's folder: names of people in paths and in files, two good series and some that fail."""
    folder = tmp_path / "raw" / "clinic"
    slices = sorted((samples / "MRI/datalad/brain_T1").iterdir())
    for person in ("Anna", "Bert"):
        series = folder / f"{MARKER}_{person}_19290521" / f"{MARKER} visit"
        series.mkdir(parents=True)
        for file in slices:
            marked(pydicom.dcmread(file)).save_as(series / f"{MARKER}-{file.name}.dcm")
    broken = folder / f"{MARKER}_Carl" / "uneven"
    shutil.copytree(folder / f"{MARKER}_Anna_19290521" / f"{MARKER} visit", broken)
    sorted(broken.iterdir())[4].unlink()
    damaged = folder / f"{MARKER}_Dora" / "damaged"
    shutil.copytree(folder / f"{MARKER}_Anna_19290521" / f"{MARKER} visit", damaged)
    cut = sorted(damaged.iterdir())[4]
    cut.write_bytes(cut.read_bytes()[:-900])
    return folder.parent


def test_no_name_and_no_attribute_gets_out(raw: Path, tmp_path: Path) -> None:
    """Through dry run, ingest, audit, picture, view and training: all files and everything that is printed."""
    corpus = tmp_path / "corpus"
    printed: list[tuple[str, str]] = []

    def say(program: str, *arguments: str | Path, code: int = 0) -> str:
        result = run(program, *arguments, cwd=tmp_path)
        assert result.returncode == code, result.stderr
        printed.append((" ".join(map(str, arguments)), result.stdout + result.stderr))
        return result.stdout

    added = run("pumit-data", "add", raw / "clinic", "--raw", raw, "--write")
    assert added.returncode == 0, added.stderr
    say("pumit-data", "ingest", "clinic", "--raw", raw, "--data", corpus, "--dry-run")
    say("pumit-data", "ingest", "clinic", "--raw", raw, "--data", corpus, code=1)
    say("pumit-data", "ingest", "clinic", "--raw", raw, "--data", corpus, "--json", code=1)
    say("pumit-data", "list", "--raw", raw, "--data", corpus, "--json")
    say("pumit-data", "stats", "--data", corpus, "--plot", corpus / "audit.png")
    rows = load_catalog(Corpus(corpus), status=None).to_pylist()
    assert sorted(row["reason"] or "" for row in rows) == ["", "", "missing_slices", "unreadable"]
    assert len({row["subject"] for row in rows if row["status"] == "ingested"}) == 2
    key = next(row["key"] for row in rows if row["status"] == "ingested")
    assert re.fullmatch(r"[a-z2-7]{16}", key)
    shared = tmp_path / "shared"
    shutil.copytree(corpus, shared, ignore=shutil.ignore_patterns("private"))
    say("pumit-data", "view", key, "--data", shared, "--save", shared / "view.png")
    own = run("pumit-data", "view", key, "--data", corpus, "--save", corpus / "view.png")
    assert f"known to this corpus alone: {MARKER}_" in own.stdout, (
        "who has the private folder can find the file"
    )
    say(
        *("pumit-train", "tokenizer", "--preset", "tiny", "--data", corpus, "--run", corpus / "run"),
        *("--set", "steps=2", "--set", "optim.warmup_steps=1", "--set", "discriminator.optim.warmup_steps=1"),
    )

    leaks = [
        where
        for where, text in [*everything_in(corpus), *everything_in(shared), *printed]
        if MARKER in text or "19290521" in text
    ]
    assert leaks == []


def test_what_is_searched_would_be_found(raw: Path, tmp_path: Path) -> None:
    """With the names declared public they are in the catalog, and the search sees them there."""
    run("pumit-data", "add", raw / "clinic", "--raw", raw, "--write")
    entry = raw / "datasets.yaml"
    entry.write_text(entry.read_text().replace("private_names: true", "private_names: false"))
    run("pumit-data", "ingest", "clinic", "--raw", raw, "--data", tmp_path / "corpus")
    assert any(MARKER in text for where, text in everything_in(tmp_path / "corpus") if "catalog" in where)


def test_the_key_decides_the_ids_and_is_kept_from_others(tmp_path: Path) -> None:
    mine = tmp_path / "mine.key"
    mine.write_text("ab" * 32)
    corpus, other, third = (Corpus(tmp_path / name) for name in "abc")
    first = name_key(corpus)
    assert name_key(corpus) == first, "a rerun gives the same names"
    assert name_key(other) != first
    assert name_key(third, mine) == name_key(Corpus(tmp_path / "d"), mine)
    assert (corpus.private / "names.key").stat().st_mode & 0o777 == 0o600
    assert corpus.private.stat().st_mode & 0o777 == 0o700
    assert first.secret.hex() not in repr(first)
    with pytest.raises(SetupError, match="is not the key that"):
        name_key(corpus, mine)
    mine.write_text("too short")
    with pytest.raises(SetupError, match="holds no key: 64 hexadecimal digits"):
        name_key(Corpus(tmp_path / "e"), mine)
    with pytest.raises(SetupError, match="cannot be read"):
        name_key(Corpus(tmp_path / "e"), tmp_path / "none.key")
    assert not (tmp_path / "e").exists()
    name_key(Corpus(tmp_path / "e"), keep=False)
    assert not (tmp_path / "e").exists()


@given(names=st.sets(st.tuples(st.sampled_from(["key", "subject", "path"]), st.text()), min_size=2))
def test_ids_are_told_apart_and_stay(names: set[tuple[Literal["key", "subject", "path"], str]]) -> None:
    key = NameKey(bytes(32))
    ids = {key.id("own", kind, name) for kind, name in names}
    assert len(ids) == len(names)
    assert ids == {key.id("own", kind, name) for kind, name in names}
    assert ids.isdisjoint(key.id("other", kind, name) for kind, name in names)


@pytest.mark.parametrize(
    ("burned_in", "regions", "outcome"),
    [
        ("YES", [(0, 0, 999, 999)], "burned_in_annotation"),
        ("NO", [], None),
        (None, [], "banner_possible"),
        (None, [(0, 20, 999, 999)], "banner_possible"),
        (None, [(0, 0, 999, 9), (0, 10, 999, 999)], None),
    ],
)
def test_text_in_the_pixels_of_ultrasound(
    burned_in: str | None, regions: list[tuple[int, ...]], outcome: str | None, tmp_path: Path, samples: Path
) -> None:
    dataset = pydicom.dcmread(next((samples / "US").glob("*/heart/*")))
    dataset.Modality = "US"
    if burned_in is None:
        dataset.pop("BurnedInAnnotation", None)
    else:
        dataset.BurnedInAnnotation = burned_in
    dataset.SequenceOfUltrasoundRegions = [Dataset() for _ in regions]
    for item, (x0, y0, x1, y1) in zip(dataset.SequenceOfUltrasoundRegions, regions, strict=True):
        item.RegionLocationMinX0, item.RegionLocationMinY0 = x0, y0
        item.RegionLocationMaxX1, item.RegionLocationMaxY1 = x1, y1
    dataset.save_as(tmp_path / "heart.dcm")
    source = ImageSource(
        dataset="own", key="heart", subject="heart", path="heart.dcm", root=tmp_path, format="dicom",
        dimension=2, modality="US",
    )  # fmt: skip
    if outcome == "burned_in_annotation":
        assert {found.reason for found in read_volumes(source) if isinstance(found, ExcludedImage)} == {outcome}
        return
    flags = {flag for volume in read_volumes(source) if isinstance(volume, Volume) for flag in volume.flags}
    assert ("banner_possible" in flags) == (outcome is not None)


def test_a_volume_with_text_in_its_pixels_is_left_out(tmp_path: Path, samples: Path) -> None:
    for file in (samples / "MRI/datalad/brain_T1").iterdir():
        dataset: Any = pydicom.dcmread(file)
        dataset.BurnedInAnnotation = "YES"
        dataset.save_as(tmp_path / file.name)
    source = ImageSource(
        dataset="own", key="brain", subject="brain", path=".", root=tmp_path, format="dicom",
        dimension=3, modality="MRI",
    )  # fmt: skip
    with pytest.raises(ExcludedImage, match="BurnedInAnnotation is YES") as caught:
        list(read_volumes(source))
    assert caught.value.reason == "burned_in_annotation"
