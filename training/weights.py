"""Weights of the universal ViT from files: 2-D EVA-02, the reference implementation, and our own.

Four sets of names are understood: EVA-02 as published (`mlp.w1`, `attn.q_bias`), EVA-02 as timm saves it
(`mlp.fc1_g`, `attn.q_proj.bias`), the reference implementation of PUMIT (as EVA-02, with 3-D patch kernel,
3-D position table and `mim_head`), and the names of `UniversalViT` and `MaskedImageModel`. A file fills the
whole ViT or the call fails and the model is untouched: a key that is not known, a parameter of the ViT that
is not in the file, and a shape that cannot be adapted are errors.

Shape suffixes: O output, I input channels, C features, d, h, w cells of a position table, L = 1 + h * w rows.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from catalog.errors import SetupError
from training.inflation import inflate_depth, spread_input_channels
from training.mim import MaskedImageModel
from training.vit import UniversalViT, resample_positions

_VIT = "vit."
_CLASS = "vit.class_token"
_POSITIONS = "vit.position_table"
_PATCH_KERNEL = "vit.patch_embedding.weight"

_NAMES = {
    "cls_token": _CLASS,
    "pos_embed": _POSITIONS,
    "patch_embed.proj.weight": _PATCH_KERNEL,
    "patch_embed.proj.bias": "vit.patch_embedding.bias",
    # timm moves the last norm behind the pooling where a model averages its tokens.
    "fc_norm.weight": "vit.norm.weight",
    "fc_norm.bias": "vit.norm.bias",
    "mim_head.0.weight": "head.0.weight",
    "mim_head.0.bias": "head.0.bias",
    "mim_head.2.weight": "head.2.weight",
    "mim_head.2.bias": "head.2.bias",
}
"""Foreign name to name in `MaskedImageModel`."""

_BLOCK_NAMES = {
    "attn.q_proj": "attention.query",
    "attn.q_bias": "attention.query.bias",
    "attn.k_proj": "attention.key",
    "attn.v_proj": "attention.value",
    "attn.v_bias": "attention.value.bias",
    "attn.proj": "attention.out",
    "mlp.w1": "mlp.gate",
    "mlp.fc1_g": "mlp.gate",
    "mlp.w2": "mlp.value",
    "mlp.fc1_x": "mlp.value",
    "mlp.ffn_ln": "mlp.norm",
    "mlp.w3": "mlp.out",
    "mlp.fc2": "mlp.out",
}
"""The same within a block, where the last part (weight, bias) may follow."""

_TASK_NAMES = re.compile(r"mask_token|head\.[02]\.(weight|bias)")
"""Parameters of `MaskedImageModel` beside its ViT."""

_NEEDLESS = re.compile(
    r"(.*\.)?rope\.freqs_(cos|sin)|(lm_head|head)\.(weight|bias)|(projector|predictor|prototypes)\..*|centre"
)
"""Keys without a counterpart here: tables that are computed, heads of other classes, codes or objectives."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a file gave to a model. `str()` is meant for a log."""

    path: Path
    loaded: tuple[str, ...]
    """Parameters of the model that now hold the file's values."""
    missing: tuple[str, ...]
    """Parameters of the model that the file does not have; they keep their values."""
    unused: tuple[str, ...]
    """Keys of the file for which this model has no place."""
    notes: tuple[str, ...]
    """What was adapted on the way, and what to know about the file."""

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.loaded)} of {len(self.loaded) + len(self.missing)} parameters loaded"]
        if self.missing:
            lines.append(f"  not in the file, left as they were: {', '.join(self.missing)}")
        if self.unused:
            lines.append(f"  in the file, not used: {', '.join(self.unused)}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def load_weights(
    model: UniversalViT | MaskedImageModel,
    path: Path,
    position_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Fill `model` from a checkpoint in any of the four sets of names, and report what was done.

    A 2-D patch kernel is resampled bicubically to the patch size and spread evenly over the depth, so that
    one slice gives the 2-D features. The position of the 2-D class token (row 0 of the table) is added to the
    class token; the rest, repeated over the depth, and any 3-D table are resampled to the model's table.
    `position_grid` is the (h, w) of a 2-D table that is not square.

    Raises SetupError, and leaves the model as it was, where the file cannot be read or does not fit.
    """
    prefix = _VIT if isinstance(model, UniversalViT) else ""
    parameters = {prefix + name: parameter for name, parameter in model.named_parameters()}
    tensors = read_tensors(path)
    found, unused = _by_name(tensors, parameters, path)
    notes = _adapt(found, parameters, path, position_grid)
    if "mim_head.0.weight" in tensors and getattr(model.config, "mask_token_position", False):
        notes.append(
            "this mask token was trained without position: its predictions need mask_token_position=false"
        )

    missing = [name for name in parameters if name not in found]
    if incomplete := [name for name in missing if name.startswith(_VIT)]:
        raise SetupError(
            f"{path} lacks {_some(incomplete)} of the ViT ({len(found)} of {len(parameters)} parameters are in "
            "it). Check that the file is whole and that it is of a ViT of this size."
        )
    for name, tensor in found.items():
        if tensor.shape != parameters[name].shape:
            raise SetupError(
                f"{path}: {name} is {_by(tensor.shape)}, the model needs {_by(parameters[name].shape)}. "
                "Choose the configuration that the weights were made with."
            )
    with torch.no_grad():
        for name, tensor in found.items():
            parameters[name].copy_(tensor)

    return LoadReport(
        path=path,
        loaded=tuple(name.removeprefix(prefix) for name in found),
        missing=tuple(name.removeprefix(prefix) for name in missing),
        unused=tuple(unused),
        notes=tuple(notes),
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch checkpoint (.pt, .pth, .bin, .ckpt), on the CPU.

    A checkpoint may keep them one level down (`state_dict`, `module`, `model`). Nothing of it is executed.
    Raises SetupError where it cannot be read so.
    """
    if not path.is_file():
        raise SetupError(f"there is no weight file {path}")
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        except (SafetensorError, OSError) as error:
            raise SetupError(f"{path} is not a readable safetensors file: {error}. Fetch it again.") from error
    if path.suffix not in {".pt", ".pth", ".bin", ".ckpt"}:
        raise SetupError(f"{path}: weights come as .safetensors, or as .pt, .pth, .bin or .ckpt of PyTorch")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SetupError(
            f"{path} is no PyTorch checkpoint, or holds more than tensors and would have to run code to load. "
            "Where you trust it, save its tensors alone with safetensors and give that file."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise SetupError(f"{path} is not a readable PyTorch checkpoint: {error}. Fetch it again.") from error
    for level in ("state_dict", "module", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(level), Mapping):
            content = content[level]
            break
    if not isinstance(content, Mapping) or not content:
        raise SetupError(f"{path} holds no tensors by name. Save the model's state_dict.")
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise SetupError(f"{path}: {_some(others)} are not tensors. Save the model's state_dict alone.")
    return dict(content)


def inflate_patch_kernel(kernel_OIhw: Tensor, patch: int) -> Tensor:
    """A 2-D patch kernel for cubic patches: (O, I, patch, patch, patch) float32.

    In plane it is resampled bicubically, values kept. Along depth it is divided by the depth and repeated:
    slices of equal content, and the one slice of a 2-D image, whose kernel is the sum, give the 2-D result.
    """
    kernel_OIhw = kernel_OIhw.float()
    if kernel_OIhw.shape[2:] != (patch, patch):
        kernel_OIhw = F.interpolate(kernel_OIhw, size=(patch, patch), mode="bicubic", align_corners=False)
    return inflate_depth(kernel_OIhw, patch)


def split_position_rows(rows_1LC: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """A 2-D position table as (position of the class token (1, 1, C), table (1, C, 1, h, w)), float32.

    Raises SetupError where the number of rows is neither 1 + h * w of `grid` nor, without it, one more than
    a square.
    """
    patches = rows_1LC.shape[1] - 1
    height, width = grid or (math.isqrt(max(patches, 0)),) * 2
    if patches < 1 or height * width != patches:
        raise SetupError(
            f"a 2-D position table of {patches} patches does not fill {height} x {width}. "
            "Give the position_grid (h, w) of the model that it is of."
        )
    rows_1LC = rows_1LC.float()
    patches_1CL = rows_1LC[:, 1:].transpose(1, 2)
    return rows_1LC[:, :1], patches_1CL.reshape(1, -1, 1, height, width)


def _own_name(key: str) -> str:
    """The name in `MaskedImageModel` of a key in any of the four sets of names."""
    if key in _NAMES:
        return _NAMES[key]
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", key):
        block, inner = match.groups()
        for foreign, own in _BLOCK_NAMES.items():
            if inner == foreign or inner.startswith(f"{foreign}."):
                return f"{_VIT}{block}{own}{inner.removeprefix(foreign)}"
    return key if key.startswith(_VIT) or _TASK_NAMES.fullmatch(key) else _VIT + key


def _by_name(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors under the names of `MaskedImageModel`, and the keys that have no place there."""
    found: dict[str, Tensor] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for key, tensor in tensors.items():
        name = _own_name(key)
        if name in found:
            raise SetupError(f"{path} has {name} twice, once as {key}. Remove one of them.")
        if name in parameters:
            found[name] = tensor
        elif _TASK_NAMES.fullmatch(name) or _NEEDLESS.fullmatch(key):
            unused.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise SetupError(
            f"{path} holds {_some(unknown)}, for which this model has no parameter. Choose the configuration "
            "that the weights were made with (blocks, inner norm of the MLP, separate q, k and v)."
        )
    return found, unused


def _adapt(
    found: dict[str, Tensor],
    parameters: Mapping[str, Tensor],
    path: Path,
    position_grid: tuple[int, int] | None,
) -> list[str]:
    """Bring patch kernel, positions and class token in `found` to the model's shapes; say what was done."""
    notes: list[str] = []
    kernel = found.get(_PATCH_KERNEL)
    if kernel is not None:
        _, channels, patch, *_ = parameters[_PATCH_KERNEL].shape
        if kernel.ndim == 4:
            notes.append(f"patch kernel {_by(kernel.shape[2:])} inflated to {_by((patch,) * 3)}")
            kernel = inflate_patch_kernel(kernel, patch)
        if kernel.ndim == 5 and kernel.shape[1] != channels:
            notes.append(f"patch kernel of {kernel.shape[1]} input channels spread over {channels}")
            kernel = spread_input_channels(kernel.float(), channels)
        found[_PATCH_KERNEL] = kernel
    table = found.get(_POSITIONS)
    if table is not None:
        if table.ndim == 3:
            try:
                class_position, table = split_position_rows(table, position_grid)
            except SetupError as error:
                raise SetupError(f"{path}: {error}") from error
            if _CLASS in found:
                found[_CLASS] = found[_CLASS].float() + class_position
                notes.append("position of the 2-D class token (row 0) added to the class token")
        wanted = parameters[_POSITIONS].shape
        if table.ndim == 5 and table.shape[2:] != wanted[2:]:
            notes.append(f"position table {_by(table.shape[2:])} resampled to {_by(wanted[2:])}")
            depth, height, width = wanted[2:]
            table = resample_positions(table.float(), (depth, height, width))
        found[_POSITIONS] = table
    return notes


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _some(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
