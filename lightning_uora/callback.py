"""``UORACallback``: Lightning's hooks, each an ``if`` and a call into the floors below."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch.callbacks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_uora.checkpoint import CheckpointHooks
from lightning_uora.config import ReinitSchedule, UORAConfig, require_choice
from lightning_uora.injection import attach_uora, is_adapted, named_adapters
from lightning_uora.projection import OWNER, Projections, projections_of
from lightning_uora.refresh import Refresher, require_growth_possible
from lightning_uora.report import Summary, plot_refreshes, plot_vectors, summarize

__all__ = ["UORACallback"]

AVERAGING: tuple[type[Callback], ...] = tuple(
    getattr(lightning.pytorch.callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")  # the second since Lightning 2.6
    if hasattr(lightning.pytorch.callbacks, name)
)


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
        init: ``"orthogonal"`` or ``"kaiming_uniform"`` (VeRA's draw).
        d_init: Start of every entry of d.
        dropout: Probability on the adapter's input, Linear-like modules only.
        bias: ``"none"``, ``"adapted"`` or ``"all"``: which biases train.
        seed: Seeds A and B; the global random state is not touched.
        compute: ``"auto"``, ``"merged"`` or ``"factored"``.
        share: ``"model"`` or ``"layer"``: whose rows a refresh may change.
        reinit: When and which weak rows of A and B are refreshed; None: never.
        checkpoint: ``"full"`` checkpoints hold everything; ``"adapter"`` ones hold what trained, the base's
            buffers and how to rebuild A and B, and want the same base when they are loaded.

    Attributes:
        config: The :class:`UORAConfig` made from the arguments.
        reinit: The schedule, or None.
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
        init: Literal["orthogonal", "kaiming_uniform"] = "orthogonal",
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
            d_init=d_init,
            dropout=dropout,
            bias=bias,
            seed=seed,
            compute=compute,
            share=share,
        )
        require_choice("checkpoint", checkpoint, ("full", "adapter"))
        self.checkpoint: Literal["full", "adapter"] = checkpoint
        self.reinit = reinit
        if reinit is not None and reinit.growth == "gradient":
            require_growth_possible(share, dropout)
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
        _refuse_replacing_precision(trainer)
        if stage == "fit":
            self._refuse_averaging(trainer, pl_module)
        if _built_later(pl_module) and not is_adapted(pl_module):
            _run_after_configure_model(pl_module, self._attach)
        else:
            self._attach(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            raise MisconfigurationException(
                "UORACallback attached no adapter: configure_model was replaced or never ran."
            )
        self._gradients_seen = False
        self.summary = summarize(pl_module)
        if trainer.loggers:
            self._log_hyperparameters(trainer)
        _add_missing_to_optimizer(trainer.strategy.optimizers, pl_module)
        if trainer.is_global_zero and any(
            isinstance(callback, ModelSummary) for callback in _callbacks(trainer)
        ):
            Console().print(self.summary.table())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = _step(trainer)
        for name, gradient in self._gradients.items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        self._gradients = {}
        if self._refresher is not None:
            self._refresher.due = self._refresher.schedule.due_steps(_total_steps(trainer))
            if not self._resumed:
                self._refresher = Refresher(self._refresher.schedule, self._refresher.due, self._last_step)
            self._resumed = False

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._refresher is not None:
            root, step = _root(pl_module), _step(trainer)
            if self._refresher.is_due(step):  # resumed from between a step and its refresh
                self._refresh(trainer, self._refresher, root, step)
            self._refresher.before_step(root, step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = _step(trainer)
        if self._refresher is not None and step != self._last_step:  # not while gradients accumulate
            self._last_step = step
            self._refresh(trainer, self._refresher, _root(pl_module), step)

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
        if self.refreshes and trainer.is_global_zero:
            _log_figures(trainer, _root(pl_module))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._gradients_seen:
            self._gradients_seen = True
            _report_without_gradient(pl_module)

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
        if _accumulating(trainer):
            named = pl_module.named_parameters()
            checkpoint["uora_gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._gradients = checkpoint.get("uora_gradients", {})

    def _refresh(self, trainer: Trainer, refresher: Refresher, root: nn.Module, step: int) -> None:
        rows = refresher.after_step(root, trainer.optimizers, step)
        if rows is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"uora/refreshed_rows": float(sum(map(len, rows.values())))}, step)

    def _refuse_averaging(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaging callbacks copy the module in ``setup``, and average vectors whatever they scale."""
        callbacks = _callbacks(trainer)
        averaging = [callback for callback in callbacks if isinstance(callback, AVERAGING)]
        if not averaging:
            return
        name = type(averaging[0]).__name__
        if self.reinit is not None:
            raise MisconfigurationException(
                f"{name} would average vectors over rows that a refresh replaces; use "
                "UORACallback(reinit=None)."
            )
        late = _built_later(pl_module) and not is_adapted(pl_module)
        if late or callbacks.index(averaging[0]) < callbacks.index(self):
            raise MisconfigurationException(
                f"{name} copies the module before it has adapters; put UORACallback before it, and call "
                "attach_uora at the end of configure_model if the model is built there."
            )

    def _attach(self, pl_module: LightningModule) -> None:
        if is_adapted(pl_module):
            _check_same_config(pl_module, self.config)
        else:
            attach_uora(pl_module, self.config)
        self._owner = projections_of(_root(pl_module))
        _keep_from_travelling(pl_module, self._owner)
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


def _refuse_replacing_precision(trainer: Trainer) -> None:
    """Precision plugins that replace Linear layers after ``setup`` would drop the adapters without a word."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        raise MisconfigurationException(
            f"{type(plugin).__name__} replaces every Linear layer after the adapters are attached and would "
            "lose them; use precision='bf16-true' or 'bf16-mixed' with UORACallback."
        )


def _built_later(pl_module: LightningModule) -> bool:
    return is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)


# Note [Models built late]
# Lightning calls Callback.setup, then the module's setup, then configure_model, then loads the checkpoint.
# Where a module overrides setup or configure_model it may still be empty, or half built, in Callback.setup.
# So configure_model is shadowed on the instance by a function that removes itself, calls the original, and
# attaches: after everything is built, before weights and optimizers.


def _run_after_configure_model(pl_module: LightningModule, attach: object) -> None:
    """See Note [Models built late]."""
    original = pl_module.configure_model

    def configure_model() -> None:
        pl_module.__dict__.pop("configure_model", None)
        original()
        assert callable(attach)
        attach(pl_module)

    pl_module.__dict__["configure_model"] = configure_model


def _check_same_config(pl_module: LightningModule, config: UORAConfig) -> None:
    found = next(module.config for module in pl_module.modules() if isinstance(module, Projections))
    names = [field.name for field in dataclasses.fields(config)]
    different = [
        f"{name} ({getattr(found, name)!r} in the module, {getattr(config, name)!r} in the callback)"
        for name in names
        if getattr(found, name) != getattr(config, name)
    ]
    if different:
        raise ValueError("the module has adapters of another configuration: " + "; ".join(different) + ".")


def _keep_from_travelling(pl_module: LightningModule, owner: Projections) -> None:
    """DistributedDataParallel sends every buffer at each forward; every rank drew A and B by itself."""
    ignored = set(getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()))
    (prefix,) = (name for name, module in pl_module.named_modules() if module is owner)
    layers = len(list(named_adapters(pl_module)))
    names = owner.names_ever(layers if owner.config.share == "layer" else 0)
    ignored.update(f"{prefix}.{name}" for name in names)
    pl_module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def _root(pl_module: LightningModule) -> nn.Module:
    """The module that was adapted: the LightningModule, or the part that ``attach_uora`` was called on."""
    return next(module for module in pl_module.modules() if OWNER in module._modules)


# Note [Counting steps]
# Schedules count optimizer steps. trainer.global_step does so under automatic optimisation. Under manual
# optimisation it moves by the number of optimizers, or stays 0 where they are used past Lightning; there
# batches are counted.


def _step(trainer: Trainer) -> int:
    """Optimizer steps so far, see Note [Counting steps]."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1


def _accumulation(trainer: Trainer, epoch: int) -> int:
    """Batches of one optimizer step in an epoch."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in _callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return int(callback.get_accumulate_grad_batches(epoch))
    return trainer.accumulate_grad_batches


def _accumulating(trainer: Trainer) -> bool:
    """Whether gradients wait for their optimizer step; Lightning's checkpoints leave them out."""
    if not trainer.training or not trainer.lightning_module.automatic_optimization:
        return False
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return not progress.is_last_batch and progress.current.ready % trainer.accumulate_grad_batches != 0


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _total_steps(trainer: Trainer) -> int | None:
    """Steps of the whole run; None when it has no end. See Note [Counting steps]."""
    per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
    limits: list[float] = []
    automatic = trainer.lightning_module.automatic_optimization
    if trainer.max_steps >= 0:
        limits.append(
            trainer.max_steps if automatic else trainer.max_steps // max(1, len(trainer.optimizers))
        )
    if epochs is not None and epochs >= 0 and per_epoch != float("inf"):
        limits.append(sum(math.ceil(per_epoch / _accumulation(trainer, epoch)) for epoch in range(epochs)))
    return int(min(limits)) if limits else None


def _add_missing_to_optimizer(optimizers: Sequence[Optimizer], pl_module: LightningModule) -> None:
    """Put vectors that no optimizer holds into the first group: it was built before the adapters.

    Into the group's list, because ``add_param_group`` breaks LambdaLR and OneCycleLR.
    """
    real = [optimizer for optimizer in optimizers if type(optimizer).__name__ != "_MockOptimizer"]
    if not real:
        return
    held = {id(p) for optimizer in real for group in optimizer.param_groups for p in group["params"]}
    wanted = [f"{name}.{leaf}" for name, _ in named_adapters(pl_module) for leaf in ("uora_d", "uora_b")]
    missing = {
        name: p
        for name, p in pl_module.named_parameters()
        if name in wanted and p.requires_grad and id(p) not in held
    }
    if missing:
        first = real[0].param_groups[0]
        first["params"].extend(missing.values())
        rank_zero_warn(
            f"The optimizer was built without {len(missing)} adapter vectors ({next(iter(missing))}, ...); "
            "they "
            f"are now in its first group, at lr={float(first['lr']):g}. Build it in configure_optimizers to "
            "choose "
            "their learning rate."
        )


def _report_without_gradient(module: nn.Module) -> None:
    names = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        rank_zero_warn(f"No gradient in the first backward for {shown}: these parameters do not train.")
