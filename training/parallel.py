"""One network in several processes: each has all of it (DDP), or a shard of it (FSDP2).

Either way the gradients are the mean over processes of their own ones; what makes that the gradient of the
whole batch is the weight that each gives to its loss (`training.run.Run.backward`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from training.world import World

Part = TypeVar("Part")

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def replicated(model: nn.Module, world: World) -> nn.Module:
    """`model`, to be called in training: its gradients are averaged over processes while they come up.

    Every parameter of our networks has a gradient at every DA level, so none is looked for.
    """
    if world.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Spread parameters, gradients and optimizer state of `model` over the processes, in place.

    Each of `layers` is put together for its own pass alone; what belongs to none, for a whole pass of `forward`
    or `features`.
    """
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    register_fsdp_forward_method(model, "features")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def passes(network: nn.Module, parts: Sequence[Part]) -> Iterator[Part]:
    """The parts of a batch, each for one pass of `network`; in the last, processes average what came up."""
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = last
        elif isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        yield part


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights, on rank 0 if they are sharded. Every process must call."""
    state: dict[str, Any] = (
        get_model_state_dict(model, options=_WHOLE) if is_sharded(model) else model.state_dict()
    )
    return state


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The reverse, in every process; raises RuntimeError where names or shapes differ."""
    if isinstance(model, FSDPModule):
        model.reshard()  # a pass without gradients, as a probe makes, leaves the outermost layer whole
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of the optimizer's state, on rank 0 if it is sharded. Every process must call."""
    if is_sharded(model):
        return get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return optimizer.state_dict()


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The reverse, in every process."""
    if is_sharded(model):
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, dict(state), options=whole)
    else:
        optimizer.load_state_dict(dict(state))


def whole(tensor: Tensor) -> Tensor:
    """A scalar that may be known in parts: its full value. Every process must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
