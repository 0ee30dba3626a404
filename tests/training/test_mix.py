"""Training from a mix: what is drawn, what a resumed run refuses, and what checkpoints tell of the corpus."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.lock import LOCK_FILE, check_lock, read_lock
from catalog.mix import Mix, make_mix, write_mix
from catalog.query import load_catalog
from catalog.selection import Selection
from catalog.shares import CROP, tally
from catalog.write import merge_dataset
from shards.layout import LAYOUT_VERSION
from tests.catalog.test_mix import write_groups
from tests.commands import run
from tests.mixed_corpus import training_rows, write_mixed
from training.config import TokenizerRunConfig, load_preset
from training.data import Candidates, open_data, plan_batches
from training.pretrained import load_tokenizer
from training.run import newest_checkpoint, read_state
from training.train_tokenizer import train

SMALL = [
    *("data.tokens_z=1", "data.tokens_x=2", "data.batch_size=2", "data.workers=0", "device=cpu"),
    *("model.channels=[8,8,16]", "model.codebook_size=16", "model.embedding_dim=8", "steps=3"),
    *("optim.warmup_steps=1", "intervals.save_every_steps=1", "intervals.validate_every_steps=3"),
]
RULES = {
    "where": "modality <> 'XR'",
    "leave_out": ["chaos"],
    "weights": [{"by": "modality", "factors": {"CT": 3, "US": 0.25}}, {"where": "key < '010'", "factor": 0}],
}


def config(*overrides: str) -> TokenizerRunConfig:
    return load_preset("tokenizer", "tiny", [*SMALL, *overrides])


def test_images_are_drawn_as_often_as_the_mix_says(tmp_path: Path) -> None:
    corpus = write_mixed(tmp_path)
    selection = Selection(corpus, make_mix(RULES, ""))
    planner = plan_batches(corpus, CROP, 256, 5, Candidates(100), selection)
    counted = tally(corpus, selection)
    # The planner's own marginal probabilities are those that `mix show` tells.
    assert planner.level_probabilities == pytest.approx([row["after"] for row in counted.levels()], abs=1e-12)
    factor = {"CT": 3, "US": 0.25, "XR": 0}
    weights = {
        f"{row['dataset']}/{row['key']}": row["sampling_weight"] * factor.get(row["modality"], 1)
        for row in training_rows()
        if row["dataset"] != "chaos" and row["key"] >= "010"
    }
    weights = {name: weight for name, weight in weights.items() if weight}
    steps = 400
    # One level a step makes draws of a step alike: chi-squared is of images given their level, in proportion.
    drawn: Counter[str] = Counter()
    by_level: Counter[int] = Counter()
    expected: Counter[str] = Counter()
    for step in range(steps):
        plan = planner.plan(step)
        by_level[plan.level] += 1
        drawn.update(f"{sample.image.dataset}/{sample.image.key}" for sample in plan.samples)
    masses = planner._masses(slice(0, len(planner._images)))
    names = [f"{image.dataset}/{image.key}" for image in planner._images.take(np.arange(len(planner._images)))]
    assert set(names) == set(weights)
    assert dict(zip(names, masses.sum(axis=1), strict=True)) == pytest.approx(weights)
    for level, count in by_level.items():
        for name, mass in zip(names, masses[:, level] / masses[:, level].sum(), strict=True):
            expected[name] += mass * count * planner.batch_size
    assert drawn.keys() <= expected.keys()
    chi_squared = sum((drawn[name] - mean) ** 2 / mean for name, mean in expected.items())
    freedom = len(expected) - len(by_level)
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_mix_leaves_out_validation_images_too(tmp_path: Path) -> None:
    corpus = write_mixed(tmp_path)
    candidates = Candidates(1000)
    plan_batches(corpus, CROP, 8, 5, candidates, Selection(corpus, make_mix(RULES, "")))
    found = {(row["dataset"], row["key"]) for row in candidates.table().to_pylist()}
    held_out = load_catalog(corpus, split="validation").to_pylist()
    kept = [row for row in held_out if row["dataset"] != "chaos" and row["modality"] != "XR"]
    expected = {(row["dataset"], row["key"]) for row in kept if row["key"] >= "010"}
    assert {name for name in found if name in {(row["dataset"], row["key"]) for row in held_out}} == expected
    assert len(expected) < len(held_out)


def test_a_mix_that_leaves_nothing_is_told(tmp_path: Path) -> None:
    corpus = write_mixed(tmp_path)
    with pytest.raises(SetupError, match="pumit-data mix show NAME"):
        plan_batches(corpus, CROP, 8, 5, Candidates(1), Selection(corpus, make_mix({"where": "false"}, "")))


@pytest.fixture
def corpus(toy_corpus: Path, tmp_path: Path) -> Corpus:
    shutil.copytree(toy_corpus, tmp_path / "corpus")
    return Corpus(tmp_path / "corpus")


def test_batches_are_those_of_the_mix_alone(corpus: Corpus) -> None:
    write_mix(corpus, "mine", Mix(where="modality <> 'MRI'"))
    write_mix(corpus, "same", Mix(where="modality <> 'MRI'", description="under another name"))
    mine, same = (open_data(corpus.root, config(f"data.mix={name}")) for name in ("mine", "same"))
    assert [mine.planner.plan(step) for step in range(9)] == [same.planner.plan(step) for step in range(9)]
    assert mine.fingerprints == same.fingerprints
    assert set(mine.modalities.values()) == {"CT", "fundus"}
    with pytest.raises(
        SetupError, match=r"no mix 'mein'.*Did you mean 'mine'\?.*Mixes: all, no-benchmarks, mine"
    ):
        open_data(corpus.root, config("data.mix=mein"))


def test_a_resumed_run_refuses_a_changed_mix_and_goes_on_with_an_equal_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    write_mix(corpus, "mine", Mix(where="modality <> 'MRI'"))
    settings, folder = config("data.mix=mine"), tmp_path / "run"
    train(settings, corpus.root, folder, resume=False)
    shutil.rmtree(newest_checkpoint(folder))
    write_mix(corpus, "mine", Mix(where="modality <> 'CT'"), force=True)
    with pytest.raises(SetupError, match="the mix changed since this run began"):
        train(settings, corpus.root, folder, resume=True)
    write_mix(corpus, "mine", Mix(where="modality <> 'MRI'", description="as it was"), force=True)
    train(settings, corpus.root, folder, resume=True)
    with pytest.raises(SetupError, match=r"data\.mix was 'mine', is 'all'"):
        train(config(), corpus.root, folder, resume=True)


def test_a_resumed_run_refuses_other_copies(corpus: Corpus, tmp_path: Path) -> None:
    settings, folder = config("data.dedup=true"), tmp_path / "run"
    with pytest.raises(SetupError, match="Type `pumit-data duplicates"):
        open_data(corpus.root, settings)
    rows = [row["key"] for row in load_catalog(corpus, split="train").to_pylist()]
    write_groups(corpus, [(0, "toy", rows[0], True), (0, "toy", rows[1], False)])
    train(settings, corpus.root, folder, resume=False)
    assert "duplicates" in read_state(newest_checkpoint(folder))["fingerprints"]
    write_groups(corpus, [(0, "toy", rows[0], False), (0, "toy", rows[1], True)])
    with pytest.raises(SetupError, match="the duplicates changed since this run began"):
        train(settings, corpus.root, folder, resume=True)


def test_checkpoints_and_exports_hold_the_lock_of_their_corpus(corpus: Corpus, tmp_path: Path) -> None:
    folder, export = tmp_path / "run", tmp_path / "export"
    train(config("data.mix=no-benchmarks"), corpus.root, folder, resume=False, licences={"toy": "CC0"})
    texts = {(place / LOCK_FILE).read_text() for place in (folder, newest_checkpoint(folder))}
    (text,) = texts
    locked = read_lock(text, LOCK_FILE)
    assert locked["datasets"]["toy"]["licence"] == "CC0"
    assert locked["datasets"]["toy"]["images"] == {"ingested": 6}
    assert locked["mix"]["name"] == "no-benchmarks"
    assert check_lock(corpus, locked, LAYOUT_VERSION) == []
    exported = run("pumit-train", "export", str(folder), "--out", str(export))
    assert exported.returncode == 0, exported.stderr
    assert (export / LOCK_FILE).read_text() == text
    assert "toy: 6 images, CC0" in (export / "README.md").read_text()
    for name, value in load_tokenizer(folder).state_dict().items():
        assert torch.equal(load_tokenizer(export).state_dict()[name], value)
    row: dict[str, Any] = load_catalog(corpus).to_pylist()[0]
    merge_dataset(corpus, "toy", [row | {"sampling_weight": 2.0}], [])
    assert [one.what for one in check_lock(corpus, locked, LAYOUT_VERSION)] == ["weights"]


def test_the_command_takes_a_mix_by_name_and_dedup(corpus: Corpus, tmp_path: Path) -> None:
    write_mix(corpus, "no", Mix(where="modality <> 'MRI'"))  # a word that YAML would read as false
    arguments = ("--data", corpus.root, "--run", tmp_path / "run")
    refused = run("pumit-train", "tokenizer", "--mix", "no", "--dedup", *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: nobody has looked for duplicates")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
