"""Running a model just to look at it: afterwards its state and the random generators are as before."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["random_states_kept", "unchanged"]


@contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """The global generators of torch (the CPU's, and of the model's accelerators), Python and NumPy."""
    places: dict[str, set[int]] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type not in ("cpu", "meta"):
            places.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    numpy, python = sys.modules.get("numpy"), random.getstate()
    state = numpy.random.get_state() if numpy is not None else None
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in places.items():
            forks.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(state)


@contextmanager
def unchanged(model: nn.Module, but: nn.Module | None = None) -> Iterator[None]:
    """Evaluation mode inside; afterwards, and after an error, the model and the generators are as before.

    Kept: training flags, buffers (BatchNorm's statistics), and the attributes of every module: what they
    refer to, the values of tensors (a metric's states), the items of lists, dictionaries, sets and queues.
    Not kept: what those items hold in turn, parameters, and anything outside the model.

    Args:
        model: Everything in it is kept.
        but: This module's own attributes and buffers are left alone.
    """
    kept = [_Kept(module) for module in model.modules() if module is not but]
    with random_states_kept(model):
        try:
            for one in kept:
                one.module.training = False
            yield
        finally:
            for one in kept:
                one.restore()


class _Kept:
    """One module's attributes, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        values = [*self.attributes.values(), *module._buffers.values()]
        self.tensors: list[tuple[Tensor, Tensor]] = [
            (v, v.detach().clone())
            for v in values
            if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)
        ]
        self.items = [(v, v.copy()) for v in values if isinstance(v, (list, dict, set, deque))]

    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for container, items in self.items:
            _refill(container, items)
        with torch.no_grad():
            for tensor, before in self.tensors:  # batch_norm moves no version counter
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _refill(container: Any, before: Any) -> None:
    """The items of before, in their order, in the same object."""
    if isinstance(container, (list, deque)):
        if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
            container.clear()
            container.extend(before)
    elif isinstance(container, set) or list(container) != list(before) or _differ(container, before):
        container.clear()
        container.update(before)


def _differ(container: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return any(container[key] is not value for key, value in before.items())
