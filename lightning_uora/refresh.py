"""The refresh: which rows are weak, what replaces them, and the record from which A and B can be rebuilt.

Three parts that know nothing of each other's insides: *which* (:func:`weakest`, scores against a threshold),
*how* (``rotation``), *when* (:class:`Refresher`, steps).
:func:`refresh` joins the first two; the callback drives the third.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_uora.config import ReinitSchedule, UORAConfig
from lightning_uora.functional import one_thread
from lightning_uora.layers import AdaptedModule, adapted_modules
from lightning_uora.projection import Projections, projections_of, require_no_inference_mode, seeded_generator
from lightning_uora.ranks import agreed, on_any_rank, summed
from lightning_uora.rotation import basis, cosine, turned_rows, unit_rows, without
from lightning_uora.sharding import edited, like, reshard_, whole

__all__ = ["Refresher", "gradients_collected", "rebuild", "rebuild_around", "refresh", "weakest"]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
EMA_DECAY = 0.95
GRADIENT_STEPS = 4

# Note [Whose row is it]
# d_i scales row i of A together with column i of B; b_j scales row j of B. Under share="model" a row of A
# belongs to all layers of that width, a column of B to all layers of that height, and the highest score among
# them decides: what is weak on average is strong somewhere. Under share="layer" a layer's rows are its own
# from its first refresh on.


@dataclass(frozen=True)
class Slot:
    """A projection that may be refreshed, along one axis: who decides, and what it is called in a record.

    ``key`` is the buffer's name; ``:rows`` is appended for the rows of B that entries of b scale.
    """

    key: str
    vector: str
    layers: tuple[AdaptedModule, ...]

    @property
    def buffer(self) -> str:
        return self.key.removesuffix(":rows")

    def rows(self, M: Tensor) -> Tensor:
        """The rows that this slot's entries scale: A itself, B transposed (columns), or B."""
        return M.t() if self.key.startswith("B_") and not self.key.endswith(":rows") else M


def refresh(
    model: nn.Module,
    schedule: ReinitSchedule,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> dict[str, list[int]]:
    """Refresh the weak rows of an adapted model now.

    Promises: rows keep their norm; staying rows are untouched; replaced rows are exactly orthogonal to all
    others where rank plus replaced rows fit into the dimension; what is drawn depends on the seed, the
    projection and the number of the refresh alone; after an error nothing has changed. With several ranks
    every rank must call it; all make the same refresh, see Note [One decision on all ranks].

    Args:
        model: The root that was given to ``attach_uora``.
        schedule: Threshold, fraction, interpolation, vectors, criterion, growth; its steps are not looked at.
        optimizer: Its first moments of refreshed entries are cleared (Adam family, SGD, RMSprop).

    Returns:
        The indices refreshed in each projection: rows of ``"A_<n>"``, columns of ``"B_<m>"``, rows of
        ``"B_<m>:rows"``; with ``share="layer"`` the layer's number is appended. Empty where nothing was weak.

    Raises:
        ValueError: The model is not adapted; d or b is not finite (the layer is named); the criterion or the
            growth needs what is not there.

    Source: UORA (arXiv:2505.20154) for interpolating weak rows towards fresh ones; METHOD decisions 2-4 are
    *ours*.
    """
    return _refresh(model, schedule, _optimizers(optimizer), {}, len(projections_of(model).record))


def rebuild(model: nn.Module) -> None:
    """Set A and B from the configuration and the record alone, bit for bit on one machine.

    With ``init="inputs"`` A cannot be rebuilt, and stays as it is.
    """
    rebuild_around(model, projections_of(model).stored())


def rebuild_around(model: nn.Module, given: dict[str, Tensor]) -> None:
    """As :func:`rebuild`, with the projections in ``given`` taken as they are."""
    owner = projections_of(model)
    record = list(owner.record)
    owner.reset()
    with torch.no_grad():
        for name, values in given.items():
            owner.writable(name).copy_(values)
        for number, entry in enumerate(record):
            slots = {slot.key: slot for v in ("d", "b") for slot in _slots(model, v)}
            plan = [(slots[key], rows) for key, rows in entry["rows"].items() if key not in given]
            _write(owner, _turn(owner, plan, entry, number))
    owner.record = record


def weakest(scores: Iterable[Tensor], schedule: ReinitSchedule) -> list[int]:
    """Indices that are weak in every one of ``scores``, ascending, at most ``max_fraction`` of them.

    Args:
        scores: One (k,) tensor for each layer that uses the projection.
        schedule: ``threshold``, ``threshold_mode``, ``max_fraction``.
    """
    relative = schedule.threshold_mode != "absolute"
    stacked = torch.stack([s / s.mean().clamp_min(1e-30) if relative else s for s in scores])
    highest = stacked.max(dim=0).values
    order = highest.argsort(stable=True).tolist()
    if schedule.threshold_mode == "fraction":
        weak = order[: math.floor(schedule.threshold * len(order))]
    else:
        weak = [i for i in order if highest[i] < schedule.threshold]
    return sorted(weak[: math.floor(schedule.max_fraction * len(order))])


# Note [One decision on all ranks]
# d, b and an optimizer's moments are equal on all ranks, but sums of floats may differ in the last bit
# between machines, and one row chosen otherwise would leave the ranks with different models for good. So the
# first rank's choice of rows, and of candidates, counts for all; the rows themselves each rank draws from the
# seed. Candidates are judged by the gradient of the whole batch, which is summed over the ranks.


def _refresh(
    model: nn.Module,
    schedule: ReinitSchedule,
    optimizers: list[Optimizer],
    averages: dict[str, Tensor],
    step: int,
) -> dict[str, list[int]]:
    owner = projections_of(model)
    require_no_inference_mode("a refresh")
    owner.require_calibrated("a refresh")
    reshard_(model)
    _check(model, owner, schedule, step)
    if schedule.interpolation == 0.0:
        return {}
    plan = _plan(model, schedule, _scores(model, schedule, optimizers, averages))
    if not plan:
        return {}
    entry: dict[str, Any] = {
        "step": step,
        "rows": {slot.key: chosen for slot, chosen in plan},
        "interpolation": schedule.interpolation,
    }
    with torch.no_grad():
        if schedule.growth == "gradient":
            entry["candidates"] = schedule.candidates
            entry["picked"] = agreed(_pick(owner, plan, schedule.candidates))
        _write(owner, _turn(owner, plan, entry, len(owner.record)))
        _settle(plan, schedule, optimizers)
    owner.record.append(entry)
    rows: dict[str, list[int]] = entry["rows"]
    return {key: list(chosen) for key, chosen in rows.items()}


def _plan(
    model: nn.Module, schedule: ReinitSchedule, scores: dict[tuple[int, str], Tensor]
) -> list[tuple[Slot, list[int]]]:
    """What to refresh, and which rows of it; see Note [One decision on all ranks]."""
    slots = [slot for vector in schedule.vectors for slot in _slots(model, vector)]
    chosen = agreed(
        [weakest([scores[layer._uora.index, s.vector] for layer in s.layers], schedule) for s in slots]
    )
    return [(slot, rows) for slot, rows in zip(slots, chosen, strict=True) if rows]


def _check(model: nn.Module, owner: Projections, schedule: ReinitSchedule, step: int) -> None:
    vectors = [(n, v, p) for n, m in adapted_modules(model) for v, p in (("d", m.uora_d), ("b", m.uora_b))]
    finite = torch.stack([whole(p.detach()).isfinite().all() for _, _, p in vectors])
    if not finite.all():
        name, vector, _ = vectors[int(finite.logical_not().nonzero()[0])]
        raise ValueError(f"{vector} of module {name!r} is not finite at step {step}; nothing was refreshed.")
    require_growth_possible(schedule.growth, owner.config)
    if schedule.growth == "gradient" and not on_any_rank([bool(owner.gradients)])[0]:
        raise ValueError(
            "growth='gradient' needs gradients: run backward and refresh inside `with "
            "lightning_uora.refresh.gradients_collected(model):`, or let the callback do both."
        )
    if schedule.growth == "inputs" and owner.unused_axes is None:
        raise ValueError(
            "growth='inputs' needs inputs: refresh inside `with "
            "lightning_uora.calibration.inputs_observed(model, batches):`, or let the callback do both."
        )


def require_growth_possible(growth: str, config: UORAConfig) -> None:
    """Raise ``ValueError`` where a growth cannot be right with a configuration."""
    if growth == "gradient" and config.share != "layer":
        raise ValueError(f"growth='gradient' needs share='layer', got share={config.share!r}.")
    if growth == "gradient" and config.dropout > 0:
        raise ValueError(f"growth='gradient' needs dropout=0.0, got dropout={config.dropout}.")
    if growth == "inputs" and config.init != "inputs":
        raise ValueError(f"growth='inputs' needs init='inputs', got init={config.init!r}: A is stored then.")


def _slots(model: nn.Module, vector: str) -> list[Slot]:
    """Every projection that entries of ``vector`` scale; see Note [Whose row is it]."""
    found: dict[str, list[AdaptedModule]] = {}
    for _, layer in adapted_modules(model):
        adapter = layer._uora
        own = f"_{adapter.index}" if adapter.owner.config.share == "layer" else ""
        widths = {part.n: None for part in layer.adapted_parts} if vector == "d" else {}
        keys = [f"A_{n}{own}" for n in widths] + [f"B_{adapter.m}{own}" + (":rows" if vector == "b" else "")]
        for key in keys:
            found.setdefault(key, []).append(layer)
    return [Slot(key, vector, tuple(layers)) for key, layers in found.items()]


def _scores(
    model: nn.Module, schedule: ReinitSchedule, optimizers: list[Optimizer], averages: dict[str, Tensor]
) -> dict[tuple[int, str], Tensor]:
    scores = {}
    for name, layer in adapted_modules(model):
        for vector in schedule.vectors:
            parameter = layer.uora_d if vector == "d" else layer.uora_b
            score = whole(parameter.detach()).abs()
            if schedule.criterion == "ema":
                if f"{name}:{vector}" not in averages:
                    raise ValueError("criterion='ema' needs averages over steps; let the callback keep them.")
                score = whole(averages[f"{name}:{vector}"])
            elif schedule.criterion == "sensitivity":
                score = score * _second_moment(name, parameter, optimizers).sqrt()
            scores[layer._uora.index, vector] = score.float().cpu()
    return scores


def _second_moment(name: str, parameter: nn.Parameter, optimizers: list[Optimizer]) -> Tensor:
    for optimizer in optimizers:
        for key in SECOND_MOMENTS:
            moment = optimizer.state.get(parameter, {}).get(key)
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                return whole(moment)
    raise ValueError(
        "criterion='sensitivity' needs an optimizer with second moments (Adam family, RMSprop) that has "
        "made a step "
        f"on the vectors of {name!r}."
    )


def _turn(
    owner: Projections, plan: list[tuple[Slot, list[int]]], entry: dict[str, Any], number: int
) -> dict[str, Tensor]:
    """The new values of every projection in the plan, on the CPU; nothing is written yet."""
    turned: dict[str, Tensor] = {}
    with one_thread():
        for slot, chosen in plan:
            if slot.buffer not in turned:
                turned[slot.buffer] = (
                    _current(owner, slot.buffer).detach().to("cpu", torch.float32, copy=True)
                )
            rows = slot.rows(turned[slot.buffer])
            generator = seeded_generator(owner.config.seed, "refresh", number, slot.key)
            picked = entry.get("picked", {}).get(str(slot.layers[0]._uora.index))
            pool = entry.get("candidates", 0)
            axes = _unused_axes(owner, slot)
            rows[chosen] = turned_rows(rows, chosen, entry["interpolation"], generator, pool, picked, axes)
    return turned


def _unused_axes(owner: Projections, slot: Slot) -> Callable[[Tensor, int], Tensor] | None:
    """Of A under ``growth="inputs"``, where fresh rows come from."""
    if owner.unused_axes is None or slot.key[0] != "A":
        return None
    return functools.partial(owner.unused_axes, slot.buffer)


def _current(owner: Projections, name: str) -> Tensor:
    side, size, *layer = name.split("_")
    index = int(layer[0]) if layer else None
    return owner.down(int(size), index) if side == "A" else owner.up(int(size), index)


def _write(owner: Projections, turned: dict[str, Tensor]) -> None:
    for name, values in turned.items():
        owner.writable(name).copy_(owner.rounded(name, values))


# Note [What becomes of d]
# Turning row i of A by θ moves the direction; of the old contribution d a, the nearest that the new direction
# can still give is d cos θ (least squares on the sphere), and cos² θ where the column of B turns with it.
# Keeping d overshoots, starting at zero loses all of it. b at a refreshed row of B is treated likewise.


def _settle(
    plan: list[tuple[Slot, list[int]]], schedule: ReinitSchedule, optimizers: list[Optimizer]
) -> None:
    """Scale refreshed entries (Note [What becomes of d]) and clear their first moments."""
    factor = cosine(schedule.interpolation)
    touched: dict[tuple[nn.Parameter, str], set[int]] = {}
    for slot, chosen in plan:
        for layer in slot.layers:
            parameter = layer.uora_d if slot.vector == "d" else layer.uora_b
            touched.setdefault((parameter, slot.key[0] + slot.vector), set()).update(chosen)
    for (parameter, _), indices in touched.items():
        where = sorted(indices)
        if schedule.preserve_function:
            with edited(parameter) as values:
                values[where] *= factor
        if schedule.reset_optimizer_state:
            for moment in _first_moments(parameter, optimizers):
                with edited(moment) as values:
                    values[where] = 0.0


def _first_moments(parameter: nn.Parameter, optimizers: list[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for key in FIRST_MOMENTS:
            moment = optimizer.state.get(parameter, {}).get(key)
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                yield moment


def _pick(owner: Projections, plan: list[tuple[Slot, list[int]]], candidates: int) -> dict[str, list[int]]:
    """For each layer the candidates with the largest ``|(b * β)^T G α|``, one for each chosen row."""
    gradients = owner.gradients or {}
    picked: dict[str, list[int]] = {}
    number = len(owner.record)
    for slot, chosen in plan:
        (layer,) = slot.layers
        index = layer._uora.index
        if slot.key[0] != "B":
            continue
        pool = max(candidates, len(chosen))
        betas = _candidates(owner, slot, number, pool) * whole(layer.uora_b.detach()).cpu()
        score = torch.zeros(pool)
        for part in layer.adapted_parts:
            G = gradients.get((index, part.name))
            if G is None:
                G = torch.zeros(_shape(layer, part.name), device=layer.uora_b.device)
            G2 = summed(G).detach().cpu()
            G2 = G2.t() if part.transposed else G2.reshape(part.m, part.n)
            alphas = _candidates(owner, Slot(f"A_{part.n}_{index}", "d", (layer,)), number, pool)
            score += ((betas[:, part.row : part.row + part.m] @ G2) * alphas).sum(1)
        picked[str(index)] = score.abs().argsort(descending=True, stable=True)[: len(chosen)].tolist()
    return picked


def _shape(layer: AdaptedModule, name: str) -> torch.Size:
    W = layer._parameters[name]
    assert W is not None
    return W.shape


def _candidates(owner: Projections, slot: Slot, number: int, pool: int) -> Tensor:
    """Unit directions of the pool that :func:`turned_rows` will draw again, less the rows that are there."""
    rows = slot.rows(_current(owner, slot.buffer)).detach().float().cpu()
    generator = seeded_generator(owner.config.seed, "refresh", number, slot.key)
    with one_thread():
        drawn = torch.randn(pool, rows.shape[1], generator=generator)
        if rows.shape[0] < rows.shape[1]:
            drawn = without(drawn, basis(rows))
    return unit_rows(drawn)


def _optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    return [getattr(one, "optimizer", one) for one in several]


@contextmanager
def gradients_collected(model: nn.Module) -> Iterator[None]:
    """Backward passes inside sum dL/dW_eff of every adapted weight, for ``growth="gradient"``."""
    owner = projections_of(model)
    owner.gradients = {}
    try:
        yield
    finally:
        owner.gradients = None


@dataclass
class Refresher:
    """When: carries out a schedule over the steps of a run. Holds what a resume needs.

    Attributes:
        schedule: What to do.
        due: The steps after which a refresh is due.
        handled: The last step that was dealt with.
        refreshed: Rows refreshed in this run.
        averages: Running averages of the magnitudes of d and b, for ``criterion="ema"``.
    """

    schedule: ReinitSchedule
    due: list[int] = field(default_factory=list)
    handled: int = 0
    refreshed: int = 0
    averages: dict[str, Tensor] = field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        """Whether a due step lies after the last handled one and not after ``step``; asks no device."""
        return any(self.handled < due <= step for due in self.due)

    @property
    def is_over(self) -> bool:
        """Whether every due step was handled."""
        return bool(self.due) and self.handled >= self.due[-1]

    def state(self) -> dict[str, Any]:
        """What a resume needs besides the module's own state."""
        averages = {name: whole(average).cpu() for name, average in self.averages.items()}
        return {"version": 1, "handled": self.handled, "refreshed": self.refreshed, "averages": averages}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.handled, self.refreshed = state["handled"], state["refreshed"]
        self.averages = dict(state["averages"])

    def before_step(self, model: nn.Module, step: int) -> None:
        """Start to collect gradients where a refresh that wants them is near."""
        if self.schedule.growth == "gradient":
            owner = projections_of(model)
            if owner.gradients is None and self.is_due(step + GRADIENT_STEPS):
                owner.gradients = {}

    def after_step(
        self, model: nn.Module, optimizers: Sequence[Optimizer], step: int
    ) -> dict[str, list[int]] | None:
        """Observe a finished optimizer step; the refreshed rows where a refresh was due, else None."""
        if self.schedule.criterion == "ema":
            self._observe(model)
        if not self.is_due(step):
            return None
        owner = projections_of(model)
        rows = _refresh(model, self.schedule, _optimizers(optimizers), self.averages, step)
        owner.gradients = None
        self.handled = step
        self.refreshed += sum(map(len, rows.values()))
        return rows

    def _observe(self, model: nn.Module) -> None:
        for name, layer in adapted_modules(model):
            for vector, parameter in (("d", layer.uora_d), ("b", layer.uora_b)):
                key, now = f"{name}:{vector}", parameter.detach().abs()
                if key in self.averages:
                    average = like(self.averages[key], now)
                    self.averages[key] = average.mul_(EMA_DECAY).add_(now, alpha=1.0 - EMA_DECAY)
                else:
                    self.averages[key] = now
