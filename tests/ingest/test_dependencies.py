"""What reading needs: nothing under a licence that would bind its users."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

COPYLEFT = {"pylibjpeg-libjpeg", "libjpeg"}
"""The usual decoder plug-in of pydicom; GPL-3."""

SCRIPT = """
import sys
from pathlib import Path
from ingest.found import find_sources
from ingest.readers import read_volumes
from ingest.spec import get_spec
for source in find_sources(get_spec("sample"), Path(sys.argv[1])):
    for volume in read_volumes(source):
        assert volume.voxels.size
print(*sys.modules)
"""


def test_reading_every_sample_loads_no_decoder_under_the_gpl(samples: Path) -> None:
    checkout = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, samples], capture_output=True, text=True, cwd=checkout, check=True
    )
    loaded = {module.split(".")[0] for module in result.stdout.split()}
    assert {"pydicom", "imagecodecs", "isal", "SimpleITK", "PIL"} <= loaded
    assert not loaded & {"libjpeg", "pylibjpeg", "gdcm"}


def test_no_dependency_brings_one_along() -> None:
    checkout = Path(__file__).resolve().parents[2]
    wanted = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["dependencies"]
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if name in seen or "extra ==" in requirement:
            continue
        seen.add(name)
        try:
            wanted += metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
    assert "pydicom" in seen
    assert not seen & COPYLEFT
