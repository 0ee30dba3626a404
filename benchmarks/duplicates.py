"""How well and how fast duplicates are found, on real images that are encoded again and on made-up features.

    python benchmarks/duplicates.py [--quick] [--json FILE]
    python benchmarks/duplicates.py --scale ROWS [--keep FOLDER]      # only a search in a corpus of lookalikes

Recall: each image is encoded again in many ways, and the copies are looked for among the originals, as
`pumit-data duplicates --leakage` does. Precision: of all pairs of an original and a copy that were found,
those of one image. Of a file with several volumes or frames the first is encoded again; the next two are among
the negatives, as are other sequences of one person, halves of one body and all else. Where `../shared/data`
lies beside the checkout its larger images are used, otherwise the samples. The peer is the difference hash of
the middle slice (64 bits, up to 10 different), over all pairs.

Scaling: a search in a corpus of lookalikes (lookalikes.py), some of which are planted twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

# This file's own folder comes first otherwise, and holds a file called `catalog`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# As Dask sets it for the workers of an ingest: idle threads of BLAS would count as CPU time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from benchmarks.lookalikes import original_of, write_lookalikes
from catalog.corpus import Corpus
from catalog.duplicates.equal import first_equal
from catalog.duplicates.groups import find_groups
from catalog.duplicates.pictures import unpack
from catalog.duplicates.search import Images, near_pairs
from catalog.query import read_batches
from ingest.features import Features, features
from ingest.glance import as_source, glance_file, survey
from ingest.image import Normalised, normalise
from ingest.reasons import ExcludedImage, FailedImage
from ingest.source import ImageSource
from ingest.task import images_of
from ingest.volume import Volume

REPOSITORY = Path(__file__).resolve().parent.parent
GOAL_RECALL, GOAL_PRECISION, GOAL_SHARE = 0.95, 0.99, 0.03
VOLUMES_OF_A_FILE = 3
SMALL = 40
"""A volume of fewer rows or columns, or of fewer than 8 slices, has a small grid and is counted apart."""
DIFFERENT_BITS = 10

Voxels = npt.NDArray[Any]


class Known(NamedTuple):
    """What is kept of an image: its voxels would not all fit into memory."""

    features: Features
    hash: int
    """Difference hash."""
    shape: tuple[int, ...]


class Original(NamedTuple):
    name: str
    file: str
    image: Known


class Copy(NamedTuple):
    original: int
    kind: str
    image: Known


def known_of(image: Normalised) -> Known:
    return Known(image.features, difference_hash(image), image.voxels.shape)


def images_and_copies(quick: bool) -> tuple[list[Original], list[Copy]]:
    shared = REPOSITORY.parent / "shared" / "data"
    root = REPOSITORY / "samples" if quick or not shared.is_dir() else shared
    known: list[Original] = []
    made: list[Copy] = []
    for glance in survey(root).images:
        source = as_source(root, glance, dataset="benchmark", key=glance.name)
        try:
            images = [image for image in images_of(source) if isinstance(image, Normalised)]
        except FailedImage as error:
            print(f"not used: {error.message}", file=sys.stderr)
            continue
        for place, image in enumerate(images[:VOLUMES_OF_A_FILE]):
            if place == 0:
                made += copies(len(known), source, image, quick)
            known.append(Original(image.row["key"], source.path, known_of(image)))
        print(f"{glance.name}: {len(made)} copies", file=sys.stderr, flush=True)
    return known, made


def copies(number: int, source: ImageSource, image: Normalised, quick: bool) -> Iterator[Copy]:
    """The image in other sizes, directions, crops, windows and formats, and in combinations of them."""
    row, voxels = image.row, image.voxels
    solid = row["spacing_z"] is not None
    rng = np.random.default_rng(number)
    for kind, changed, factor in variants(voxels, solid, rng, quick):
        spacing = tuple(row[f"spacing_{axis}"] / factor for axis in "zyx") if solid else None
        volume = Volume(
            voxels=np.ascontiguousarray(changed),
            dimension=3 if solid else 2,
            spacing=spacing,
            affine=None,
            slope=row["slope"],
            intercept=row["intercept"],
            slice_axis=0 if solid else None,
        )
        try:
            yield Copy(number, kind, known_of(normalise(volume, source)))
        except ExcludedImage as error:
            print(f"{source.path}, {kind}: {error.reason}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for kind, file in written(Path(folder), voxels, row, solid):
            glance = glance_file(file)
            if glance is None:
                raise RuntimeError(f"{file} is not known as an image")
            again = as_source(file.parent, glance, dataset="benchmark", key=kind)
            for found in images_of(again):
                if isinstance(found, Normalised):
                    yield Copy(number, kind, known_of(found))


def variants(
    voxels: Voxels, solid: bool, rng: np.random.Generator, quick: bool
) -> Iterator[tuple[str, Voxels, float]]:
    """Kind, voxels, and the factor by which they are more along each axis."""
    axes = (1, 2, 3) if solid else (2, 3)
    for factor in (0.5, 0.7, 1.5, 2.0):
        yield "resampled", resampled(voxels, factor, solid), factor
    for axis in axes:
        yield "flipped", np.flip(voxels, axis), 1.0
    for _ in range(2 if quick else 4):
        yield "cropped", cropped(voxels, rng), 1.0
    for low, high in ((0.5, 99.5), (5, 99.9), (0.1, 97)):
        yield "window, 8 bits", in_window(voxels, low, high), 1.0
    for _ in range(2 if quick else 4):
        factor = float(rng.choice([0.5, 0.7, 1.5, 2.0]))
        turned = np.flip(voxels, [axis for axis in axes if rng.random() < 0.5])
        changed = resampled(cropped(turned, rng), factor, solid)
        if rng.random() < 0.5:
            changed = in_window(changed, float(rng.choice([0, 0.5, 2])), float(rng.choice([98, 99.5, 100])))
        yield "all of these", changed, factor


def resampled(voxels: Voxels, factor: float, solid: bool) -> Voxels:
    """Area weights when shrinking, else linear; also along the depth of a volume."""
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    height, width = (max(8, round(side * factor)) for side in voxels.shape[2:])
    planes = [
        [cv2.resize(np.ascontiguousarray(p, np.float32), (width, height), interpolation=way) for p in channel]
        for channel in voxels
    ]
    changed = np.asarray(planes)
    if solid:
        depth = max(2, round(voxels.shape[1] * factor))
        flat = np.ascontiguousarray(changed[0].reshape(len(changed[0]), -1))
        parts = np.array_split(flat, -(-flat.shape[1] // 8192), axis=1)
        sized = [cv2.resize(np.ascontiguousarray(p), (p.shape[1], depth), interpolation=way) for p in parts]
        changed = np.concatenate(sized, axis=1).reshape(1, depth, height, width)
    return np.rint(changed).astype(voxels.dtype) if voxels.dtype.kind in "iu" else changed


def cropped(voxels: Voxels, rng: np.random.Generator) -> Voxels:
    """Up to 10 % less at each side."""
    box: list[slice] = [slice(None)]
    for size in voxels.shape[1:]:
        before, after = (int(share * size) for share in rng.uniform(0, 0.1, 2))
        box.append(slice(before, size - after))
    return voxels[tuple(box)]


def in_window(voxels: Voxels, low: float, high: float) -> Voxels:
    black, white = np.percentile(voxels, [low, high])
    scaled = (voxels.astype(np.float32) - black) / max(white - black, 1)
    return np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def written(folder: Path, voxels: Voxels, row: dict[str, Any], solid: bool) -> Iterator[tuple[str, Path]]:
    """Files of other formats that hold the image."""
    if not solid:
        grey = voxels if voxels.dtype == np.uint8 else in_window(voxels, 0, 100)
        picture = Image.fromarray(grey[0, 0] if len(grey) == 1 else np.moveaxis(grey[:, 0], 0, -1))
        for kind, name, options in (
            ("PNG", "image.png", {}),
            ("JPEG 75", "image75.jpg", {"quality": 75}),
            ("JPEG 40", "image40.jpg", {"quality": 40}),
        ):
            picture.save(folder / name, **options)
            yield kind, folder / name
        return
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels[0]))
    image.SetSpacing([row[f"spacing_{axis}"] for axis in "xyz"])
    for kind, name in (("NIfTI", "image.nii.gz"), ("NRRD", "image.nrrd"), ("MHA", "image.mha")):
        sitk.WriteImage(image, str(folder / name))
        yield kind, folder / name


def difference_hash(image: Normalised) -> int:
    """Of the middle slice in its window: whether each of 8 x 9 cells is brighter than its right neighbour."""
    plane = image.voxels[:, image.voxels.shape[1] // 2].astype(np.float32).mean(axis=0)
    small = cv2.resize(plane, (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes())


def quality(quick: bool) -> list[dict[str, Any]]:
    known, made = images_and_copies(quick)
    same = {number: identity(known, number) for number in range(len(known))}
    print(f"{len(known)} images, {len(made)} copies of them", file=sys.stderr)
    with Images() as images:
        everything = [original.image for original in known] + [copy.image for copy in made]
        images.add(
            [image.features.voxel_hash for image in everything],
            [image.features.pictures for image in everything],
            [original.file for original in known] + [f"copy {number}" for number in range(len(made))],
        )
        side = np.arange(len(everything)) >= len(known)
        near = near_pairs(images, lambda *_: None, side).pairs
        scores = (round(score, 3) for score in near.agreement.tolist())
        pairs = dict(zip(map(tuple, near.images.tolist()), scores, strict=True))
        exact = first_equal(images.table()["hash"])
        first, second = np.nonzero(exact[: len(known), None] == exact[len(known) :])
        pairs |= dict.fromkeys(zip(first.tolist(), (second + len(known)).tolist(), strict=True), 1.0)
    hashes = [image.hash for image in everything]
    theirs = {
        (first, len(known) + second)
        for first in range(len(known))
        for second in range(len(made))
        if (hashes[first] ^ hashes[len(known) + second]).bit_count() <= DIFFERENT_BITS
    }
    rows = []
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for number, copy in enumerate(made, start=len(known)):
        pair = (copy.original, number)
        small = is_small(known[copy.original].image)
        for kind in (
            "overall",
            copy.kind,
            *(["small grids"] if small else ["all other grids"]),
        ):
            found[kind].append((pair in pairs, pair in theirs))
    for kind, hits in found.items():
        ours, peer = np.mean(hits, axis=0)
        rows.append(row(f"recall, {kind} ({len(hits)})", ours, "difference hash", peer, "share"))
        rows.append(row(f"recall, {kind}: goal", ours, "goal", GOAL_RECALL, "share"))
    right = {pair for pair in pairs if same[pair[0]] == same[made[pair[1] - len(known)].original]}
    wrong = pairs.keys() - right
    for first, second in sorted(wrong):
        copy = made[second - len(known)]
        print(
            f"wrong: {known[first].name} - {known[copy.original].name} ({copy.kind}): {pairs[first, second]}",
            file=sys.stderr,
        )
    for number, copy in enumerate(made, start=len(known)):
        if (copy.original, number) not in pairs:
            print(f"missed: {known[copy.original].name} ({copy.kind})", file=sys.stderr)
    right_theirs = sum(same[first] == same[made[second - len(known)].original] for first, second in theirs)
    precision, peer = len(right) / max(1, len(pairs)), right_theirs / max(1, len(theirs))
    negatives = len(known) * len(made) - len(right)
    rows.append(row(f"precision ({negatives} negatives)", precision, "difference hash", peer, "share"))
    rows.append(row("precision: goal", precision, "goal", GOAL_PRECISION, "share"))
    return rows


def identity(known: list[Original], number: int) -> str:
    """Images of equal voxels are one image, whatever file they are in."""
    return known[number].image.features.voxel_hash.hex()


def is_small(image: Known) -> bool:
    _, depth, height, width = image.shape
    return min(height, width) < SMALL or 1 < depth < 8


def cost(quick: bool) -> list[dict[str, Any]]:
    """CPU time of the features next to that of reading, normalising and encoding the image."""
    from shards.write import write_volume

    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for title, shape in (
            (f"CT 512 x 512 x {75 if quick else 300}", (75 if quick else 300, 512, 512)),
            ("MRI 320 x 256 x 19", (19, 256, 320)),
        ):
            smooth = cv2.GaussianBlur(rng.normal(0, 1500, shape[1:]).astype(np.float32), (0, 0), 9) * 9
            voxels = (smooth + rng.normal(0, 30, shape)).astype(np.int16)
            file = Path(folder) / "image.nii.gz"
            sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file))
            glance = glance_file(file)
            if glance is None:
                raise RuntimeError(f"{file} is not known as an image")
            source = as_source(file.parent, glance, dataset="benchmark", key=title)
            times: dict[str, list[float]] = defaultdict(list)
            for attempt in range(3):
                start = time.process_time()
                (image,) = images_of(source)
                if not isinstance(image, Normalised):
                    raise RuntimeError(f"{title}: {image['message']}")
                write_volume(Path(folder), f"{attempt}-{shape[0]}", image.voxels)
                times["ingest"].append(time.process_time() - start)
                start = time.process_time()
                features(image.voxels, image.row)
                times["features"].append(time.process_time() - start)
            ours, whole = (float(np.median(times[name])) for name in ("features", "ingest"))
            rows.append(row(f"features, {title}", 1e3 * ours, "ingest", 1e3 * whole, "ms"))
            rows.append(row(f"features, {title}: share", ours / whole, "goal", GOAL_SHARE, "share", less=True))
    return rows


def scale(rows: int, folder: Path) -> None:
    """Search a corpus of lookalikes (lookalikes.py), and tell what it took and how many planted are found."""
    corpus = Corpus(folder)
    if not folder.exists():
        planted = write_lookalikes(folder, rows, templates())
        print(f"{planted:,} of {rows:,} images come once more", file=sys.stderr, flush=True)
    start, cpu = time.perf_counter(), time.process_time()
    told = ""

    def show(what: str, done: int, total: int) -> None:
        nonlocal told
        if what != told:
            told = what
            print(f"{what}: {total:,}, {time.process_time() - cpu:.0f} s of CPU", file=sys.stderr, flush=True)

    found = find_groups(corpus, show, folder=folder.parent)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    hits = wrong = 0
    names = zip(*(found.members[name].to_pylist() for name in ("group", "dataset", "key")), strict=True)
    for _, members in groupby(names, key=lambda member: member[0]):
        group = {(dataset, key) for _, dataset, key in members}
        hits += sum(original_of(key) in group for _, key in group)
        wrong += len({original_of(key) or (dataset, key) for dataset, key in group}) > 1
    keys = (
        key
        for name in corpus.datasets()
        for part in read_batches(corpus.catalog_file(name), "", ["key"])
        for key in part["key"].to_pylist()
    )
    planted = sum(original_of(key) is not None for key in keys)
    print(
        f"{found.images} images: {took:.0f} s, {cpu:.0f} s of CPU, peak {peak:.2f} GB, {hits} of {planted} "
        f"planted found ({hits / planted:.4f}), {wrong} of {found.groups} groups with others in them\n"
        f"{found.work}"
    )


def templates() -> list[npt.NDArray[np.uint8]]:
    """Pictures of the real images, each once."""
    shared = REPOSITORY.parent / "shared" / "data"
    root = shared if shared.is_dir() else REPOSITORY / "samples"
    found: dict[bytes, npt.NDArray[np.uint8]] = {}
    for glance in survey(root).images:
        try:
            images = list(images_of(as_source(root, glance, dataset="benchmark", key=glance.name)))
        except FailedImage as error:
            print(f"not used: {error.message}", file=sys.stderr)
            continue
        for image in images[:VOLUMES_OF_A_FILE]:
            if isinstance(image, Normalised):
                packed = np.frombuffer(image.features.pictures, np.uint8)
                found[image.features.voxel_hash] = unpack(packed[np.newaxis])[0]
    return [levels for levels in found.values() if levels.any()]


def row(case: str, ours: float, peer: str, theirs: float, unit: str, less: bool = False) -> dict[str, Any]:
    ours, theirs = float(ours), float(theirs)
    ratio = theirs / max(ours, 1e-9) if less or unit == "ms" else ours / max(theirs, 1e-9)
    return {"case": case, "ours": ours, "peer": peer, "theirs": theirs, "unit": unit, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="samples only, few images: two minutes")
    parser.add_argument("--scale", type=int, metavar="ROWS", help="only search so many lookalikes")
    parser.add_argument("--keep", type=Path, help="write the lookalikes here, or use those that are here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.scale:
        with tempfile.TemporaryDirectory() as temporary:
            scale(options.scale, options.keep or Path(temporary) / "corpus")
        return
    rows = quality(options.quick)
    rows += cost(options.quick)
    for one in rows:
        print(f"{one['case']:60} {one['ours']:10.4g} {one['peer']:28} {one['theirs']:10.4g} {one['unit']}")
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
        result = {"benchmark": "duplicates", "machine": machine, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
