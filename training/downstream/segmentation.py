"""Label every voxel, as a measure of a backbone: train it with a decoder, label whole images, compare.

The tasks btcv, chaos and folder:NAME (`training.downstream.task`). Besides result.json, a folder then holds

    training/                          the run: checkpoints, curves, pictures (`training.run`)
    training/best.safetensors          with weights: best, those of the best validation so far
    scores.csv, table.md               each class of each validation case; means, and the paper's figures
    predictions/validation/, test/     labels in the format of the task
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from catalog.durable import replacing
from catalog.errors import SetupError
from training.backbone import Backbone, Spacing
from training.downstream.adaptation import adapt, parse_mode
from training.downstream.btcv import open_btcv
from training.downstream.cases import Case, LabelledData, Labels, share_of
from training.downstream.chaos import open_chaos
from training.downstream.crops import CropDataset, crop_batches
from training.downstream.decoder import SegmentationNet, supervision
from training.downstream.folder import open_folder
from training.downstream.initialisations import load_backbone, origin_of
from training.downstream.measures import OrganScore, score, summarise
from training.downstream.overlays import overlay_row
from training.downstream.predict import predict
from training.downstream.prepared import Preparation, Prepared, prepare
from training.downstream.segmentation_config import EngineSettings, SegmentationConfig
from training.downstream.segmentation_table import page
from training.downstream.task import Cell, Metric, Result, prefix_of
from training.optim import adamw, learning_rate, set_learning_rate
from training.pictures import Row, contact_sheet
from training.run import Run
from training.validation import evaluating

CONFIG = SegmentationConfig
METRICS = (
    Metric("Dice", higher_is_better=True),
    Metric("ASSD", higher_is_better=False),
    Metric("HD", higher_is_better=False),
)
"""In per cent, mm and mm; means over cases of each class, and then over classes."""

_WATCHED_OVERLAP = 0.25
"""Of windows in the validations during training, which choose weights and draw curves but are no result."""

_SHOWN_CASES = 6


class _Images(NamedTuple):
    training: tuple[Prepared, ...]
    validation: tuple[Prepared, ...]


def check(cell: Cell, config: SegmentationConfig) -> None:
    """Raise SetupError if there is no such mode, or the task's data are not where the settings say."""
    parse_mode(cell.mode)
    open_data(cell, config)


def run(cell: Cell, config: SegmentationConfig, folder: Path) -> Result:
    """Train the cell's backbone on its share of the task's data, and measure it; an interrupted run goes on.

    Raises SetupError (data, names, divergence) and TrainingInterrupted (SIGTERM, SIGINT).
    """
    torch.manual_seed(cell.seed)
    backbone = load_backbone(cell.init)
    adapt(backbone, cell.mode)
    return train(cell, config, backbone, folder)


def train(cell: Cell, config: SegmentationConfig, backbone: Backbone, folder: Path) -> Result:
    """As `run`, of a backbone at hand, whatever the cell calls it."""
    began = time.perf_counter()
    data = open_data(cell, config)
    images = _prepared(cell, config, data)
    fingerprints = {"images": _fingerprint(images), "initial weights": _weights_digest(backbone)}
    with _engine(cell, config, fingerprints, folder / "training") as engine:
        net = SegmentationNet(
            backbone,
            channels=data.channels,
            classes=len(data.classes) + 1,
            crop=config.images.crop,
            spacing=_spacing(config, images),
            width=config.width,
        ).to(engine.device)
        _learn(engine, net, cell, config, data, images)
        scores = _measure(engine, net, config, data, images.validation, folder / "predictions")
    summary = summarise(scores, data.classes)
    with replacing(folder / "scores.csv") as temporary:
        _write_scores(temporary, scores)
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(page(cell, summary), encoding="utf-8")
    return Result(
        cell=cell,
        metrics={metric.name: mean for metric in METRICS if (mean := summary[metric.name]) is not None},
        trained_parameters=sum(p.numel() for p in net.parameters() if p.requires_grad),
        training_cases=len(images.training),
        seconds=time.perf_counter() - began,
        origin=origin_of(cell.init),
        config=config.model_dump(mode="json"),
        data={
            "images": fingerprints["images"],
            "training": [one.case.name for one in images.training],
            "validation": [one.case.name for one in images.validation],
            "classes": summary["classes"],
        },
    )


def _engine(cell: Cell, config: SegmentationConfig, fingerprints: dict[str, str], folder: Path) -> Run:
    resume = (folder / "run.json").is_file()
    if not resume:  # killed before it was one
        shutil.rmtree(folder, ignore_errors=True)
    return Run(folder, EngineSettings(cell, config), fingerprints=fingerprints, resume=resume)


def _learn(
    engine: Run,
    net: SegmentationNet,
    cell: Cell,
    config: SegmentationConfig,
    data: LabelledData,
    images: _Images,
) -> None:
    """All steps that are still to do; `net` then has the weights to be measured."""
    optimizer = adamw(net, config.optim)
    engine.restore({"model": net}, {"model": optimizer})
    loss_of = supervision(len(net.heads))
    crops = CropDataset(
        images.training, config.images.crop, len(data.classes) + 1, config.images.random_share, cell.seed
    )
    batches = crop_batches(crops, config.batch_size, engine.first_step, config.steps, config.workers)
    net.train()
    for step, batch in zip(engine.steps(), batches, strict=True):
        lr = learning_rate(step, config.steps, config.optim)
        set_learning_rate(optimizer, lr)
        with engine.autocast():
            logits = net(batch.image.to(engine.device, non_blocking=True))
        loss = loss_of(logits, batch.label.to(engine.device, non_blocking=True))
        engine.backward(loss, batch.names)
        means = engine.update(optimizer, config.optim.max_grad_norm)
        engine.finish_step(step, {"lr": lr, **means})
        if engine.due(step, config.intervals.validate_every_steps) and images.validation:
            _watch(engine, step, net, config, data, images.validation)
        if engine.due(step, config.intervals.save_every_steps):
            engine.save(step + 1)
    if config.weights == "best" and images.validation:
        net.load_state_dict(load_file(engine.folder / "best.safetensors"))


def open_data(cell: Cell, config: SegmentationConfig) -> LabelledData:
    """The data of the cell's task. Raises SetupError if it is not there."""
    task = prefix_of(cell.task)
    if config.data is None:
        raise SetupError(f"where are the images of {task}? Name their folder with --data FOLDER")
    if task == "btcv":
        return open_btcv(config.data)
    if task == "chaos":
        return open_chaos(config.data, config.images.held_out)
    return open_folder(config.data, config.images.held_out)


def _prepared(cell: Cell, config: SegmentationConfig, data: LabelledData) -> _Images:
    training = share_of(data.training, cell.fraction, cell.seed)
    images = _Images(
        tuple(_prepare(config, data, case) for case in training),
        tuple(_prepare(config, data, case) for case in data.validation),
    )
    crop = config.images.crop
    if crop[0] > 1 and all(one.original_shape[0] == 1 for one in images.training):
        raise SetupError(
            f"{config.data} holds pictures, and a crop has {crop[0]} slices: --set images.crop=[1,256,256], say"
        )
    return images


def _prepare(config: SegmentationConfig, data: LabelledData, case: Case) -> Prepared:
    return prepare(data, case, Preparation(config.images.spacing, config.images.window), _cache(config))


def _cache(config: SegmentationConfig) -> Path:
    if config.images.cache_dir is not None:
        return config.images.cache_dir
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "pumit-data" / "segmentation"


def _fingerprint(images: _Images) -> str:
    """Of what is trained and measured on: voxels and labels as prepared, in their order."""
    known = [[(one.case.name, one.sha256) for one in part] for part in images]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _weights_digest(backbone: Backbone) -> str:
    """Of the weights that a backbone starts with."""
    digest = hashlib.sha256()
    state = backbone.state_dict() if isinstance(backbone, nn.Module) else {}
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _spacing(config: SegmentationConfig, images: _Images) -> Spacing:
    """Of the voxels that the network is shown; images that keep their own grid have the median one."""
    if config.images.spacing is not None:
        return config.images.spacing
    depth, rows, columns = (median(one.spacing[axis] for one in images.training) for axis in range(3))
    return depth, rows, columns


def _watch(
    engine: Run,
    step: int,
    net: SegmentationNet,
    config: SegmentationConfig,
    data: LabelledData,
    validation: tuple[Prepared, ...],
) -> None:
    """Dice on the validation cases as training goes on, a picture, and the best weights if they are wanted."""
    dices: list[float] = []
    rows: list[Row] = []
    with evaluating(net):
        for one in validation:
            predicted = _labels(engine, net, config, one, _WATCHED_OVERLAP, flips=False)
            scan = data.read(one.case)
            if scan.label is None:
                continue
            for label in range(1, len(data.classes) + 1):
                drawn, seen = scan.label == label, predicted == label
                if drawn.any():
                    dices.append(100 * 2 * float((drawn & seen).sum()) / float(drawn.sum() + seen.sum()))
            if len(rows) < _SHOWN_CASES:
                rows.append(overlay_row(one, scan.label, predicted, len(data.classes)))
    dice = float(np.mean(dices)) if dices else 0.0
    engine.log(step, {"validation/dice": dice})
    engine.console.print(f"segmentation: step {step + 1}  mean Dice on validation {dice:.2f}")
    title = f"step {step + 1}, mean Dice {dice:.1f}"
    contact_sheet(engine.picture_file(step), title, ["image", "drawn", "predicted"], rows)
    if config.weights == "best" and dice >= engine.numbers.get("best_dice", -1.0):
        engine.numbers["best_dice"] = dice
        with replacing(engine.folder / "best.safetensors") as temporary:
            save_file({name: value.cpu().contiguous() for name, value in net.state_dict().items()}, temporary)


def _labels(
    engine: Run, net: SegmentationNet, config: SegmentationConfig, one: Prepared, overlap: float, flips: bool
) -> Labels:
    return predict(
        net,
        one,
        crop=config.images.crop,
        batch_size=config.batch_size,
        overlap=overlap,
        flips=flips,
        autocast=engine.autocast(),
        device=engine.device,
    )


def _measure(
    engine: Run,
    net: SegmentationNet,
    config: SegmentationConfig,
    data: LabelledData,
    validation: tuple[Prepared, ...],
    folder: Path,
) -> list[OrganScore]:
    """Scores of the validation cases, on their own grids. Writes predictions, also where labels are secret."""
    scores: list[OrganScore] = []
    overlap, flips = config.inference.overlap, config.inference.flips
    shutil.rmtree(folder, ignore_errors=True)
    with evaluating(net):
        for one in validation:
            predicted = _labels(engine, net, config, one, overlap, flips)
            _write(data, one.case, predicted, folder / "validation")
            drawn = data.read(one.case).label
            if drawn is not None:
                scores += score(one.case.name, predicted, drawn, one.original_spacing, data.classes)
        for case in data.test:
            one = _prepare(config, data, case)
            _write(data, case, _labels(engine, net, config, one, overlap, flips), folder / "test")
    return scores


def _write(data: LabelledData, case: Case, labels_DHW: Labels, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data.write(case, labels_DHW, folder)


def _write_scores(file: Path, scores: list[OrganScore]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(OrganScore._fields)
        writer.writerows(scores)
