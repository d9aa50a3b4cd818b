"""Adapted modules: a module keeps its object, parameters, names and hooks; its class changes.

The generated subclass turns the adapted parameter (``weight``, or ``in_proj_weight`` of
``nn.MultiheadAttention``) into a property that returns the effective weight. Whoever reads it sees the
adapter: the module's own forward, fused evaluation paths, blocks that call ``F.linear(x, self.qkv.weight)``,
user code. The parameter itself stays in ``_parameters`` under its name, so state dicts, optimizers and
``named_parameters`` see the frozen base.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_uora.adapters.effective import EffectiveWeight, effective, mixed_weight
from lightning_uora.adapters.freshness import Kept, keepable
from lightning_uora.adapters.functional import compute_dtype
from lightning_uora.adapters.kinds import CONVOLUTIONS, Part, has_plain_forward
from lightning_uora.adapters.offloaded import HOOK, is_offloaded, kept_elsewhere, runs_on, sees_vectors
from lightning_uora.adapters.opaque import is_opaque
from lightning_uora.adapters.own_rows import Own
from lightning_uora.adapters.projections import Projections
from lightning_uora.adapters.stacked import home
from lightning_uora.adapters.watching import Handed
from lightning_uora.distributed import first_rank

DETACH_FIRST = "call detach_uora(model, merge=True) first"

__all__ = [
    "AdaptedModule",
    "Adapter",
    "adapted_modules",
    "facts",
    "this_thread",
]


@dataclass
class Adapter:
    """What a specialised module knows besides its parameters. Refers to the owner without registering it.

    Attributes:
        owner: Of A and B.
        parts: The adapted parameters by name.
        index: Place among the owner's layers.
        cache: Effective weights kept without gradients, see Note [When the effective weight is kept].
        held: Effective weights of the forward that runs, by thread.
        handed: Effective weights that somebody may write to, by part.
        base: The adapted parameters as they were last read.
        put_out: Of a quantised layer, the dtype of its first output.
        sharded: The weight was seen as a DTensor.
        raw: Reads and assignments of the adapted parameters are of the base (a state dict's, a hook's).
        before: Attributes of a quantised module as they were.
        norm: Of a quantised weight, once it was asked for.
        in_block: Of experts in a mixed batch: it computes, though its owner is switched off.
        mixing: Its module computes in a mixed batch, see Note [Weights in a mixed batch].
        reading: There its own forward runs.
    """

    owner: Projections
    parts: dict[str, Part]
    index: int
    cache: dict[str, Kept] = field(default_factory=dict)
    held: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    handed: dict[str, Handed] = field(default_factory=dict)
    base: dict[str, nn.Parameter] = field(default_factory=dict)
    put_out: torch.dtype | None = None
    sharded: bool = False
    raw: bool = False
    before: dict[str, Any] = field(default_factory=dict)
    norm: Tensor | None = None
    in_block: bool = False
    mixing: bool = False
    reading: int = 0

    @property
    def m(self) -> int:
        """Length of b."""
        return sum(part.m for part in self.parts.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}, "held": {}, "handed": {}, "base": {}}

    def settle(self) -> None:
        """Hand on what was written to effective weights, see Note [Who writes to an effective weight]."""
        if not torch.compiler.is_compiling():
            for handed in list(self.handed.values()):
                handed.settle()

    def forget(self) -> None:
        """The same, and keep none."""
        self.settle()
        self.cache.clear()

    @property
    def holding(self) -> dict[str, Tensor] | None:
        """Effective weights of this thread's forward; None where none runs."""
        return self.held.get(this_thread()) if self.held else None


def this_thread() -> int:
    """Of a forward; compilers know one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


# Note [Sharded weights]
# FSDP2 replaces parameters by DTensors and puts whole ones in their place around each forward. It reads the
# attribute to find its shards again, so the property returns the DTensor itself; a forward that still meets
# one belongs to another way of sharding (tensor parallelism), which would lose the adapter without a word.


class AdaptedModule(nn.Module):
    """Mixed in front of a module's own class by :func:`~lightning_uora.adapters.specialise.specialise`.

    Attributes:
        uora_d: (r,) float32, trainable; (E, r) of experts.
        uora_b: (m,) float32, trainable; (E, m) of experts.
    """

    uora_d: nn.Parameter
    uora_b: nn.Parameter
    _uora: Adapter

    @property
    def home(self) -> nn.Module:
        """The module that holds the base parameters: this one, but of experts."""
        return home(self)

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
            W = cast(Tensor, self.home._parameters[name])
            zeros = torch.zeros_like(W, device=self.uora_d.device)
            deltas.append(part.delta(zeros, *self._uora_sources(part.n)))
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)

    def merged_weights(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Each adapted parameter by name with its effective weight, computed in float32 at least."""
        self._uora.forget()
        for name, part in self._uora.parts.items():
            W = cast(nn.Parameter, self.home._parameters[name])
            wide = torch.promote_types(W.dtype, torch.float32)
            A, B, d, b = (t.to(wide) for t in self._uora_tensors(part.n))
            yield name, W, part.delta(W.to(wide), A, B, d, b).to(W.dtype)

    def form(self, tokens: int) -> Literal["merged", "factored"]:
        """How this module computes in training for an input of that many rows."""
        return "merged"

    def _uora_tensors(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (of width n) and B as this module has them, d, b."""
        A, B, d, b, own = self._uora_sources(n)
        return own.down(A), own.up(B), d, b

    def _uora_sources(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Own]:
        """A (of width n) and B, shared or its own, d, b, and what stands for rows and columns here."""
        owner, index, device = self._uora.owner, self._uora.index, self.uora_d.device
        if HOOK in self.__dict__ and sees_vectors(self) and self._uora_needs_grad():
            raise ValueError(
                f"module {owner.adapted[index]!r} was offloaded after its adapter was attached, so what "
                "it learns would be lost; call attach_uora or load_adapter after dispatch_model and "
                "cpu_offload."
            )
        A, B, own = owner.sources(n, self._uora.m, index)
        if A.device != device or B.device != device:
            A, B, *mine = owner.found_on(device, A, B, *own)
            own = Own(*mine)
        return A, B, self.uora_d, self.uora_b, own

    def _uora_weight(self, name: str) -> Tensor | None:
        """What reading the adapted parameter returns, see Note [When the effective weight is kept]."""
        W, adapter = self._parameters[name], self._uora
        adapter.settle()
        if isinstance(W, DTensor):  # see Note [Sharded weights]
            adapter.sharded = True
            return W
        if W is None or adapter.owner.disabled or adapter.raw:
            stray = W is not None and adapter.mixing and not (adapter.raw or adapter.reading)
            return mixed_weight(W, adapter.owner.adapted[adapter.index]) if W is not None and stray else W
        if W.numel() != adapter.parts[name].m * adapter.parts[name].n and not adapter.sharded:
            self._uora_refuse_shape(name, W)
        adapter.base[name] = W
        held = adapter.holding
        if held is not None and name in held:
            return held[name]
        part = adapter.parts[name]
        if self.training and adapter.owner.config.dropout > 0.0 and first_rank():
            warnings.warn(
                f"{name} of a {type(self).__name__} is used without dropout, because its weight is read "
                "without calling the layer; set dropout=0.0.",
                stacklevel=3,
            )
        sources = (W, *self._uora_sources(part.n))
        if self._uora_keeps():
            return self._uora_kept(part, sources)
        if self._uora_needs_grad():
            adapter.owner.require_calibrated("training")
        weight = _lasting(part, sources)
        if adapter.owner.gradients is not None and weight.requires_grad:
            _collect_gradient(weight, adapter, name)
        if keepable(W):  # nobody looks on
            weight = self._uora_hand(name, weight)
        if held is not None:
            held[name] = weight
        return weight

    def _uora_refuse_shape(self, name: str, W: Tensor) -> None:
        part = self._uora.parts[name]
        raise ValueError(
            f"{name} of an adapted {self.original_class.__name__} was {part.m} x {part.n} and is now "
            f"{tuple(W.shape)}; {DETACH_FIRST}, then change it."
        )

    def _uora_keeps(self) -> bool:
        """Whether an effective weight made now may be kept for later reads."""
        busy = self.training or self._uora_needs_grad() or self._uora.sharded or is_offloaded(self.home)
        return not busy and keepable(self.uora_d)

    def _uora_needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(
            p is not None and p.requires_grad
            for p in (self.uora_d, self.uora_b, *map(self.home._parameters.get, self._uora.parts))
        )

    def _uora_kept(self, part: Part, sources: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Own]) -> Tensor:
        *given, own = sources
        tensors = (*given, *own.tensors)
        dtype = compute_dtype(tensors[0].device, tensors[0].dtype)
        kept = self._uora.cache.get(part.name)
        if kept is not None and (weight := kept.fresh(dtype, tensors)) is not None:
            return weight
        made = Kept.of(dtype, tensors)
        with torch.inference_mode(False), torch.no_grad():
            weight = self._uora_hand(part.name, part.delta(*sources))
        if made is None:
            return weight
        made.hold(weight, weight.uora_watch)
        self._uora.cache[part.name] = made
        return weight

    def _uora_hand(self, name: str, weight: Tensor) -> EffectiveWeight:
        """``weight`` as one that can be written to, see Note [Writing to an effective weight]."""
        handed = self._uora.handed.get(name)
        if handed is None:
            handed = self._uora.handed[name] = Handed(self, name)
        return effective(weight, handed.watch(weight))

    def _uora_write(self, name: str, written: Tensor) -> None:
        """See Note [Writing to an effective weight]."""
        W = cast(nn.Parameter, self.home._parameters[name])
        with torch.inference_mode(W.is_inference()), torch.no_grad():
            W.copy_(self._uora_base(name, written))
        self._uora.cache.clear()

    def _uora_base(self, name: str, weight: Tensor) -> Tensor:
        """The base with which ``weight`` is the effective one."""
        part = self._uora.parts[name]
        with torch.no_grad():
            wide = torch.promote_types(weight.dtype, torch.float32)
            values = weight.detach().as_subclass(Tensor).to(self.uora_b.device, wide)
            A, B, d, b = (t.to(wide) for t in self._uora_tensors(part.n))
            return part.delta(values, A, B, d, -b)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning the adapted parameter: what was assigned reads back, or it is an error."""
        adapter = self.__dict__.get("_uora")
        if adapter is None or name not in adapter.parts:
            super().__setattr__(name, value)
        elif adapter.raw or adapter.sharded or isinstance(value, DTensor):
            adapter.sharded = adapter.sharded or isinstance(value, DTensor)
            self._parameters[name] = value
        elif value is not self._parameters[name]:
            self._uora_assign(name, value)

    def _uora_assign(self, name: str, value: Any) -> None:
        old = self.home._parameters[name]
        self._uora.forget()
        if _is_of(value, self._uora.handed.get(name)) and old is not None and value.shape == old.shape:
            if not torch.equal(value, getattr(self, name)):  # of `layer.weight += 1`
                self._uora_write(name, value)
            return
        if value is not None and not isinstance(value, nn.Parameter):
            super().__setattr__(name, value)  # torch says what it takes
        if old is None or value is None or value.shape != old.shape:
            shape = f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
            raise ValueError(
                f"{name} of an adapted {self.original_class.__name__} can only be set to an nn.Parameter "
                f"of its shape {tuple(getattr(old, 'shape', ()))}, not to a {shape}; {DETACH_FIRST}."
            )
        if not value.is_meta and not self.uora_b.is_meta and bool(self.uora_b.any()):
            value = nn.Parameter(self._uora_base(name, value).to(value.dtype))
        elif isinstance(value, EffectiveWeight):
            value = nn.Parameter(value.detach().as_subclass(Tensor))
        self.home._parameters[name] = value.requires_grad_(old.requires_grad)
        self._uora.cache.clear()

    def __delattr__(self, name: str) -> None:
        """Parametrisations and spectral norm take the parameter away."""
        if name in self._uora.parts:
            self._uora_refuse(name)
        super().__delattr__(name)

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; pruning and weight norm put others in the place of the adapted one."""
        adapter: Adapter | None = self.__dict__.get("_uora")
        if adapter is None:
            super().register_parameter(name, param)
            return
        for part in adapter.parts:
            if name in (f"{part}_orig", f"{part}_g", f"{part}_v"):
                if part not in self._parameters:  # taken away by hand: put back, in its place
                    others = dict(self._parameters)
                    self._parameters.clear()
                    self._parameters.update({part: adapter.base.get(part), **others})
                self._uora_refuse(part)
        super().register_parameter(name, param)

    def _uora_refuse(self, name: str) -> None:
        raise ValueError(
            f"{name} of an adapted {self.original_class.__name__} cannot be parametrised, pruned or removed: "
            f"{DETACH_FIRST}, or do it before attach_uora and exclude the layer."
        )

    @override
    def train(self, mode: bool = True) -> AdaptedModule:
        self._uora.forget()
        super().train(mode)
        return self

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdaptedModule:
        """As in torch, but d and b move without being cast; coming from ``meta`` they are set afresh."""
        self._uora.forget()
        holder = nn.Module()
        holder._parameters = {name: self._parameters.pop(name) for name in ("uora_d", "uora_b")}
        was_meta = any(p is not None and p.is_meta for p in holder._parameters.values())
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

    @override
    def _save_to_state_dict(self, *args: Any) -> None:
        """A state dict holds the base, with what was written to it."""
        self._uora.forget()
        super()._save_to_state_dict(*args)

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A state dict holds the base. With ``assign=True`` a module on ``meta`` gets storage here."""
        self._uora.forget()
        self._uora.raw = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._uora.raw = False
        device = self._uora_device()
        if device is not None and self.uora_d.is_meta and device.type != "meta":
            for name in ("uora_d", "uora_b"):
                old = cast(nn.Parameter, self._parameters[name])
                self._parameters[name] = nn.Parameter(torch.empty_like(old, device=device), old.requires_grad)
            self._uora_reset()

    def _uora_device(self) -> torch.device | None:
        """Where the base is."""
        W = self.home._parameters[next(iter(self._uora.parts))]
        return None if W is None else runs_on(self.home, W)

    def base_norm(self) -> Tensor:
        """Frobenius norm of the frozen weight."""
        self._uora.forget()
        norms = []
        for name in self._uora.parts:
            kept = kept_elsewhere(self.home, name)
            W = cast(Tensor, self.home._parameters[name] if kept is None else kept)
            norms.append(torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32)))
        norm: Tensor = torch.stack(norms).norm()
        return norm

    def update_norm(self) -> Tensor:
        """Frobenius norm of the update."""
        norm: Tensor = self.delta_weight().float().norm()
        return norm

    def _uora_reset(self) -> None:
        with torch.no_grad():
            self.uora_d.fill_(self._uora.owner.config.d_init)
            self.uora_b.zero_()

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (_, *args), *rest = cast("tuple[Any, ...]", super().__reduce_ex__(2))
        revive = type(self).uora_revive  # type: ignore[attr-defined]
        return revive, (self.original_class, type(self).uora_names, *args), *rest  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` asks first."""
        raise ValueError(
            f"torch.jit.script cannot compile an adapted {self.original_class.__name__}; {DETACH_FIRST}, or "
            "use torch.jit.trace or torch.export."
        )

    @override
    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}uora_rank={self._uora.owner.config.rank}"


def _lasting(part: Part, sources: tuple[Any, ...]) -> Tensor:
    """The effective weight; in inference mode a tensor with a version, by which a write shows."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return part.delta(*sources)
    with torch.inference_mode(False), torch.no_grad():
        return part.delta(*sources)


def _is_of(value: Any, handed: Handed | None) -> bool:
    """Whether an effective weight was read from there."""
    own = isinstance(value, EffectiveWeight) and not isinstance(value, nn.Parameter)
    return own and handed is not None and value.uora_watch.handed is handed


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
        "product": has_plain_forward(cls)
        or convolution
        or module.home is not module
        or is_opaque(module),  # nothing but a product with the weight
        "direct": direct,  # for convolutions: ungrouped, undilated, padded with zeros
        "kernel": list(cast(Tensor, module._parameters["weight"]).shape[2:]) if convolution else [],
        "parts": [[p.name, p.row, p.m, p.n, p.transposed] for p in module.adapted_parts],
        **_of_experts(module),
    }


def _of_experts(module: AdaptedModule) -> dict[str, Any]:
    """Their number, and whether their home says that their weights are transposed."""
    if module.home is module:
        return {}
    told = bool(getattr(module.home, "is_transposed", False))
    return {"experts": module.adapted_parts[0].experts, "is_transposed": told}


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """(name, module) of every adapted module, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module
