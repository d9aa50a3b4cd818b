"""What several ranks must agree on: a decision, a sum, a gradient that waits for its step.

Every function here is a collective where a process group exists: every rank must call it, in one order. In a
single process each returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_uora.distributed.sharding import whole

__all__ = ["agreed", "alone", "first_rank", "mean_gradients", "on_any_rank", "summed"]

T = TypeVar("T")


_ALONE: list[bool] = []


@contextmanager
def alone(yes: bool) -> Iterator[None]:
    """With ``yes``, this rank decides for itself inside: others exist, but train something else or nothing.

    A Trainer on one device may run in one of several ranks; what is a collective elsewhere would wait there
    for ever.
    """
    _ALONE.append(yes)
    try:
        yield
    finally:
        _ALONE.pop()


def _several() -> bool:
    return (
        not any(_ALONE)
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def first_rank() -> bool:
    """Whether this process is the one that writes and warns. No collective."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def agreed(decision: T) -> T:
    """The first rank's decision, plain data, on every rank."""
    if not _several():
        return decision
    box = [decision]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_any_rank(flags: list[bool]) -> list[bool]:
    """Which flags are set on one rank at least."""
    if not _several():
        return flags
    gathered: list[list[bool]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, flags)
    return [any(column) for column in zip(*gathered, strict=True)]


def summed(t: Tensor) -> Tensor:
    """The sum of ``t`` over the ranks; ``t`` stays as it is."""
    if not _several():
        return t
    total = t.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


# Note [Gradients that wait]
# While gradients accumulate, DistributedDataParallel keeps each rank's own sum and averages once, at the
# step: mean over ranks of (waiting + coming). Put the mean of the waiting ones into every rank and the step
# is the same, whatever the number of ranks then. FSDP2 averages at each backward: its shards need gathering
# only.


def mean_gradients(model: nn.Module) -> dict[str, Tensor]:
    """What trains and its gradient, whole, as the next step counts it; see Note [Gradients that wait]."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    waiting = on_any_rank([p.grad is not None for _, p in trained])
    gradients = {}
    for (name, p), waits in zip(trained, waiting, strict=True):
        if not waits:
            continue
        gradient = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        if isinstance(gradient, DTensor):
            gradients[name] = whole(gradient).cpu()
        else:
            ranks = torch.distributed.get_world_size() if _several() else 1
            gradients[name] = (summed(gradient) / ranks).cpu()
    return gradients
