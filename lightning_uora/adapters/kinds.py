"""Kinds of modules that can be adapted, and which of their parameters an adapter changes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from lightning_uora.adapters.functional import add_delta
from lightning_uora.adapters.opaque import is_opaque, sizes, unreachable
from lightning_uora.adapters.own_rows import NOTHING, Own
from lightning_uora.adapters.stacked import Experts, stacks_in, unreadable

__all__ = ["Part", "has_plain_forward", "is_linear_like", "is_supported", "key_of", "named_parts"]
__all__ += ["unsupported"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUPPORTED = (
    "nn.Linear (quantised too), nn.Conv1d/2d/3d, transformers' Conv1D, nn.MultiheadAttention and experts' "
    "weights"
)


@dataclass(frozen=True)
class Part:
    """One adapted parameter of a module: its name, its rows among the module's m, its size read as (m, n).

    With ``experts`` it has a leading axis of that length, and so have d (E, r) and b (E, m).
    """

    name: str
    row: int
    m: int
    n: int
    transposed: bool = False
    experts: int = 0

    def delta(self, W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, own: Own = NOTHING) -> Tensor:
        """``W`` plus this part's share of the update, in the layout of ``W``."""
        if self.experts:
            one = replace(self, experts=0)
            each = zip(W.unbind(), d.unbind(), b.unbind(), strict=True)
            return torch.stack([one.delta(Wi, A, B, di, bi, own) for Wi, di, bi in each])
        B, own = own.part(B, self.row, self.m)
        b = b[self.row : self.row + self.m]
        if self.transposed:
            return add_delta(W.t(), A, B, d, b, own).t()
        return add_delta(W, A, B, d, b, own)


def key_of(name: str, part: Part) -> str:
    """The adapted parameter's key in a state dict; experts' layers are called as their parameter."""
    return name if part.experts else f"{name}.{part.name}".lstrip(".")


def _conv1d_class() -> type[nn.Module] | None:
    """Transformers' ``Conv1D`` if that module is loaded; if not, no model can hold one."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_linear_like(module: nn.Module) -> bool:
    """``nn.Linear`` and its subclasses, transformers' ``Conv1D``, and quantised layers."""
    conv1d = _conv1d_class()
    known = isinstance(module, nn.Linear) or (conv1d is not None and isinstance(module, conv1d))
    return known or is_opaque(module)


def is_supported(module: nn.Module) -> bool:
    """Whether the kind of module can be adapted (its weight may still be of an unsupported sort)."""
    return is_linear_like(module) or isinstance(module, (*CONVOLUTIONS, nn.MultiheadAttention, Experts))


def _part_names(module: nn.Module) -> tuple[str, ...]:
    if not isinstance(module, nn.MultiheadAttention):
        return ("weight",)
    return (
        ("in_proj_weight",)
        if module._qkv_same_embed_dim
        else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    )


def named_parts(module: nn.Module) -> dict[str, Part]:
    """The parameters of ``module`` that an adapter changes, with their place in b."""
    if is_opaque(module):
        return {"weight": Part("weight", 0, *sizes(module))}
    if isinstance(module, Experts):
        count, m, n = cast(Tensor, module.host._parameters[module.leaf]).shape
        turned = bool(stacks_in(module.host)[module.leaf])
        m, n = (n, m) if turned else (m, n)
        return {module.leaf: Part(module.leaf, 0, m, n, turned, count)}
    parts, row = {}, 0
    for name in _part_names(module):
        shape = cast(Tensor, module._parameters[name]).shape
        transposed = is_linear_like(module) and not isinstance(module, nn.Linear)
        m, n = (shape[1], shape[0]) if transposed else (shape[0], shape[1:].numel())
        parts[name] = Part(name, row, m, n, transposed)
        row += m
    return parts


def unsupported(name: str, module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted, as a sentence that names it; None when it can."""
    kind = type(module).__name__
    if hasattr(module, "uora_d"):
        return (
            f"module {name!r} is already adapted; leave it out with exclude_modules, call detach_uora first, "
            "or train another adapter on the same layers with adapter_name."
        )
    if not is_supported(module):
        return f"module {name!r} is a {kind}; UORA adapts {SUPPORTED}. Choose other target_modules."
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"module {name!r} ({kind}) is parametrised; remove its parametrisations first or exclude it."
    if is_opaque(module):
        return unreachable(name, module)
    if isinstance(module, Experts) and (reason := unreadable(name, module)) is not None:
        return reason
    for expected in _part_names(module):
        W = module._parameters.get(expected)
        what = f"{expected} of module {name!r} ({kind})"
        if W is None:
            return f"{what} is not a plain parameter (weight-normed or quantised?); exclude the module."
        reason = _unsupported_weight(what, W)
        if reason is not None:
            return reason
    return None


def _unsupported_weight(what: str, W: Tensor) -> str | None:
    if isinstance(W, UninitializedParameter):
        return f"{what} has no shape yet; run one batch through the lazy module first."
    if isinstance(W, DTensor) or hasattr(W, "ds_id"):
        return f"{what} is sharded; call attach_uora before the model is sharded."
    if not W.is_floating_point() or W.element_size() < 2:
        return f"{what} has dtype {W.dtype} (quantised?); UORA needs a float of 16 bits or more. Exclude it."
    if W.numel() == 0:
        return f"{what} is empty, shape {tuple(W.shape)}; exclude it."
    return None


def has_plain_forward(cls: type[nn.Module]) -> bool:
    """Whether the class computes the plain product, which the factored form may stand in for."""
    conv1d = _conv1d_class()
    return cls.forward is nn.Linear.forward or (conv1d is not None and cls.forward is conv1d.forward)
