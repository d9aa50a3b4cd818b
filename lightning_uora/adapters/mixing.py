"""One batch in which every sample has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_uora.adapters.attachments import Attachment
from lightning_uora.adapters.by_row import delta_by_row
from lightning_uora.adapters.functional import factored_delta
from lightning_uora.adapters.kinds import has_plain_forward
from lightning_uora.adapters.layers import AdaptedModule
from lightning_uora.adapters.mixing_experts import blocks_in, computing, require_no_records, stand_ready
from lightning_uora.adapters.names import named_modules, named_parameters
from lightning_uora.adapters.offloaded import KEPT_FORWARD
from lightning_uora.adapters.opaque import is_opaque
from lightning_uora.adapters.projections import Projections
from lightning_uora.adapters.several_layers import LayerOf, item_of, layers_of, trained_with
from lightning_uora.adapters.shelf import require_known, the_only
from lightning_uora.adapters.stacked import Experts, named_layers

__all__ = ["use_adapters"]

PLAIN = (Tensor, bool, int, float, str, tuple, list)
"""What a block is given that can be split into samples, or is the same for all."""

# Note [How a batch is mixed]
# Inside the context every layer that one of the named adapters has computes its base once, and the updates by
# row: adapters that share A and B are two tables, whatever their number, see Note [Two products for all
# rows]; one with rows or axes of its own is two small products for its samples. Layers that have no factored
# form (convolutions, attention), and what trained besides (heads), compute once for each adapter on its
# samples with its weights in their place; so do mixtures of experts, see Note [Experts in a mixed batch]. The
# first axis of every input is the batch, or the batch times something (beams, windows, tokens), sample after
# sample. Adapters that wait want gradients from the first batch on that names them: a backward comes after
# the context.


@dataclass
class Mix:
    """Who is in the batch. ``index`` has an adapter's number for every sample, and -1 for the base."""

    index: Tensor
    names: list[str]
    on: dict[torch.device, Tensor] = field(default_factory=dict)
    generating: int = 0
    blocks: bool = False

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """Inside, the batch is of one adapter, however its rows are sorted."""
        before, self.index, self.on = (self.index, self.on), torch.tensor([number]), {}
        try:
            yield
        finally:
            self.index, self.on = before

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The batch that the model gets: of another length only under ``generate``, by beams."""
        if self.blocks and len(set(self.index.tolist())) > 1:
            require_no_records(module, kwargs)
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if first is not None and first.shape[0] != len(self.index) and not self.generating:
            raise ValueError(
                f"the batch has {first.shape[0]} samples, and use_adapters was given {len(self.index)} names."
            )

    def generate(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own, inside which beams repeat samples."""
        self.generating += 1
        try:
            return type(module).generate(module, *args, **kwargs)
        finally:
            self.generating -= 1

    def rows(self, x: Tensor, count: int, what: str) -> Tensor:
        """The number of each of ``count`` rows of ``x``, whose first axis is the batch or a multiple."""
        batch = len(self.index)
        if x.shape[0] % batch:
            raise ValueError(
                f"{what} gets a batch of {x.shape[0]}, and use_adapters was given {batch} names; give one "
                "for each sample."
            )
        if x.device not in self.on:
            self.on[x.device] = self.index.to(x.device)
        return self.on[x.device].repeat_interleave(count // batch)


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, sample i of the batch computes with adapter ``names[i]``; None: with the base.

    Forward and backward: every adapter that is named gets its gradient, the others none. Equal to each sample
    with its adapter alone, to rounding. Heads that were trained with an adapter compute for its samples; for
    None those of the adapter in use. Refresh outside of it. See Note [How a batch is mixed].

    Args:
        model: The adapted model, or one around it.
        names: One for each sample, along the first axis of every input.

    Raises:
        ValueError: No adapter has that name; no name is given; a layer cannot be mixed (attention that is
            not batch first); in a forward: a batch of another size (the model's, where it is what adapters
            were attached to; inside of ``generate`` a multiple), heads of different shapes, routers' outputs.

    Example:
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
    if isinstance(names, str) or not names:
        raise ValueError("names is one name for each sample of the batch, such as ['one', None, 'two'].")
    chosen = list(dict.fromkeys(name for name in names if name is not None))
    for name in chosen:
        require_known(model, name)
    numbers = {name: number for number, name in enumerate(chosen)}
    mix = Mix(torch.tensor([-1 if name is None else numbers[name] for name in names]), chosen)
    layers, swapped = _layers(one, chosen), _swapped(one, chosen)
    blocks = blocks_in(layers, named_layers(one.root))
    mix.blocks = bool(blocks)
    with ExitStack() as undo:
        modules = named_modules(one.root)
        undo.enter_context(stand_ready(layers))
        for path, paths in blocks.items():
            held = [(layers[stack], next(iter(layers[stack].values())).module) for stack in paths]
            undo.enter_context(_forward_of(modules[path], partial(_by_block, modules[path], path, mix, held)))
        for path, forward in _forwards(one, mix, layers, swapped).items():
            undo.enter_context(_forward_of(modules[path], forward))
        undo.callback(one.root.register_forward_pre_hook(mix.check, with_kwargs=True).remove)
        for module in one.root.modules():
            if callable(getattr(type(module), "generate", None)) and "generate" not in module.__dict__:
                module.__dict__["generate"] = partial(mix.generate, module)
                undo.callback(module.__dict__.pop, "generate")
        owners = {mine.adapter.owner for by_number in layers.values() for mine in by_number.values()}
        undo.enter_context(_switched_off({one.owner, *owners}))
        yield


@contextmanager
def _switched_off(owners: Iterable[Projections]) -> Iterator[None]:
    """Inside, layers compute their base; who takes their weights is told."""
    before = [(owner, owner.mixing) for owner in owners]
    for owner, _ in before:
        owner.disabled, owner.mixing = owner.disabled + 1, True
    try:
        yield
    finally:
        for owner, mixing in before:
            owner.disabled, owner.mixing = owner.disabled - 1, mixing


def _layers(one: Attachment, chosen: list[str]) -> dict[str, dict[int, LayerOf]]:
    """By layer and number of the adapter."""
    found: dict[str, dict[int, LayerOf]] = {}
    for number, name in enumerate(chosen):
        if name != one.owner.name:
            item_of(one, name).wake()
        for path, what in layers_of(one, name).items():
            found.setdefault(path, {})[number] = what
    return found


def _swapped(one: Attachment, chosen: list[str]) -> dict[str, dict[int, dict[str, Tensor]]]:
    """What trained besides: by module, number of the adapter and name in the module."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    here = named_parameters(one.root, every=True)
    for number, name in enumerate(chosen):
        for trained, parameter in trained_with(one, name, here).items():
            path, _, leaf = trained.rpartition(".")
            found.setdefault(path, {}).setdefault(number, {})[leaf] = parameter
    return found if set(chosen) - {one.owner.name} else {}


Forward = Callable[..., Any]


def _forwards(
    one: Attachment,
    mix: Mix,
    layers: dict[str, dict[int, LayerOf]],
    swapped: dict[str, dict[int, dict[str, Tensor]]],
) -> dict[str, Forward]:
    """What each module computes instead, by its path."""
    modules, found = named_layers(one.root), dict[str, Forward]()
    inside = {f"{path}.out_proj" for path in layers if isinstance(modules[path], nn.MultiheadAttention)}
    for path in dict.fromkeys((*layers, *swapped)):
        module, mine, besides = modules[path], layers.get(path, {}), swapped.get(path, {})
        kind = getattr(type(module), "uora_original", type(module))
        if isinstance(module, Experts):  # see Note [Experts in a mixed batch]
            continue
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise ValueError(f"attention {path!r} is not batch first, and cannot be mixed in a batch.")
        if path in inside:
            continue
        if not besides and (has_plain_forward(kind) or is_opaque(module)):
            (part,) = next(iter(mine.values())).adapter.parts.values()
            shared = _tables(mine, part.n, len(mix.names))
            found[path] = partial(_by_row, module, path, mix, mine, shared)
            continue
        children = {path: (module, mine, besides)}
        if f"{path}.out_proj" in inside:
            name = f"{path}.out_proj"
            children[name] = (modules[name], layers.get(name, {}), swapped.get(name, {}))
        found[path] = partial(_by_adapter, module, path, mix, children)
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


@dataclass
class Table:
    """Adapters that share A, B and dropout in a layer; ``place``: the row of each, the last for others."""

    mine: list[LayerOf]
    place: Tensor
    dropout: float

    def vectors(self) -> tuple[Tensor, Tensor]:
        """D (K + 1, r) and b (K + 1, m), the last rows zero."""
        D, b = [one.uora_d for one in self.mine], [one.uora_b for one in self.mine]
        return torch.stack([*D, torch.zeros_like(D[0])]), torch.stack([*b, torch.zeros_like(b[0])])


def _tables(mine: dict[int, LayerOf], n: int, count: int) -> tuple[list[Table], list[int]]:
    """Those that share, and those with rows of their own."""
    found: dict[tuple[int, int, float], list[int]] = {}
    alone: list[int] = []
    for number, one in mine.items():
        owner = one.adapter.owner
        owner.require_calibrated("a mixed batch")
        A, B, own = one.sources(n)
        if own.tensors:
            alone.append(number)
        else:
            found.setdefault((id(A), id(B), owner.config.dropout), []).append(number)
    tables = []
    for (*_, p), numbers in found.items():
        place = torch.full((count + 1,), len(numbers))
        place[numbers] = torch.arange(len(numbers))
        tables.append(Table([mine[number] for number in numbers], place, p))
    return tables, alone


def _by_row(
    module: nn.Module,
    path: str,
    mix: Mix,
    mine: dict[int, LayerOf],
    shared: tuple[list[Table], list[int]],
    x: Tensor,
    *args: Any,
) -> Tensor:
    """The base, and all updates by row."""
    with _reading([module]):
        out: Tensor = type(module).forward(module, x, *args)
    (part,) = next(iter(mine.values())).adapter.parts.values()
    samples = mix.rows(x, len(mix.index), f"layer {path!r}")
    for table in shared[0]:
        if table.place.device != x.device:
            table.place = table.place.to(x.device)
        A, B, own = table.mine[0].sources(part.n)
        dropped = nn.functional.dropout(x, table.dropout, module.training)
        out = out + delta_by_row(dropped, table.place[samples], A, B, *table.vectors(), own).to(out.dtype)
    index = samples.repeat_interleave(x.numel() // part.n // len(samples)) if shared[1] else samples
    for number in shared[1]:
        here = (index == number).nonzero().flatten()
        if len(here):
            A, B, own = mine[number].sources(part.n)
            rows = x.reshape(-1, part.n)[here]
            dropped = nn.functional.dropout(rows, mine[number].adapter.owner.config.dropout, module.training)
            delta = factored_delta(dropped, A, B, mine[number].uora_d, mine[number].uora_b, own)
            flat = out.reshape(-1, out.shape[-1])
            out = flat.index_add(0, here, delta.to(out.dtype)).reshape(out.shape)
    return out


Children = dict[str, tuple[nn.Module, dict[int, LayerOf], dict[int, dict[str, Tensor]]]]


def _by_adapter(module: nn.Module, path: str, mix: Mix, children: Children, *args: Any, **kwargs: Any) -> Any:
    """The module once for each adapter, on its samples and with its weights in their place."""
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    index, size = mix.rows(first, first.shape[0], f"module {path!r}"), first.shape[0]
    outs: list[tuple[Tensor, Any]] = []
    for number in sorted(set(index.tolist())):
        here = (index == number).nonzero().flatten()

        def mine(t: Tensor, here: Tensor = here) -> Tensor:
            return t[here] if t.dim() and t.shape[0] == size else t

        given, named = tree_map_only(Tensor, mine, (args, kwargs))
        with ExitStack() as undo:
            for child, layers, besides in children.values():
                weights = dict(besides.get(number, {}))
                if number in layers:
                    weights |= _effective(child, layers[number])
                undo.enter_context(_parameters_of(child, weights))
            undo.enter_context(_reading(child for child, *_ in children.values()))
            outs.append((here, type(module).forward(module, *given, **named)))
    return _joined(outs, path)


@contextmanager
def _reading(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules may read their weights; see Note [Weights in a mixed batch]."""
    adapters = [m._uora for m in modules if isinstance(m, AdaptedModule)]
    for adapter in adapters:
        adapter.reading += 1
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.reading -= 1


Stacks = list[tuple[dict[int, LayerOf], nn.Module]]


def _by_block(module: nn.Module, path: str, mix: Mix, stacks: Stacks, *args: Any, **kwargs: Any) -> Any:
    """A block around experts once for each adapter; see Note [Experts in a mixed batch]."""
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    index, size = mix.rows(first, first.shape[0], f"block {path!r}"), first.shape[0]
    numbers = sorted(set(index.tolist()))
    strange = [type(v).__name__ for v in (*args, *kwargs.values()) if not isinstance(v, (*PLAIN, type(None)))]
    if strange and len(numbers) > 1:
        raise ValueError(
            f"block {path!r} around experts is given a {strange[0]}, which cannot be split into the samples "
            "of each adapter; give use_adapters one name."
        )
    outs: list[tuple[Tensor, Any]] = []
    for number in numbers:
        here = (index == number).nonzero().flatten()

        def mine(t: Tensor, here: Tensor = here) -> Tensor:
            return t[here] if len(numbers) > 1 and t.dim() and t.shape[0] == size else t

        given, named = tree_map_only(Tensor, mine, (args, kwargs))
        with mix.only(number), computing((stack, layers.get(number)) for layers, stack in stacks):
            outs.append((here, type(module).forward(module, *given, **named)))
    return outs[0][1] if len(outs) == 1 else _joined(outs, path)


def _effective(module: nn.Module, mine: LayerOf) -> dict[str, Tensor]:
    found = {}
    for name, part in mine.adapter.parts.items():
        A, B, own = mine.sources(part.n)
        found[name] = part.delta(cast(Tensor, module._parameters[name]), A, B, mine.uora_d, mine.uora_b, own)
    return found


@contextmanager
def _parameters_of(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    before = {name: module._parameters[name] for name in weights}
    module._parameters.update(cast("dict[str, nn.Parameter | None]", weights))
    try:
        yield
    finally:
        module._parameters.update(before)


def _joined(outs: list[tuple[Tensor, Any]], path: str) -> Any:
    """Outputs of all samples in their order; a sample may be several rows."""
    first = outs[0][1]
    if isinstance(first, (tuple, list)):
        return type(first)(
            None if part is None else _joined([(here, out[k]) for here, out in outs], path)
            for k, part in enumerate(first)
        )
    whole = all(isinstance(out, Tensor) and out.dim() and out.shape[0] % len(here) == 0 for here, out in outs)
    if not whole:
        what = type(first).__name__ if not isinstance(first, Tensor) else f"a tensor {tuple(first.shape)}"
        raise ValueError(f"{path!r} puts out {what}, which is not of single samples, and cannot be mixed.")
    shapes = {tuple(out.shape[1:]) for _, out in outs}
    if len(shapes) > 1:
        told = ", ".join(map(str, sorted(shapes)))
        raise ValueError(
            f"{path!r} puts out {told} for different adapters; a batch mixes those of one shape."
        )
    rows = []
    for here, out in outs:
        per = out.shape[0] // len(here)
        rows.append((here[:, None] * per + torch.arange(per, device=here.device)).flatten())
    order = torch.cat(rows).argsort()
    return torch.cat([out for _, out in outs])[order]
