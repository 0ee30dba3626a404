"""Learn the class of images: a backbone, a linear head on its vector, and what the validation cases choose.

For every learning rate of the grid the network starts anew; of each, the epoch with the best AUC on the
validation cases is kept, and of all, the rate whose best was the best; of equals (few cases have few different
AUCs) the one with the smaller loss on them. The test cases are looked at once a
rate, with the weights that validation kept, and only those of the chosen rate are reported.

Where nothing of the backbone is trained, each feature is brought to mean 0 and deviation 1 over the training
cases before the head (as linear probes do: networks differ in the scale of their features, rates do not), and
where images do not vary either, features are computed once.

Shape suffixes: B cases of a batch, N cases, C features, D, H, W voxels, K classes.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import Tensor, nn

from catalog.errors import SetupError
from training.backbone import Backbone, Spacing
from training.config import Positive, PositiveReal, Weight
from training.downstream.adaptation import adapt, parse_mode, trained_parameters
from training.downstream.initialisations import as_module, load_backbone, origin_of
from training.downstream.metrics import Labels, Scores, accuracy, auc, cross_entropy
from training.downstream.task import Cell, Metric, Result
from training.optim import fused_adamw, parameter_groups, set_learning_rate
from training.run import choose_device, write_json
from training.validation import evaluating
from training.vit import initialise_linear

METRICS = (Metric("AUC", higher_is_better=True, scale=100), Metric("ACC", higher_is_better=True, scale=100))
KNN_NEIGHBOURS, _KNN_TEMPERATURE = 20, 0.07
"""As in the evaluation of DINO."""
_TOLD_EPOCHS = 10
_LEAST_DEVIATION = 1e-6
"""Features that hardly differ are not blown up."""

Rows = npt.NDArray[np.int64]


class ClassificationConfig(BaseModel):
    """How a classifier is trained; shared by all tasks that train one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: Positive
    """Passes over the training cases, for every learning rate."""
    batch_size: Positive
    """Cases of an optimiser step."""
    at_once: Positive | None = None
    """Cases of a batch in one pass: the same step in less memory; null takes all."""
    learning_rates: Annotated[tuple[PositiveReal, ...], Field(min_length=1)]
    """Of which the validation cases choose one."""
    head_learning_rates: Annotated[tuple[PositiveReal, ...], Field(min_length=1)]
    """The same where the head alone is trained (mode linear)."""
    lr_drops: tuple[Positive, ...]
    """Epochs, counted from 0, from which on the learning rate is a tenth of what it was."""
    weight_decay: Weight
    """Decoupled weight decay of AdamW."""
    precision: Literal["fp32", "bf16"]
    """Number format of the forward pass."""
    device: Literal["auto", "cpu", "cuda"]
    """Where to train."""


class Batch(NamedTuple):
    """Cases of one size and spacing."""

    rows: Rows
    image: Tensor
    """(B, 3, D, H, W) in [0, 1]"""
    spacing: Spacing


class Cases(Protocol):
    """Labelled images."""

    labels: Labels
    """(N,): class of each."""
    vary: bool
    """Whether a training image differs from time to time."""

    def batches(
        self, rows: Rows, size: int, device: torch.device, draw: torch.Generator | None
    ) -> Iterator[Batch]:
        """The images at `rows`, about in that order, up to `size` at once; varied if there is `draw`."""


@dataclass(frozen=True)
class Labelled:
    """A classification task's data."""

    cases: Cases
    classes: tuple[str, ...]
    subjects: npt.NDArray[np.str_]
    """(N,): whose image it is; all of a subject are among the labelled ones, or none."""
    training: Rows
    validation: Rows
    test: Rows
    facts: dict[str, Any]
    """What the data are, for the result."""


class Classifier(nn.Module):
    """A backbone and a linear layer on its vector for the whole image."""

    centre: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = as_module(backbone)
        self.head = nn.Linear(backbone.channels, classes)
        self.frozen = not trained_parameters(self.backbone)
        initialise_linear(self.head)
        self.register_buffer("centre", torch.zeros(backbone.channels))
        self.register_buffer("scale", torch.ones(backbone.channels))

    def whole(self, image_BCDHW: Tensor, spacing: Spacing) -> Tensor:
        """Features (B, C)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone.forward_features(image_BCDHW, spacing).whole  # type: ignore[operator, no-any-return]

    def forward(self, image_BCDHW: Tensor, spacing: Spacing) -> Tensor:
        """Logits (B, K)."""
        return self.classify(self.whole(image_BCDHW, spacing))

    def classify(self, whole_BC: Tensor) -> Tensor:
        """Logits (B, K) of features."""
        return self.head((whole_BC - self.centre) / self.scale)  # type: ignore[no-any-return]

    def standardise(self, whole_NC: Tensor) -> None:
        """Take mean and deviation of features from these."""
        self.centre.copy_(whole_NC.mean(dim=0))
        self.scale.copy_(whole_NC.std(dim=0, correction=0).clamp_min(_LEAST_DEVIATION))

    def train(self, mode: bool = True) -> Classifier:
        """A frozen backbone stays in evaluation mode: nothing of it is to vary."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def check_mode(mode: str) -> None:
    """Raise SetupError unless a classifier can be made in `mode`: those of `adapt`, and knn[-K]."""
    if _neighbours(mode) is None:
        parse_mode(mode)


def classify(data: Labelled, cell: Cell, config: ClassificationConfig, folder: Path) -> Result:
    """Run a cell: choose, train, measure. What an interrupted run left of finished rates is taken up again.

    Raises SetupError where the cases do not suffice, or no rate led to a finite loss.
    """
    start = time.perf_counter()
    device = choose_device(config.device)
    training = labelled_share(data, cell.fraction, cell.seed)
    _require_classes(data, training)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    neighbours = _neighbours(cell.mode)
    model = _make(data, cell, device)
    trained = trained_parameters(model)
    work = _Work(data, training, config, cell, device, console)
    scores_of_test: Scores
    if neighbours is not None:
        scores_of_test = work.nearest(model, neighbours)
        chosen: dict[str, Any] = {"neighbours": neighbours}
        trained = 0
    else:
        rates = config.head_learning_rates if model.frozen else config.learning_rates
        trials = []
        for rate in rates:
            trials.append(work.trial(model, rate, folder / f"trial-{rate:.3g}"))
            if rate != rates[-1]:
                model = _make(data, cell, device)
        finite = [trial for trial in trials if not math.isnan(trial.auc)]
        if not finite:
            raise SetupError(f"{cell.task}: no learning rate of {list(rates)} led to a finite loss: lower them")
        best = max(finite, key=lambda trial: (trial.auc, trial.minus_loss))
        chosen = {"learning_rate": best.rate, "epoch": best.epoch, "validation_auc": best.auc}
        scores_of_test = best.scores
    labels = data.cases.labels[data.test]
    _write_scores(folder / "predictions.csv", data, scores_of_test)
    return Result(
        cell=cell,
        metrics={"AUC": auc(labels, scores_of_test), "ACC": accuracy(labels, scores_of_test)},
        trained_parameters=trained,
        training_cases=len(training),
        seconds=time.perf_counter() - start,
        origin=origin_of(cell.init),
        config=config.model_dump(mode="json"),
        chosen=chosen,
        data=data.facts,
    )


def labelled_share(data: Labelled, fraction: float, seed: int) -> Rows:
    """The training cases whose labels may be used: of each class a share of its subjects, at least one.

    Drawn by `seed` alone, and a smaller share is part of a larger one. A subject of several classes counts for
    that of its first case.
    """
    if fraction == 1:
        return data.training
    labels, subjects = data.cases.labels[data.training], data.subjects[data.training]
    draw = np.random.default_rng([seed, _SHARE])
    _, first = np.unique(subjects, return_index=True)
    kept: list[str] = []
    for label in np.unique(labels):
        of_class = draw.permutation(subjects[first][labels[first] == label])
        kept += list(of_class[: max(math.ceil(fraction * len(of_class)), 1)])
    return data.training[np.isin(subjects, kept)]


_SHARE, _ORDER = 1, 2
"""What the random numbers of a seed are for."""


class _Trial(NamedTuple):
    """A learning rate and what it led to."""

    rate: float
    epoch: int
    """The one with the best AUC on the validation cases, counted from 1."""
    auc: float
    """That AUC; NaN where the loss was not finite."""
    minus_loss: float
    """The negative cross entropy of the validation cases at that epoch."""
    scores: Scores
    """(N, K) of the test cases after that epoch."""


class _Work:
    """What all trials of a cell share."""

    def __init__(
        self,
        data: Labelled,
        training: Rows,
        config: ClassificationConfig,
        cell: Cell,
        device: torch.device,
        console: Console,
    ) -> None:
        self.data, self.training, self.config, self.cell = data, training, config, cell
        self.device, self.console = device, console
        self._features: dict[int, Tensor] | None = None

    def trial(self, model: Classifier, rate: float, file: Path) -> _Trial:
        """Train with a learning rate; or what the file of an interrupted run says of it."""
        if (found := _read_trial(file, rate)) is not None:
            return found
        labels = self.data.cases.labels[self.data.validation]
        if model.frozen:
            model.standardise(self._frozen(model, self.training))
        kept = {name: value for name, value in model.named_parameters() if value.requires_grad}
        best_epoch, best = 0, {name: value.clone() for name, value in kept.items()}
        best_merit = (-math.inf, -math.inf)
        optimizer = fused_adamw(parameter_groups(model, self.config.weight_decay), lr=rate)
        for epoch in range(self.config.epochs):
            set_learning_rate(optimizer, rate * 0.1 ** sum(epoch >= drop for drop in self.config.lr_drops))
            loss = self._epoch(model, optimizer, epoch)
            if not math.isfinite(loss):
                best_merit = (math.nan, math.nan)
                break
            scores = self._scores(model, self.data.validation)
            merit = (auc(labels, scores), -cross_entropy(labels, scores))
            if merit > best_merit:
                best_merit, best_epoch = merit, epoch + 1
                best = {name: value.detach().clone() for name, value in kept.items()}
            if (epoch + 1) % _TOLD_EPOCHS == 0 or epoch + 1 == self.config.epochs:
                self.console.print(
                    f"{self.cell.task} {self.cell.init} {self.cell.mode}: rate {rate:.3g}, "
                    f"epoch {epoch + 1}/{self.config.epochs}, loss {loss:.4f}, "
                    f"validation AUC {best_merit[0]:.4f}",
                    markup=False,
                )
        with torch.no_grad():
            for name, value in kept.items():
                value.copy_(best[name])
        trial = _Trial(rate, best_epoch, *best_merit, self._scores(model, self.data.test))
        _write_trial(file, trial)
        return trial

    def nearest(self, model: Classifier, neighbours: int) -> Scores:
        """Scores (N, K) of the test cases by the labels of the nearest training cases, in angle."""
        labels_T = torch.from_numpy(self.data.cases.labels[self.training]).to(self.device)
        train_TC, test_NC = (
            F.normalize(self._frozen(model, rows).float(), dim=1) for rows in (self.training, self.data.test)
        )
        near = (test_NC @ train_TC.T).topk(min(neighbours, len(train_TC)), dim=1)
        weight_Nk = (near.values / _KNN_TEMPERATURE).softmax(dim=1)
        votes_NkK = F.one_hot(labels_T[near.indices], len(self.data.classes))
        return _numpy((weight_Nk[..., None] * votes_NkK).sum(dim=1))

    def _epoch(self, model: Classifier, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """Train once on every case; the mean loss."""
        config, total = self.config, 0.0
        order = np.random.default_rng([self.cell.seed, _ORDER, epoch]).permutation(self.training)
        model.train()
        for rows, logits_of, size in self._passes(model, order, epoch):
            at_once = config.at_once or size
            target = torch.from_numpy(self.data.cases.labels[rows]).to(self.device)
            for first in range(0, size, at_once):
                part = slice(first, first + at_once)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = logits_of(part)
                loss = F.cross_entropy(logits.float(), target[part], reduction="sum") / size
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach()) * size
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total / len(order)

    def _passes(self, model: Classifier, order: Rows, epoch: int) -> Iterator[tuple[Rows, Any, int]]:
        """Batches of an epoch: their rows, the logits of a part of them as a function, their number."""
        size = self.config.batch_size
        if self._is_constant(model):
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                features = self._frozen(model, rows)
                yield rows, lambda part, of=features: model.classify(of[part]), len(rows)
            return
        draw = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.cell.seed, epoch]).generate_state(1)[0])
        )
        for batch in self.data.cases.batches(order, size, self.device, draw):
            yield (
                batch.rows,
                lambda part, of=batch: model(of.image[part], of.spacing),
                len(batch.rows),
            )

    def _scores(self, model: Classifier, rows: Rows) -> Scores:
        """Probabilities (N, K) of the cases at `rows`."""
        with evaluating(model):
            if self._is_constant(model):
                return _numpy(model.classify(self._frozen(model, rows)).float().softmax(dim=1))
            return _numpy(self._each(rows, lambda image, spacing: model(image, spacing).float().softmax(dim=1)))

    def _is_constant(self, model: Classifier) -> bool:
        return model.frozen and not self.data.cases.vary

    def _frozen(self, model: Classifier, rows: Rows) -> Tensor:
        """Features (N, C) of a frozen backbone, computed once for all cases of the cell."""
        if self._features is None:
            every = np.concatenate([self.training, self.data.validation, self.data.test])
            with evaluating(model):
                features = self._each(every, model.whole)
            self._features = dict(zip(every.tolist(), features, strict=True))
        return torch.stack([self._features[row] for row in rows.tolist()])

    def _each(self, rows: Rows, function: Any) -> Tensor:
        """What `function` makes of the images at `rows`, in their order."""
        found: dict[int, Tensor] = {}
        for batch in self.data.cases.batches(
            rows, self.config.at_once or self.config.batch_size, self.device, None
        ):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                made = function(batch.image, batch.spacing)
            found |= dict(zip(batch.rows.tolist(), made.float(), strict=True))
        return torch.stack([found[row] for row in rows.tolist()])


def _make(data: Labelled, cell: Cell, device: torch.device) -> Classifier:
    """The network before its first step; equal for equal cells."""
    torch.manual_seed(cell.seed)
    backbone = load_backbone(cell.init)
    adapt(backbone, "linear" if _neighbours(cell.mode) is not None else cell.mode)
    return Classifier(backbone, len(data.classes)).to(device)


def _neighbours(mode: str) -> int | None:
    """K of knn-K, or None where it is another mode."""
    kind, _, number = mode.partition("-")
    if kind != "knn" or (number and not number.isdecimal()) or number == "0":
        return None
    return int(number) if number else KNN_NEIGHBOURS


def _require_classes(data: Labelled, training: Rows) -> None:
    for part, rows in (("training", training), ("validation", data.validation), ("test", data.test)):
        classes = np.unique(data.cases.labels[rows])
        if len(classes) < 2:
            there = ", ".join(data.classes[label] for label in classes) or "none"
            raise SetupError(
                f"the {part} cases are of fewer than two classes ({there}): there is nothing to tell apart. "
                "Give more cases, or fewer classes."
            )


def _numpy(tensor: Tensor) -> Scores:
    array: Scores = tensor.detach().float().cpu().numpy()
    return array


def _write_trial(file: Path, trial: _Trial) -> None:
    told = trial._asdict() | {"scores": trial.scores.tolist()}
    write_json(file.with_name(f"{file.name}.json"), told)


def _read_trial(file: Path, rate: float) -> _Trial | None:
    file = file.with_name(f"{file.name}.json")
    if not file.is_file():
        return None
    told = json.loads(file.read_text())
    return _Trial(**told | {"scores": np.array(told["scores"], np.float32)})


def _write_scores(file: Path, data: Labelled, scores_NK: Scores) -> None:
    """A line for each test case: its number in the data, its class, the probability of each class."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["case", "class", *(f"p {name}" for name in data.classes)])
        for row, scores in zip(data.test.tolist(), scores_NK, strict=True):
            label = data.classes[data.cases.labels[row]]
            table.writerow([row, label, *(f"{score:.6g}" for score in scores)])
