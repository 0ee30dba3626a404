"""Manifests: what the files of a dataset must hash to, whole through every kill."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.manifest import (
    DamagedManifestError,
    NewFile,
    accepted_digests,
    digest_of,
    digest_when_written,
    publish,
    read_manifest,
    refuse_damaged,
    settle,
    surviving_digests,
)


def new(corpus: Corpus, name: str, value: int) -> NewFile:
    path = {"images": corpus.catalog_file("demo"), "split": corpus.split_file("demo")}[name]
    table = pa.table({"value": list(range(value, value + 500))})
    return NewFile(path, [table], table.schema)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path)
    publish(corpus, "demo", [new(corpus, "split", 1)])
    publish(corpus, "demo", [new(corpus, "images", 2)])
    return corpus


def actual(corpus: Corpus) -> dict[str, str]:
    paths = (corpus.catalog_file("demo"), corpus.split_file("demo"))
    return {path.relative_to(corpus.root).as_posix(): digest_of(path) for path in paths}


def test_hashes_computed_while_writing_are_those_of_the_files(corpus: Corpus) -> None:
    assert read_manifest(corpus.manifest_file("demo")) == actual(corpus)
    assert digest_when_written(new(corpus, "images", 2)) == digest_of(corpus.catalog_file("demo"))
    assert sorted(path.name for path in corpus.manifest_file("demo").parent.iterdir()) == [
        "images.parquet",
        "manifest.sha256",
    ]


def test_the_same_files_give_the_same_manifest(corpus: Corpus, tmp_path: Path) -> None:
    other = Corpus(tmp_path / "other")
    publish(other, "demo", [new(other, "images", 2), new(other, "split", 1)])
    assert other.manifest_file("demo").read_bytes() == corpus.manifest_file("demo").read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_of_a_manifest_is_missed_and_all_other_lines_survive(
    corpus: Corpus, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(corpus.manifest_file("demo").read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    hurt = tmp_path / "hurt.sha256"
    hurt.write_bytes(content)
    with pytest.raises(DamagedManifestError, match="--repair"):
        read_manifest(hurt)
    assert len(surviving_digests(hurt) & set(actual(corpus).values())) >= 1


@pytest.mark.parametrize("length", [0, 1, 60, -1])
def test_a_manifest_cut_short_is_damaged(corpus: Corpus, length: int) -> None:
    path = corpus.manifest_file("demo")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedManifestError):
        publish(corpus, "demo", [new(corpus, "images", 3)])


def test_a_manifest_of_a_later_version_is_refused(corpus: Corpus) -> None:
    path = corpus.manifest_file("demo")
    head = path.read_bytes().rpartition(b"# sha256")[0].replace(b"manifest 1", b"manifest 2")
    path.write_bytes(
        head + b"# sha256 of the lines above: " + hashlib.sha256(head).hexdigest().encode() + b"\n"
    )
    with pytest.raises(SetupError, match=r"version 2 of the manifest.*Install the version") as refused:
        read_manifest(path)
    assert not isinstance(refused.value, DamagedManifestError)


def test_a_damaged_file_is_refused_and_names_the_remedy(corpus: Corpus) -> None:
    path = corpus.catalog_file("demo")
    refuse_damaged(corpus, "demo", path, "Do this.")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SetupError, match=r"images\.parquet is damaged.*Do this\."):
        refuse_damaged(corpus, "demo", path, "Do this.")


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("renames", range(5))
def test_stopped_before_any_rename(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Next manifest, two files, manifest: each file is always as one of the two manifests says."""
    before, left, replace = actual(corpus), renames, Path.replace

    def counted(path: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return replace(path, target)

    files = [new(corpus, "split", 3), new(corpus, "images", 4)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted)
        if renames < 4:
            with pytest.raises(Killed):
                publish(corpus, "demo", files)
        else:
            publish(corpus, "demo", files)
    accepted = accepted_digests(corpus, "demo")
    assert all(digest in accepted[name] for name, digest in actual(corpus).items())
    settle(corpus, "demo")
    is_open = corpus.next_manifest_file("demo").exists()
    assert is_open == (renames == 2), "only a mixture needs the files to be written again"
    if renames < 2:
        assert actual(corpus) == before == read_manifest(corpus.manifest_file("demo"))
    if not is_open:
        assert read_manifest(corpus.manifest_file("demo")) == actual(corpus)
    publish(corpus, "demo", files)
    assert read_manifest(corpus.manifest_file("demo")) == actual(corpus)
    assert not corpus.next_manifest_file("demo").exists()
