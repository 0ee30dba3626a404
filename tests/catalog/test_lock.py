"""The lock of a corpus: the same for the same corpus, and what differs is found and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.lock import Lock, check_lock, lock_corpus, lock_text, read_lock
from catalog.mix import Mix, load_mix, make_mix, write_mix
from catalog.selection import Selection
from catalog.split import hold_out
from catalog.write import merge_dataset
from tests.catalog.test_mix import write_groups
from tests.commands import run
from tests.mixed_corpus import rows_of, write_mixed


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = write_mixed(tmp_path / "corpus")
    write_mix(corpus, "mine", make_mix({"where": "modality <> 'US'"}, "mine"))
    hold_out(corpus, "ixi", {"MRI": ["1", "2", "3"]})
    return corpus


def lock(corpus: Corpus, name: str = "mine", **licences: str) -> Lock:
    mix = load_mix(corpus, name)
    text = lock_text(
        lock_corpus(corpus, name, mix, Selection(corpus, mix), shards_version=2, licences=licences)
    )
    return read_lock(text, "corpus.lock")


def told(corpus: Corpus, locked: Lock) -> list[tuple[str, str, str]]:
    return [tuple(one) for one in check_lock(corpus, locked, 2)]


def change(dataset: str, key: str, **fields: Any) -> Callable[[Corpus], None]:
    """What replaces a row, some of its fields changed."""

    def replace(corpus: Corpus) -> None:
        (row,) = (row for row in rows_of(dataset) if row["key"] == key)
        merge_dataset(corpus, dataset, [row | fields], [])

    return replace


def test_the_same_corpus_gives_the_same_bytes_wherever_it_lies(corpus: Corpus, tmp_path: Path) -> None:
    for dataset in ("ixi", "amos"):  # in another order, of other pieces
        for rows in (rows_of(dataset)[20:], rows_of(dataset)[:20]):
            merge_dataset(corpus, dataset, rows, [])
    shutil.copytree(corpus.root, tmp_path / "elsewhere")
    mix = load_mix(corpus, "all")
    texts = {
        lock_text(
            lock_corpus(one, "all", mix, Selection(one, mix), shards_version=2, licences={"ixi": "CC BY"})
        )
        for one in (corpus, Corpus(tmp_path / "elsewhere"))
    }
    (text,) = texts
    locked = read_lock(text, "corpus.lock")
    assert locked["datasets"]["ixi"]["images"] == {"ingested": 36, "excluded": {"uneven_slices": 4}}
    assert locked["datasets"]["ixi"]["licence"] == "CC BY"
    assert check_lock(corpus, locked, 2) == []
    # Hashes and counts: neither a key, nor a subject, nor a file, nor a place.
    assert not re.search(rf"\b0\d\d\b|person|\.nii|{tmp_path}", text)


def test_what_is_only_told_makes_no_difference(corpus: Corpus) -> None:
    mix = load_mix(corpus, "mine")
    other = lock_corpus(corpus, "other", mix, Selection(corpus, mix), shards_version=9, licences={"ixi": "MIT"})
    assert other["fingerprint"] == lock(corpus)["fingerprint"]


def forget(dataset: str) -> Callable[[Corpus], None]:
    return lambda corpus: shutil.rmtree(corpus.catalog_file(dataset).parent)


def other_subject_held_out(corpus: Corpus) -> None:
    corpus.split_file("ixi").unlink()
    hold_out(corpus, "ixi", {"MRI": ["7", "8"]})


def other_excluded(corpus: Corpus) -> None:
    change("ixi", "009", status="ingested", reason=None)(corpus)
    change("ixi", "001", status="excluded", reason="uneven_slices")(corpus)


@pytest.mark.parametrize(
    ("happened", "expected"),
    [
        (forget("chaos"), [("chaos", "removed", "is in the lock, and not in the corpus")]),
        (
            lambda corpus: merge_dataset(corpus, "new", [rows_of("ixi", 1)[0] | {"dataset": "new"}], []),
            [("new", "added", "is in the corpus, and not in the lock")],
        ),
        (
            change("ixi", "001", status="failed", reason="unreadable"),
            [
                ("ixi", "images", "36 images were ingested, now 35"),
                ("ixi", "excluded", "excluded or failed: unreadable was 0, is 1"),
                ("ixi", "sources", "the files it was made of changed"),
                ("ixi", "voxels", "the files that hold its voxels changed"),
                ("ixi", "weights", "sampling weights changed"),
            ],
        ),
        (
            change("ixi", "009", reason="tilted"),
            [("ixi", "excluded", "excluded or failed: tilted was 0, is 1; uneven_slices was 4, is 3")],
        ),
        (
            other_excluded,
            [
                ("ixi", "excluded", "excluded or failed: as many, but not the same images"),
                ("ixi", "sources", ""),
            ],
        ),
        (change("ixi", "001", sampling_weight=9.0), [("ixi", "weights", "sampling weights changed")]),
        (change("ixi", "001", source_hash="f" * 64), [("ixi", "sources", "the files it was made of changed")]),
        (
            change("ixi", "001", shard_sha256="f" * 64),
            [("ixi", "voxels", "the files that hold its voxels changed")],
        ),
        (
            change("ixi", "001", spacing_z=7.0),
            [("ixi", "catalog", "what the catalog says of its images changed")],
        ),
        (change("ixi", "001", entry_hash="f"), [("ixi", "entry", "its entry in datasets.yaml changed")]),
        (
            change("ixi", "001", normalisation_version=2),
            [("ixi", "normalisation", "normalisation was 1, is 1 and 2: it was ingested again")],
        ),
        (other_subject_held_out, [("ixi", "split", "who is held out for validation changed")]),
        (
            lambda corpus: write_mix(corpus, "mine", make_mix({"leave_out": ["ixi"]}, ""), force=True),
            [("", "mix", 'the mix mine changed: leave_out was null, is ["ixi"]; where was "modality <>')],
        ),
        (
            lambda corpus: corpus.mix_file("mine").unlink(),
            [("", "mix", "there is no mix mine in the corpus")],
        ),
    ],
)
def test_each_kind_of_difference_is_told(
    corpus: Corpus, happened: Callable[[Corpus], None], expected: list[tuple[str, str, str]]
) -> None:
    locked = lock(corpus)
    happened(corpus)
    found = told(corpus, locked)
    for dataset, what, text in expected:
        assert any((one[0], one[1]) == (dataset, what) and text in one[2] for one in found), found
    # An entry, or a version of the normalisation, stands in the rows, so the rows have changed as well.
    assert {one[1] for one in found} - {"catalog"} <= {one[1] for one in expected} | {"voxels", "weights"}
    assert {one[0] for one in found} == {dataset for dataset, _, _ in expected}


def test_copies_are_part_of_the_lock(corpus: Corpus) -> None:
    groups = [(0, "amos", "010", True), (0, "amos", "020", False)]
    write_groups(corpus, groups)
    write_mix(corpus, "mine", Mix(dedup=True), force=True)
    locked = lock(corpus)
    assert told(corpus, locked) == []
    write_groups(corpus, [*groups, (1, "ixi", "001", True), (1, "ixi", "002", False)])
    assert told(corpus, locked) == [("", "duplicates", "other images are taken for copies")]
    corpus.duplicates_file.unlink()
    ((dataset, what, text),) = told(corpus, locked)
    assert (dataset, what) == ("", "duplicates")
    assert "nobody has looked for duplicates" in text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("ingested: 36", "ingested: 37"), "was changed after it was written"),
        (lambda text: text.replace("corpus_lock: 1", "corpus_lock: 2"), "format 2 of a lock"),
        (lambda text: "a: [", "no lock"),
        (lambda text: "- 1", "does not begin with corpus_lock"),
        (lambda text: "corpus_lock: 1\n", "was changed"),
        (lambda text: text.split("mix:")[0], "was changed"),
    ],
)
def test_a_file_that_is_no_lock_is_refused(corpus: Corpus, edit: Callable[[str], str], message: str) -> None:
    mix = Mix()
    text = lock_text(lock_corpus(corpus, "all", mix, Selection(corpus, mix), shards_version=2, licences={}))
    with pytest.raises(SetupError, match=rf"other\.lock.*{message}"):
        read_lock(edit(text), "other.lock")


def test_the_command(corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "my.lock"
    arguments = ("--data", corpus.root, "--raw", tmp_path)
    written = run("pumit-data", "lock", "--mix", "mine", "--out", file, *arguments)
    assert written.returncode == 0, written.stderr
    locked = yaml.safe_load(file.read_text())
    assert locked["fingerprint"] == lock(corpus)["fingerprint"]
    assert locked["datasets"]["amos"]["licence"] == "CC BY 4.0"
    same = run("pumit-data", "lock", "--check", file, "--json", *arguments)
    assert (same.returncode, json.loads(same.stdout)) == (0, {"same": True, "differences": []})
    forget("chaos")(corpus)
    other = run("pumit-data", "lock", "--check", file, *arguments)
    assert (other.returncode, other.stderr) == (1, "")
    assert other.stdout.startswith("chaos: is in the lock, and not in the corpus\n")
    missing = run("pumit-data", "lock", "--check", tmp_path / "none", *arguments)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
