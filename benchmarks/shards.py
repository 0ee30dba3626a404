"""What the voxels of real images take on disk, and what writing and reading them costs, in each codec profile.

    python benchmarks/shards.py [--quick] [--json FILE]

Images are normalised as ingest does, then written in each profile and read back as random crops, of the size
that the tokenizer asks for at the image's DA level: 128 x 128 in plane, 64 slices at level 0, half with each
further one. The peers:

- **zarr-python** writes the same array, and reads the same crops from the very same file;
- **.npy** of the stored integers, mapped into memory: what reading costs when nothing is decoded, at two bytes
  a voxel (one of 8-bit images);
- **.nii.gz** (volumes), **.png** (2-D): the whole file is decoded for each crop.

All run interleaved in one process with one core, files in memory; figures are medians of CPU time. Real images
come from ../shared/data; a checkout without that folder measures fewer, from samples/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# This file's own folder comes first otherwise, and this file is called `shards` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nibabel as nib
import numpy as np
import zarr
from PIL import Image

from benchmarks.ingest import SAMPLES, SHARED, machine, source_of
from ingest.image import normalise
from ingest.readers import read_volumes
from shards.layout import PACK_SIZE, PROFILES, Profile, array_chunk, array_metadata
from shards.read import Box, ShardReader
from shards.write import write_pack, write_volume

SHARPEST_GOAL, MEAN_GOAL, VOLUME_INODES, IMAGE_INODES = 1.05, 0.8, 3, 0.03

Voxels = Any


@dataclass(frozen=True)
class Case:
    """Voxels as they are stored: one volume, or a pack of 2-D images."""

    title: str
    images: list[Voxels]
    """(C, D, H, W) each."""
    level: int

    @property
    def is_pack(self) -> bool:
        return self.level == 5

    @property
    def size(self) -> int:
        return sum(image.size for image in self.images)


def volume(title: str, file: Path, modality: str) -> Case:
    source = source_of(file, modality)
    found = normalise(next(iter(read_volumes(source))), source)
    return Case(title, [np.ascontiguousarray(found.voxels)], found.row["da_level"])


def pack(title: str, files: list[Path], modality: str) -> Case:
    """A full pack of the largest group of alike images, repeated as often as it takes."""
    images = []
    for file in files:
        source = source_of(file, modality, 2)
        images += [normalise(found, source).voxels for found in read_volumes(source)]
    kinds = [(image.dtype, len(image)) for image in images]
    alike = [image for image, kind in zip(images, kinds, strict=True) if kind == max(kinds, key=kinds.count)]
    return Case(title, [alike[number % len(alike)] for number in range(PACK_SIZE)], 5)


def make_cases(quick: bool) -> list[Case]:
    if not SHARED.is_dir():
        print(f"No {SHARED}: fewer cases, from samples/.\n")
        return [
            volume("CT chest", SAMPLES / "CT/totalsegmentator/chest.nii.gz", "CT"),
            volume("MRI spine", SAMPLES / "MRI/sct-tutorial/spine_T2.nii.gz", "MRI"),
            pack("XR", sorted(SAMPLES.glob("XR/ml*/*.png")), "XR"),
        ]
    ct, mri = SHARED / "ct", SHARED / "mri"
    cases = [
        volume("CT chest, sharp kernel", SHARED / "dicom/ct_chest_jpeg_lossless", "CT"),
        volume("MRI brain, T1", mri / "brats_gli_00001_t1c.nii.gz", "MRI"),
        volume("DWI spine, one b-value", mri / "spinal_cord_dwi_4d.nii.gz", "MRI"),
        pack("fundus", sorted((SHARED / "fundus").glob("*.jpg")), "fundus"),
        pack("XR", sorted((SHARED / "xray").glob("*.*g")), "XR"),
    ]
    if not quick:
        cases[1:1] = [
            volume("CT chest, within the body", ct / "lidc_0314_chest_ct_axes_PIR.nii.gz", "CT"),
            volume("CT chest, thick slices", ct / "pyradiomics_lung1_ct_thick.nii.gz", "CT"),
            volume("CT aorta, cut out and resampled", ct / "totalsegmentator_aorta_ct_cropped.nii.gz", "CT"),
        ]
        cases[5:5] = [
            volume("MRI brain, FLAIR", mri / "tcga_fg_6692_flair.nii.gz", "MRI"),
            volume("MRI spine, T2", mri / "spinal_cord_t2_ms.nii.gz", "MRI"),
            volume("MRI prostate, T1", SHARED / "dicom/mr_prostate_t2_axial", "MRI"),
            volume("MRI whole head", SHARED / "dicom/mr_t1_whole_head", "MRI"),
        ]
        cases.append(pack("US", sorted((SHARED / "ultrasound").glob("*.png")), "US"))
    return cases


# the contestants ---------------------------------------------------------------------------------------------


Crops = Callable[[int, Box], Voxels]
"""Reads a box of an image."""


def write_ours(case: Case, folder: Path, profile: Profile) -> tuple[Crops, int]:
    """Returns what reads crops, and the compressed bytes."""
    if case.is_pack:
        stored = write_pack(folder, "ours/pack.zarr", case.images, profile)
    else:
        stored = write_volume(folder, "ours/volume.zarr", case.images[0], profile)
    reader, dtype = ShardReader(folder), case.images[0].dtype
    return (
        lambda number, box: reader.read(
            stored.path, stored.shape, dtype, number if case.is_pack else None, box
        ),
        sum(stored.stored_bytes),
    )


def write_with_zarr(case: Case, folder: Path, profile: Profile) -> Crops:
    voxels = padded(case.images) if case.is_pack else case.images[0]
    chunk = array_chunk(voxels.shape, is_pack=case.is_pack)
    folder.mkdir()
    metadata = array_metadata(voxels.shape, voxels.dtype, chunk, profile)
    (folder / "zarr.json").write_text(json.dumps(metadata))
    zarr.open_array(folder, mode="r+")[...] = voxels
    array = zarr.open_array(folder, mode="r")

    def crop(number: int, box: Box) -> Voxels:
        z, y, x = (slice(*bounds) for bounds in box)
        return array[number, :, y, x][:, np.newaxis] if case.is_pack else array[:, z, y, x]

    return crop


def write_npy(case: Case, folder: Path, used: set[int]) -> Crops:
    """Of the images `used`, each a file."""
    mapped = {}
    for number in used:
        np.save(folder / f"{number}.npy", case.images[number])
        mapped[number] = np.load(folder / f"{number}.npy", mmap_mode="r")

    def crop(number: int, box: Box) -> Voxels:
        z, y, x = (slice(*bounds) for bounds in box)
        return np.array(mapped[number][:, z, y, x])

    return crop


def write_usual(case: Case, folder: Path, used: set[int]) -> Crops:
    """The usual files: NIfTI of a volume, PNG of an image."""
    for number in used:
        image = case.images[number]
        if case.is_pack:
            Image.fromarray(np.squeeze(image[:, 0].transpose(1, 2, 0))).save(folder / f"{number}.png")
        else:
            nib.save(nib.Nifti1Image(image[0].transpose(2, 1, 0), np.eye(4)), folder / "0.nii.gz")

    def crop(number: int, box: Box) -> Voxels:
        z, y, x = (slice(*bounds) for bounds in box)
        if case.is_pack:
            with Image.open(folder / f"{number}.png") as picture:
                return np.atleast_3d(np.asarray(picture))[y, x].transpose(2, 0, 1)[:, None]
        loaded = np.asanyarray(nib.load(folder / "0.nii.gz").dataobj)  # type: ignore[attr-defined]
        return loaded.transpose(2, 1, 0)[None, z, y, x]

    return crop


def padded(images: list[Voxels]) -> Voxels:
    height, width = (max(image.shape[axis] for image in images) for axis in (2, 3))
    whole = np.zeros((len(images), len(images[0]), height, width), images[0].dtype)
    for slot, image in zip(whole, images, strict=True):
        slot[:, : image.shape[2], : image.shape[3]] = image[:, 0]
    return whole


# measurement -------------------------------------------------------------------------------------------------


def random_crops(case: Case, number: int) -> list[tuple[int, Box]]:
    chance = random.Random(0)
    crops = []
    for _ in range(number):
        which = chance.randrange(len(case.images))
        sizes = zip(case.images[which].shape[1:], (max(1, 64 >> case.level), 128, 128), strict=True)
        lengths = [(size, min(size, wanted)) for size, wanted in sizes]
        starts = [(chance.randint(0, size - length), length) for size, length in lengths]
        z, y, x = ((start, start + length) for start, length in starts)
        crops.append((which, (z, y, x)))
    return crops


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(case: Case, profile: Profile, scratch: Path, rounds: int, crops: int) -> Iterator[dict[str, Any]]:
    writes: dict[str, list[float]] = {}
    reads: dict[str, list[float]] = {}
    title = f"{profile}: {case.title}"
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as temporary:
            folder = Path(temporary)
            took, (ours, stored) = cpu(lambda folder=folder: write_ours(case, folder, profile))
            writes.setdefault("ours", []).append(took)
            theirs: dict[str, Crops] = {}
            took, theirs["zarr-python"] = cpu(
                lambda folder=folder: write_with_zarr(case, folder / "z", profile)
            )
            writes.setdefault("zarr-python", []).append(took)
            used = {which for which, _ in random_crops(case, crops)}
            theirs[".npy"] = write_npy(case, folder, used)
            usual = ".png" if case.is_pack else ".nii.gz"
            theirs[usual] = write_usual(case, folder, used)
            inodes = len(list((folder / "ours").rglob("*")))
            ours(*random_crops(case, 1)[0])
            for number, (which, box) in enumerate(random_crops(case, crops)):
                took, voxels = cpu(lambda read=ours, which=which, box=box: read(which, box))
                reads.setdefault("ours", []).append(took)
                for name, peer in theirs.items():
                    if name == usual and number % 8:
                        continue  # each takes as long as the other, and long
                    took, found = cpu(lambda peer=peer, which=which, box=box: peer(which, box))
                    reads.setdefault(name, []).append(took)
                    if not np.array_equal(found, voxels):
                        raise RuntimeError(f"{title}: {name} reads other voxels")
    decoded = case.size * case.images[0].itemsize / 1e6
    yield row(f"{title}: size", stored / case.size, ".npy", case.images[0].itemsize, "bytes a voxel")
    mine = statistics.median(writes["ours"]) / decoded * 1e3
    theirs_ms = statistics.median(writes["zarr-python"]) / decoded * 1e3
    yield row(f"{title}: write", mine, "zarr-python", theirs_ms, "CPU ms a MB")
    for name in sorted(set(reads) - {"ours"}):
        one = statistics.median(reads["ours"]) * 1e3
        yield row(f"{title}: read a crop", one, name, statistics.median(reads[name]) * 1e3, "CPU ms")
    goal = IMAGE_INODES if case.is_pack else VOLUME_INODES
    yield row(f"{title}: inodes an image", inodes / len(case.images), "goal", goal, "inodes")


def totals(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for profile in PROFILES:
        sizes = [
            one["ours"] for one in rows if one["case"].startswith(profile) and one["case"].endswith(": size")
        ]
        sharp = [one["ours"] for one in rows if one["case"] == f"{profile}: CT chest, sharp kernel: size"]
        if sharp:
            yield row(f"{profile}: sharpest CT", sharp[0], "goal", SHARPEST_GOAL, "bytes a voxel")
        yield row(f"{profile}: mean of cases", statistics.mean(sizes), "goal", MEAN_GOAL, "bytes a voxel")


def row(case: str, mine: float, peer: str, theirs: float, unit: str) -> dict[str, Any]:
    ratio = theirs / mine
    print(f"{case:54} {peer:12} {mine:9.3f} {theirs:9.3f} {unit:14} {ratio:6.2f}", flush=True)
    return {"case": case, "ours": mine, "peer": peer, "theirs": theirs, "unit": unit, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, one round")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    in_memory = Path("/dev/shm")  # a slow disk would add its share to all sides
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as temporary:
        for case in make_cases(options.quick):
            for profile in PROFILES:
                rounds, crops = (1, 16) if options.quick or case.is_pack else (3, 24)
                rows += measure(case, profile, Path(temporary), rounds, crops)
    rows += totals(rows)
    if options.json:
        report = {"benchmark": "shards", "machine": machine(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
