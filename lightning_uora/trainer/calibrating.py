"""A from the first training batches of a Trainer's run, for ``init="inputs"``."""

from __future__ import annotations

import time

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_uora.adapters import find_root, named_adapters, projections_of
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import alone
from lightning_uora.inputs import calibrate_with
from lightning_uora.trainer.training_batches import TrainingBatches

__all__ = ["calibrate_if_needed"]


def calibrate_if_needed(trainer: Trainer, pl_module: LightningModule, reinit: ReinitSchedule | None) -> None:
    """Find A, unless it is there already (by hand, or from a checkpoint).

    Raises:
        MisconfigurationException: Nothing says how a batch goes through the module; refreshes that look at
            inputs are told so before training begins.
    """
    root = find_root(pl_module)[1]
    owner = projections_of(root)
    if not (owner.uncalibrated or (reinit is not None and reinit.growth == "inputs")):
        return
    look, started = TrainingBatches(trainer), time.perf_counter()
    if not owner.uncalibrated:
        return
    wanted = min(owner.config.calibration_batches, trainer.num_training_batches)
    batches = look.first_batches(int(wanted))
    few = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    with alone(trainer.world_size == 1), look.silenced(), look.progress() as forward:
        calibrate_with(root, batches, forward, around=pl_module, few=few)
    rank_zero_info(
        f"UORA: A of {len(list(named_adapters(root)))} modules is set from the inputs of {len(batches)} "
        f"batches, in {time.perf_counter() - started:.1f} s."
    )
