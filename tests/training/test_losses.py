"""Losses and LPIPS: parity with reference values, slice draws, the gate, and loading of perceptual weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from catalog.errors import SetupError
from training.losses import (
    GateState,
    GeneratorLosses,
    LossWeights,
    discriminator_loss,
    draw_slices,
    generator_adversarial_loss,
    perceptual_loss,
    reconstruction_loss,
)
from training.lpips import LPIPS, load_lpips

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
MANIFEST = json.loads((REFERENCE / "05_gan_lpips.json").read_text()) if REFERENCE.is_dir() else {"cases": []}
CASES = [case for case in MANIFEST["cases"] if "aniso_d" in case]

WEIGHTS = LossWeights(reconstruction=1.0, perceptual=2.0, diversity=1.0, sharpness=0.2, adversarial=3e-3)


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "05_gan_lpips.safetensors")


@pytest.fixture(scope="module")
def tiny_lpips(tensors: dict[str, Tensor]) -> LPIPS:
    stages: list[nn.Module] = []
    for i in range(3):
        weight = tensors[f"lpips_features.{i}.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        conv.load_state_dict({"weight": weight, "bias": tensors[f"lpips_features.{i}.bias"]})
        stages.append(nn.Sequential(*([nn.MaxPool2d(2)] if i else []), conv, nn.ReLU()))
    return LPIPS(stages, [tensors[f"lpips_linear.{i}.weight"].flatten() for i in range(3)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_lpips_is_the_corrected_reference_without_its_factor_two(
    case: dict[str, Any], tensors: dict[str, Tensor], tiny_lpips: LPIPS
) -> None:
    name = case["id"]
    value = perceptual_loss(tiny_lpips, tensors[f"{name}/fake"], tensors[f"{name}/real"], None)
    torch.testing.assert_close(2 * value, tensors[f"{name}/lpips/corrected"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_losses_give_the_reference_values(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = case["id"]
    real, fake = tensors[f"{name}/real"], tensors[f"{name}/fake"]
    score_real, score_fake = tensors[f"{name}/score_real"], tensors[f"{name}/score_fake"]
    l1, adversarial = reconstruction_loss(fake, real), generator_adversarial_loss(score_fake)

    assert float(l1) == pytest.approx(case["l1"], rel=1e-5)
    assert float(discriminator_loss(score_real, score_fake)) == pytest.approx(case["disc_loss"], rel=1e-5)
    assert float(adversarial) == pytest.approx(case["gan_loss"], rel=1e-5)

    def total(adversarial: Tensor | None) -> float:
        losses = GeneratorLosses(
            reconstruction=l1,
            diversity=torch.tensor(case["prior_loss"]),
            sharpness=torch.tensor(case["entropy"]),
            perceptual=torch.tensor(case["lpips_reference"]) / 2,
            adversarial=adversarial,
        )
        return float(losses.total(WEIGHTS))

    assert total(None) == pytest.approx(case["total_without_gan"], rel=1e-5)
    assert total(adversarial) == pytest.approx(case["total_with_gan"], rel=1e-5)


def test_hinge_on_single_scores(tensors: dict[str, Tensor]) -> None:
    case = next(c for c in MANIFEST["cases"] if c["id"] == "hinge_check")
    real, fake = tensors["hinge_check/score_real"], tensors["hinge_check/score_fake"]
    assert 2 * float(discriminator_loss(real, fake)) == pytest.approx(case["hinge"], rel=1e-5)
    assert float(generator_adversarial_loss(fake)) == pytest.approx(case["gan_loss"], rel=1e-5)


def test_lpips_shift_is_that_of_imagenet() -> None:
    """White, 1 in [-1, 1], must arrive as (1 - mean) / std."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    distance = LPIPS([Spy()], [torch.ones(3)])(torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)
    assert float(distance) > 0


def test_lpips_trains_the_image_and_nothing_of_its_own() -> None:
    torch.manual_seed(0)
    lpips = LPIPS([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())], [torch.rand(4)])
    x, y = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 8, 8)
    lpips(x, y).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(not p.requires_grad for p in lpips.parameters())
    assert float(lpips(y, y)) == 0


def test_lpips_of_half_precision_features_is_finite() -> None:
    lpips = LPIPS([nn.ReLU()], [torch.ones(3)])
    x = torch.full((1, 3, 4, 4), -1.0, dtype=torch.float16).requires_grad_()  # all features are 0
    lpips(x, torch.ones(1, 3, 4, 4, dtype=torch.float16)).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(depth=st.integers(1, 80), limit=st.integers(1, 30), step=st.integers(0, 10**6))
def test_slices_are_distinct_ascending_and_independent_of_the_process(
    depth: int, limit: int, step: int
) -> None:
    whole = draw_slices(depth, seed=666, step=step, samples=range(4), limit=limit)
    if depth <= limit:
        assert whole is None
        return
    assert whole is not None
    assert whole.shape == (4, limit)
    assert (whole.diff(dim=1) > 0).all()
    assert 0 <= int(whole.min()) <= int(whole.max()) < depth
    mine = draw_slices(depth, seed=666, step=step, samples=[2, 3], limit=limit)
    assert mine is not None
    assert torch.equal(mine, whole[2:])


def test_slices_differ_between_steps_crops_and_seeds_and_cover_the_depth() -> None:
    def draw(seed: int, step: int) -> Tensor:
        slices = draw_slices(64, seed=seed, step=step, samples=range(8))
        assert slices is not None
        return slices

    first = draw(0, 0)
    assert len({tuple(row.tolist()) for row in first}) == 8
    assert not torch.equal(first, draw(0, 1))
    assert not torch.equal(first, draw(1, 0))
    counts = torch.stack([draw(0, step) for step in range(100)]).flatten().bincount(minlength=64)
    assert counts.min() > 0.7 * counts.float().mean()


def test_the_perceptual_loss_sees_the_chosen_slices_only() -> None:
    lpips = LPIPS([nn.Identity()], [torch.ones(3)])
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 5, 4, 4, requires_grad=True), torch.rand(2, 3, 5, 4, 4)
    slices = torch.tensor([[0, 3], [1, 4]])
    value = perceptual_loss(lpips, x, y, slices)
    pairs = [(0, 0), (0, 3), (1, 1), (1, 4)]
    expected = lpips(torch.stack([x[b, :, d] for b, d in pairs]), torch.stack([y[b, :, d] for b, d in pairs]))
    torch.testing.assert_close(value, expected)
    value.backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(dim=(1, 3, 4)) > 0
    assert [tuple(pair) for pair in seen.nonzero().tolist()] == pairs


def test_the_gate_opens_late_and_shuts_at_once() -> None:
    gate = GateState()
    assert not gate.is_open()
    opened_after = 0
    while not gate.is_open():
        gate = gate.updated(0.0)
        opened_after += 1
    assert opened_after == 14  # 0.1 * 0.9^14 < 0.025
    assert not gate.updated(0.03).is_open()
    assert GateState(0.02, 0.025).is_open()
    assert not GateState(0.02, float("nan")).is_open()
    assert not GateState(float("nan"), 0.02).is_open()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_one_diverged_step_shuts_the_gate_for_that_step_only(loss: float) -> None:
    gate = GateState(0.02, 0.02).updated(loss)
    assert not gate.is_open()
    assert gate.updated(0.02).is_open()


def vgg_state() -> dict[str, Tensor]:
    """Zeros in the shapes, and under the names, of torchvision's VGG-16."""
    positions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    state = {"classifier.0.weight": torch.zeros(1)}
    for position, before, after in zip(positions, widths[:-1], widths[1:], strict=True):
        state[f"features.{position}.weight"] = torch.zeros(1).expand(after, before, 3, 3)
        state[f"features.{position}.bias"] = torch.full((after,), float(position))
    return state


def linear_state() -> dict[str, Tensor]:
    widths = [64, 128, 256, 512, 512]
    return {f"lin{i}.model.1.weight": torch.full((1, c, 1, 1), i + 1.0) for i, c in enumerate(widths)}


def check_loaded(lpips: LPIPS) -> None:
    biases = [m.bias[0].item() for m in lpips.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert biases == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert [weights[0].item() for weights in lpips.linear] == [1, 2, 3, 4, 5]
    x, shapes = torch.zeros(1, 3, 32, 32), []
    for stage in lpips.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]


def test_perceptual_weights_load_from_a_folder_of_published_files(tmp_path: Path) -> None:
    torch.save(vgg_state(), tmp_path / "vgg16-397923af.pth")
    torch.save(linear_state(), tmp_path / "vgg.pth")
    check_loaded(load_lpips(tmp_path))


def test_perceptual_weights_load_from_one_file_with_the_names_of_the_lpips_package(tmp_path: Path) -> None:
    state = {
        name.replace("features.", "net.slice1."): value.contiguous()
        for name, value in vgg_state().items()
        if name.startswith("features.")
    }
    save_file(state | linear_state(), tmp_path / "lpips.safetensors")
    check_loaded(load_lpips(tmp_path / "lpips.safetensors"))


@pytest.mark.parametrize("path", [None, Path("no/such/file.pth")])
def test_absent_perceptual_weights_name_the_option(path: Path | None) -> None:
    with pytest.raises(SetupError, match=r"lpips_weights_file=PATH.*perceptual=none.*lpips_weight=0"):
        load_lpips(path)


def test_incomplete_perceptual_weights_say_what_is_missing(tmp_path: Path) -> None:
    torch.save(vgg_state(), tmp_path / "vgg16.pth")
    with pytest.raises(SetupError, match=r"lin0\.model\.1\.weight is missing.*and 1 more"):
        load_lpips(tmp_path / "vgg16.pth")


@pytest.mark.parametrize(
    ("name", "content"),
    [("vgg.pth", b"not a checkpoint"), ("vgg.safetensors", b"short"), ("vgg.onnx", b""), ("vgg.pth", b"")],
)
def test_an_unreadable_weight_file_is_a_setup_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=name):
        load_lpips(tmp_path / name)


def test_a_pickle_that_runs_code_is_not_read(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"features.0.weight": _Touch(ran)}, tmp_path / "evil.pth")
    with pytest.raises(SetupError, match="could not be read"):
        load_lpips(tmp_path / "evil.pth")
    assert not ran.exists()


class _Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)
