"""Ways to spoil the bytes of a file, drawn from a random generator: the same seed spoils the same way."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable

import numpy as np
from isal import igzip

_EXTREME = {
    1: [0, 1, 0x7F, 0x80, 0xFF],
    2: [0, 1, 2, 0x7F, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF],
    4: [0, 1, 2, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0x4E6E6B28],
    8: [
        0,
        1,
        0xFFFFFFFF,
        1 << 32,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 1,
        0x7FF8000000000000,
        0x3FF0000000000000,
    ],
}
_WORDS = [
    "0",
    "-1",
    "1",
    "2",
    "65535",
    "4294967296",
    "9223372036854775807",
    "1e308",
    "-1e-300",
    "nan",
    "inf",
    "",
    "x",
]

Mutation = Callable[[bytearray, np.random.Generator], None]


def mutated(data: bytes, name: str, random: np.random.Generator) -> bytes:
    """`data` with one to four changes; inside the compression for half of the `.gz` files, and with right
    checksums for most of the PNGs, so that the changes are seen."""
    inside = data[:2] == b"\x1f\x8b" and random.random() < 0.6
    content = bytearray(igzip.decompress(data) if inside else data)
    for _ in range(random.integers(1, 5)):
        change = _CHANGES[random.choice(len(_CHANGES), p=_SHARES)]
        if content:
            change(content, random)
    if name.endswith(".png") and random.random() < 0.7:
        content = _with_checksums(content)
    return igzip.compress(bytes(content), 1) if inside else bytes(content)


def _place(data: bytearray, random: np.random.Generator) -> int:
    """Headers stand at the start: half of the changes meet the first 400 bytes."""
    end = min(len(data), 400) if random.random() < 0.5 else len(data)
    return int(random.integers(end))


def _flip_bits(data: bytearray, random: np.random.Generator) -> None:
    for _ in range(random.integers(1, 9)):
        data[_place(data, random)] ^= 1 << int(random.integers(8))


def _set_extreme(data: bytearray, random: np.random.Generator) -> None:
    size = int(random.choice(list(_EXTREME)))
    place = _place(data, random)
    if random.random() < 0.7:
        place -= place % min(size, 4)
    value = _EXTREME[size][random.integers(len(_EXTREME[size]))]
    data[place : place + size] = value.to_bytes(size, "big" if random.random() < 0.3 else "little")


def _truncate(data: bytearray, random: np.random.Generator) -> None:
    del data[_place(data, random) :]


def _delete(data: bytearray, random: np.random.Generator) -> None:
    start = _place(data, random)
    del data[start : start + int(random.integers(1, 40))]


def _repeat(data: bytearray, random: np.random.Generator) -> None:
    """A piece of the file once more, over something else or between it."""
    start, target = _place(data, random), _place(data, random)
    piece = data[start : start + int(random.integers(1, 200))]
    data[target : target + (len(piece) if random.random() < 0.5 else 0)] = piece


def _insert_noise(data: bytearray, random: np.random.Generator) -> None:
    place = _place(data, random)
    data[place:place] = random.bytes(int(random.integers(1, 40)))


def _change_number(data: bytearray, random: np.random.Generator) -> None:
    """One of the decimal numbers that text headers and DICOM values hold."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[:3000]))
    if numbers:
        found = numbers[random.integers(len(numbers))]
        word = _WORDS[random.integers(len(_WORDS))].encode()
        # DICOM values have their length before them: there a word must fit to be understood.
        fits = random.random() < 0.5
        data[found.start() : found.end()] = word[: len(found[0])].ljust(len(found[0])) if fits else word


_CHANGES: list[Mutation] = [
    _flip_bits,
    _set_extreme,
    _truncate,
    _delete,
    _repeat,
    _insert_noise,
    _change_number,
]
_SHARES = [0.25, 0.35, 0.06, 0.06, 0.06, 0.06, 0.16]


def _with_checksums(png: bytearray) -> bytearray:
    place = 8
    while place + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, place)
        end = place + 8 + length
        if end + 4 > len(png):
            break
        struct.pack_into(">I", png, end, zlib.crc32(png[place + 4 : end]))
        place = end + 4
    return png
