"""Adapted modules: a module keeps its object, parameters, names and hooks; its class changes.

The generated subclass turns the adapted parameter (``weight``, or ``in_proj_weight`` of
``nn.MultiheadAttention``) into a property that returns the effective weight. Whoever reads it sees the
adapter: the module's own forward, fused evaluation paths, blocks that call ``F.linear(x, self.qkv.weight)``,
user code. The parameter itself stays in ``_parameters`` under its name, so state dicts, optimizers and
``named_parameters`` see the frozen base.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_uora.adapters.functional import compute_dtype
from lightning_uora.adapters.kinds import CONVOLUTIONS, Part, has_plain_forward
from lightning_uora.adapters.projections import Projections
from lightning_uora.distributed import first_rank

__all__ = [
    "AdaptedModule",
    "Adapter",
    "adapted_modules",
    "facts",
]


@dataclass
class Adapter:
    """What a specialised module knows besides its parameters. Refers to the owner without registering it."""

    owner: Projections
    parts: dict[str, Part]
    index: int
    cache: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    held: dict[str, Tensor] | None = None
    sharded: bool = False  # the weight was seen as a DTensor

    @property
    def m(self) -> int:
        """Length of b."""
        return sum(part.m for part in self.parts.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}, "held": None}


# Note [When the effective weight is kept]
# With gradients it is built for each read: its graph belongs to one backward. Without gradients and outside
# of training it is built once and kept until a source changes, which identity, data pointer and version
# counter tell; `.data` writes move none of them, so train(), eval() and casts drop what was kept as well. It
# is built outside inference mode: a tensor made inside could not be used by autograd later. In training
# without gradients (reentrant checkpointing) nothing is kept, because it would hold a second copy of every
# adapted weight. Nor is anything kept of sharded weights: FSDP2 gathers them into the same memory without
# moving a version, and whole copies are what sharding is to avoid.

# Note [Sharded weights]
# FSDP2 replaces parameters by DTensors and puts whole ones in their place around each forward. It reads the
# attribute to find its shards again, so the property returns the DTensor itself; a forward that still meets
# one belongs to another way of sharding (tensor parallelism), which would lose the adapter without a word.


class AdaptedModule(nn.Module):
    """Mixed in front of a module's own class by :func:`~lightning_uora.adapters.specialise.specialise`.

    Attributes:
        uora_d: (r,) float32, trainable.
        uora_b: (m,) float32, trainable.
    """

    uora_d: nn.Parameter
    uora_b: nn.Parameter
    _uora: Adapter

    @property
    def adapted_parts(self) -> tuple[Part, ...]:
        """The adapted parameters of this module, in the order of their rows in b."""
        return tuple(self._uora.parts.values())

    @property
    def layer_index(self) -> int:
        """Place of this module among the adapted ones; names its own projections (``A_768_3``)."""
        return self._uora.index

    @property
    def original_class(self) -> type[nn.Module]:
        """The module's class before it was adapted."""
        return cast("type[nn.Module]", type(self).uora_original)  # type: ignore[attr-defined]

    def delta_weight(self) -> Tensor:
        """The update ``diag(b) B diag(d) A``, shaped like the adapted weight, differentiable in d and b.

        For ``nn.MultiheadAttention`` with separate projection weights, the updates of q, k and v beside each
        other: (embed_dim, embed_dim + kdim + vdim).
        """
        deltas = []
        for name, part in self._uora.parts.items():
            W = cast(Tensor, self._parameters[name])
            deltas.append(part.delta(torch.zeros_like(W), *self._uora_tensors(part.n)))
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)

    def merged_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each adapted parameter with its effective weight, computed in float32 at least."""
        for name, part in self._uora.parts.items():
            W = cast(nn.Parameter, self._parameters[name])
            wide = torch.promote_types(W.dtype, torch.float32)
            tensors = (t.to(wide) for t in (W, *self._uora_tensors(part.n)))
            yield W, part.delta(*tensors).to(W.dtype)

    def form(self, tokens: int) -> Literal["merged", "factored"]:
        """How this module computes in training for an input of that many rows."""
        return "merged"

    def _uora_tensors(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (of width n), B, d, b of this module."""
        owner, index = self._uora.owner, self._uora.index
        return owner.down(n, index), owner.up(self._uora.m, index), self.uora_d, self.uora_b

    def _uora_weight(self, name: str) -> Tensor | None:
        """What reading the adapted parameter returns, see Note [When the effective weight is kept]."""
        W, adapter = self._parameters[name], self._uora
        if isinstance(W, DTensor):  # see Note [Sharded weights]
            adapter.sharded = True
            return W
        if W is None or adapter.owner.disabled:
            return W
        if adapter.held is not None and name in adapter.held:
            return adapter.held[name]
        part = adapter.parts[name]
        if self.training and adapter.owner.config.dropout > 0.0 and first_rank():
            warnings.warn(
                f"{name} of a {type(self).__name__} is read directly: dropout is not applied there.",
                stacklevel=3,
            )
        sources = (W, *self._uora_tensors(part.n))
        if self._uora_keeps():
            return self._uora_kept(part, sources)
        if self._uora_needs_grad():
            adapter.owner.require_calibrated("training")
        weight = part.delta(*sources)
        if adapter.owner.gradients is not None and weight.requires_grad:
            _collect_gradient(weight, adapter, name)
        if adapter.held is not None:
            adapter.held[name] = weight
        return weight

    def _uora_keeps(self) -> bool:
        """Whether an effective weight made now may be kept for later reads."""
        busy = self.training or torch.compiler.is_compiling() or self._uora_needs_grad()
        return not (busy or self._uora.sharded)

    def _uora_needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(
            p is not None and p.requires_grad
            for p in map(self._parameters.get, (*self._uora.parts, "uora_d", "uora_b"))
        )

    def _uora_kept(self, part: Part, sources: tuple[Tensor, ...]) -> Tensor:
        try:
            dtype = compute_dtype(sources[0].device, sources[0].dtype)
            key = (dtype, *((t.data_ptr(), t._version) for t in sources))
        except RuntimeError:  # inference tensors have no version, functorch's and fake ones no pointer
            return part.delta(*sources)
        kept = self._uora.cache.get(part.name)
        if kept is not None and kept[0] == key and all(a is b for a, b in zip(kept[1], sources, strict=True)):
            weight, version = cast("tuple[Tensor, int]", kept[2:])
            if weight._version == version:
                return weight
        with torch.inference_mode(False), torch.no_grad():
            weight = part.delta(*sources)
        self._uora.cache[part.name] = (key, sources, weight, weight._version)
        return weight

    @override
    def train(self, mode: bool = True) -> AdaptedModule:
        self._uora.cache.clear()
        super().train(mode)
        return self

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdaptedModule:
        """As in torch, but d and b move without being cast; coming from ``meta`` they are set afresh."""
        holder = nn.Module()
        holder._parameters = {name: self._parameters.pop(name) for name in ("uora_d", "uora_b")}
        was_meta = any(p is not None and p.is_meta for p in holder._parameters.values())
        self._uora.cache.clear()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

            def keep_dtype(t: Tensor) -> Tensor:
                moved: Tensor = fn(t)
                return moved if moved.dtype == t.dtype else t.to(moved.device)

            holder._apply(keep_dtype)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(holder._parameters)
        if was_meta and not self.uora_d.is_meta:
            self._uora_reset()
        return self

    def _uora_reset(self) -> None:
        with torch.no_grad():
            self.uora_d.fill_(self._uora.owner.config.d_init)
            self.uora_b.zero_()

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (_, *args), *rest = cast("tuple[Any, ...]", super().__reduce_ex__(2))
        revive = type(self).uora_revive  # type: ignore[attr-defined]
        return revive, (self.original_class, tuple(self._uora.parts), *args), *rest

    @override
    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}uora_rank={self._uora.owner.config.rank}"


def _collect_gradient(weight: Tensor, adapter: Adapter, name: str) -> None:
    """Add dL/dW_eff of the coming backward to what the owner collects."""
    gradients, key = adapter.owner.gradients, (adapter.index, name)

    def add(G: Tensor) -> None:
        if gradients is not None:
            gradients[key] = gradients[key] + G.float() if key in gradients else G.float()

    weight.register_hook(add)  # type: ignore[no-untyped-call]


def facts(module: AdaptedModule) -> dict[str, Any]:
    """What an export or a merge has to know of an adapted module besides its numbers, as plain data."""
    cls = module.original_class
    convolution = cls in CONVOLUTIONS
    direct = not convolution or (
        module.groups == 1
        and set(cast("tuple[int]", module.dilation)) == {1}
        and module.padding_mode == "zeros"
    )
    return {
        "kind": cls.__name__,
        "product": has_plain_forward(cls) or convolution,  # nothing but a product with the weight
        "direct": direct,  # for convolutions: ungrouped, undilated, padded with zeros
        "kernel": list(cast(Tensor, module._parameters["weight"]).shape[2:]) if convolution else [],
        "parts": [[p.name, p.row, p.m, p.n, p.transposed] for p in module.adapted_parts],
    }


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """(name, module) of every adapted module, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module
