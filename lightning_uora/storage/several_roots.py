"""Several adapted models in one adapter folder: each with its own manifest, loaded all or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uora.adapters import (
    OWNER,
    Attachment,
    Selection,
    adopt,
    attach_to,
    detach_uora,
    is_adapted,
    named_layers,
    named_parameters,
    packed,
    require_name,
    trained_names,
    unwrapped,
)
from lightning_uora.distributed import whole
from lightning_uora.storage.manifest import SEVERAL, config_of
from lightning_uora.storage.placing import Place, place_of
from lightning_uora.storage.restoring import Mismatch, adapter_state, describe, few, require_modules, restore

__all__ = ["describe_several", "load_several"]

# Note [Several adapted models in a folder]
# Two towers have two roots; two callbacks leave two owners at one root. The folder holds a manifest for each,
# with the path of its root and the name of its owner, as checkpoints do, and the tensors by their names in
# the model that was given. What trains outside of all roots is listed beside the manifests.


def describe_several(
    model: nn.Module, found: list[Attachment], projections: Literal["record", "full"]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What to write of all adapted models in ``model``. If sharded, every rank must ask.

    Raises:
        ValueError: One is not calibrated; an adapted module is gone.
    """
    manifests: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for one in found:
        one.owner.require_calibrated("saving an adapter")
        manifest = describe(one)
        manifest |= {"record": packed(manifest["record"]), "root": one.path}
        manifests.append(manifest if one.key == OWNER else manifest | {"owner": one.key})
        seen = Attachment("", model, one.owner, one.key)
        tensors |= {name: whole(t.detach()).cpu().contiguous() for name, t in adapter_state(seen).items()}
        given = dict(one.owner.named_buffers()) if projections == "full" else one.owner.stored()
        tensors |= {f"{one.prefix}{one.key}.{n}": b.detach().cpu().contiguous() for n, b in given.items()}
    return {"version": SEVERAL, "several": manifests, "trained": list(trained_names(model))}, tensors


def load_several(
    model: nn.Module,
    stored: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base_mismatch: Mismatch,
    head: bool,
    called: str,
) -> None:
    """Adapt a plain model as a folder of several says. After an error the model is as it was.

    Raises:
        ValueError: The model is already adapted; a root or a module is not in it; as :func:`restore`.
    """
    if is_adapted(model):
        raise ValueError(
            "the folder holds several adapted models, and this model is already adapted; call "
            "detach_uora(model) first."
        )
    require_name(called)
    root = unwrapped(model)
    places = [_place(root, manifest, tensors, head, base_mismatch) for manifest in stored["several"]]
    outside = _outside(root, stored, tensors) if head else {}
    parameters = list(root.parameters())
    wanted = [p.requires_grad for p in parameters]
    before = [(t, t.detach().clone()) for t in _written(root, stored, tensors)]
    made: list[tuple[Attachment, dict[str, Any], Place]] = []
    try:
        for place, manifest in zip(places, stored["several"], strict=True):
            trained = (*(n for n in manifest["trained"] if n not in place.aside), *place.head)
            chosen = Selection(tuple(manifest["adapted"]), trained)
            one = attach_to(place.root, config_of(manifest), chosen, manifest.get("owner", OWNER))
            one.owner.name = called
            made.append((one, manifest, place))
        for one, manifest, place in made:
            restore(one, manifest, _of_one(manifest, tensors), base_mismatch, place.aside)
        with torch.no_grad():
            for parameter, value in outside.values():
                parameter.requires_grad_(True).copy_(value)
        adopt(root)
    except BaseException:
        if made:
            detach_uora(root)
        for parameter, wants in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(wants)
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
        raise


def _place(
    root: nn.Module,
    manifest: dict[str, Any],
    tensors: Mapping[str, Tensor],
    head: bool,
    base_mismatch: Mismatch,
) -> Place:
    path, modules = manifest["root"], named_layers(root)
    if path and path not in modules:
        raise ValueError(
            f"another architecture: the adapter is for {path!r}, but this model has no {path!r}."
        )
    part = modules[path] if path else root
    require_modules(part, manifest["adapted"])
    return place_of(part, manifest, _of_one(manifest, tensors), head, base_mismatch == "warn")


def _of_one(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of the adapted models, by names in its root."""
    prefix, owner = f"{manifest['root']}." if manifest["root"] else "", manifest.get("owner", OWNER)
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    found = {}
    for name, t in inside.items():
        path, _, leaf = name.rpartition(".")
        if name.startswith(f"{owner}."):
            found[f"{OWNER}.{name.removeprefix(f'{owner}.')}"] = t
        elif leaf in ("uora_d", "uora_b"):
            found |= {name: t} if path in manifest["adapted"] else {}
        elif not any(piece.startswith(OWNER) for piece in path.split(".")):
            found[name] = t
    return found


def _outside(
    root: nn.Module, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """What trained outside of all roots: where it goes, and its numbers."""
    roots = [f"{manifest['root']}." if manifest["root"] else "" for manifest in stored["several"]]
    names = [name for name in stored["trained"] if not name.startswith(tuple(roots))]
    parameters = named_parameters(root, every=True)
    wrong = [n for n in names if n not in parameters or parameters[n].shape != tensors[n].shape]
    if wrong:
        raise ValueError(
            f"this model has no place for {few(wrong)}, trained with the adapter; pass head=False to "
            "load_adapter to leave its head out, or build the model with as many classes."
        )
    return {name: (parameters[name], tensors[name]) for name in names}


def _written(root: nn.Module, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What of the model a load may write to."""
    here = named_parameters(root, every=True) | dict(root.named_buffers())
    return [here[name] for name in tensors if name in here and not here[name].is_meta]
