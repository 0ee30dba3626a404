"""What tests of segmentation share: a backbone of some hundred weights, and releases with drawn organs."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from torch import Tensor, nn

from training.backbone import Features, Spacing
from training.config import preset_of
from training.downstream.btcv import TRAINING_IDS, VALIDATION_IDS
from training.downstream.chaos import GREY_VALUES
from training.downstream.segmentation_config import SegmentationConfig


class PatchBackbone(nn.Module):
    """Like a plain ViT: four stages on the grid of patches (2, 8, 8)."""

    def __init__(self, channels: int = 8, patch: tuple[int, int, int] = (2, 8, 8)) -> None:
        super().__init__()
        self.channels = channels
        self.stage_channels = (channels,) * 4
        self.embed = nn.Conv3d(3, channels, patch, patch)
        self.blocks = nn.ModuleList(nn.Conv3d(channels, channels, 1) for _ in range(4))

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        x = self.embed(image_BCDHW)
        stages = []
        for block in self.blocks:
            x = x + F.gelu(block(x))
            stages.append(x)
        return Features(x.mean((2, 3, 4)), tuple(stages))


class PyramidBackbone(nn.Module):
    """Like Swin UNETR: three stages, each half of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stage_channels = (4, 8, 16)
        self.channels = 16
        self.stages = nn.ModuleList(nn.Conv3d(given, to, 2, 2) for given, to in ((3, 4), (4, 8), (8, 16)))

    def forward_features(self, image_BCDHW: Tensor, spacing: Spacing) -> Features:
        stages = []
        for stage in self.stages:
            image_BCDHW = stage(image_BCDHW)
            stages.append(image_BCDHW)
        return Features(image_BCDHW.mean((2, 3, 4)), tuple(stages))


def organs(shape: tuple[int, int, int], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of ellipsoids on noise, each of its own intensity, in [0, 1], and their labels 1, 2, ..."""
    draw = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) if size > 1 else [0.0] for size in shape), indexing="ij")
    image, label = np.full(shape, 0.1, np.float32), np.zeros(shape, np.uint8)
    for number in range(1, count + 1):
        angle = 2 * np.pi * number / count
        centre = np.array([0, 0.5 * np.sin(angle), 0.5 * np.cos(angle)]) + draw.uniform(-0.1, 0.1, 3)
        radii = np.array([0.8, 0.35, 0.35])
        inside = sum(((axis - at) / r) ** 2 for axis, at, r in zip(axes, centre, radii, strict=True)) < 1
        image[inside], label[inside] = 0.2 + 0.8 * number / count, number
    return image + draw.normal(0, 0.02, shape).astype(np.float32), label


def write_btcv(raw: Path, shape: tuple[int, int, int] = (48, 44, 10), count: int = 3) -> Path:
    """A release of BTCV with all its 30 scans of `shape` (columns, rows, slices); organs 1 to `count`."""
    folder = raw / "Abdomen" / "RawData" / "Training"
    for kind in ("img", "label"):
        (folder / kind).mkdir(parents=True)
    affine = np.array([[-0.8, 0, 0, 10], [0, 0.8, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    for number in (*TRAINING_IDS, *VALIDATION_IDS):
        image, label = organs(shape[::-1], count, number)
        hounsfield = (-175 + 425 * image).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hounsfield.T, affine), folder / "img" / f"img{number:04d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label.T, affine), folder / "label" / f"label{number:04d}.nii.gz")
    return raw


def write_series(
    folder: Path, slices_SHW: np.ndarray, spacing: tuple[float, float, float], *, downwards: bool
) -> None:
    """An axial DICOM series, its files named in the order of the slices: from the head on if `downwards`."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(slices_SHW):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        read = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        read.SOPClassUID, read.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        read.Rows, read.Columns = pixels.shape
        read.SamplesPerPixel, read.PhotometricInterpretation = 1, "MONOCHROME2"
        read.BitsAllocated = read.BitsStored = 16
        read.HighBit, read.PixelRepresentation = 15, 0
        read.PixelSpacing = list(spacing[1:])
        read.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        height = (len(slices_SHW) - number if downwards else number) * spacing[0]
        read.ImagePositionPatient = [-30.0, -20.0, height]
        read.PixelData = pixels.astype(np.uint16).tobytes()
        read.save_as(folder / f"IMG-0001-{number + 1:05d}.dcm", enforce_file_format=True)


def write_chaos(raw: Path, train: int = 3, test: int = 1, size: int = 40) -> Path:
    """A release of CHAOS, MRI only: the series of odd subjects run from head to foot."""
    spacing = (9.0, 1.6, 1.6)
    for part, count in (("Train_Sets", train), ("Test_Sets", test)):
        for subject in range(1, count + 1):
            for sequence in ("T1DUAL", "T2SPIR"):
                image, label = organs((8, size, size + 4), 4, subject)
                place = raw / part / "MR" / str(subject) / sequence
                phases = [("InPhase", 1.0), ("OutPhase", 0.7)] if sequence == "T1DUAL" else [("", 1.0)]
                for phase, factor in phases:
                    pixels = (1000 * factor * image).clip(0, None)
                    write_series(place / "DICOM_anon" / phase, pixels, spacing, downwards=subject % 2 == 1)
                if part == "Train_Sets":
                    (place / "Ground").mkdir()
                    for number, labels in enumerate(label):
                        grey = np.array([0, *GREY_VALUES], np.uint8)[labels]
                        Image.fromarray(grey).save(place / "Ground" / f"IMG-0001-{number + 1:05d}.png")
    return raw


def stored_slices(folder: Path) -> np.ndarray:
    """Pixels of a DICOM series in the order of its files' names."""
    return np.stack([pydicom.dcmread(file).pixel_array for file in sorted(folder.glob("*.dcm"))])


def tiny(task: str, data: Path, cache: Path, *settings: str) -> SegmentationConfig:
    """The tiny preset of a task, made small enough for a test."""
    torch.set_num_threads(1)
    small = [
        *(f'data="{data}"', f'images.cache_dir="{cache}"', "images.crop=[8,32,32]", "width=4", "steps=4"),
        *("optim.warmup_steps=1", "optim.peak_lr=1e-2", "device=cpu", "keep_checkpoints=3"),
        *("intervals.log_every_steps=1", "intervals.validate_every_steps=100", "intervals.save_every_steps=2"),
    ]
    return preset_of(SegmentationConfig, task, "tiny", [*small, *settings])
