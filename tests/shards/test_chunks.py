"""A box is cut from its inner chunks as numpy cuts it from the whole."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.chunks import Wanted, decode, index_bytes, is_sound, parse_index, pieces
from shards.layout import chunk_grid


@st.composite
def wanted(draw: st.DrawFn) -> Wanted:
    def span(size: int) -> tuple[int, int]:
        start = draw(st.integers(0, size - 1))
        return start, draw(st.integers(start + 1, size))

    if draw(st.booleans()):
        shape = (draw(st.integers(1, 2)), *(draw(st.integers(1, high)) for high in (50, 150, 150)))
        return Wanted("d/v.zarr", shape, "int32", None, (span(shape[1]), span(shape[2]), span(shape[3])))
    shape = (draw(st.integers(1, 5)), draw(st.sampled_from([1, 3])), *(draw(st.integers(1, 90)) for _ in "hw"))
    box = ((0, 1), span(shape[2]), span(shape[3]))
    return Wanted("d/p.zarr", shape, "int32", draw(st.integers(0, shape[0] - 1)), box)


@given(wanted())
def test_pieces_are_the_region(one: Wanted) -> None:
    whole = np.arange(np.prod(one.shape), dtype=one.dtype).reshape(one.shape)
    found = np.full([stop - start for start, stop in one.region], -1, one.dtype)
    numbers = []
    for number, source, target in pieces(one):
        at = np.unravel_index(number, chunk_grid(one.shape, one.chunk))
        chunk = whole[tuple(slice(a * step, (a + 1) * step) for a, step in zip(at, one.chunk, strict=True))]
        assert (found[target] == -1).all()
        found[target] = chunk[source]
        numbers.append(number)
    assert np.array_equal(found, whole[tuple(slice(*span) for span in one.region)])
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < one.chunk_count


@pytest.mark.parametrize(
    ("slot", "box"),
    [
        (None, ((0, 11), (0, 10), (0, 10))),
        (None, ((3, 3), (0, 10), (0, 10))),
        (None, ((-1, 3), (0, 10), (0, 10))),
        (2, ((0, 1), (0, 10), (0, 10))),
        (-1, ((0, 1), (0, 10), (0, 10))),
        (0, ((0, 2), (0, 10), (0, 10))),
    ],
)
def test_a_box_outside_is_refused(slot: int | None, box: Any) -> None:
    shape = (1, 10, 10, 10) if slot is None else (2, 1, 10, 10)
    with pytest.raises(ValueError, match="not inside the array"):
        pieces(Wanted("d/v.zarr", shape, "uint8", slot, box))


def sealed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_is_no_sound_chunk(content: bytes, data: st.DataObject) -> None:
    chunk = sealed(content)
    assert is_sound(chunk)
    bit = data.draw(st.integers(0, 8 * len(chunk) - 1))
    flipped = bytearray(chunk)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not is_sound(bytes(flipped))
    assert not is_sound(chunk[:-1])


def test_what_is_no_index_is_refused() -> None:
    places = np.array([[0, 10], [10, 7]], "<u8")
    assert parse_index(sealed(places.tobytes()), 2).tolist() == [[0, 10], [10, 17]]
    gap = np.array([[0, 10], [11, 7]], "<u8")
    for wrong in (
        sealed(gap.tobytes()),
        sealed(places.tobytes())[:-1] + b"x",
        sealed(b""),
        b"\0" * index_bytes(2),
    ):
        with pytest.raises(ValueError, match="index"):
            parse_index(wrong, 2)


def test_a_sound_chunk_of_something_else_is_refused() -> None:
    import imagecodecs

    voxels = np.arange(100, dtype=np.int16)
    chunk = sealed(bytes(imagecodecs.blosc_encode(voxels.tobytes(), typesize=2)))
    assert np.array_equal(decode(chunk, (10, 10), "int16"), voxels.reshape(10, 10))
    with pytest.raises(ValueError, match="200 bytes where the catalog says 400"):
        decode(chunk, (10, 10), "int32")
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(sealed(b"no blosc at all, but sound"), (10, 10), "int16")
