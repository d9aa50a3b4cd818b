"""What an adapter has of each layer, whether it computes or waits."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_uora.adapters.attachments import Attachment
from lightning_uora.adapters.layers import Adapter
from lightning_uora.adapters.opaque import is_opaque
from lightning_uora.adapters.own_rows import Own
from lightning_uora.adapters.shelf import item_of
from lightning_uora.adapters.stacked import home, named_layers

__all__ = ["LayerOf", "layers_of", "trained_with"]


class LayerOf(NamedTuple):
    """One adapter in one layer.

    Attributes:
        uora_d: The vector d, (r,); of experts (E, r).
        uora_b: The vector b, (m,); of experts (E, m).
    """

    module: nn.Module
    adapter: Adapter
    uora_d: Tensor
    uora_b: Tensor

    def sources(self, n: int) -> tuple[Tensor, Tensor, Own]:
        """A (of width n), B and own rows."""
        return self.adapter.owner.sources(n, self.adapter.m, self.adapter.index)

    def added_to(self, name: str, W: Tensor, weight: float = 1.0) -> Tensor:
        """A parameter's values with the update, ``weight`` times, in the dtype of ``W``."""
        part = self.adapter.parts[name]
        A, B, own = self.sources(part.n)
        tensors = own.down(A), own.up(B), self.uora_d, self.uora_b
        A, B, d, b = (t.to(W.device, W.dtype) for t in tensors)
        return part.delta(W, A, B, d, b if weight == 1.0 else weight * b)

    def delta_weight(self) -> Tensor:
        """The update ``diag(b) B diag(d) A``, shaped like the adapted weight, differentiable in d and b."""
        deltas = []
        for name, part in self.adapter.parts.items():
            W = self.uora_b if is_opaque(self.module) else cast(Tensor, home(self.module)._parameters[name])
            shape = (part.m, part.n) if is_opaque(self.module) else W.shape
            zeros = torch.zeros(shape, device=self.uora_d.device, dtype=W.dtype)
            deltas.append(self.added_to(name, zeros))
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)


def layers_of(one: Attachment, name: str, here: dict[str, nn.Module] | None = None) -> dict[str, LayerOf]:
    """The layers of an adapter at this root, by path; ``here`` are its :func:`named_layers`, if known."""
    if name == one.owner.name:
        return {path: LayerOf(m, m._uora, m.uora_d, m.uora_b) for path, m in one.layers}
    item, here = item_of(one, name), named_layers(one.root) if here is None else here
    get = cast("dict[str, Tensor]", item._parameters)
    return {p: LayerOf(here[p], a, get[f"d_{a.index}"], get[f"b_{a.index}"]) for p, a in item.layers}


def trained_with(one: Attachment, name: str, here: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What trained besides the vectors, by its name in the model; ``here`` are the model's parameters."""
    if name == one.owner.name:
        return {trained: here[trained] for trained in one.owner.trained}
    item = item_of(one, name)
    return {trained: cast(Tensor, item._parameters[key]) for key, trained in item.trained.items()}
