"""Tokenizer: parity with reference values, anisotropy, loading of published names, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from catalog.errors import SetupError
from training.quantizer import distinct_codes
from training.sac import SpatialState
from training.tokenizer import Tokenizer, TokenizerConfig, load_reference, reference_names

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
CASES = json.loads((REFERENCE / "04_tokenizer.json").read_text())["cases"] if REFERENCE.is_dir() else []

SMALL = TokenizerConfig(
    codebook_size=64,
    embedding_dim=32,
    feature_channels=32,
    encoder_channels=(16, 32, 64),
    decoder_channels=(32, 16, 8),
)
"""The size of the reference's small tokenizer."""


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "04_tokenizer.safetensors")


@pytest.fixture(scope="module")
def reference(tensors: dict[str, Tensor]) -> Tokenizer:
    tokenizer = Tokenizer(SMALL)
    load_reference(tokenizer, reference_weights(tensors))
    return tokenizer


def reference_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}


def crop(level: int, *, tokens: int = 1, batch: int = 1) -> Tensor:
    depth = 1 if level == 5 else tokens * (16 >> level)
    return torch.rand(batch, 3, depth, 16 * tokens, 16 * tokens) * 2 - 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_tokenizer_gives_the_reference_values(
    case: dict[str, Any], tensors: dict[str, Tensor], reference: Tokenizer
) -> None:
    name, level = case["id"], case["aniso_d"]
    x = tensors[f"{name}/input"]
    with torch.no_grad():
        out = reference(x, level)
        actual = {
            "encoder_features": reference.features(x, level),
            "logits": out.logits,
            "probs": out.logits.softmax(-1),
            "z_q": out.quantised,
            "reconstruction": out.reconstruction,
            "prior_loss": out.diversity,
            "entropy": out.sharpness,
        }
    for what, value in actual.items():
        torch.testing.assert_close(
            value,
            tensors[f"{name}/{what}"],
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, what=what: f"{what}: {text}",
        )
    assert list(out.logits.shape[1:4]) == case["token_grid"]
    assert distinct_codes(out.logits.argmax(-1)) == pytest.approx(case["diversity"])
    l1 = (out.reconstruction - x).abs().mean()
    assert float(l1) == pytest.approx(case["l1_reconstruction"], abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_every_stage_has_the_reference_shape_and_state(
    case: dict[str, Any], tensors: dict[str, Tensor], reference: Tokenizer
) -> None:
    x, state = tensors[f"{case['id']}/input"], SpatialState(case["aniso_d"])
    stages = []
    with torch.no_grad():
        for layer in reference.encoder:
            x, state = layer(x, state)
            stages.append((list(x.shape), state.halvings))
        x = tensors[f"{case['id']}/z_q"]
        for layer in reference.decoder:
            x, state = layer(x, state)
            stages.append((list(x.shape), state.halvings))
    assert stages == [(stage["shape"], stage["num_downsamples"]) for stage in case["stages"]]


@pytest.mark.parametrize("level", range(6))
def test_encode_and_decode_make_up_forward(level: int) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL).eval()
    x = crop(level)
    with torch.no_grad():
        out = tokenizer(x, level)
        logits = tokenizer.encode(x, level)
        image = tokenizer.decode(tokenizer.quantizer.mix(logits.softmax(-1)), level)
    torch.testing.assert_close(logits, out.logits)
    torch.testing.assert_close(image, out.reconstruction)
    assert image.shape == x.shape


@pytest.mark.parametrize("level", range(1, 5))
def test_a_thick_slice_image_has_the_tokens_of_its_repeated_slices(level: int) -> None:
    """Up to level 4 no 3x3x3 kernel meets pending halvings, and group norm sees the same moments."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL).double()
    x = crop(level, tokens=2).double()
    with torch.no_grad():
        thick = tokenizer.encode(x, level)
        for thinner in range(level):
            thin = tokenizer.encode(x.repeat_interleave(2 ** (level - thinner), dim=2), thinner)
            torch.testing.assert_close(thick, thin)


@pytest.mark.parametrize("mode", ["soft", "gumbel", "nearest"])
@pytest.mark.parametrize("level", [0, 5])
def test_every_parameter_gets_a_finite_gradient(mode: str, level: int) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL.model_copy(update={"quantizer": mode}))
    out = tokenizer(crop(level, batch=2), level)
    loss = out.reconstruction.abs().mean() + out.diversity + out.sharpness
    (loss if out.codebook_loss is None else loss + out.codebook_loss).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mode", ["soft", "gumbel", "nearest"])
def test_reference_names_cover_every_parameter_once(mode: str) -> None:
    config = SMALL.model_copy(update={"quantizer": mode})
    names = reference_names(config)
    assert sorted(names.values()) == sorted(Tokenizer(config).state_dict())


def test_loading_reports_everything_that_does_not_fit_and_changes_nothing() -> None:
    source, target = Tokenizer(SMALL), Tokenizer(SMALL)
    state = {theirs: source.state_dict()[ours] for theirs, ours in reference_names(SMALL).items()}
    before = {name: value.clone() for name, value in target.state_dict().items()}
    broken = {name: value for name, value in state.items() if name != "encoder.9.bias"}
    broken |= {"encoder.99.weight": torch.zeros(1), "decoder.8.bias": torch.zeros(1)}
    with pytest.raises(SetupError) as caught:
        load_reference(target, broken)
    message = str(caught.value)
    assert "encoder.9.bias is missing" in message
    assert "encoder.99.weight is unexpected" in message
    assert "decoder.8.bias has shape (1,), the configuration makes it (3,)" in message
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())

    load_reference(target, state)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_the_default_is_the_paper_configuration() -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
    shapes = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    assert tokenizer.config.stride == 16
    assert shapes["quantizer.codebook"] == (1024, 512)
    assert shapes["encoder.0.conv.weight"] == (128, 3, 4, 4, 4)
    assert shapes["decoder.4.weight"] == (128, 3, 4, 4, 4)
    assert len(shapes) == len(reference_names(tokenizer.config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_channels": (16, 32, 60)}, "multiples of 8"),
        ({"decoder_channels": (32, 20, 8)}, "multiples of 8"),
        ({"encoder_channels": (16, 32)}, "must be as many"),
        ({"encoder_strides": (4, 3, 2)}, "powers of two"),
        ({"decoder_strides": (2, 2, 2)}, "same product"),
        ({"quantizer": "nearest", "feature_channels": 64}, "must equal embedding_dim"),
        ({"codebook": 3}, "Extra inputs"),
    ],
)
def test_a_wrong_configuration_names_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig.model_validate(SMALL.model_dump() | change)


@pytest.mark.parametrize(
    ("shape", "level"), [((1, 3, 16, 16, 24), 0), ((1, 3, 6, 16, 16), 1), ((1, 1, 16, 16, 16), 0)]
)
def test_images_that_do_not_divide_into_tokens_are_refused(shape: tuple[int, ...], level: int) -> None:
    with pytest.raises(ValueError, match="multiples of"):
        Tokenizer(SMALL).encode(torch.zeros(shape), level)
