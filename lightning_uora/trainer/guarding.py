"""What trains is settled when training starts: no part of the base joins later, what should train does."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_uora.adapters import adopt, named_parameters, trained_parameters
from lightning_uora.trainer.steps import callbacks_of

__all__ = ["Guard"]

SHOWN = 10


class Guard:
    """Watches one fit: keeps the base frozen, and tells what gets no gradient."""

    def __init__(self) -> None:
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._waiting: dict[str, nn.Parameter] = {}
        self._stepped: set[int] = set()
        self._went_back = False
        self._told: set[str] = set()

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what trains: what adapters, configuration and the user's hand have decided until now."""
        adopt(pl_module)
        trained = trained_parameters(pl_module)
        self._frozen = [(name, p) for name, p in named_parameters(pl_module).items() if name not in trained]
        self._waiting = {name: p for name, p in trained.items() if p.requires_grad}
        self._stepped, self._told, self._went_back = set(), set(), False
        still = [name for name, p in trained.items() if not p.requires_grad]
        if still:
            rank_zero_warn(
                f"{_shown(still)} should train, but something froze it after UORACallback was set up "
                "(configure_optimizers, on_fit_start or another callback). Remove that; UORACallback "
                "freezes the base itself."
            )

    def hold(self, trainer: Trainer) -> None:
        """Freeze again what something lets train during the run."""
        loose = [(name, p) for name, p in self._frozen if p.requires_grad]
        for _, p in loose:
            p.requires_grad_(False)
            p.grad = None
        new = [name for name, _ in loose if name not in self._told]
        if new:
            self._told.update(new)
            by = [type(one).__name__ for one in callbacks_of(trainer) if isinstance(one, BaseFinetuning)]
            rank_zero_warn(
                f"{_shown(new)} of the frozen base began to require gradients during the "
                f"run{f' (by {by[0]}?)' if by else ''}; UORACallback keeps it frozen. To train it, name "
                "it in trainable_modules."
            )

    def after_backward(self) -> None:
        """Note what has got a gradient."""
        self._went_back = True
        if self._waiting:
            self._waiting = {name: p for name, p in self._waiting.items() if p.grad is None}

    def before_step(self, trainer: Trainer, optimizer: Any) -> None:
        """Note that an optimizer steps; a step without a loss does not count."""
        if self._went_back:
            self._stepped.add(id(getattr(optimizer, "optimizer", optimizer)))
        self.hold(trainer)

    def after_batch(self, trainer: Trainer) -> None:
        """Once every optimizer has stepped, warn of what has had no gradient by then."""
        if self._waiting and self._stepped >= {id(one) for one in trainer.optimizers}:
            self.judge()

    def judge(self) -> None:
        """Warn of what should train and got no gradient; once."""
        if self._waiting and self._went_back:
            rank_zero_warn(
                f"No gradient in the first optimizer step for {_shown(list(self._waiting))}: the loss "
                "does not reach these parameters, so they do not train."
            )
            self._waiting = {}


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
