"""Lightning's side: what the callback's hooks call, optimizers' rates, what adapters go with in a Trainer."""

from lightning_uora.trainer.attachment import (
    attach_in_time,
    forget_configure_model,
    require_adapted,
)
from lightning_uora.trainer.calibrating import calibrate_if_needed
from lightning_uora.trainer.companions import check_companions, check_pruning
from lightning_uora.trainer.loggers import log_counts, log_figures, log_progress, print_table
from lightning_uora.trainer.rates import keep_rates, saved_groups, set_vector_rates
from lightning_uora.trainer.refreshing import Refreshing
from lightning_uora.trainer.resuming import put_gradients, waiting_gradients
from lightning_uora.trainer.warnings import warn_at_the_end, warn_at_the_start, warn_without_gradient

__all__ = [
    "Refreshing",
    "attach_in_time",
    "calibrate_if_needed",
    "check_companions",
    "check_pruning",
    "forget_configure_model",
    "keep_rates",
    "log_counts",
    "log_figures",
    "log_progress",
    "print_table",
    "put_gradients",
    "require_adapted",
    "saved_groups",
    "set_vector_rates",
    "waiting_gradients",
    "warn_at_the_end",
    "warn_at_the_start",
    "warn_without_gradient",
]
