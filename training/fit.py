"""Whether named tensors are those that a network has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def misfits(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What stands against loading `given` into a network whose state is `wanted`: names and shapes."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys())]
    problems += [f"{name} is unexpected" for name in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the configuration makes it {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return problems
