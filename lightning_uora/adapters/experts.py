"""Adapted experts: the layer that holds a parameter's vectors, and its home, which reads through it."""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_uora.adapters.kinds import Part
from lightning_uora.adapters.layers import AdaptedModule
from lightning_uora.adapters.stacked import Experts
from lightning_uora.adapters.stand_in import ExpertsWeight
from lightning_uora.distributed import first_rank

__all__ = ["AdaptedExperts", "leave", "settle_in"]

_HOMES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


class AdaptedExperts(AdaptedModule):
    """The vectors of one parameter of experts, d (E, r) and b (E, m); see Note [Experts as layers].

    It is a child of the module that has the parameter, under the parameter's own name, and never called.
    """

    host: nn.Module
    leaf: str

    def picked(self, index: int | Tensor | None) -> tuple[Any, ...]:
        """Part, A, B, d, b and own rows of one expert, several, or all."""
        (part,) = self.adapted_parts
        A, B, D, b, own = self._uora_sources(part.n)
        if index is None:
            return part, A, B, D, b, own
        one = part if isinstance(index, Tensor) else Part(part.name, 0, part.m, part.n, part.transposed)
        return one, A, B, D[index], b[index], own

    @property
    def off(self) -> bool:
        """Whether the base alone computes."""
        return self._uora.owner.disabled > 0 and not self._uora.in_block

    @property
    def factors(self) -> bool:
        """Whether products are factored; and whoever wants a gradient may have one."""
        if self._uora_needs_grad() and not self.off:
            self._uora.owner.require_calibrated("training")
        return self._uora.owner.config.compute != "merged" or self.dropping or self.off

    @property
    def dropping(self) -> bool:
        """Whether the input of products drops out."""
        return self._uora.owner.config.dropout > 0.0 and self.home.training

    def dropped(self, x: Tensor) -> Tensor | None:
        """What the adapter sees of x where it drops out."""
        return nn.functional.dropout(x, self._uora.owner.config.dropout) if self.dropping else None

    def warn_of_dropout(self) -> None:
        """Where the weight is built."""
        if self.dropping and first_rank():
            warnings.warn(
                f"{self.leaf} of a {type(self.host).__name__} is used without dropout, because its weight "
                "is built whole; set dropout=0.0.",
                stacklevel=4,
            )

    def saw(self, x: Tensor) -> None:
        """Tell who observes which inputs the experts receive."""
        told = self._uora.owner.on_input
        if told is not None:
            told(self, x)

    def write(self, index: int | Tensor | None, written: Tensor) -> None:
        """Change the base so that ``written`` reads back."""
        part, *sources = self.picked(index)
        with torch.no_grad():
            A, B, d, b, own = sources
            wide = torch.promote_types(written.dtype, torch.float32)
            values = written.detach().as_subclass(Tensor).to(b.device, wide)
            base = part.delta(values, A.to(wide), B.to(wide), d, -b, own.to(wide))
            W = cast(Tensor, self.host._parameters[self.leaf])
            W[slice(None) if index is None else index] = base.to(W.dtype)

    @override
    def _uora_weight(self, name: str) -> Any:
        W, adapter = self.host._parameters[name], self._uora
        if isinstance(W, DTensor):  # see Note [Sharded weights]
            adapter.sharded = True
            return W
        if W is None or adapter.raw or (self.off and adapter.owner.on_input is None):
            return W
        part = adapter.parts[name]
        if W.numel() != part.experts * part.m * part.n and not adapter.sharded:
            self._uora_refuse_shape(name, W)
        adapter.base[name] = W
        if self.uora_d.is_meta and not W.is_meta:
            raise ValueError(
                f"experts {adapter.owner.adapted[adapter.index]!r} were offloaded after their adapter was "
                "attached, which took its vectors away; call attach_uora or load_adapter after "
                "dispatch_model and cpu_offload."
            )
        read = ExpertsWeight(self, W, None, part.transposed)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return read.built()  # a stand-in is nothing that a compiler knows
        return read

    @override
    def update_norm(self) -> Tensor:
        """One expert after the other: (r, r) products instead of a weight."""
        (part,) = self.adapted_parts
        A, B, D, b, own = self._uora_sources(part.n)
        A, B = own.down(A).float(), own.up(B).float()
        inner, squares = A @ A.t(), []
        for d, scale in zip(D, b, strict=True):
            up = B * scale[:, None]
            squares.append(((up.t() @ up) * (d[:, None] * inner * d)).sum())
        return torch.stack(squares).sum().clamp(min=0.0).sqrt()

    @override
    def form(self, tokens: int) -> Literal["merged", "factored"]:
        return "merged" if self._uora.owner.config.compute == "merged" else "factored"

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        super(AdaptedModule, self).__setattr__(name, value)


class Home(nn.Module):
    """Mixed in front of the class of a module that has adapted experts."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning an adapted parameter: what was assigned reads back, or it is an error."""
        layer = self._modules.get(name)
        if not isinstance(layer, AdaptedExperts):
            super().__setattr__(name, value)
        elif layer._uora.raw or layer._uora.sharded or isinstance(value, DTensor):
            layer._uora.sharded = layer._uora.sharded or isinstance(value, DTensor)
            self._parameters[name] = value
        elif isinstance(value, ExpertsWeight):
            raise ValueError(
                f"{name} of adapted experts can only be set to an nn.Parameter, not to what you read from it."
            )
        elif value is not self._parameters[name]:
            layer._uora_assign(name, value)

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A state dict holds the base."""
        layers = [layer for layer in self._modules.values() if isinstance(layer, AdaptedExperts)]
        for layer in layers:
            layer._uora.raw = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            for layer in layers:
                layer._uora.raw = False

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (_, *args), *rest = cast("tuple[Any, ...]", super().__reduce_ex__(2))
        told = type(self).uora_original, type(self).uora_leaves  # type: ignore[attr-defined]
        return _new, (*told, *args), *rest

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` asks first."""
        raise ValueError(
            "torch.jit.script cannot compile adapted experts; call detach_uora(model, merge=True) first."
        )


def _new(cls: type[nn.Module], leaves: tuple[str, ...], *args: Any) -> nn.Module:
    """Unpickle: an empty instance, whose state follows."""
    made = _home_class(cls, leaves)
    return made.__new__(made, *args)


def _home_class(cls: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``cls`` whose parameters of these names read through their layers."""
    if (cls, leaves) not in _HOMES:
        body: dict[str, Any] = {leaf: _weight_property(leaf) for leaf in leaves}
        body.update(__module__=cls.__module__, __doc__=cls.__doc__, uora_original=cls, uora_leaves=leaves)
        _HOMES[cls, leaves] = type(f"UORA{cls.__name__}", (Home, cls), body)
    return _HOMES[cls, leaves]


def _weight_property(leaf: str) -> property:
    def read(self: nn.Module) -> Any:
        return cast(AdaptedExperts, self._modules[leaf])._uora_weight(leaf)

    return property(read, doc=f"Effective {leaf}: the frozen parameter plus the adapter's update.")


def settle_in(layer: Experts) -> None:
    """Put an adapted layer into its home, which reads through it from now on."""
    del layer._parameters["weight"]
    host = layer.host
    host._modules[layer.leaf] = layer
    original, leaves = _before(host)
    host.__class__ = _home_class(original, (*leaves, layer.leaf))


def leave(layer: Experts) -> None:
    """Undo :func:`settle_in`."""
    host = layer.host
    del host._modules[layer.leaf]
    original, leaves = _before(host)
    left = tuple(leaf for leaf in leaves if leaf != layer.leaf)
    host.__class__ = _home_class(original, left) if left else original
    layer.register_parameter("weight", host._parameters[layer.leaf])


def _before(host: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    cls: Any = type(host)
    return (cls.uora_original, cls.uora_leaves) if isinstance(host, Home) else (cls, ())
