"""A from the inputs of the layers: batches through the model without a trace, and their principal axes."""

from lightning_uora.inputs.calibration import calibrate, calibrate_with, inputs_observed
from lightning_uora.inputs.untouched import random_states_kept

__all__ = [
    "calibrate",
    "calibrate_with",
    "inputs_observed",
    "random_states_kept",
]
