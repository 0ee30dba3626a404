"""Reading boxes: the right voxels, or an error that says what to do."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import SetupError
from shards.layout import METADATA_FILE, SHARD_FILE
from shards.read import Box, ShardReader
from shards.write import write_pack, write_volume

SHAPE = (1, 40, 100, 90)
VOLUME, PACK = "demo/volume.zarr", "demo/pack.zarr"
WHOLE: Box = ((0, 40), (0, 100), (0, 90))


def volume() -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def images() -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 255, (3, 1, h, w), np.uint8) for h, w in ((60, 50), (64, 48), (32, 70))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_volume(folder, VOLUME, volume())
    write_pack(folder, PACK, images())
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """Shards of their own for a test that damages them."""
    return Path(shutil.copytree(root, tmp_path / "shards"))


def spans(*sizes: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """A non-empty (start, stop) within each size."""
    return st.tuples(
        *(
            st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted).filter(lambda s: s[0] < s[1]).map(tuple)
            for n in sizes
        )
    )


@settings(max_examples=60, deadline=None)
@given(box=spans(40, 100, 90))
def test_a_box_is_the_slice(root: Path, box: Any) -> None:
    (z0, z1), (y0, y1), (x0, x1) = box
    voxels = ShardReader(root).read(VOLUME, SHAPE, "int16", None, box)
    np.testing.assert_array_equal(voxels, volume()[:, z0:z1, y0:y1, x0:x1])
    assert voxels.flags.c_contiguous
    assert voxels.flags.writeable


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 2), box=spans(1, 32, 48))
def test_an_image_of_a_pack_has_one_slice(root: Path, index: int, box: Any) -> None:
    _, (y0, y1), (x0, x1) = box
    voxels = ShardReader(root).read(PACK, (3, 3, 64, 70), "uint8", index, box)
    np.testing.assert_array_equal(voxels, images()[index][:, :, y0:y1, x0:x1])
    assert voxels.flags.c_contiguous


@pytest.mark.parametrize(
    ("index", "box"),
    [
        (None, ((0, 41), (0, 1), (0, 1))),
        (None, ((-1, 1), (0, 1), (0, 1))),
        (None, ((3, 3), (0, 1), (0, 1))),
        (None, ((0, 1), (5, 2), (0, 1))),
        (1, ((0, 1), (0, 1), (0, 1))),
        (-1, ((0, 1), (0, 1), (0, 1))),
    ],
)
def test_a_box_outside_is_a_mistake_of_the_caller(root: Path, index: int | None, box: Box) -> None:
    with pytest.raises(ValueError, match=r"volume\.zarr.*not inside"):
        ShardReader(root).read(VOLUME, SHAPE, "int16", index, box)


def complaint(folder: Path, **changes: Any) -> str:
    arguments = {"path": VOLUME, "shape": SHAPE, "dtype": "int16", "index": None, "box": WHOLE} | changes
    with pytest.raises(SetupError) as caught:
        ShardReader(folder).read(**arguments)
    message = str(caught.value)
    assert str(folder / arguments["path"]) in message
    assert "pumit-data ingest demo" in message
    return message


@pytest.mark.parametrize("byte", [0, 50_000, -1, -100])
def test_one_flipped_bit_is_noticed(copy: Path, byte: int) -> None:
    shard = copy / VOLUME / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[byte] ^= 1
    shard.write_bytes(content)
    complaint(copy)


def test_a_shard_cut_short_is_noticed(copy: Path) -> None:
    os.truncate(copy / VOLUME / SHARD_FILE, 40_000)
    complaint(copy)


def test_a_missing_array_is_no_background(copy: Path) -> None:
    shutil.rmtree(copy / VOLUME)
    assert "does not exist" in complaint(copy)


def test_a_missing_shard_is_no_background_even_on_an_open_handle(copy: Path) -> None:
    reader = ShardReader(copy)
    reader.read(VOLUME, SHAPE, "int16", None, WHOLE)
    (copy / VOLUME / SHARD_FILE).unlink()
    with pytest.raises(SetupError, match="is missing"):
        reader.read(VOLUME, SHAPE, "int16", None, WHOLE)


def test_metadata_that_is_no_json_is_noticed(copy: Path) -> None:
    (copy / VOLUME / METADATA_FILE).write_text("{")
    complaint(copy)


@pytest.mark.parametrize("understood", [True, False])
def test_an_array_of_a_later_layout_is_refused_and_not_called_damaged(copy: Path, understood: bool) -> None:
    path = copy / VOLUME / METADATA_FILE
    metadata = json.loads(path.read_text())
    metadata["attributes"] = {"pumit_layout_version": 3}
    if not understood:
        metadata["codecs"] = [{"name": "of another time"}]
    path.write_text(json.dumps(metadata))
    with pytest.raises(SetupError, match=r"version 3 of the shard layout.*Install the version"):
        ShardReader(copy).read(VOLUME, SHAPE, "int16", None, WHOLE)


def test_an_array_of_the_first_layout_is_read(copy: Path) -> None:
    path = copy / VOLUME / METADATA_FILE
    metadata = json.loads(path.read_text())
    del metadata["attributes"]
    path.write_text(json.dumps(metadata))
    voxels = ShardReader(copy).read(VOLUME, SHAPE, "int16", None, WHOLE)
    np.testing.assert_array_equal(voxels, volume())


def test_an_array_unlike_its_catalog_row_is_refused(root: Path) -> None:
    assert "uint16" in complaint(root, dtype="uint16")
    shape = (1, 40, 100, 91)
    assert "91" in complaint(root, shape=shape)


def test_a_file_that_may_not_be_read_is_not_called_damaged(copy: Path) -> None:
    shard = copy / VOLUME / SHARD_FILE
    shard.unlink()
    shard.symlink_to(shard)  # a refusal that the administrator's account meets, too
    with pytest.raises(OSError, match="symbolic links") as caught:
        ShardReader(copy).read(VOLUME, SHAPE, "int16", None, WHOLE)
    assert str(copy / VOLUME) in str(caught.value)


def test_only_so_many_handles_stay_open(root: Path) -> None:
    reader = ShardReader(root, open_limit=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        reader.read(VOLUME, SHAPE, "int16", None, WHOLE)
        reader.read(PACK, (3, 3, 64, 70), "uint8", 0, ((0, 1), (0, 8), (0, 8)))
    assert reader._open.cache_info().currsize == 1
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def _read_one(reader: ShardReader) -> npt.NDArray[Any]:
    return reader.read(VOLUME, SHAPE, "int16", None, ((3, 9), (10, 70), (0, 90)))


def _read_and_report(reader: ShardReader, answers: Any) -> None:
    try:
        answers.put(int(_read_one(reader).sum()))
    except RuntimeError as error:
        answers.put(str(error))


def test_a_forked_worker_is_refused_before_it_aborts(root: Path) -> None:
    reader = ShardReader(root)
    _read_one(reader)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    worker = context.Process(target=_read_and_report, args=(reader, answers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of what this test is about
        worker.start()
    assert "spawn" in str(answers.get(timeout=60))
    worker.join(60)
    assert worker.exitcode == 0


def test_a_spawned_worker_reads_with_the_reader_it_is_sent(root: Path) -> None:
    reader = ShardReader(root)
    expected = _read_one(reader)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        box = ((3, 9), (10, 70), (0, 90))
        there = pool.submit(reader.read, VOLUME, SHAPE, "int16", None, box).result(timeout=60)
    np.testing.assert_array_equal(there, expected)


def test_a_used_reader_pickles_without_its_handles(root: Path) -> None:
    reader = ShardReader(root, open_limit=7)
    expected = _read_one(reader)
    copied = pickle.loads(pickle.dumps(reader))
    assert copied._open.cache_info().currsize == 0
    np.testing.assert_array_equal(_read_one(copied), expected)
