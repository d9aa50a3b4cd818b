"""Sharded parameters (FSDP2's DTensors) for code that thinks in whole tensors.

Reading a sharded tensor whole is a collective: every rank must do it, in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["edited", "is_sharded", "like", "reshard_", "whole"]


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model is split over ranks."""
    return any(isinstance(p, DTensor) for m in model.modules() for p in m._parameters.values())


def whole(t: Tensor) -> Tensor:
    """The values of a tensor that may be sharded; a plain tensor is returned as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def like(values: Tensor, t: Tensor) -> Tensor:
    """Whole ``values`` on the device of ``t``, and sharded as it is."""
    values = values.to(t.device)
    if isinstance(t, DTensor) and not isinstance(values, DTensor):
        return cast(Tensor, distribute_tensor(values, t.device_mesh, t.placements))
    return values


@contextmanager
def edited(t: Tensor) -> Iterator[Tensor]:
    """The whole values of ``t``, to change in place; a sharded tensor takes its shard of the changes back."""
    with torch.no_grad():
        values = whole(t)
        yield values
        if values is not t:
            t.copy_(like(values, t))


def reshard_(model: nn.Module) -> None:
    """Put the shards in place of parameters that FSDP2 left whole after a forward without backward.

    What is written into a whole copy would be lost.
    """
    from torch.distributed.fsdp import FSDPModule  # takes its time to import

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
