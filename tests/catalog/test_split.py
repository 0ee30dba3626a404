"""The validation split: whole subjects, drawn once, and never one that may have been trained on."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.split import hold_out, split_fingerprint

Subjects = dict[str, set[str]]

groups = st.dictionaries(
    st.sampled_from(["CT", "MRI/T1", "MRI/T2", "US", "XR"]),
    st.sets(st.sampled_from(string.ascii_lowercase[:10]), min_size=1),
    max_size=4,
)
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def people(*numbers: int) -> set[str]:
    return {f"subject-{number:03d}" for number in numbers}


def union(*parts: Subjects) -> Subjects:
    names = sorted({name for part in parts for name in part})
    return {name: set().union(*(part.get(name, set()) for part in parts)) for name in names}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def new_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


@many
@given(subjects=groups)
def test_every_modality_validates_and_none_loses_its_last_subject(
    tmp_path_factory: pytest.TempPathFactory, subjects: Subjects
) -> None:
    held_out = hold_out(Corpus(tmp_path_factory.mktemp("corpus")), "demo", subjects)
    for members in subjects.values():
        assert members - held_out, "a modality without a subject to train on"
    if len(subjects) == 1:
        (members,) = subjects.values()
        assert len(held_out) == (1 if len(members) > 1 else 0)
    assert len(held_out) <= len(subjects)


@many
@given(stages=st.lists(groups, min_size=2, max_size=4))
def test_what_was_trained_on_never_turns_into_validation(
    tmp_path_factory: pytest.TempPathFactory, stages: list[Subjects]
) -> None:
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    discovered: Subjects = {}
    trained: set[str] = set()
    validated: set[str] = set()
    for stage in stages:
        discovered = union(discovered, stage)
        held_out = hold_out(corpus, "demo", discovered)
        assert not held_out & trained
        assert validated <= held_out
        for members in discovered.values():
            assert members - held_out or members <= validated, "frozen: who validates stays out"
        validated |= held_out
        trained |= set().union(*discovered.values()) - held_out


def test_the_order_of_modalities_and_subjects_does_not_matter(corpus: Corpus, new_corpus: Corpus) -> None:
    first = hold_out(corpus, "demo", {"CT": sorted(people(*range(20))), "XR": sorted(people(*range(20, 40)))})
    other = {"XR": sorted(people(*range(20, 40)))[::-1], "CT": sorted(people(*range(20)))[::-1]}
    second = hold_out(new_corpus, "demo", other)
    assert first == second
    assert len(first) == 2
    assert corpus.split_file("demo").read_bytes() == new_corpus.split_file("demo").read_bytes()


def test_modalities_of_the_same_people_hold_out_the_same_one(corpus: Corpus) -> None:
    everyone = people(*range(50))
    assert len(hold_out(corpus, "brats", {"T1": everyone, "T2": everyone, "FLAIR": everyone})) == 1


def test_the_draw_is_the_same_for_ever_and_differs_between_datasets(corpus: Corpus) -> None:
    everyone = people(*range(100))
    drawn = [hold_out(corpus, dataset, {"CT": everyone}) for dataset in ("amos", "btcv", "lidc")]
    assert drawn == [{"subject-060"}, {"subject-039"}, {"subject-047"}]


def test_the_split_is_frozen_when_subjects_come_later(corpus: Corpus) -> None:
    before = hold_out(corpus, "demo", {"CT": people(*range(5))})
    print_before = split_fingerprint(corpus)
    after = hold_out(corpus, "demo", {"CT": people(*range(200))})
    assert after == before
    assert split_fingerprint(corpus) == print_before


def test_a_call_that_learns_nothing_leaves_the_file_alone(corpus: Corpus) -> None:
    hold_out(corpus, "demo", {"CT": people(1, 2, 3)})
    inode = corpus.split_file("demo").stat().st_ino
    hold_out(corpus, "demo", {"CT": people(1, 2)})
    assert corpus.split_file("demo").stat().st_ino == inode


def test_a_later_modality_draws_among_new_people_only(corpus: Corpus) -> None:
    first = hold_out(corpus, "demo", {"CT": people(*range(10))})
    known = hold_out(corpus, "demo", {"CT": people(*range(10)), "MRI": people(*range(10))})
    assert known == first, "all of them may have been trained on as CT"
    later = hold_out(corpus, "demo", {"CT": people(*range(10)), "MRI": people(*range(5, 15))})
    (added,) = later - first
    assert added in people(*range(10, 15))


def test_the_only_subject_is_trained_on_until_others_come(corpus: Corpus) -> None:
    assert hold_out(corpus, "demo", {"CT": people(1)}) == frozenset()
    assert hold_out(corpus, "demo", {"CT": people(1, 2)}) == people(2)


def test_nobody_discovered_is_no_split(corpus: Corpus) -> None:
    assert hold_out(corpus, "demo", {}) == frozenset()
    assert not corpus.split_file("demo").exists()


def test_subjects_of_any_name_can_be_drawn(corpus: Corpus) -> None:
    odd = {"", "\0", "é", "\udcff", "a" * 500}
    assert len(hold_out(corpus, "demo", {"CT": odd})) == 1


def test_the_fingerprint_tells_who_is_held_out_in_which_datasets(corpus: Corpus) -> None:
    empty = split_fingerprint(corpus)
    hold_out(corpus, "amos", {"CT": people(*range(10))})
    amos = split_fingerprint(corpus)
    hold_out(corpus, "lidc", {"CT": people(*range(10))})
    assert len({empty, amos, split_fingerprint(corpus)}) == 3
    assert split_fingerprint(corpus, ["amos"]) == amos
    assert split_fingerprint(corpus, ["lidc", "amos"]) == split_fingerprint(corpus)
    assert split_fingerprint(corpus, []) == empty


def test_a_damaged_split_is_not_drawn_anew(corpus: Corpus) -> None:
    hold_out(corpus, "demo", {"CT": people(1, 2)})
    os.truncate(corpus.split_file("demo"), 200)
    with pytest.raises(SetupError, match=r"is damaged.*Restore it"):
        hold_out(corpus, "demo", {"CT": people(1, 2)})
    with pytest.raises(SetupError, match="is damaged"):
        split_fingerprint(corpus)
