"""Who reads a batch of crops: ours, each peer in its usual way, and TensorStore alone as the limit.

A reader takes the plan of a batch and returns, for each sample, what it got to crop from: the planned box of
the same image (TensorStore, memory map, blosc2), or the whole volume (MONAI's persistent cache, MosaicML
Streaming; WebDataset gives the volumes in the order of its file, which is random).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loading.volumes import CROP, PROFILES, Group, Voxels, has
from shards.layout import Profile
from shards.read import ShardReader, context
from training.augment import render
from training.loader import read_batch
from training.plan import BatchPlan, SamplePlan

CPU = torch.device("cpu")
Reader = Callable[[BatchPlan], list[Any]]
Deliver = Callable[[BatchPlan], None]


def ours(group: Group, profile: Profile) -> Reader:
    reader = ShardReader(group.corpus(profile).shards)
    return lambda plan: read_batch(reader, plan).boxes


def tensorstore_alone(group: Group, profile: Profile) -> Reader:
    """The same boxes of the same files, one after the other, by handles that are open."""
    import tensorstore

    handles: dict[str, Any] = {}

    def one(sample: SamplePlan) -> Any:
        image = sample.image
        if image.shard_path not in handles:
            path = str(group.corpus(profile).shards_folder / image.shard_path)
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}, "open": True}
            handles[image.shard_path] = tensorstore.open(spec, context=context()).result()
        depth, height, width = (slice(*ends) for ends in sample.box)
        at = image.shard_index
        where = (
            (slice(None), depth, height, width)
            if at is None
            else (slice(at, at + 1), slice(None), height, width)
        )
        return handles[image.shard_path][where].read(order="C").result()

    return lambda plan: [one(sample) for sample in plan.samples]


def memory_map(group: Group) -> Reader:
    def one(sample: SamplePlan) -> Voxels:
        mapped = np.load(group.npy(sample.image.key), mmap_mode="r")
        return np.array(mapped[(slice(None), *(slice(*ends) for ends in sample.box))])

    return lambda plan: [one(sample) for sample in plan.samples]


def memory_map_slab(group: Group) -> Reader:
    """As the reference reads: whole slices, at most `max_read_slices` of them around the crop."""

    def one(sample: SamplePlan) -> Voxels:
        mapped = np.load(group.npy(sample.image.key), mmap_mode="r")
        most, (start, stop) = CROP.max_read_slices, sample.box[0]
        first = min(max((start + stop - most) // 2, 0), max(mapped.shape[1] - most, 0))
        return np.array(mapped[:, first : first + most])

    return lambda plan: [one(sample) for sample in plan.samples]


def blosc2_boxes(group: Group) -> Reader:
    import blosc2

    blosc2.set_nthreads(1)

    def one(sample: SamplePlan) -> Any:
        array = blosc2.open(str(group.b2nd(sample.image.key)), mode="r", mmap_mode="r")
        return array[(slice(None), *(slice(*ends) for ends in sample.box))]

    return lambda plan: [one(sample) for sample in plan.samples]


def persistent(group: Group, crop: tuple[int, int, int] | None) -> Reader:
    """MONAI's PersistentDataset: volumes as tensors on disk; `crop` is what RandSpatialCrop takes of one."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, Lambda, RandSpatialCrop, SpatialPad

    load = Lambda(lambda key: torch.from_numpy(np.load(group.npy(key))))
    random = [RandSpatialCrop(crop, random_size=False)] if crop else []
    pad = [SpatialPad(crop)] if crop else []
    cache = group.folder / ("persistent-crop" if crop else "persistent")
    dataset = PersistentDataset(list(group.keys), Compose([load, *pad, *random]), cache_dir=cache)
    place = {key: number for number, key in enumerate(group.keys)}
    return lambda plan: [dataset[place[sample.image.key]] for sample in plan.samples]


def mosaic(group: Group) -> Reader:
    """LocalDataset: the samples of StreamingDataset without its shared memory, which only costs time here."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(group.mds))
    place = {key: number for number, key in enumerate(group.keys)}
    return lambda plan: [dataset[place[sample.image.key]]["voxels"] for sample in plan.samples]


def webdataset_samples(group: Group) -> Reader:
    import webdataset

    def endless() -> Iterator[Voxels]:
        while True:
            for sample in webdataset.WebDataset(str(group.tar), shardshuffle=False).decode():
                yield sample["voxels.npy"]

    samples = endless()
    return lambda plan: [next(samples) for _ in plan.samples]


def cut(reader: Reader) -> Reader:
    """Of each whole volume a box of the planned size, copied, as a crop would be."""

    def one(volume: Voxels, sample: SamplePlan) -> Voxels:
        sizes = (stop - start for start, stop in sample.box)
        starts = [
            (have - size) // 2 if have > size else 0 for have, size in zip(volume.shape[1:], sizes, strict=True)
        ]
        sizes = (stop - start for start, stop in sample.box)
        return np.array(
            volume[(slice(None), *(slice(at, at + size) for at, size in zip(starts, sizes, strict=True)))]
        )

    return lambda plan: [one(volume, sample) for volume, sample in zip(reader(plan), plan.samples, strict=True)]


def readers(group: Group, plan: BatchPlan) -> dict[str, Reader]:
    """All that read, by name; a peer that is not installed is left out."""
    found: dict[str, Reader] = {}
    for profile in PROFILES:
        found[f"ours, {profile}"] = ours(group, profile)
        found[f"TensorStore, {profile}"] = tensorstore_alone(group, profile)
    found["float16 memory map"] = memory_map(group)
    found["MONAI PersistentDataset"] = persistent(group, plan.crop_size)
    if has("blosc2"):
        found["blosc2, nnU-Net's chunks"] = blosc2_boxes(group)
    if has("streaming"):
        found["MosaicML Streaming, whole volumes"] = cut(mosaic(group))
    if has("webdataset"):
        found["WebDataset, whole volumes"] = cut(webdataset_samples(group))
    return found


# delivered crops ---------------------------------------------------------------------------------------------


def delivering(group: Group) -> dict[str, Deliver]:
    """All that deliver augmented crops, three channels of float32, on the CPU."""
    found: dict[str, Deliver] = {}
    for profile in PROFILES:
        reader = ShardReader(group.corpus(profile).shards)
        found[f"ours, {profile}"] = lambda plan, reader=reader: _drop(render(read_batch(reader, plan), CPU))
    sources = {
        "float16 memory map + MONAI, lazy": memory_map_slab(group),
        "MONAI PersistentDataset + MONAI": persistent(group, None),
    }
    if has("blosc2"):
        sources["blosc2, nnU-Net's chunks + MONAI"] = _windowed(blosc2_boxes(group))
    if has("streaming"):
        sources["MosaicML Streaming + MONAI"] = mosaic(group)
    if has("webdataset"):
        sources["WebDataset + MONAI"] = webdataset_samples(group)
    for name, source in sources.items():
        found[name] = lambda plan, source=source: _augment_with_monai(source(plan), plan)
    return found


def _drop(_: object) -> None:
    """What was delivered is not kept."""


def _windowed(reader: Reader) -> Reader:
    def one(stored: Voxels, sample: SamplePlan) -> Voxels:
        low, high = sample.image.window
        scale, offset = sample.image.slope / (high - low), (sample.image.intercept - low) / (high - low)
        return (stored.astype(np.float32) * np.float32(scale) + np.float32(offset)).clip(0, 1)

    return lambda plan: [one(box, sample) for box, sample in zip(reader(plan), plan.samples, strict=True)]


def _augment_with_monai(volumes: list[Any], plan: BatchPlan) -> None:
    crops = []
    for volume, sample in zip(volumes, plan.samples, strict=True):
        image = torch.as_tensor(volume).float()
        crops.append(_monai_transforms(sample, plan.crop_size)(image).as_tensor().expand(3, -1, -1, -1))
    torch.stack(crops)


def _monai_transforms(sample: SamplePlan, size: tuple[int, int, int]) -> Any:
    """The reference's list, by public transforms: all that moves voxels is one lazy resampling."""
    from monai import transforms as mt

    z, y, x = sample.image.spacing
    nearly_isotropic = z is not None and y is not None and x is not None and z <= 1.5 * min(y, x)
    tilt = math.radians(30) if nearly_isotropic else 0.0
    return mt.Compose(
        [
            mt.SpatialPad(size),
            mt.RandSpatialCrop(size, random_center=True, random_size=False),
            mt.RandAffine(prob=0.3, rotate_range=(math.pi / 2, tilt, tilt), padding_mode="zeros"),
            mt.Affine(scale_params=sample.scale, padding_mode="zeros", image_only=True),
            *(mt.RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)),
            mt.RandScaleIntensity(0.25, prob=0.15),
            mt.Lambda(_clamped),
            mt.RandLambda(_spread, prob=0.15),
            mt.OneOf(
                [
                    mt.RandAdjustContrast(prob=0.3, gamma=(0.7, 1.5), invert_image=inverted)
                    for inverted in (False, True)
                ]
            ),
        ],
        lazy=True,
    )


def _clamped(image: Tensor) -> Tensor:
    return image.clamp(0, 1)


def _spread(image: Tensor) -> Tensor:
    mean = image.mean()
    factor = float(np.random.default_rng().uniform(0.75, 1.25))
    return ((image - mean) * factor + mean).clamp(image.min(), image.max())


# cold caches -------------------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Ask the system to drop its copy of the files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
