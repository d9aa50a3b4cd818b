"""Lightning's side: what the callback's hooks call, optimizers' rates, what adapters go with in a Trainer."""

from lightning_uora.trainer.attachment import (
    attach_in_time,
    attachments_of,
    forget_configure_model,
    require_adapted,
)
from lightning_uora.trainer.calibrating import calibrate_if_needed
from lightning_uora.trainer.companions import (
    check_companions,
    check_pruning,
    convert_first,
    others_of_its_kind,
)
from lightning_uora.trainer.guarding import Guard
from lightning_uora.trainer.loggers import (
    log_counts,
    log_figures,
    log_progress,
    print_table,
    rate_before_logging,
)
from lightning_uora.trainer.rates import (
    VectorRate,
    keep_rates,
    saved_groups,
    set_vector_rates,
    warn_of_another_rate,
    warn_of_averaged_rate,
)
from lightning_uora.trainer.refreshing import Refreshing
from lightning_uora.trainer.resuming import WaitingGradients
from lightning_uora.trainer.steps import callbacks_of
from lightning_uora.trainer.warnings import warn_at_the_end, warn_at_the_start

__all__ = [
    "Guard",
    "Refreshing",
    "VectorRate",
    "WaitingGradients",
    "attach_in_time",
    "attachments_of",
    "calibrate_if_needed",
    "callbacks_of",
    "check_companions",
    "check_pruning",
    "convert_first",
    "forget_configure_model",
    "keep_rates",
    "log_counts",
    "log_figures",
    "log_progress",
    "others_of_its_kind",
    "print_table",
    "rate_before_logging",
    "require_adapted",
    "saved_groups",
    "set_vector_rates",
    "warn_at_the_end",
    "warn_at_the_start",
    "warn_of_another_rate",
    "warn_of_averaged_rate",
]
