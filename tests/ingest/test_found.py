"""Sources of a call, on disk: what is selected, what is pending, and which pack it goes to."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import ingest.found
from catalog.corpus import Corpus
from catalog.errors import SetupError
from ingest.discover import Found
from ingest.found import FoundSources, Group, find_sources
from ingest.journal import Journal
from ingest.source import ImageSource
from ingest.spec import DatasetSpec
from ingest.task import IngestTask
from tests.demo import DEMO


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "demo"
    root.mkdir()
    for number in range(9):
        (root / f"volume{number}.nii.gz").write_bytes(bytes(number))
        (root / f"picture{number}.png").write_bytes(bytes(number))
    return root


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(Corpus(tmp_path / "data"), "demo")
    journal.folder.mkdir(parents=True)
    return journal


def found(root: Path, journal: Journal, only: str = "", limit: int | None = None) -> FoundSources:
    sources = FoundSources(DEMO, root)
    sources.select(re.compile(only), limit)
    sources.compare(journal, journal.corpus, 1)
    sources.assign_packs(journal, 4)
    return sources


def sources_of(root: Path, groups: Iterator[Group]) -> list[ImageSource]:
    return [
        source
        for group in groups
        for source in IngestTask(
            "t", "r", "demo", Corpus(root), root, group.kinds, group.places, frozenset(), "e"
        ).sources
    ]


def packs(sources: FoundSources) -> dict[str, int | None]:
    return {place.path: group.pack for group in sources.groups() for place in group.places}


def test_tasks_hold_the_sources_as_they_were_found(root: Path, journal: Journal) -> None:
    sources = found(root, journal)
    assert (sources.found, sources.selected, sources.pending) == (18, 18, 18)
    again = sources_of(root, sources.groups())
    assert sorted(again, key=lambda source: source.key) == find_sources(DEMO, root)
    assert sources.pending_bytes_by_format() == {"nifti": 36, "raster": 36}
    assert sources.largest_bytes == 8


def test_only_and_limit_select_the_first_by_key(root: Path, journal: Journal) -> None:
    sources = found(root, journal, only="volume[2-6]", limit=3)
    assert (sources.found, sources.selected, sources.pending) == (18, 3, 3)
    assert list(packs(sources)) == [f"volume{number}.nii.gz" for number in (2, 3, 4)]


def test_small_volumes_share_a_task(root: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = found(root, journal, only="volume")
    assert [len(group.places) for group in sources.groups(4)] == [4, 4, 1]
    monkeypatch.setattr(ingest.found, "_LOT_BYTES", 10)
    assert [len(group.places) for group in sources.groups(4)] == [4, 2, 1, 1, 1]


def test_packs_are_frozen_whatever_part_is_ingested(root: Path, journal: Journal) -> None:
    part = packs(found(root, journal, only="picture5"))
    assert part == {"picture5.png": 1}
    (root / "picture00.png").touch()
    (root / "a.png").touch()
    later = packs(found(root, journal, only="picture|a"))
    assert {path: pack for path, pack in later.items() if path in ("picture0.png", "picture5.png")} == {
        "picture0.png": 0,
        "picture5.png": 1,
    }
    assert later["a.png"] == later["picture00.png"] == 3, "what comes later opens a new pack"


def test_one_found_by_two_globs_of_a_group_counts_once(root: Path) -> None:
    entry = DEMO.model_dump(mode="json")
    entry["images"][0]["globs"] = ["*.nii.gz", "volume*.nii.gz"]
    assert FoundSources(DatasetSpec.model_validate(entry), root).found == 18


def test_ambiguous_sources_are_refused(root: Path) -> None:
    (root / "volume1.mha").touch()
    with pytest.raises(SetupError, match=r"volume1\.mha and volume1\.nii\.gz both have the key 'volume1'"):
        FoundSources(DEMO, root)
    entry = DEMO.model_dump(mode="json")
    entry["images"][1]["globs"] = ["*.nii.gz"]
    with pytest.raises(
        SetupError, match=r"volume0\.nii\.gz is found by two of the `images` groups, the last \[1\]"
    ):
        FoundSources(DatasetSpec.model_validate(entry), root)


def test_nothing_found_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no image found"):
        FoundSources(DEMO, tmp_path)


def test_a_damaged_ledger_is_told(root: Path, journal: Journal) -> None:
    journal.ledger_file.write_bytes(b"no database" * 1000)
    with pytest.raises(SetupError, match=r"ledger\.sqlite is damaged.*delete it"):
        found(root, journal)


def test_memory_does_not_grow_with_the_sources(
    root: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, *_) = find_sources(DEMO, root)

    def peak(number: int) -> int:
        def stream(*_: object) -> Iterator[Found]:
            for index in range(number):
                name = f"image{index * 7919 % number:06d}"
                source = replace(one, path=f"{name}.nii", key=name, subject=name)
                yield Found(group=0, glob=0, share=None, source=source)

        monkeypatch.setattr(ingest.found, "stream_sources", stream)
        tracemalloc.start()
        try:
            sources = found(root, journal)
            assert sum(len(group.places) for group in sources.groups(64)) == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small = peak(10_000)
    # Threads that earlier tests left may allocate as well, though not each time.
    more = min(peak(40_000) for _ in range(2))
    assert more < small + (4 << 20), "30,000 more sources, of which a list would take 15 MB"
