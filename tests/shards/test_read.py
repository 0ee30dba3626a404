"""Reading boxes: the right voxels, or an error that says what to do."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.read
from catalog.errors import SetupError
from shards.layout import METADATA_FILE, SHARD_FILE, Profile, chunk_bytes, chunk_grid, volume_chunk
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
    message = complaint(copy)
    assert "does not exist" in message
    assert "--resume" in message


def test_a_missing_shard_is_no_background_even_on_an_open_handle(copy: Path) -> None:
    reader = ShardReader(copy)
    reader.read(VOLUME, SHAPE, "int16", None, WHOLE)
    (copy / VOLUME / SHARD_FILE).unlink()
    with pytest.raises(SetupError, match="is missing"):
        reader.read(VOLUME, SHAPE, "int16", None, WHOLE)


@pytest.mark.parametrize("content", ["{", "{}", None])
def test_only_index_and_chunks_are_read_for_the_catalog_tells_the_rest(copy: Path, content: str | None) -> None:
    """That `zarr.json` is damaged or missing is for `verify` to say."""
    path = copy / VOLUME / METADATA_FILE
    path.write_text(content) if content is not None else path.unlink()
    voxels = ShardReader(copy).read(VOLUME, SHAPE, "int16", None, WHOLE)
    np.testing.assert_array_equal(voxels, volume())


@pytest.mark.parametrize("understood", [True, False])
def test_an_array_of_a_later_layout_is_refused_and_not_called_damaged(copy: Path, understood: bool) -> None:
    path = copy / VOLUME / METADATA_FILE
    metadata = json.loads(path.read_text())
    metadata["attributes"] = {"pumit_layout_version": 3}
    if not understood:
        metadata["codecs"] = [{"name": "of another time"}]
    path.write_text(json.dumps(metadata))
    shard = copy / VOLUME / SHARD_FILE
    shard.write_bytes(shard.read_bytes()[::-1])
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
    assert "int32" in complaint(root, dtype="int32")
    assert "200" in complaint(root, shape=(1, 40, 100, 200))


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
    assert reader._open.cache_info().currsize == 1  # type: ignore[attr-defined]
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


def test_a_used_reader_pickles_without_its_handles(root: Path) -> None:
    reader = ShardReader(root, open_limit=7)
    expected = _read_one(reader)
    copied = pickle.loads(pickle.dumps(reader))
    assert copied._open.cache_info().currsize == 0  # type: ignore[attr-defined]
    np.testing.assert_array_equal(_read_one(copied), expected)


FEW: Box = ((3, 9), (10, 70), (0, 90))
"""Touches four of the volume's twelve chunks."""


@pytest.mark.parametrize("box", [FEW, ((0, 1), (0, 1), (0, 1)), WHOLE])
def test_only_the_chunks_that_a_box_touches_are_read(root: Path, box: Box) -> None:
    reader = ShardReader(root)
    reader.read(VOLUME, SHAPE, "int16", None, WHOLE)  # imports
    grid = chunk_grid(SHAPE, volume_chunk(SHAPE))
    sizes = chunk_bytes(root / VOLUME / SHARD_FILE, grid)
    steps = volume_chunk(SHAPE)[1:]
    touched = tuple(slice(a // step, -(-b // step)) for (a, b), step in zip(box, steps, strict=True))
    index = 16 * sizes.size + 4
    before = bytes_read()
    reader.read(VOLUME, SHAPE, "int16", None, box)
    # The count itself is read from a file.
    assert bytes_read() - before <= int(sizes[:, *touched].sum()) + index + 300


def bytes_read() -> int:
    """That this process has asked of the operating system."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_threads_share_a_reader_and_get_their_own_boxes(root: Path) -> None:
    reader = ShardReader(root, open_limit=1)

    def right(number: int) -> bool:
        z = number % 30
        if number % 3 == 0:
            image = reader.read(PACK, (3, 3, 64, 70), "uint8", number % 2, ((0, 1), (0, 48), (0, 48)))
            return bool((image == images()[number % 2][:, :, :48, :48]).all())
        box = ((z, z + 9), (10, 70), (0, 90))
        return bool((reader.read(VOLUME, SHAPE, "int16", None, box) == volume()[:, z : z + 9, 10:70]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(60)))


def test_python_runs_on_while_another_thread_reads(tmp_path: Path) -> None:
    """A reading that held the interpreter for its whole length would leave no gap shorter than itself."""
    shape = (1, 256, 256, 256)
    noise = np.random.default_rng(3).integers(0, 4000, shape).astype(np.int16)
    write_volume(tmp_path, VOLUME, noise)
    reader = ShardReader(tmp_path)
    whole: Box = ((0, 256), (0, 256), (0, 256))
    reader.read(VOLUME, shape, "int16", None, ((0, 1), (0, 1), (0, 1)))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, VOLUME, shape, "int16", None, whole)
        turns = 0
        while not reading.done():
            time.sleep(0.0005)
            turns += 1
    assert turns > 5


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pathlib import Path
from shards.read import ShardReader
from tests_of_reading import FEW, SHAPE

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

reader = ShardReader(Path(sys.argv[1]))
for turn in range(2):
    for number in range(500):
        reader.read(f"demo/{number}.zarr", SHAPE, "int16", None, FEW)
        if turn == 0 and number == 150:
            before = resident()
print(resident() - before)
"""


def test_five_hundred_arrays_are_read_with_few_files_and_little_memory(root: Path, tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / f"demo/{number}.zarr").parent.mkdir(exist_ok=True)
        (tmp_path / f"demo/{number}.zarr").symlink_to(root / VOLUME)
    code = FEW_FILES.replace("from tests_of_reading import FEW, SHAPE", f"FEW, SHAPE = {FEW}, {SHAPE}")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30, "megabytes beyond what the first 150 arrays took"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_started_either_way_read_alike(root: Path, method: str) -> None:
    reader = ShardReader(root)
    expected = _read_one(reader)
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for there in pool.map(_read_one, [reader] * 4, timeout=60):
            np.testing.assert_array_equal(there, expected)


@pytest.mark.parametrize("profile", ["fast", "train", "small"])
def test_the_profile_need_not_be_known(tmp_path: Path, profile: Profile) -> None:
    write_volume(tmp_path, VOLUME, volume(), profile)
    write_pack(tmp_path, PACK, images(), profile)
    np.testing.assert_array_equal(_read_one(ShardReader(tmp_path)), volume()[:, 3:9, 10:70])
    image = ShardReader(tmp_path).read(PACK, (3, 3, 64, 70), "uint8", 1, ((0, 1), (0, 64), (0, 48)))
    np.testing.assert_array_equal(image, images()[1])


# Where TensorStore cannot be imported


@pytest.fixture
def without_tensorstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    shards.read._has_tensorstore.cache_clear()
    yield
    shards.read._has_tensorstore.cache_clear()


@pytest.mark.usefixtures("without_tensorstore")
def test_zarr_python_reads_the_same_voxels(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = ShardReader(root)
    np.testing.assert_array_equal(_read_one(reader), volume()[:, 3:9, 10:70])
    image = reader.read(PACK, (3, 3, 64, 70), "uint8", 2, ((0, 1), (3, 30), (5, 70)))
    np.testing.assert_array_equal(image, images()[2][:, :, 3:30, 5:70])
    assert caplog.text.count("zarr-python reads shards") == 1
    assert image.flags.c_contiguous
    assert image.flags.writeable


@pytest.mark.usefixtures("without_tensorstore")
@pytest.mark.parametrize("damage", ["bit", "index", "cut", "shard", "array", "metadata"])
def test_zarr_python_notices_what_tensorstore_does(copy: Path, damage: str) -> None:
    shard = copy / VOLUME / SHARD_FILE
    content = bytearray(shard.read_bytes())
    if damage in ("bit", "index"):
        content[50_000 if damage == "bit" else -1] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        os.truncate(shard, 40_000)
    elif damage == "shard":
        shard.unlink()
    elif damage == "array":
        shutil.rmtree(copy / VOLUME)
    else:
        (copy / VOLUME / METADATA_FILE).write_text("{")
    complaint(copy)
