"""``UORACallback``: Lightning's hooks, each an ``if`` and a call into the floors below."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.attachment import (
    add_missing_to_optimizer,
    built_later,
    check_same_config,
    is_calibrated,
    keep_from_travelling,
    report_without_gradient,
    run_after_configure_model,
)
from lightning_uora.calibration import calibrate_with, inputs_observed
from lightning_uora.checkpoint import CheckpointHooks
from lightning_uora.companions import (
    accept_part_of_the_weights,
    refuse_averaging,
    refuse_finetuning,
    refuse_flattening_strategy,
    refuse_pruning,
    refuse_replacing_precision,
    warn_of_spawned_copies,
)
from lightning_uora.config import ReinitSchedule, UORAConfig, invalid, require_choice
from lightning_uora.counting import accumulating, callbacks_of, step_of, total_steps
from lightning_uora.growth import require_growth_possible
from lightning_uora.injection import attach_uora, find_root, is_adapted, named_adapters
from lightning_uora.projection import Projections, projections_of
from lightning_uora.ranks import alone, mean_gradients
from lightning_uora.refresher import Refresher
from lightning_uora.report import Summary, plot_refreshes, plot_vectors, summarize
from lightning_uora.sharding import is_sharded, like, reshard_
from lightning_uora.training_batches import TrainingBatches

__all__ = ["UORACallback"]


class UORACallback(Callback):
    """Fine-tunes any LightningModule with UORA adapters.

    Promises: adapters are attached before optimizers are built and before a checkpoint is loaded, for models
    made in ``__init__``, ``setup`` or ``configure_model``; a module that has adapters keeps them; vectors
    that an optimizer built early does not know are added to it; nothing is trained without adapters.

    Args:
        rank: Directions r of the shared projections; each adapted layer trains r + (its output features)
            numbers.
        target_modules: ``"attention"``, ``"all-linear"``, ``"all"``, a pattern (full name, dotted suffix,
            glob, ``"re:"`` and a regular expression), or a list of them.
        exclude_modules: Patterns of modules that stay as they are; they win over targets.
        trainable_modules: Modules trained as they are: ``"auto"`` (the head), patterns, or ``()``.
        init: ``"orthogonal"``, ``"kaiming_uniform"`` (VeRA's draw), or ``"inputs"``: A from the principal
            axes of each layer's inputs, found when training starts.
        calibration_batches: Training batches looked at for ``init="inputs"``; training sees the same batches
            as without. They go through ``calibration_step(batch, batch_idx)`` where the module has one, else
            through ``training_step``, without gradients, logging or a trace in metrics and buffers.
        d_init: Start of every entry of d.
        dropout: Probability on the adapter's input, Linear-like modules only.
        bias: ``"none"``, ``"adapted"`` or ``"all"``: which biases train.
        seed: Seeds A and B; the global random state is not touched.
        compute: ``"auto"``, ``"merged"`` or ``"factored"``.
        share: ``"model"`` or ``"layer"``: whose rows a refresh may change.
        reinit: When and which weak rows of A and B are refreshed, a :class:`ReinitSchedule`; None: never.
        checkpoint: ``"full"`` checkpoints hold everything; ``"adapter"`` ones hold what trained, the base's
            buffers and how to rebuild A and B, and want the same base when they are loaded.

    Attributes:
        config: The :class:`UORAConfig` made from the arguments.
        summary: Parameter counts of the module adapted last; None before ``setup``.

    Raises:
        ValueError: A wrong argument, when the callback is made; targets that match nothing, at ``setup``.
        MisconfigurationException: Lightning is set up in a way that would lose the adapters.

    Example::

        trainer = Trainer(callbacks=[UORACallback(rank=1024)])
    """

    def __init__(
        self,
        rank: int = 256,
        target_modules: str | Sequence[str] = "attention",
        exclude_modules: Sequence[str] = (),
        trainable_modules: str | Sequence[str] = "auto",
        init: Literal["orthogonal", "kaiming_uniform", "inputs"] = "orthogonal",
        calibration_batches: int = 8,
        d_init: float = 0.1,
        dropout: float = 0.0,
        bias: Literal["none", "adapted", "all"] = "none",
        seed: int = 0,
        compute: Literal["auto", "merged", "factored"] = "auto",
        share: Literal["model", "layer"] = "layer",
        reinit: ReinitSchedule | None = ReinitSchedule(),  # noqa: B008 - frozen
        checkpoint: Literal["full", "adapter"] = "full",
    ) -> None:
        super().__init__()
        self.config = UORAConfig(
            rank=rank,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            trainable_modules=trainable_modules,
            init=init,
            calibration_batches=calibration_batches,
            d_init=d_init,
            dropout=dropout,
            bias=bias,
            seed=seed,
            compute=compute,
            share=share,
        )
        require_choice("checkpoint", checkpoint, ("full", "adapter"))
        self.checkpoint: Literal["full", "adapter"] = checkpoint
        if reinit is not None and not isinstance(reinit, ReinitSchedule):
            raise invalid("reinit", reinit, "a ReinitSchedule or None")
        self.reinit = reinit
        if reinit is not None:
            require_growth_possible(reinit.growth, self.config)
        self._refresher = Refresher(reinit) if reinit is not None else None
        self._owner: Projections | None = None
        self._resumed = False
        self.summary: Summary | None = None
        self._gradients_seen = False
        self._gradients: dict[str, Tensor] = {}
        self._last_step = 0

    @property
    def refreshes(self) -> list[dict[str, Any]]:
        """Plain records of the refreshes so far, one each: ``step``, and ``rows`` by projection."""
        return [] if self._owner is None else self._owner.record

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_replacing_precision(trainer)
        refuse_flattening_strategy(trainer)
        if isinstance(trainer.strategy, ModelParallelStrategy) and self.checkpoint == "adapter":
            accept_part_of_the_weights(trainer.strategy, pl_module)
        if stage == "fit":
            refuse_finetuning(trainer)
            calibrates = self.config.init == "inputs" and not is_calibrated(pl_module)
            refuse_averaging(trainer, pl_module, self, self.reinit is not None, calibrates)
            warn_of_spawned_copies(trainer, pl_module)
        if built_later(pl_module) and not is_adapted(pl_module):
            run_after_configure_model(pl_module, self._attach)
        else:
            self._attach(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            raise MisconfigurationException(
                "UORACallback attached no adapter: configure_model was replaced or never ran."
            )
        refuse_pruning(trainer)
        self._gradients_seen = False
        self.summary = summarize(pl_module)
        if trainer.loggers:
            self._log_hyperparameters(trainer)
        add_missing_to_optimizer(trainer.strategy.optimizers, pl_module)
        if trainer.is_global_zero and any(
            isinstance(callback, ModelSummary) for callback in callbacks_of(trainer)
        ):
            Console().print(self.summary.table())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._calibrate(trainer, pl_module)
        self._last_step = step_of(trainer)
        reshard_(pl_module)
        parameters = dict(pl_module.named_parameters())
        for name, gradient in self._gradients.items():
            parameters[name].grad = like(gradient, parameters[name])
        self._gradients = {}
        if self._refresher is not None:
            self._refresher.due = self._refresher.schedule.due_steps(total_steps(trainer))
            if not self._resumed:
                self._refresher = Refresher(self._refresher.schedule, self._refresher.due, self._last_step)
            self._resumed = False
            if not self._refresher.due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                schedule = self._refresher.schedule
                rank_zero_warn(
                    f"reinit never refreshes in this run of {total_steps(trainer)} steps: its window, from "
                    f"start={schedule.start} to stop={schedule.stop}, is empty."
                )
        adapters = [module for _, module in named_adapters(pl_module)]
        if self.config.dropout and not any(module.training for module in adapters):
            rank_zero_warn(
                f"dropout={self.config.dropout} does nothing: the adapted modules are in evaluation mode, as "
                "from_pretrained leaves them; call train() on the model before fitting."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._refresher is not None:
            root, step = find_root(pl_module)[1], step_of(trainer)
            late = self._refresher.is_due(step)  # resumed from between a step and its refresh
            if late and self._refresher.schedule.growth != "gradient":  # those come with the next step
                self._refresh(trainer, self._refresher, root, step, batch, batch_idx)
            self._refresher.before_step(root, step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = step_of(trainer)
        if self._refresher is not None and step != self._last_step:  # not while gradients accumulate
            self._last_step = step
            self._refresh(trainer, self._refresher, find_root(pl_module)[1], step, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refresher = self._refresher
        if refresher is not None and refresher.is_over and not refresher.refreshed:
            rank_zero_warn(
                f"reinit refreshed no row in {len(refresher.due)} attempts: "
                f"threshold={refresher.schedule.threshold} "
                f"({refresher.schedule.threshold_mode}) or max_fraction={refresher.schedule.max_fraction} "
                "is too low."
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.refreshes and (trainer.is_global_zero or is_sharded(pl_module)):
            _log_figures(trainer, find_root(pl_module)[1])

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._gradients_seen:
            self._gradients_seen = True
            report_without_gradient(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._refresher is None else {"refresher": self._refresher.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._refresher is not None and "refresher" in state_dict:
            self._refresher.load_state(state_dict["refresher"])
            self._resumed = True

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if accumulating(trainer):
            with alone(trainer.world_size == 1):
                checkpoint["uora_gradients"] = mean_gradients(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._gradients = checkpoint.get("uora_gradients", {})

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A from the first training batches, unless it is there (by hand, or from a checkpoint)."""
        root = find_root(pl_module)[1]
        grows = self.reinit is not None and self.reinit.growth == "inputs"
        if not (grows or projections_of(root).uncalibrated):
            return
        look, started = TrainingBatches(trainer), time.perf_counter()
        if not projections_of(root).uncalibrated:
            return
        batches = look.first_batches(int(min(self.config.calibration_batches, trainer.num_training_batches)))
        few = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        with alone(trainer.world_size == 1), look.silenced(), look.progress() as forward:
            calibrate_with(root, batches, forward, around=pl_module, few=few)
        rank_zero_info(
            f"UORA: A of {len(list(named_adapters(root)))} modules is set from the inputs of {len(batches)} "
            f"batches, in {time.perf_counter() - started:.1f} s."
        )

    def _refresh(
        self, trainer: Trainer, refresher: Refresher, root: nn.Module, step: int, batch: Any, batch_idx: int
    ) -> None:
        rows = None
        with ExitStack() as stack:
            stack.enter_context(alone(trainer.world_size == 1))
            if refresher.schedule.growth == "inputs" and refresher.is_due(step):
                look = TrainingBatches(trainer)
                stack.enter_context(look.silenced())
                around = trainer.lightning_module
                stack.enter_context(inputs_observed(root, [(batch, batch_idx)], look.step, around))
            rows = refresher.after_step(root, trainer.optimizers, step)
        if rows is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"uora/refreshed_rows": float(sum(map(len, rows.values())))}, step)

    def _attach(self, pl_module: LightningModule) -> None:
        if is_adapted(pl_module):
            check_same_config(pl_module, self.config)
        else:
            attach_uora(pl_module, self.config)
        self._owner = projections_of(find_root(pl_module)[1])
        keep_from_travelling(pl_module, self._owner)
        CheckpointHooks(pl_module, self.checkpoint).install()
        self.summary = summarize(pl_module)

    def _log_hyperparameters(self, trainer: Trainer) -> None:
        assert self.summary is not None
        counts = {
            f"uora/{name}": getattr(self.summary, name)
            for name in ("adapter_params", "trainable_params", "total_params", "trainable_fraction")
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(counts)


def _log_figures(trainer: Trainer, root: nn.Module) -> None:
    """Vectors and refreshes as images, to the loggers that take images, where matplotlib is installed."""
    takers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]
    if not takers or importlib.util.find_spec("matplotlib") is None:
        return
    for name, figure in (("uora/vectors", plot_vectors(root)), ("uora/refreshes", plot_refreshes(root))):
        for logger in takers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, trainer.global_step)
            else:
                logger.experiment.log({name: figure})
