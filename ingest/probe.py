"""How fast this machine ingests: one generated image of each kind, through the real steps, on one core."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from catalog.corpus import Corpus
from ingest.found import find_sources
from ingest.source import ImageSource
from ingest.spec import DatasetSpec, ImageGroup

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Slices = npt.NDArray[np.int16]

FileKind = Literal["nifti", "itk", "dicom", "png", "jpeg"]
"""Kinds of files that differ in how many voxels a byte holds and what it takes to get at them."""


@dataclass(frozen=True)
class Speed:
    """What ingest does to files of one kind."""

    bytes_per_second: float
    """Bytes of the files in a second of processor time; other programs on the machine do not count."""
    growth: float
    """Prepared bytes for each byte of the files."""


def kind_of_source(source: ImageSource) -> FileKind:
    return _kind(source.format, [source.path])


def kind_of_group(group: ImageGroup) -> FileKind:
    return _kind(group.format, list(group.globs))


def _kind(form: str, names: list[str]) -> FileKind:
    if form == "raster":
        return "jpeg" if all(name.lower().endswith((".jpg", ".jpeg")) for name in names) else "png"
    return {"nifti": "nifti", "itk": "itk", "dicom": "dicom"}[form]  # type: ignore[return-value]


@functools.cache
def measure(kind: FileKind) -> Speed:
    """Generate an image, ingest it into a temporary corpus, and measure: a second or less on an idle machine.

    The image is smooth with noise, as scans are. Compressed DICOM takes up to ten times as long as the
    uncompressed series that is measured here.
    """
    from ingest.journal import Journal, Stamp
    from ingest.task import IngestTask, Place, run_task

    with tempfile.TemporaryDirectory(prefix="pumit-probe-") as place:
        root = Path(place) / "raw"
        root.mkdir()
        _WRITERS[kind](root)
        [source] = find_sources(_spec(kind), root)
        seconds, corpus = 0.0, Corpus(Path(place))
        for name in ("warm", "timed"):  # the first run loads libraries
            corpus = Corpus(Path(place) / name)
            with Journal(corpus, source.dataset).run() as run:
                task = IngestTask(
                    name=name,
                    run=run,
                    dataset=source.dataset,
                    corpus=corpus,
                    root=root,
                    kinds=(source,),
                    places=(Place(source.path, source.key, source.subject, kind=0),),
                    validation_subjects=frozenset(),
                    entry_hash="probe",
                )
                begin = time.process_time()
                outcomes = run_task(task).outcomes
                seconds = time.process_time() - begin
            if set(outcomes) != {("ingested", "")}:
                raise AssertionError(f"the generated {kind} image came out as {dict(outcomes)}")
        size = Stamp.of(source.file).size
        prepared = sum(path.stat().st_size for path in corpus.shards_folder.rglob("*") if path.is_file())
        return Speed(size / seconds, prepared / size)


def _spec(kind: FileKind) -> DatasetSpec:
    flat = kind in ("png", "jpeg")
    group: dict[str, Any] = {
        "globs": ["series/"] if kind == "dicom" else ["image.*"],
        "format": "raster" if flat else kind,
        "dimension": 2 if flat else 3,
        "path": "(?P<name>.+)",
        "key": "{name}",
        "modality": "XR" if flat else "CT",
    }
    return DatasetSpec.model_validate({"id": "probe", "title": "Probe", "folder": "probe", "images": [group]})


def _slices(depth: int, side: int) -> Slices:
    """(D, H, W): a bright body with soft inner structure, in air, with noise."""
    import numpy as np

    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in (depth, side, side)), indexing="ij")
    body = (x**2 + y**2 < 0.8).astype(np.float32)
    soft = 60 * np.sin(7 * x) * np.cos(5 * y) * np.cos(3 * z) + 40
    return np.asarray(-1000 + body * (1000 + soft + rng.normal(0, 12, z.shape)), dtype=np.int16)


def _write_nifti(root: Path) -> None:
    import nibabel as nib
    import numpy as np

    voxels = _slices(48, 256).transpose(2, 1, 0)
    nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 3.0, 1.0])), root / "image.nii.gz")


def _write_itk(root: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(_slices(48, 256))
    image.SetSpacing((0.8, 0.8, 3.0))
    sitk.WriteImage(image, str(root / "image.mha"), useCompression=True)


def _write_dicom(root: Path) -> None:
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    (root / "series").mkdir()
    for number, voxels in enumerate(_slices(24, 512), start=1):
        image = pydicom.Dataset()
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"1.2.3.{number}"
        image.StudyInstanceUID, image.SeriesInstanceUID = "1.2.3", "1.2.4"
        image.FrameOfReferenceUID, image.PatientID, image.Modality = "1.2.5", "probe", "CT"
        image.InstanceNumber, image.SliceThickness, image.PixelSpacing = number, 3, [0.8, 0.8]
        image.ImagePositionPatient = [0, 0, 3 * number]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.Rows, image.Columns = voxels.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        image.RescaleSlope, image.RescaleIntercept = 1, 0
        image.PixelData = voxels.tobytes()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(root / "series" / f"{number:03d}.dcm", enforce_file_format=True)


def _write_picture(root: Path, suffix: str) -> None:
    import numpy as np
    from PIL import Image

    [grey] = np.clip((_slices(1, 1500).astype(np.int32) + 1000) // 5, 0, 255).astype(np.uint8)
    Image.fromarray(grey).save(root / f"image.{suffix}")


_WRITERS: dict[FileKind, Callable[[Path], None]] = {
    "nifti": _write_nifti,
    "itk": _write_itk,
    "dicom": _write_dicom,
    "png": functools.partial(_write_picture, suffix="png"),
    "jpeg": functools.partial(_write_picture, suffix="jpg"),
}
