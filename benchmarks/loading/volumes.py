"""Real images in every form that the benchmark of the loader reads: ours, and each peer's.

Three groups: `isotropic`, `anisotropic` and `2-D`. From ../shared/data where it is, else fewer and smaller
images from samples/. All forms hold the same voxels, as ingest leaves them. Copies make the corpus larger than
what a cold read may find in a cache by chance.
"""

from __future__ import annotations

import importlib.util
import io
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import get_frame

from benchmarks.ingest import SAMPLES, SHARED, mirrored, save_nifti, source_of
from catalog.corpus import Corpus
from catalog.sampling import CropGeometry
from catalog.write import merge_dataset
from ingest.image import normalise
from ingest.readers import read_volumes
from ingest.source import ImageSource
from shards.layout import Profile
from shards.write import StoredArray, write_pack, write_volume
from training.data import Candidates, plan_batches
from training.plan import BatchPlanner

CROP = CropGeometry(tokens_z=4, tokens_x=8)
PROFILES: tuple[Profile, ...] = ("fast", "train")
Voxels = npt.NDArray[Any]


@dataclass(frozen=True)
class Group:
    """Images of one kind, in every form."""

    name: str
    folder: Path
    keys: tuple[str, ...]

    def corpus(self, profile: Profile) -> Corpus:
        return Corpus(self.folder / profile)

    def planner(self, batch: int, crop: CropGeometry = CROP) -> BatchPlanner:
        return plan_batches(self.corpus("fast"), crop, batch, 1, Candidates(0))

    def npy(self, key: str) -> Path:
        """float16 in [0, 1], (C, D, H, W): what the reference implementation reads."""
        return self.folder / "npy" / f"{key}.npy"

    def b2nd(self, key: str) -> Path:
        return self.folder / "blosc2" / f"{key}.b2nd"

    @property
    def mds(self) -> Path:
        return self.folder / "mds"

    @property
    def tar(self) -> Path:
        return self.folder / "webdataset.tar"


def has(package: str) -> bool:
    """Whether a peer is installed, and can be imported."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        print(f"{package} is there but cannot be imported: {error}")
        return False
    return True


def make_groups(work: Path, quick: bool) -> list[Group]:
    copies = {"isotropic": 1 if quick else 3, "anisotropic": 4 if quick else 12, "2-D": 4 if quick else 12}
    return [_write(work, name, images, copies[name]) for name, images in _sources(work, quick).items()]


def _sources(work: Path, quick: bool) -> dict[str, list[ImageSource]]:
    if not SHARED.is_dir():
        print(f"No {SHARED}: fewer and smaller images, from samples/.")
        ct, mri = SAMPLES / "CT", SAMPLES / "MRI"
        return {
            "isotropic": [source_of(ct / "totalsegmentator/chest.nii.gz", "CT")],
            "anisotropic": [source_of(mri / "sct-tutorial/spine_T2.nii.gz", "MRI")],
            "2-D": [
                source_of(SAMPLES / "XR/ml-workgroup-1479fa94/chest.png", "XR", 2),
                source_of(SAMPLES / "fundus/berens/retina.jpg", "fundus", 2),
            ],
        }
    mri = SHARED / "mri"
    brats = [source_of(mri / "brats_gli_00001_t1c.nii.gz", "MRI")]
    thick = ["tcga_fg_6692_t1", "tcga_fg_6692_t2", "tcga_fg_6692_flair", "spinal_cord_t2_ms"]
    pictures = sorted((SHARED / "xray").glob("chest_ml_*.png"))
    return {
        "isotropic": [source_of(_chest(work, "ct", 120 if quick else 300), "CT"), *brats],
        "anisotropic": [
            source_of(_chest(work, "thick", 300, every=5), "CT"),
            *(source_of(mri / f"{name}.nii.gz", "MRI") for name in thick),
        ],
        "2-D": [
            *(source_of(file, "XR", 2) for file in pictures),
            source_of(SHARED / "fundus/idrid_11.jpg", "fundus", 2),
        ],
    }


def _chest(work: Path, name: str, depth: int, every: int = 1) -> Path:
    """A chest CT of 0.8 x 0.8 x 1 mm, continued by its mirror image, or each `every`th slice of it."""
    scan = [pydicom.dcmread(file) for file in sorted((SHARED / "dicom/ct_chest_jpeg_lossless").iterdir())]
    scan.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    slices = [imagecodecs.jpeg8_decode(get_frame(dataset.PixelData, 0, number_of_frames=1)) for dataset in scan]
    taken = mirrored(len(slices), depth)[::every]
    volume = np.stack([slices[k] for k in taken]).astype(np.int16) - 1000
    work.mkdir(parents=True, exist_ok=True)
    spacing = (*map(float, scan[0].PixelSpacing), float(every))
    return save_nifti(work / f"{name}.nii.gz", volume.transpose(2, 1, 0), spacing)


def _write(work: Path, name: str, sources: list[ImageSource], copies: int) -> Group:
    images = [
        (f"{source.path.partition('.')[0]}-{copy}", np.ascontiguousarray(made.voxels), made.row)
        for source in sources
        for volume in read_volumes(source)
        for made in [normalise(volume, source)]
        for copy in range(copies)
    ]
    group = Group(name, work / name, tuple(key for key, *_ in images))
    for profile in PROFILES:
        corpus = group.corpus(profile)
        stored = _store(corpus, images, profile)
        rows = [
            row
            | {"dataset": "benchmark", "key": key, "subject": key, "split": "train", "entry_hash": "0"}
            | {"shard_path": array.path, "shard_shape": list(array.shape), "shard_index": index}
            | {"stored_bytes": array.stored_bytes[index or 0], "shard_sha256": array.sha256}
            for (key, _, row), (array, index) in zip(images, stored, strict=True)
        ]
        merge_dataset(corpus, "benchmark", rows, [])
    samples = [(key, _normalised(voxels, row)) for key, voxels, row in images]
    for key, sample in samples:
        group.npy(key).parent.mkdir(exist_ok=True)
        np.save(group.npy(key), sample)
    _write_tar(group.tar, random.Random(0).sample(samples, len(samples)))
    if has("blosc2"):
        for key, voxels, row in images:
            _write_blosc2(group.b2nd(key), voxels, CROP.size(row["da_level"]))
    if has("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(group.mds), columns={"key": "str", "voxels": "ndarray:float16"}) as writer:
            for key, sample in samples:
                writer.write({"key": key, "voxels": sample})
    return group


def _store(
    corpus: Corpus, images: list[tuple[str, Voxels, dict[str, Any]]], profile: Profile
) -> Iterator[tuple[StoredArray, int | None]]:
    """Where each image lies: a volume, or a place in the pack of its number of channels."""
    flat = [voxels.shape[1] == 1 for _, voxels, _ in images]
    if not all(flat):
        for key, voxels, _ in images:
            yield write_volume(corpus.shards_folder, f"benchmark/{key}.zarr", voxels, profile), None
        return
    packs: dict[int, list[Voxels]] = {}
    for _, voxels, _ in images:
        packs.setdefault(len(voxels), []).append(voxels)
    written = {
        channels: write_pack(corpus.shards_folder, f"benchmark/pack-{channels}.zarr", pack, profile)
        for channels, pack in packs.items()
    }
    taken = dict.fromkeys(packs, 0)
    for _, voxels, _ in images:
        yield written[len(voxels)], taken[len(voxels)]
        taken[len(voxels)] += 1


def _normalised(voxels: Voxels, row: dict[str, Any]) -> Voxels:
    low, high = row["window_low"], row["window_high"]
    real = voxels.astype(np.float32) * row["slope"] + row["intercept"]
    return ((real - low) / (high - low)).clip(0, 1).astype(np.float16)


def _write_tar(path: Path, samples: list[tuple[str, Voxels]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, sample in samples:
            content = io.BytesIO()
            np.save(content, sample)
            member = tarfile.TarInfo(f"{key}.voxels.npy")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)


def _write_blosc2(path: Path, voxels: Voxels, crop: tuple[int, int, int]) -> None:
    """The stored integers, in chunks and blocks as nnU-Net sizes them for a patch of the crop's size."""
    import blosc2

    block, chunk = nnunet_shapes(voxels.shape, crop, voxels.itemsize)
    path.parent.mkdir(exist_ok=True)
    blosc2.asarray(
        voxels,
        urlpath=str(path),
        mode="w",
        chunks=chunk,
        blocks=block,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1},
    )


def nnunet_shapes(
    shape: tuple[int, ...], patch: tuple[int, int, int], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """nnU-Net's rule: a block of the patch's proportions fills the L1 cache, a chunk of blocks the L3 cache.

    Block: the patch rounded up to powers of two, its largest axis relative to the patch halved until 0.8 of
    32 kB hold it. Chunk: blocks added along the axis that covers the least of the patch, up to 0.8 of 1.4 MB,
    and no further than one and a half patches.
    """
    block = [1 << (side - 1).bit_length() for side in patch]
    while np.prod(block) * shape[0] * itemsize > 0.8 * 32768:
        axis = max(
            (axis for axis in range(3) if block[axis] > 1), key=lambda axis: (block[axis] / patch[axis], axis)
        )
        block[axis] //= 2
    block = [min(side, have) for side, have in zip(block, shape[1:], strict=True)]
    chunk = list(block)
    while True:
        growing = [
            axis for axis in range(3) if chunk[axis] < shape[axis + 1] and chunk[axis] < 1.5 * patch[axis]
        ]
        growing.sort(key=lambda axis: chunk[axis] / patch[axis])
        for axis in growing:
            larger = [side + block[axis] * (axis == at) for at, side in enumerate(chunk)]
            if np.prod(larger) * shape[0] * itemsize <= 0.8 * 1441792:
                chunk = larger
                break
        else:
            break
    return (shape[0], *block), (
        shape[0],
        *(min(side, have) for side, have in zip(chunk, shape[1:], strict=True)),
    )
