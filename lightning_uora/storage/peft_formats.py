"""Adapters in PEFT's formats, LoRA and VeRA: their tensors and the settings that go with them."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_uora.adapters import AdaptedModule
from lightning_uora.storage.low_rank import Loss, norm_squared, shorten

__all__ = ["USE_MERGE", "lora", "require_told_apart", "vera"]

USE_MERGE = "use detach_uora(model, merge=True), which is exact"
SERVED = 512
"""The highest rank of LoRA that vLLM takes."""
OWN_NAMES = {
    "lora": ("dropout", "A", "B", "embedding_A", "embedding_B", "magnitude_vector"),
    "vera": ("dropout", "A", "B", "lambda_d", "lambda_b"),
}
"""Of the modules that PEFT puts into an adapted one, after ``lora_`` and ``vera_``."""


def require_told_apart(heads: list[str], format: str) -> None:
    """Raise where PEFT, which goes by how names end, takes a part of its adapters for a trained module."""
    own = ("base_layer", "default", *(f"{format}_{name}" for name in OWN_NAMES[format]))
    for head in heads:
        same = next((name for name in own if name.endswith(head)), None)
        if same is not None:
            raise ValueError(
                f"PEFT would mistake its own {same!r} for the trained module {head!r}, because the names "
                f"end alike; rename the module, or {USE_MERGE}."
            )


def lora(
    adapters: dict[str, AdaptedModule], layers: dict[str, dict[str, Any]], max_rank: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], Loss | None]:
    """Tensors, settings, and what ``max_rank`` loses. Scaling is 1 in every layer: alpha is its rank."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    squares: dict[str, tuple[float, float]] = {}
    deep = _depths([name for name in adapters if layers[name].get("experts")])
    for name, module in adapters.items():
        A, B, d, b = _factors(name, module, layers[name])
        if layers[name].get("experts"):
            up, down, squares[name] = _of_experts(A, B, d, b, layers[name], max_rank)
            ranks[name] = len(down) // len(d)
            tensors[f"base_model.model.{deep[name]}.lora_A.weight"] = down
            tensors[f"base_model.model.{deep[name]}.lora_B.weight"] = up
            continue
        down, up = d[:, None] * A, b[:, None] * B
        if max_rank is not None:
            up, down, squares[name] = _at_most(max_rank, up, down)
        ranks[name] = len(down)
        kernel = layers[name]["kernel"]
        if kernel:
            down, up = down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *(1 for _ in kernel))
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    rank = max(ranks.values())
    if max_rank is None and rank > SERVED:
        warnings.warn(
            f"the exported LoRA has rank {rank}, but vLLM takes at most {SERVED}; export with "
            f"max_rank={SERVED} (`uora export --max-rank {SERVED}`) for the best approximation and "
            "its error.",
            stacklevel=5,
        )
    own = {f"^{re.escape(name)}": size for name, size in ranks.items() if size != rank}
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    patterns = {"rank_pattern": own, "alpha_pattern": own}
    if max_rank is None:
        return tensors, {**settings, **patterns}, None
    full = next(iter(adapters.values())).uora_d.shape[-1]
    shorter = sum(size < full for size in ranks.values())
    return tensors, {**settings, **patterns}, Loss.of(max_rank, shorter, squares)


# Note [Experts in PEFT]
# PEFT adapts a parameter (`target_parameters`) by a wrapper around the module that has it; the wrapper of the
# next parameter goes around that one, so the keys of the first lie deepest. A holds the experts' rows one
# expert after the other, (E r, in); of B, (out, r E), the experts' columns alternate. Which axis is "in" PEFT
# reads from `is_transposed`; where a family is transposed and does not say so, A and B change places.


def _depths(names: list[str]) -> dict[str, str]:
    """Where the wrapper of each parameter of experts is, see Note [Experts in PEFT]."""
    homes: dict[str, list[str]] = {}
    for name in names:
        homes.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: ".".join((path, *("base_layer" for _ in found[place + 1 :])))
        for path, found in homes.items()
        for place, name in enumerate(found)
    }


def _of_experts(
    A: Tensor, B: Tensor, d: Tensor, b: Tensor, layer: dict[str, Any], max_rank: int | None
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Factors of all experts as PEFT lays them out, with squared error and norm."""
    ups, downs, error, norm = [], [], 0.0, 0.0
    for scale, row in zip(b, d, strict=True):
        up, down = scale[:, None] * B, row[:, None] * A
        if layer["parts"][0][4] and not layer.get("is_transposed"):
            up, down = down.t(), up.t()
        if max_rank is not None:
            up, down, (lost, whole) = _at_most(max_rank, up, down)
            error, norm = error + lost, norm + whole
        ups.append(up)
        downs.append(down)
    return torch.stack(ups, dim=-1).flatten(1), torch.cat(downs), (error, norm)


def _at_most(max_rank: int, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Factors of at most that rank, with the squared error and the squared norm of the update."""
    norm = norm_squared(up, down)
    if len(down) <= max_rank:
        return up, down, (0.0, norm)
    up, down, error = shorten(up, down, min(max_rank, up.shape[0], down.shape[1]))
    return up, down, (error, norm)


# Note [Two names for saved projections]
# PEFT 0.21 reads base_model.vera_A; 0.19 and 0.20 ignore that name in silence and read
# base_model.vera_A.default. Both are written.


def vera(
    adapters: dict[str, AdaptedModule], layers: dict[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings. Raises for what has no A and B in common."""
    tensors: dict[str, Tensor] = {}
    shared: list[Tensor] = []
    for name, module in adapters.items():
        if layers[name]["kernel"] or layers[name].get("experts"):
            what = "is a convolution" if layers[name]["kernel"] else "holds experts"
            raise ValueError(
                f"module {name!r} {what}, which PEFT's VeRA does not support; use format='lora'."
            )
        A, B, d, b = _factors(name, module, layers[name])
        if shared and not (_same(shared[0], A) and _same(shared[1], B)):
            raise ValueError(
                f"module {name!r} has other projections than the modules before it (another shape, or "
                "refreshed rows of its own), but VeRA has one A and one B for all; use format='lora'."
            )
        shared = [A, B]
        tensors[f"base_model.model.{name}.vera_lambda_d"] = d
        tensors[f"base_model.model.{name}.vera_lambda_b"] = b
    for side, projection in zip("AB", shared, strict=True):  # see Note [Two names for saved projections]
        tensors[f"base_model.vera_{side}"] = projection
        tensors[f"base_model.vera_{side}.default"] = projection.clone()
    rank = shared[0].shape[0]
    return tensors, {"peft_type": "VERA", "r": rank, "save_projection": True, "projection_prng_key": 0}


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _factors(name: str, module: AdaptedModule, layer: dict[str, Any]) -> tuple[Tensor, ...]:
    """float32 A, B, d, b of a module that PEFT can say exactly."""
    kind = layer["kind"]
    fused = layer["parts"][0][0] != "weight" and not layer.get("experts")
    if fused or kind == "NonDynamicallyQuantizableLinear":
        raise ValueError(
            f"module {name!r} ({kind}) is fused attention, which PEFT's format lacks; {USE_MERGE}."
        )
    if not layer["product"]:
        raise ValueError(
            f"module {name!r} ({kind}) computes more than a product, which PEFT would not do; {USE_MERGE}."
        )
    if not layer["direct"]:
        raise ValueError(
            f"module {name!r} is a grouped, dilated or non-zero-padded convolution, which PEFT's LoRA does "
            f"not compute exactly; {USE_MERGE}."
        )
    tensors = module._uora_tensors(module.adapted_parts[0].n)
    return tuple(t.detach().float() for t in tensors)
