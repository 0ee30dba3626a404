"""Paths alone: the layout says of a path what discovery says of the file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.errors import SetupError
from ingest.found import find_sources
from ingest.layout import Layout, Move
from ingest.spec import DatasetSpec

NAMES = ["a", "B", "ab", "É"]
FOLDERS = st.lists(st.sampled_from(NAMES), max_size=3)
PATHS = st.sets(st.builds(lambda folders: "/".join([*folders, "x.png"]), FOLDERS), min_size=1, max_size=5)
GLOB_PARTS = st.sampled_from(["*", "**", "A*", "?", "b", "[ab]", "é"])
GLOBS = st.builds(lambda parts: "/".join([*parts, "*.PNG"]), st.lists(GLOB_PARTS, max_size=3))


def spec_of(*globs: str, path: str = ".+") -> DatasetSpec:
    group = {
        "globs": globs,
        "format": "raster",
        "dimension": 2,
        "path": f"(?P<all>{path})",
        "key": "{all}",
        "modality": "XR",
    }
    return DatasetSpec.model_validate({"id": "own", "title": "Own", "folder": "Own", "images": [group]})


@given(paths=PATHS, glob=GLOBS)
def test_a_glob_means_the_same_to_discovery_and_to_the_layout(
    paths: set[str], glob: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("layout")
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    spec = spec_of(glob)
    try:
        found = {source.path for source in find_sources(spec, root)}
    except SetupError:  # nothing found
        found = set()
    assert {path for path in paths if Layout(spec).fits(path)} == found


@given(folders=FOLDERS, wrapping=st.lists(st.sampled_from(["download", "v1 (2)"]), min_size=1, max_size=3))
def test_what_is_wrapped_in_folders_is_told_to_go_up(folders: list[str], wrapping: list[str]) -> None:
    inner = "/".join(["release", *folders])
    layout = Layout(spec_of(f"{inner}/*.png"))
    mended = layout.mend("/".join([*wrapping, inner, "x.png"]))
    assert mended == (Move("up", "/".join(wrapping), ""), f"{inner}/x.png")


def test_no_move_is_made_up_for_what_fits_nowhere() -> None:
    layout = Layout(spec_of("images/*/*.png", path=r"images/p\d+/.+"))
    assert layout.mend("thumbnails/p1/x.png") == (Move("rename", "thumbnails", "images"), "images/p1/x.png")
    assert layout.mend("labels/p1/x.png") is None
    assert layout.mend("images/other/x.png") is None
    assert layout.mend("images/p1/x.dcm") is None
