"""The refresh: what replaces weak rows of A and B, and the record from which both can be rebuilt.

*Which* rows are weak is ``weakness.py``, *how* one turns ``rotation.py``, *when* ``schedule.py``;
none knows another's insides. :func:`refresh` joins the first two; the callback drives the third.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_uora.adapters import (
    AdaptedAround,
    AdaptedExperts,
    Attachment,
    Projections,
    one_thread,
    require_attachments,
    require_no_inference_mode,
    seeded_generator,
)
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import agreed, edited, reshard_, whole
from lightning_uora.reinit.growth import picked_directions, require_gradients, require_growth_possible
from lightning_uora.reinit.known_rows import rows_around
from lightning_uora.reinit.rotation import cosine, turned_rows
from lightning_uora.reinit.weakness import Slot, scores_of, slots_of, weakest

__all__ = ["rebuild", "rebuild_around", "refresh", "refresh_at"]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


def refresh(
    model: nn.Module,
    schedule: ReinitSchedule,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> dict[str, list[int]]:
    """Refresh the weak rows of an adapted model now.

    Promises: rows keep their norm; the other rows are untouched; replaced rows are exactly orthogonal to all
    others if rank plus replaced rows fit into the dimension; what is drawn depends only on the seed, the
    projection and the number of the refresh; after an error nothing has changed. With several processes every
    one must call it, and all make the same refresh, see Note [One decision on all ranks].

    Args:
        model: The adapted model, or a module around several.
        schedule: Its threshold, fraction, interpolation, vectors, criterion and growth; its steps are
            ignored.
        optimizer: Its first moments of refreshed entries are cleared (Adam family, SGD, RMSprop).

    Returns:
        The indices refreshed in each projection: rows of ``"A_<n>"``, columns of ``"B_<m>"``, rows of
        ``"B_<m>:rows"``; with ``share="layer"`` the layer's number is appended. If there are several adapted
        models, each name begins with the model's path and a dot. Empty if nothing was weak.

    Raises:
        ValueError: The model is not adapted; d or b is not finite (the layer is named); the criterion or the
            growth needs something that is not there.

    Source: interpolating weak rows towards fresh ones is from UORA (arXiv:2505.20154); how rows turn, which
    are weak and what replaces them are *ours*.
    """
    found = require_attachments(model, "refresh")
    rows = [refresh_at(one, schedule, optimizer, {}, len(one.owner.record)) for one in found]
    named = zip(found, rows, strict=True) if len(found) > 1 else ()
    return {f"{one.prefix}{key}": chosen for one, r in named for key, chosen in r.items()} or rows[0]


def rebuild(model: nn.Module) -> None:
    """Rebuild A and B from the configuration and the record of refreshes, bit for bit on one machine.

    With ``init="inputs"`` A cannot be rebuilt and stays.
    """
    for one in require_attachments(model, "rebuild"):
        one.owner.drawn.clear()  # .data was perhaps written, which nothing tells
        rebuild_around(one, one.owner.stored())


def rebuild_around(one: Attachment, given: dict[str, Tensor]) -> None:
    """As :func:`rebuild`, with the projections in ``given`` taken as they are."""
    slots = {slot.key for vector in ("d", "b") for slot in slots_of(one, vector)}
    taken = set(map(_matrix, given))
    replay(one.owner, list(one.owner.record), given, {_matrix(key) for key in slots} - taken)


def replay(
    owner: Projections, record: list[dict[str, Any]], given: dict[str, Tensor], wanted: Collection[str]
) -> None:
    """The seeded draw, with some matrices taken as they are, and others turned as a record says.

    Args:
        owner: Of A and B; it has the record afterwards.
        record: Of the refreshes.
        given: Buffers that are taken.
        wanted: Matrices (``A_9``, ``B_7_3``) that are turned; none of which a part is given.
    """
    owner.reset()
    with torch.no_grad():
        owner.take(given)
        for number, entry in enumerate(record):
            keys = [key for key in entry["rows"] if _matrix(key) in wanted]
            plan = [(Slot(key, "b" if ":" in key else "d", ()), entry["rows"][key]) for key in keys]
            _write(owner, _turn(owner, plan, entry, number))
            owner.record.append(entry)
    owner.record = record


Projections.replay = staticmethod(replay)
"""See Note [Record and own copies in the state dict]."""


def _matrix(name: str) -> str:
    """``B_7_3`` for ``B_7_3:rows``."""
    return name.partition(":")[0]


# Note [One decision on all ranks]
# d, b and an optimizer's moments are equal on all ranks, but sums of floats may differ in the last bit
# between machines, and one row chosen otherwise would leave the ranks with different models for good. So the
# first rank's choice of rows, and of candidates, counts for all; the rows themselves each rank draws from the
# seed. Candidates are judged by the gradient of the whole batch, which is summed over the ranks.


def refresh_at(
    one: Attachment,
    schedule: ReinitSchedule,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    averages: dict[str, Tensor],
    step: int,
) -> dict[str, list[int]]:
    """As :func:`refresh`, with the number of the step and the averages for ``criterion="ema"``."""
    optimizers = _optimizers(optimizer)
    owner = one.owner
    require_no_inference_mode("a refresh")
    owner.require_calibrated("a refresh")
    reshard_(one.root)
    _check(one, schedule, step)
    if schedule.interpolation == 0.0:
        return {}
    plan = _plan(one, schedule, scores_of(one, schedule, optimizers, averages))
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
            entry["picked"] = agreed(picked_directions(owner, plan, schedule.candidates))
        _write(owner, _turn(owner, plan, entry, len(owner.record)))
        _settle(plan, schedule, optimizers)
    owner.record.append(entry)
    rows: dict[str, list[int]] = entry["rows"]
    return {key: list(chosen) for key, chosen in rows.items()}


def _plan(
    one: Attachment, schedule: ReinitSchedule, scores: dict[tuple[int, str], Tensor]
) -> list[tuple[Slot, list[int]]]:
    """What to refresh, and which rows of it; see Note [One decision on all ranks]."""
    slots = [slot for vector in schedule.vectors for slot in slots_of(one, vector)]
    chosen = agreed(
        [weakest([scores[layer._uora.index, s.vector] for layer in s.layers], schedule) for s in slots]
    )
    return [(slot, rows) for slot, rows in zip(slots, chosen, strict=True) if rows]


def _check(one: Attachment, schedule: ReinitSchedule, step: int) -> None:
    owner = one.owner
    vectors = [(n, v, p) for n, m in one.layers for v, p in (("d", m.uora_d), ("b", m.uora_b))]
    finite = torch.stack([whole(p.detach()).isfinite().all() for _, _, p in vectors])
    if not finite.all():
        name, vector, _ = vectors[int(finite.logical_not().nonzero()[0])]
        raise ValueError(f"{vector} of module {name!r} is not finite at step {step}; nothing was refreshed.")
    require_growth_possible(schedule.growth, owner.config)
    if schedule.growth == "gradient":
        _require_readable(one)
        require_gradients(owner)
    if schedule.growth == "inputs" and owner.unused_axes is None:
        raise ValueError(
            "growth='inputs' needs inputs: refresh inside `with "
            "lightning_uora.inputs.inputs_observed(model, batches):`, or let the callback do both."
        )


def _require_readable(one: Attachment) -> None:
    for name, layer in one.layers:
        if isinstance(layer, (AdaptedAround, AdaptedExperts)):
            what = (
                "is quantised"
                if isinstance(layer, AdaptedAround)
                else "holds experts, whose weight is never built whole"
            )
            raise ValueError(
                f"growth='gradient' needs the gradient of the weight, and module {name!r} {what}; use "
                "growth='random'."
            )


Turned = list[tuple[str, list[int], Tensor]]
"""Names of projections, places and new values of the rows there."""


def _turn(
    owner: Projections, plan: list[tuple[Slot, list[int]]], entry: dict[str, Any], number: int
) -> Turned:
    """The new rows of every projection in the plan, on the CPU; nothing is written yet."""
    turned: Turned = []
    with one_thread():
        for slot, chosen in plan:
            generator = seeded_generator(owner.config.seed, "refresh", number, slot.key)
            picked = entry.get("picked", {}).get(slot.buffer.rpartition("_")[2])  # of a layer's own
            pool, axes = entry.get("candidates", 0), _unused_axes(owner, slot)
            near = None if axes else rows_around(owner, slot, chosen)
            if near is not None:
                new = near.turned(chosen, entry["interpolation"], generator, pool, picked)
            else:
                M = owner.current(slot.buffer).detach().to("cpu", torch.float32)
                for key, places, values in turned:
                    if key == slot.buffer:  # its columns turn as well
                        M = M.index_copy(1, torch.tensor(places), values.t())
                rows = slot.rows(M)
                new = turned_rows(rows, chosen, entry["interpolation"], generator, pool, picked, axes)
            turned.append((slot.key, chosen, new))
    return turned


def _unused_axes(owner: Projections, slot: Slot) -> Callable[[Tensor, int], Tensor] | None:
    """Of A under ``growth="inputs"``, where fresh rows come from."""
    if owner.unused_axes is None or slot.key[0] != "A":
        return None
    return functools.partial(owner.unused_axes, slot.buffer)


def _write(owner: Projections, turned: Turned) -> None:
    for key, chosen, values in turned:
        owner.turn(key, chosen, values)


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
                values[..., where] *= factor
        if schedule.reset_optimizer_state:
            for moment in _first_moments(parameter, optimizers):
                with edited(moment) as values:
                    values[..., where] = 0.0


def _first_moments(parameter: nn.Parameter, optimizers: list[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for key in FIRST_MOMENTS:
            moment = optimizer.state.get(parameter, {}).get(key)
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                yield moment


def _optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    return [getattr(one, "optimizer", one) for one in several]
