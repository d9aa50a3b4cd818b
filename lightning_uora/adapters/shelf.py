"""Where adapters wait that do not compute, and how one is taken off a model and put back."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.adapters.attachments import Attachment, attachment_of, whole_of
from lightning_uora.adapters.layers import AdaptedModule, Adapter, facts
from lightning_uora.adapters.names import SHELF, named_modules, named_parameters
from lightning_uora.adapters.norm_statistics import settle_statistics
from lightning_uora.adapters.projections import Projections
from lightning_uora.adapters.resizing import forget_resizing, watch_resizing
from lightning_uora.adapters.specialise import specialise, unspecialise
from lightning_uora.adapters.stacked import named_layers
from lightning_uora.distributed import first_rank, is_sharded

__all__ = ["Shelf", "Shelved", "activated", "adapter_names", "item_of", "put_back", "put_last", "put_off"]
__all__ += ["replace_parameter", "require_known", "shelf_of", "switch", "the_only"]

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
        self.facts: dict[str, dict[str, Any]] = {}  # of each layer, in the order of their numbers
        self.trained: dict[str, str] = {}  # names in the model of what trained besides
        self.statistics: dict[str, float] = {}  # of the base when it went
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

    def wake(self) -> None:
        """Let its parameters want gradients where they do on the model."""
        first = next((name for name, wants in self.wanted.items() if wants), None)
        if first is not None and cast(nn.Parameter, self._parameters[first]).requires_grad:
            return  # awake: all sleep and wake together
        for name, wants in self.wanted.items():
            cast(nn.Parameter, self._parameters[name]).requires_grad_(wants)

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

    @override
    def forward(self, x: Any) -> Any:
        """The input as it is: an ``nn.Sequential`` root calls what it holds."""
        return x

    def share(self) -> None:
        """One memory for what all adapters share, the one that computes among them."""
        waiting = [cast(Shelved, child).projections for child in self._modules.values()]
        _share([*waiting, self.__dict__["on"]] if "on" in self.__dict__ else waiting)


def _share(owners: list[Projections]) -> None:
    """One memory for equal draws. Under ``share="model"`` refreshes write into it, so those keep theirs."""
    seen: dict[tuple[Any, ...], Tensor] = {}
    for owner in owners:
        config = owner.config
        for name, M in owner._buffers.items():
            if M is None or M.is_meta or name.count("_") != 1 or config.share == "model":
                continue
            init = "orthogonal" if config.init == "inputs" else config.init
            key = (name, config.rank, config.seed, init, M.device, M.dtype)
            known = seen.setdefault(key, M)
            if known is not M and torch.equal(known, M):
                owner._buffers[name] = known


def shelf_of(one: Attachment) -> Shelf:
    """The shelf at a root, made if there is none."""
    found = one.root._modules.get(SHELF)
    if found is None:
        found = Shelf(one.owner.name)
        one.root.register_module(SHELF, found)
    return cast(Shelf, found)


def item_of(one: Attachment, name: str) -> Shelved:
    """An adapter that waits."""
    return cast(Shelved, cast(nn.Module, one.root._modules[SHELF])._modules[name])


def put_last(root: nn.Module) -> None:
    """The shelf stands behind the adapter that computes, in state dicts too, and knows its A and B."""
    shelf = cast(Shelf, root._modules.pop(SHELF))
    shelf.__dict__["on"] = attachment_of(root, "adapters").owner
    waiting = dict(shelf._modules)
    shelf._modules = {name: waiting[name] for name in shelf.order if name in waiting}
    root._modules[SHELF] = shelf


def the_only(model: nn.Module, action: str) -> Attachment:
    """The one adapted model in ``model``, or that ``model`` is a part of; it must be whole.

    Raises:
        ValueError: It is no such model, or a part of one that is gone; it is sharded, or in a mixed batch.
    """
    found = attachment_of(model, action)
    one = found if found.key is not None else whole_of(found)
    if one is None:
        raise ValueError(f"{action} takes the model that you gave to attach_uora, or a module around it.")
    if is_sharded(model):
        raise ValueError(
            f"{action}: a sharded model has only one adapter; use several where the model is whole."
        )
    if one.owner.mixing and action != "use_adapters":
        raise ValueError(
            f"{action} inside use_adapters would change the batch that is running; leave the `with` "
            "block first."
        )
    return one


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on ``model``, in the order in which they were added; empty for a plain model.

    Raises:
        ValueError: ``model`` holds several adapted models.
    """
    try:
        one = attachment_of(model, "adapter_names")
    except ValueError:
        if any(isinstance(m, AdaptedModule) for m in model.modules()):
            raise
        return []
    whole = one if one.key is not None else whole_of(one) or one
    shelf = whole.root._modules.get(SHELF)
    return list(shelf.order) if isinstance(shelf, Shelf) else [one.owner.name]


def require_known(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` with near misses where no adapter has that name."""
    names = adapter_names(model)
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is not an adapter's name; there are: {', '.join(map(repr, names))}.")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = "near misses" if near else "there are"
        raise ValueError(f"no adapter is called {name!r}; {hint}: {', '.join(map(repr, near or names))}.")


@contextmanager
def activated(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the adapter of that name is the one on the model; None: the one that is. Exactly undone."""
    if name is None or name == attachment_of(model, "an adapter by its name").owner.name:
        yield
        return
    require_known(model, name)
    one = the_only(model, "an adapter by its name")
    before, root = one.owner.name, one.root
    put_off(one)
    put_back(root, name)
    try:
        yield
    finally:
        put_off(attachment_of(root, "set_adapter"))
        put_back(root, before)


def switch(model: nn.Module, name: str) -> None:
    """Take the adapter that computes off and put another one on."""
    one = the_only(model, "an adapter by its name")
    require_known(model, name)
    if one.owner.name != name:
        put_off(one)
        put_back(one.root, name)


def put_off(one: Attachment) -> None:
    """Take the adapter that is on the model to the shelf."""
    root, owner, shelf = one.root, one.owner, shelf_of(one)
    item = Shelved(owner, cast(str, one.key))
    parameters = named_parameters(root, every=True)
    item.statistics = _statistics(root)
    forget_resizing(one)
    for name, layer in sorted(one.layers, key=lambda named: named[1].layer_index):
        item.facts[name] = facts(layer)
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
        replace_parameter(root, own, there)
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
        replace_parameter(root, there, item.take(key))
        owner.displaced[trained] = there
    put_last(root)
    moved = [n for n, total in _statistics(root).items() if item.statistics.get(n, total) != total]
    if moved and first_rank():
        warnings.warn(
            f"running statistics have changed since {name!r} was last active ({moved[0]!r} among "
            "them), and all adapters share them; keep BatchNorm in eval() while you train one of "
            "several adapters.",
            stacklevel=4,
        )
    watch_resizing(attachment_of(root, "set_adapter"))
    settle_statistics(root)


def _statistics(root: nn.Module) -> dict[str, float]:
    """A number for each buffer of the base that moves in training, such as BatchNorm's running mean."""
    norms = {p: m for p, m in named_modules(root).items() if getattr(m, "track_running_stats", False)}
    named = ((f"{p}.{leaf}".lstrip("."), b) for p, m in norms.items() for leaf, b in m._buffers.items())
    return {name: float(b.float().sum()) for name, b in named if b is not None and not b.is_meta}


def replace_parameter(root: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, under all its names."""
    for module in named_modules(root).values():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new
