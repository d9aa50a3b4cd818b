"""Refreshes over a Trainer's run: the schedule's steps counted, carried out, logged, resumed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uora.adapters import Attachment
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import alone
from lightning_uora.inputs import inputs_observed
from lightning_uora.reinit import Refresher
from lightning_uora.trainer.steps import step_of, total_steps
from lightning_uora.trainer.training_batches import TrainingBatches

__all__ = ["Refreshing"]


DEFAULTS = (ReinitSchedule.threshold, ReinitSchedule.max_fraction)
"""At low ranks these may find nothing weak, and nobody asked for more."""


class Refreshing:
    """Carries out a schedule at the hooks of a Trainer, for each adapted model.

    Args:
        schedule: What to refresh and when.
    """

    def __init__(self, schedule: ReinitSchedule) -> None:
        self.schedule = schedule
        self._places: list[tuple[Attachment, Refresher]] = []
        self._saved: list[dict[str, Any]] | None = None
        self._last_step = 0

    def start(self, trainer: Trainer, mine: Sequence[Attachment]) -> None:
        """Find the due steps of this run; a run that was not resumed starts with a clean slate."""
        schedule, self._last_step = self.schedule, step_of(trainer)
        due = schedule.due_steps(total_steps(trainer))
        refreshers = [Refresher(schedule, due, self._last_step) for _ in mine]
        for refresher, saved in zip(refreshers, self._saved or (), strict=False):
            refresher.load_state(saved)
        self._places, self._saved = list(zip(mine, refreshers, strict=True)), None
        chosen = schedule != ReinitSchedule()  # the default's four refreshes are nobody's wish
        if not due and chosen and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"reinit never refreshes in this run of {total_steps(trainer)} steps: no step of it is "
                f"from start={schedule.start} to stop={schedule.stop} (fractions of the run; integers are "
                "steps). Change them, or set reinit=None."
            )

    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Catch up where a run was resumed from between a step and its refresh; get ready for the next."""
        step = step_of(trainer)
        for one, refresher in self._places:
            if (
                refresher.is_due(step) and self.schedule.growth != "gradient"
            ):  # by gradient: with the next step
                self._refresh(trainer, pl_module, one, refresher, batch, batch_idx)
            refresher.before_step(one, step)

    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refresh after an optimizer step where one is due; not while gradients accumulate."""
        step = step_of(trainer)
        if step != self._last_step:
            self._last_step = step
            for one, refresher in self._places:
                self._refresh(trainer, pl_module, one, refresher, batch, batch_idx)

    def end(self) -> None:
        """Warn where no refresh found a weak row."""
        schedule = self.schedule
        for _, refresher in self._places:
            chosen = (schedule.threshold, schedule.max_fraction) != DEFAULTS
            if chosen and refresher.is_over and not refresher.refreshed:
                rank_zero_warn(
                    f"reinit refreshed no row in {len(refresher.due)} attempts: "
                    f"threshold={schedule.threshold} ({schedule.threshold_mode}) or "
                    f"max_fraction={schedule.max_fraction} is too low. Raise it, or set reinit=None."
                )

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        states = [refresher.state() for _, refresher in self._places] or self._saved
        if not states:
            return Refresher(self.schedule).state()
        return states[0] if len(states) == 1 else {"version": 1, "several": states}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; the run that starts next goes on from there."""
        self._saved = state.get("several", [state])

    def _refresh(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        one: Attachment,
        refresher: Refresher,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = step_of(trainer)
        with ExitStack() as stack:
            stack.enter_context(alone(trainer.world_size == 1))
            if self.schedule.growth == "inputs" and refresher.is_due(step):
                look = TrainingBatches(trainer)
                stack.enter_context(look.silenced())
                observed = inputs_observed(one, [(batch, batch_idx)], look.step, pl_module)
                stack.enter_context(observed)
            rows = refresher.after_step(one, trainer.optimizers, step)
        if rows is not None:
            name = f"uora/refreshed_rows{f'/{one.path}' if len(self._places) > 1 else ''}"
            for logger in trainer.loggers:
                logger.log_metrics({name: float(sum(map(len, rows.values())))}, step)
