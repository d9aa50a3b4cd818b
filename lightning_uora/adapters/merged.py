"""Updates written into the base's weights, all or none: of what computes, or a sum of several adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_uora.adapters.around import AdaptedAround
from lightning_uora.adapters.attachments import Attachment
from lightning_uora.adapters.names import named_parameters
from lightning_uora.adapters.offloaded import is_offloaded
from lightning_uora.adapters.opaque import dequantised, dtype_of, is_opaque, plain_linear, working_dtype
from lightning_uora.adapters.several_layers import LayerOf, layers_of, trained_with
from lightning_uora.adapters.shelf import require_known, the_only
from lightning_uora.adapters.stacked import home
from lightning_uora.config import require_number

__all__ = ["exchange", "merged", "updates_of", "updates_on", "whose_heads_stay"]


Updates = Mapping[str, list[tuple[LayerOf, float]]]
"""By the layer's path: what is added to it, and how many times."""


def merged(model: nn.Module, updates: Updates, dequantize: bool) -> list[tuple[nn.Module, nn.Linear]]:
    """Write updates into the base's weights, computed in float32 at least, all or none.

    Returns:
        Quantised layers, which stay as they are, each with the plain one to :func:`exchange` it for.

    Raises:
        ValueError: A weight would not be finite, is offloaded, or is quantised and ``dequantize`` is False.
    """
    away = next((path for path, mine in updates.items() if is_offloaded(home(mine[0][0].module))), None)
    if away is not None:
        raise ValueError(
            f"module {away!r} is offloaded, and its next forward would lose the merged weight; load "
            "the model without offloading, load the adapter, and merge there. Nothing was merged."
        )
    plain: list[tuple[nn.Module, nn.Linear]] = []
    writes: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
    general = working_dtype(model)
    with torch.no_grad():
        for path, mine in updates.items():
            module = mine[0][0].module
            if is_opaque(module):
                _require_plain_wanted(model, path, module, dequantize)
                weight = _summed("weight", _dequantised(module), mine, path)
                weight = weight.to(dtype_of(module, getattr(module, "put_out", None) or general))
                plain.append((module, plain_linear(module, weight)))
                continue
            for name in mine[0][0].adapter.parts:
                W = cast(nn.Parameter, home(module)._parameters[name])
                wide = W.to(torch.promote_types(W.dtype, torch.float32))
                writes.append((home(module), name, W, _summed(name, wide, mine, path).to(W.dtype)))
        uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        for place, name, parameter, weight in writes:
            if uses[id(parameter)] > 1:  # see Note [Shared weights]
                place._parameters[name] = nn.Parameter(weight.clone(), parameter.requires_grad)
            else:
                parameter.copy_(weight)
    return plain


# Note [Shared weights]
# A weight with several names is one parameter. Adapted in one module, the others read the base; so merging
# may not write into it. The adapted module gets a parameter of its own, and the tie is cut.


def _summed(name: str, W: Tensor, mine: list[tuple[LayerOf, float]], path: str) -> Tensor:
    for layer, weight in mine:
        opaque = is_opaque(layer.module)
        W = W + weight * layer.delta_weight() if opaque else layer.added_to(name, W, weight)
    if not W.isfinite().all():
        raise ValueError(
            f"merging would put non-finite values into the weight of module {path!r}; nothing was merged."
        )
    return W


def _dequantised(module: nn.Module) -> Tensor:
    return module.dequantised() if isinstance(module, AdaptedAround) else dequantised(module, module.forward)


def _require_plain_wanted(model: nn.Module, path: str, module: nn.Module, dequantize: bool) -> None:
    if not dequantize:
        kind = getattr(type(module), "uora_original", type(module)).__name__
        raise ValueError(
            f"module {path!r} ({kind}) is quantised, and rounding would lose the update; call "
            "detach_uora(model, merge=True, dequantize=True), which leaves plain Linear layers."
        )
    if module is model:
        raise ValueError(
            "the model itself is a quantised layer; put it into a module, such as "
            "nn.Sequential(layer), to dequantise it."
        )


def exchange(model: nn.Module, pairs: list[tuple[nn.Module, nn.Linear]]) -> None:
    """Put plain layers in the places of quantised ones; transformers is told, see Note [Half quantised]."""
    places = {id(old): new for old, new in pairs}
    for module in list(model.modules()) if pairs else ():
        for name, child in module._modules.items():
            if id(child) in places:
                module._modules[name] = places[id(child)]
    for module in list(model.modules()) if pairs else ():
        if getattr(module, "hf_quantizer", None) is not None:
            _tell_transformers(module)


# Note [Half quantised]
# What transformers saves of a quantised model it reads back by the model's quantization_config: layers that
# are plain by now would be made quantised and never filled. So the configuration goes with the last quantised
# layer, and names the plain ones as long as some are left.


def _tell_transformers(model: Any) -> None:
    config = model.config.quantization_config
    named = list(model.named_modules())
    if any(is_opaque(module) for _, module in named):
        bitsandbytes = hasattr(config, "llm_int8_skip_modules")
        field = "llm_int8_skip_modules" if bitsandbytes else "modules_to_not_convert"
        setattr(config, field, [n for n, m in named if isinstance(m, nn.Linear) and not is_opaque(m)])
        return
    model.__dict__.pop("hf_quantizer")
    model.__dict__.pop("quantization_method", None)
    model.__dict__ |= dict.fromkeys(("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"), False)
    for _, module in named:
        getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)
    model.config.__dict__.pop("quantization_config", None)


def updates_on(found: list[Attachment]) -> Updates:
    """What computes now, once, in all adapted models."""
    named = ((f"{one.prefix}{path}", m) for one in found for path, m in one.layers)
    return {path: [(LayerOf(m, m._uora, m.uora_d, m.uora_b), 1.0)] for path, m in named}


def updates_of(one: Attachment, weights: Mapping[str, float]) -> Updates:
    """A weighted sum of adapters on one base."""
    updates: dict[str, list[tuple[LayerOf, float]]] = {}
    for name, weight in weights.items():
        for path, layer in layers_of(one, name).items():
            updates.setdefault(f"{one.prefix}{path}", []).append((layer, weight))
    return updates


def whose_heads_stay(model: nn.Module, weights: Mapping[str, float]) -> str:
    """Of adapters to be summed the one that was trained with heads, or the first.

    Raises:
        ValueError: No weights, one that is not finite, an unknown name; several of them were trained with
            heads (or biases) that differ, of which there is no sum.
    """
    one = the_only(model, "detach_uora")
    if not weights:
        raise ValueError("name={} names no adapter to merge.")
    for name, weight in weights.items():
        require_known(model, name)
        require_number(f"the weight of {name!r}", weight)
    here = named_parameters(one.root, every=True)
    besides = {name: trained_with(one, name, here) for name in weights}
    holders = [name for name in weights if besides[name]]
    for other in holders[1:]:
        first, second = besides[holders[0]], besides[other]
        different = [n for n in {**first, **second} if not _equal(first.get(n), second.get(n))]
        if different:
            raise ValueError(
                f"adapters {holders[0]!r} and {other!r} have each trained {different[0]!r}, and "
                "trained heads cannot be added up; load all but one with load_adapter(..., "
                "head=False). Nothing was merged."
            )
    return (holders or list(weights))[0]


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and torch.equal(one, two)
