"""Which parameters of a backbone a task trains, and what it adds to them.

    full            all
    linear          none: the backbone is frozen, the task trains its head
    last-K          the last K blocks and the norm behind them
    lora-R          low-rank updates of the query and value projections (Hu et al., 2022), of rank R, 8
    adapter-N       bottlenecks of N features, 64, behind attention and MLP, and norms (Houlsby et al., 2019)
    adaptformer-N   a bottleneck of N features, 64, beside the MLP, times 0.1 (Chen et al., 2022)

What is added is zero at first: the network that begins to learn is the one that was loaded.

Shape suffixes: B crops, L tokens, C features.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from catalog.errors import SetupError
from training.backbone import Backbone
from training.downstream.initialisations import as_module
from training.onednn import Linear
from training.vit import Block, UniversalViT

MODES = ("full", "linear", "last-K", "lora[-R]", "adapter[-N]", "adaptformer[-N]")
LORA_RANK, LORA_SCALE = 8, 2
"""Rank, and by what the update is multiplied (alpha / rank)."""
BOTTLENECK = 64
ADAPTFORMER_SCALE = 0.1

_MODE = re.compile(r"(full|linear|last|lora|adapter|adaptformer)(?:-(\d+))?")
_DEFAULTS = {"lora": LORA_RANK, "adapter": BOTTLENECK, "adaptformer": BOTTLENECK}


def adapt(backbone: Backbone, mode: str) -> None:
    """Freeze what `mode` does not train and add what it adds, in place.

    Raises SetupError for an unknown mode, and where the mode needs the blocks of a ViT and the backbone has
    none. Draws initial weights from torch's generator.
    """
    kind, number = parse_mode(mode)
    module = as_module(backbone)
    if kind == "full":
        module.requires_grad_(True)
        return
    vit = None if kind == "linear" else _vit_of(module, mode)
    module.requires_grad_(False)
    if vit is None:
        return
    if kind == "last":
        if number > len(vit.blocks):
            raise SetupError(f"mode {mode}: the ViT has {len(vit.blocks)} blocks")
        for trained in (*vit.blocks[-number:], vit.norm):
            trained.requires_grad_(True)
    elif kind == "lora":
        _add_lora(vit, number)
    else:
        add = _add_adapter if kind == "adapter" else _add_adaptformer
        for block in vit.blocks:
            add(cast(Block, block), number)


def parse_mode(mode: str) -> tuple[str, int]:
    """A mode as its kind and its number (blocks, rank or features; 0 where it has none).

    Raises SetupError if there is no such mode.
    """
    found = _MODE.fullmatch(mode)
    kind, number = found.groups() if found else ("", None)
    if (
        not found
        or (kind in ("full", "linear")) > (number is None)
        or number == "0"
        or (kind == "last" and not number)
    ):
        raise SetupError(f"there is no mode {mode!r} of adapting a network. Modes: {', '.join(MODES)}")
    return kind, int(number) if number else _DEFAULTS.get(kind, 0)


def trained_parameters(module: nn.Module) -> int:
    """How many numbers of `module` an optimizer changes."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Bottleneck(nn.Module):
    """(B, L, C) to (B, L, C) through few features; zero at first."""

    def __init__(self, dim: int, features: int, activation: Any) -> None:
        super().__init__()
        self.down = Linear(dim, features)
        self.up = Linear(features, dim)
        self.activation = activation
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x_BLC)))  # type: ignore[no-any-return]


class Followed(nn.Module):
    """A branch of a block and a bottleneck with a skip connection behind it."""

    def __init__(self, branch: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.branch = branch
        self.bottleneck = bottleneck

    def forward(self, x_BLC: Tensor, *more: Any) -> Tensor:
        y_BLC = self.branch(x_BLC, *more)
        return y_BLC + self.bottleneck(y_BLC)  # type: ignore[no-any-return]


class Accompanied(nn.Module):
    """A branch of a block plus `scale` times a bottleneck of the same input."""

    def __init__(self, branch: nn.Module, bottleneck: Bottleneck, scale: float) -> None:
        super().__init__()
        self.branch = branch
        self.bottleneck = bottleneck
        self.scale = scale

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.branch(x_BLC) + self.scale * self.bottleneck(x_BLC)  # type: ignore[no-any-return]


def _vit_of(module: nn.Module, mode: str) -> UniversalViT:
    """The ViT within a backbone."""
    for part in module.modules():
        if isinstance(part, UniversalViT):
            return part
    raise SetupError(
        f"mode {mode} adapts the blocks of a ViT of ours, and {type(module).__name__} has none. "
        "For this network choose full or linear."
    )


def _add_lora(vit: UniversalViT, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SetupError(f"mode lora needs {error.name}: pip install 'pumit-data[downstream]'") from error
    # By full name: the MLP has a projection called value, too.
    wanted = r"blocks\.\d+\.attention\.(query|value)"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=wanted), vit)


def _add_adapter(block: Block, features: int) -> None:
    dim = block.norm1.normalized_shape[0]
    device = block.norm1.weight.device
    for name in ("attention", "mlp"):
        bottleneck = Bottleneck(dim, features, F.gelu).to(device)
        block.add_module(name, Followed(block.get_submodule(name), bottleneck))
    block.norm1.requires_grad_(True)
    block.norm2.requires_grad_(True)


def _add_adaptformer(block: Block, features: int) -> None:
    bottleneck = Bottleneck(block.norm1.normalized_shape[0], features, F.relu).to(block.norm1.weight.device)
    block.add_module("mlp", Accompanied(block.mlp, bottleneck, ADAPTFORMER_SCALE))
