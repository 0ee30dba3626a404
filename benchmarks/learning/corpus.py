"""The corpus of the learning study: some fifty real images in five datasets that each hold subjects out.

images.csv says which image is of whom and what it shows. Images are copied into a raw folder whose paths say
the same, with an entry for each dataset in its datasets.yaml, and ingested by `pumit-data` like anyone's own.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).parent / "images.csv"
FORMATS = {".nii": "nifti", ".gz": "nifti", ".mha": "itk", ".nrrd": "itk", "": "dicom"}
VOLUMES = ("CT", "MRI")
SHARED_WEIGHTS = ("fmri", "sct", "echo")
"""Subjects with a file of many volumes, which together count as a few (PUMIT, appendix)."""


def build(images: Path, work: Path) -> Path:
    """Ingest the images of `images` that the table names into `work`/corpus, unless that is done; return it."""
    corpus, raw = work / "corpus", work / "raw"
    if (corpus / "catalog").is_dir():
        return corpus
    groups: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = defaultdict(dict)
    for row in csv.DictReader(TABLE.open(encoding="utf-8")):
        source = images / row["image"]
        if not source.exists():
            sys.exit(f"{source} is missing: give the folder of the images with --images")
        place = Path(row["dataset"], row["kind"], row["body_part"], row["subject"], source.name)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, _parent(raw / place))
        form = FORMATS.get(source.suffix, "raster")
        weighted = row["subject"] in SHARED_WEIGHTS
        key = (row["kind"], row["body_part"], f"{form}{weighted}")
        group = groups[row["dataset"]].setdefault(key, _group(row, form, weighted))
        group["globs"].append("/".join(place.parts[1:]) + ("/" if source.is_dir() else ""))
    entries = [
        {
            "id": f"real-{name}",
            "title": f"Real images, {name}",
            "folder": name,
            "images": list(of_dataset.values()),
            "private_names": False,
        }
        for name, of_dataset in sorted(groups.items())
    ]
    (raw / "datasets.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    for entry in entries:
        subprocess.run(
            ["pumit-data", "ingest", entry["id"], "--raw", str(raw), "--data", str(corpus)], check=True
        )
    return corpus


def _group(row: dict[str, str], form: str, weighted: bool) -> dict[str, Any]:
    return {
        "globs": [],
        "format": form,
        "dimension": 3 if row["kind"] in VOLUMES else 2,
        "path": r"[^/]+/[^/]+/(?P<subject>[^/]+)/(?P<name>[^/.]+)(?:\.\w+)*/?",
        "key": "{subject}-{name}",
        "subject": "{subject}",
        "modality": row["kind"],
        "body_parts": [row["body_part"]],
        "share_weight": weighted,
    }


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
