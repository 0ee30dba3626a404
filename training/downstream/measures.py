"""How well predicted labels agree with drawn ones: Dice, surface distances, and what was missed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

from training.backbone import Spacing
from training.downstream.cases import Labels

_MEASURES = {"Dice": "dice", "ASSD": "assd", "HD": "hd"}


class OrganScore(NamedTuple):
    """One class in one case."""

    case: str
    organ: str
    dice: float
    """In per cent; NaN where nobody drew the organ."""
    assd: float
    """Average symmetric surface distance in mm; NaN where the organ is not there, drawn or predicted."""
    hd: float
    """Largest distance of the surfaces (Hausdorff) in mm; NaN likewise."""
    missed: bool
    """Drawn, but not predicted at all."""
    invented: bool
    """Predicted, but not drawn at all."""


def score(
    case: str, predicted_DHW: Labels, drawn_DHW: Labels, spacing: Spacing, classes: Sequence[str]
) -> list[OrganScore]:
    """Each class of a case, by MONAI's metrics, on the grid and spacing of the drawn labels."""
    flat = drawn_DHW.shape[0] == 1
    where, steps = (0, spacing[1:]) if flat else (slice(None), spacing)
    scores = []
    for label, organ in enumerate(classes, 1):
        predicted, drawn = (
            torch.from_numpy(labels[where] == label)[None, None] for labels in (predicted_DHW, drawn_DHW)
        )
        seen, there = bool(predicted.any()), bool(drawn.any())
        dice = assd = hd = math.nan
        if there:
            dice = 100 * float(compute_dice(predicted, drawn, include_background=True))
        if there and seen:
            options: dict[str, Any] = {"include_background": True, "spacing": list(steps)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # MONAI calls itself by a deprecated name
                assd = float(compute_average_surface_distance(predicted, drawn, symmetric=True, **options))
                hd = float(compute_hausdorff_distance(predicted, drawn, **options))
        scores.append(OrganScore(case, organ, dice, assd, hd, there and not seen, seen and not there))
    return scores


def summarise(scores: Sequence[OrganScore], classes: Sequence[str]) -> dict[str, Any]:
    """Means over cases for each class, and over classes of these means; None where there is nothing to average.

    Surface distances are of the cases in which the organ is both drawn and predicted: `missed` counts those
    that they leave out, and the Dice of which is 0.
    """
    told: dict[str, dict[str, Any]] = {}
    for organ in classes:
        of_organ = [one for one in scores if one.organ == organ]
        told[organ] = {
            **{name: _mean([getattr(one, field) for one in of_organ]) for name, field in _MEASURES.items()},
            "cases": sum(not math.isnan(one.dice) for one in of_organ),
            "missed": sum(one.missed for one in of_organ),
            "invented": sum(one.invented for one in of_organ),
        }
    means = {
        name: _mean([math.nan if of[name] is None else of[name] for of in told.values()]) for name in _MEASURES
    }
    return {**means, "classes": told}


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None
