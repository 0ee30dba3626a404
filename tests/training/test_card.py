"""Model cards: what they must hold, and that their example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from catalog.lock import lock_corpus, lock_text
from catalog.mix import Mix
from catalog.selection import Selection
from shards.layout import LAYOUT_VERSION
from tests.mixed_corpus import write_mixed
from tests.training.test_pretrained import mim, tokenizer, vit
from training.pretrained import export_pretrained

TRAINED = {
    "step": 7,
    "config": {"steps": 7, "data": {"mix": "even"}},
    "fingerprints": {"catalog": "0123abcd"},
    "measured": {"validation/loss": 1.25},
}
LICENCES = {"amos": "CC BY 4.0", "busi": "CC BY-NC (version not stated)", "chaos": "CC BY-NC-SA 4.0"}


def card_of(model: Any, folder: Path, **known: Any) -> str:
    export_pretrained(model, folder, **known)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def lock(tmp_path: Path) -> str:
    corpus = write_mixed(tmp_path / "corpus")
    mix = Mix(leave_out={"chaos": "an evaluation set"})
    made = lock_corpus(
        corpus, "even", mix, Selection(corpus, mix), shards_version=LAYOUT_VERSION, licences=LICENCES
    )
    return lock_text(made)


@pytest.mark.parametrize(
    ("build", "shown"),
    [
        (tokenizer, "torch.Size([1, 2, 4, 4, 16]) torch.Size([1, 3, 32, 64, 64])"),
        (vit, "torch.Size([1, 16]) [" + ", ".join(["torch.Size([1, 16, 2, 4, 4])"] * 4) + "]"),
        (mim, "torch.Size([1, 16]) [" + ", ".join(["torch.Size([1, 16, 2, 4, 4])"] * 4) + "]"),
    ],
)
def test_the_example_of_the_card_runs(build: Any, shown: str, tmp_path: Path, monkeypatch, capsys) -> None:
    card = card_of(build(), tmp_path / "FOLDER")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.strip() == shown


def test_it_tells_what_the_model_learned_from_and_on_which_terms(lock: str, tmp_path: Path) -> None:
    card = card_of(mim(), tmp_path / "model", trained=TRAINED, lock=lock)
    for held in ("validation/loss: 1.25", 'mix: "even"', 'catalog: "0123abcd"', "codebook_size: 16"):
        assert f"- {held}" in card
    assert "## Intended use" in card
    assert "Not a medical device" in card
    assert re.search(r"Mix `even`: [\d,]+ images of 3 data sets; left out: chaos\.", card)
    assert "Licences: 1 x CC BY 4.0, 1 x CC BY-NC (version not stated), 1 x not stated." in card
    assert "For non-commercial use or research only: **busi**." in card
    assert "Licence not stated: ixi." in card
    assert "- chaos:" not in card


@pytest.mark.parametrize(
    ("licence", "named"),
    [
        ("CC BY-NC-SA 4.0", True),
        ("RSNA terms: non-commercial research and education, no re-identification", True),
        ("research use only, commercial use prohibited (custom agreement)", True),
        ("Stanford University Dataset Research Use Agreement", True),
        ("CC BY-SA 4.0", False),
        ("CC0 1.0", False),
    ],
)
def test_non_commercial_terms_are_known(licence: str, named: bool, tmp_path: Path) -> None:
    corpus = write_mixed(tmp_path / "corpus")
    mix = Mix()
    told = lock_corpus(
        corpus, "all", mix, Selection(corpus, mix), shards_version=LAYOUT_VERSION, licences={"ixi": licence}
    )
    card = card_of(vit(), tmp_path / "model", trained=TRAINED, lock=lock_text(told))
    assert ("research only: **ixi**" in card) == named


def test_it_says_what_is_not_known(tmp_path: Path) -> None:
    card = card_of(vit(), tmp_path / "bare")
    assert "Not known: the weights were imported from a file." in card
    assert "Not recorded; `pumit-data show ID`" in card
    imported = card_of(vit(), tmp_path / "imported", trained={"source": "eva.pt", "sha256": "0" * 64})
    assert "Imported from `eva.pt`" in imported
    unfinished = card_of(vit(), tmp_path / "early", trained={**TRAINED, "measured": {}})
    assert "the run had not ended" in unfinished
