"""Backbones by name: from nothing, from EVA-02, from a training of ours, from Swin UNETR, from your own code.

    scratch, scratch:base             a ViT of a named size (tiny, small, base, large) with random weights
    scratch:PLACE                     one of the size of the model at PLACE: the same network, untrained
    scratch:swin-unetr                the encoder of Swin UNETR with random weights
    eva02, eva02:FILE|ID              2-D EVA-02 inflated to the universal ViT, from a file or a hub
    swin-unetr:FILE                   MONAI's model_swinvit.pt
    package.module:function           what your function returns; also FILE.py:function
    PLACE                             a run, checkpoint or export of ours, or its id on a hub

All satisfy `training.backbone.Backbone`. Names come before places: write ./eva02 for a folder of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from catalog.errors import SetupError
from catalog.lock import LOCK_FILE, read_lock
from catalog.manifest import digest_of
from training.backbone import Backbone
from training.downstream.swin import SwinBackbone, load_swin
from training.extractor import ViTBackbone
from training.pretrained import find_pretrained, load_vit, lock_of, training_of
from training.vit import UniversalViT, ViTConfig
from training.weights import load_weights, read_tensors

SIZES = {
    "tiny": ViTConfig(dim=96, depth=4, heads=4),
    "small": ViTConfig(dim=384, depth=12, heads=6),
    "base": ViTConfig.base(),
    "large": ViTConfig.large(),
}
"""Of the ViTs that `scratch:NAME` makes; tiny is that of the preset of `pumit-train mim`."""

EVA02_HUB_ID = "timm/eva02_base_patch14_224.mim_in22k"
"""The weights that the paper starts from."""

_EVA02_HEAD_DIM, _EVA02_NORM_EPS = 64, 1e-6
_USERS_OWN = re.compile(r"(?P<module>[A-Za-z_][\w.]*|.*\.py):(?P<function>[A-Za-z_]\w*)")


def as_module(backbone: Backbone) -> nn.Module:
    """The same object as a module: parameters, modes, devices."""
    return cast(nn.Module, backbone)


def load_backbone(name: str) -> Backbone:
    """The backbone that `name` means (the head of this module lists what that may be), on the CPU.

    It is an `nn.Module`. Random weights come from torch's generator: seed it first. Raises SetupError where
    there is no such thing, or a file does not fit.
    """
    kind, _, detail = name.partition(":")
    if kind == "scratch":
        return _scratch(detail or "base")
    if kind == "eva02":
        return ViTBackbone(_eva02(_eva02_file(detail)))
    if kind == "swin-unetr":
        return load_swin(_swin_file(detail))
    if found := _USERS_OWN.fullmatch(name):
        return _users_own(name, found["module"], found["function"])
    return load_vit(name)


def origin_of(name: str) -> dict[str, Any]:
    """What the weights of `load_backbone(name)` come from, as far as it is known; plain data for a report.

    `weights_sha256` of a file; of our own models `corpus` (the fingerprint of the lock of the corpus they were
    trained on) and `step`.
    """
    kind, _, detail = name.partition(":")
    if kind == "scratch" or _USERS_OWN.fullmatch(name):
        return {}
    if kind == "eva02":
        return {"weights_sha256": digest_of(_eva02_file(detail))}
    if kind == "swin-unetr":
        return {"weights_sha256": digest_of(_swin_file(detail))}
    place = find_pretrained(name)
    lock, trained = lock_of(place), training_of(place) or {}
    return {
        "weights_sha256": digest_of(place / "model.safetensors"),
        "corpus": None if lock is None else read_lock(lock, str(place / LOCK_FILE))["fingerprint"],
        "step": trained.get("step"),
    }


def _scratch(what: str) -> Backbone:
    if what == "swin-unetr":
        return SwinBackbone()
    if what in SIZES:
        return ViTBackbone(UniversalViT(SIZES[what]))
    try:
        config = load_vit(what).vit.config
    except SetupError as error:
        raise SetupError(
            f"scratch:{what} is no size ({', '.join(SIZES)}, swin-unetr), and no place of a model: {error}"
        ) from error
    return ViTBackbone(UniversalViT(config))


def _eva02_file(what: str) -> Path:
    if what and Path(what).is_file():
        return Path(what)
    return find_pretrained(what or EVA02_HUB_ID) / "model.safetensors"


def _eva02(file: Path) -> UniversalViT:
    """The universal ViT of the size that the file has, filled from it."""
    tensors = read_tensors(file)
    blocks = {int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))}
    gates = [tensors[key] for key in ("blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1_g.weight") if key in tensors]
    if not blocks or not gates or gates[0].ndim != 2:
        raise SetupError(
            f"{file} is not EVA-02 of size B or L: its blocks have no gated MLP with separate projections. For "
            "weights of ours give their folder; for others write a function (docs/downstream.md)."
        )
    hidden, dim = gates[0].shape
    config = ViTConfig(
        dim=dim,
        depth=max(blocks) + 1,
        heads=max(dim // _EVA02_HEAD_DIM, 1),
        mlp_ratio=(hidden + 0.5) / dim,  # half a feature more: the product is rounded down
        norm_eps=_EVA02_NORM_EPS,
    )
    vit = UniversalViT(config)
    load_weights(vit, file)
    return vit


def _swin_file(what: str) -> Path:
    if not what:
        raise SetupError(
            "swin-unetr needs the file of its weights: swin-unetr:model_swinvit.pt, which MONAI publishes with "
            "its Swin UNETR. For random weights write scratch:swin-unetr."
        )
    return Path(what)


def _users_own(name: str, module: str, function: str) -> Backbone:
    make = getattr(_import(name, module), function, None)
    if not callable(make):
        raise SetupError(f"{name}: {module} has no function {function}")
    backbone = cast(Callable[[], object], make)()
    if not isinstance(backbone, nn.Module):
        raise SetupError(f"{name} returned {type(backbone).__name__}, not an nn.Module")
    wanted: Mapping[str, Callable[[Any], bool]] = {
        "channels": lambda value: isinstance(value, int) and value > 0,
        "stage_channels": lambda value: isinstance(value, tuple) and all(isinstance(c, int) for c in value),
        "forward_features": callable,
    }
    wrong = [field for field, fits in wanted.items() if not fits(getattr(backbone, field, None))]
    if wrong:
        raise SetupError(
            f"{name} returned a {type(backbone).__name__} whose {', '.join(wrong)} are not a backbone's: "
            "docs/downstream.md shows what it must have"
        )
    return cast(Backbone, backbone)


def _import(name: str, module: str) -> Any:
    """A module by name or, with .py, by file; errors of the user's code pass through as they are."""
    if not module.endswith(".py"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise SetupError(
                f"{name}: there is no module {error.name} here. Install it, or name its file: FILE.py:function"
            ) from error
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None or not Path(module).is_file():
        raise SetupError(f"{name}: there is no file {module}")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
