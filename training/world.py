"""The processes that train together: who they are, and what they tell each other besides gradients.

`torchrun` and `pumit-train --nproc` describe them in the environment (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT). On CPUs they talk through gloo; GPUs exchange tensors through NCCL, everything else
still through gloo, so that no message costs a wait for a GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from catalog.errors import SetupError

_PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for another one that still lives: for the slowest corpus to be read by rank 0."""

Value = TypeVar("Value")


class World(NamedTuple):
    """Which of the processes that train together this one is; rank 0 alone writes files."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the processes of this machine: the GPU it takes."""

    def first(self, action: Callable[[], Value]) -> Value:
        """What `action` returns, which only rank 0 carries out while the others wait.

        Where it fails, the error is raised there, and the others end with the same exit code, in silence.
        """
        if self.size == 1:
            return action()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told = [True, action()]
            except BaseException:
                dist.broadcast_object_list([False, None])
                raise
        dist.broadcast_object_list(told)
        done, value = told
        if not done:
            raise SystemExit(2)
        return value  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor` summed over all processes, which must be several; the gradient runs through the sum."""
    return _SumOverRanks.apply(tensor)  # type: ignore[no-any-return, no-untyped-call]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) whose backward is the same sum over the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class PeerLost(SystemExit):
    """Another process of the training ended; this one ends with exit code 3, as an interruption does."""

    def __init__(self, message: str) -> None:
        super().__init__(3)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """This process's place among those that train together on devices called `device` (auto, cpu, cuda).

    Alone, unless the environment says otherwise. Raises SetupError where a machine has fewer GPUs than
    processes, or the others cannot be reached; PeerLost once one of them ends in the middle of the training.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        gpus = torch.cuda.device_count()
        if world.local_rank >= gpus:
            raise SetupError(
                f"process {world.local_rank} of this machine finds {gpus} GPUs: start no more processes than "
                "there are GPUs, or use --set device=cpu"
            )
        torch.cuda.set_device(world.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise SetupError(
            f"rank {world.rank} of {size} cannot reach the other processes: {error}. Start all of them by "
            "`pumit-train ... --nproc N`, or by torchrun."
        ) from error
    try:
        yield world
    except RuntimeError as error:
        if not _is_of_a_peer(error):
            raise
        # The group is left as it is: taking leave of a process that is gone would wait for it.
        raise PeerLost(
            f"rank {world.rank} of {size} lost another process of this training, which ended or cannot be "
            "reached any more; its own message says why. Start again with --resume to go on from the newest "
            "checkpoint."
        ) from error
    dist.destroy_process_group()


def _is_of_a_peer(error: RuntimeError) -> bool:
    # Gloo reports through DDP and autograd, where the class of the error is lost.
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(name in text for name in ("gloo", "nccl", "by peer"))
