"""The learning rate of the vectors: a group made before the first step, and what is said about rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_uora.adapters import Attachment, vectors_in
from lightning_uora.trainer.schedules import is_gentle, peak_rate
from lightning_uora.trainer.steps import callbacks_of, total_steps
from lightning_uora.trainer.vector_groups import Move, moves, obstacle, split, take_in

__all__ = [
    "AUTO_RATE",
    "VectorRate",
    "auto_rate",
    "current_rate",
    "keep_rates",
    "rates_by_parameter",
    "saved_groups",
    "set_vector_rates",
    "warn_of_another_rate",
    "warn_of_averaged_rate",
]

VectorRate = float | Literal["auto"] | None

AUTO_RATE, LONG_RUN, MOST, FEW_LAYERS, GENTLE = 1e-2, 1_000, 5.0, 12, 2.5
"""The vectors' rate under optimizers of Adam's kind, and what moves it, see Note [The automatic rate]."""
SLOW = 2e-3
"""Below this rate an optimizer of Adam's kind hardly moves the vectors in a usual run."""
WRITE = "param_groups(self, lr=..., vector_lr={rate:g})"


# Note [The automatic rate]
# An optimizer of Adam's kind moves a number by about its rate in every step, so that what a run can reach is
# rate x steps, and short runs need more. Warm-up and decay take away half of that and make the ends gentle:
# more is needed and more is safe. Many adapted layers add up: they need less. So: 0.01, times the root of
# 1,000 / steps (1 to 5), times the root of 12 / layers (at most 1), times 2.5 where the schedule warms up and
# decays. Chosen on validation rows of four seeds (MiniLM with 12 and with 36 layers, a ViT with 24, a GPT-2
# with 16; 80 to 240 steps), see benchmarks/NOTES.md. Runs of over 1,000 steps were not measured.
# A warm-up of the vectors alone did not pay.


def auto_rate(steps: int | None, layers: int = FEW_LAYERS, gentle: bool = False) -> float:
    """The vectors' rate for ``vector_lr="auto"``, see Note [The automatic rate].

    Args:
        steps: Optimizer steps of the run; None where it has no known end.
        layers: How many are adapted.
        gentle: The schedule warms up and decays.
    """
    short = min(MOST, max(1.0, math.sqrt(LONG_RUN / steps))) if steps else 1.0
    many = math.sqrt(FEW_LAYERS / max(FEW_LAYERS, layers))
    return float(f"{AUTO_RATE * short * many * (GENTLE if gentle else 1.0):.2g}")


def _steps(trainer: Trainer) -> int | None:
    # As trainer.estimated_stepping_batches does. Never on a resume, where rates are the checkpoint's: there
    # Lightning gives a DataLoader its saved state as it sets it up, and would not have read it yet.
    trainer.fit_loop.setup_data()
    return total_steps(trainer)


def _times(config: Any, steps: int | None, epochs: int | None) -> int | None:
    """How often a schedule will be stepped; None where that is not known."""
    units = steps if config.interval == "step" else epochs
    return units // config.frequency if units and units > 0 else None


def set_vector_rates(
    trainer: Trainer,
    pl_module: LightningModule,
    mine: Sequence[Attachment],
    vector_lr: VectorRate,
    saved: list[list[int]] | None,
    last: bool = True,
) -> list[dict[str, Any]]:
    """Give the vectors their own optimizer group, or say why not; before optimizer states are restored.

    Args:
        trainer: Its optimizers and schedulers are made.
        pl_module: The adapted module.
        mine: The adapted models whose vectors are meant.
        vector_lr: As given to the callback.
        saved: How many parameters each optimizer group has in the checkpoint that the run goes on from.
        last: No other callback will make groups after this.

    Returns:
        The groups that were made.

    Raises:
        MisconfigurationException: No optimizer knows the vectors and ``vector_lr`` is None; the checkpoint's
            groups are not those that ``vector_lr`` leads to.
    """
    optimizers = [one for one in trainer.strategy.optimizers if type(one).__name__ != "_MockOptimizer"]
    configs = trainer.strategy.lr_scheduler_configs
    schedulers = [config.scheduler for config in configs]
    steps = _steps(trainer) if vector_lr == "auto" and saved is None else None
    ends = {id(one.scheduler): _times(one, steps, trainer.max_epochs) for one in configs}
    layers = sum(len(one.layers) for one in mine)
    known = {id(group) for one in optimizers for group in one.param_groups}
    vectors = dict.fromkeys(v for one in mine for _, m in one.layers for v in (m.uora_d, m.uora_b))
    for move in moves(optimizers, schedulers, list(vectors), vectors_in(pl_module)):
        place = optimizers.index(move.optimizer)
        before = saved[place] if saved and place < len(saved) else None
        gentle = any(is_gentle(one, move.place, ends[id(one)]) for one in move.schedulers)
        rate = auto_rate(steps, layers, gentle) if vector_lr == "auto" else vector_lr
        _carry_out(move, rate, vector_lr == "auto", before)
    makes_groups = any(isinstance(one, BaseFinetuning) for one in callbacks_of(trainer))  # and restores them
    if saved is not None and last and not makes_groups:
        _check_saved(optimizers, saved, vector_lr)
    return [group for one in optimizers for group in one.param_groups if id(group) not in known]


def _carry_out(move: Move, rate: float | None, auto: bool, saved: list[int] | None) -> None:
    for place in move.alone:
        _warn_of_users_group(move, place)
    if not (move.found or move.missing):
        return
    name = type(move.optimizer).__name__
    if rate is None:
        _leave_alone(move, name)
        return
    if saved is not None and len(saved) == len(move.optimizer.param_groups):
        rank_zero_warn(
            f"In the checkpoint's run {name} had no group for the vectors, so they go on at "
            f"lr={move.rate:g}. To give them vector_lr, start a new run from the weights alone."
        )
        take_in(move)
        return
    hindrance = obstacle(move)
    if hindrance is None and auto and not is_adaptive(move.optimizer):
        rank_zero_warn(
            f'vector_lr="auto" has no measured rate for {name}, so the vectors train at its '
            f"lr={move.rate:g}. Set UORACallback(vector_lr=...), or use AdamW."
        )
        take_in(move)
    elif hindrance is not None:
        rank_zero_warn(
            f"vector_lr: the vectors get no group of their own with {hindrance}, so they train at "
            f"lr={move.rate:g}. Make the groups in configure_optimizers: groups = "
            f"{WRITE.format(rate=rate)}; then {name}(groups)."
        )
        take_in(move)
    else:
        split(move, rate)


def _leave_alone(move: Move, name: str) -> None:
    if move.missing:
        raise MisconfigurationException(
            f"{name} was built without {len(move.missing)} of the vectors, and with vector_lr=None "
            'they are not added, so they would not train. Use vector_lr="auto", or build the '
            "optimizer in configure_optimizers."
        )
    if is_adaptive(move.optimizer) and move.peak(next(iter(move.found))) < SLOW:
        _warn_of_slow_vectors(move.optimizer, move.rate)


def _warn_of_users_group(move: Move, place: int) -> None:
    group = move.optimizer.param_groups[place]
    others = [other for other in move.optimizer.param_groups if other is not group]
    if any("max_lr" in group and other.get("max_lr") == group["max_lr"] for other in others):
        peak = float(group["max_lr"])
        rank_zero_warn(
            f"max_lr={peak:g} for all groups replaces the vectors' own rate; give the schedule one "
            f"rate for each group, in their order: max_lr=[{peak:g}, {AUTO_RATE:g}]."
        )
    elif is_adaptive(move.optimizer) and move.peak(place) < SLOW:
        _warn_of_slow_vectors(move.optimizer, move.peak(place))
    if group.get("weight_decay"):
        rank_zero_warn(
            f"weight_decay={group['weight_decay']:g} pulls the vectors towards zero; use "
            "param_groups, which gives them no weight decay."
        )


def _warn_of_slow_vectors(optimizer: Optimizer, rate: float) -> None:
    rank_zero_warn(
        f"{type(optimizer).__name__} trains the vectors at lr={rate:g}, which hardly moves them: "
        "they usually need 0.01 to 0.05, whatever the rate of the rest. Use "
        'UORACallback(vector_lr="auto") with one group for all that trains, or '
        f"{WRITE.format(rate=AUTO_RATE)}."
    )


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether a step's size is about the learning rate, whatever the gradient's: Adam's kind, RMSprop."""
    if isinstance(optimizer, torch.optim.RMSprop):
        return True
    return "betas" in optimizer.defaults


def saved_groups(checkpoint: Mapping[str, Any]) -> list[list[int]] | None:
    """How many parameters each group of each optimizer has in a checkpoint; None where it does not say."""
    try:
        states = checkpoint["optimizer_states"]
        return [[len(group["params"]) for group in state["param_groups"]] for state in states] or None
    except (KeyError, TypeError):
        return None


def _check_saved(
    optimizers: Sequence[Optimizer], saved: Sequence[Sequence[int]], vector_lr: VectorRate
) -> None:
    """Raise where an optimizer state cannot be restored for want of the vectors' group."""
    for optimizer, sizes in zip(optimizers, saved, strict=False):
        if len(sizes) > len(optimizer.param_groups):
            raise MisconfigurationException(
                f"The checkpoint's {type(optimizer).__name__} has {len(sizes)} groups, but this run's has "
                f"{len(optimizer.param_groups)}; was it saved with another vector_lr than {vector_lr!r}? "
                "Then resume with that one."
            )


def warn_of_another_rate(given: VectorRate, saved: VectorRate) -> None:
    """A resumed run has the groups and schedules of its checkpoint, at their rates."""
    if saved is not None and given != saved:  # else it is said that the run has no group
        rank_zero_warn(
            f"vector_lr={given!r} is not used: a resumed run keeps the rates of its checkpoint "
            f"(vector_lr={saved!r}). To train at another rate, load its weights with load_from_checkpoint "
            "and fit without ckpt_path."
        )


def keep_rates(trainer: Trainer, rates: Sequence[tuple[dict[str, Any], Any]]) -> None:
    """Put back the rates of groups that ``LearningRateFinder`` has set to what it suggests for the rest."""
    if any(isinstance(one, LearningRateFinder) for one in callbacks_of(trainer)) and not trainer.ckpt_path:
        for group, rate in rates:
            group["lr"] = rate


def warn_of_averaged_rate(trainer: Trainer, mine: Sequence[Attachment]) -> None:
    """``StochasticWeightAveraging`` with one rate brings every group to it, that of the vectors too."""
    one = next((c for c in callbacks_of(trainer) if isinstance(c, StochasticWeightAveraging)), None)
    swa_lr, rates = getattr(one, "_swa_lrs", None), rates_by_parameter(trainer) if one else {}
    vectors = [v for attachment in mine for _, m in attachment.layers for v in (m.uora_d, m.uora_b)]
    rate = max((rates.get(v, 0.0) for v in vectors), default=0.0)
    if isinstance(swa_lr, float) and swa_lr < rate:
        rank_zero_warn(
            f"StochasticWeightAveraging brings the vectors from lr={rate:g} to swa_lrs={swa_lr:g}; give it a "
            f"list with a rate for each optimizer group, that of the vectors last: [{swa_lr:g}, {rate:g}]."
        )


def rates_by_parameter(trainer: Trainer) -> dict[nn.Parameter, float]:
    """The peak rate at which every parameter that an optimizer knows trains."""
    found: dict[nn.Parameter, float] = {}
    for optimizer in trainer.optimizers:
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
        for place, group in enumerate(optimizer.param_groups):
            found |= dict.fromkeys(group["params"], peak_rate(schedulers, place, group))
    return found


def current_rate(optimizers: Sequence[Optimizer], vectors: Sequence[nn.Parameter]) -> float | None:
    """The rate at which the vectors train now, the highest where there are several."""
    wanted = {id(v) for v in vectors}
    rates = [
        float(group["lr"])
        for one in optimizers
        for group in one.param_groups
        if any(id(p) in wanted for p in group["params"])
    ]
    return max(rates) if rates else None
