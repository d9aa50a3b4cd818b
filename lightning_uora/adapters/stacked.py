"""Experts' weights: many linear maps in one parameter with a leading axis, seen as a layer of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_uora.adapters.names import named_modules
from lightning_uora.adapters.opaque import is_quantised

__all__ = ["Experts", "active_experts", "has_experts", "home", "named_layers", "routers", "stacks_in"]
__all__ += ["unreadable"]

# Note [Experts as layers]
# transformers keeps the experts of a block in parameters of three axes, `experts.gate_up_proj` (E, m, n) and
# `experts.down_proj`; some families transposed. Each such parameter is a layer here, by the parameter's name:
# `layers.0.mlp.experts.gate_up_proj`. Its vectors are d (E, r) and b (E, m); A and B are shared by its
# experts. The parameter stays where it is, in the module that its author wrote, the layer's home. (By that
# name torch's get_submodule finds the weight and not the layer; named_adapters finds the layer.)

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "n_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k", "topk")
"""What configurations call the number of experts that see one token."""
LISTS = ("experts", "expert", "moe_experts", "local_experts")
ROUTERS = frozenset(["router", "gate", "gating", "switch"])
UP = ("gate_up_proj", "up_proj", "gate_proj", "w1", "w3", "wi", "fc1", "up", "w_in")
DOWN = ("down_proj", "w2", "wo", "fc2", "down", "w_out")


class Experts(nn.Module):
    """One parameter of experts, as a layer. See Note [Experts as layers].

    Args:
        host: The module that has the parameter.
        leaf: The parameter's name there.
    """

    host: nn.Module
    leaf: str

    def __init__(self, host: nn.Module, leaf: str) -> None:
        super().__init__()
        self.__dict__["host"], self.leaf = host, leaf
        self.register_parameter("weight", host._parameters[leaf])  # until it is adapted, as of any layer


def home(module: nn.Module) -> nn.Module:
    """The module that holds a layer's base parameters."""
    return module.host if isinstance(module, Experts) else module


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by plain name, in model order, and each parameter of experts as a layer after its module."""
    found: dict[str, nn.Module] = {}
    for path, module in named_modules(model).items():
        found[path] = module
        for leaf in stacks_in(module):
            name = f"{path}.{leaf}" if path else leaf
            if leaf not in module._modules:
                found[name] = Experts(module, leaf)
    return found


def has_experts(model: nn.Module) -> bool:
    """Whether the model has experts, adapted or not."""
    return any(stacks_in(module) for module in model.modules())


def routers(modules: dict[str, nn.Module]) -> set[str]:
    """Names of the modules that choose among experts.

    In a block with experts: those with as many outputs as there are experts, or called so.
    """
    found = set()
    for name, module in modules.items():
        if isinstance(module, Experts):
            block = name.rpartition(".")[0].rpartition(".")[0]
            count: int | None = cast(Tensor, module.host._parameters[module.leaf]).shape[0]
            within = f"{name}."
        elif name.rpartition(".")[2] in LISTS:
            block, within = name.rpartition(".")[0], f"{name}."
            count = len(module) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else None
        else:
            continue
        inside = f"{block}." if block else ""
        for other, one in modules.items():
            if other.startswith(inside) and not other.startswith(within):
                called = not ROUTERS.isdisjoint(other.removeprefix(inside).split("."))
                found |= {other} if called or (count is not None and _outputs(one) == count) else set()
    return found


def _outputs(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    matrix = weight is not None and not isinstance(weight, UninitializedParameter) and weight.dim() == 2
    return getattr(module, "out_features", cast(Tensor, weight).shape[0] if matrix else None)


def stacks_in(module: nn.Module) -> dict[str, bool | None]:
    """Parameters of ``module`` that hold experts, each with whether it is (E, n, m) and not (E, m, n).

    None where that cannot be told. It is what the module says (``is_transposed``), or what follows from the
    sizes: the up projection maps from what the down projection maps to.
    """
    found = {n: p for n, p in module._parameters.items() if p is not None and not n.endswith("bias")}
    found = {n: p for n, p in found.items() if not isinstance(p, UninitializedParameter) and p.dim() == 3}
    if not found or isinstance(module, Experts) or not _holds_experts(module, next(iter(found.values()))):
        return {}
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return dict.fromkeys(found, told)
    sizes = tuple(getattr(module, name, None) for name in ("output_size", "input_size"))
    if all(isinstance(size, int) for size in sizes):
        return {name: _orientation(tuple(p.shape[1:]) == sizes, tuple(p.shape[1:]) == sizes[::-1])
                for name, p in found.items()}  # fmt: skip
    return dict.fromkeys(found, _by_sizes({name: tuple(p.shape) for name, p in found.items()}))


def _holds_experts(module: nn.Module, stack: Tensor) -> bool:
    counts = [getattr(module, name, None) for name in COUNTS]
    return stack.shape[0] in counts or "expert" in type(module).__name__.lower()


def _by_sizes(shapes: dict[str, tuple[int, ...]]) -> bool | None:
    """Transposed or not, by the sizes of an up and a down projection; None where both or neither fit."""
    up = next((shapes[name] for name in UP if name in shapes), None)
    down = next((shapes[name] for name in DOWN if name in shapes), None)
    if up is None or down is None:
        return None
    plain = up[2] == down[1] and up[1] in (down[2], 2 * down[2])
    turned = up[1] == down[2] and up[2] in (down[1], 2 * down[1])
    return _orientation(plain, turned)


def _orientation(plain: bool, turned: bool) -> bool | None:
    return turned if plain != turned else None


def unreadable(name: str, module: Experts) -> str | None:
    """Why experts cannot be adapted, as a sentence that names them; None where they can."""
    host, W = type(module.host).__name__, module.host._parameters[module.leaf]
    if W is None:
        return f"{name!r} ({host}) has no weight; exclude it with exclude_modules."
    if is_quantised(W):
        return (
            f"experts {name!r} ({host}) are quantised ({W.dtype}), and quantised experts cannot be "
            "adapted; exclude them with exclude_modules, or leave them out of the quantisation."
        )
    if stacks_in(module.host).get(module.leaf) is None:
        return (
            f"experts {name!r} ({host}) have shape {tuple(W.shape)}, which does not show which axis "
            "is which; set is_transposed on their module (False: experts, outputs, inputs), or "
            "exclude them with exclude_modules."
        )
    return None


def active_experts(module: nn.Module) -> int:
    """How many experts see one token, by the configuration of their module; 1 where it does not say."""
    host: Any = home(module)
    count = max(p.shape[0] for p in host._parameters.values() if p is not None and p.dim() == 3)
    for source in (getattr(host, "config", None), host):
        for name in CHOSEN:
            told = getattr(source, name, None)
            if isinstance(told, int) and not isinstance(told, torch.Tensor) and 0 < told <= count:
                return told
    return 1
