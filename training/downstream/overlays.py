"""Labels drawn over an image, for the pictures of a training."""

from __future__ import annotations

import numpy as np

from training.downstream.cases import Labels
from training.downstream.prepared import Prepared, resized
from training.pictures import Panel, Row

_OPACITY = 0.55


def overlay_row(one: Prepared, drawn_DHW: Labels, predicted_DHW: Labels, classes: int) -> Row:
    """The slice with most drawn voxels: the image, and over it what was drawn and what was predicted."""
    at = int((drawn_DHW > 0).sum(axis=(1, 2)).argmax())
    image_CDHW = resized(one.image().astype(np.float32), one.original_shape, labels=False)
    image_CHW = image_CDHW[:, at]
    grey = image_CHW if len(image_CHW) == 3 else np.repeat(image_CHW[:1], 3, axis=0)
    panel = np.ascontiguousarray(grey.transpose(1, 2, 0), dtype=np.float32)
    colours = class_colours(classes)
    panels = [panel, *(_over(panel, labels[at], colours) for labels in (drawn_DHW, predicted_DHW))]
    return Row(one.case.name, panels)


def class_colours(classes: int) -> Panel:
    """A colour for each label, (classes + 1, 1, 3) in [0, 1]; that of the background is not used."""
    from matplotlib import colormaps

    hues = colormaps["tab20"](np.arange(classes + 1) % 20)[:, None, :3]
    return np.asarray(hues, dtype=np.float32)


def _over(
    panel_HWC: Panel, labels_HW: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], colours: Panel
) -> Panel:
    mixed = (1 - _OPACITY) * panel_HWC + _OPACITY * colours[labels_HW, 0]
    return np.where(labels_HW[..., None] > 0, mixed, panel_HWC)
