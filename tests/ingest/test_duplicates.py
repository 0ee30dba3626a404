"""What an image is found again by, and what a search makes of it, on real images that are encoded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catalog.corpus import Corpus
from catalog.duplicates import (
    candidates,
    load_groups,
    points,
    recorded_digest,
    search,
    state_of,
    superfluous,
    write_groups,
)
from catalog.duplicates.align import Floats, agreement, blurred, threshold
from catalog.duplicates.candidates import NEIGHBOURS, Candidates
from catalog.duplicates.codes import Codes, described
from catalog.duplicates.equal import connected, equal_pairs, first_equal
from catalog.duplicates.groups import find_groups, kept_members, summary
from catalog.duplicates.pictures import PACKED_BYTES, pack, unpack
from catalog.duplicates.points import likeness
from catalog.duplicates.search import Images, Pairs, best_of_sources, exact_pairs, near_pairs
from catalog.errors import SetupError
from catalog.manifest import digest_of, publish
from catalog.query import read_table
from catalog.schema import DUPLICATES_SCHEMA
from catalog.write import features_file
from ingest.backfill import ensure_features
from ingest.features import features, pictures, voxel_hash
from ingest.leakage import find_leaks
from ingest.repair import repair
from ingest.spec import load_specs
from ingest.verify import verify
from tests.commands import run

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = """
- id: copies
  title: The same images in other forms
  folder: copies
  private_names: false
  images:
    - globs: ["*.nii.gz"]
      format: nifti
      dimension: 3
      path: '(?P<name>\\w+)\\.nii\\.gz'
      key: "{name}"
      modality: MRI
    - globs: ["*.png"]
      format: raster
      dimension: 2
      path: '(?P<name>\\w+)\\.png'
      key: "{name}"
      modality: XR
"""


def pumit(*arguments: str, code: int = 0) -> str:
    """What the command prints."""
    called = run("pumit-data", *arguments)
    assert called.returncode == code, called.stderr
    return called.stdout


def quiet(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def volume(samples: Path) -> np.ndarray:
    image = sitk.ReadImage(str(samples / "CT" / "elastix" / "chest.mha"))
    return sitk.GetArrayFromImage(image)[np.newaxis]


def radiograph(samples: Path, name: str = "88859dc1") -> np.ndarray:
    return np.asarray(Image.open(samples / "XR" / f"ml-workgroup-{name}" / "chest.png"))[np.newaxis, np.newaxis]


def window(voxels: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(voxels, [0.5, 99.5])
    return float(low), float(high)


def seen(voxels: np.ndarray) -> np.ndarray:
    return pictures(voxels, window(voxels))[np.newaxis]


# features ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32 - 1),
    largest=st.sampled_from([1, 200, 60_000, 2**22]),
    offset=st.integers(-5000, 5000),
    step=st.integers(1, 5),
)
def test_the_hash_knows_values_and_not_how_they_are_stored(
    shape: tuple[int, int, int, int], seed: int, largest: int, offset: int, step: int
) -> None:
    values = np.random.default_rng(seed).integers(0, largest, shape, endpoint=True)
    expected = voxel_hash(values, 1.0, 0.0)
    assert voxel_hash(values + offset, 1.0, -float(offset)) == expected
    assert voxel_hash(values * step, 1 / step, 0.0) == expected
    assert voxel_hash(np.asfortranarray(values), 1.0, 0.0) == expected
    smallest = np.min_scalar_type(largest)
    assert voxel_hash(values.astype(smallest), 1.0, 0.0) == expected
    assert voxel_hash(values[..., ::-1][..., ::-1], 1.0, 0.0) == expected
    if values.min() < values.max():
        assert voxel_hash(values, 2.0, 0.0) != expected
    changed = values.copy()
    changed.flat[seed % changed.size] += 1
    assert voxel_hash(changed, 1.0, 0.0) != expected


def test_the_hash_of_a_large_image_sees_every_voxel() -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (1, 40, 130, 170), np.int16)
    expected = voxel_hash(values, 1.0, 0.0)
    assert voxel_hash((values + 1024).astype(np.uint16), 1.0, -1024.0) == expected
    assert voxel_hash(np.asfortranarray(values[0])[np.newaxis], 1.0, 0.0) == expected
    for place in ((0, 0, 0, 0), (0, 21, 64, 3), (0, 39, 129, 169)):
        changed = values.copy()
        changed[place] ^= 1
        assert voxel_hash(changed, 1.0, 0.0) != expected
    assert voxel_hash(values[:, ::-1], 1.0, 0.0) != expected


def test_floats_are_hashed_by_value() -> None:
    values = np.random.default_rng(0).normal(size=(1, 3, 5, 7)).astype(np.float32)
    assert voxel_hash(values.astype(np.float64), 1.0, 0.0) == voxel_hash(values, 1.0, 0.0)
    values[0, 0, 0, 0] = 0.0
    negative = values.copy()
    negative[0, 0, 0, 0] = -0.0
    assert voxel_hash(negative, 1.0, 0.0) == voxel_hash(values, 1.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 7),
    height=st.integers(1, 300),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
    channels=st.sampled_from([1, 3]),
)
def test_pictures_of_any_image_fit_their_place(
    depth: int, height: int, width: int, seed: int, channels: int
) -> None:
    channels = 1 if depth > 1 else channels
    voxels = np.random.default_rng(seed).integers(0, 255, (channels, depth, height, width), np.uint8)
    levels = pictures(voxels, (0.0, 255.0))
    packed = pack(levels)
    assert len(packed) == PACKED_BYTES[3 if depth > 1 else 1] <= 1536
    assert (unpack(np.frombuffer(packed, np.uint8)[np.newaxis])[0] == levels).all()
    turned = pictures(np.asfortranarray(voxels), (0.0, 255.0))
    assert (turned == levels).all()


@pytest.mark.filterwarnings("error")
@given(st.floats(1e-300, 1e30), st.floats(-1e30, 1e30))
@settings(deadline=None)
def test_any_scale_that_a_header_may_give_has_features(slope: float, intercept: float) -> None:
    """A spoiled header once had an intercept beside which the window vanished."""
    voxels = np.arange(64, dtype=np.int16).reshape(1, 4, 4, 4)
    ends = (slope * value + intercept for value in (3, 60))
    row = {"slope": slope, "intercept": intercept} | dict(zip(("window_low", "window_high"), ends, strict=True))
    assert len(features(voxels, row).pictures) == PACKED_BYTES[3]


def test_a_flip_of_the_image_flips_its_pictures(samples: Path) -> None:
    voxels = volume(samples)
    levels = pictures(voxels[:, :, :128, :96], window(voxels))
    mirrored = pictures(voxels[:, :, :128, :96][..., ::-1], window(voxels))
    assert np.abs(mirrored[0, :, ::-1].astype(int) - levels[0]).max() <= 1
    assert np.abs(mirrored[1, :, ::-1].astype(int) - levels[1]).max() <= 1


def test_an_image_of_one_value_has_nothing_to_be_found_by() -> None:
    for voxels in (np.zeros((1, 9, 40, 40), np.int16), np.full((1, 1, 40, 40), 7, np.uint8)):
        levels = pictures(voxels, (0.0, 10.0))
        assert not levels.any()
        assert len(described(levels[np.newaxis])[0].code) == 0
        assert compared(levels[np.newaxis], levels[np.newaxis])[0] < 0.1


# pairs ------------------------------------------------------------------------------------------------------


def compared(first: np.ndarray, second: np.ndarray) -> Floats:
    """Agreement of pairs of pictures, laid over each other by their points."""
    points_of = (described(one)[1] for one in (first, second))
    return agreement(first, second, likeness(*points_of, first.shape[1]).placement)


def test_forms_of_one_image_agree_and_others_do_not(samples: Path) -> None:
    chest = volume(samples)
    forms = [
        chest[:, :, ::2, ::2],
        chest[:, :, ::-1, ::-1],
        chest[:, 3:-2, 10:-8, 5:-9],
        np.clip(chest, -900, 300),
        np.repeat(chest, 2, axis=1),
    ]
    scores = compared(np.repeat(seen(chest), len(forms), 0), np.concatenate([seen(form) for form in forms]))
    assert (scores >= threshold(3)).all(), scores
    image = radiograph(samples)
    flat = [image[..., ::2, ::2], image[..., ::-1], image[..., 40:-30, 50:-20], np.clip(image, 40, 220)]
    scores = compared(np.repeat(seen(image), len(flat), 0), np.concatenate([seen(form) for form in flat]))
    assert (scores >= threshold(1)).all(), scores
    others = [radiograph(samples, name) for name in ("0957ce54", "1479fa94")]
    scores = compared(np.repeat(seen(image), 2, 0), np.concatenate([seen(other) for other in others]))
    assert (scores < 0.7).all(), scores


def images_of(*features: tuple[bytes, np.ndarray, str]) -> Images:
    images = Images()
    hashes, levels, sources = zip(*features, strict=True)
    images.add(hashes, [pack(one) for one in levels], sources)
    return images


def test_of_two_files_with_time_series_volumes_pair_off(samples: Path) -> None:
    """All volumes look alike; each belongs to its own copy, and none of a file to another of that file."""
    series = nib.load(samples / "MRI" / "sct-testing" / "spine_fMRI.nii.gz").get_fdata().astype(np.int16)
    volumes = [np.moveaxis(series[..., number], -1, 0)[np.newaxis] for number in range(3)]
    own = [(bytes([n]) * 16, seen(one)[0], "a") for n, one in enumerate(volumes)]
    copied = [(bytes([10 + n]) * 16, seen(one[..., ::-1])[0], "b") for n, one in enumerate(volumes)]
    with images_of(*own, *copied) as images:
        assert near_pairs(images, quiet).pairs.images.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_an_evaluation_set_may_hold_an_image_several_times(samples: Path) -> None:
    image = radiograph(samples)
    copied = seen(image[..., 30:-20, 20:-10])[0]
    known = [(bytes([n]) * 16, seen(one)[0], f"corpus {n}") for n, one in enumerate((image, image[..., ::-1]))]
    twice = [(bytes([10 + n]) * 16, copied, f"evaluation {n}") for n in range(3)]
    with images_of(*known, *twice) as images:
        side = np.array([False, False, True, True, True])
        found = near_pairs(images, quiet, side).pairs.images
        assert set(found[:, 0]) == {0, 1}
        assert set(found[:, 1]) == {2, 3, 4}


def test_crowded_buckets_take_time_in_proportion_to_their_size() -> None:
    count = 5_000
    crowd = Codes(np.arange(count), np.full(count, 7, np.uint64))
    with Candidates(count) as several:
        several.add(crowd)
        found = np.concatenate(list(several.pairs(np.arange(count), quiet)))
    assert (several.codes, several.crowded) == (count, count - NEIGHBOURS - 1), "what is passed over is told"
    pairs_met = len(found) + several.passed_over
    assert count * (NEIGHBOURS - 1) < pairs_met <= count * NEIGHBOURS
    assert np.bincount(found[:, 0]).max() == candidates._MOST
    assert (found[:, 0] < found[:, 1]).all()
    assert len(np.unique(found, axis=0)) == len(found)


FORMS = 6


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(2 * FORMS)), at_once=st.integers(3, 40), of_a_part=st.sampled_from([1, 99]))
def test_what_is_found_depends_neither_on_the_order_nor_on_what_memory_holds(
    made_up: list[np.ndarray], order: list[int], at_once: int, of_a_part: int
) -> None:
    """Images and their mirrored, noisy forms, with what is read, held and compared at a time changed."""
    features = [(bytes([number]) * 16, made_up[number], str(number)) for number in order]
    with pytest.MonkeyPatch.context() as patched, images_of(*features) as images:
        patched.setattr(candidates, "_HELD", at_once)
        patched.setattr(candidates, "_PARTS", 1)
        patched.setattr(candidates, "_IMAGES_OF_A_PART", of_a_part)
        patched.setattr(search, "_CODED_AT_ONCE", at_once)
        patched.setattr(search, "_COMPARED_AT_ONCE", at_once)
        patched.setattr(search, "_READ_AT_ONCE", at_once)
        patched.setattr(points, "_AT_ONCE", at_once)
        found = near_pairs(images, quiet).pairs.images.tolist()
    pairs = {tuple(sorted((order[first], order[second]))) for first, second in found}
    assert pairs == {(number, number + FORMS) for number in range(FORMS)}


@pytest.fixture(scope="module")
def made_up() -> list[np.ndarray]:
    """Pictures of FORMS smooth images, and of as many forms of them."""
    rng = np.random.default_rng(3)
    smooth = blurred(rng.normal(0, 1, (FORMS, 3, 32, 32)).astype(np.float32), 1.5)
    levels = 8 + 3 * smooth / smooth.std((-1, -2), keepdims=True)
    noisy = levels + rng.normal(0, 0.4, levels.shape)
    # Mirrored along H, which runs down the first slab and across none but the third.
    mirrored = np.stack([noisy[:, 0, ::-1], noisy[:, 1], noisy[:, 2, :, ::-1]], axis=1)
    both = np.concatenate([levels, mirrored])
    return list(np.clip(np.rint(both), 0, 15).astype(np.uint8))


def test_many_images_without_structure_are_no_near_duplicates() -> None:
    blank = np.zeros((1, 48, 48), np.uint8)
    with images_of(*((bytes(15) + bytes([n]), blank, str(n)) for n in range(50))) as images:
        assert not len(near_pairs(images, quiet).pairs.images)
        assert not len(exact_pairs(images))


NUMBERS = st.integers(0, 12)


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS).filter(lambda pair: pair[0] != pair[1]), max_size=20))
def test_groups_are_what_pairs_connect(pairs: list[tuple[int, int]]) -> None:
    sets = [{image} for image in range(13)]
    for first, second in pairs:
        one, other = (next(each for each in sets if image in each) for image in (first, second))
        if one is not other:
            sets.remove(other)
            one |= other
    expected = sorted(sorted(each) for each in sets if len(each) > 1)
    members, groups = connected(np.array(pairs, np.int64).reshape(-1, 2), 13)
    assert [members[groups == group].tolist() for group in range(len(expected))] == expected
    assert len(members) == sum(map(len, expected))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12), st.booleans())
def test_pairs_connect_what_is_equal(images: list[tuple[int, bool]], sided: bool) -> None:
    values, side = (np.array(each) for each in zip(*images, strict=True))
    first = first_equal(np.stack([values, -values], axis=1)).tolist()
    assert first == first_equal(values).tolist() == [values.tolist().index(value) for value in values]
    found = {tuple(pair) for pair in equal_pairs(values, side if sided else None).tolist()}
    if not sided:
        assert found == {(one, image) for image, one in enumerate(first) if one != image}
        return
    expected = set()
    for image in range(len(images)):
        there = np.flatnonzero((values == values[image]) & (side != side[image]))
        expected |= {tuple(sorted((image, int(other)))) for other in there[:1]}
    assert found == expected


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    exact=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    scores=st.dictionaries(
        st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda pair: pair[0] < pair[1]),
        st.sampled_from([0.75, 0.875, 1.0]),
    ),
)
def test_of_two_sources_the_best_pair_off(
    sources: list[int], exact: list[int], scores: dict[tuple[int, int], float]
) -> None:
    """As a search in dicts has it, pair by pair."""
    scores = {pair: score for pair, score in sorted(scores.items()) if sources[pair[0]] != sources[pair[1]]}

    def likes(image: int, other: int) -> bool:
        others = {
            (a if b == image else b): score
            for (a, b), score in scores.items()
            if image in (a, b) and sources[a if b == image else b] == sources[other]
        }
        twins = [one for one in range(8) if exact[one] == exact[image] and sources[one] == sources[other]]
        if twins and exact[image] != exact[other]:
            return False
        return other == min(others, key=lambda one: (-others[one], one))

    expected = [[a, b] for a, b in scores if likes(a, b) and likes(b, a)]
    pairs = Pairs(np.array(list(scores), np.int64).reshape(-1, 2), np.array(list(scores.values()), np.float32))
    found = best_of_sources(pairs, np.array(sources), first_equal(np.array(exact)))
    assert found.images.tolist() == expected
    assert found.agreement.tolist() == [scores[a, b] for a, b in expected]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flat=st.booleans())
def test_no_form_of_an_image_is_lost_on_the_way_to_its_comparison(samples: Path, seed: int, flat: bool) -> None:
    """Flips and crops of up to 8 % a side: enough points are alike, and tell where the pictures agree."""
    rng = np.random.default_rng(seed)
    voxels = radiograph(samples) if flat else volume(samples)
    box = [slice(None), *(slice(int(0.08 * rng.random() * size), None) for size in voxels.shape[1:])]
    if flat:
        box[1] = slice(None)
    ways = [1, *rng.choice([-1, 1], 3)]
    form = seen(voxels[tuple(box)][tuple(slice(None, None, way) for way in ways)])
    image = seen(voxels)
    found = likeness(described(image)[1], described(form)[1], image.shape[1])
    assert found.points[0] > 0
    assert found.placement.flip[0, 1:].tolist() == [way < 0 for way in ways[2:]]
    assert agreement(image, form, found.placement)[0] >= threshold(image.shape[1])


def test_who_is_kept() -> None:
    def kept(*rows: dict[str, object]) -> list[int]:
        table = pa.Table.from_pylist([row | {"group": 0} for row in rows])
        return np.flatnonzero(kept_members(table)).tolist()

    row = {"split": "train", "stored_dtype": "int16", "shape_c": 1, "shape_d": 1, "shape_w": 9}
    small, large = row | {"shape_h": 10}, row | {"shape_h": 20}
    assert kept(small, large, large) == [1], "the first of the largest"
    assert kept(small, large, large | {"stored_dtype": "float32"}) == [2]
    assert kept(small | {"split": "validation"}, small, large) == [0], "then none of the group trains"


# a corpus ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Raw folder and corpus of the samples and of five of them in other forms."""
    samples, folder = REPOSITORY / "samples", tmp_path_factory.mktemp("made")
    raw, copies = folder / "raw", folder / "raw" / "copies"
    copies.mkdir(parents=True)
    (raw / "sample").symlink_to(samples)
    (raw / "datasets.yaml").write_text(OWN)
    brain = sitk.ReadImage(str(samples / "MRI" / "pyradiomics-brain1" / "brain.nrrd"))
    sitk.WriteImage(brain, str(copies / "brain.nii.gz"))
    chest = volume(samples)[0, :, 8:-10, 6:-9][..., ::-1]
    image = sitk.GetImageFromArray(np.ascontiguousarray(chest))
    image.SetSpacing((1.366, 1.366, 2.5))
    sitk.WriteImage(image, str(copies / "chest.nii.gz"))
    picture = Image.fromarray(radiograph(samples)[0, 0])
    width, height = picture.size
    picture.crop((30, 20, width - 40, height - 50)).resize((400, 440)).save(copies / "radiograph.png")
    retina = Image.open(samples / "fundus" / "scikit-image" / "retina.jpg")
    retina.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(copies / "retina.png")
    for dataset in ("sample", "copies"):
        pumit("ingest", dataset, "--raw", str(raw), "--data", str(folder / "data"), "--workers", "1")
    return raw, folder / "data"


@pytest.fixture
def corpus(made: tuple[Path, Path], tmp_path: Path) -> Corpus:
    shutil.copytree(made[1], tmp_path / "data")
    return Corpus(tmp_path / "data")


PLANTED = {
    ("brain", "pyradiomics-brain1-brain"): "exact",
    ("chest", "elastix-chest"): "near",
    ("radiograph", "ml-workgroup-88859dc1-chest"): "near",
    ("retina", "scikit-image-retina"): "near",
}


def test_planted_duplicates_are_found_and_recorded(corpus: Corpus, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    told = json.loads(pumit("duplicates", "--data", str(corpus.root), "--json", "--html", str(page)))
    assert (told["images"], told["groups"], told["superfluous"]) == (36, 4, 4)
    assert told["by_datasets"] == [{"dataset": "copies", "other": "sample", "groups": 4, "images": 8}]
    groups = load_groups(corpus)
    assert groups is not None
    assert groups.schema.equals(DUPLICATES_SCHEMA)
    rows = groups.to_pylist()
    found = {
        (mine["key"], other["key"]): mine["kind"] for mine, other in zip(rows[0::2], rows[1::2], strict=True)
    }
    assert found == PLANTED
    assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert superfluous(groups).num_rows == 4
    assert digest_of(corpus.duplicates_file) == recorded_digest(corpus)
    text = page.read_text()
    assert all(key in text for pair in PLANTED for key in pair)
    assert text.count("data:image/webp") == 8
    assert len(text) < 5_000_000
    before = corpus.duplicates_file.read_bytes()
    pumit("duplicates", "--data", str(corpus.root), "--csv")
    assert corpus.duplicates_file.read_bytes() == before
    report = tmp_path / "report.html"
    pumit("report", "--data", str(corpus.root), "--output", str(report))
    assert 'id="duplicates"' in report.read_text()


def test_a_dry_run_records_nothing(corpus: Corpus) -> None:
    printed = pumit("duplicates", "--data", str(corpus.root), "--dry-run", "--exact-only")
    assert "1 groups of duplicates" in printed
    assert not corpus.duplicates_file.exists()
    assert load_groups(corpus) is None


def test_verify_knows_the_file_and_finds_its_damage(corpus: Corpus, made: tuple[Path, Path]) -> None:
    specs = load_specs(raw=made[0])
    write_groups(corpus, find_groups(corpus, quiet, exact_only=True).table(), state_of(corpus))
    assert verify(corpus, specs).findings == []
    content = bytearray(corpus.duplicates_file.read_bytes())
    content[len(content) // 2] ^= 4
    corpus.duplicates_file.write_bytes(content)
    assert [finding.kind for finding in verify(corpus, specs).findings] == ["damaged"]
    with pytest.raises(SetupError, match="pumit-data duplicates"):
        load_groups(corpus)
    corpus.duplicates_digest_file.unlink()
    assert [finding.kind for finding in verify(corpus, specs).findings] == ["unproven"]


def test_an_older_corpus_gets_its_features_from_the_shards(corpus: Corpus) -> None:
    whole = {name: corpus.features_file(name).read_bytes() for name in corpus.datasets()}
    for name, kept in (("sample", 5), ("copies", 0)):
        part = read_table(corpus.features_file(name), "").slice(0, kept)
        publish(corpus, name, [features_file(corpus, name, [part])])
    with pytest.raises(SetupError, match=r"4 images.* have no features.*pumit-data duplicates"):
        find_groups(corpus, quiet)
    ensure_features(corpus, quiet)
    assert {name: corpus.features_file(name).read_bytes() for name in corpus.datasets()} == whole


def test_lost_features_are_made_anew_without_raw_images(corpus: Corpus, made: tuple[Path, Path]) -> None:
    specs, file = load_specs(raw=made[0]), corpus.features_file("sample")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + b"x" + whole[-8:])
    before = verify(corpus, specs)
    assert [(finding.kind, finding.file) for finding in before.findings] == [("damaged", corpus.name_of(file))]
    assert repair(corpus, specs, Path("nowhere"), before, 1, lambda plans: []) == []
    assert file.read_bytes() == whole
    assert verify(corpus, specs, deep=True, workers=1).findings == []


def test_a_deep_verification_compares_features_with_voxels(corpus: Corpus, made: tuple[Path, Path]) -> None:
    table = pq.read_table(corpus.features_file("copies"), partitioning=None)
    hashes = table["voxel_hash"].to_pylist()
    wrong = table.set_column(3, table.schema.field(3), pa.array([hashes[1], *hashes[1:]], pa.binary(16)))
    publish(corpus, "copies", [features_file(corpus, "copies", [wrong])])
    (finding,) = verify(corpus, load_specs(raw=made[0]), ["copies"], deep=True, workers=1).findings
    assert "features are not those of its voxels" in finding.problem
    assert finding.keys == ("brain",)


def test_leakage_into_a_dataset_a_folder_and_an_archive(
    corpus: Corpus, made: tuple[Path, Path], tmp_path: Path, samples: Path
) -> None:
    of_dataset = find_leaks(corpus, "copies", quiet)
    assert {(leak.evaluation, leak.key): leak.kind for leak in of_dataset.leaks} == {
        (f"copies/{copied}", key): kind for (copied, key), kind in PLANTED.items()
    }
    assert (of_dataset.images, of_dataset.evaluation_images) == (32, 4)
    of_folder = find_leaks(corpus, str(made[0] / "copies"), quiet)
    exact = {leak.evaluation for leak in of_folder.leaks if leak.dataset == "copies" and leak.kind == "exact"}
    assert exact == {"brain.nii.gz", "chest.nii.gz", "radiograph.png", "retina.png"}
    other = find_leaks(corpus, str(corpus.root), quiet, exact_only=True)
    assert {(f"{leak.dataset}/{leak.key}") for leak in other.leaks} >= {"sample/monai-neck", "copies/brain"}

    small = [
        np.asarray(Image.fromarray(radiograph(samples, name)[0, 0]).resize((64, 64), Image.Resampling.BOX))
        for name in ("1479fa94", "0957ce54")
    ]
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64), np.uint8)
    archive = tmp_path / "chestmnist_64.npz"
    np.savez(archive, train_images=np.stack(small), test_images=noise, train_labels=np.zeros(2))
    printed = pumit("duplicates", "--data", str(corpus.root), "--leakage", str(archive), "--json", code=1)
    told = json.loads(printed)
    assert (told["evaluation_images"], told["evaluation_images_found"]) == (4, 2)
    assert {(leak["evaluation"], leak["key"]) for leak in told["leaks"]} == {
        ("chestmnist_64.npz:train:0", "ml-workgroup-1479fa94-chest"),
        ("chestmnist_64.npz:train:1", "ml-workgroup-0957ce54-chest"),
    }


def test_what_is_no_evaluation_set(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="neither a file or folder, nor a dataset"):
        find_leaks(corpus, "nothing", quiet)
    archive = tmp_path / "bad.npz"
    archive.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(SetupError, match="no archive of plain arrays"):
        find_leaks(corpus, str(archive), quiet)
    np.savez(archive, train_images=np.array([{"an": "object"}], object))
    with pytest.raises(SetupError, match="no archive of plain arrays"):
        find_leaks(corpus, str(archive), quiet)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match="nothing in it could be read"):
        find_leaks(corpus, str(tmp_path / "empty"), quiet)


def test_a_group_that_straddles_the_split_is_told(corpus: Corpus) -> None:
    found = find_groups(corpus, quiet)
    groups = [found.group(number) for number in range(found.groups)]
    straddling = [{row["split"] for row in group} == {"train", "validation"} for group in groups]
    assert summary(found)["straddling"] == [number for number, both in enumerate(straddling) if both]
    for group, both in zip(groups, straddling, strict=True):
        (kept,) = [row for row in group if row["kept"]]
        assert not both or kept["split"] == "validation"
