"""From stored voxels to crops, on the training device: window, resample, flip, change intensities.

Nothing is random here: every parameter comes from the plan, so a CPU and a GPU make the same crops (to
rounding). Shape suffixes: B samples, C channels, D depth, H height, W width; lower case for a box as read.

A crop has one definition: trilinear interpolation of the windowed voxels at centre + matrix @ offset, where the
outermost voxels reach half a voxel beyond their centres, and 0 past that. Few matrices mix depth with the
plane. The others let the sum fall apart into one over the plane, with weights that all slices share, and one
along depth, and an axis that is neither scaled nor shifted by part of a voxel needs none: voxels are copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loader import RawBatch
from training.plan import SamplePlan
from training.transfer import sent


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """What a model sees of a step."""

    voxels: Tensor
    """(B, 3, D, H, W) float32 in [0, 1]: 0 is the lower end of the window, or outside the image.

    Not to be changed in place: the three channels of grey images are one and the same memory.
    """
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
    # To a processor, fresh memory costs more than most of what is computed in it: no copies of grey channels.
    channels = max((sample.image.shape[0] for sample in samples), default=1)
    voxels_BCDHW = torch.empty((len(samples), channels, *batch.plan.crop_size), device=device)
    # Boxes differ in size, and most samples skip most steps: a loop over samples computes only what was drawn.
    for sample, stored_Cdhw, voxels_CDHW in zip(samples, batch.to(device).boxes, voxels_BCDHW, strict=True):
        crop_CDHW = voxels_CDHW[: len(stored_Cdhw)]
        place(window(stored_Cdhw, sample), sample, crop_CDHW)
        _change_intensities(crop_CDHW, sample)
        voxels_CDHW[len(stored_Cdhw) :] = crop_CDHW[:1]
    return Crops(
        voxels_BCDHW.expand(-1, 3, -1, -1, -1), batch.level, batch.keys, sent(_spacing(samples), device)
    )


def window(stored: Tensor, sample: SamplePlan) -> Tensor:
    """Stored numbers to float32 in [0, 1]: the image's window, clipped at its ends. A new tensor."""
    low, high = sample.image.window
    width = high - low
    scale, offset = sample.image.slope / width, (sample.image.intercept - low) / width
    return stored.to(torch.float32, copy=True).mul_(scale).add_(offset).clamp_(0, 1)


def place(box_Cdhw: Tensor, sample: SamplePlan, crop_CDHW: Tensor) -> None:
    """Fill a crop from the windowed voxels of its box: matrix and flips, with as few terms as they need."""
    if _mixes_depth(sample):
        resample(box_Cdhw, sample, crop_CDHW)
        return
    depth, height, width = (_run(axis, sample, box_Cdhw.shape, crop_CDHW.shape) for axis in range(3))
    if height is None or width is None:
        slices_CdHW = _resample_plane(box_Cdhw, sample, crop_CDHW.shape[2:])
    else:
        slices_CdHW = _laid(_laid(box_Cdhw, 2, height), 3, width)
    if depth is None:
        _resample_depth(slices_CdHW, sample, crop_CDHW)
    else:
        crop_CDHW.copy_(_laid(slices_CdHW, 1, depth))


def resample(box_Cdhw: Tensor, sample: SamplePlan, crop_CDHW: Tensor) -> None:
    """Fill a crop by trilinear interpolation, whatever the matrix. What `place` does is this, to rounding."""
    grid_DHW3, inside_DHW = _grid((0, 1, 2), sample, box_Cdhw, crop_CDHW.shape[1:])
    crop_CDHW.copy_(_interpolated(box_Cdhw[None], grid_DHW3, inside_DHW)[0])


def _mixes_depth(sample: SamplePlan) -> bool:
    (_, *to_depth), (from_y, *_), (from_x, *_) = sample.matrix
    return any((*to_depth, from_y, from_x))


def _resample_plane(box_Cdhw: Tensor, sample: SamplePlan, size_HW: torch.Size) -> Tensor:
    """The slices of a box, each interpolated in its plane: (C, d, H, W)."""
    grid_HW2, inside_HW = _grid((1, 2), sample, box_Cdhw, size_HW)
    slices = _interpolated(box_Cdhw.flatten(0, 1)[None], grid_HW2, inside_HW)
    return slices.view(*box_Cdhw.shape[:2], *size_HW)


def _resample_depth(slices_CdHW: Tensor, sample: SamplePlan, crop_CDHW: Tensor) -> None:
    """Fill a crop by interpolation between whole slices."""
    have, size, centre, slope = slices_CdHW.shape[1], crop_CDHW.shape[1], sample.centre[0], sample.matrix[0][0]
    at_D = centre + slope * _offsets(size, sample.flips[0], crop_CDHW.device)
    clipped_D = at_D.clamp(0, have - 1)
    lower_D = clipped_D.long()
    upper_D = (lower_D + 1).clamp(max=have - 1)
    share_D11 = (clipped_D - lower_D).float()[:, None, None]
    lower_CDHW, upper_CDHW = (slices_CdHW.index_select(1, at) for at in (lower_D, upper_D))
    torch.lerp(lower_CDHW, upper_CDHW, share_D11, out=crop_CDHW)
    if abs(centre - (have - 1) / 2) + abs(slope) * (size - 1) / 2 > have / 2:
        inside_D = (at_D >= -0.5) & (at_D <= have - 0.5)
        crop_CDHW.mul_(inside_D[:, None, None])


def _interpolated(images: Tensor, grid: Tensor, inside: Tensor | None) -> Tensor:
    """One image (1, C, ...) at the points of a grid, 0 where they are not inside."""
    crop = F.grid_sample(images, grid[None], mode="bilinear", padding_mode="border", align_corners=True)
    if inside is not None:
        crop.mul_(inside)
    # The weights sum to 1 up to rounding only, and a gamma of 1 - 1.0000001 would be NaN.
    return crop.clamp_(0, 1)


def _grid(
    axes: tuple[int, ...], sample: SamplePlan, box_Cdhw: Tensor, size: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """Where the voxels of a crop lie along some axes of the box, from -1 to 1 between the outermost centres.

    Returns the points (*size, axes), last axis first as `grid_sample` wants them, and which of them lie inside
    (*size); None if all do.
    """
    # One axis after the other in memory: interleaved, they take four times as long to write.
    points = torch.empty((len(axes), *size), device=box_Cdhw.device)
    inside = None
    for number, axis in enumerate(axes):
        have = box_Cdhw.shape[axis + 1]
        # Along an axis of one voxel every number means its centre: half a voxel is 1 then.
        unit, bound = (2 / (have - 1), have / (have - 1)) if have > 1 else (2.0, 1.0)
        middle = (sample.centre[axis] - (have - 1) / 2) * unit
        terms, reach = [], abs(middle)
        for along, (length, column) in enumerate(zip(size, axes, strict=True)):
            slope = unit * sample.matrix[axis][column]
            reach += abs(slope) * (length - 1) / 2
            term = slope * _offsets(length, sample.flips[column], points.device)
            shape = [1] * len(size)
            shape[along] = length
            terms.append((term if along else term + middle).float().view(shape))
        at = points[len(axes) - 1 - number]
        torch.add(terms[0], sum(terms[2:], terms[1]), out=at)
        if reach > bound:
            within = at.abs() <= bound
            inside = within if inside is None else inside.logical_and_(within)
    return points.movedim(0, -1), inside


def _offsets(size: int, reverse: bool, device: torch.device) -> Tensor:
    """Offsets of voxels from the centre of an axis, (size,) float64; a flip negates them.

    Made where they are used: a small copy to a GPU would wait for all that it still has to do.
    """
    offsets = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    return -offsets if reverse else offsets


class _Run(NamedTuple):
    """Voxels of a box that are voxels of the crop as they are, along one axis."""

    size: int
    """Voxels of the crop."""
    into: int
    """First voxel of the crop that has one of the box."""
    out_of: int
    """The first of the box, before any flip."""
    length: int
    reverse: bool


def _run(axis: int, sample: SamplePlan, box: torch.Size, crop: torch.Size) -> _Run | None:
    """What to copy along an axis; None if its voxels have to be interpolated."""
    others = [other for other in range(3) if other != axis]
    coupled = any(sample.matrix[axis][other] or sample.matrix[other][axis] for other in others)
    size, have = crop[axis + 1], box[axis + 1]
    start = sample.centre[axis] - (size - 1) / 2  # of the crop, in the box
    if coupled or sample.matrix[axis][axis] != 1 or not start.is_integer():
        return None
    first = min(max(int(start), 0), have)
    length = max(min(int(start) + size, have) - first, 0)
    into = min(max(-int(start), 0), size)
    reverse = sample.flips[axis]
    return _Run(size, size - into - length if reverse else into, first, length, reverse)


def _laid(x: Tensor, dim: int, run: _Run) -> Tensor:
    """An axis of a tensor cut, flipped and padded with 0 to the crop's size; a view if cutting is enough."""
    part = x.narrow(dim, run.out_of, run.length)
    if run.reverse:
        part = part.flip(dim)
    if run.length == run.size:
        return part
    laid = x.new_zeros([*x.shape[:dim], run.size, *x.shape[dim + 1 :]])
    laid.narrow(dim, run.into, run.length).copy_(part)
    return laid


def _change_intensities(x_CDHW: Tensor, sample: SamplePlan) -> None:
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


def _spacing(samples: tuple[SamplePlan, ...]) -> Tensor:
    rows = [
        [math.nan if mm is None else mm * scale for mm, scale in zip(s.image.spacing, s.scale, strict=True)]
        for s in samples
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(samples), 3)
