"""From stored voxels to crops, on the training device: window, resample, flip, change intensities.

Nothing is random here: every parameter comes from the plan, so a CPU and a GPU make the same crops (to
rounding). Shape suffixes: B samples, C channels, D depth, H height, W width; lower case for a box as read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loader import RawBatch
from training.plan import SamplePlan

_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """What a model sees of a step."""

    voxels: Tensor
    """(B, 3, D, H, W) float32 in [0, 1]: 0 is the lower end of the window, or outside the image."""
    level: int
    """DA level of all samples."""
    keys: tuple[str, ...]
    """`dataset/key` of every sample."""
    spacing: Tensor
    """(B, 3) float32, mm of a crop voxel along z, y, x; NaN where unknown, along z for 2-D."""


def render(batch: RawBatch, device: torch.device) -> Crops:
    """Make the crops of a batch on a device.

    Identity parameters return exactly the windowed voxels (`window`). Grey images get three equal channels.
    """
    samples = batch.plan.samples
    voxels_B3DHW = torch.empty((len(samples), 3, *batch.plan.crop_size), device=device)
    # Boxes differ in size, and most samples skip most steps: a loop over samples computes only what was drawn.
    for sample, stored_Cdhw, voxels_3DHW in zip(samples, batch.to(device).boxes, voxels_B3DHW, strict=True):
        place = _paste if _is_slice(sample) else _resample
        crop_CDHW = place(window(stored_Cdhw, sample), sample, batch.plan.crop_size)
        flipped = [axis + 1 for axis, flip in enumerate(sample.flips) if flip]
        voxels_3DHW.copy_(_change_intensities(crop_CDHW.flip(flipped), sample))
    return Crops(voxels_B3DHW, batch.level, batch.keys, _spacing(samples).to(device))


def window(stored: Tensor, sample: SamplePlan) -> Tensor:
    """Stored numbers to float32 in [0, 1]: the image's window, clipped at its ends. A new tensor."""
    low, high = sample.image.window
    width = high - low
    scale, offset = sample.image.slope / width, (sample.image.intercept - low) / width
    return stored.to(torch.float32, copy=True).mul_(scale).add_(offset).clamp_(0, 1)


def _is_slice(sample: SamplePlan) -> bool:
    """Whether the crop's voxels are voxels of the box: resampling would only add rounding errors."""
    return sample.matrix == _IDENTITY


def _paste(box_Cdhw: Tensor, sample: SamplePlan, crop_DHW: tuple[int, int, int]) -> Tensor:
    """The crop without interpolation: the box at its place, 0 where there is none."""
    crop_CDHW = box_Cdhw.new_zeros((len(box_Cdhw), *crop_DHW))
    into, out_of = [slice(None)], [slice(None)]
    for size, have, centre in zip(crop_DHW, box_Cdhw.shape[1:], sample.centre, strict=True):
        first = round((size - 1) / 2 - centre)  # of the box, in the crop
        start, stop = max(first, 0), min(first + have, size)
        into.append(slice(start, stop))
        out_of.append(slice(start - first, stop - first))
    crop_CDHW[tuple(into)] = box_Cdhw[tuple(out_of)]
    return crop_CDHW


def _resample(box_Cdhw: Tensor, sample: SamplePlan, crop_DHW: tuple[int, int, int]) -> Tensor:
    """Trilinear interpolation at centre + matrix @ offset. The outer half of an edge voxel has its value."""
    at_DHW: list[Tensor] = []  # coordinates in the box: z, y, x
    for centre, row in zip(sample.centre, sample.matrix, strict=True):
        parts = [
            slope * (torch.arange(size, dtype=torch.float32, device=box_Cdhw.device) - (size - 1) / 2)
            for slope, size in zip(row, crop_DHW, strict=True)
        ]
        at_DHW.append(centre + parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None, :])
    inside = torch.ones(crop_DHW, dtype=torch.bool, device=box_Cdhw.device)
    grid = []
    for at, size in zip(at_DHW, box_Cdhw.shape[1:], strict=True):
        inside &= (at >= -0.5) & (at <= size - 0.5)
        grid.append(at * (2 / (size - 1)) - 1 if size > 1 else torch.zeros_like(at))
    grid_DHW3 = torch.stack(grid[::-1], dim=-1)  # grid_sample wants x, y, z
    crop_CDHW = F.grid_sample(
        box_Cdhw[None], grid_DHW3[None], mode="bilinear", padding_mode="border", align_corners=True
    )[0]
    # The weights sum to 1 up to rounding only, and a gamma of 1 - 1.0000001 would be NaN.
    return crop_CDHW.mul_(inside).clamp_(0, 1)


def _change_intensities(x_CDHW: Tensor, sample: SamplePlan) -> Tensor:
    """Brightness and shift, contrast around the crop's mean within its range, gamma; all in place."""
    if sample.brightness != 1 or sample.shift != 0:
        x_CDHW.mul_(sample.brightness).add_(sample.shift).clamp_(0, 1)
    if sample.contrast != 1:
        low, high, mean = x_CDHW.amin(), x_CDHW.amax(), x_CDHW.mean()
        x_CDHW.sub_(mean).mul_(sample.contrast).add_(mean).clamp_(low, high)
    if sample.gamma != 1 and sample.gamma_inverted:
        x_CDHW.neg_().add_(1).pow_(sample.gamma).neg_().add_(1)
    elif sample.gamma != 1:
        x_CDHW.pow_(sample.gamma)
    return x_CDHW


def _spacing(samples: tuple[SamplePlan, ...]) -> Tensor:
    rows = [
        [math.nan if mm is None else mm * scale for mm, scale in zip(s.image.spacing, s.scale, strict=True)]
        for s in samples
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(samples), 3)
