"""Adapters merged into weights: of a state dict, through stand-ins where there is no model to run."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters import OWNER, attach_uora, detach_uora, find_root, named_adapters
from lightning_uora.storage.manifest import config_of
from lightning_uora.storage.restoring import take_projections

__all__ = ["detached_state", "merge_state", "skeleton"]


def detached_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of an adapted module after its adapters are merged and gone."""
    detach_uora(find_root(module)[1], merge=True)
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
    names = tuple(f"re:{re.escape(name)}" for name in manifest["adapted"])
    free = {
        "target_modules": names,
        "exclude_modules": (),
        "trainable_modules": (),
        "dropout": 0.0,
        "bias": "none",
    }
    attach_uora(model, dataclasses.replace(config_of(manifest), **free))  # type: ignore[arg-type]
    given = {k.removeprefix(f"{OWNER}."): t for k, t in tensors.items() if k.startswith(f"{OWNER}.")}
    given.pop("record", None)
    take_projections(model, manifest, given)
    with torch.no_grad():
        for name, module in named_adapters(model):
            for vector in ("uora_d", "uora_b"):
                key = f"{name}.{vector}" if name else vector
                if key not in tensors or tensors[key].shape != getattr(module, vector).shape:
                    raise ValueError(f"the adapter lacks {key!r}, or has it in another shape.")
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
    if leaf in model._modules:  # out_proj of an attention that is there
        return
    if parts[0][0] == "weight":
        stand_in: nn.Module = nn.Linear(1, 1, bias=False)
        stand_in.weight = nn.Parameter(torch.zeros(1, 1).expand(parts[0][2], parts[0][3]))
    else:
        sizes = {"kdim": parts[1][3], "vdim": parts[2][3]} if len(parts) == 3 else {}
        stand_in = nn.MultiheadAttention(parts[0][3], 1, **sizes)
    model.add_module(leaf, stand_in)


def merge_state(manifest: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain state dict: the updates in the weights, computed in float32 at least, no UORA left.

    Raises:
        ValueError: A weight or vector is missing, or a merged weight is not finite; the module is named.
    """
    prefix = f"{manifest['root']}." if manifest.get("root") else ""
    inner = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    model = skeleton(manifest, inner)
    merged = {k: t for k, t in state.items() if OWNER not in k and not k.endswith((".uora_d", ".uora_b"))}
    for name, module in named_adapters(model):
        for part in module.adapted_parts:
            key = ".".join(piece for piece in (prefix.rstrip("."), name, part.name) if piece)
            stored = next(p for p in manifest["layers"][name]["parts"] if p[0] == part.name)
            if key not in state:
                raise ValueError(f"the checkpoint lacks {key!r}: it holds adapters without their base.")
            W = state[key]
            wide = torch.promote_types(W.dtype, torch.float32)
            with torch.no_grad():
                A, B, d, b = (t.to(wide) for t in module._uora_tensors(part.n))
                flat = (W.t() if stored[4] else W).to(wide)
                whole = part.delta(flat.reshape(part.m, part.n), A, B, d, b).reshape(flat.shape)
            if not whole.isfinite().all():
                raise ValueError(f"merging would put non-finite values into the weight of module {name!r}.")
            merged[key] = (whole.t() if stored[4] else whole).to(W.dtype).contiguous()
    return merged
