"""Factors for groups of images, such that training draws them in given shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.mix import Column, ColumnFactors
from catalog.sampling import LEVELS, Reals
from catalog.shares import Labels, Tally

_DIGITS = 9
"""Significant digits of a factor: shares are right to far more than anybody can measure."""

_EXAMPLE = 'write "modality: CT=0.4, MRI=0.4, XR=0.2"'


class Target(NamedTuple):
    """Shares of draws that some values of a column are to have."""

    by: Column
    shares: Mapping[str | int, float]


def parse_target(text: str) -> Target:
    """Read "column: value=share, value=share". Raises SetupError if it is not of that form."""
    by, colon, rest = text.partition(":")
    columns: dict[str, Column] = {name: name for name in get_args(Column)}
    column = columns.get(by.strip())
    if not colon or column is None:
        raise SetupError(f"--balance {text!r}: {_EXAMPLE}; the column is one of {', '.join(columns)}.")
    shares: dict[str | int, float] = {}
    for part in rest.split(","):
        name, equals, number = (word.strip() for word in part.rpartition("="))
        try:
            value = int(name) if column in ("dimension", "da_level") else name
            share = float(number)
        except ValueError:
            raise SetupError(f"--balance {text!r}: {part.strip()!r} is no value=share; {_EXAMPLE}.") from None
        if not equals or not name or not 0 <= share <= 1:
            raise SetupError(f"--balance {text!r}: {part.strip()!r}: a share is 0 to 1; {_EXAMPLE}.")
        if twice := [other for other in shares if _within(value, other) or _within(other, value)]:
            raise SetupError(f"--balance {text!r}: {name} has two shares, or one within {twice[0]}. Give one.")
        shares[value] = share
    if (total := sum(shares.values())) > 1 + 1e-9:
        raise SetupError(f"--balance {text!r}: the shares add up to {total:g}, more than 1.")
    return Target(column, shares)


def balancing(tally: Tally, target: Target) -> ColumnFactors:
    """The factors that bring the shares *with* the mix of `tally` to the target.

    The share of a DA level is that after random scaling, to which images of the levels beside it contribute.
    Values without a share keep their proportions among themselves, in what the others leave.

    Raises SetupError where no factors reach the target, and says why.
    """
    names = list(target.shares)
    masses = _masses(tally, target.by, names)
    wanted = np.array([*target.shares.values(), max(1 - sum(target.shares.values()), 0)])
    wanted[-1] = 0 if wanted[-1] < 1e-9 else wanted[-1]
    present = masses.sum(axis=1) > 0
    others = [name for name in _values(tally, target.by) if not any(_within(name, one) for one in names)]
    for name, share, there in zip(names, wanted, present, strict=False):
        if share > 0 and not there:
            known = ", ".join(map(str, _values(tally, target.by))) or "none"
            raise SetupError(
                f"no image that the mix draws has {target.by} {name}, so its share cannot be {share:g}. "
                f"There: {known}."
            )
    if present[-1] and wanted[-1] == 0:
        shown = ", ".join(f"{name}=0" for name in others)
        raise SetupError(
            f"the shares add up to 1, and nothing is left for other values of {target.by}. To leave those out, "
            f"add {shown}; to keep them, ask for less."
        )
    if wanted[-1] > 0 and not present[-1]:
        raise SetupError(
            f"the shares add up to {1 - wanted[-1]:g}, and there is no other value of {target.by} for the "
            "rest. Make them add up to 1."
        )
    factors = _solved(masses, wanted, present, target)
    scale = factors[-1] if present[-1] else factors.max()
    return ColumnFactors(
        by=target.by,
        factors={
            name: float(f"{factor / scale:.{_DIGITS}g}") for name, factor in zip(names, factors, strict=False)
        },
    )


def _solved(masses: Reals, wanted: Reals, present: npt.NDArray[np.bool_], target: Target) -> Reals:
    """Factors f >= 0 of the groups with f @ masses = wanted; those of absent groups are 0."""
    factors = np.zeros(len(wanted))
    rows = np.flatnonzero(present)
    solution, *_ = np.linalg.lstsq(masses[rows].T, wanted, rcond=None)
    reached = solution @ masses[rows]
    if solution.min() < -1e-9 or np.abs(reached - wanted).max() > 1e-9:
        # Only levels mix: every other group is drawn as what it is, so that any shares can be had.
        spread = "; ".join(
            f"of the images of level {name}, {share:.1%} are drawn at {name}"
            for name, share in zip(
                target.shares, np.diag(masses) / masses.sum(axis=1).clip(1e-300), strict=False
            )
        )
        raise SetupError(
            f"no factors give {target.by} these shares, for random scaling moves images to the levels beside "
            f"theirs ({spread}). Ask for shares nearer to those that `pumit-data mix show all` tells."
        )
    factors[rows] = solution.clip(0)
    return factors


def _masses(tally: Tally, by: Column, names: list[str | int]) -> Reals:
    """(k + 1, k + 1): mass of the images of each value, then of all others, drawn as each of these."""
    size = len(names)
    masses = np.zeros((size + 1, size + 1))
    for labels, cell in tally.cells.items():
        row = next((at for at, name in enumerate(names) if _within(getattr(labels, by), name)), size)
        if by == "da_level":
            for level in range(LEVELS):
                masses[row, names.index(level) if level in names else size] += cell.masses[1, level]
        else:
            masses[row, row] += cell.masses[1].sum()
    return masses / (masses.sum() or 1)


def _values(tally: Tally, by: Column) -> list[str | int]:
    """Values of a column among the images that the mix draws, sorted."""
    index = Labels._fields.index(by)
    found = {labels[index] for labels, cell in tally.cells.items() if cell.images[1]}
    return sorted((value for value in found if value is not None), key=str)


def _within(value: str | int | None, name: str | int) -> bool:
    """Whether an image with `value` counts to `name`: MRI/T1 does to MRI."""
    return value == name or (isinstance(value, str) and value.startswith(f"{name}/"))
