"""What would go wrong in silence, in a line each: before training, at its end."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_uora.adapters import attachments, named_adapters, never_moved
from lightning_uora.config import UORAConfig
from lightning_uora.distributed import is_sharded
from lightning_uora.reports import Summary, progress

__all__ = ["warn_at_the_end", "warn_at_the_start"]

TINY = 0.01
"""Between norm(update) / norm(W) of digits runs that learned nothing, 0.0015, and of those that did, 2.0."""
FEW_STEPS = 10
"""Shorter runs are not judged."""
USEFUL = 2
"""Directions that a layer has a use for, as a multiple of its larger side."""


def warn_at_the_start(pl_module: LightningModule, config: UORAConfig, summary: Summary) -> None:
    """Before the first step, when all modes are set."""
    if summary.left:
        rank_zero_warn(
            f"Frozen at their start: {', '.join(summary.left)}. If they are new, name them in "
            "trainable_modules. If they should stay frozen, call requires_grad_(False) on them "
            "before the fit."
        )
    if said := never_moved(pl_module):
        rank_zero_warn(said)
    _warn_of_evaluation_mode(pl_module, config)
    widest = max(max(layer.m, layer.n) for layer in summary.layers)
    if config.rank > USEFUL * widest:
        taken = sum(b.nbytes for one in attachments(pl_module) for b in one.owner.buffers()) / 2**20
        rank_zero_warn(
            f"rank={config.rank} is more than layers of at most {widest} features can use: A and B "
            f"take {taken:,.1f} MiB, and every step multiplies by them. Try {widest} or fewer."
        )


def _warn_of_evaluation_mode(pl_module: LightningModule, config: UORAConfig) -> None:
    adapters = [module for _, module in named_adapters(pl_module)]
    if any(module.training for module in adapters):
        return
    asked = [m for m in pl_module.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    if asked:
        rank_zero_warn(
            "Gradient checkpointing does nothing: the model is in evaluation mode, as from_pretrained leaves "
            "it; call train() on the model before fitting."
        )
    idle = [m for m in pl_module.modules() if isinstance(m, nn.Dropout) and m.p and not m.training]
    if config.dropout:
        rank_zero_warn(
            f"dropout={config.dropout} does nothing: the adapted modules are in evaluation mode, as "
            "from_pretrained leaves them; call train() on the model before the fit."
        )
    elif idle:
        rank_zero_warn(
            f"The model's own dropout ({len(idle)} modules) does nothing: the model is in evaluation "
            "mode, as from_pretrained leaves it; call train() on it before the fit, or set its "
            "dropout to 0."
        )


def warn_at_the_end(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warn where training has hardly changed the adapted weights."""
    if trainer.global_step < FEW_STEPS or is_sharded(pl_module):
        return
    ratio = progress(pl_module)["update_ratio"]
    if ratio < TINY:
        rank_zero_warn(
            f"The adapters hardly moved: norm(update) / norm(W) is {ratio:.2g} on average. Give the "
            'vectors a higher rate (vector_lr="auto", or more than it had), or train for '
            "more steps."
        )
