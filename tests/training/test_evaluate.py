"""Evaluating a tokenizer: measures against their definitions, tables that add up, pictures that are there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import SSIMMetric

from training.config import load_preset
from training.data import open_data
from training.evaluate import (
    draw_codebook,
    draw_reconstructions,
    evaluate_tokenizer,
    patch_means,
    ssim,
)
from training.models import build_tokenizer
from training.validation import psnr


@pytest.fixture(scope="module")
def evaluated(toy_corpus):
    settings_ = ["model.codebook_size=32", "model.channels=[16,16,32]", "model.embedding_dim=16"]
    config = load_preset("tokenizer", "tiny", settings_)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.model)
    data = open_data(toy_corpus, config)
    evaluation = evaluate_tokenizer(tokenizer, data.validation, data.modalities, torch.device("cpu"))
    return tokenizer, data, evaluation


def test_every_image_is_counted_once_under_its_modality_and_level(evaluated):
    _, data, evaluation = evaluated
    rows = evaluation.table().to_pylist()
    cells = {(row["modality"], row["da_level"]): row["images"] for row in rows}
    assert cells["CT", 0] == cells["MRI", 2] == cells["fundus", 5] == 1
    assert cells["CT", None] == 1
    assert cells[None, None] == 3 == len(data.modalities)
    assert [row["modality"] for row in rows][-1] is None


def test_the_total_is_what_the_whole_batch_says(evaluated):
    tokenizer, data, evaluation = evaluated
    total = evaluation.table().to_pylist()[-1]
    tokenizer.eval()
    probabilities, errors = [], []
    from training.augment import render

    with torch.no_grad():
        for batch in data.validation:
            crops = render(batch, torch.device("cpu"))
            output = tokenizer(2 * crops.voxels - 1, crops.level)
            probabilities.append(output.logits.softmax(-1).flatten(0, -2).double())
            errors += [
                (r - x).abs().mean()
                for r, x in zip((output.reconstruction / 2 + 0.5).clamp(0, 1), crops.voxels, strict=True)
            ]
    p_NK = torch.cat(probabilities)
    assert total["tokens"] == len(p_NK)
    assert total["l1"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert total["token_entropy"] == pytest.approx(float(-(p_NK * p_NK.log()).sum(-1).mean()), rel=1e-5)
    mean_K = p_NK.mean(0)
    assert total["perplexity"] == pytest.approx(math.exp(float(-(mean_K * mean_K.log()).sum())), rel=1e-5)
    assert total["utilisation"] == pytest.approx(len(p_NK.argmax(-1).unique()) / 32)
    assert total["codes_in_use"] == pytest.approx(float((mean_K > 0.1 / 32).double().mean()))


def test_patch_means_are_means():
    image = torch.rand(3, 2, 32, 48)
    painted = patch_means(image, 16)
    assert painted.shape == image.shape
    torch.testing.assert_close(painted[1, 1, 20, 33], image[1, 1, 16:32, 32:48].mean())
    # No picture that is constant in each patch comes closer.
    assert psnr(painted[None], image[None]) > psnr((painted + 0.01)[None], image[None])


@given(st.sampled_from([1, 2, 4, 8, 16, 64]), st.sampled_from([32, 48]))
@settings(max_examples=12, deadline=None)
def test_similarity_is_one_for_equals_and_less_for_others(depth, side):
    image = torch.rand(3, depth, side, side, generator=torch.Generator().manual_seed(depth))
    assert ssim(image, image) == pytest.approx(1, abs=1e-5)
    assert ssim((image + 0.3).clamp(0, 1), image) < 0.95


def test_similarity_is_that_of_monai():
    image, other = torch.rand(2, 3, 16, 40, 40)
    expected = SSIMMetric(spatial_dims=3)(other[None], image[None])
    assert ssim(other, image) == pytest.approx(float(expected), rel=1e-5)


def test_pictures_show_every_image(evaluated, tmp_path):
    _, _, evaluation = evaluated
    draw_reconstructions(evaluation, tmp_path / "reconstructions.png")
    draw_codebook(evaluation, tmp_path / "codebook.png")
    import matplotlib.image

    for name in ("reconstructions.png", "codebook.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert np.ptp(picture) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebook.png", "reconstructions.png"]
