"""The model card of an export: what a model is, how to use it, what it learned from on which terms."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from catalog.lock import LOCK_FILE, read_lock

_NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial|commercial use prohibited|research use", re.IGNORECASE)
"""Licences, as datasets.yaml states them, that allow no or not every commercial use."""

_TOKENIZER_USE = [
    "import torch, training",
    "",
    'model = training.load_tokenizer("FOLDER")',
    "image = torch.rand(1, 3, 32, 64, 64)  # (B, 3, D, H, W) in [0, 1]; D = 1 in 2-D",
    "with torch.inference_mode():",
    "    output = model(2 * image - 1, level=0)  # DA level, 0 ... 5; of 2-D images 5",
    "print(output.logits.shape, output.reconstruction.shape)",
]
_VIT_USE = [
    "import torch, training",
    "",
    'model = training.load_vit("FOLDER")',
    "image = torch.rand(1, 1, 32, 64, 64)  # (B, 1 or 3, D, H, W) in [0, 1]; D = 1 in 2-D",
    "with torch.inference_mode():",
    "    features = model.forward_features(image, spacing=(1.5, 0.8, 0.8))  # mm along D, H, W",
    "print(features.whole.shape, [stage.shape for stage in features.stages])",
]


def model_card(
    kind: str, config: Mapping[str, Any], trained: Mapping[str, Any] | None, parameters: int, lock: str | None
) -> str:
    """README.md of an export, with the head that hubs read.

    `kind` (tokenizer, mim or vit) and `config` are those of config.json, and so is `trained`: what is known of
    the training. `lock` is that of the corpus.
    """
    tokenizer = kind == "tokenizer"
    trained = trained or {}
    lines = [
        "---",
        "library_name: pumit-data",
        "tags: [medical-imaging, 3d, self-supervised]",
        "---",
        "",
        f"# PUMIT {'tokenizer' if tokenizer else 'ViT'}",
        "",
        f"{parameters / 1e6:.1f} million parameters. Takes 2-D images and volumes of any slice distance: crops "
        "(B, 3, D, H, W) of one level of anisotropy a time.",
        "",
        "```python",
        *(_TOKENIZER_USE if tokenizer else _VIT_USE),
        "```",
        "",
        "## Intended use",
        "",
        "Research on medical images: "
        + (
            "tokens as targets of masked image modelling, and images restored from them."
            if tokenizer
            else "features for retrieval and probing, and initial weights for classification and segmentation."
        ),
        "",
        "Not a medical device: nothing here is meant for diagnosis. Modalities, body parts and scanners that "
        "it was not trained on, and groups of people that its data rarely show, may be represented worse: "
        "measure that on images of your own.",
        "",
        "## Model",
        "",
        *_listed(config),
        "",
        "## Training",
        "",
    ]
    if "source" in trained:
        lines += [f"Imported from `{trained['source']}`; how that was trained is not recorded here.", ""]
    elif not trained:
        lines += ["Not known: the weights were imported from a file.", ""]
    elif not trained.get("measured"):
        lines += ["Nothing was measured: the run had not ended.", ""]
    for title, name in (("Measured", "measured"), ("Data, as fingerprints", "fingerprints"), ("Run", "config")):
        if trained.get(name):
            lines += [f"### {title}", "", *_listed(trained[name]), ""]
    return "\n".join([*lines, "## Data sets and their licences", "", *_data(lock), ""])


def _data(lock: str | None) -> list[str]:
    """Which data sets a lock names, how many images of each, and what their licences come to."""
    if lock is None:
        return [
            "Not recorded; `pumit-data show ID` tells the licence of a data set. Its terms may not allow every "
            "use of the weights."
        ]
    locked = read_lock(lock, LOCK_FILE)
    mix = locked["mix"]
    left_out = mix.get("leave_out", ())
    images, licences = {}, {}
    for name, fields in locked["datasets"].items():
        count = fields["images"].get("ingested", 0)
        if name not in left_out and count:
            images[name], licences[name] = count, fields.get("licence")
    counted = Counter(licence or "not stated" for licence in licences.values())
    summary = ", ".join(f"{count} x {licence}" for licence, count in counted.most_common())
    non_commercial = sorted(name for name, text in licences.items() if text and _NON_COMMERCIAL.search(text))
    unknown = sorted(name for name, text in licences.items() if not text)
    lines = [
        f"Mix `{mix['name']}`: {sum(images.values()):,} images of {len(images)} data sets"
        + (f"; left out: {', '.join(left_out)}." if left_out else "."),
        "",
        f"Licences: {summary}.",
        "",
    ]
    if non_commercial:
        lines += [f"For non-commercial use or research only: **{', '.join(non_commercial)}**.", ""]
    if unknown:
        lines += [f"Licence not stated: {', '.join(unknown)}.", ""]
    lines += ["These terms may not allow every use of the weights.", ""]
    return lines + [
        f"- {name}: {images[name]:,} images, {licences[name] or 'licence not stated'}" for name in images
    ]


def _listed(content: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {name}", *_listed(value, f"{indent}  ")]
        else:
            shown = f"{value:.5g}" if isinstance(value, float) else json.dumps(value)
            lines.append(f"{indent}- {name}: {shown}")
    return lines
