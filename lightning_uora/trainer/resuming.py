"""Gradients that wait for their optimizer step when a checkpoint is written: Lightning leaves them out."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_uora.distributed import alone, like, mean_gradients, reshard_
from lightning_uora.trainer.steps import accumulating, callbacks_of

__all__ = ["WaitingGradients"]

# Note [Saved in the middle of a batch]
# An error may end a run in the middle of a micro-batch, of whose gradient a part is already added to those
# that wait, and the checkpoint that is written then is resumed with that micro-batch. So where checkpoints
# are written at errors, the gradients that wait are copied before each backward: a few numbers per layer.


class WaitingGradients:
    """Accumulated gradients on their way through a checkpoint."""

    def __init__(self) -> None:
        self._loaded: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] | None = None

    def before_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Note [Saved in the middle of a batch]."""
        if trainer.accumulate_grad_batches > 1 and trainer.world_size == 1 and _saves_at_errors(trainer):
            self._before = dict(_copies(pl_module))

    def after_batch(self) -> None:
        """The micro-batch is over."""
        self._before = None

    def saved(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Accumulated gradients by name; empty between optimizer steps."""
        if not accumulating(trainer):
            return {}
        if self._before is not None:
            return {name: gradient.cpu() for name, gradient in self._before.items()}
        with alone(trainer.world_size == 1):
            return mean_gradients(pl_module)

    def load(self, gradients: dict[str, Tensor]) -> None:
        """Take over what :meth:`saved` gave."""
        self._loaded = gradients

    def put(self, pl_module: LightningModule) -> None:
        """Back where they were; in shards, where a forward before this left whole parameters (FSDP2)."""
        reshard_(pl_module)
        parameters = dict(pl_module.named_parameters())
        unknown = [name for name in self._loaded if name not in parameters]
        if unknown:
            rank_zero_warn(
                f"The checkpoint has an accumulated gradient for {unknown[0]}, which is not in the "
                "module; that gradient is dropped."
            )
        for name, gradient in self._loaded.items():
            if name in parameters:
                parameters[name].grad = like(gradient, parameters[name])
        self._loaded = {}


def _copies(pl_module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, p in pl_module.named_parameters():
        if p.grad is not None:
            yield name, p.grad.clone()


def _saves_at_errors(trainer: Trainer) -> bool:
    return any(
        isinstance(one, OnExceptionCheckpoint)
        or (isinstance(one, ModelCheckpoint) and getattr(one, "save_on_exception", False))
        for one in callbacks_of(trainer)
    )
