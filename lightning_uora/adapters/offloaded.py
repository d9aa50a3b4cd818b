"""Layers whose weight accelerate keeps elsewhere (in memory or on disk) and loads for each forward."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = [
    "HOOK",
    "KEPT_FORWARD",
    "hide_vectors",
    "is_offloaded",
    "kept_elsewhere",
    "runs_on",
    "sees_vectors",
    "show_vectors",
    "with_forward",
]

HOOK, KEPT_FORWARD = "_hf_hook", "_old_forward"
"""Where accelerate keeps a module's hook, and the forward that the module had before."""
VECTORS = ("uora_d", "uora_b")

# Note [Hooks that keep a forward]
# accelerate (``device_map``, offloading) puts a function on the instance that calls the forward it found
# there, ``_old_forward``. Another class changes nothing about it, so that one is exchanged as well.

# Note [Offloaded layers]
# Between forwards such a weight is on ``meta``; a hook fetches it from a map by the name of every parameter
# of the module, and drops all of them afterwards. d and b are in no map, and must stay where an optimizer
# knows them. So the hook works while they are out of its sight, and where it reads a weight it sees the base.
# What needs the weight outside of a forward takes it from the map, to look at; merging, which would have to
# write there, is refused.


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get(HOOK)
    hook = getattr(hook, "hook", hook)
    return list(getattr(hook, "hooks", [hook]))


def _offloading(module: nn.Module) -> Any:
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights for each forward."""
    return HOOK in module.__dict__ and _offloading(module) is not None


def runs_on(module: nn.Module, weight: Tensor) -> torch.device:
    """Where the module computes: where its weight is, or is brought to."""
    hook = _offloading(module)
    if hook is None or hook.execution_device is None:
        return weight.device
    where = hook.execution_device
    return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)


def kept_elsewhere(module: nn.Module, name: str) -> Tensor | None:
    """An offloaded parameter, from where it is kept; None where it is in its place."""
    hook = _offloading(module)
    return None if hook is None or hook.weights_map is None else cast(Tensor, hook.weights_map[name])


class Unseeing:
    """A hook that does not see d and b. See Note [Offloaded layers]."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As the hook's own."""
        with _aside(module):
            return self.hook.pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """As the hook's own."""
        with _aside(module):
            return self.hook.post_forward(module, output)

    def detach_hook(self, module: nn.Module) -> Any:
        """As the hook's own."""
        with _aside(module):
            return self.hook.detach_hook(module)

    def __getattr__(self, name: str) -> Any:
        if name == "hook":
            raise AttributeError(name)
        return getattr(self.hook, name)


@contextmanager
def _aside(module: nn.Module) -> Iterator[None]:
    own = {name: module._parameters.pop(name) for name in VECTORS if name in module._parameters}
    layers = [
        layer.__dict__.get("_uora") for layer in (module, *module._modules.values()) if layer is not None
    ]
    read = [adapter for adapter in layers if adapter is not None and not adapter.raw]
    for adapter in read:
        adapter.raw = True
    try:
        yield
    finally:
        module._parameters.update(own)
        for adapter in read:
            adapter.raw = False


def hide_vectors(module: nn.Module) -> None:
    """Keep an offloading hook from moving d and b; see Note [Offloaded layers]."""
    if is_offloaded(module):
        module.__dict__[HOOK] = Unseeing(module.__dict__[HOOK])


def sees_vectors(module: nn.Module) -> bool:
    """Whether an offloading hook moves d and b: it came after the adapter, and a step on them is lost."""
    return is_offloaded(module) and not isinstance(module.__dict__.get(HOOK), Unseeing)


def show_vectors(module: nn.Module) -> None:
    """Undo :func:`hide_vectors`."""
    hook = module.__dict__.get(HOOK)
    if isinstance(hook, Unseeing):
        module.__dict__[HOOK] = hook.hook


def with_forward(module: nn.Module, before: type[nn.Module]) -> None:
    """Give a hook the forward of the module's class; see Note [Hooks that keep a forward].

    Args:
        module: The module, of its new class.
        before: The class that it had. What is no forward of that one is left alone.
    """
    for key in (KEPT_FORWARD, "forward"):  # where a hook was removed, it has left the forward it kept
        kept = module.__dict__.get(key)
        if isinstance(kept, types.MethodType) and kept.__func__ is before.forward:
            module.__dict__[key] = types.MethodType(type(module).forward, module)
