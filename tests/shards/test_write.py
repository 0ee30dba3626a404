"""Arrays are written whole or not at all, in bytes that depend on the voxels alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.layout import METADATA_FILE, SHARD_FILE, TEMPORARY_PREFIX, Profile
from shards.write import remove_leftovers, write_pack, write_volume

REPOSITORY = Path(__file__).parents[2]
DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "float32")
NAME = "demo/head-0123456789ab.zarr"


def head(shape: tuple[int, ...] = (1, 40, 100, 90), dtype: str = "int16", seed: int = 0) -> npt.NDArray[Any]:
    """Smooth voxels with some noise, air (0) outside; the same on every call."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape[1:]), indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    noise = np.random.default_rng(seed).integers(0, 20, shape)
    return ((100 * inside * (1 + grid[0]) + noise * inside)[...] / 2).astype(dtype).reshape(shape)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_python(code: str, *args: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that finds the packages of this repository and of these tests."""
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


@pytest.mark.parametrize("profile", ["fast", "train", "small"])
def test_zarr_python_and_tensorstore_read_what_was_written(tmp_path: Path, profile: Profile) -> None:
    voxels = head()
    stored = write_volume(tmp_path, NAME, voxels, profile)
    assert stored.path == NAME
    assert stored.shape == voxels.shape
    np.testing.assert_array_equal(zarr.open_array(tmp_path / NAME, mode="r")[...], voxels)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / NAME)}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), voxels)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 140), st.integers(1, 140)),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("<>"),
    flip=st.booleans(),
)
def test_any_shape_dtype_and_memory_order_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: str, order: str, flip: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    voxels = np.random.default_rng(1).integers(0, 100, shape).astype(np.dtype(dtype).newbyteorder(order))
    voxels = voxels[:, ::-1, :, ::-1] if flip else voxels
    write_volume(folder, NAME, voxels)
    back = zarr.open_array(folder / NAME, mode="r")[...]
    assert back.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(back, voxels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_takes_three_inodes_and_a_second_write_keeps_it(tmp_path: Path, dtype: str) -> None:
    first = write_volume(tmp_path, NAME, head(dtype=dtype))
    assert names(tmp_path / NAME) == [SHARD_FILE, METADATA_FILE]
    assert names(tmp_path / "demo") == [Path(NAME).name]
    inode = (tmp_path / NAME).stat().st_ino
    assert write_volume(tmp_path, NAME, head(dtype=dtype)) == first
    assert (tmp_path / NAME).stat().st_ino == inode


def test_no_chunk_is_left_out_even_where_all_is_background(tmp_path: Path) -> None:
    stored = write_volume(tmp_path, NAME, np.zeros((1, 20, 70, 70), np.int16))
    assert (tmp_path / NAME / SHARD_FILE).is_file()
    assert stored.stored_bytes[0] > 0


def test_stored_bytes_are_those_of_the_file_without_its_index(tmp_path: Path) -> None:
    stored = write_volume(tmp_path, NAME, head())
    chunks = 3 * 2 * 2
    assert stored.stored_bytes == [(tmp_path / NAME / SHARD_FILE).stat().st_size - 16 * chunks - 4]


@pytest.mark.parametrize("profile", ["fast", "train", "small"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_arrays_are_as_small_as_zarr_python_makes_them(tmp_path: Path, dtype: str, profile: Profile) -> None:
    """A wrong word size for the shuffle still reads back, and costs a third of the disk."""
    voxels = head(dtype=dtype)
    stored = write_volume(tmp_path, NAME, voxels, profile)
    metadata = json.loads((tmp_path / NAME / METADATA_FILE).read_text())
    (tmp_path / "again.zarr").mkdir()
    (tmp_path / "again.zarr" / METADATA_FILE).write_text(json.dumps(metadata))
    zarr.open_array(tmp_path / "again.zarr", mode="r+")[:] = voxels
    theirs = (tmp_path / "again.zarr" / SHARD_FILE).stat().st_size
    assert stored.stored_bytes[0] <= 1.02 * theirs


def test_a_pack_holds_images_of_several_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    images = [rng.integers(1, 255, (3, 1, h, w), np.uint8) for h, w in ((50, 80), (70, 40), (10, 10))]
    stored = write_pack(tmp_path, NAME, images)
    assert stored.shape == (3, 3, 70, 80)
    pack = zarr.open_array(tmp_path / NAME, mode="r")
    assert pack.chunks == (1, 3, 70, 80)
    for image, slot, size in zip(images, pack[...], stored.stored_bytes, strict=True):
        _, _, height, width = image.shape
        np.testing.assert_array_equal(slot[:, :height, :width], image[:, 0])
        assert not slot[:, height:].any()
        assert not slot[:, :, width:].any()
        assert size > 0
    assert stored.stored_bytes[0] > 10 * stored.stored_bytes[2]


def test_images_of_different_kinds_do_not_share_a_pack(tmp_path: Path) -> None:
    grey, colour = np.ones((1, 1, 8, 8), np.uint8), np.ones((3, 1, 8, 8), np.uint8)
    for images in ([grey, colour], [grey, grey.astype(np.int16)], [np.ones((1, 2, 8, 8))], []):
        with pytest.raises(ValueError, match="a pack holds images"):
            write_pack(tmp_path, NAME, images)


@pytest.mark.parametrize("voxels", [np.ones((4, 4)), np.ones((1, 0, 4, 4)), np.ones((1, 1, 2, 2), complex)])
def test_what_is_no_volume_is_refused(tmp_path: Path, voxels: npt.NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="demo/head"):
        write_volume(tmp_path, NAME, voxels)
    assert not (tmp_path / "demo").exists()


# bytes ------------------------------------------------------------------------------------------------------

WRITE = """
import sys
from pathlib import Path
from test_write import NAME, head
from shards.write import write_volume
write_volume(Path(sys.argv[1]), NAME, head(), sys.argv[2])
"""


@pytest.mark.parametrize("profile", ["fast", "train", "small"])
def test_bytes_are_the_same_in_every_process_whatever_its_threads(tmp_path: Path, profile: Profile) -> None:
    write_volume(tmp_path / "here", NAME, head(), profile)
    for threads in ("1", "4"):
        run_python(WRITE, str(tmp_path / threads), profile, BLOSC_NTHREADS=threads, OMP_NUM_THREADS=threads)
        assert digests(tmp_path / threads) == digests(tmp_path / "here")


def test_bytes_are_the_same_when_many_threads_write_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_volume(tmp_path / str(n), NAME, head()), range(8)))
    assert len({tuple(digests(tmp_path / str(number)).items()) for number in range(8)}) == 1


# whole or not at all ----------------------------------------------------------------------------------------

WRITE_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from shards.write import write_volume
voxels = np.random.default_rng(0).integers(0, 4000, (1, 96, 256, 256)).astype(np.int16)
for number in range(10_000):
    write_volume(Path(sys.argv[1]), f"demo/{number}.zarr", voxels)
"""


@pytest.mark.parametrize("moment", ["metadata written", "a while later"])
def test_a_killed_writer_leaves_no_half_array(tmp_path: Path, moment: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    demo = tmp_path / "demo"
    deadline = time.monotonic() + 60
    while not list(demo.glob(f"{TEMPORARY_PREFIX}*/{METADATA_FILE}")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    if moment == "a while later":
        time.sleep(0.13)
    process.send_signal(signal.SIGKILL)
    process.wait()

    expected = np.random.default_rng(0).integers(0, 4000, (1, 96, 256, 256)).astype(np.int16)
    for folder in demo.glob("[0-9]*.zarr"):
        np.testing.assert_array_equal(zarr.open_array(folder, mode="r")[...], expected)
    remove_leftovers(tmp_path, "demo")
    assert not list(demo.glob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize("damage", ["cut short", "no shard", "no metadata", "other content"])
def test_a_ruin_under_the_name_is_replaced(tmp_path: Path, damage: str) -> None:
    first = write_volume(tmp_path, NAME, head())
    whole = digests(tmp_path)
    shard, metadata = tmp_path / NAME / SHARD_FILE, tmp_path / NAME / METADATA_FILE
    if damage == "cut short":
        os.truncate(shard, 1000)
    elif damage == "no shard":
        shard.unlink()
    elif damage == "no metadata":
        metadata.unlink()
    else:
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"data_type": "uint16"}))
    assert write_volume(tmp_path, NAME, head()) == first
    assert digests(tmp_path) == whole


def test_two_writers_of_one_name_agree(tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def write(_: int) -> Any:
        start.wait()
        return write_volume(tmp_path, NAME, head())

    with ThreadPoolExecutor(4) as pool:
        stored = list(pool.map(write, range(4)))
    assert all(array == stored[0] for array in stored)
    assert names(tmp_path / "demo") == [Path(NAME).name]


def test_a_refusal_of_the_operating_system_comes_through_and_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4000, (1, 40, 100, 90)).astype(np.int16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as refused:
            write_volume(tmp_path, NAME, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG
    assert names(tmp_path / "demo") == []


@pytest.mark.parametrize("moment", ["while writing", "at the last moment"])
def test_a_full_disk_comes_through_as_enospc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if moment == "while writing":
        monkeypatch.setattr("shards.write.SHARD_FILE", "/dev/full")
    else:
        (tmp_path / "demo").mkdir()
        monkeypatch.setattr("shards.write.sync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*demo") as refused:
        write_volume(tmp_path, NAME, head())
    assert refused.value.errno == errno.ENOSPC
    assert names(tmp_path / "demo") == []


# memory and order -------------------------------------------------------------------------------------------

MEMORY = """
import re
import sys
from pathlib import Path
import numpy as np
from shards.write import write_volume

def resident(field):
    # Not by getrusage: its maximum is inherited from the parent process.
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

write_volume(Path(sys.argv[1]), "demo/small.zarr", np.zeros((1, 16, 64, 64), np.int16))
voxels = np.random.default_rng(0).integers(0, 4000, (256, 384, 128), np.int16).transpose(2, 1, 0)[None, ::-1]
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
write_volume(Path(sys.argv[1]), "demo/large.zarr", voxels)
print((resident("VmHWM") - before) / voxels.nbytes)
"""


def test_writing_copies_no_volume_even_if_it_lies_transposed_in_memory(tmp_path: Path) -> None:
    assert float(run_python(MEMORY, str(tmp_path))) < 0.25


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 2, 1), (0, 2, 1, 3)])
def test_bytes_depend_on_the_voxels_not_on_how_they_lie_in_memory(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    voxels = head()
    lying = np.ascontiguousarray(voxels.transpose(order)).transpose(np.argsort(order))
    write_volume(tmp_path / "plain", NAME, voxels)
    write_volume(tmp_path / "lying", NAME, lying)
    write_volume(tmp_path / "swapped", NAME, lying.astype(">i2"))
    assert digests(tmp_path / "lying") == digests(tmp_path / "plain") == digests(tmp_path / "swapped")


@pytest.mark.parametrize("place", [0.0, 0.4, 0.999])
def test_every_byte_of_a_shard_is_under_a_checksum(tmp_path: Path, place: float) -> None:
    write_volume(tmp_path, NAME, head())
    shard = tmp_path / NAME / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[int(place * len(content))] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)checksum|crc32c"):
        zarr.open_array(tmp_path / NAME, mode="r")[...]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / NAME)}}
    with pytest.raises(ValueError, match="Error reading"):
        tensorstore.open(spec).result().read().result()


# hashes -----------------------------------------------------------------------------------------------------


def test_the_sha256_is_that_of_the_file_whether_written_or_kept(tmp_path: Path) -> None:
    first = write_volume(tmp_path, NAME, head())
    assert first.sha256 == digests(tmp_path)[f"{NAME}/{SHARD_FILE}"]
    assert write_volume(tmp_path, NAME, head()).sha256 == first.sha256
    images = [np.full((1, 1, 9, 9), number, np.uint8) for number in range(3)]
    pack = write_pack(tmp_path, "demo/pack-0123456789ab.zarr", images)
    assert pack.sha256 == digests(tmp_path)[f"{pack.path}/{SHARD_FILE}"]


@pytest.mark.parametrize("place", [0.0, 0.5, 0.9999])
def test_an_array_with_a_flipped_bit_is_not_kept(tmp_path: Path, place: float) -> None:
    first = write_volume(tmp_path, NAME, head())
    whole = digests(tmp_path)
    shard = tmp_path / NAME / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[int(place * len(content))] ^= 16
    shard.write_bytes(content)
    assert write_volume(tmp_path, NAME, head()) == first
    assert digests(tmp_path) == whole
