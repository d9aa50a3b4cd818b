"""Several adapters on one base: one of them computes, the others wait on a shelf at the root."""

from __future__ import annotations

from torch import nn

from lightning_uora.adapters.attach import attach_beside, attach_to, detach_uora, named_adapters
from lightning_uora.adapters.attachments import Attachment, attachment_of
from lightning_uora.adapters.names import SHELF, named_parameters
from lightning_uora.adapters.shelf import (
    Shelf,
    adapter_names,
    put_back,
    put_last,
    put_off,
    replace_parameter,
    require_known,
    shelf_of,
    the_only,
)
from lightning_uora.adapters.targets import Selection
from lightning_uora.config import UORAConfig

__all__ = [
    "add_adapter",
    "remove_adapter",
    "require_free",
    "require_name",
    "set_adapter",
    "settle_beside",
    "undo",
]


def add_adapter(
    model: nn.Module, name: str, config: UORAConfig | None = None, trainable: bool = True
) -> list[str]:
    """Add another adapter to an adapted model and make it active.

    It starts fresh: its update is zero. What trains besides the vectors (heads, biases) starts as a copy of
    what the model has now. Adapters with the same rank, seed and draw share A and B in memory.

    Args:
        model: The adapted model, a module around it, or a part of it.
        name: A new name, without a dot.
        config: What to adapt and how; None: the active adapter's configuration and layers.
        trainable: False: its parameters want no gradients.

    Returns:
        Names of its adapted modules.

    Raises:
        ValueError: The name is in use or not allowed; as :func:`~lightning_uora.attach_uora`. The model is
            then unchanged.
    """
    one = the_only(model, "add_adapter")
    require_free(model, name)
    before, root = one.owner.name, one.root
    chosen = Selection(one.owner.adapted, tuple(one.owner.trained)) if config is None else None
    settings = one.owner.config if config is None else config
    put_off(one)
    kept = one.owner.requires_grad_before
    try:
        if chosen is None:
            attach_beside(root, settings)
        else:
            attach_to(root, settings, chosen)
    except BaseException:
        put_back(root, before)
        raise
    new = attachment_of(root, "add_adapter")
    settle_beside(new, name)
    shelf_of(new).share()
    new.owner.requires_grad_before = kept
    if not trainable:
        for p in root.parameters():
            p.requires_grad_(False)
    return [layer for layer, _ in named_adapters(model)]


def settle_beside(new: Attachment, name: str) -> None:
    """Make an adapter that was just attached one of several: its name, and parameters of its own."""
    new.owner.name = name
    parameters = named_parameters(new.root, every=True)
    for trained in new.owner.trained:
        old = parameters[trained]
        if trained not in new.owner.displaced and not any(old is p for p in new.owner.displaced.values()):
            copied = nn.Parameter(old.detach().clone(), True)
            replace_parameter(new.root, old, copied)
            old.requires_grad_(False)
            new.owner.displaced[trained] = old
    shelf_of(new).order.append(name)
    put_last(new.root)


def undo(one: Attachment) -> None:
    """Take back an adapter that could not be loaded; those on the shelf stay."""
    shelf = one.root._modules.pop(SHELF, None)
    displaced, parameters = dict(one.owner.displaced), named_parameters(one.root, every=True)
    detach_uora(one.root)
    for name, old in displaced.items():
        replace_parameter(one.root, parameters[name], old)
    if isinstance(shelf, Shelf):
        shelf.order = [name for name in shelf.order if name in shelf._modules]
        one.root._modules[SHELF] = shelf


def require_name(name: object) -> None:
    """Raise ``ValueError`` for what cannot be the name of an adapter."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(
            f"name={name!r} is not allowed; an adapter's name must not be empty or contain a dot."
        )


def require_free(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` where a name cannot be that of one more adapter."""
    require_name(name)
    if name in adapter_names(model):
        raise ValueError(
            f"the model already has an adapter {name!r}; remove it first, or choose another name."
        )


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, or go back to the base.

    Args:
        model: The adapted model, a module around it, or a part of it.
        name: Which adapter; the heads that were trained with it come along. None: the frozen base's weights,
            until you set an adapter again; the heads stay those of the active adapter.

    Raises:
        ValueError: No adapter has that name (near misses are named).
    """
    one = the_only(model, "set_adapter")
    if name is None:
        if not one.owner.set_off:
            one.owner.set_off, one.owner.disabled = True, one.owner.disabled + 1
        return
    require_known(model, name)
    if one.owner.name != name:
        put_off(one)
        put_back(one.root, name)
    one = the_only(model, "set_adapter")
    if one.owner.set_off:  # it may have gone to the shelf like that
        one.owner.set_off, one.owner.disabled = False, one.owner.disabled - 1


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove an inactive adapter.

    Raises:
        ValueError: No adapter has that name, or it is the active one: set another one first, or detach_uora.
    """
    one = the_only(model, "remove_adapter")
    require_known(model, name)
    if one.owner.name == name:
        raise ValueError(
            f"{name!r} is the active adapter; call set_adapter with another name first, or detach_uora."
        )
    shelf = shelf_of(one)
    del shelf._modules[name]
    shelf.order.remove(name)
    if len(shelf.order) == 1:
        del one.root._modules[SHELF]
