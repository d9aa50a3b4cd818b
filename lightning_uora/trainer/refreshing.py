"""Refreshes over a Trainer's run: the schedule's steps counted, carried out, logged, resumed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uora.adapters import find_root
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import alone
from lightning_uora.inputs import inputs_observed
from lightning_uora.reinit import Refresher
from lightning_uora.trainer.steps import step_of, total_steps
from lightning_uora.trainer.training_batches import TrainingBatches

__all__ = ["Refreshing"]


class Refreshing:
    """Carries out a schedule at the hooks of a Trainer.

    Args:
        schedule: What to refresh and when.
    """

    def __init__(self, schedule: ReinitSchedule) -> None:
        self._refresher, self._resumed, self._last_step = Refresher(schedule), False, 0

    def start(self, trainer: Trainer) -> None:
        """Find the due steps of this run; a run that was not resumed starts with a clean slate."""
        schedule, self._last_step = self._refresher.schedule, step_of(trainer)
        due = schedule.due_steps(total_steps(trainer))
        if not self._resumed:
            self._refresher = Refresher(schedule, due, self._last_step)
        self._refresher.due, self._resumed = due, False
        if not due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"reinit never refreshes in this run of {total_steps(trainer)} steps: its window, from "
                f"start={schedule.start} to stop={schedule.stop}, is empty."
            )

    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Catch up where a run was resumed from between a step and its refresh; get ready for the next."""
        step = step_of(trainer)
        if self._refresher.is_due(step) and self._refresher.schedule.growth != "gradient":
            self._refresh(trainer, pl_module, step, batch, batch_idx)  # by gradient: with the next step
        self._refresher.before_step(find_root(pl_module)[1], step)

    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refresh after an optimizer step where one is due; not while gradients accumulate."""
        step = step_of(trainer)
        if step != self._last_step:
            self._last_step = step
            self._refresh(trainer, pl_module, step, batch, batch_idx)

    def end(self) -> None:
        """Warn where no refresh found a weak row."""
        refresher, schedule = self._refresher, self._refresher.schedule
        if refresher.is_over and not refresher.refreshed:
            rank_zero_warn(
                f"reinit refreshed no row in {len(refresher.due)} attempts: threshold={schedule.threshold} "
                f"({schedule.threshold_mode}) or max_fraction={schedule.max_fraction} is too low."
            )

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        return self._refresher.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; the run that starts next goes on from there."""
        self._refresher.load_state(state)
        self._resumed = True

    def _refresh(
        self, trainer: Trainer, pl_module: LightningModule, step: int, batch: Any, batch_idx: int
    ) -> None:
        root, refresher = find_root(pl_module)[1], self._refresher
        with ExitStack() as stack:
            stack.enter_context(alone(trainer.world_size == 1))
            if refresher.schedule.growth == "inputs" and refresher.is_due(step):
                look = TrainingBatches(trainer)
                stack.enter_context(look.silenced())
                stack.enter_context(inputs_observed(root, [(batch, batch_idx)], look.step, pl_module))
            rows = refresher.after_step(root, trainer.optimizers, step)
        if rows is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"uora/refreshed_rows": float(sum(map(len, rows.values())))}, step)
