"""How a learning-rate schedule takes one more optimizer group: as if it had been made with it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

__all__ = ["follow", "is_gentle", "own_shape", "peak_rate", "unknown_schedulers"]

# Note [A schedule and its groups]
# A scheduler keeps lists with an entry for each group (base_lrs, lr_lambdas, max_lrs, min_lrs, _last_lr), and
# groups keep what it gave them (initial_lr, max_lr, min_lr, momenta); add_param_group knows of neither. A new
# group gets its entries here: functions and momenta are those of the group that it came from, rates are its
# own, and what is one number for all groups (eta_min, warmup_lr_init) stays one. Its first rate is found by
# the scheduler's own get_lr, on a stand-in that holds the new group alone. So a run is, bit for bit, the one
# whose optimizer had the group from the start.

PLAIN = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
)
KNOWN = (
    *PLAIN,
    lr_scheduler.OneCycleLR,
    lr_scheduler.CyclicLR,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
)
COPIED = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
"""Lists whose new entry is that of the group that is followed."""


def unknown_schedulers(schedulers: Sequence[Any]) -> list[str]:
    """Class names of the schedulers, inner ones too, whose lists are not known."""
    return [type(one).__name__ for one in _every(schedulers) if not (_is_known(one) or _is_timm(one))]


def peak_rate(schedulers: Sequence[Any], place: int, group: Mapping[str, Any] | None = None) -> float:
    """The highest rate that a group comes to, as far as its schedules say."""
    for one in _every(schedulers):
        if isinstance(one, lr_scheduler.CyclicLR):
            return float(one.max_lrs[place])
        group = one.optimizer.param_groups[place]
    assert group is not None
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


DECAYING = (lr_scheduler.OneCycleLR, lr_scheduler.CosineAnnealingLR, lr_scheduler.PolynomialLR)


def is_gentle(one: Any, place: int, end: int | None) -> bool:
    """Whether a schedule that has not begun warms a group up from half its peak or less, and ends there.

    Args:
        one: The scheduler.
        place: Of the group.
        end: How often it will be stepped; None where that is not known.
    """
    group = one.optimizer.param_groups[place]
    half = 0.5 * peak_rate([one], place, group)
    return float(group["lr"]) <= half and _last_rate(one, place, end) <= half


def _last_rate(one: Any, place: int, end: int | None) -> float:
    """The rate at the end of the run; infinite where the schedule does not say."""
    if isinstance(one, lr_scheduler.SequentialLR):
        end = None if end is None else end - one._milestones[-1]
        return _last_rate(one._schedulers[-1], place, end)
    if isinstance(one, DECAYING):
        return 0.0
    if end is not None and end > 0 and isinstance(one, lr_scheduler.LambdaLR):
        try:
            return float(one.base_lrs[place] * one.lr_lambdas[place](end))
        except Exception:  # the user's function, which may know of fewer steps
            return float("inf")
    if end is not None and end > 0 and _is_timm(one) and hasattr(one, "_get_lr"):
        return float(one._get_lr(end)[place])
    return float("inf")


def own_shape(schedulers: Sequence[Any], place: int) -> tuple[Any, ...]:
    """What a group's schedule has that other groups' may not: its functions, the height of its cycle."""
    found: list[Any] = []
    for one in _every(schedulers):
        found += [id(getattr(one, name)[place]) for name in ("lr_lambdas",) if hasattr(one, name)]
        found += [getattr(one, name)[place] for name in COPIED[1:] if hasattr(one, name)]
        if isinstance(one, lr_scheduler.CyclicLR):
            found.append(_ratio(one.base_lrs[place], one.max_lrs[place]))
        if isinstance(one, lr_scheduler.OneCycleLR):
            group = one.optimizer.param_groups[place]
            found += [_ratio(group[name], group["max_lr"]) for name in ("initial_lr", "min_lr")]
    return tuple(found)


def follow(schedulers: Sequence[Any], source: int, group: dict[str, Any]) -> None:
    """Give the newest group of an optimizer its entries in the optimizer's schedulers, and its first rate.

    See Note [A schedule and its groups].

    Args:
        schedulers: All that move the optimizer's rates; none of :func:`unknown_schedulers`.
        source: Place of the group whose schedule it follows.
        group: The new group. Its ``lr`` is the peak, what the schedule would call the highest rate.
    """
    every = list(_every(schedulers))
    if not every:
        return
    origin, peak = every[0].optimizer.param_groups[source], _copied(group["lr"])
    if "initial_lr" in origin:  # a plateau alone knows nothing of a start
        group["initial_lr"] = _copied(peak)
    for one in every:
        _extend(one, source, origin, group, peak)
    if any(getattr(one, "last_epoch", 0) > 0 for one in every):  # a schedule that is under way
        _set(group, _scaled(peak, origin["lr"], peak_rate(schedulers, source)))
    else:
        _set(group, group.get("initial_lr", peak))
        for one in schedulers:
            _begin(one, group)
    for one in every:
        if hasattr(one, "_last_lr"):
            one._last_lr = [*one._last_lr, _copied(group["lr"])]


def _extend(one: Any, source: int, origin: dict[str, Any], group: dict[str, Any], peak: Any) -> None:
    """The new group's entry in every list of one scheduler."""
    for name in COPIED:
        if hasattr(one, name):
            setattr(one, name, [*getattr(one, name), getattr(one, name)[source]])
    if isinstance(one, lr_scheduler.OneCycleLR):
        peak = _like(peak, origin["max_lr"])
        group["max_lr"] = peak
        group["initial_lr"] = _scaled(peak, origin["initial_lr"], origin["max_lr"])
        group["min_lr"] = _scaled(group["initial_lr"], origin["min_lr"], origin["initial_lr"])
    if isinstance(one, lr_scheduler.CyclicLR):
        peak = _like(peak, one.max_lrs[source])
        group["initial_lr"] = _scaled(peak, one.base_lrs[source], one.max_lrs[source])
        one.max_lrs = [*one.max_lrs, peak]
    if hasattr(one, "base_lrs"):
        one.base_lrs = [*one.base_lrs, _copied(group["initial_lr"])]
    if _is_timm(one):
        one.base_values = [*one.base_values, peak]
        one.warmup_steps = [*one.warmup_steps, _warmup_step(one, source, peak)]


def _warmup_step(one: Any, source: int, peak: float) -> Any:
    """By how much a timm scheduler raises the rate of a group in each step of its warm-up."""
    if not one.warmup_t:
        return 1
    target = peak
    if one.warmup_steps[source] != (one.base_values[source] - one.warmup_lr_init) / one.warmup_t:
        (target,) = _alone(one, base_values=[peak])._get_lr(one.warmup_t)  # warms up into its curve
    return (target - one.warmup_lr_init) / one.warmup_t


def _begin(one: Any, group: dict[str, Any]) -> None:
    """What the scheduler's constructor did to the rates of the other groups."""
    if isinstance(one, lr_scheduler.SequentialLR):
        _begin(one._schedulers[0], group)
    elif isinstance(one, lr_scheduler.ChainedScheduler):
        for inner in one._schedulers:
            _begin(inner, group)
    elif _is_timm(one):
        _set(group, one.warmup_lr_init if one.warmup_t else group["lr"])
    elif not isinstance(one, lr_scheduler.ReduceLROnPlateau):
        lists = {name: getattr(one, name)[-1:] for name in (*COPIED, "max_lrs") if hasattr(one, name)}
        alone = _alone(one, optimizer=SimpleNamespace(param_groups=[group]), last_epoch=0, **lists)
        alone.base_lrs, alone._is_initial, alone._get_lr_called_within_step = (
            [group["initial_lr"]],
            True,
            True,
        )
        (rate,) = alone.get_lr()
        _set(group, rate)


def _alone(one: Any, **changed: Any) -> Any:
    """A stand-in of a scheduler with other lists; the scheduler stays as it is."""
    other = copy.copy(one)
    other.__dict__.update(changed)
    return other


def _every(schedulers: Sequence[Any]) -> Iterator[Any]:
    """All schedulers, those inside others too (timm's plateau holds torch's)."""
    for one in schedulers:
        yield one
        inner = [one.lr_scheduler] if _is_timm(one) and hasattr(one, "lr_scheduler") else ()
        yield from _every(getattr(one, "_schedulers", inner))


def _is_known(one: Any) -> bool:
    """One of torch's, or a subclass that leaves the computation to it."""
    known = [cls for cls in KNOWN if isinstance(one, cls)]
    return bool(known) and all(
        getattr(type(one), name, None) is getattr(known[0], name, None) for name in ("get_lr", "step")
    )


def _is_timm(one: Any) -> bool:
    module = sys.modules.get("timm.scheduler.scheduler")
    return module is not None and isinstance(one, module.Scheduler) and one.param_group_field == "lr"


def _ratio(part: Any, whole: Any) -> float:
    """``whole / part`` to twelve digits, as a person would have written it (25.0, not 25.000000000000004)."""
    return float(f"{float(whole) / float(part):.12g}") if part else float("inf")


def _scaled(rate: Any, part: Any, whole: Any) -> Any:
    """``rate * part / whole``, bit for bit what comes of writing the divisor (``div_factor``) by hand."""
    return rate / _ratio(part, whole)


def _set(group: dict[str, Any], rate: Any) -> None:
    """A group's rate; a tensor stays the tensor that it is, as torch's schedulers have it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _like(rate: Any, other: Any) -> Any:
    """A number where the schedule was given numbers, even if the optimizer was given a tensor."""
    return float(f"{float(rate):.7g}") if isinstance(rate, Tensor) and not isinstance(other, Tensor) else rate


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate
