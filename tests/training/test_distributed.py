"""Data-parallel training of the tokenizer in two processes: what one process with the whole batch would do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
CROPS_EACH, RANKS = 1, 2
LEVELS = (0, 2, 4, 5)


def build() -> nn.Module:
    from training.tokenizer import Tokenizer, TokenizerConfig

    torch.manual_seed(3)
    config = TokenizerConfig(
        codebook_size=16,
        embedding_dim=8,
        feature_channels=8,
        encoder_channels=(8, 8, 8),
        decoder_channels=(8, 8, 8),
    )
    return Tokenizer(config)


def batch(level: int) -> Tensor:
    generator = torch.Generator().manual_seed(level)
    return torch.rand(CROPS_EACH * RANKS, 3, max(16 >> level, 1), 32, 32, generator=generator) * 2 - 1


def steps(model: nn.Module, mine: slice) -> dict[str, Tensor]:
    """Loss and gradients of a step at each level, without an update between them."""
    found: dict[str, Tensor] = {}
    for level in LEVELS:
        model.zero_grad()
        x = batch(level)[mine]
        out = model(x, level)
        loss = (out.reconstruction - x).abs().mean() + out.diversity + 0.3 * out.sharpness
        loss.backward()
        found[f"{level}/loss"] = loss.detach().reshape(1)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"level {level} leaves {name} unused"
            gradient = parameter.grad
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[f"{level}/{name.removeprefix('module.')}"] = whole.clone()
    return found


def _worker(kind: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    model = build()
    if kind == "ddp":
        # Neither find_unused_parameters nor a static graph: every parameter has a gradient at every level.
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in (*model.encoder, *model.decoder, model.quantizer):
            fully_shard(layer)
        fully_shard(model)
    found = steps(model, slice(rank * CROPS_EACH, (rank + 1) * CROPS_EACH))
    for level in LEVELS:
        dist.all_reduce(found[f"{level}/loss"])
        found[f"{level}/loss"] /= RANKS
    save_file(found, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_loss_and_gradients_of_one(kind: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, kind]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(RANKS)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * RANKS

    expected = steps(build(), slice(None))
    for rank in range(RANKS):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
