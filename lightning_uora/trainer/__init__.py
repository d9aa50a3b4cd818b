"""Lightning's side: what the callback's hooks call, and what else a Trainer holds that adapters go with."""

from lightning_uora.trainer.attachment import (
    add_missing_to_optimizer,
    attach_in_time,
    forget_configure_model,
    require_adapted,
    warn_of_idle_dropout,
    warn_without_gradient,
)
from lightning_uora.trainer.calibrating import calibrate_if_needed
from lightning_uora.trainer.companions import check_companions, check_pruning
from lightning_uora.trainer.loggers import log_counts, log_figures, print_table
from lightning_uora.trainer.refreshing import Refreshing
from lightning_uora.trainer.resuming import put_gradients, waiting_gradients

__all__ = [
    "Refreshing",
    "add_missing_to_optimizer",
    "attach_in_time",
    "calibrate_if_needed",
    "check_companions",
    "check_pruning",
    "forget_configure_model",
    "log_counts",
    "log_figures",
    "print_table",
    "put_gradients",
    "require_adapted",
    "waiting_gradients",
    "warn_of_idle_dropout",
    "warn_without_gradient",
]
