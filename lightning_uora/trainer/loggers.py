"""What a run tells: counts as hyperparameters, the table at its start, figures at its end."""

from __future__ import annotations

import importlib.util

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console

from lightning_uora.adapters import attachments, vectors_in
from lightning_uora.distributed import is_sharded
from lightning_uora.reports import Summary, plot_refreshes, plot_vectors, progress, trained_parts
from lightning_uora.trainer.rates import current_rate, rates_by_parameter
from lightning_uora.trainer.steps import accumulating, callbacks_of

__all__ = ["log_counts", "log_figures", "log_progress", "print_table", "rate_before_logging"]


def log_counts(trainer: Trainer, summary: Summary) -> None:
    """Parameter counts, to every logger."""
    counts = {
        f"uora/{name}": getattr(summary, name)
        for name in ("adapter_params", "trainable_params", "total_params", "trainable_fraction")
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(counts)


def print_table(trainer: Trainer, pl_module: LightningModule, summary: Summary) -> None:
    """The table with rates, once, where the Trainer prints a model summary as well."""
    if not (trainer.is_global_zero and any(isinstance(one, ModelSummary) for one in callbacks_of(trainer))):
        return
    parts = {"vectors": vectors_in(pl_module), **trained_parts(pl_module)}
    found = rates_by_parameter(trainer)
    rates = {
        name: ", ".join(dict.fromkeys(f"{found[p]:g}" for p in parameters if p in found)) or "none"
        for name, parameters in parts.items()
    }
    Console().print(summary.table(rates))


def rate_before_logging(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """The vectors' rate in the step that comes, where that step will be logged: schedules move it after."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not (trainer.loggers and every) or (trainer.global_step + 1) % every:
        return None
    return current_rate(trainer.optimizers, vectors_in(pl_module))


def log_progress(trainer: Trainer, pl_module: LightningModule, rate: float | None) -> None:
    """How far the adapters have moved, and at which rate, at the loggers' own interval; nothing between."""
    step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not trainer.loggers or not (step and every) or step % every or accumulating(trainer):
        return
    if is_sharded(pl_module) or not trainer.is_global_zero:
        return
    metrics = {f"uora/{name}": value for name, value in progress(pl_module).items()}
    rate = rate or current_rate(trainer.optimizers, vectors_in(pl_module))
    if rate is not None:
        metrics["uora/vector_lr"] = rate
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


def log_figures(trainer: Trainer, pl_module: LightningModule) -> None:
    """Vectors and refreshes as images, to the loggers that take images, where matplotlib is installed."""
    takers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]
    refreshed = [one for one in attachments(pl_module) if one.owner.record]
    if not refreshed or not takers or importlib.util.find_spec("matplotlib") is None:
        return
    if not (trainer.is_global_zero or is_sharded(pl_module)):
        return
    for one in refreshed:
        where = f"/{one.path}" if len(refreshed) > 1 else ""
        figures = {"uora/vectors": plot_vectors(one.root), "uora/refreshes": plot_refreshes(one.root)}
        for name, figure in figures.items():
            for logger in takers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"{name}{where}", figure, trainer.global_step)
                else:
                    logger.experiment.log({f"{name}{where}": figure})
