"""Quantizers: parity with reference values, stability at extreme logits, statistics over processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.quantizer import (
    GumbelQuantizer,
    NearestQuantizer,
    SoftQuantizer,
    distinct_codes,
    gumbel_temperature,
    mean_usage,
    negative_entropy,
    perplexity,
    utilisation,
)

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = REPOSITORY.parent / "shared" / "reference"
MANIFEST = json.loads((REFERENCE / "03_quantizer.json").read_text()) if REFERENCE.is_dir() else {}
CASES = MANIFEST.get("cases", [])
TEMPERATURES = MANIFEST.get("gumbel_temperature", {"values": []})["values"]


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "03_quantizer.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c["mode"] != "nearest"], ids=lambda case: case["id"])
def test_probabilistic_quantizer_gives_the_reference_values(
    case: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    name, mode = case["id"], case["mode"]
    kind = {"soft": SoftQuantizer, "gumbel": GumbelQuantizer}[mode]
    quantizer = kind(case["in_channels"], case["num_embeddings"], case["embedding_dim"]).eval()
    quantizer.load_state_dict(
        {
            "projection.weight": tensors[f"{mode}.proj.weight"],
            "projection.bias": tensors[f"{mode}.proj.bias"],
            "codebook": tensors[f"{mode}.embedding.weight"],
        }
    )
    z = tensors[f"{name}/z"].requires_grad_()
    out = quantizer(z)

    close(out.z_q, tensors[f"{name}/z_q"])
    close(out.logits, tensors[f"{name}/logits"])
    close(out.probabilities, tensors[f"{name}/probs"])
    close(out.diversity, tensors[f"{name}/loss"])
    close(out.sharpness, tensors[f"{name}/entropy"])
    assert distinct_codes(out.logits.argmax(-1)) == pytest.approx(case["diversity"])
    assert out.diversity.item() + math.log(case["num_embeddings"]) == pytest.approx(
        case["kl_mean_to_uniform"], abs=1e-5
    )
    loss = out.diversity + 0.2 * out.sharpness + (out.z_q * tensors[f"{name}/cotangent_z_q"]).sum()
    loss.backward()
    close(z.grad, tensors[f"{name}/grad_z"])
    close(quantizer.codebook.grad, tensors[f"{name}/grad_embedding"])


@pytest.mark.parametrize("case", [c for c in CASES if c["mode"] == "nearest"], ids=lambda case: case["id"])
def test_nearest_quantizer_gives_the_reference_values(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = case["id"]
    # The reference's beta sits on the codebook term.
    quantizer = NearestQuantizer(
        case["num_embeddings"],
        case["embedding_dim"],
        codebook_weight=case["beta"],
        commitment_weight=1.0,
    )
    quantizer.load_state_dict({"codebook": tensors["nearest.embedding.weight"]})
    z = tensors[f"{name}/z"].requires_grad_()
    out = quantizer(z)

    assert torch.equal(out.logits.argmax(-1), tensors[f"{name}/index"])
    assert torch.equal(out.probabilities.argmax(-1), tensors[f"{name}/index"])
    close(out.z_q, tensors[f"{name}/z_q"])
    close(quantizer.mix(out.probabilities), tensors[f"{name}/z_q"])
    assert out.codebook_loss is not None
    close(out.codebook_loss, tensors[f"{name}/loss"])
    assert distinct_codes(out.logits.argmax(-1)) == pytest.approx(case["diversity"])
    (out.codebook_loss + (out.z_q * tensors[f"{name}/cotangent_z_q"]).sum()).backward()
    close(z.grad, tensors[f"{name}/grad_z"])
    close(quantizer.codebook.grad, tensors[f"{name}/grad_embedding"])


@pytest.mark.parametrize("entry", TEMPERATURES, ids=lambda entry: f"{entry['step']}of{entry['max_steps']}")
def test_gumbel_temperature_follows_the_table(entry: dict[str, Any]) -> None:
    assert gumbel_temperature(entry["step"], entry["max_steps"]) == pytest.approx(
        entry["temperature"], rel=1e-12
    )


def test_gumbel_draws_codes_in_proportion_and_passes_gradients() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(2, 4, 3)
    assert float(quantizer.temperature) == pytest.approx(0.9)
    features = torch.randn(1, 2, 1, 1, 1).expand(1, 2, 20, 20, 20).clone().requires_grad_()
    out = quantizer(features)
    assert torch.allclose(out.probabilities.amax(-1), torch.ones(()))
    share = out.probabilities.detach().flatten(0, -2).mean(0)
    expected = out.logits.detach()[0, 0, 0, 0].softmax(-1)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)
    out.z_q.square().sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_gumbel_is_finite_at_its_lowest_temperature() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(2, 8, 3)
    quantizer.temperature.fill_(gumbel_temperature(1, 1))
    features = (1e3 * torch.randn(1, 2, 4, 4, 4)).requires_grad_()
    quantizer(features).z_q.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_prior_terms_stay_finite_where_probabilities_underflow(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantizer = SoftQuantizer(4, 16, 3).to(dtype)
    with torch.no_grad():
        quantizer.projection.weight.mul_(scale / 4)
        quantizer.projection.bias[0] = -3 * scale  # code 0 is never used
    features = torch.randn(1, 4, 2, 3, 3, dtype=dtype).requires_grad_()
    out = quantizer(features)
    loss = out.diversity + out.sharpness + out.z_q.float().sum()
    loss.backward()
    assert mean_usage(out.probabilities, across_ranks=False).min() == 0
    assert loss.isfinite()
    for gradient in (features.grad, *(p.grad for p in quantizer.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20).filter(lambda m: sum(m) > 0.1))
def test_prior_terms_are_bounded(weights: list[float]) -> None:
    m = torch.tensor(weights, dtype=torch.float64)
    m = m / m.sum()
    assert -math.log(len(m)) - 1e-9 <= float(negative_entropy(m)) <= 1e-9
    assert 1 - 1e-9 <= float(perplexity(m)) <= len(m) + 1e-9


def test_gradients_in_double() -> None:
    torch.manual_seed(0)
    quantizer = SoftQuantizer(2, 5, 2).double()
    features = torch.randn(1, 2, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def losses(features: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(quantizer, {"codebook": codebook}, (features,))
        return out.diversity, out.sharpness, out.z_q

    assert torch.autograd.gradcheck(losses, (features, quantizer.codebook))


def test_metrics_of_use() -> None:
    assert float(utilisation(torch.tensor([[0, 0], [3, 0]]), 8)) == pytest.approx(0.25)
    assert float(perplexity(torch.full((8,), 1 / 8))) == pytest.approx(8)
    assert distinct_codes(torch.tensor([[0, 0], [3, 0]])) == pytest.approx(0.75)


def test_vq_vae_weights_are_the_default() -> None:
    quantizer = NearestQuantizer(4, 2)
    z = torch.randn(1, 2, 1, 2, 2, requires_grad=True)
    out = quantizer(z)
    assert out.codebook_loss is not None
    out.codebook_loss.backward()
    chosen = out.probabilities @ quantizer.codebook.detach()
    pull = 2 * (z.detach() - chosen.movedim(-1, 1)) / z.numel()
    torch.testing.assert_close(z.grad, 0.25 * pull)


SHARES = (1, 2)
"""Crops of each process: uneven, as at the end of a batch that does not divide."""


def _problem() -> tuple[SoftQuantizer, Tensor]:
    torch.manual_seed(5)
    return SoftQuantizer(4, 6, 3), torch.randn(sum(SHARES), 4, 2, 2, 2)


def _gradients(quantizer: SoftQuantizer, features: Tensor, weight: float) -> dict[str, Tensor]:
    out = quantizer(features)
    (weight * (out.diversity + 0.2 * out.sharpness + out.z_q.square().mean())).backward()
    gradients = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    return gradients | {"diversity": out.diversity.detach()}


def _worker(rank: int, folder: Path) -> None:
    """One of two processes; leaves its gradients, averaged over both as data-parallel training does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    quantizer, features = _problem()
    mine = features.split(SHARES)[rank]
    gradients = _gradients(quantizer, mine, len(SHARES) * SHARES[rank] / sum(SHARES))
    for name, value in gradients.items():
        if name != "diversity":
            dist.all_reduce(value)
            value /= len(SHARES)
    save_file(gradients, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_get_the_statistics_and_gradients_of_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(len(SHARES))
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    expected = _gradients(*_problem(), weight=1.0)
    for rank in range(len(SHARES)):
        actual = load_file(tmp_path / f"{rank}.safetensors")
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    _worker(int(sys.argv[1]), Path(sys.argv[2]))
