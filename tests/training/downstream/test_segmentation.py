"""Preparation, crops, measures and the run of a segmentation task, with a backbone of some hundred weights."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from catalog.errors import SetupError
from tests.training.downstream.toy import PatchBackbone, PyramidBackbone, organs, tiny, write_btcv, write_chaos
from training.config import preset_of
from training.downstream import segmentation
from training.downstream.cases import Case, LabelledData, Scan
from training.downstream.crops import Crop, CropDataset, crop_batches
from training.downstream.measures import score, summarise
from training.downstream.predict import predict
from training.downstream.prepared import Preparation, Prepared, prepare
from training.downstream.segmentation_config import SegmentationConfig
from training.downstream.segmentation_table import page, published
from training.downstream.task import Cell
from training.run import TrainingInterrupted, newest_checkpoint

CROP = (8, 32, 32)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_btcv(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def drawn(image: np.ndarray, label: np.ndarray | None, spacing=(1.0, 1.0, 1.0)) -> LabelledData:
    """Data of one case, at hand."""
    case = Case("one", "one", Path("image"), None if label is None else Path("label"))
    return LabelledData(
        classes=("a", "b", "c"),
        channels=len(image),
        training=(case,),
        validation=(),
        test=(),
        read=lambda case: Scan(image, label, spacing),
        write=lambda case, labels, folder: None,
    )


def ready(tmp_path: Path, image: np.ndarray, label: np.ndarray | None, **how) -> Prepared:
    data = drawn(image, label, how.pop("at", (1.0, 1.0, 1.0)))
    return prepare(data, data.training[0], Preparation(**{"spacing": None, "window": (0, 1), **how}), tmp_path)


# -- preparation --------------------------------------------------------------------------------------------


def test_a_window_becomes_zero_to_one_and_is_clipped(tmp_path):
    image = np.linspace(-1000, 1000, 4 * 4 * 4, dtype=np.float32).reshape(1, 4, 4, 4)
    one = ready(tmp_path, image, None, window=(-175, 250))
    expected = ((image + 175) / 425).clip(0, 1)
    np.testing.assert_allclose(one.image(), expected, atol=1e-3)
    torch.testing.assert_close(one.shown(torch.from_numpy(one.image())), torch.from_numpy(one.image()).float())


def test_without_a_window_a_backbone_that_normalises_sees_mean_0_and_deviation_1(tmp_path):
    draw = np.random.default_rng(0)
    image = np.stack([draw.normal(500, 90, (8, 16, 16)), draw.gamma(2, 30, (8, 16, 16))]).astype(np.float32)
    one = ready(tmp_path, image, None, window=None)
    assert one.image().min() == 0
    assert one.image().max() == 1
    assert (one.image() == 1).mean() == pytest.approx(0.005, abs=0.002), "the upper percentile is 99.5"
    shown = one.shown(torch.from_numpy(one.image()))
    z = (shown - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)
    assert z.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=2e-3)
    assert z.std((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=2e-3)


def test_images_are_resampled_to_the_spacing_and_labels_stay_labels(tmp_path):
    image, label = organs((10, 20, 30), 3, 0)
    one = ready(tmp_path, image[None], label, at=(4.0, 2.0, 1.0), spacing=(2.0, 1.0, 1.0))
    assert one.image().shape == (1, 20, 40, 30)
    assert one.label().shape == (20, 40, 30)
    assert set(np.unique(one.label())) == {0, 1, 2, 3}
    assert one.spacing == pytest.approx((2, 1, 1))
    np.testing.assert_array_equal(one.label()[::2, ::2], label)
    for number, places in enumerate(one.places()):
        assert (one.label().ravel()[places] == number).all()
        assert len(places) == min((one.label() == number).sum(), 20_000)


def test_a_prepared_case_is_made_once_until_a_file_or_setting_changes(release, tmp_path):
    config = tiny("btcv", release, tmp_path)
    data = segmentation.open_data(Cell(task="btcv", init="x"), config)
    reads = []

    counting = dataclasses.replace(data, read=lambda case: reads.append(case) or data.read(case))

    def prepared(window: tuple[float, float] = (0, 1)) -> Prepared:
        return prepare(counting, data.training[0], Preparation(spacing=None, window=window), tmp_path)

    first = prepared()
    assert prepared() == first
    assert len(reads) == 1
    assert prepared(window=(0, 2)).folder != first.folder
    assert len(reads) == 2
    os.utime(data.training[0].label, (1, 1))
    assert prepared().folder != first.folder
    assert prepared().sha256 == first.sha256, "the same voxels under another time"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_values_that_are_not_finite_are_refused(tmp_path):
    image = np.full((1, 4, 4, 4), np.nan, np.float32)
    with pytest.raises(SetupError, match="image holds values that are not finite"):
        ready(tmp_path, image, None)


# -- crops --------------------------------------------------------------------------------------------------


def crops(tmp_path: Path, image: np.ndarray, label: np.ndarray, crop=CROP, random_share=0.25) -> CropDataset:
    return CropDataset([ready(tmp_path, image, label)], crop, 4, random_share, seed=3)


def same(one: Crop, other: Crop) -> bool:
    return torch.equal(one.image, other.image) and torch.equal(one.label, other.label)


def test_crops_are_a_function_of_their_number_alone(tmp_path):
    image, label = organs((12, 50, 60), 3, 0)
    dataset = crops(tmp_path, image[None], label)
    assert same(dataset[7], dataset[7])
    assert not same(dataset[7], dataset[8])
    straight = list(crop_batches(dataset, 2, 0, 4, 0))
    resumed = list(crop_batches(dataset, 2, 2, 4, 0))
    assert all(same(one, other) for one, other in zip(straight[2:], resumed, strict=True))
    assert straight[0].image.shape == (2, 1, *CROP)
    assert straight[0].label.shape == (2, 1, *CROP)


@pytest.mark.slow
def test_worker_processes_make_the_same_crops(tmp_path):
    image, label = organs((12, 50, 60), 3, 0)
    dataset = crops(tmp_path, image[None], label)
    alone, shared = (list(crop_batches(dataset, 2, 1, 5, workers)) for workers in (0, 2))
    assert all(same(one, other) for one, other in zip(alone, shared, strict=True))


def test_labels_move_with_their_voxels(tmp_path):
    """The image of an organ is its number: varied or not, where labels agree with voxels they always do."""
    _, label = organs((16, 80, 80), 3, 0)
    dataset = crops(tmp_path, label[None].astype(np.float32) / 4, label)
    agree, moved = [], 0
    for number in range(24):
        one = dataset[number]
        # Noise, blur and gamma change values; the order of organs by brightness stays but in slivers.
        inside = [one.label == value for value in one.label.unique().tolist()]
        means = [float(one.image[where].mean()) for where in inside if where.sum() > 100]
        agree.append(means == sorted(means))
        moved += not np.isin(one.image.numpy(), np.float32(np.arange(4) / 4).astype(np.float16)).all()
    assert all(agree)
    assert moved, "nothing was varied"


def test_crops_around_classes_show_every_class_and_random_ones_do_not_care(tmp_path):
    label = np.zeros((8, 200, 200), np.uint8)
    label[:, 10:14, 10:14], label[:, 180:184, 20:24], label[:, 100:104, 190:194] = 1, 2, 3
    image = np.zeros((1, *label.shape), np.float32)
    around, anywhere = (
        [int(one.label.sum() > 0) for one in (crops(tmp_path, image, label, CROP, share)[i] for i in range(20))]
        for share in (0.0, 1.0)
    )
    assert sum(around) >= 18, "a turned crop may just lose an organ at its edge"
    assert sum(anywhere) < 8


@pytest.mark.parametrize("shape", [(3, 20, 40), (1, 10, 10), (30, 31, 33)])
def test_images_smaller_than_a_crop_are_filled_with_zeros(tmp_path, shape):
    image, label = organs(shape, 3, 0)
    dataset = crops(tmp_path, image[None], label)
    for number in range(4):
        assert dataset[number].image.shape == (1, *CROP)


def test_pictures_are_varied_in_their_plane(tmp_path):
    image, label = organs((1, 64, 64), 3, 0)
    dataset = crops(tmp_path, image[None], label, crop=(1, 32, 32))
    assert all(dataset[number].image.shape == (1, 1, 32, 32) for number in range(12))
    assert any(dataset[number].label.any() for number in range(12))


# -- prediction and measures --------------------------------------------------------------------------------


class Threshold(torch.nn.Module):
    """Knows the classes by brightness."""

    def forward(self, image_BCDHW: torch.Tensor) -> list[torch.Tensor]:
        nearest = [-((image_BCDHW[:, 0] - value) ** 2) for value in (0.1, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0)]
        return [100 * torch.stack(nearest, dim=1)]


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("shape", [(14, 50, 40), (1, 40, 70)])
def test_predictions_come_back_on_the_grid_of_the_image(tmp_path, flips, shape):
    image, label = organs(shape, 3, 0)
    one = ready(tmp_path, image[None], label, at=(2.0, 1.0, 1.0), spacing=(1.5, 0.7, 0.7))
    predicted = predict(
        Threshold(),
        one,
        crop=(8 if shape[0] > 1 else 1, 32, 32),
        batch_size=3,
        overlap=0.5,
        flips=flips,
        autocast=torch.autocast("cpu", enabled=False),
        device=torch.device("cpu"),
    )
    assert predicted.shape == shape
    assert predicted.dtype == np.uint8
    assert (predicted == label).mean() > 0.95  # what lies between two organs looks like a third at borders


def test_measures_are_those_of_two_boxes_that_one_can_compute():
    """Of boxes one voxel apart along the depth, at 3 mm: the largest distance is 3 mm, Dice 2 * 3 / (4 + 4)."""
    one, other = np.zeros((8, 6, 6), np.uint8), np.zeros((8, 6, 6), np.uint8)
    one[1:5, 1:5, 1:5], other[2:6, 1:5, 1:5] = 1, 1
    (found,) = score("case", one, other, (3.0, 1.0, 1.0), ["box"])
    assert found.dice == pytest.approx(75)
    assert found.hd == pytest.approx(3)
    # The surfaces are 56 voxels each: one face of 16 is 3 mm from the other surface, the rest 0 or 1 mm.
    assert 0.85 <= found.assd <= 1.2
    assert not found.missed
    (equal,) = score("case", one, one, (3.0, 1.0, 1.0), ["box"])
    assert (equal.dice, equal.assd, equal.hd) == (100, 0, 0)
    (flat,) = score("case", one[2:3], other[2:3], (1.0, 1.0, 1.0), ["box"])
    assert (flat.dice, flat.hd) == (100, 0)


def test_organs_that_are_missed_or_invented_are_counted_and_spoil_no_mean():
    label = np.zeros((2, 8, 8), np.uint8)
    label[:, 1:3, 1:3], label[:, 5:7, 5:7] = 1, 2
    predicted = np.where(label == 1, 1, 0).astype(np.uint8)
    predicted[:, 0, 7] = 3
    told = summarise(score("case", predicted, label, (1, 1, 1), ["a", "b", "c"]), ["a", "b", "c"])
    right, missed, invented = (list(told["classes"][organ].values()) for organ in "abc")
    assert list(told["classes"]["a"]) == ["Dice", "ASSD", "HD", "cases", "missed", "invented"]
    assert right == [100, 0, 0, 1, 0, 0]
    assert missed == [0, None, None, 1, 1, 0]
    assert invented == [None, None, None, 0, 0, 1]
    assert told["Dice"] == 50
    assert told["HD"] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_dice_is_symmetric_and_between_0_and_100(seed):
    draw = np.random.default_rng(seed)
    one, other = (draw.integers(0, 2, (2, 3, 4)).astype(np.uint8) for _ in range(2))
    one[0, 0, 0] = other[0, 0, 0] = 1
    (there,), (back,) = (score("case", *pair, (1, 1, 1), ["a"]) for pair in ((one, other), (other, one)))
    assert there.dice == pytest.approx(back.dice)
    assert there.assd == pytest.approx(back.assd)
    assert 0 < there.dice <= 100


# -- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No pictures: they take longer than all the rest of a tiny run."""
    monkeypatch.setattr(segmentation, "contact_sheet", lambda *_: None)


def trained(release: Path, cache: Path, folder: Path, *settings: str, **cell):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    config = tiny("btcv", release, cache, "images.spacing=[3,1.5,1.5]", *settings)
    return segmentation.train(Cell(task="btcv", init="scratch", **cell), config, PatchBackbone(), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(folder / "training") / "model.safetensors")


def test_a_short_training_finds_the_organs(release, cache, tmp_path):
    """On scans that it did not see. Whoever says one organ everywhere has a third of some 20 per cent."""
    result = trained(release, cache, tmp_path / "run", "images.spacing=[3,1,1]", "steps=30")
    assert result.metrics["Dice"] > 50
    assert result.metrics.keys() == {"Dice", "ASSD", "HD"}
    assert result.training_cases == 21
    assert result.data["validation"][0] == "img0029"
    assert result.data["classes"]["liver"]["cases"] == 0, "not drawn in these scans"
    assert "| mean | " in (tmp_path / "run" / "table.md").read_text()
    lines = (tmp_path / "run" / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + 9 * 13
    for number in (29, 40):
        like = nibabel.load(release / f"Abdomen/RawData/Training/label/label{number:04d}.nii.gz")
        written = nibabel.load(tmp_path / "run" / "predictions" / "validation" / f"img{number:04d}.nii.gz")
        np.testing.assert_array_equal(written.affine, like.affine)
        here, there = np.asarray(written.dataobj) == 1, np.asarray(like.dataobj) == 1
        assert 2 * (here & there).sum() / (here.sum() + there.sum()) > 0.3
    assert list((tmp_path / "run" / "training" / "pictures").glob("*.png"))


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(release, cache, tmp_path, monkeypatch):
    straight = trained(release, cache, tmp_path / "straight", fraction=0.2)
    assert straight.training_cases == 4
    finish = segmentation.Run.finish_step

    def stop(self, step, scalars):
        finish(self, step, scalars)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(segmentation.Run, "finish_step", stop)
    with pytest.raises(TrainingInterrupted):
        trained(release, cache, tmp_path / "stopped", fraction=0.2)
    monkeypatch.setattr(segmentation.Run, "finish_step", finish)
    resumed = trained(release, cache, tmp_path / "stopped", fraction=0.2)
    assert resumed.metrics == straight.metrics
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "stopped")[name]), name


@pytest.mark.usefixtures("undrawn")
def test_a_run_refuses_to_go_on_with_other_images_or_settings(release, cache, tmp_path):
    trained(release, cache, tmp_path / "run", fraction=0.2)
    with pytest.raises(SetupError, match="width was 4, is 5"):
        trained(release, cache, tmp_path / "run", "width=5", fraction=0.2)
    other = tmp_path / "other"
    shutil.copytree(release, other)
    file = other / "Abdomen/RawData/Training/img/img0029.nii.gz"
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), file)
    with pytest.raises(SetupError, match="images changed"):
        trained(other, cache, tmp_path / "run", fraction=0.2)


@pytest.mark.usefixtures("undrawn")
def test_the_best_weights_are_measured_where_they_are_asked_for(release, cache, tmp_path):
    result = trained(
        *(release, cache, tmp_path / "run", "weights=best", "steps=6", "intervals.validate_every_steps=2"),
        fraction=0.2,
    )
    assert (tmp_path / "run" / "training" / "best.safetensors").is_file()
    assert "Dice" in result.metrics


@pytest.mark.usefixtures("undrawn")
def test_chaos_ends_with_a_submission(cache, tmp_path):
    release = write_chaos(tmp_path / "chaos")
    config = tiny("chaos", release, cache, "images.spacing=[9,1.6,1.6]", "images.held_out=0", "steps=2")
    (tmp_path / "run").mkdir()
    result = segmentation.train(Cell(task="chaos", init="scratch"), config, PyramidBackbone(), tmp_path / "run")
    assert result.metrics == {}, "all were trained on, nothing is left to measure"
    assert result.training_cases == 6
    test = tmp_path / "run" / "predictions" / "test"
    pictures = sorted(file.relative_to(test).as_posix() for file in test.rglob("*.png"))
    assert len(pictures) == 2 * 2 * 8
    assert pictures[0] == "Task3/MR/1/T1DUAL/Results/IMG-0001-00001.png"
    with Image.open(test / pictures[-1]) as picture:
        assert picture.size == (44, 40)
        assert set(np.unique(np.asarray(picture))) <= {0, 63, 126, 189, 252}


@pytest.mark.usefixtures("undrawn")
def test_own_pictures_in_colour_are_a_task_too(cache, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "raw" / kind).mkdir(parents=True)
    (tmp_path / "raw" / "classes.txt").write_text("a\nb\n")
    for number in range(4):
        image, label = organs((1, 48, 40), 2, number)
        colour = np.stack([255 * image[0].clip(0, 1)] * 3, axis=-1).astype(np.uint8)
        Image.fromarray(colour).save(tmp_path / "raw" / "images" / f"{number}.png")
        Image.fromarray(label[0]).save(tmp_path / "raw" / "labels" / f"{number}.png")
    cell = Cell(task="folder:toys", init="scratch")
    config = tiny("folder", tmp_path / "raw", cache)
    with pytest.raises(SetupError, match=r"holds pictures, and a crop has 8 slices: --set images.crop=\[1,"):
        segmentation.train(cell, config, PatchBackbone(patch=(1, 8, 8)), tmp_path / "run")
    config = tiny("folder", tmp_path / "raw", cache, "images.crop=[1,32,32]", "images.window=[0,255]")
    (tmp_path / "run").mkdir()
    result = segmentation.train(cell, config, PatchBackbone(patch=(1, 8, 8)), tmp_path / "run")
    assert result.data["classes"].keys() == {"a", "b"}
    assert len(list((tmp_path / "run" / "predictions" / "validation").glob("*.png"))) == 1


def test_a_cell_is_checked_before_anything_is_read(release, tmp_path):
    config = tiny("btcv", release, tmp_path)
    segmentation.check(Cell(task="btcv", init="scratch", mode="full"), config)
    with pytest.raises(SetupError, match="mode"):
        segmentation.check(Cell(task="btcv", init="scratch", mode="nonsense"), config)
    with pytest.raises(SetupError, match="--data FOLDER"):
        segmentation.check(Cell(task="btcv", init="scratch"), preset_of(SegmentationConfig, "btcv", "paper"))


def test_the_table_has_the_figures_of_the_paper_for_the_same_share():
    summary = summarise(score("case", *[np.ones((2, 3, 3), np.uint8)] * 2, (1, 1, 1), ["liver"]), ["liver"])
    whole = page(Cell(task="btcv", init="runs/mim"), summary)
    assert "| liver | 100.00 | 0.00 | 0.00 | 1 | 0 | 0 |" in whole
    assert "| PUMIT (paper) | 87.31 | 0.74 | 13.12 |" in whole
    assert whole.count("(paper)") == 5
    fifth = page(Cell(task="btcv", init="runs/mim", fraction=0.2), summary)
    assert "| scratch (paper) | 70.98 | 4.96 | 51.13 |" in fifth
    assert fifth.count("(paper)") == 2
    assert published(Cell(task="chaos", init="x"))["PUMIT"] == [92.09, 1.54, 19.85]
    assert "(paper)" not in page(Cell(task="btcv", init="x", fraction=0.3), summary)
    assert "(paper)" not in page(Cell(task="folder:mine", init="x"), summary)


def test_presets_hold_the_numbers_of_the_paper():
    btcv, chaos = (preset_of(SegmentationConfig, task, "paper") for task in ("btcv", "chaos"))
    assert (btcv.images.spacing, btcv.images.crop, btcv.batch_size) == ((3, 0.75, 0.75), (48, 192, 192), 4)
    assert (btcv.images.window, btcv.images.random_share) == ((-175, 250), 0.25)
    assert (chaos.images.spacing, chaos.images.crop) == ((9, 1.62109, 1.62109), (32, 192, 192))
    assert (chaos.images.window, chaos.batch_size) == (None, 8)
    for config in (btcv, chaos):
        optim = config.optim
        assert (config.steps, optim.warmup_steps, optim.peak_lr, optim.min_lr) == (50_000, 5_000, 1e-4, 1e-6)
        assert (optim.weight_decay, optim.max_grad_norm) == (0.05, 1)
        assert config.inference.model_dump() == {"overlap": 0.75, "flips": True}
        assert config.weights == "last"
    for task in ("btcv", "chaos", "folder"):
        preset_of(SegmentationConfig, task, "tiny")


KILLED = """
import sys, torch
from pathlib import Path
from tests.training.downstream.toy import PatchBackbone, tiny
from training.downstream import segmentation
from training.downstream.segmentation_table import page, published
from training.downstream.task import Cell
release, cache, folder = map(Path, sys.argv[1:])
folder.mkdir(exist_ok=True)
torch.manual_seed(0)
config = tiny("btcv", release, cache, "images.spacing=[3,1.5,1.5]", "steps=12", "keep_checkpoints=12")
segmentation.train(Cell(task="btcv", init="scratch", fraction=0.2), config, PatchBackbone(), folder)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_newest_checkpoint(release, cache, tmp_path):
    def start(folder: Path) -> subprocess.Popen:
        call = [sys.executable, "-c", KILLED, str(release), str(cache), str(folder)]
        root = Path(__file__).resolve().parents[3]
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.Popen(call, cwd=root, env=environment, stderr=subprocess.PIPE)

    straight = start(tmp_path / "straight")
    _, said = straight.communicate(timeout=200)
    assert straight.returncode == 0, said
    killed = start(tmp_path / "killed")
    while newest_checkpoint(tmp_path / "killed" / "training") is None:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "killed" / "scores.csv").exists()
    resumed = start(tmp_path / "killed")
    _, said = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said
    assert b"resumed after step" in said
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name
    assert json.loads((tmp_path / "killed/training/run.json").read_text())["config"]["fraction"] == 0.2
