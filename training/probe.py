"""What frozen features know: nearest neighbours and a linear classifier, while a ViT trains.

Both learn from a fixed set of training images and are tested on images of held-out subjects, all of them centre
crops that stay in memory. Labels are columns of the catalog. Nothing here is random, has a gradient, or
touches what the training draws, so how often a run probes changes nothing about what it learns.

Figures are mean recalls over classes: chance is one divided by their number, whatever their sizes.

Shape suffixes: N images to learn from, M to test on, F features, K classes, B crops of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.augment import Crops, render
from training.config import MimRunConfig
from training.data import LabelledImages, RunData
from training.loader import RawBatch
from training.mim import NormalisedViT
from training.run import Run
from training.validation import evaluating

NEIGHBOURS = 5
_NEIGHBOUR_TEMPERATURE = 0.07
"""A neighbour's vote counts exp(cosine / temperature), as in the evaluations of DINO."""
_RIDGES = tuple(10.0**power for power in range(-5, 3))
"""Weights of the penalty on standardised features, per image; leaving one out tells which to take."""
_GREY = (2, 16, 16)
"""Cells (D, H, W) in which the grey values of a crop are averaged: the features of who looks at pixels."""

Figures = dict[str, float]
Extract = Callable[[Crops], Mapping[str, Tensor]]


class Probe:
    """Probes of one run. Every process of its world makes them, rank 0 tells."""

    def __init__(
        self,
        run: Run,
        every_steps: int,
        images: tuple[LabelledImages, LabelledImages],
        encoder: NormalisedViT,
    ) -> None:
        """`encoder` must be as it is before any training: what it knows then is the baseline."""
        self.every_steps = every_steps
        self._run, self._encoder = run, encoder
        self._learnt, self._tested = images
        pixels = probe(grey_features, *images, run.device)
        untrained = self._features()
        self.baselines: Figures = {
            **{f"probe_untrained/{name}": value for name, value in untrained.items()},
            **{f"probe_pixels/{name}": value for name, value in pixels.items()},
        }
        """Of the untrained network, and of the grey image."""

    @classmethod
    def of(cls, run: Run, config: MimRunConfig, data: RunData, encoder: NormalisedViT) -> Probe | None:
        """The probe that a configuration asks for, its baselines told; None where there is none."""
        every_steps = config.intervals.probe_every_steps
        if every_steps is None:
            return None
        if data.probed is None:
            run.console.print("no probes: nobody is held out in this corpus")
            return None
        made = cls(run, every_steps, data.probed, encoder)
        if not made.baselines:
            run.console.print("no probes: held-out images of two modalities or body parts are needed")
            return None
        for name, value in made.baselines.items():
            run.console.print(f"  {name}  {value:.3f}")
        return made

    def measure(self, step: int) -> Figures:
        """Probe the encoder after `step` and log the figures, `probe/COLUMN/METHOD/FEATURES`."""
        figures = {f"probe/{name}": value for name, value in self._features().items()}
        self._run.log(step, figures)
        return figures

    def _features(self) -> Figures:
        def extract(crops: Crops) -> Mapping[str, Tensor]:
            with self._run.autocast():
                tokens_BLC = self._encoder.features(crops.voxels, crops.level)
            return {"class_token": tokens_BLC[:, 0], "mean": tokens_BLC[:, 1:].mean(dim=1)}

        with evaluating(self._encoder):
            return probe(extract, self._learnt, self._tested, self._run.device)


def grey_features(crops: Crops) -> Mapping[str, Tensor]:
    """The crop itself, shrunk to a few grey cells."""
    return {"grey": F.adaptive_avg_pool3d(crops.voxels.mean(dim=1), _GREY).flatten(1)}


def probe(
    extract: Extract, learnt: LabelledImages, tested: LabelledImages, device: torch.device
) -> dict[str, float]:
    """Mean recalls of both methods for each column and kind of features, named `COLUMN/METHOD/FEATURES`.

    A column is left out unless the images to learn from and those to test on have two of its classes in
    common. Images without a label, or of a class that the others lack, take no part.
    """
    figures: dict[str, float] = {}
    learnt_features = _features(extract, learnt.batches, device)
    tested_features = _features(extract, tested.batches, device)
    for column in learnt.labels:
        known, asked = (_labels(images, column) for images in (learnt, tested))
        classes = sorted((set(known) & set(asked)) - {None}, key=str)
        if len(classes) < 2:
            continue
        rows, known_N = _numbered(known, classes)
        places, asked_M = _numbered(asked, classes)
        for kind, features in learnt_features.items():
            train_NF, test_MF = features[rows], tested_features[kind][places]
            for method, classify in (("knn", neighbours), ("linear", ridge)):
                found_M = classify(train_NF, known_N, test_MF, len(classes))
                figures[f"{column}/{method}/{kind}"] = mean_recall(found_M, asked_M)
    return figures


def neighbours(train_NF: Tensor, labels_N: Tensor, test_MF: Tensor, classes: int) -> Tensor:
    """The class (M,) for which most of the nearest neighbours by cosine vote, weighted by how near they are."""
    cosine_MN = F.normalize(test_MF, dim=1) @ F.normalize(train_NF, dim=1).t()
    nearest_Mk = cosine_MN.topk(min(NEIGHBOURS, len(train_NF)), dim=1)
    weights_Mk = (nearest_Mk.values / _NEIGHBOUR_TEMPERATURE).softmax(dim=1)
    votes_MK = torch.zeros(len(test_MF), classes, dtype=train_NF.dtype)
    return votes_MK.scatter_add_(1, labels_N[nearest_Mk.indices], weights_Mk).argmax(dim=1)


def ridge(train_NF: Tensor, labels_N: Tensor, test_MF: Tensor, classes: int) -> Tensor:
    """The class (M,) of the largest output of a linear regression on one-hot classes, in closed form.

    The penalty is the one whose predictions of each training image from the others err least (squared).
    """
    mean_F, spread_F = train_NF.mean(dim=0), train_NF.std(dim=0, correction=0).clamp_min(1e-8)
    x_NF, test_MF = (train_NF - mean_F) / spread_F, (test_MF - mean_F) / spread_F
    y_NK = F.one_hot(labels_N, classes).to(x_NF.dtype)
    offset_K = y_NK.mean(dim=0)
    u_NR, s_R, vt_RF = torch.linalg.svd(x_NF, full_matrices=False)
    projected_RK = u_NR.t() @ (y_NK - offset_K)

    def left_out_error(penalty: float) -> float:
        kept_R = s_R.square() / (s_R.square() + penalty * len(x_NF))
        residual_NK = y_NK - offset_K - u_NR @ (kept_R[:, None] * projected_RK)
        leverage_N = (u_NR.square() @ kept_R + 1 / len(x_NF)).clamp_max(1 - 1e-9)
        return float((residual_NK / (1 - leverage_N)[:, None]).square().mean())

    penalty = min(_RIDGES, key=left_out_error)
    shrunk_R = s_R / (s_R.square() + penalty * len(x_NF))
    weights_FK: Tensor = vt_RF.t() @ (shrunk_R[:, None] * projected_RK)
    return (test_MF @ weights_FK + offset_K).argmax(dim=1)


def mean_recall(found_M: Tensor, asked_M: Tensor) -> float:
    """Share of the images of a class that were found to be of it, averaged over classes."""
    right_M = (found_M == asked_M).double()
    recalls = [float(right_M[asked_M == one].mean()) for one in sorted(set(asked_M.tolist()))]
    return math.fsum(recalls) / len(recalls)


def _features(extract: Extract, batches: Iterable[RawBatch], device: torch.device) -> dict[str, Tensor]:
    """Of all images in order, (N, F) float64 on the CPU, by the name of the features."""
    found = [extract(render(batch, device)) for batch in batches]
    return {name: torch.cat([one[name].detach().cpu().double() for one in found]) for name in found[0]}


def _labels(images: LabelledImages, column: str) -> list[str | None]:
    return [images.labels[column].get(key) for batch in images.batches for key in batch.keys]


def _numbered(labels: Sequence[str | None], classes: Sequence[str | None]) -> tuple[list[int], Tensor]:
    """The images that have one of the classes, and its number."""
    rows = [row for row, label in enumerate(labels) if label in classes]
    return rows, torch.tensor([classes.index(labels[row]) for row in rows])
