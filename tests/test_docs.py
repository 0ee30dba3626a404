"""The page on adding a dataset is true: its folder, its entry, its commands, its description of a release."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ingest.found import find_sources
from ingest.spec import get_spec
from tests.commands import run
from tests.conftest import REPOSITORY
from tests.layouts.official import Release

PAGE = (REPOSITORY / "docs/adding-a-dataset.md").read_text(encoding="utf-8")
FIELDS_OF_SPEC = (REPOSITORY / "ingest/spec.py").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def files_of(tree: str) -> list[str]:
    """Paths of the files that a drawn tree shows, relative to its first line."""
    above: list[str] = []
    files = []
    for line in tree.splitlines()[1:]:
        indent, name = re.fullmatch(r"((?:[│ ] {3})*)[├└]── (.+)", line).groups()  # type: ignore[union-attr]
        above[len(indent) // 4 :] = [name.removesuffix("/")]
        if not name.endswith("/"):
            files.append("/".join(above))
    return files


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The folder of the page."""
    files = files_of(blocks("")[0])
    assert len(files) == 6
    tiny = {
        path: {"key": path, "subject": path, "modality": "CT"} for path in files if path.endswith("ct.nii.gz")
    }
    beside = {path: "label" if "mask" in path else "text" for path in files if path not in tiny}
    Release.model_validate({"found": tiny, "beside": beside}).write(tmp_path / "scans/Aorta-CT")
    (tmp_path / "scans/datasets.yaml").write_text(blocks("yaml")[0])
    return tmp_path / "scans"


def test_the_entry_is_short_and_every_field_of_the_table_exists() -> None:
    assert len(blocks("yaml")[0].splitlines()) < 20
    for field in re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE):
        assert re.search(rf"^    {field}: ", FIELDS_OF_SPEC, re.MULTILINE), field


def test_the_commands_of_the_page(raw: Path, tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    places = {"/scans": str(raw), "/corpus": str(data), "ao-001.png": str(tmp_path / "ao-001.png")}
    outputs = {}
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        script, *arguments = shlex.split(line)
        result = run(script, *(places.get(argument, argument) for argument in arguments))
        assert result.returncode == 0, (line, result.stderr)
        outputs[arguments[0]] = result.stdout
    assert "Ready" in outputs["check"]
    assert "warning" not in outputs["check"]
    assert "release/*/*/ct*.nii.gz" in outputs["show"]
    assert "aorta-ct" in outputs["stats"]
    assert (tmp_path / "ao-001.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(run("pumit-data", "stats", "--data", data, "--by", "dataset,modality", "--json").stdout)
    assert [(row["dataset"], row["modality"], row["images"]) for row in rows] == [("aorta-ct", "CT", 3)]


def test_the_description_of_the_release_fits_the_entry(raw: Path, tmp_path: Path) -> None:
    release = Release.model_validate(yaml.safe_load(blocks("yaml")[1]))
    folder = release.write(tmp_path / "described")
    found = {
        source.path: (source.key, source.subject) for source in find_sources(get_spec("aorta-ct", raw), folder)
    }
    assert found == {path: (file.key, file.subject) for path, file in release.found.items()}
