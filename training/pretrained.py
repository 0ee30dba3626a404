"""Trained models on their way to users: a folder with weights, configuration and model card, here or on a hub.

    FOLDER/model.safetensors   weights
    FOLDER/config.json         which model they are of, what it was trained on and how
    FOLDER/corpus.lock         the corpus it was trained on, in hashes and counts (`pumit-data lock --check`)
    FOLDER/README.md           model card: the same for people, and how to load it

A model is named by such a folder, by the folder of a training run (its newest checkpoint) or one of its
checkpoints, or by the id of a repository on the Hugging Face hub that holds such a folder. Nothing that is
loaded is executed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from catalog.durable import sync
from catalog.errors import SetupError
from catalog.lock import LOCK_FILE
from training.card import model_card
from training.config import MimRunConfig, TokenizerRunConfig, parse
from training.extractor import ViTBackbone
from training.fit import misfits
from training.mim import MaskedImageModel, MIMConfig
from training.models import build_mim, build_tokenizer, vit_config
from training.run import newest_checkpoint, read_state, write_json
from training.speed import SPEEDS
from training.tokenizer import Tokenizer, TokenizerConfig
from training.vit import UniversalViT, ViTConfig
from training.weights import read_tensors

Model = Tokenizer | MaskedImageModel | UniversalViT
Kind = Literal["tokenizer", "mim", "vit"]

FORMAT: Literal["pumit-data model"] = "pumit-data model"
VERSION = 1
"""Of the folder's layout."""

_AVERAGE, _TEACHER = "ema.safetensors", "teacher.safetensors"
_WEIGHTS, _CONFIG, _CARD, _STATE = "model.safetensors", "config.json", "README.md", "state.json"
_PLACES = ("tokenizer", "initial_weights", "lpips_weights_file")
"""Settings of a run that name places of the machine it ran on."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Description(BaseModel):
    """What config.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["pumit-data model"] = FORMAT
    version: int = VERSION
    model: Kind
    config: dict[str, Any]
    """Of the model: what its class is built with."""
    trained: dict[str, Any] | None = None
    """Steps, the run's configuration, fingerprints of its data, what was measured; null where unknown."""


def load_tokenizer(place: str | Path) -> Tokenizer:
    """The trained tokenizer at `place`, on the CPU and in evaluation mode; see `load_pretrained` for errors."""
    model = load_pretrained(place)
    if not isinstance(model, Tokenizer):
        raise SetupError(f"{place} holds a ViT, not a tokenizer: give the folder of `pumit-train tokenizer`")
    return model.eval()


def load_vit(place: str | Path, blocks: Sequence[int] | None = None) -> ViTBackbone:
    """The trained ViT at `place`, without the head of its pre-training; else as `load_tokenizer`.

    It takes images in [0, 1] with their spacing and gives features; `blocks` are the stages of `ViTBackbone`.
    The `UniversalViT` itself is its attribute `vit`.
    """
    model = load_pretrained(place)
    if isinstance(model, Tokenizer):
        raise SetupError(f"{place} holds a tokenizer, not a ViT: give the folder of `pumit-train mim`")
    vit = model.vit if isinstance(model, MaskedImageModel) else model
    return ViTBackbone(vit, blocks).eval()


def load_pretrained(place: str | Path, *, average: bool = False) -> Model:
    """The model at `place` (the head of this module says what that may be), on the CPU, in training mode.

    With `average`, the moving average of its weights, which the checkpoints of a run with `ema_decay` hold. Of
    a run with another objective than tokens it is the ViT alone; of distillation that of the teacher, which is
    what such a training is for. Raises SetupError where there is none, or a file is damaged, incomplete or of a
    later version.
    """
    folder = find_pretrained(place)
    objective = _objective(folder)
    file = folder / (_AVERAGE if average else _TEACHER if objective == "distillation" else _WEIGHTS)
    if average and not file.is_file():
        raise SetupError(f"{folder} holds no moving average: train with --set ema_decay=0.9999 to keep one")
    tensors = read_tensors(file)
    if objective not in (None, "tokens"):
        tensors = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("vit.")}
    model = _blank(folder, tensors)
    problems = misfits(tensors, model.state_dict())
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SetupError(
            f"{file} does not fit the configuration beside it: {'; '.join(problems[:5])}{more}. "
            "Export or fetch the model again."
        )
    model.load_state_dict(tensors)
    return model


def find_pretrained(place: str | Path) -> Path:
    """The folder with the weights that `place` means: an export, a checkpoint, or a hub's copy of an export.

    Raises SetupError if there is none.
    """
    path = Path(place)
    if (path / _CONFIG).is_file() or (path / _STATE).is_file():
        return path
    checkpoint = newest_checkpoint(path)
    if checkpoint is not None:
        return checkpoint
    if not path.exists() and _HUB_ID.fullmatch(str(place)):
        return _from_hub(str(place))
    raise SetupError(
        f"{place} holds no trained model: run `pumit-train tokenizer` or `mim` first and give its --run "
        "folder, a folder that `pumit-train export` wrote, or the id of a model on the Hugging Face hub"
    )


def weights_file(folder: Path) -> Path:
    """The weights in a folder of `find_pretrained`."""
    return folder / _WEIGHTS


def export_pretrained(
    model: Model, folder: Path, trained: Mapping[str, Any] | None = None, lock: str | None = None
) -> None:
    """Write `model` to a new folder, which appears when it is complete.

    `trained` says what the weights come from; it goes to config.json and the model card. `lock` is that of the
    corpus, where it is known. Raises SetupError if the folder exists already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SetupError(f"{folder} exists already: name another folder for the export")
    kind: Kind = "tokenizer" if isinstance(model, Tokenizer) else "mim"
    if isinstance(model, UniversalViT):
        kind = "vit"
    described = Description(model=kind, config=model.config.model_dump(mode="json"), trained=_plain(trained))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
    write_json(temporary / _CONFIG, described.model_dump(mode="json"))
    if lock is not None:
        (temporary / LOCK_FILE).write_text(lock, encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = model_card(kind, described.config, described.trained, parameters, lock)
    (temporary / _CARD).write_text(card, encoding="utf-8")
    for file in temporary.iterdir():
        sync(file)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)
    sync(folder.parent)


def training_of(place: Path) -> dict[str, Any] | None:
    """What is known of how the model at `place` (a folder of `find_pretrained`) was trained."""
    if (place / _CONFIG).is_file():
        return _description(place).trained
    state = read_state(place)
    run = place.parent.parent
    trained = {name: state[name] for name in ("step", "config", "fingerprints")}
    summary = run / "summary.json"
    finished = json.loads(summary.read_text()) if summary.is_file() else {}
    if finished.get("steps") == state["step"]:
        described = ("kind", "run", "steps", *SPEEDS)
        trained["measured"] = {name: value for name, value in finished.items() if name not in described}
    return trained


def lock_of(place: Path) -> str | None:
    """The lock of the corpus that the model at `place` (as of `training_of`) was trained on, if it is known."""
    file = place / LOCK_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _plain(trained: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Without the folders of the machine it was trained on, which name users and projects."""
    if trained is None:
        return None
    config = trained.get("config")
    if not isinstance(config, Mapping):
        return dict(trained)
    return {**trained, "config": _without_folders(config)}


def _without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            kept[name] = _without_folders(value)
        else:
            kept[name] = Path(value).name if name in _PLACES and value else value
    return kept


def _blank(folder: Path, tensors: Mapping[str, Tensor]) -> Model:
    """The model that a folder's configuration describes, with fresh weights."""
    if (folder / _CONFIG).is_file():
        described = _description(folder)
        try:
            if described.model == "tokenizer":
                return Tokenizer(TokenizerConfig.model_validate(described.config))
            if described.model == "vit":
                return UniversalViT(ViTConfig.model_validate(described.config))
            return MaskedImageModel(MIMConfig.model_validate(described.config))
        except ValidationError as error:
            raise SetupError(f"{folder / _CONFIG}: the configuration is not valid: {error}") from error
    state = read_state(folder)
    origin = f"checkpoint {folder}"
    if state["config"].get("kind") == "tokenizer":
        return build_tokenizer(parse(TokenizerRunConfig, state["config"], origin).model)
    config = parse(MimRunConfig, state["config"], origin)
    if config.objective != "tokens":
        return UniversalViT(vit_config(config))
    head = tensors.get("head.2.bias")
    if head is None:
        raise SetupError(f"{folder / _WEIGHTS} lacks head.2.bias: it is not whole. Take another checkpoint.")
    return build_mim(config, len(head))


def _objective(folder: Path) -> str | None:
    """What the ViT of a checkpoint learnt; None of a tokenizer and of exports, which say what they hold."""
    if (folder / _CONFIG).is_file():
        return None
    config = read_state(folder)["config"]
    return config.get("objective", "tokens") if config.get("kind") == "mim" else None


def _description(folder: Path) -> Description:
    file = folder / _CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{file} is damaged: {error}. Export or fetch the model again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SetupError(f"{file} was not written by `pumit-train export`; read weights of others by `import`")
    if content.get("version") != VERSION:
        raise SetupError(
            f"{file} has version {content.get('version')} of the format, this program knows version {VERSION}. "
            "Install the version of pumit-data that wrote it, or a later one."
        )
    try:
        return Description.model_validate(content)
    except ValidationError as error:
        raise SetupError(f"{file} is not valid: {error}") from error


def _from_hub(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise SetupError(
            f"there is no folder {repository}; to fetch a model of that name from the Hugging Face hub takes "
            "the package huggingface_hub. Install it: pip install 'pumit-data[hub]'."
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=[_CONFIG, _WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SetupError(f"{repository} is no folder, and cannot be fetched from the hub: {reason}") from error
