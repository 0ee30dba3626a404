"""Labelled data as publishers and users lay them out: what is found, how it lies, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from catalog.errors import SetupError
from tests.training.downstream.toy import organs, stored_slices, write_btcv, write_chaos
from training.downstream.btcv import CLASSES, open_btcv
from training.downstream.cases import Case, hold_out, share_of
from training.downstream.chaos import GREY_VALUES, open_chaos
from training.downstream.folder import open_folder
from training.downstream.nifti import read_nifti, write_nifti


@pytest.fixture(scope="module")
def btcv(tmp_path_factory) -> Path:
    return write_btcv(tmp_path_factory.mktemp("btcv"))


@pytest.fixture(scope="module")
def chaos(tmp_path_factory) -> Path:
    return write_chaos(tmp_path_factory.mktemp("chaos"))


@pytest.fixture
def own_btcv(btcv, tmp_path) -> Path:
    """A release that a test may damage: the two scans 1 and 29."""
    for kind in ("img", "label"):
        target = tmp_path / "RawData" / "Training" / kind
        target.mkdir(parents=True)
        for number in (1, 29):
            shutil.copy(btcv / "Abdomen/RawData/Training" / kind / f"{kind}{number:04d}.nii.gz", target)
    return tmp_path


def cases(subjects: list[int], each: int = 1) -> list[Case]:
    return [
        Case(f"{subject}-{number}", str(subject), Path("image"), Path("label"))
        for subject in subjects
        for number in range(each)
    ]


# -- shares and splits --------------------------------------------------------------------------------------


def test_btcv_has_the_split_of_smit(btcv):
    data = open_btcv(btcv)
    training = [*range(1, 11), *range(21, 29), 33, 35, 38]
    validation = [29, 30, 31, 32, 34, 36, 37, 39, 40]
    assert [case.name for case in data.training] == [f"img{number:04d}" for number in training]
    assert [case.name for case in data.validation] == [f"img{number:04d}" for number in validation]
    assert len(data.training) == 21
    assert len(data.classes) == 13
    assert data.test == ()


@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 99),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=2),
)
def test_shares_are_nested_and_keep_subjects_together(subjects, each, seed, shares):
    every = cases(list(range(subjects)), each)
    small, large = (share_of(every, share, seed) for share in sorted(shares))
    assert set(small) <= set(large)
    assert share_of(every, 1.0, seed) == tuple(every)
    for chosen, share in ((small, min(shares)), (large, max(shares))):
        assert len(chosen) == each * max(int(share * subjects + 1e-9), 1)


def test_the_shares_of_the_paper_are_4_8_12_16_and_21_scans_and_depend_on_the_seed():
    every = cases(list(range(21)))
    assert [len(share_of(every, share, 0)) for share in (0.2, 0.4, 0.6, 0.8, 1.0)] == [4, 8, 12, 16, 21]
    assert share_of(every, 0.4, 0) != share_of(every, 0.4, 1)
    with pytest.raises(SetupError, match="above 0 and at most 1"):
        share_of(every, 0, 0)


def test_who_is_held_out_depends_on_neither_order_nor_seed():
    training, validation = hold_out(cases(list(range(20)), 2), 0.2)
    assert len({case.subject for case in validation}) == 4
    assert not {case.subject for case in validation} & {case.subject for case in training}
    assert set(hold_out(cases(list(range(20)), 2)[::-1], 0.2)[1]) == set(validation)
    assert hold_out(cases([1, 2]), 0) == (tuple(cases([1, 2])), ())
    with pytest.raises(SetupError, match="only one subject"):
        hold_out(cases([1]), 0.5)


# -- BTCV ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["Abdomen/RawData", "RawData", ".", "BCV/Abdomen/RawData"])
def test_btcv_is_found_where_people_unpack_it(btcv, tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "Training").symlink_to(btcv / "Abdomen/RawData/Training")
    assert open_btcv(tmp_path).training[0].image.is_file()


def test_a_scan_has_the_axes_of_the_corpus(btcv):
    """The files run right to left, posterior to anterior: columns are flipped to end on the left, rows too."""
    data = open_btcv(btcv)
    scan = data.read(data.training[0])
    stored = nibabel.load(data.training[0].image)
    assert nibabel.aff2axcodes(stored.affine) == ("L", "A", "S")
    assert scan.spacing == pytest.approx((3.0, 0.8, 0.8))
    expected = np.asarray(stored.dataobj).T[:, ::-1]
    np.testing.assert_array_equal(scan.image[0], expected)
    drawn = np.asarray(nibabel.load(data.training[0].label).dataobj).T[:, ::-1]
    np.testing.assert_array_equal(scan.label, drawn)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAR", "ILA"])
def test_labels_are_written_on_the_grid_of_their_image_whatever_its_axes(tmp_path, codes):
    values = np.random.default_rng(0).integers(0, 4, (7, 8, 9)).astype(np.uint8)
    turn = nibabel.orientations.axcodes2ornt(codes)
    like = nibabel.Nifti1Image(values, nibabel.orientations.inv_ornt_aff(turn, values.shape))
    nibabel.save(like, tmp_path / "a.nii.gz")
    read = read_nifti(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", 3)
    write_nifti(tmp_path / "a.nii.gz", read.label, tmp_path / "b.nii.gz")
    back = nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), values)
    np.testing.assert_array_equal(back.affine, like.affine)
    assert back.get_data_dtype() == np.uint8


def test_a_missing_label_is_named_with_what_to_do(own_btcv):
    label = own_btcv / "RawData/Training/label/label0001.nii.gz"
    label.unlink()
    data = open_btcv(own_btcv)
    with pytest.raises(SetupError, match=r"label0001\.nii\.gz is missing: take it from"):
        data.read(data.training[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shape", "48 x 44 x 10.*of one scan"),
        ("shift", r"lies 5 mm away.*affine"),
        ("flip", "mm away"),
        ("value", r"labels 14, .*13 classes"),
        ("half", r"labels 0\.5"),
        ("cut", "cannot be read"),
        ("four", "three axes"),
    ],
)
def test_labels_that_do_not_fit_their_image_are_refused(own_btcv, change, said):
    label = own_btcv / "RawData/Training/label/label0001.nii.gz"
    like = nibabel.load(label)
    values, affine = np.asarray(like.dataobj).copy(), like.affine.copy()
    if change == "cut":
        label.write_bytes(label.read_bytes()[:-200])
    else:
        if change == "shape":
            values = values[:-1]
        elif change == "shift":
            affine[2, 3] += 5
        elif change == "flip":
            affine[0] *= -1
        elif change == "value":
            values[0, 0, 0] = 14
        elif change == "half":
            values = values.astype(np.float32)
            values[0, 0, 0] = 0.5
        elif change == "four":
            values = np.stack([values, values], axis=-1)
        nibabel.save(nibabel.Nifti1Image(values, affine), label)
    data = open_btcv(own_btcv)
    with pytest.raises(SetupError, match=f"(?s)label0001.*{said}|{said}.*label0001"):
        data.read(data.training[0])


def test_a_folder_without_the_release_says_what_was_looked_for(tmp_path):
    with pytest.raises(SetupError, match="Abdomen/RawData/Training"):
        open_btcv(tmp_path)
    with pytest.raises(SetupError, match="Train_Sets/MR"):
        open_chaos(tmp_path, 0.2)


# -- CHAOS --------------------------------------------------------------------------------------------------


def test_chaos_has_two_sequences_of_each_subject_and_keeps_them_together(chaos):
    data = open_chaos(chaos, 0.3)
    names = sorted(case.name for case in (*data.training, *data.validation))
    assert names == [f"{subject}-{sequence}" for subject in (1, 2, 3) for sequence in ("T1DUAL", "T2SPIR")]
    assert len({case.subject for case in data.validation}) == 1
    assert [case.name for case in data.test] == ["1-T1DUAL", "1-T2SPIR"]
    assert all(case.label is None for case in data.test)


@pytest.mark.parametrize("subject", [1, 2])
def test_slices_go_up_and_labels_with_them_whichever_way_files_are_numbered(chaos, subject):
    """The files of odd subjects begin at the head; labels belong to images by the order of names."""
    data = open_chaos(chaos, 0.0)
    case = next(case for case in data.training if case.name == f"{subject}-T1DUAL")
    scan = data.read(case)
    _, drawn = organs((8, 40, 44), 4, subject)
    upwards = slice(None, None, -1 if subject == 1 else 1)
    np.testing.assert_array_equal(scan.label, drawn[upwards])
    for channel, phase in enumerate(("InPhase", "OutPhase")):
        stored = stored_slices(case.image / phase)[upwards]
        np.testing.assert_array_equal(scan.image[channel], stored)
    assert scan.spacing == pytest.approx((9, 1.6, 1.6))


def test_t2_is_seen_twice(chaos):
    data = open_chaos(chaos, 0.0)
    scan = data.read(next(case for case in data.training if case.name == "2-T2SPIR"))
    assert scan.image.shape == (2, 8, 40, 44)
    np.testing.assert_array_equal(scan.image[0], scan.image[1])


@pytest.mark.parametrize("subject", [1, 2])
@pytest.mark.parametrize("sequence", ["T1DUAL", "T2SPIR"])
def test_a_submission_of_the_drawn_labels_is_the_drawn_pictures(chaos, tmp_path, subject, sequence):
    """Task 5 gets the grey values of the release, under the names of the DICOM files; task 3 the liver."""
    data = open_chaos(chaos, 0.0)
    case = next(case for case in data.training if case.name == f"{subject}-{sequence}")
    data.write(case, data.read(case).label, tmp_path)
    ground = sorted(case.label.glob("*.png"))
    for task, values in (("Task5", GREY_VALUES), ("Task3", (63, 0, 0, 0))):
        results = tmp_path / task / "MR" / str(subject) / sequence / "Results"
        written = sorted(results.glob("*.png"))
        phase = "InPhase" if sequence == "T1DUAL" else ""
        dicoms = sorted((case.image / phase).glob("*.dcm"))
        assert [file.stem for file in written] == [file.stem for file in dicoms]
        for mine, theirs in zip(written, ground, strict=True):
            expected = np.asarray(Image.open(theirs)).copy()
            for value, wanted in zip(GREY_VALUES, values, strict=True):
                expected[expected == value] = wanted
            with Image.open(mine) as picture:
                assert picture.mode == "L"
                np.testing.assert_array_equal(np.asarray(picture), expected)


def test_grey_values_are_taken_by_the_ranges_of_the_challenge(chaos, tmp_path):
    own = tmp_path / "Train_Sets" / "MR"
    shutil.copytree(chaos / "Train_Sets/MR/2", own / "2")
    picture = own / "2/T2SPIR/Ground/IMG-0001-00004.png"
    data = open_chaos(tmp_path, 0.0)
    before = data.read(data.training[1]).label
    grey = np.asarray(Image.open(picture)).copy()
    Image.fromarray(np.where(grey > 0, grey + 3, 0).astype(np.uint8)).save(picture)
    np.testing.assert_array_equal(data.read(data.training[1]).label, before)
    grey[0, 0] = 90
    Image.fromarray(grey).save(picture)
    with pytest.raises(SetupError, match=r"00004\.png has the grey values \[90\]"):
        data.read(data.training[1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("slice", r"lie 9 to 18 mm apart"),
        ("ground", r"7 pictures of labels for 8 slices"),
        ("size", r"IMG-0001-00001\.png has 20 x 20 pixels"),
        ("phase", "do not show the same slices"),
        ("empty", r"holds 0 DICOM files"),
        ("position", r"IMG-0001-00003\.dcm cannot be read as a slice with a position"),
    ],
)
def test_a_damaged_series_is_named(chaos, tmp_path, damage, said):
    place = tmp_path / "Train_Sets" / "MR" / "2"
    shutil.copytree(chaos / "Train_Sets/MR/2", place)
    sequence = place / "T1DUAL"
    phases = [sequence / "DICOM_anon" / phase for phase in ("InPhase", "OutPhase")]
    if damage == "slice":
        for folder in (*phases, sequence / "Ground"):
            next(folder.glob("*-00004.*")).unlink()
    elif damage == "ground":
        next((sequence / "Ground").glob("*-00004.png")).unlink()
    elif damage == "size":
        Image.new("L", (20, 20)).save(sequence / "Ground" / "IMG-0001-00001.png")
    elif damage == "phase":
        next(phases[1].glob("*-00008.dcm")).unlink()
    elif damage == "empty":
        shutil.rmtree(phases[0])
        phases[0].mkdir()
    elif damage == "position":
        file = phases[0] / "IMG-0001-00003.dcm"
        read = pydicom.dcmread(file)
        del read.ImagePositionPatient
        read.save_as(file)
    data = open_chaos(tmp_path, 0.0)
    with pytest.raises(SetupError, match=said):
        data.read(data.training[0])


# -- your own folder ----------------------------------------------------------------------------------------


def write_pictures(raw: Path, mode: str = "L") -> Path:
    for kind in ("images", "labels"):
        (raw / kind).mkdir(parents=True)
    (raw / "classes.txt").write_text("disc\n\nring\n")
    for number in range(4):
        image, label = organs((1, 40, 48), 2, number)
        picture = Image.fromarray((255 * image[0].clip(0, 1)).astype(np.uint8)).convert(mode)
        picture.save(raw / "images" / f"p{number // 2}__{number}.png")
        if number < 3:
            Image.fromarray(label[0]).save(raw / "labels" / f"p{number // 2}__{number}.png")
    return raw


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pictures_are_volumes_of_one_slice_and_come_back_as_pictures(tmp_path, mode, channels):
    data = open_folder(write_pictures(tmp_path / "raw", mode), 0.5)
    assert data.classes == ("disc", "ring")
    assert data.channels == channels
    assert [case.name for case in data.test] == ["p1__3"]
    assert {case.subject for case in data.training} | {case.subject for case in data.validation} == {"p0", "p1"}
    case = next(case for case in (*data.training, *data.validation) if case.name == "p0__1")
    scan = data.read(case)
    assert scan.image.shape == (channels, 1, 40, 48)
    data.write(case, scan.label, tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p0__1.png")), scan.label[0])


def test_a_folder_with_a_wrong_layout_is_told_what_to_change(tmp_path):
    raw = write_pictures(tmp_path / "raw")
    (raw / "labels" / "p0__0.png").rename(raw / "labels" / "other.png")
    with pytest.raises(SetupError, match=r"labels/other\.png has no image"):
        open_folder(raw, 0.5)
    (raw / "labels" / "other.png").rename(raw / "labels" / "p0__0.png")
    (raw / "images" / "x.nii.gz").touch()
    with pytest.raises(SetupError, match="mixes pictures and volumes"):
        open_folder(raw, 0.5)
    (raw / "images" / "x.nii.gz").unlink()
    (raw / "classes.txt").write_text("disc\n")
    data = open_folder(raw, 0)
    with pytest.raises(SetupError, match=r"p0__0\.png holds the labels 2, but the task has 1 classes"):
        data.read(data.training[0])
    (raw / "classes.txt").unlink()
    with pytest.raises(SetupError, match=r"classes\.txt is missing"):
        open_folder(raw, 0.5)
    with pytest.raises(SetupError, match="images"):
        open_folder(tmp_path, 0.5)


def test_class_names_of_btcv_follow_its_numbers():
    assert (CLASSES[0], CLASSES[5], CLASSES[12]) == ("spleen", "liver", "left adrenal gland")
