"""Adapters merged into weights: of a state dict, through stand-ins where there is no model to run."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters import (
    OWNER,
    AdaptedAround,
    Selection,
    attach_to,
    attachment_of,
    detach_uora,
    is_quantised,
    key_of,
    named_adapters,
    plain,
)
from lightning_uora.storage.manifest import config_of, manifests_of
from lightning_uora.storage.restoring import take_projections

__all__ = ["detached_state", "merge_state", "skeleton", "tensors_of_root"]


def detached_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of an adapted module after its adapters are merged and gone."""
    places = Counter(id(p) for m in module.modules() for p in m._parameters.values())
    for name, adapted in named_adapters(module):
        if isinstance(adapted, AdaptedAround):
            raise ValueError(_quantised(name))
        shared = [p for p in adapted.adapted_parts if places[id(adapted.home._parameters[p.name])] > 1]
        if shared:
            raise ValueError(_tied(key_of(name, shared[0])))
    detach_uora(module, merge=True)
    state: dict[str, Tensor] = module.state_dict()
    return state


def skeleton(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The adapted modules of a manifest without a base: A, B and the vectors as they were.

    Every layer stands in as a Linear of its size whose weight takes no memory. For exports and tables.

    Raises:
        ValueError: Vectors are missing, or the projections are not those of the run.
    """
    model = nn.Module()
    for name, layer in manifest["layers"].items():
        _place(model, name, layer)
    free = {"target_modules": ("*",), "exclude_modules": (), "trainable_modules": (), "dropout": 0.0}
    config = dataclasses.replace(config_of(manifest), bias="none", **free)  # type: ignore[arg-type]
    attach_to(model, config, Selection(tuple(manifest["adapted"]), ()))
    given = {k.removeprefix(f"{OWNER}."): t for k, t in tensors.items() if k.startswith(f"{OWNER}.")}
    given.pop("record", None)
    take_projections(attachment_of(model, "skeleton"), manifest, given)
    with torch.no_grad():
        for name, module in named_adapters(model):
            for vector in ("uora_d", "uora_b"):
                key = f"{name}.{vector}" if name else vector
                if key not in tensors or tensors[key].shape != getattr(module, vector).shape:
                    raise ValueError(
                        f"the adapter lacks {key!r}, or has another shape there; it is damaged or for "
                        "another model."
                    )
                getattr(module, vector).copy_(tensors[key])
    return model


def _place(model: nn.Module, name: str, layer: dict[str, Any]) -> None:
    """Put a stand-in for one adapted module at its name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    parts = layer["parts"]
    if layer.get("experts"):
        host: Any = model
        host.num_experts, host.is_transposed = layer["experts"], False
        shape = (layer["experts"], parts[0][2], parts[0][3])
        host.register_parameter(leaf, nn.Parameter(torch.zeros(1, 1, 1).expand(shape)))
        return
    if leaf in model._modules:  # out_proj of an attention that is there
        return
    if parts[0][0] == "weight":
        stand_in: nn.Module = nn.Linear(1, 1, bias=False)
        stand_in.weight = nn.Parameter(torch.zeros(1, 1).expand(parts[0][2], parts[0][3]))
    else:
        sizes = {"kdim": parts[1][3], "vdim": parts[2][3]} if len(parts) == 3 else {}
        stand_in = nn.MultiheadAttention(parts[0][3], 1, **sizes)
    model.add_module(leaf, stand_in)


def merge_state(stored: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain state dict: the updates in the weights, computed in float32 at least, no UORA left.

    Args:
        stored: What the checkpoint says of its adapted models.
        state: Its state dict.

    Raises:
        ValueError: A weight or vector is missing, is shared with another module, or a merged weight is not
            finite; the module is named.
    """
    keys = {plain(key): key for key in state}
    merged = {k: t for k, t in state.items() if OWNER not in k and not _is_vector(k)}
    memory = Counter(t.data_ptr() for t in merged.values() if isinstance(t, Tensor) and t.numel())
    for manifest in manifests_of(stored):
        for name, weight in _merged(manifest, {plain(k): t for k, t in state.items()}):
            if memory[state[keys[name]].data_ptr()] > 1:
                raise ValueError(_tied(name))
            merged[keys[name]] = weight
    return merged


def _is_vector(key: str) -> bool:
    return key.rpartition(".")[2] in ("uora_d", "uora_b")


PLAIN = ("uora_d", "uora_b", "bias", "in_proj_bias")
"""What an adapted module has besides its weight."""


def _quantised(name: str) -> str:
    return (
        f"module {name!r} is quantised, and rounding would lose the update; in Python, call "
        "detach_uora(module, merge=True, dequantize=True), which leaves plain Linear layers."
    )


def _tied(name: str) -> str:
    return (
        f"{name!r} is also another weight of the model, and a class that ties the two would load "
        "the merged one for both. Load the module and call detach_uora(module, merge=True), "
        "which unties them."
    )


def tensors_of_root(manifest: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict by plain names what belongs to one adapted model, by names in its root."""
    prefix, owner = f"{manifest['root']}." if manifest.get("root") else "", manifest.get("owner", OWNER)
    inner = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    if owner != OWNER:
        inner = {k: t for k, t in inner.items() if not k.startswith(f"{OWNER}.")}
        inner = {re.sub(rf"^{owner}\.", f"{OWNER}.", k): t for k, t in inner.items()}
    return inner


def _merged(manifest: dict[str, Any], state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    prefix = f"{manifest['root']}." if manifest.get("root") else ""
    for name, module in named_adapters(skeleton(manifest, tensors_of_root(manifest, state))):
        for part in module.adapted_parts:
            key = f"{prefix}{key_of(name, part)}"
            told = next(p for p in manifest["layers"][name]["parts"] if p[0] == part.name)
            place = key.removesuffix(part.name)
            packed = {k for k in state if k.startswith(place)} - {f"{place}{end}" for end in PLAIN}
            packed = set() if part.experts else packed
            if key not in state and packed:
                raise ValueError(_quantised(name))
            if key not in state:
                raise ValueError(f"the checkpoint lacks {key!r}: it holds adapters without their base.")
            W = state[key]
            if is_quantised(W) or W.numel() != part.m * part.n * max(part.experts, 1):
                raise ValueError(_quantised(name))
            wide = torch.promote_types(W.dtype, torch.float32)
            with torch.no_grad():
                A, B, d, b = (t.to(wide) for t in module._uora_tensors(part.n))
                flat = (W.transpose(-1, -2) if told[4] else W).to(wide)
                axis = (part.experts,) if part.experts else ()
                whole = part.delta(flat.reshape(*axis, part.m, part.n), A, B, d, b).reshape(flat.shape)
            if not whole.isfinite().all():
                raise ValueError(f"merging would put non-finite values into the weight of module {name!r}.")
            yield key, (whole.transpose(-1, -2) if told[4] else whole).to(W.dtype).contiguous()
