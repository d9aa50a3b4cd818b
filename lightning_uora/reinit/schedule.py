"""When to refresh: a schedule over the steps of a run, and what a resume of it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_uora.adapters import Attachment
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import like, whole
from lightning_uora.reinit.refresh import refresh_at

__all__ = ["Refresher"]

EMA_DECAY = 0.95
GRADIENT_STEPS = 4


# Note [The window of a resumed run]
# The window is a share of the plan with which the run began, so a resume with more epochs keeps the due steps
# of that plan. Where they are not known (older files), or where the user gave another window, those of the
# new plan count that are not over: at the step of the resume a refresh may be due that was not carried out.


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
        state = {"version": 1, "handled": self.handled, "refreshed": self.refreshed, "averages": averages}
        return {**state, "due": list(self.due), "window": self._window()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave, see Note [The window of a resumed run]."""
        now, self.handled, self.refreshed = self.handled, state["handled"], state["refreshed"]
        self.averages = dict(state["averages"])
        if state.get("due") and state["window"] == self._window():
            self.due = list(state["due"])
        self.due = [due for due in self.due if due <= self.handled or due >= now]

    def _window(self) -> list[Any]:
        """What decides on the due steps, besides the plan of the run."""
        return [self.schedule.start, self.schedule.stop, self.schedule.every_n_steps]

    def before_step(self, one: Attachment, step: int) -> None:
        """Start to collect gradients where a refresh that wants them is near."""
        if self.schedule.growth == "gradient":
            owner = one.owner
            if owner.gradients is None and self.is_due(step + GRADIENT_STEPS):
                owner.gradients = {}

    def after_step(
        self, one: Attachment, optimizers: Sequence[Optimizer], step: int
    ) -> dict[str, list[int]] | None:
        """Observe a finished optimizer step; the refreshed rows where a refresh was due, else None."""
        if self.schedule.criterion == "ema":
            self._observe(one)
        if not self.is_due(step):
            return None
        rows = refresh_at(one, self.schedule, optimizers, self.averages, step)
        one.owner.gradients = None
        self.handled = step
        self.refreshed += sum(map(len, rows.values()))
        return rows

    def _observe(self, one: Attachment) -> None:
        for name, layer in one.layers:
            for vector, parameter in (("d", layer.uora_d), ("b", layer.uora_b)):
                key, now = f"{name}:{vector}", parameter.detach().abs()
                if key in self.averages:
                    average = like(self.averages[key], now)
                    self.averages[key] = average.mul_(EMA_DECAY).add_(now, alpha=1.0 - EMA_DECAY)
                else:
                    self.averages[key] = now
