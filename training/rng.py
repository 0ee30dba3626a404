"""Random numbers that are addressed, not consumed: the same (seed, stream, step, index) gives the same numbers.

Philox is a counter-based generator: its n-th block of output can be had without the n - 1 before it. So a
step, or one sample of it, can be replayed by any process in any order, and resuming costs nothing.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_BLOCK = 4  # 64-bit numbers per Philox counter value


class Stream(IntEnum):
    """What the numbers are for. The value is part of what a seed means: append, never renumber."""

    LEVEL = 0
    SAMPLE = 1
    VISIBLE = 2
    SLICES = 3
    SECOND_VIEW = 4
    LOCAL_VIEW = 5


def uniforms(
    seed: int, stream: Stream, step: int, first: int, count: int, width: int
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) for the samples first, ..., first + count - 1 of a step: (count, width), 53 bits each.

    Row i depends on seed, stream, step, width and first + i alone. The bits come from the generator's raw
    output, which numpy keeps stable across versions, unlike its distributions.
    """
    blocks = -(-width // _BLOCK)
    # As uint64 from the start: a list with a number of 2^63 or more would pass through float64.
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first * blocks, 0, step, 0], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=counter)
    bits = generator.random_raw(count * blocks * _BLOCK).reshape(count, blocks * _BLOCK)
    return (bits[:, :width] >> np.uint64(11)).astype(np.float64) * 2.0**-53
