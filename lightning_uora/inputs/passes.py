"""Passes of batches through an adapted model, and the moments of what its layers receive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters import (
    AdaptedModule,
    Attachment,
    Part,
    one_thread,
    seeded_generator,
)
from lightning_uora.distributed import agreed, is_sharded, on_any_rank, summed
from lightning_uora.inputs.moments import (
    Axes,
    ExactMoment,
    Moment,
    SketchedMoment,
    is_exact,
    sketch_size,
)
from lightning_uora.inputs.observer import Observer
from lightning_uora.inputs.shared_inputs import SharedInputs
from lightning_uora.inputs.untouched import unchanged

__all__ = ["Forward", "Watch"]

Forward = Callable[[Any], Any]


class Watch:
    """The moments of one calibration, by the name of the buffer that they are for.

    Args:
        one: The adapted model.
        count: Leading axes wanted of each.
        off: Run the frozen model, without its adapters.
    """

    def __init__(self, one: Attachment, count: int, off: bool) -> None:
        self.one, self.owner, self.count, self.off = one, one.owner, count, off
        self.layers = one.layers
        if is_sharded(one.root):
            raise ValueError(
                "the model is sharded, and looking at its inputs would disturb its shards; call calibrate "
                "after attach_uora and before fully_shard."
            )
        if any(buffer.is_meta for buffer in self.owner.buffers()):
            raise ValueError(
                "the model is on the meta device, so no inputs can run through it; load its weights first."
            )
        self.tests: dict[int, Tensor] = {}
        self._start(sharing=self.owner.config.share == "layer")

    def _start(self, sharing: bool) -> None:
        """Nothing seen yet. Where layers may share a moment, each is made when its first rows come."""
        self.shared = SharedInputs(sharing)
        self.rows = {(layer.layer_index, part.name): 0 for _, layer, part in self._uses()}
        self.norms: dict[tuple[int, str], Tensor] = {}
        widths = {self._key(layer, part): part.n for _, layer, part in self._uses()}
        self.moments: dict[str, Moment] = {} if sharing else {k: self._moment(n) for k, n in widths.items()}

    def run(self, batches: Iterable[Any], forward: Forward | None, around: nn.Module, fewest: int) -> None:
        """All passes over the batches, with every check."""
        kept, run = _held(batches), self._call if forward is None else forward
        self._pass(kept, run, around, counts=True)
        if self._shares_wrongly():
            self._start(sharing=False)
            self._pass(kept, run, around, counts=True)
        self._check(fewest)
        self._sum(self.moments)
        left = {key: moment for key, moment in self.moments.items() if moment.passes > 1}
        if left:
            for moment in left.values():
                moment.next_pass()
            self._pass(kept, run, around, counts=False)
            self._sum(left)

    def _sum(self, moments: dict[str, Moment]) -> None:
        for key in sorted(moments):
            _sum_over_ranks(moments[key].sum)

    # Note [One moment for layers that see one tensor]
    # Query, key and value get the same tensor, one after the other: its rows are summed once, for the first
    # of them. That this holds for every call, and on every rank alike, is known only after the pass; where it
    # does not, the pass is made again with a moment for each.

    def _shares_wrongly(self) -> bool:
        """See Note [One moment for layers that see one tensor]."""
        leaders, rows = self.shared.leaders, dict[str, int]()
        for _, layer, part in self._uses():
            key = self._key(layer, part)
            rows[key] = rows.get(key, 0) + self.rows[layer.layer_index, part.name]
        uneven = self.shared.sharing and any(rows[key] != rows[one] for key, one in leaders.items())
        elsewhere = agreed(leaders) != leaders
        return on_any_rank([self.shared.differs or uneven or (self.shared.sharing and elsewhere)])[0]

    def axes(self) -> Iterator[tuple[str, Axes]]:
        """The leading axes by buffer, the same on every rank; each moment is dropped as it is read."""
        for leader in sorted(self.moments):
            with one_thread():
                found = self.moments.pop(leader).axes()
            axes = agreed(
                Axes(found.rows[: self.count], found.values[: self.count])
            )  # others round otherwise
            yield from ((key, axes) for key, one in self._leaders().items() if one == leader)

    def _leaders(self) -> dict[str, str]:
        keys = dict.fromkeys(self._key(layer, part) for _, layer, part in self._uses())
        return self.shared.leaders if self.shared.sharing else {key: key for key in keys}

    def _key(self, layer: AdaptedModule, part: Part) -> str:
        own = f"_{layer.layer_index}" if self.owner.config.share == "layer" else ""
        return f"A_{part.n}{own}"

    def _moment(self, n: int) -> Moment:
        device = self.owner.down(n).device
        if is_exact(n, self.count):
            return ExactMoment(n, device)
        if n not in self.tests:
            generator = seeded_generator(self.owner.config.seed, "sketch", n)
            test = torch.randn(
                n, sketch_size(self.count), generator=generator, dtype=torch.float32, device="cpu"
            )
            self.tests[n] = test.to(device)
        return SketchedMoment(self.tests[n])

    def _call(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.one.root(**batch)
        return self.one.root(*batch) if isinstance(batch, (tuple, list)) else self.one.root(batch)

    def _pass(self, batches: list[Any], run: Forward, around: nn.Module, counts: bool) -> None:
        def see(layer: AdaptedModule, part: Part, x: Tensor) -> None:
            key, use = self._key(layer, part), (layer.layer_index, part.name)
            if counts:
                wide = torch.promote_types(x.dtype, torch.float32)
                norm = torch.linalg.vector_norm(x, dtype=wide).float()
                self.norms[use] = self.norms[use] + norm if use in self.norms else norm
                self.rows[use] += len(x)
            if not self.shared.leads(key, x):
                return
            if counts and key not in self.moments:
                self.moments[key] = self._moment(part.n)
            if counts or self.moments[key].passes > 1:
                self.moments[key].add(x)

        refused: Exception | None = None
        with unchanged(around, but=self.owner), self._adapters(), torch.no_grad(), Observer(self.one, see):
            for index, batch in enumerate(batches):
                try:
                    with _eager():
                        run(batch)
                except Exception as error:  # whatever the user's model raises
                    how = _how_to_call(batch) if run == self._call else ""
                    refused = ValueError(
                        f"calibration batch {index} was refused by the model: {error!r}{how}"
                    )
                    refused.__cause__ = error
                    break
        self.shared.release()
        _raise_together(refused)

    @contextmanager
    def _adapters(self) -> Iterator[None]:
        """Adapters off, or as they are without a weight kept from it."""
        self.owner.disabled += self.off
        try:
            yield
        finally:
            self.owner.disabled -= self.off
            for _, layer in self.layers:
                layer._uora.forget()

    def _check(self, fewest: int) -> None:
        """Every layer was reached, by enough rows of finite values; else ``ValueError`` with its name."""
        device = next(self.owner.buffers()).device
        norms = torch.stack([self.norms.get(use, torch.zeros((), device=device)) for use in self.rows])
        rows = torch.tensor(list(self.rows.values()), device=device)
        _sum_over_ranks(norms)
        _sum_over_ranks(rows)
        pooled: dict[str, int] = {}
        facts = zip(self._uses(), rows.tolist(), norms.isfinite().tolist(), strict=True)
        for (name, layer, part), count, finite in facts:
            what = f"{part.name} of module {name!r}"
            if count == 0:
                raise ValueError(
                    f"no calibration batch reaches {what}, or it does not compute with linear, a "
                    "convolution, addmm or multi_head_attention_forward; exclude it with "
                    "exclude_modules, or give batches that reach it."
                )
            if not finite:
                raise ValueError(
                    f"the inputs of {what} have non-finite values; look for NaN in the data and in the base. "
                    "A was not changed."
                )
            key = self._key(layer, part)
            pooled[key] = pooled.get(key, 0) + count
        for name, layer, part in self._uses():
            needed, count = min(fewest, part.n), pooled[self._key(layer, part)]
            if count < needed:
                raise ValueError(
                    f"{part.name} of module {name!r} receives only {count} rows, but calibration needs "
                    f"{needed}; give more or larger batches (calibration_batches), or a smaller rank."
                )

    def _uses(self) -> Iterator[tuple[str, AdaptedModule, Part]]:
        for name, layer in self.layers:
            for part in layer.adapted_parts:
                yield name, layer, part


def _how_to_call(batch: Any) -> str:
    """What to do where the model was called with all that a batch holds, labels among it."""
    if isinstance(batch, Mapping):
        first, given = next(iter(batch), "x"), f"its {len(batch)} entries as named arguments"
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        first, given = 0, f"its {len(batch)} items as arguments"
    else:
        return ""
    return (
        f". It was called with {given}; say what it takes: calibrate(model, batches, forward=lambda batch: "
        f"model(batch[{first!r}]))."
    )


def _held(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list: they may be needed twice."""
    if isinstance(batches, (Tensor, Mapping)):
        kind = type(batches).__name__
        raise ValueError(f"batches is one {kind}; give an iterable of batches, such as [batch].")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches is {batches!r}; give an iterable of batches, such as a DataLoader.")
    kept = list(batches)
    empty = None if kept else ValueError("batches is empty; calibration needs at least one batch.")
    _raise_together(empty)
    return kept


def _eager() -> Any:
    """Compiled models run as they are written: a mode sees no compiled code."""
    return torch.compiler.set_stance("force_eager")


def _sum_over_ranks(t: Tensor) -> None:
    t.copy_(summed(t))


def _raise_together(error: Exception | None) -> None:
    """Raise on every rank if one has an error: the others would wait for it for ever."""
    (failed,) = on_any_rank([error is not None])
    if error is not None:
        raise error
    if failed:
        raise ValueError("another process failed to calibrate; its error says why.")
