"""Ingest of one image, on one core: ours against MONAI transforms, and against the physical limit.

*Ours* reads, normalises and writes a Zarr shard (profile `fast`), as `pumit-data ingest` does. The peers:

- **MONAI**: the reference implementation's approach written with public MONAI transforms: LoadImage
  (PydicomReader for DICOM), Orientation, CropForeground by percentile, Resize by area with anti-aliasing,
  statistics, ScaleIntensityRange, `np.save` as float16.
- **torch bilinear**, 2-D only: the same with Pillow and torch's antialiased bilinear resize, which is what the
  reference implementation itself does with pictures. Much faster than MONAI's area resize.
- **limit**: decode into memory that is already there, encode the very same chunks, write. No header, no
  orientation, no statistics, no hash.

All run interleaved in one process, pinned to one core, on the same files; figures are medians of CPU seconds.
Peak memory is measured in fresh processes, above what imports and a first small image took.

    python benchmarks/ingest.py [--quick] [--case WORDS]... [--json FILE]

Real images come from ../shared/data; a checkout without that folder measures fewer and smaller cases, from
samples/.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import logging
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# This file's own folder comes first otherwise, and this file is called `ingest` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
from isal import igzip
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders import JPEGLosslessSV1Decoder
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from ingest.image import normalise
from ingest.readers import read_volumes
from ingest.source import ImageSource
from shards.layout import PROFILES, chunk_grid, pack_chunk, volume_chunk
from shards.write import write_pack, write_volume

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAMPLES = ROOT / "samples"
MAX_MEMORY = 3  # volumes

Work = Callable[[ImageSource, Path], None]


@dataclass(frozen=True)
class Case:
    """One input and what is asked of it."""

    title: str
    source: ImageSource
    goal: float
    """Ratio to MONAI."""
    limit_goal: float | None = None
    """Share of the limit's speed."""


# the contestants ---------------------------------------------------------------------------------------------


def ours(source: ImageSource, folder: Path) -> None:
    for number, volume in enumerate(read_volumes(source)):
        if not hasattr(volume, "voxels"):
            raise volume
        voxels = normalise(volume, source).voxels
        if source.dimension == 2:
            write_pack(folder, f"ours/{number}.zarr", [voxels])
        else:
            write_volume(folder, f"ours/{number}.zarr", voxels)


def with_monai(source: ImageSource, folder: Path) -> None:
    from monai.transforms import CropForeground, LoadImage, Orientation, Resize, ScaleIntensityRange

    load = LoadImage(
        reader="PydicomReader" if source.format == "dicom" else None, image_only=True, ensure_channel_first=True
    )
    loaded = load(str(source.file))
    if source.dimension == 3:
        loaded = Orientation("SRA")(loaded)
        volumes = [loaded[index : index + 1] for index in range(len(loaded))]
    else:
        volumes = [loaded]
    for number, image in enumerate(volumes):
        threshold = percentiles(image, 0.5)[0] if source.dimension == 3 else 0
        image = CropForeground(select_fn=functools.partial(above, threshold), allow_smaller=True)(image)
        size = shrunk(image.shape[-2:])
        if size != tuple(image.shape[-2:]):
            image = Resize([*image.shape[1:-2], *size], mode="area", anti_aliasing=True)(image)
        low, high = window(image, source)
        image = ScaleIntensityRange(low, high, 0, 1, clip=True)(image)
        np.save(folder / f"monai-{number}.npy", image.numpy().astype(np.float16))


def with_bilinear(source: ImageSource, folder: Path) -> None:
    import torch

    with Image.open(source.file) as picture:
        pixels = np.array(picture)
    image = torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1).float()
    rows, columns = ((image > 0).any(0).any(1 - axis).nonzero() for axis in (0, 1))
    image = image[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    size = shrunk(image.shape[-2:])
    if size != tuple(image.shape[-2:]):
        image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    low, high = window(image, source)
    np.save(folder / "bilinear.npy", ((image - low) / (high - low)).clip(0, 1).numpy().astype(np.float16))


def above(threshold: float, image: Any) -> Any:
    return image > threshold


def shrunk(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(round(side * 512 / min(size)) if min(size) > 512 else side for side in size)


def percentiles(image: Any, *percents: float) -> list[float]:
    """Of the voxels above the minimum, one call each, as the reference implementation takes them."""
    from monai.transforms.utils_pytorch_numpy_unification import percentile

    values = tensor_of(image)
    values = values[values > values.min()]
    return [float(percentile(values, percent)) for percent in percents]


def window(image: Any, source: ImageSource) -> tuple[float, float]:
    """The normalisation window, with the other statistics taken on the way."""
    values = tensor_of(image)
    for statistic in (values.mean, values.std, values.median, values.min, values.max):
        statistic()
    low, high = percentiles(values, 0.5, 99.5)
    return (0.0, 255.0) if source.dimension == 2 else (low, high)


def tensor_of(image: Any) -> Any:
    return image.as_tensor() if hasattr(image, "as_tensor") else image


# What pydicom wants of a decoder: by itself it has none for JPEG lossless. Ours, which favours MONAI.
DECODER_DEPENDENCIES: dict[Any, Any] = {}


def is_available(_: str) -> bool:
    return True


def decode_jpeg_lossless(frame: bytes, _: Any) -> bytes:
    return bytes(np.asarray(imagecodecs.jpeg8_decode(frame)).tobytes())


def limit_of(source: ImageSource) -> Work:
    """Decode, encode and write of one source, with all that can be prepared done before."""
    images = [normalise(volume, source).voxels for volume in read_volumes(source)]
    chunks = [chunk for voxels in images for chunk in contiguous_chunks(voxels, source.dimension)]
    itemsize = images[0].itemsize
    codec: dict[str, Any] = PROFILES["fast"]
    decode = DECODERS[source.format](source)

    def limit(_: ImageSource, folder: Path) -> None:
        decode()
        with (folder / "limit").open("wb", buffering=1 << 20) as file:
            for chunk in chunks:
                encoded = imagecodecs.blosc_encode(
                    chunk,
                    level=codec["clevel"],
                    compressor=codec["cname"],
                    shuffle=codec["shuffle"],
                    typesize=itemsize,
                    numthreads=1,
                )
                file.write(encoded)
            file.flush()
            os.fsync(file.fileno())

    return limit


def contiguous_chunks(voxels: Any, dimension: int) -> Iterator[Any]:
    """The inner chunks of the shard, each padded to its full size."""
    voxels = voxels if dimension == 3 else voxels.swapaxes(0, 1)
    chunk = (volume_chunk if dimension == 3 else pack_chunk)(voxels.shape)
    grid = chunk_grid(voxels.shape, chunk)
    pads = [(0, n * c - s) for n, c, s in zip(grid, chunk, voxels.shape, strict=True)]
    split = np.pad(voxels, pads).reshape([length for pair in zip(grid, chunk, strict=True) for length in pair])
    for part in split.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, *chunk):
        yield np.ascontiguousarray(part)


def inflate(source: ImageSource) -> Callable[[], None]:
    with igzip.open(source.file) as stream:
        memory = memoryview(bytearray(stream.read()))

    def run() -> None:
        with igzip.open(source.file) as stream:
            done = 0
            while done < len(memory):
                done += stream.readinto(memory[done : done + (1 << 20)])

    return run


def decode_frames(source: ImageSource) -> Callable[[], None]:
    files = sorted(source.file.iterdir())
    first = pydicom.dcmread(files[0])
    if not first.file_meta.TransferSyntaxUID.is_compressed:
        memory = bytearray(max(file.stat().st_size for file in files))

        def read() -> None:
            for file in files:
                with file.open("rb", buffering=0) as stream:
                    stream.readinto(memory)

        return read
    frames = [get_frame(pydicom.dcmread(file).PixelData, 0, number_of_frames=1) for file in files]
    decoder = (
        imagecodecs.jpeg2k_decode
        if first.file_meta.TransferSyntaxUID == JPEG2000Lossless
        else imagecodecs.jpeg8_decode
    )

    def run() -> None:
        for frame in frames:
            decoder(frame)

    return run


def decode_picture(source: ImageSource) -> Callable[[], None]:
    data = source.file.read_bytes()

    def run() -> None:
        Image.open(io.BytesIO(data)).load()

    return run


DECODERS: dict[str, Callable[[ImageSource], Callable[[], None]]] = {
    "nifti": inflate,
    "dicom": decode_frames,
    "raster": decode_picture,
}


# the cases ---------------------------------------------------------------------------------------------------


def source_of(file: Path, modality: str, dimension: Literal[2, 3] = 3) -> ImageSource:
    kinds: dict[str, Literal["nifti", "raster"]] = {".gz": "nifti", ".png": "raster", ".jpg": "raster"}
    return ImageSource(
        dataset="benchmark",
        key=file.name,
        subject=file.name,
        path=file.name,
        root=file.parent,
        format="dicom" if file.is_dir() else kinds[file.suffix],
        dimension=dimension,
        modality=modality,
        upstream_modality=modality,
    )


def make_cases(folder: Path, quick: bool) -> list[Case]:
    """The cases that the real images at hand allow; those made for the purpose are written below `folder`."""
    cases = [Case("CXR .png 3000 x 2500", source_of(make_radiograph(folder), "XR", 2), goal=2)]
    if not SHARED.is_dir():
        print(f"No {SHARED}: small cases from samples/, and no cine, JPEG-lossless and JPEG 2000 series.\n")
        return [
            Case(
                "CT .nii.gz 120 x 126 x 52", source_of(SAMPLES / "CT/totalsegmentator/chest.nii.gz", "CT"), 12
            ),
            Case(
                "MRI .nii.gz 160 x 160 x 19", source_of(SAMPLES / "MRI/sct-tutorial/spine_T2.nii.gz", "MRI"), 8
            ),
            Case("DWI 96 x 36 x 15 x 4", source_of(SAMPLES / "MRI/sct-tutorial/spine_DWI.nii.gz", "MRI"), 8),
            Case("DICOM 256 x 256 x 10, raw", source_of(SAMPLES / "CT/dcm-qa-ct/head", "CT"), 12),
            *cases,
            Case("fundus .jpg 1736 x 1824", source_of(SAMPLES / "fundus/berens/retina.jpg", "fundus", 2), 3.5),
        ]

    chest = [pydicom.dcmread(file) for file in sorted((SHARED / "dicom/ct_chest_jpeg_lossless").iterdir())]
    chest.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    slices = [
        imagecodecs.jpeg8_decode(get_frame(dataset.PixelData, 0, number_of_frames=1)) for dataset in chest
    ]
    depth, files = (75, 50) if quick else (300, 200)
    volume = np.stack([slices[k] for k in mirrored(len(slices), depth)]).astype(np.int16) - 1000
    spacing = (*map(float, chest[0].PixelSpacing), 1.0)
    ct = save_nifti(folder / "ct.nii.gz", volume.transpose(2, 1, 0), spacing)
    raw, lossless, j2k = (folder / name for name in ("raw", "lossless", "j2k"))
    encoded = [
        imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="j2k") for pixels in slices
    ]
    for number, k in enumerate(mirrored(len(slices), files)):
        save_slice(raw, chest[k], number, slices[k].tobytes(), ExplicitVRLittleEndian)
        save_slice(lossless, chest[k], number, chest[k].PixelData, chest[k].file_meta.TransferSyntaxUID)
        save_slice(j2k, chest[k], number, encapsulate([encoded[k]]), JPEG2000Lossless)
    mri = SHARED / "mri"
    return [
        Case(f"CT .nii.gz 512 x 512 x {depth}", source_of(ct, "CT"), 12, limit_goal=0.6),
        Case("MRI .nii.gz 320 x 256 x 19", source_of(mri / "spinal_cord_t2_ms.nii.gz", "MRI"), 8),
        Case("MRI .nii.gz 240 x 240 x 155", source_of(mri / "brats_gli_00001_t1c.nii.gz", "MRI"), 8),
        Case("DWI 96 x 36 x 15 x 35", source_of(mri / "spinal_cord_dwi_4d.nii.gz", "MRI"), 8),
        Case("cine 216 x 256 x 10 x 30", source_of(make_cine(folder), "MRI"), 8),
        Case(f"DICOM 512 x 512 x {files}, raw", source_of(raw, "CT"), 12),
        Case(f"DICOM 512 x 512 x {files}, JPEG lossless", source_of(lossless, "CT"), 7),
        Case(f"DICOM 512 x 512 x {files}, JPEG 2000", source_of(j2k, "CT"), 3),
        *cases,
        Case("fundus .jpg 3410 x 2848", source_of(SHARED / "fundus/idrid_11.jpg", "fundus", 2), 3.5),
    ]


def mirrored(length: int, wanted: int) -> list[int]:
    """0, 1, ... length - 1, length - 2, ... 0, 1, ...: a scan continued by its mirror image."""
    period = 2 * length - 2
    return [min(k % period, period - k % period) for k in range(wanted)]


def save_nifti(file: Path, voxels: Any, spacing: Sequence[float]) -> Path:
    """`voxels` (I, J, K[, T]), axes to the left, to the back and up; rows are turned over, as dcm2niix does."""
    image = nib.Nifti1Image(voxels[:, ::-1], np.diag([-spacing[0], spacing[1], spacing[2], 1.0]))
    image.header.set_slope_inter(1, 0)
    nib.save(image, file)
    return file


def save_slice(folder: Path, dataset: Any, number: int, pixels: bytes, syntax: str) -> None:
    folder.mkdir(exist_ok=True)
    moved = copy.deepcopy(dataset)
    moved.file_meta.TransferSyntaxUID = syntax
    moved.PixelData = pixels
    moved["PixelData"].VR = "OW"
    moved["PixelData"].is_undefined_length = moved.file_meta.TransferSyntaxUID.is_compressed
    moved.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], number]
    moved.InstanceNumber = number + 1
    moved.SOPInstanceUID = moved.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
    moved.save_as(folder / f"{number:04d}.dcm", implicit_vr=False, little_endian=True)


def make_cine(folder: Path) -> Path:
    """Thirty phases of ten real slices each; from phase to phase they move on by one."""
    head = [pydicom.dcmread(file) for file in sorted((SHARED / "dicom/mr_t1_whole_head").iterdir())]
    head.sort(key=lambda dataset: int(dataset.InstanceNumber))
    slices = np.stack([dataset.pixel_array[:256, 29:245] for dataset in head]).astype(np.int16)
    phases = [slices[[k % len(slices) for k in range(phase, phase + 10)]] for phase in range(30)]
    return save_nifti(folder / "cine.nii.gz", np.stack(phases).transpose(3, 2, 1, 0), (1.4, 1.4, 8.0))


def make_radiograph(folder: Path) -> Path:
    """A real radiograph at the size of a detector's, with the noise that its reduction took away."""
    with Image.open(SAMPLES / "XR/ml-workgroup-1479fa94/chest.png") as picture:
        large = np.asarray(picture.convert("L").resize((2500, 3000), Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(0).normal(0, 1.5, large.shape)
    Image.fromarray(np.clip(np.rint(large + noise), 0, 255).astype(np.uint8)).save(folder / "cxr.png")
    return folder / "cxr.png"


# measurement -------------------------------------------------------------------------------------------------


def prepare() -> None:
    """One core, one thread everywhere, no chatter, nothing left to import, and the decoder pydicom lacks."""
    warnings.filterwarnings("ignore", module=r"monai\.|pydicom\.")
    logging.disable(logging.WARNING)
    import monai.transforms
    import torch

    monai.transforms.LoadImage()  # looks for the readers that are installed
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    JPEGLosslessSV1Decoder.add_plugin("imagecodecs", (__name__, "decode_jpeg_lossless"))


def cpu_seconds(work: Work, source: ImageSource, scratch: Path) -> float:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        start = time.process_time()
        work(source, Path(folder))
        return time.process_time() - start


def speed_rows(cases: Sequence[Case], rounds: int, scratch: Path) -> Iterator[dict[str, Any]]:
    works: dict[str, dict[str, Work]] = {}
    for case in cases:
        works[case.title] = {"ours": ours, "MONAI": with_monai, "limit": limit_of(case.source)}
        if case.source.format == "raster":
            works[case.title]["torch bilinear"] = with_bilinear
    times = {(case.title, name): [] for case in cases for name in works[case.title]}
    order = random.Random(0)
    for round_number in range(rounds):
        for case in cases:
            names = list(works[case.title])
            order.shuffle(names)
            for name in names:
                seconds = cpu_seconds(works[case.title][name], case.source, scratch)
                times[case.title, name].append(seconds)
        print(f"round {round_number + 1} of {rounds} done", flush=True)
    for case in cases:
        mine = statistics.median(times[case.title, "ours"])
        for name in sorted(set(works[case.title]) - {"ours"}):
            theirs = statistics.median(times[case.title, name])
            goal = {"MONAI": case.goal, "limit": case.limit_goal}.get(name)
            yield row(case.title, mine, name, theirs, "CPU s", goal)


def memory_rows(cases: Sequence[Case], scratch: Path) -> Iterator[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    for case in cases:
        peaks = []
        for work in (ours, with_monai):
            with ProcessPoolExecutor(1, spawn) as pool:
                peaks.append(pool.submit(peak_megabytes, work, case.source, scratch).result())
        decoded = sum(volume.voxels.nbytes for volume in read_volumes(case.source)) / 1e6
        yield row(case.title, peaks[0], f"{MAX_MEMORY} decoded volumes", MAX_MEMORY * decoded, "MB peak", 1)
        yield row(case.title, peaks[0], "MONAI", peaks[1], "MB peak", None)


def peak_megabytes(work: Work, source: ImageSource, scratch: Path) -> float:
    """Peak resident memory of `work` above what imports and a first small image took, in a fresh process."""
    prepare()
    small = {
        "nifti": source_of(SAMPLES / "CT/totalsegmentator/chest.nii.gz", "CT"),
        "dicom": source_of(SAMPLES / "MRI/datalad/brain_T1", "MRI"),
        "raster": source_of(SAMPLES / "XR/ml-workgroup-0957ce54/chest.png", "XR", 2),
    }
    cpu_seconds(work, small[source.format], scratch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    cpu_seconds(work, source, scratch)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MB. Not by getrusage: its maximum is inherited from the parent process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status does not tell {field}")
    return int(found[1]) * 1024 / 1e6


def row(case: str, mine: float, peer: str, theirs: float, unit: str, goal: float | None) -> dict[str, Any]:
    ratio = theirs / mine
    verdict = "" if goal is None else f"goal {goal:g}" + ("" if ratio >= goal else " MISSED")
    print(f"{case:38} {peer:18} {mine:9.3f} {theirs:9.3f} {unit:8} {ratio:6.2f}  {verdict}", flush=True)
    return {"case": case, "ours": mine, "peer": peer, "theirs": theirs, "unit": unit, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller CT, two rounds instead of three")
    parser.add_argument(
        "--case", action="append", metavar="WORDS", help="only inputs whose title holds WORDS; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    prepare()
    in_memory = Path("/dev/shm")  # a slow disk would add its share to both sides
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as temporary:
        scratch = Path(temporary)
        cases = make_cases(scratch, options.quick)
        if options.case:
            cases = [case for case in cases if any(words in case.title for words in options.case)]
        if not cases:
            parser.error(f"no input has {' or '.join(options.case)} in its title")
        for case in cases:  # imports, page cache, and whether it works at all
            ours(case.source, Path(tempfile.mkdtemp(dir=scratch)))
        rows = list(speed_rows(cases, 2 if options.quick else 3, scratch))
        rows += memory_rows(cases[:1] if options.quick else cases, scratch)
    if options.json:
        report = {"benchmark": "ingest", "machine": machine(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
