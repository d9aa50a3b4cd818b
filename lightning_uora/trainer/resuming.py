"""Gradients that wait for their optimizer step when a checkpoint is written: Lightning leaves them out."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_uora.distributed import alone, like, mean_gradients, reshard_
from lightning_uora.trainer.steps import accumulating

__all__ = ["put_gradients", "waiting_gradients"]


def waiting_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Accumulated gradients by name; empty between optimizer steps."""
    if not accumulating(trainer):
        return {}
    with alone(trainer.world_size == 1):
        return mean_gradients(pl_module)


def put_gradients(pl_module: LightningModule, gradients: dict[str, Tensor]) -> None:
    """Back where they were; in shards, where a forward before this left whole parameters (FSDP2)."""
    reshard_(pl_module)
    parameters = dict(pl_module.named_parameters())
    for name, gradient in gradients.items():
        parameters[name].grad = like(gradient, parameters[name])
