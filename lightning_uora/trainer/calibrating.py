"""A from the first training batches of a Trainer's run, for ``init="inputs"``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_uora.adapters import Attachment
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import alone
from lightning_uora.inputs import calibrate_with
from lightning_uora.trainer.training_batches import TrainingBatches

__all__ = ["calibrate_if_needed"]


def calibrate_if_needed(
    trainer: Trainer, pl_module: LightningModule, mine: Sequence[Attachment], reinit: ReinitSchedule | None
) -> None:
    """Find A, unless it is there already (by hand, or from a checkpoint).

    Raises:
        MisconfigurationException: Nothing says how a batch goes through the module; refreshes that look at
            inputs are told so before training begins.
    """
    wanting = [one for one in mine if one.owner.uncalibrated]
    if not (wanting or (reinit is not None and reinit.growth == "inputs")):
        return
    look = TrainingBatches(trainer)
    for one in wanting:
        started, count = time.perf_counter(), one.owner.config.calibration_batches
        batches = look.first_batches(int(min(count, trainer.num_training_batches)))
        few = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        with alone(trainer.world_size == 1), look.silenced(), look.progress() as forward:
            calibrate_with(one, batches, forward, around=pl_module, few=few)
        rank_zero_info(
            f"UORA: set A of {len(one.layers)} modules from the inputs of {len(batches)} batches, in "
            f"{time.perf_counter() - started:.1f} s."
        )
