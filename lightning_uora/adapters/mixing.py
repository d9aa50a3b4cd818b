"""One batch in which every sample has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters.attachments import Attachment
from lightning_uora.adapters.kinds import has_plain_forward
from lightning_uora.adapters.layers import AdaptedModule
from lightning_uora.adapters.mixed_layers import (
    Mix,
    Shares,
    by_adapter,
    by_block,
    by_row,
    guarded,
    tables_of,
)
from lightning_uora.adapters.mixing_experts import blocks_in
from lightning_uora.adapters.names import named_modules, named_parameters
from lightning_uora.adapters.offloaded import KEPT_FORWARD
from lightning_uora.adapters.opaque import is_opaque
from lightning_uora.adapters.projections import Projections
from lightning_uora.adapters.several_layers import LayerOf, layers_of, trained_with
from lightning_uora.adapters.shelf import adapter_names, item_of, require_known, the_only
from lightning_uora.adapters.specialise import specialise, unspecialise
from lightning_uora.adapters.stacked import Experts, named_layers

__all__ = ["use_adapters"]

# Note [How a batch is mixed]
# Inside the context every layer that one of the named adapters has computes its base once, and the updates by
# row: adapters that share A and B are two tables, whatever their number, see Note [Two products for all
# rows]; one with rows or axes of its own is two small products for its samples. Without gradients, and few
# adapters for many rows, weights are built for each instead, which is less work. Layers that have no factored
# form (convolutions, attention), and what trained besides (heads), compute once for each adapter on its
# samples with its weights in their place; so do mixtures of experts, see Note [Experts in a mixed batch]. The
# first axis of every input is the batch, or the batch times something (beams, windows, tokens), sample after
# sample. Adapters that wait want gradients from the first batch on that names them: a backward comes after
# the context.


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside the ``with``, sample i of the batch computes with adapter ``names[i]``; None: with the base.

    It works forward and backward: adapters that are named get gradients, the others none. To rounding, each
    sample comes out as with its adapter alone. Heads go with their adapter: an adapter that trained none uses
    the heads that the model had before it, and None uses those of the active adapter.

    Wherever an adapted layer or a trained head is called, the first axis of its input must be the batch, or a
    multiple of it, sample after sample. A model that goes on with (tokens, batch), or sorts windows first, is
    mixed wrongly if the sizes happen to divide: compare one batch with ``set_adapter``. Inside, adapters
    cannot be added, set or removed, and nothing is refreshed. All adapters share running statistics
    (BatchNorm). See Note [How a batch is mixed].

    Args:
        model: The adapted model, a module around it, or a part of it.
        names: One for each sample, along the first axis of every input.

    Raises:
        ValueError: No adapter has that name; no name is given; a layer cannot be mixed (attention that is
            not batch first). In a forward: the batch has another size (inside ``generate`` a multiple is
            allowed), heads have different shapes, or routers' outputs are asked for.

    Example:
        >>> import torch
        >>> from lightning_uora import UORAConfig, add_adapter, attach_uora
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> layers = attach_uora(model, UORAConfig(rank=4, target_modules=["0"], trainable_modules=()))
        >>> layers = add_adapter(model, "second")
        >>> with use_adapters(model, ["second", "default", None]):
        ...     tuple(model(torch.zeros(3, 7)).shape)
        (3, 3)

    Source: *ours*.
    """
    one = the_only(model, "use_adapters")
    names = _as_list(names)
    chosen = list(dict.fromkeys(name for name in names if name is not None))
    for name in set(chosen) - set(adapter_names(model)):
        require_known(model, name)
    numbers = {name: number for number, name in enumerate(chosen)}
    mix = Mix([-1 if name is None else numbers[name] for name in names], chosen)
    layers, swapped = _layers(one, chosen), _swapped(one, chosen, set(mix.index))
    _require_batch_first(one.root, (*layers, *swapped))
    blocks = blocks_in(layers, named_layers(one.root))
    mix.blocks = bool(blocks)
    with ExitStack() as undo:
        modules = named_modules(one.root)
        undo.enter_context(_stand_ready(layers))
        for path, paths in blocks.items():
            held = [(layers[stack], next(iter(layers[stack].values())).module) for stack in paths]
            undo.enter_context(_forward_of(modules[path], partial(by_block, modules[path], path, mix, held)))
        for path, forward in _forwards(one, mix, layers, swapped).items():
            undo.enter_context(_forward_of(modules[path], forward))
        undo.callback(one.root.register_forward_pre_hook(mix.check, with_kwargs=True).remove)
        for module in one.root.modules():
            if callable(getattr(type(module), "generate", None)) and "generate" not in module.__dict__:
                module.__dict__["generate"] = partial(mix.generate, module)
                undo.callback(module.__dict__.pop, "generate")
        owners = {mine.adapter.owner for by_number in layers.values() for mine in by_number.values()}
        undo.enter_context(_switched_off({one.owner, *owners}))
        undo.enter_context(_marked(modules[path] for path in layers if path in modules))
        for path, by_number in swapped.items():
            leaves = {leaf for values in by_number.values() for leaf in values}
            undo.enter_context(guarded(modules[path], path, leaves))
        yield


def _as_list(names: Any) -> list[str | None]:
    """Names for each sample. Raises ``ValueError`` for anything else."""
    given: list[Any] = []
    if isinstance(names, Iterable) and not isinstance(names, (str, bytes, Mapping)):
        given = list(names)
    if not given or not all(name is None or isinstance(name, str) for name in given):
        raise ValueError(
            "names must be a list of one name for each sample of the batch, such as ['one', None, 'two']."
        )
    return given


def _require_batch_first(root: nn.Module, paths: Iterable[str]) -> None:
    """Raise ``ValueError`` where modules beside those of the batch see another axis first."""
    chosen = list(paths)
    for path, module in named_modules(root).items():
        inside = type(module).__name__.startswith(TOKENS_FIRST)
        beside = f"{path.rpartition('.')[0]}." if "." in path else ""
        prefix = (f"{path}." if path else "") if inside else beside
        if (inside or getattr(module, "batch_first", None) is False) and any(
            one.startswith(prefix) for one in chosen
        ):
            raise ValueError(
                f"{type(module).__name__} {path!r} is not batch first, so a batch that it sees cannot mix "
                "adapters; build it with batch_first=True, or give use_adapters one name at a time."
            )


TOKENS_FIRST = ("XLNet", "UORAXLNet")
"""Classes whose layers see (tokens, batch, width)."""


@contextmanager
def _switched_off(owners: Iterable[Projections]) -> Iterator[None]:
    """Inside, layers compute their base, and nobody may change adapters."""
    before = [(owner, owner.mixing) for owner in owners]
    for owner, _ in before:
        owner.disabled, owner.mixing = owner.disabled + 1, True
    try:
        yield
    finally:
        for owner, mixing in before:
            owner.disabled, owner.mixing = owner.disabled - 1, mixing


@contextmanager
def _stand_ready(layers: Mapping[str, Mapping[int, LayerOf]]) -> Iterator[None]:
    """Inside, every layer is of an adapted class, whichever adapter it is of."""
    with ExitStack() as undo:
        for mine in layers.values():
            first = next(iter(mine.values()))
            if not isinstance(first.module, AdaptedModule):
                specialised = specialise(first.module, first.adapter.owner, first.adapter.index)
                undo.callback(unspecialise, specialised)
        yield


@contextmanager
def _marked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, who takes the weights of these modules is told."""
    before = [(m._uora, m._uora.mixing) for m in modules if isinstance(m, AdaptedModule)]
    for adapter, _ in before:
        adapter.mixing = True
    try:
        yield
    finally:
        for adapter, mixing in before:
            adapter.mixing = mixing


def _layers(one: Attachment, chosen: list[str]) -> dict[str, dict[int, LayerOf]]:
    """By layer and number of the adapter."""
    found: dict[str, dict[int, LayerOf]] = {}
    here = named_layers(one.root)
    for number, name in enumerate(chosen):
        if name != one.owner.name and torch.is_grad_enabled():
            item_of(one, name).wake()
        for path, what in layers_of(one, name, here).items():
            found.setdefault(path, {})[number] = what
    return found


Swapped = dict[str, dict[int, dict[str, Tensor]]]


def _swapped(one: Attachment, chosen: list[str], numbers: set[int]) -> Swapped:
    """What trained besides, of who is in the batch: by module, number of the adapter and name in the module.

    An adapter that did not train a parameter computes with what the model had before, the base with what is
    there.
    """
    found: Swapped = {}
    here = named_parameters(one.root, every=True)
    of = {number: trained_with(one, chosen[number], here) if number >= 0 else {} for number in numbers}
    in_use = trained_with(one, one.owner.name, here)
    for name in dict.fromkeys((*in_use, *(trained for own in of.values() for trained in own))):
        before = one.owner.displaced.get(name, here[name])
        values = {number: own.get(name, before) if number >= 0 else here[name] for number, own in of.items()}
        if all(value is here[name] for value in values.values()):
            continue
        tied = [place for place, p in here.items() if p is here[name]]  # all its names
        for place in tied:
            path, _, leaf = place.rpartition(".")
            for number, value in values.items():
                found.setdefault(path, {}).setdefault(number, {})[leaf] = value
    return found


Forward = Callable[..., Any]


def _forwards(
    one: Attachment,
    mix: Mix,
    layers: dict[str, dict[int, LayerOf]],
    swapped: Swapped,
) -> dict[str, Forward]:
    """What each module computes instead, by its path."""
    modules, found = named_layers(one.root), dict[str, Forward]()
    shares: Shares = {}
    paths = dict.fromkeys((*layers, *swapped))
    outer = {path: path.rpartition(".")[0] for path in paths}
    inside = {path for path in paths if isinstance(modules.get(outer[path]), nn.MultiheadAttention)}
    for path in dict.fromkeys((*paths, *(outer[path] for path in inside))):
        module, mine, besides = modules[path], layers.get(path, {}), swapped.get(path, {})
        kind = getattr(type(module), "uora_original", type(module))
        if path in inside or isinstance(module, Experts):  # see Note [Experts in a mixed batch]
            continue
        if mine and not besides and (has_plain_forward(kind) or is_opaque(module)):
            (part,) = next(iter(mine.values())).adapter.parts.values()
            shared = tables_of(mine, part.m, part.n, len(mix.names), shares)
            found[path] = partial(by_row, module, path, mix, mine, shared)
            continue
        children = {path: (module, mine, besides)}
        for name in (name for name in inside if outer[name] == path):
            children[name] = (modules[name], layers.get(name, {}), swapped.get(name, {}))
        found[path] = partial(by_adapter, module, path, mix, children)
    return found


@contextmanager
def _forward_of(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Another forward on the instance, where a hook of accelerate keeps it if there is one."""
    key = KEPT_FORWARD if KEPT_FORWARD in module.__dict__ else "forward"
    had = module.__dict__.get(key)
    module.__dict__[key] = forward
    try:
        yield
    finally:
        if had is None:
            del module.__dict__[key]
        else:
            module.__dict__[key] = had
