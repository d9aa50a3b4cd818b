"""How far a run has come, in what schedules count."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["accumulating", "callbacks_of", "step_of", "total_steps"]

# Note [Counting steps]
# Schedules count optimizer steps. trainer.global_step does so under automatic optimisation. Under manual
# optimisation it moves by the number of optimizers, or stays 0 where they are used past Lightning; there
# batches are counted.


def step_of(trainer: Trainer) -> int:
    """Optimizer steps so far, see Note [Counting steps]."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1


def _accumulation(trainer: Trainer, epoch: int) -> int:
    """Batches of one optimizer step in an epoch."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return int(callback.get_accumulate_grad_batches(epoch))
    return trainer.accumulate_grad_batches


def accumulating(trainer: Trainer) -> bool:
    """Whether gradients wait for their optimizer step; Lightning's checkpoints leave them out.

    Counted by the batches that were processed: where an error ends a run, the one that was being processed is
    made again by a resume.
    """
    if not trainer.training or not trainer.lightning_module.automatic_optimization:
        return False
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    processed, over = progress.current.processed, progress.is_last_batch
    ended = over and processed == progress.current.ready
    return not ended and processed % trainer.accumulate_grad_batches != 0


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in the order of their hooks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def total_steps(trainer: Trainer) -> int | None:
    """Steps of the whole run; None when it has no end. See Note [Counting steps]."""
    per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
    limits: list[float] = []
    automatic = trainer.lightning_module.automatic_optimization
    if trainer.max_steps >= 0:
        limits.append(
            trainer.max_steps if automatic else trainer.max_steps // max(1, len(trainer.optimizers))
        )
    if epochs is not None and epochs >= 0 and per_epoch != float("inf"):
        limits.append(sum(math.ceil(per_epoch / _accumulation(trainer, epoch)) for epoch in range(epochs)))
    return int(min(limits)) if limits else None
