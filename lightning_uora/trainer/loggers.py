"""What a run tells: counts as hyperparameters, the table at its start, figures at its end."""

from __future__ import annotations

import importlib.util

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console

from lightning_uora.adapters import find_root, projections_of
from lightning_uora.distributed import is_sharded
from lightning_uora.reports import Summary, plot_refreshes, plot_vectors
from lightning_uora.trainer.steps import callbacks_of

__all__ = ["log_counts", "log_figures", "print_table"]


def log_counts(trainer: Trainer, summary: Summary) -> None:
    """Parameter counts, to every logger."""
    counts = {
        f"uora/{name}": getattr(summary, name)
        for name in ("adapter_params", "trainable_params", "total_params", "trainable_fraction")
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(counts)


def print_table(trainer: Trainer, summary: Summary) -> None:
    """The table, once, where the Trainer prints a model summary as well."""
    if trainer.is_global_zero and any(isinstance(one, ModelSummary) for one in callbacks_of(trainer)):
        Console().print(summary.table())


def log_figures(trainer: Trainer, pl_module: LightningModule) -> None:
    """Vectors and refreshes as images, to the loggers that take images, where matplotlib is installed."""
    root = find_root(pl_module)[1]
    takers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]
    if not projections_of(root).record or not takers or importlib.util.find_spec("matplotlib") is None:
        return
    if not (trainer.is_global_zero or is_sharded(pl_module)):
        return
    for name, figure in (("uora/vectors", plot_vectors(root)), ("uora/refreshes", plot_refreshes(root))):
        for logger in takers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, trainer.global_step)
            else:
                logger.experiment.log({name: figure})
