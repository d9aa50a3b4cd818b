"""What else a Trainer holds: strategies, precisions and callbacks that adapters go with, or are refused."""

from __future__ import annotations

from typing import Any

import lightning.pytorch.callbacks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uora.adapters import AdaptedModule, is_adapted, trained_as_they_are
from lightning_uora.trainer.attachment import built_later, is_calibrated
from lightning_uora.trainer.steps import callbacks_of

__all__ = ["check_companions", "check_pruning", "convert_first", "others_of_its_kind"]

AVERAGING: tuple[type[Callback], ...] = tuple(
    getattr(lightning.pytorch.callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")  # the second since Lightning 2.6
    if hasattr(lightning.pytorch.callbacks, name)
)


def check_companions(trainer: Trainer, pl_module: LightningModule, own: Any, stage: str) -> None:
    """Raise ``MisconfigurationException`` for what adapters do not go with; warn of what loses them later.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule, adapted or not yet.
        own: The callback that attaches the adapters.
        stage: As in ``Callback.setup``.
    """
    _refuse_replacing_precision(trainer)
    _refuse_flattening_strategy(trainer)
    if isinstance(trainer.strategy, ModelParallelStrategy) and own.checkpoint == "adapter":
        _accept_part_of_the_weights(trainer.strategy, pl_module)
    _refuse_two_kinds(trainer, own)
    _refuse_twins(trainer, own)
    if stage == "fit":
        _refuse_finetuning(trainer)
        calibrates = own.config.init == "inputs" and not is_calibrated(pl_module)
        _refuse_averaging(trainer, pl_module, own, own.reinit is not None, calibrates)
        _warn_of_spawned_copies(trainer, pl_module)


def others_of_its_kind(trainer: Trainer, own: Callback) -> list[Any]:
    """Other callbacks that adapt other modules of the same LightningModule."""
    return [one for one in callbacks_of(trainer) if isinstance(one, type(own)) and one is not own]


def _refuse_two_kinds(trainer: Trainer, own: Any) -> None:
    kinds = {own.checkpoint, *(other.checkpoint for other in others_of_its_kind(trainer, own))}
    if len(kinds) > 1:
        raise MisconfigurationException(
            "Several UORACallbacks write one checkpoint; give all of them the same checkpoint='full' "
            "or 'adapter'."
        )


def _refuse_twins(trainer: Trainer, own: Any) -> None:
    if any(other.config == own.config for other in others_of_its_kind(trainer, own)):
        raise MisconfigurationException(
            f"UORACallback(rank={own.config.rank}, target_modules={own.config.target_modules!r}) is given "
            "twice with these settings; give each callback target_modules of its own."
        )


def _refuse_replacing_precision(trainer: Trainer) -> None:
    """A plugin that replaces Linear layers after ``setup`` would drop the adapters without a word."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, TransformerEnginePrecision):
        raise MisconfigurationException(
            f"{type(plugin).__name__} replaces every Linear layer after the adapters are attached and would "
            "lose them; use precision='bf16-true' or 'bf16-mixed' with UORACallback."
        )


# Note [Layers that are quantised by the Trainer]
# BitsandbytesPrecision exchanges Linear layers when the strategy is set up, after the callbacks. Adapters
# come after that: its own conversion is called first, which does nothing when it is called again. What trains
# as it is, the head, is left out of it: quantised numbers do not train.


def convert_first(plugin: Any, pl_module: LightningModule, own: Any) -> None:
    """See Note [Layers that are quantised by the Trainer].

    Args:
        plugin: The Trainer's precision.
        pl_module: Its parts are there, and not adapted yet.
        own: The callback that will adapt it.
    """
    if isinstance(plugin, BitsandbytesPrecision) and not is_adapted(pl_module):
        plugin.ignore_modules = {*plugin.ignore_modules, *trained_as_they_are(pl_module, own.config)}
        plugin.convert_module(pl_module)


def _refuse_flattening_strategy(trainer: Trainer) -> None:
    """Strategies that flatten parameters take the weights away from the modules that read them."""
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{type(strategy).__name__} flattens parameters after the adapters are attached, so "
            "adapted modules no longer find their weights. Use ModelParallelStrategy and call "
            "attach_uora, then fully_shard, in configure_model; or use strategy='ddp'."
        )


def _warn_of_spawned_copies(trainer: Trainer, pl_module: LightningModule) -> None:
    """Spawned and forked processes train copies; what comes back is loaded into what has a place for it."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not is_adapted(pl_module):
        rank_zero_warn(
            "The processes of this strategy train copies of the module: checkpoints will "
            "hold the adapters, but the module that you gave to fit gets none. Call "
            "attach_uora(module, callback.config) before the fit, or use strategy='ddp'."
        )


def _accept_part_of_the_weights(strategy: ModelParallelStrategy, pl_module: LightningModule) -> None:
    """Weights are loaded strictly there, before any hook: see Note [Strategies that load weights first]."""
    if strategy._save_distributed_checkpoint:
        raise MisconfigurationException(
            "checkpoint='adapter' leaves the base out, but folders of shards must hold the whole "
            "model; use ModelParallelStrategy(save_distributed_checkpoint=False) or "
            "UORACallback(checkpoint='full')."
        )
    pl_module.strict_loading = False


def _refuse_averaging(
    trainer: Trainer, pl_module: LightningModule, own: Callback, refreshes: bool, calibrates: bool
) -> None:
    """Averaging callbacks copy the module in ``setup``, and average vectors whatever they scale.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        own: The callback that attaches the adapters.
        refreshes: Whether rows of A and B will be replaced.
        calibrates: Whether A is yet to be found.
    """
    callbacks = callbacks_of(trainer)
    averaging = [callback for callback in callbacks if isinstance(callback, AVERAGING)]
    if not averaging:
        return
    name = type(averaging[0]).__name__
    if calibrates:
        raise MisconfigurationException(
            f"{name} copies the module before A is found; call attach_uora and calibrate before the fit, "
            "or use another init."
        )
    if refreshes:
        raise MisconfigurationException(
            f"{name} would average vectors over rows that a refresh replaces; use UORACallback(reinit=None)."
        )
    late = built_later(pl_module) and not is_adapted(pl_module)
    if late or callbacks.index(averaging[0]) < callbacks.index(own):
        raise MisconfigurationException(
            f"{name} copies the module before it has adapters; put UORACallback before it, and call "
            "attach_uora at the end of configure_model if the model is built there."
        )


def _refuse_finetuning(trainer: Trainer) -> None:
    """``BackboneFinetuning`` freezes the vectors with the backbone, and later trains the frozen base."""
    if any(isinstance(callback, BackboneFinetuning) for callback in callbacks_of(trainer)):
        raise MisconfigurationException(
            "BackboneFinetuning would first freeze the adapters and later train the frozen base; "
            "remove it, and name what else should train in UORACallback(trainable_modules=...)."
        )


def check_pruning(trainer: Trainer) -> None:
    """``ModelPruning`` replaces parameters, which of adapted modules the adapter reads."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelPruning) and any(
            isinstance(module, AdaptedModule) for module, _ in callback._parameters_to_prune
        ):
            raise MisconfigurationException(
                "ModelPruning would replace parameters of adapted modules; give it parameters_to_prune "
                "without them, or prune after detach_uora(model, merge=True)."
            )
