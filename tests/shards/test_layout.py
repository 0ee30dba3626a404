"""Names and metadata of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shards.layout import (
    TEMPORARY_PREFIX,
    array_metadata,
    array_name,
    chunk_bytes,
    chunk_grid,
    dataset_folder,
    pack_chunk,
    volume_chunk,
)

IDENTITY = "0123456789abcdef" * 4

# Every code point, lone surrogates included: that is how file names that are no UTF-8 look in Python.
any_text = st.text(st.characters(exclude_categories=[]), max_size=400)


@given(dataset=any_text.filter(bool), key=any_text)
@example(dataset="amos", key="..")
@example(dataset="..", key="../../etc/passwd")
@example(dataset="/", key="/etc/passwd")
@example(dataset="amos", key="a\0b")
@example(dataset="amos", key=".tmp-1")
@example(dataset="amos", key="é" * 300)
@example(dataset="amos", key="")
def test_whatever_the_key_a_name_is_one_file_in_one_folder(dataset: str, key: str) -> None:
    name = array_name(dataset, key, IDENTITY)
    folder, file = name.split("/")
    for part in (folder, file):
        assert part not in ("", ".", "..")
        assert not part.startswith(TEMPORARY_PREFIX)
        assert not part.startswith(".")
        assert part.isascii()
        assert part.isprintable()
        assert len(part) <= 255
    assert file.endswith(f"-{IDENTITY[:12]}.zarr")
    assert Path(folder) == Path(dataset_folder(dataset))


@given(first=any_text, second=any_text)
@example(first="a/b", second="a%2Fb")
@example(first="x" * 200, second="x" * 199 + "y")
@example(first="." * 3, second="%2E..")
def test_two_keys_never_share_a_name(first: str, second: str) -> None:
    same = array_name("amos", first, IDENTITY) == array_name("amos", second, IDENTITY)
    assert same == (first == second)


def test_an_ordinary_key_stays_readable() -> None:
    assert array_name("amos", "amos_0001#0003", IDENTITY) == "amos/amos_0001%230003-0123456789ab.zarr"


@pytest.mark.parametrize("identity", ["", "0123", "../../../../x", "0123456789AB"])
def test_an_identity_is_a_digest(identity: str) -> None:
    with pytest.raises(ValueError, match="not a hexadecimal digest"):
        array_name("amos", "amos_0001", identity)


def test_a_dataset_without_a_name_has_no_folder() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        array_name("", "amos_0001", IDENTITY)


@given(shape=st.tuples(*[st.integers(1, 700)] * 4))
def test_one_shard_covers_the_array_in_whole_chunks(shape: tuple[int, ...]) -> None:
    for chunk in (volume_chunk(shape), pack_chunk(shape)):
        metadata = array_metadata(shape, "int16", chunk, "fast")
        shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        for size, step, whole, count in zip(shape, chunk, shard, chunk_grid(shape, chunk), strict=True):
            assert 1 <= step <= size <= whole < size + step
            assert whole == count * step


def test_thin_and_small_volumes_have_clipped_chunks() -> None:
    assert volume_chunk((1, 300, 512, 512)) == (1, 16, 64, 64)
    assert volume_chunk((1, 5, 512, 40)) == (1, 5, 64, 40)
    assert pack_chunk((256, 3, 512, 640)) == (1, 3, 512, 640)


@pytest.mark.parametrize("content", [b"", b"\0" * 19, b"\xff" * 400])
def test_an_index_that_does_not_fit_its_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.0.0.0.0"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cut short"):
        chunk_bytes(file, (1, 1, 1, 1))


def test_the_index_tells_the_bytes_of_each_chunk(tmp_path: Path) -> None:
    index = np.array([[0, 5], [5, 7]], "<u8").tobytes()
    file = tmp_path / "c.0.0.0.0"
    file.write_bytes(b"x" * 12 + index + b"crc!")
    assert chunk_bytes(file, (2, 1, 1, 1)).ravel().tolist() == [5, 7]
