"""Several adapters on one base: one of them computes, the others wait on a shelf at the root."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.adapters.attach import attach_beside, attach_to, detach_uora, named_adapters
from lightning_uora.adapters.attachments import Attachment, attachment_of
from lightning_uora.adapters.layers import AdaptedModule, Adapter
from lightning_uora.adapters.names import SHELF, named_modules, named_parameters
from lightning_uora.adapters.projections import Projections
from lightning_uora.adapters.resizing import forget_resizing, watch_resizing
from lightning_uora.adapters.specialise import specialise, unspecialise
from lightning_uora.adapters.stacked import named_layers
from lightning_uora.adapters.targets import Selection
from lightning_uora.config import UORAConfig
from lightning_uora.distributed import is_sharded

__all__ = ["activated", "adapter_names", "add_adapter", "put_back", "put_off", "remove_adapter"]
__all__ += ["require_free", "set_adapter", "settle_beside", "undo"]

# Note [Adapters on a shelf]
# An adapter is its owner (A, B, own rows, record), d and b of its layers, and what trained besides: heads,
# biases. All of it can be taken off a model and put back, the very same Parameters, which is what an
# optimizer knows them by. So one adapter is on the model and everything else in this package sees it alone;
# the others wait in a module at the root, where `.to()`, `deepcopy` and state dicts find them and the plain
# names of this package do not. What trained besides stands in its place in the model while its adapter is
# on; what stood there before comes back when it goes. Shelved parameters want no gradients.


class Shelved(nn.Module):
    """One adapter that waits. See Note [Adapters on a shelf]."""

    def __init__(self, owner: Projections, key: str) -> None:
        super().__init__()
        self.projections, self.key = owner, key
        self.layers: list[tuple[str, Adapter]] = []
        self.trained: dict[str, str] = {}  # names in the model of what trained besides
        self.wanted: dict[str, bool] = {}  # which of its parameters want gradients when it is on

    def put(self, name: str, parameter: nn.Parameter) -> None:
        """Keep a parameter, which stops to want gradients."""
        self.wanted[name] = parameter.requires_grad
        parameter.requires_grad_(False)
        self.register_parameter(name, parameter)

    def take(self, name: str) -> nn.Parameter:
        """Give a parameter back as it was."""
        parameter = cast(nn.Parameter, self._parameters.pop(name))
        parameter.requires_grad_(self.wanted.pop(name))
        return parameter

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Shelved:
        """As in torch, but d and b are not cast."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        vectors = nn.Module()
        names = [name for name in self._parameters if name[:2] in ("d_", "b_")]
        vectors._parameters = {name: self._parameters.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            vectors._apply(keep_dtype)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(vectors._parameters)
        return self


class Shelf(nn.Module):
    """All adapters of one root that wait, by name, and in which order they came."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.order = [first]

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Shelf:
        """As in torch; what adapters share they go on to share."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.share()
        return self

    def share(self) -> None:
        """One memory for what all adapters share, the one that computes among them."""
        waiting = [cast(Shelved, child).projections for child in self._modules.values()]
        _share([self.__dict__["on"], *waiting] if "on" in self.__dict__ else waiting)


def _share(owners: list[Projections]) -> None:
    """One memory for equal draws. Under ``share="model"`` refreshes write into it, so those keep theirs."""
    seen: dict[tuple[Any, ...], Tensor] = {}
    for owner in owners:
        config = owner.config
        for name, M in owner._buffers.items():
            if M is None or name.count("_") != 1 or config.share == "model" or name in owner.resized:
                continue
            init = "orthogonal" if config.init == "inputs" else config.init
            key = (name, config.rank, config.seed, init, M.device, M.dtype)
            owner._buffers[name] = seen.setdefault(key, M)


def _shelf(one: Attachment) -> Shelf:
    found = one.root._modules.get(SHELF)
    if found is None:
        found = Shelf(one.owner.name)
        one.root.register_module(SHELF, found)
    return cast(Shelf, found)


def _only(model: nn.Module, action: str) -> Attachment:
    one = attachment_of(model, action)
    if one.key is None:
        raise ValueError(f"{action} takes the model that was given to attach_uora, or one around it.")
    if is_sharded(model):
        raise ValueError(f"{action}: the model is sharded, and its shards know one adapter.")
    return one


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on ``model``, in the order in which they came; of a plain model none.

    Raises:
        ValueError: ``model`` holds several adapted models.
    """
    try:
        one = attachment_of(model, "adapter_names")
    except ValueError:
        if any(isinstance(m, AdaptedModule) for m in model.modules()):
            raise
        return []
    shelf = one.root._modules.get(SHELF)
    return list(shelf.order) if isinstance(shelf, Shelf) else [one.owner.name]


def add_adapter(
    model: nn.Module, name: str, config: UORAConfig | None = None, trainable: bool = True
) -> list[str]:
    """Put another adapter beside those that are there, and let it compute.

    It starts fresh: its update is zero. What trains besides the vectors (heads, biases) starts as a copy of
    what the model has there now. Adapters with the same rank, seed and draw share A and B in memory.

    Args:
        model: The adapted model, or one around it.
        name: Not used yet; without a dot.
        config: What to adapt and how; None: as the adapter that computes now, in the same layers.
        trainable: False: its parameters want no gradients.

    Returns:
        Names of its adapted modules.

    Raises:
        ValueError: The name is in use or not allowed; as :func:`~lightning_uora.attach_uora`. The model is
            then as it was.
    """
    one = _only(model, "add_adapter")
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
            _replace(new.root, old, copied)
            old.requires_grad_(False)
            new.owner.displaced[trained] = old
    _shelf(new).order.append(name)
    _last(new.root)
    _shelf(new).share()


def _last(root: nn.Module) -> None:
    """The shelf stands behind the adapter that computes, in state dicts too, and knows its A and B."""
    shelf = cast(Shelf, root._modules.pop(SHELF))
    shelf.__dict__["on"] = attachment_of(root, "adapters").owner
    root._modules[SHELF] = shelf


def undo(one: Attachment) -> None:
    """Take back an adapter that could not be loaded; those on the shelf stay."""
    shelf = one.root._modules.pop(SHELF, None)
    displaced, parameters = dict(one.owner.displaced), named_parameters(one.root, every=True)
    detach_uora(one.root)
    for name, old in displaced.items():
        _replace(one.root, parameters[name], old)
    if isinstance(shelf, Shelf):
        shelf.order = [name for name in shelf.order if name in shelf._modules]
        one.root._modules[SHELF] = shelf


def _replace(root: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, under all its names."""
    for module in named_modules(root).values():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def require_free(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` where a name cannot be that of one more adapter."""
    if not name or "." in name:
        raise ValueError(f"name={name!r} is not allowed: an adapter's name has no dot and is not empty.")
    if name in adapter_names(model):
        raise ValueError(f"an adapter {name!r} is there already; remove it first, or choose another name.")


def require_known(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` with near misses where no adapter has that name."""
    names = adapter_names(model)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = "near misses" if near else "there are"
        raise ValueError(f"no adapter is called {name!r}; {hint}: {', '.join(map(repr, near or names))}.")


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Say which adapter computes.

    Args:
        model: The adapted model, or one around it.
        name: Of an adapter, with the heads that were trained with it; None: the frozen base's weights, until
            an adapter is set again (heads stay as they are).

    Raises:
        ValueError: No adapter has that name (near misses are named).
    """
    one = _only(model, "set_adapter")
    if name is None:
        if not one.owner.set_off:
            one.owner.set_off, one.owner.disabled = True, one.owner.disabled + 1
        return
    require_known(model, name)
    if one.owner.set_off:
        one.owner.set_off, one.owner.disabled = False, one.owner.disabled - 1
    if one.owner.name != name:
        put_off(one)
        put_back(one.root, name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter that does not compute.

    Raises:
        ValueError: No adapter has that name, or it is the one in use: set another one first, or detach_uora.
    """
    one = _only(model, "remove_adapter")
    require_known(model, name)
    if one.owner.name == name:
        raise ValueError(f"{name!r} is the adapter in use; set_adapter another one first, or detach_uora.")
    shelf = _shelf(one)
    del shelf._modules[name]
    shelf.order.remove(name)
    if len(shelf.order) == 1:
        del one.root._modules[SHELF]


@contextmanager
def activated(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the adapter of that name is the one on the model; None: the one that is. Exactly undone."""
    if name is None or name == attachment_of(model, "an adapter by its name").owner.name:
        yield
        return
    require_known(model, name)
    one = _only(model, "an adapter by its name")
    before, root = one.owner.name, one.root
    put_off(one)
    put_back(root, name)
    try:
        yield
    finally:
        put_off(attachment_of(root, "set_adapter"))
        put_back(root, before)


def put_off(one: Attachment) -> None:
    """Take the adapter that is on the model to the shelf."""
    root, owner, shelf = one.root, one.owner, _shelf(one)
    item = Shelved(owner, cast(str, one.key))
    parameters = named_parameters(root, every=True)
    forget_resizing(one)
    for name, layer in one.layers:
        d, b, adapter = layer.uora_d, layer.uora_b, layer._uora
        unspecialise(layer)
        item.layers.append((name, adapter))
        item.put(f"d_{adapter.index}", d)
        item.put(f"b_{adapter.index}", b)
    for number, name in enumerate(dict.fromkeys(owner.trained)):
        own, there = parameters[name], owner.displaced.get(name)
        if any(own is p for p in item._parameters.values()):
            continue  # tied: it went by another name
        if there is None:  # of the first adapter: its values stay to be seen
            there = nn.Parameter(own.detach().clone(), False)
        _replace(root, own, there)
        item.trained[f"t_{number}"] = name
        item.put(f"t_{number}", own)
    del root._modules[item.key]
    owner.displaced = {}
    shelf._modules[owner.name] = item


def put_back(root: nn.Module, name: str) -> None:
    """Put a shelved adapter on the model."""
    item = cast(Shelved, cast(Shelf, root._modules[SHELF])._modules.pop(name))
    owner, layers = item.projections, named_layers(root)
    root._modules[item.key] = owner
    for layer_name, adapter in item.layers:
        layer = specialise(layers[layer_name], owner, adapter.index)
        layer.__dict__["_uora"] = adapter
        adapter.cache.clear()
        layer._parameters["uora_d"] = item.take(f"d_{adapter.index}")
        layer._parameters["uora_b"] = item.take(f"b_{adapter.index}")
    parameters = named_parameters(root, every=True)
    for key, trained in item.trained.items():
        there = parameters[trained]
        _replace(root, there, item.take(key))
        owner.displaced[trained] = there
    _last(root)
    watch_resizing(attachment_of(root, "set_adapter"))
