"""What a training step costs, beside the same layers written the plain way and run eagerly.

    python benchmarks/train.py [--quick] [--section tokenizer|vit]... [--threads N] [--rounds N] [--json FILE]

A step is forward, backward and AdamW at the paper's size, float32, one crop: 4 x 8 x 8 tokens of 16 voxels for
the tokenizer (with its L1 and prior terms), 5 x 10 x 10 for the ViT. The peer has the same weights and the
layout of the reference implementation: depth weights summed in each call, maps channels first, convolutions and
linear layers left to PyTorch, layer norm over channels between two permutes, rotary tables computed in each
call, and the AdamW that PyTorch picks by default. Before anything is timed its output and gradients must agree
with ours.

Ours and theirs take turns. CPU time is that of all threads of the process, the fairer figure on a busy machine;
but threads that wait for each other spin, which counts: `--threads 1` is free of that. On a GPU, ours is
compiled and in bf16, theirs eager in fp16 with a scaled loss, and a step's share of the GPU's peak is given.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# This file's own folder comes first otherwise, and it holds a `catalog` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.optim import fused_adamw
from training.quantizer import SoftQuantizer
from training.rope import rotary_angles
from training.sac import SACConv3d, SACConvBlock, SACTransposedConv3d, SpatialState
from training.tokenizer import Tokenizer, TokenizerConfig
from training.vit import Block, UniversalViT, ViTConfig, resample_positions

LEVELS = range(6)
QUICK_LEVELS = (0, 2, 5)
TOKENIZER_TOKENS = (4, 8)
VIT_TOKENS = (5, 10)
GPU_CROPS = 8
"""Crops of a GPU in the paper's runs."""
H200_BF16_FLOPS = 989e12
"""Dense bf16 and fp16 peak that NVIDIA states for the H100 and H200 SXM."""

Row = dict[str, Any]
Case = tuple[str, Callable[[], Tensor], Callable[[], Tensor], nn.Module, nn.Module]
"""Title, our loss and theirs, our network and theirs."""


# -- the peer: the same parameters, the plain way ---------------------------------------------------------


def plain_convolution(layer: SACConv3d, x: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
    weight, stride, padding = layer.weight, layer.stride, layer.padding
    if state.pending > 0:
        stride, padding = max(layer.stride >> state.pending, 1), 0
        weight = weight.unflatten(2, (stride, -1)).sum(dim=3)
    x = F.conv3d(
        x,
        weight,
        layer.bias,
        (stride, layer.stride, layer.stride),
        (padding, layer.padding, layer.padding),
    )
    return x, state.moved(layer.halvings)


def plain_transposed(layer: SACTransposedConv3d, x: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
    stride = min(1 << state.depth_halvings, layer.stride)
    weight = layer.weight.unflatten(2, (stride, -1)).sum(dim=3)
    x = F.conv_transpose3d(x, weight, layer.bias, (stride, layer.stride, layer.stride))
    return x, state.moved(-layer.halvings)


def plain_block(block: SACConvBlock, x: Tensor, state: SpatialState) -> tuple[Tensor, SpatialState]:
    x, state = plain_convolution(block.conv, x, state)
    return F.leaky_relu(block.norm(x), inplace=True), state


def plain_quantizer(quantizer: SoftQuantizer, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projection = quantizer.projection
    logits = F.linear(features.movedim(1, -1).contiguous(), projection.weight, projection.bias)
    p = logits.softmax(dim=-1)
    mean = p.flatten(0, -2).mean(dim=0)
    diversity = (mean * mean.log()).sum()
    sharpness = -(p * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    return torch.einsum("bdhwk,kc->bcdhw", p, quantizer.codebook).contiguous(), diversity, sharpness


def plain_tokenizer(tokenizer: Tokenizer, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, diversity and sharpness."""
    state = SpatialState(level)
    for layer in tokenizer.encoder:
        if isinstance(layer, SACConvBlock):
            x, state = plain_block(layer, x, state)
        else:
            x, state = plain_convolution(layer.conv, x, state)
            x = F.gelu(layer.norm(x.permute(0, 2, 3, 4, 1).contiguous()).permute(0, 4, 1, 2, 3).contiguous())
    x, diversity, sharpness = plain_quantizer(tokenizer.quantizer, x)
    for layer in tokenizer.decoder:
        if isinstance(layer, SACConvBlock):
            x, state = plain_block(layer, x, state)
        elif isinstance(layer, SACTransposedConv3d):
            x, state = plain_transposed(layer, x, state)
        else:
            x, state = plain_transposed(layer.up, x, state)
            x, state = plain_block(layer.block, x, state)
    return x, diversity, sharpness


def plain_rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().repeat_interleave(2, dim=-1), angles.sin().repeat_interleave(2, dim=-1)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def plain_vit_block(block: Block, x: Tensor, angles: Tensor) -> Tensor:
    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    attention, mlp, y = block.attention, block.mlp, block.norm1(x)
    q, k, v = (
        linear(layer, y).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    y = F.scaled_dot_product_attention(plain_rotate(q, angles), plain_rotate(k, angles), v)
    x = x + linear(attention.out, y.transpose(1, 2).flatten(2))
    y = block.norm2(x)
    return x + linear(mlp.out, mlp.norm(F.silu(linear(mlp.gate, y)) * linear(mlp.value, y)))


def plain_vit(vit: UniversalViT, x: Tensor, level: int) -> Tensor:
    x, _ = plain_convolution(vit.patch_embedding, x, SpatialState(level))
    grid = (x.shape[2], x.shape[3], x.shape[4])
    x = (x + resample_positions(vit.position_table, grid)).flatten(2).transpose(1, 2)
    x = torch.cat([vit.class_token.expand(len(x), -1, -1), x], dim=1)
    angles = rotary_angles(grid, vit.config.dim // vit.config.heads, device=x.device)
    angles = torch.cat([angles.new_zeros(1, angles.shape[1]), angles]).to(x.dtype)
    for block in vit.blocks:
        x = plain_vit_block(block, x, angles)
    return vit.norm(x)


# -- cases ------------------------------------------------------------------------------------------------


def crop(crops: int, tokens: tuple[int, int], level: int, device: torch.device) -> Tensor:
    depth = 1 if level == 5 else tokens[0] * (16 >> level)
    return torch.rand(crops, 3, depth, 16 * tokens[1], 16 * tokens[1], device=device) * 2 - 1


def reconstruction_loss(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    reconstruction, diversity, sharpness = outputs
    return F.l1_loss(reconstruction.float(), x) + 0.03 * diversity + sharpness


def title(level: int) -> str:
    return "2-D" if level == 5 else f"level {level}"


def tokenizer_cases(levels: tuple[int, ...], crops: int, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    ours: nn.Module = Tokenizer(TokenizerConfig()).to(device)
    theirs = copy.deepcopy(ours)
    forward = compiled(ours)
    for level in levels:
        x = crop(crops, TOKENIZER_TOKENS, level, device)

        def our_loss(x: Tensor = x, level: int = level) -> Tensor:
            out = forward(x, level)
            return reconstruction_loss((out.reconstruction, out.diversity, out.sharpness), x)

        def their_loss(x: Tensor = x, level: int = level) -> Tensor:
            return reconstruction_loss(plain_tokenizer(theirs, x, level), x)

        check_outputs(ours(x, level).reconstruction, plain_tokenizer(theirs, x, level)[0])
        yield f"tokenizer, {title(level)}", our_loss, their_loss, ours, theirs


def vit_cases(levels: tuple[int, ...], crops: int, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    ours: nn.Module = UniversalViT(ViTConfig.base()).to(device)
    theirs = copy.deepcopy(ours)
    forward = compiled(ours)
    for level in levels:
        x = crop(crops, VIT_TOKENS, level, device)
        features = ours(x, level).detach()
        target = torch.randn_like(features)

        def our_loss(x: Tensor = x, level: int = level, target: Tensor = target) -> Tensor:
            return F.mse_loss(forward(x, level).float(), target)

        def their_loss(x: Tensor = x, level: int = level, target: Tensor = target) -> Tensor:
            return F.mse_loss(plain_vit(theirs, x, level).float(), target)

        check_outputs(features, plain_vit(theirs, x, level))
        yield f"ViT-B, {title(level)}", our_loss, their_loss, ours, theirs


def compiled(module: nn.Module) -> nn.Module:
    """As training runs it: compiled, one graph a level, on a GPU; as it is on a CPU."""
    on_gpu = next(module.parameters()).is_cuda
    return torch.compile(module, fullgraph=True, dynamic=False) if on_gpu else module


def check_outputs(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def check_gradients(case: Case) -> None:
    """Raises AssertionError if a parameter's two gradients differ by 3 % of their length or more.

    Not less: where an activation or the L1 loss has a kink, rounding decides on which side a number falls. Both
    are up to 0.8 % from the gradients in float64.
    """
    name, our_loss, their_loss, ours, theirs = case
    our_loss().backward()
    their_loss().backward()
    for (parameter, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            raise AssertionError(f"{name}: {parameter} got no gradient")
        apart = float((a.grad - b.grad).norm() / (b.grad.norm() + 1e-12))
        if apart > 0.03:
            raise AssertionError(f"{name}: the gradients of {parameter} are {apart:.1%} of their length apart")


# -- clocks -----------------------------------------------------------------------------------------------


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    optimizer.step()


def rounds(steps: dict[str, Callable[[], None]], number: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of interleaved steps, after one of each to warm up."""
    for run in steps.values():
        run()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(number):
        for name, run in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def measure_on_cpu(case: Case, number: int) -> list[Row]:
    name, our_loss, their_loss, ours, theirs = case
    check_gradients(case)
    # Rates of 0: the weights, and with them the work, stay the same.
    our_optimizer = fused_adamw(ours.parameters(), lr=0.0)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0)
    with FlopCounterMode(display=False) as counter:
        their_loss().backward()
    flops = counter.get_total_flops()
    found = rounds(
        {"ours": lambda: step(our_loss, our_optimizer), "theirs": lambda: step(their_loss, their_optimizer)},
        number,
    )
    rows = []
    for which, clock in enumerate(("CPU time", "wall time")):
        a, b = (statistics.median(one[which] for one in found[side]) for side in ("ours", "theirs"))
        rows.append(row(f"{name}, step, {clock}", a, b, "s"))
        print(f"{name}: {flops / 1e9:.0f} GFLOP a step; a second of {clock} does {flops / a / 1e9:.0f}")
    return rows


def measure_on_gpu(case: Case, number: int) -> list[Row]:
    name, our_loss, their_loss, ours, theirs = case
    our_optimizer = fused_adamw(ours.parameters(), lr=0.0)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cuda")

    def our_step() -> None:
        our_optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = our_loss()
        loss.backward()
        our_optimizer.step()
        torch.cuda.synchronize()

    def their_step() -> None:
        their_optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16):
            loss = their_loss()
        scaler.scale(loss).backward()
        scaler.step(their_optimizer)
        scaler.update()
        torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        their_step()
    for _ in range(3):
        our_step()
    found = rounds({"ours": our_step, "theirs": their_step}, max(number, 20))
    a, b = (statistics.median(wall for _, wall in found[side]) for side in ("ours", "theirs"))
    share = counter.get_total_flops() / a / H200_BF16_FLOPS
    return [
        row(f"{name}, GPU step of {GPU_CROPS} crops", a, b, "s", "eager fp16"),
        {"case": f"{name}, GPU share of peak", "ours": share, "peer": "stated bf16 peak", "theirs": 1.0,
         "unit": "of 989 TFLOP/s", "ratio": share},
    ]  # fmt: skip


def row(case: str, ours: float, theirs: float, unit: str, peer: str = "plain layers, eager") -> Row:
    return {"case": case, "ours": ours, "peer": peer, "theirs": theirs, "unit": unit, "ratio": theirs / ours}


SECTIONS = {"tokenizer": tokenizer_cases, "vit": vit_cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"levels {QUICK_LEVELS}, three rounds")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="one or several; default all")
    parser.add_argument("--level", type=int, choices=LEVELS, action="append", help="one or several")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    number = options.rounds or (3 if options.quick else 7)
    gpu = torch.cuda.is_available()

    machine = {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows: list[Row] = []
    for section in options.section or SECTIONS:
        levels = tuple(options.level or (QUICK_LEVELS if options.quick else LEVELS))
        if section == "vit" and options.level is None:
            # Tokens, and with them nearly all of the work, are as many at levels 0 to 4.
            levels = (0, 5)
        for device, crops, measure in (
            ("cpu", 1, measure_on_cpu),
            *([("cuda", GPU_CROPS, measure_on_gpu)] if gpu else []),
        ):
            for case in SECTIONS[section](levels, crops, torch.device(device)):
                for found in measure(case, number):
                    print("{case}: {ours:.4g}, {peer} {theirs:.4g} {unit}, ratio {ratio:.2f}".format(**found))
                    rows.append(found)
    if not gpu:
        print("GPU: not measured: no GPU")
    if options.json is not None:
        report = {"benchmark": "train", "machine": machine, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
