"""``resize_token_embeddings`` where the output layer is adapted: the adapter grows with it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_uora.adapters.attachments import Attachment
from lightning_uora.adapters.kinds import named_parts
from lightning_uora.adapters.layers import AdaptedModule
from lightning_uora.adapters.names import named_modules
from lightning_uora.adapters.specialise import specialise

__all__ = ["forget_resizing", "watch_resizing"]

RESIZE = "resize_token_embeddings"

# Note [Resized output layers]
# transformers puts a new layer in the place of the old one, filled from its effective weight, or changes the
# weight's memory where it is tied. Neither knows of the adapter. So the method is replaced on the instance:
# it runs with adapters off, which shows it the base, and then the new layer is adapted: d as it was, b and
# the rows of B too as far as there are rows, fresh rows of B (from the seed) with b = 0 for new tokens.


class Resizing:
    """The method of one model. See Note [Resized output layers]."""

    def __init__(self, model: nn.Module, one: Attachment) -> None:
        self.model, self.one = model, one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        model: Any = self.model
        old = model.get_output_embeddings()
        owner = self.one.owner
        trains = [p.requires_grad for p in (old.uora_d, old.uora_b)] if isinstance(old, AdaptedModule) else []
        owner.disabled += 1
        try:
            result = getattr(type(model), RESIZE)(model, *args, **kwargs)
        finally:
            owner.disabled -= 1
        if isinstance(old, AdaptedModule) and old._uora.owner is owner:
            _follow(self.one, old, model.get_output_embeddings(), trains)
        return result


def watch_resizing(one: Attachment) -> None:
    """Replace the method on models in ``one`` whose output layer is adapted."""
    adapted = {id(module) for _, module in one.layers}
    for module in named_modules(one.root).values():
        getter = getattr(module, "get_output_embeddings", None)
        if not (callable(getter) and callable(getattr(module, RESIZE, None))):
            continue
        try:
            output = getter()
        except (NotImplementedError, AttributeError):
            continue
        if id(output) in adapted:
            module.__dict__[RESIZE] = Resizing(module, one)


def forget_resizing(one: Attachment) -> None:
    """Take back what :func:`watch_resizing` did."""
    for module in named_modules(one.root).values():
        found = module.__dict__.get(RESIZE)
        if isinstance(found, Resizing) and found.one.owner is one.owner:
            del module.__dict__[RESIZE]


@torch.no_grad()
def _follow(one: Attachment, old: AdaptedModule, new: nn.Module, trains: list[bool]) -> None:
    adapter, d, b = old._uora, old.uora_d, old.uora_b
    grown = named_parts(new)
    m = sum(part.m for part in grown.values())
    if new is old and m == adapter.m:
        return
    others = {layer._uora.m for _, layer in one.layers if layer is not old}
    adapter.owner.resize(adapter.m, m, adapter.index, others)
    if new is not old:
        new = specialise(new, adapter.owner, adapter.index)
        cast(Tensor, new._parameters["uora_d"]).copy_(d)
    else:
        adapter.parts = grown
        adapter.cache.clear()
        new._parameters["uora_b"] = nn.Parameter(b.new_zeros(m))
    kept = min(m, len(b))
    cast(Tensor, new._parameters["uora_b"])[:kept] = b[:kept]
    for vector, train in zip(("uora_d", "uora_b"), trains, strict=True):  # transformers freezes the new layer
        cast(Tensor, new._parameters[vector]).requires_grad_(train)
