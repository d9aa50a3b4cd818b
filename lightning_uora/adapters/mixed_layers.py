"""What modules compute in a mixed batch: by row, once for each adapter, or a whole block so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_uora.adapters.by_row import add_by_row_, delta_by_row
from lightning_uora.adapters.effective import mixed_weight
from lightning_uora.adapters.functional import factored_delta, wants_plain
from lightning_uora.adapters.layers import AdaptedModule
from lightning_uora.adapters.mixing_experts import computing, require_no_records
from lightning_uora.adapters.opaque import is_opaque
from lightning_uora.adapters.several_layers import LayerOf

__all__ = ["Children", "Mix", "Shares", "Stacks", "by_adapter", "by_block", "by_row", "guarded", "tables_of"]

PLAIN = (Tensor, bool, int, float, str, tuple, list)
"""What a block is given that can be split into samples, or is the same for all."""
GROUPED = 0.7
"""Weights are built for each adapter where that takes less than this share of the products by row."""

Rows = Tensor | slice


@dataclass
class Mix:
    """Who is in the batch. ``index`` has an adapter's number for every sample, and -1 for the base."""

    index: list[int]
    names: list[str]
    blocks: bool = False
    generating: int = 0
    run: int = 0
    known: dict[Any, Any] = field(default_factory=dict)

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """Inside, the batch is of one adapter, however its rows are sorted."""
        before = self.index, self.known
        self.index, self.known = [number], {}
        try:
            yield
        finally:
            self.index, self.known = before

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The batch that the model gets: of another length only under ``generate``, by beams."""
        if self.blocks and len(set(self.index)) > 1:
            require_no_records(module, kwargs)
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if first is not None and first.shape[0] != len(self.index) and not self.generating:
            raise ValueError(
                f"the batch has {first.shape[0]} samples, but use_adapters was given {len(self.index)} "
                "names; give one for each sample."
            )

    def generate(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own, inside which beams repeat samples."""
        self.generating, self.run = self.generating + 1, self.run + 1
        try:
            return type(module).generate(module, *args, **kwargs)
        finally:
            self.generating -= 1

    def times(self, x: Tensor, what: str) -> int:
        """How many rows of the first axis a sample has. Raises ``ValueError`` where that is no number."""
        batch = len(self.index)
        if x.shape[0] % batch:
            raise ValueError(
                f"{what} gets a batch of {x.shape[0]}, but use_adapters was given {batch} names; give one "
                "for each sample."
            )
        return x.shape[0] // batch

    def numbers(self, device: torch.device) -> Tensor:
        """The adapter's number of every sample."""
        if device not in self.known:
            with _not_of_inference():
                self.known[device] = torch.tensor(self.index, device=device)
        return cast(Tensor, self.known[device])

    def groups(self, x: Tensor, what: str) -> list[tuple[int, Rows]]:
        """Each number with its rows of the first axis of ``x``, all of them in order."""
        per = self.times(x, what)
        key = ("groups", per, x.device)
        if key not in self.known:
            self.known[key] = [
                (number, self._rows(number, per, x.device)) for number in sorted(set(self.index))
            ]
        return cast("list[tuple[int, Rows]]", self.known[key])

    def _rows(self, number: int, per: int, device: torch.device) -> Rows:
        places = [place for place, one in enumerate(self.index) if one == number]
        if places[-1] - places[0] == len(places) - 1:
            return slice(places[0] * per, (places[-1] + 1) * per)
        with _not_of_inference():
            here = torch.tensor(places, device=device)
            return (here[:, None] * per + torch.arange(per, device=device)).flatten()


def _not_of_inference() -> AbstractContextManager[object]:
    """What is kept may be saved for a backward later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@dataclass
class Table:
    """Adapters that share A, B and dropout in a layer; ``place``: the row of each, the last for others."""

    mine: list[LayerOf]
    place: Tensor
    dropout: float
    kept: tuple[int, tuple[Tensor, Tensor]] | None = None

    def vectors(self, run: int = 0) -> tuple[Tensor, Tensor]:
        """D (K + 1, r) and b (K + 1, m), the last rows zero; kept through one ``generate``, the ``run``."""
        if run and self.kept is not None and self.kept[0] == run:
            return self.kept[1]
        D, b = [one.uora_d for one in self.mine], [one.uora_b for one in self.mine]
        stacked = _stacked(D), _stacked(b)
        self.kept = (run, stacked) if run and not torch.is_grad_enabled() else None
        return stacked


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack([*rows, torch.zeros_like(rows[0])])


Shares = dict[Any, tuple[list[tuple[list[int], float]], list[int]]]


def tables_of(
    mine: dict[int, LayerOf], m: int, n: int, count: int, known: Shares
) -> tuple[list[Table], list[int]]:
    """Those that share, and those with rows of their own; ``known`` remembers who shares for equal sizes."""
    key = (m, n, tuple(mine))
    if key not in known or any(one.adapter.owner.has_own for one in mine.values()):
        known[key] = _who_share(mine, n)
    shared, alone = known[key]
    tables = []
    for numbers, p in shared:
        place = torch.full((count + 1,), len(numbers))
        place[numbers] = torch.arange(len(numbers))
        tables.append(Table([mine[number] for number in numbers], place, p))
    return tables, alone


def _who_share(mine: dict[int, LayerOf], n: int) -> tuple[list[tuple[list[int], float]], list[int]]:
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
    return [(numbers, p) for (*_, p), numbers in found.items()], alone


def by_row(
    module: nn.Module,
    path: str,
    mix: Mix,
    mine: dict[int, LayerOf],
    shared: tuple[list[Table], list[int]],
    x: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The base, and all updates by row; or once for each adapter where that is less work."""
    if x is None:  # by its name, which is another one in each class
        x = cast(Tensor, kwargs.pop("input") if "input" in kwargs else kwargs.pop("x"))
    (part,) = next(iter(mine.values())).adapter.parts.values()
    lean = not torch.is_grad_enabled() and not wants_plain() and not is_opaque(module)
    if lean and _worth_grouping(module, mix, mine, x, part.m, part.n):
        return cast(Tensor, by_adapter(module, path, mix, {path: (module, mine, {})}, x, *args, **kwargs))
    with _reading([module]):
        out: Tensor = type(module).forward(module, x, *args, **kwargs)
    mix.times(x, f"layer {path!r}")
    samples = mix.numbers(x.device)
    for table in shared[0]:
        if table.place.device != x.device:
            with _not_of_inference():
                table.place = table.place.to(x.device)
        A, B, own = table.mine[0].sources(part.n)
        dropped = nn.functional.dropout(x, table.dropout, module.training)
        run = mix.run if mix.generating and not torch.compiler.is_compiling() else 0
        rows = table.place[samples], A, B, *table.vectors(run), own
        if not (lean and add_by_row_(out, dropped, *rows)):
            out = out + delta_by_row(dropped, *rows).to(out.dtype)
    index = samples.repeat_interleave(x.numel() // part.n // len(samples)) if shared[1] else samples
    for number in shared[1]:
        here = (index == number).nonzero().flatten()
        if len(here):
            A, B, own = mine[number].sources(part.n)
            rows_of = x.reshape(-1, part.n)[here]
            p = mine[number].adapter.owner.config.dropout
            dropped = nn.functional.dropout(rows_of, p, module.training)
            delta = factored_delta(dropped, A, B, mine[number].uora_d, mine[number].uora_b, own)
            flat = out.reshape(-1, out.shape[-1])
            out = flat.index_add(0, here, delta.to(out.dtype)).reshape(out.shape)
    return out


def _worth_grouping(module: nn.Module, mix: Mix, mine: dict[int, LayerOf], x: Tensor, m: int, n: int) -> bool:
    """Whether weights for each adapter take fewer operations than products by row, in r of both."""
    if x.is_nested or (module.training and any(o.adapter.owner.config.dropout for o in mine.values())):
        return False
    return len(set(mix.index) & set(mine)) * m * n < GROUPED * (x.numel() // n) * (m + n)


Children = dict[str, tuple[nn.Module, dict[int, LayerOf], dict[int, dict[str, Tensor]]]]


def by_adapter(module: nn.Module, path: str, mix: Mix, children: Children, *args: Any, **kwargs: Any) -> Any:
    """The module once for each adapter, on its samples and with its weights in their place."""

    def run(number: int, given: Sequence[Any], named: dict[str, Any]) -> Any:
        with ExitStack() as undo:
            undo.enter_context(mix.only(number))  # what else is inside sees one adapter
            for child, layers, besides in children.values():
                weights = dict(besides.get(number, {}))
                if number in layers:
                    weights |= _effective(child, layers[number], weights)
                undo.enter_context(_parameters_of(child, weights))
            undo.enter_context(_reading(child for child, *_ in children.values()))
            return type(module).forward(module, *given, **named)

    return _each(mix, path, run, args, kwargs)


Stacks = list[tuple[dict[int, LayerOf], nn.Module]]


def by_block(module: nn.Module, path: str, mix: Mix, stacks: Stacks, *args: Any, **kwargs: Any) -> Any:
    """A block around experts once for each adapter; see Note [Experts in a mixed batch]."""
    strange = [type(v).__name__ for v in (*args, *kwargs.values()) if not isinstance(v, (*PLAIN, type(None)))]
    if strange and len(set(mix.index)) > 1:
        raise ValueError(
            f"block {path!r} around experts receives a value of type {strange[0]}, which cannot be "
            "split by adapter; give use_adapters one name at a time."
        )

    def run(number: int, given: Sequence[Any], named: dict[str, Any]) -> Any:
        with mix.only(number), computing((stack, layers.get(number)) for layers, stack in stacks):
            return type(module).forward(module, *given, **named)

    return _each(mix, path, run, args, kwargs)


def _each(
    mix: Mix,
    path: str,
    run: Callable[[int, Sequence[Any], dict[str, Any]], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What ``run`` puts out for the rows of each adapter, put together."""
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    groups, size = mix.groups(first, f"module {path!r}"), first.shape[0]
    if len(groups) == 1:
        return run(groups[0][0], args, kwargs)
    outs = []
    for number, here in groups:

        def mine(t: Tensor, here: Rows = here) -> Tensor:
            return t[here] if t.dim() and t.shape[0] == size else t

        outs.append(run(number, *tree_map_only(Tensor, mine, (args, kwargs))))
    return _joined(outs, [here for _, here in groups], size, path)


@contextmanager
def _reading(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules may read their weights; see Note [Weights in a mixed batch]."""
    chosen = list(modules)
    adapters = [m._uora for m in chosen if isinstance(m, AdaptedModule)]
    guards = [m.__dict__ for m in chosen if READING in m.__dict__]
    for adapter in adapters:
        adapter.reading += 1
    for guard in guards:
        guard[READING] += 1
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.reading -= 1
        for guard in guards:
            guard[READING] -= 1


READING = "_uora_reading"
"""Of a module whose own parameters are exchanged: how many of its forwards run."""


GUARDED_PATH = "_uora_path"


@contextmanager
def guarded(module: nn.Module, path: str, leaves: Iterable[str]) -> Iterator[None]:
    """Inside, exchanged parameters are the module's own business; see Note [Weights in a mixed batch]."""
    before, own = type(module), module.__dict__
    outer = {key: own[key] for key in (READING, GUARDED_PATH) if key in own}
    own[READING], own[GUARDED_PATH] = 0, path
    module.__class__ = _guarded_class(before, tuple(sorted(leaves)))
    try:
        yield
    finally:
        module.__class__ = before
        del own[READING], own[GUARDED_PATH]
        own.update(outer)


_GUARDED: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
"""One for each class and leaves: compiled code asks for the type."""


def _guarded_class(cls: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    if (cls, leaves) not in _GUARDED:
        body: dict[str, Any] = {leaf: _guard(leaf) for leaf in leaves}
        _GUARDED[cls, leaves] = type(cls.__name__, (cls,), {**body, "__module__": cls.__module__})
    return _GUARDED[cls, leaves]


def _guard(leaf: str) -> property:
    def read(self: nn.Module) -> Tensor | None:
        parameter, own = self._parameters[leaf], self.__dict__
        free = parameter is None or own[READING]
        return parameter if free else mixed_weight(cast(Tensor, parameter), own[GUARDED_PATH])

    return property(read)


def _effective(module: nn.Module, mine: LayerOf, besides: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights, on what stands there when it computes."""
    found = {}
    for name, part in mine.adapter.parts.items():
        A, B, own = mine.sources(part.n)
        W = besides.get(name, cast(Tensor, module._parameters[name]))
        found[name] = part.delta(W, A, B, mine.uora_d, mine.uora_b, own)
    return found


@contextmanager
def _parameters_of(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    before = {name: module._parameters[name] for name in weights}
    module._parameters.update(cast("dict[str, nn.Parameter | None]", weights))
    try:
        yield
    finally:
        module._parameters.update(before)


def _joined(outs: list[Any], places: list[Rows], size: int, path: str) -> Any:
    """Outputs of all rows in their order; a row of what came in may be several."""
    first = outs[0]
    if isinstance(first, (tuple, list)):
        return type(first)(
            None if part is None else _joined([out[k] for out in outs], places, size, path)
            for k, part in enumerate(first)
        )
    counts = [h.stop - h.start if isinstance(h, slice) else len(h) for h in places]
    if not all(
        isinstance(o, Tensor) and o.dim() and o.shape[0] % c == 0 for o, c in zip(outs, counts, strict=True)
    ):
        what = type(first).__name__ if not isinstance(first, Tensor) else f"a tensor {tuple(first.shape)}"
        raise ValueError(
            f"{path!r} returns {what}, which cannot be split into samples, so adapters cannot be "
            "mixed; give use_adapters one name at a time."
        )
    shapes = {tuple(out.shape[1:]) for out in outs}
    pers = {out.shape[0] // count for out, count in zip(outs, counts, strict=True)}
    if len(shapes) > 1 or len(pers) > 1:
        told = ", ".join(map(str, sorted({tuple(out.shape) for out in outs} if len(pers) > 1 else shapes)))
        raise ValueError(
            f"{path!r} returns shapes {told} for different adapters; within one batch they must be equal."
        )
    whole = torch.cat(outs)
    starts = [h.start for h in places if isinstance(h, slice)]
    if len(starts) == len(places) and starts == sorted(starts):
        return whole
    (per,) = pers
    device = whole.device
    rows = [
        torch.arange(h.start, h.stop, device=device) if isinstance(h, slice) else h.to(device) for h in places
    ]
    order = torch.cat([(h[:, None] * per + torch.arange(per, device=device)).flatten() for h in rows])
    return whole[order.argsort()]
