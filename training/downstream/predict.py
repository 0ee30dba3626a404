"""Labels of whole images: windows that overlap, flips, and the way back to the image's own grid."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInfererAdapt
from torch import Tensor

from training.downstream.cases import Labels
from training.downstream.decoder import SegmentationNet, Size
from training.downstream.prepared import Prepared


def predict(
    net: SegmentationNet,
    prepared: Prepared,
    *,
    crop: Size,
    batch_size: int,
    overlap: float,
    flips: bool,
    autocast: torch.autocast,
    device: torch.device,
) -> Labels:
    """Labels (D, H, W) of a case on its original grid; `net` is in evaluation mode on `device`.

    Windows of the size of a crop overlap by the share `overlap` and are blended by a Gaussian. With `flips`,
    the mean over all mirror images, along the axes that have more than one voxel.
    """
    infer = SlidingWindowInfererAdapt(crop, batch_size, overlap, mode="gaussian")
    image_BCDHW = prepared.shown(torch.from_numpy(prepared.image()))[None].to(device)
    axes = [axis for axis in (2, 3, 4) if image_BCDHW.shape[axis] > 1] if flips else []
    mirrors = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]

    def logits(windows_BCDHW: Tensor) -> Tensor:
        with autocast:
            return net(windows_BCDHW)[0].float()  # type: ignore[no-any-return]

    total: Tensor | None = None
    with torch.no_grad():
        for mirror in mirrors:
            seen = infer(image_BCDHW.flip(mirror), logits).softmax(dim=1).flip(mirror)
            total = seen if total is None else total.add_(seen)
    assert total is not None  # noqa: S101 - the image as it is counts as a mirror image
    return _most_likely(total[0], prepared.original_shape)


def _most_likely(probabilities_KDHW: Tensor, shape: Size) -> Labels:
    """The likeliest class of each voxel of the original grid; a class a time, for there may be many voxels."""
    best = torch.full(shape, -1.0, device=probabilities_KDHW.device)
    labels = torch.zeros(shape, dtype=torch.uint8, device=probabilities_KDHW.device)
    for label, one_DHW in enumerate(probabilities_KDHW):
        finer = F.interpolate(one_DHW[None, None], shape, mode="trilinear", align_corners=False)[0, 0]
        better = finer > best
        best = torch.where(better, finer, best)
        labels[better] = label
    return np.ascontiguousarray(labels.cpu().numpy())
