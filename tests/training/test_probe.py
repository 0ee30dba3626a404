"""Probes: classifiers that find what is there, figures that have one meaning, and labels of the catalog."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from catalog.store import location
from tests.training.conftest import write_corpus
from training.config import load_preset
from training.data import LabelledImages, open_data
from training.probe import grey_features, mean_recall, neighbours, probe, ridge

CPU = torch.device("cpu")


def clusters(seed: int, each: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around directions of their own, in ten features of which most are noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(each)
    noise = torch.randn(len(labels), 10, generator=generator, dtype=torch.float64)
    return 3 * torch.eye(3, 10, dtype=torch.float64)[labels] + 0.3 * noise, labels


@pytest.mark.parametrize("classify", [neighbours, ridge])
def test_classes_that_lie_apart_are_told_apart(classify):
    (train, labels), (test, asked) = clusters(0), clusters(1)
    assert torch.equal(classify(train, labels, test, 3), asked)


@pytest.mark.parametrize("classify", [neighbours, ridge])
def test_features_that_say_nothing_are_no_better_than_chance(classify):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(200, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(200) % 4
    assert 0.1 < mean_recall(classify(train, labels, test, 4), labels) < 0.4


def test_a_linear_classifier_sees_what_little_of_the_variance_shows_and_neighbours_do_not():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(80, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(80) % 2
    train[:, 0], test[:, 0] = labels - 0.5, labels - 0.5
    assert mean_recall(ridge(train, labels, test, 2), labels) > 0.95
    assert mean_recall(neighbours(train, labels, test, 2), labels) < 0.8


def test_more_features_than_images_and_features_without_spread_are_no_trouble():
    train, labels = clusters(0, each=2)
    wide = torch.cat([train, torch.ones(len(train), 50, dtype=torch.float64)], dim=1)
    assert torch.equal(ridge(wide, labels, wide, 3), labels)


def test_scale_and_offset_of_features_do_not_matter_to_the_linear_classifier():
    (train, labels), (test, _) = clusters(0), clusters(3)
    assert torch.equal(ridge(train, labels, test, 3), ridge(50 * train - 7, labels, 50 * test - 7, 3))


def test_large_classes_do_not_outweigh_small_ones():
    asked = torch.tensor([0] * 9 + [1])
    assert mean_recall(torch.zeros(10, dtype=torch.int64), asked) == 0.5


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelledImages, LabelledImages]:
    images = [(f"f{n}", "fundus", (3, 1, 64, 64), None) for n in range(4)]
    images += [(f"x{n}", "XR/chest film", (1, 1, 64, 70), None) for n in range(4)]
    images += [(f"m{n}", "MRI/T1", (1, 6, 64, 64), 5.0) for n in range(2)]
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), images)
    overrides = ["data.tokens_z=1", "data.tokens_x=2", "intervals.probe_every_steps=5", "probe_images=5"]
    data = open_data(location(corpus), load_preset("mim", "tiny", overrides))
    assert data.probed is not None
    return data.probed


def test_images_of_every_kind_take_part_and_nobody_is_on_both_sides(probed):
    learnt, tested = ([key for batch in side.batches for key in batch.keys] for side in probed)
    assert len(learnt) == 5
    assert len(tested) == 3
    assert not set(learnt) & set(tested)
    for side in probed:
        assert set(side.labels["modality"].values()) == {"fundus", "XR", "MRI"}
        assert set(side.labels["body_part"].values()) == {"eye", "chest"}, (
            "MRI/T1 is of the chest in this corpus"
        )


def test_the_figures_have_a_name_for_each_column_method_and_kind_of_features(probed):
    figures = probe(grey_features, *probed, CPU)
    assert sorted(figures) == [
        *("body_part/knn/grey", "body_part/linear/grey", "modality/knn/grey", "modality/linear/grey"),
    ]
    assert all(0 <= value <= 1 for value in figures.values())
    assert figures == probe(grey_features, *probed, CPU)


def test_a_column_with_a_single_class_in_common_is_left_out(probed):
    learnt, tested = probed
    alone = {key: "fundus" for key, label in tested.labels["modality"].items() if label == "fundus"}
    unknown = LabelledImages(tested.batches, {"modality": alone, "body_part": {}})
    assert probe(grey_features, learnt, unknown, CPU) == {}


def test_without_held_out_images_or_probes_there_is_nothing_to_read(toy_corpus: Path):
    never = load_preset("mim", "tiny", ["intervals.probe_every_steps=null", "data.tokens_x=2"])
    assert open_data(location(toy_corpus), never).probed is None
