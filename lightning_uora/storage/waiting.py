"""Adapters that wait, in checkpoints: told beside the one that computes, and put on a fresh model's shelf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_uora.adapters import (
    OWNER,
    SHELF,
    Attachment,
    Selection,
    activated,
    adapter_names,
    attach_to,
    attachment_of,
    item_of,
    put_back,
    put_off,
    settle_beside,
    shelf_of,
)
from lightning_uora.config import differences
from lightning_uora.storage.manifest import config_of
from lightning_uora.storage.restoring import few, require_modules, take_projections, told

__all__ = [
    "describe_waiting",
    "in_use",
    "names_in",
    "not_in",
    "projections_on_shelf",
    "put_waiting",
    "stored_on_shelf",
    "take_waiting",
]

# Note [Several adapters in a checkpoint]
# The state dict has the adapters that wait under the shelf's name, by number: d and b of the n-th adapted
# module, what trained besides as the manifest lists it. Each has a manifest of its own inside that of the
# adapter that computes. A fresh model gets those that it lacks before its weights are loaded; those that it
# has and the checkpoint does not stay as they are.


def describe_waiting(one: Attachment) -> dict[str, Any]:
    """What the manifest of the adapter that computes says of its name and of the others; nothing if alone."""
    names = _names(one)
    if names == ["default"]:
        return {}
    waiting = []
    for name in names:
        if name != one.owner.name:
            item = item_of(one, name)
            manifest = told(item.projections, item.facts, list(item.trained.values()))
            waiting.append({**manifest, "adapter": name, "besides": dict(item.trained)})
    return {"adapter": one.owner.name, "order": names, "waiting": waiting}


def _names(one: Attachment) -> list[str]:
    """Adapters at a root, which may have several owners of other layers if it has no shelf."""
    return adapter_names(one.root) if SHELF in one.root._modules else [one.owner.name]


def _place(one: Attachment, name: str) -> str:
    return f"{one.prefix}{SHELF}.{name}.projections."


def projections_on_shelf(one: Attachment) -> tuple[str, ...]:
    """What the keys of A, B and records of the adapters that wait begin with."""
    names = _names(one)
    return tuple(_place(one, name) for name in names if name != one.owner.name)


def not_in(one: Attachment, manifest: Mapping[str, Any]) -> list[str]:
    """What the keys of the adapters begin with that wait here and that the checkpoint does not have."""
    names = _names(one)
    there = {one.owner.name, *names_in(manifest)}
    return [f"{one.prefix}{SHELF}.{name}." for name in names if name not in there]


def stored_on_shelf(one: Attachment) -> dict[str, Tensor]:
    """Of A and B of the adapters that wait what seed and record cannot rebuild, by key."""
    found: dict[str, Tensor] = {}
    for prefix in projections_on_shelf(one):
        owner = item_of(one, prefix.split(".")[-3]).projections
        owner.require_calibrated("an adapter checkpoint")
        found |= {f"{prefix}{name}": A for name, A in owner.stored().items()}
    return found


def put_waiting(one: Attachment, manifest: Mapping[str, Any]) -> None:
    """Put on the shelf what a checkpoint has and the model lacks; fresh, its numbers come later.

    Raises:
        ValueError: The checkpoint's computing adapter has another name; a waiting one another configuration.
    """
    name, root = manifest.get("adapter", "default"), one.root
    if name != one.owner.name:
        raise ValueError(
            f"adapter {name!r} is active in the checkpoint, but {one.owner.name!r} is active here; "
            f"call set_adapter, or use UORACallback(adapter_name={name!r})."
        )
    for waiting in manifest.get("waiting", ()):
        name = waiting["adapter"]
        if name not in _names(one):
            _shelve(one, waiting)
        item = item_of(one, name)
        different = differences(
            config_of(waiting, item.projections.config), "saved", item.projections.config, "here"
        )
        here = (list(item.projections.adapted), list(item.trained.values()))
        if different or here != (waiting["adapted"], waiting["trained"]):
            what = different or f"it is for {few(waiting['adapted'])}, here {few(here[0])}"
            raise ValueError(
                f"adapter {name!r} of the checkpoint is not the one here: {what}. Remove that one, or "
                "load into a new module."
            )
    if SHELF in root._modules and set(manifest.get("order", ())) == set(_names(one)):
        shelf_of(one).order = list(manifest["order"])


def _shelve(one: Attachment, manifest: Mapping[str, Any]) -> None:
    root, kept = one.root, one.owner.requires_grad_before
    require_modules(root, manifest["adapted"])
    before = one.owner.name
    put_off(one)
    try:
        chosen = Selection(tuple(manifest["adapted"]), tuple(manifest["trained"]))
        attach_to(root, config_of(dict(manifest)), chosen)
        new = attachment_of(root, "a checkpoint")
        settle_beside(new, manifest["adapter"])
        new.owner.requires_grad_before = kept
        put_off(new)
    finally:
        put_back(root, before)
    shelf_of(one).share()


def take_waiting(one: Attachment, manifest: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """A, B and record of the adapters that wait, from an ``"adapter"`` checkpoint's plain keys."""
    for waiting in manifest.get("waiting", ()):
        prefix = _place(one, waiting["adapter"])
        given = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        with activated(one.root, waiting["adapter"]):
            take_projections(attachment_of(one.root, "a checkpoint"), waiting, given)


def names_in(manifest: Mapping[str, Any]) -> list[str]:
    """Adapters of a manifest: the one that computes, then those that wait."""
    waiting = [one["adapter"] for one in manifest.get("waiting", ())]
    return [manifest.get("adapter", "default"), *waiting]


def in_use(
    manifest: dict[str, Any], state: dict[str, Tensor], name: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and state dict as if the adapter ``name`` had computed, and no other had been there.

    Raises:
        ValueError: None has that name.
    """
    names = names_in(manifest)
    if name is not None and name not in names:
        raise ValueError(f"no adapter is called {name!r}; there are: {', '.join(map(repr, names))}.")
    root = f"{manifest['root']}." if manifest.get("root") else ""
    shelf = f"{root}{SHELF}."
    alone = {key: t for key, t in state.items() if not key.startswith(shelf)}
    if name in (None, names[0]):
        return manifest, alone
    own = f"{root}{manifest.get('owner', OWNER)}."
    gone = {own, *(f"{root}{layer}.uora_".replace("..", ".") for layer in manifest["adapted"])}
    alone = {key: t for key, t in alone.items() if not key.startswith(tuple(gone))}
    waiting = next(one for one in manifest["waiting"] if one["adapter"] == name)
    mine = {k.removeprefix(f"{shelf}{name}."): t for k, t in state.items() if k.startswith(f"{shelf}{name}.")}
    for key, t in mine.items():
        side, _, number = key.partition("_")
        if key.startswith("projections."):
            alone[f"{own}{key.removeprefix('projections.')}"] = t
        elif side == "t":
            alone[f"{root}{waiting['besides'][key]}"] = t
        else:
            layer = waiting["adapted"][int(number)]
            alone[f"{root}{layer}.uora_{side}" if layer else f"{root}uora_{side}"] = t
    kept = {key: manifest[key] for key in ("kind", "root", "owner", "base") if key in manifest}
    return {**waiting, **kept}, alone
