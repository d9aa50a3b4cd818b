"""Specialising a module in place: the generated class that reads through the adapter, and the way back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_uora.adapters.around import AdaptedAround
from lightning_uora.adapters.experts import AdaptedExperts, leave, settle_in
from lightning_uora.adapters.forms import AdaptedAttention, AdaptedLinear
from lightning_uora.adapters.kinds import has_plain_forward, named_parts
from lightning_uora.adapters.layers import AdaptedModule, Adapter
from lightning_uora.adapters.offloaded import hide_vectors, runs_on, show_vectors, with_forward
from lightning_uora.adapters.opaque import PACKS, is_opaque, settle_, tensors_of
from lightning_uora.adapters.projections import Projections
from lightning_uora.adapters.stacked import Experts, home

__all__ = ["specialise", "unspecialise"]

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[AdaptedModule]] = {}


def _adapted_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[AdaptedModule]:
    """The specialised subclass of ``cls``, one for each class and set of parameters read through it."""
    if (cls, names) not in _CLASSES:
        mixin: type[AdaptedModule] = AdaptedModule
        if issubclass(cls, Experts):
            mixin, names = AdaptedExperts, ()
        elif not names:
            mixin = AdaptedAround
        elif issubclass(cls, nn.MultiheadAttention):
            mixin = AdaptedAttention
        elif has_plain_forward(cls):
            mixin = AdaptedLinear
        body: dict[str, Any] = {name: _weight_property(name) for name in names}
        body.update(__module__=cls.__module__, __doc__=cls.__doc__, uora_original=cls)
        body.update(uora_revive=staticmethod(_new), uora_names=names)
        _CLASSES[cls, names] = cast("type[AdaptedModule]", type(f"UORA{cls.__name__}", (mixin, cls), body))
    return _CLASSES[cls, names]


def _weight_property(name: str) -> property:
    def read(self: AdaptedModule) -> Tensor | None:
        weight, told = self._uora_weight(name), self._uora.owner.on_read
        if told is not None and weight is not None:
            told(weight, self, name)
        return weight

    return property(read, doc=f"Effective {name}: the frozen parameter plus the adapter's update.")


def _new(cls: type[nn.Module], names: tuple[str, ...], *args: Any) -> AdaptedModule:
    """Unpickle: an empty instance of the specialised class, whose state follows."""
    adapted = _adapted_class(cls, names)
    return adapted.__new__(adapted, *args)


def specialise(module: nn.Module, owner: Projections, index: int) -> AdaptedModule:
    """Adapt ``module`` in place: two new parameters, and the class that reads through them.

    A fresh adapter has b = 0, so the module computes exactly what it did, between equal grad modes and equal
    ``requires_grad`` of the weight it reads.
    """
    parts = named_parts(module)
    adapter = Adapter(owner, parts, index)
    opaque = is_opaque(module)
    base = tensors_of(module)
    device = runs_on(home(module), next(iter(base.values())))
    axis = [part.experts for part in parts.values() if part.experts]
    d = torch.full((*axis, owner.config.rank), owner.config.d_init, dtype=torch.float32, device=device)
    b = torch.zeros(*axis, adapter.m, dtype=torch.float32, device=device)
    module.__dict__["_uora"] = adapter
    module.register_parameter("uora_d", nn.Parameter(d))
    module.register_parameter("uora_b", nn.Parameter(b))
    before = type(module)
    module.__class__ = _adapted_class(before, () if opaque else tuple(parts))
    with_forward(module, before)
    hide_vectors(home(module))
    if isinstance(module, Experts):
        settle_in(module)
    if opaque:
        settle_(module)
        if PACKS in module.__dict__:  # see Note [Another packing on CPUs]
            adapter.before[PACKS], module.__dict__[PACKS] = module.__dict__[PACKS], False
    return cast(AdaptedModule, module)


def unspecialise(module: AdaptedModule) -> nn.Module:
    """Undo :func:`specialise` exactly."""
    before = type(module)
    module._uora.forget()
    module.__dict__.update(module._uora.before)
    if isinstance(module, AdaptedExperts):
        leave(cast(Experts, module))
    cast(nn.Module, module).__class__ = module.original_class
    with_forward(module, before)
    show_vectors(home(module))
    del module._parameters["uora_d"], module._parameters["uora_b"], module.__dict__["_uora"]
    return module
