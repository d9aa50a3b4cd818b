"""``UORACallback``: Lightning's hooks, each an ``if`` and a call into the floors below."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_uora.adapters import Projections, is_adapted, require_name, settle_statistics
from lightning_uora.config import ReinitSchedule, UORAConfig, invalid, require_choice, require_rate
from lightning_uora.reinit import require_growth_possible
from lightning_uora.reports import Summary, summarize
from lightning_uora.trainer import (
    Guard,
    Refreshing,
    VectorRate,
    WaitingGradients,
    attach_in_time,
    attachments_of,
    calibrate_if_needed,
    callbacks_of,
    check_companions,
    check_pruning,
    convert_first,
    forget_configure_model,
    keep_rates,
    log_counts,
    log_figures,
    log_progress,
    others_of_its_kind,
    print_table,
    rate_before_logging,
    require_adapted,
    saved_groups,
    set_vector_rates,
    warn_at_the_end,
    warn_at_the_start,
    warn_of_another_rate,
    warn_of_averaged_rate,
)

__all__ = ["UORACallback"]


class UORACallback(Callback):
    """Fine-tunes any LightningModule with UORA adapters.

    Promises: adapters are attached before optimizers are built and before a checkpoint is loaded, for models
    made in ``__init__``, ``setup`` or ``configure_model``. A module that has adapters keeps them. If an
    optimizer was built early and does not know the vectors, they are added to it. Nothing is trained without
    adapters.

    Args:
        rank: Directions r of the shared projections. Each adapted layer trains r + (its output features)
            numbers.
        target_modules: ``"attention"``, ``"all-linear"``, ``"all"``, a pattern (full name, dotted suffix,
            glob, ``"re:"`` and a regular expression), or a list of them.
        exclude_modules: Patterns of modules to leave out; they win over targets.
        trainable_modules: Modules trained in full: ``"auto"`` (the head), patterns, or ``()``.
        init: ``"orthogonal"``, ``"kaiming_uniform"`` (VeRA's draw), or ``"inputs"``: A starts from the main
            directions of each layer's inputs, found when training starts.
        calibration_batches: Training batches used for ``init="inputs"``; training then sees the same batches
            as without it. They go through ``calibration_step(batch, batch_idx)`` if the module has one, else
            through ``training_step``, without gradients, logging or a trace in metrics and buffers.
        d_init: Start of every entry of d.
        dropout: Probability on the adapter's input, for Linear-like modules only.
        bias: ``"none"``, ``"adapted"`` or ``"all"``: which biases train.
        batch_norm: ``"frozen"``: BatchNorm of the frozen base keeps its running statistics and computes with
            them; ``"moving"``: as PyTorch does in training.
        seed: Seeds A and B; the global random state is not touched.
        compute: ``"auto"``, ``"merged"`` or ``"factored"``.
        share: ``"model"`` or ``"layer"``: whose rows a refresh may change.
        reinit: A :class:`ReinitSchedule`: when to refresh weak rows of A and B, and which. None: never.
        checkpoint: ``"full"`` checkpoints hold everything. ``"adapter"`` ones hold what trained, the base's
            buffers and how to rebuild A and B; to load one you need the same base.
        vector_lr: Learning rate of the vectors d and b. ``"auto"``: 0.01 under Adam, AdamW and their kind,
            times the root of 1,000 / steps (1 to 5), times the root of 12 / adapted layers (at most 1), times
            2.5 if the schedule warms up and decays, rounded to two digits. The vectors get a group of their
            own, ``uora_vectors``, without weight decay; it follows the schedule of the group that they came
            from. A group of yours that holds only vectors stays as you made it. A number: that rate, under
            any optimizer. None: your optimizer is left alone.
        adapter_name: Which adapter trains. If the module has adapters under other names only, a new one is
            added and becomes active; ``"default"`` then trains the active one instead.

    Attributes:
        config: The :class:`UORAConfig` made from the arguments.
        summary: Parameter counts of the module adapted last; None before ``setup``.

    Raises:
        ValueError: An argument is wrong, when the callback is made; targets match nothing, at ``setup``.
        MisconfigurationException: Lightning is set up in a way that would lose the adapters.

    Example::

        trainer = Trainer(callbacks=[UORACallback(rank=1024)])
    """

    def __init__(
        self,
        rank: int = 256,
        target_modules: str | Sequence[str] = "attention",
        exclude_modules: str | Sequence[str] = (),
        trainable_modules: str | Sequence[str] = "auto",
        init: Literal["orthogonal", "kaiming_uniform", "inputs"] = "orthogonal",
        calibration_batches: int = 8,
        d_init: float = 0.1,
        dropout: float = 0.0,
        bias: Literal["none", "adapted", "all"] = "none",
        batch_norm: Literal["frozen", "moving"] = "frozen",
        seed: int = 0,
        compute: Literal["auto", "merged", "factored"] = "auto",
        share: Literal["model", "layer"] = "layer",
        reinit: ReinitSchedule | None = ReinitSchedule(),  # noqa: B008 - frozen
        checkpoint: Literal["full", "adapter"] = "full",
        vector_lr: float | Literal["auto"] | None = "auto",
        adapter_name: str = "default",
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
            batch_norm=batch_norm,
            seed=seed,
            compute=compute,
            share=share,
        )
        require_choice("checkpoint", checkpoint, ("full", "adapter"))
        self.checkpoint: Literal["full", "adapter"] = checkpoint
        if reinit is not None and not isinstance(reinit, ReinitSchedule):
            raise invalid(
                "reinit", reinit, "a ReinitSchedule or None (from lightning_uora import ReinitSchedule)"
            )
        self.reinit = reinit
        if reinit is not None:
            require_growth_possible(reinit.growth, self.config)
        require_rate("vector_lr", vector_lr)
        self.vector_lr = vector_lr
        require_name(adapter_name)
        self.adapter_name = adapter_name
        self._refreshing = Refreshing(reinit) if reinit is not None else None
        self._owners: list[Projections] = []
        self._adapted: list[weakref.ref[LightningModule]] = []
        self.summary: Summary | None = None
        self._guard, self._gradients = Guard(), WaitingGradients()
        self._saved_groups: list[list[int]] | None = None
        self._optimizers_before: list[Optimizer] = []
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._resumed_rate: VectorRate = vector_lr
        self._rate_used: float | None = None

    @property
    @override
    def state_key(self) -> str:
        """Several callbacks of this kind, each for modules of its own, have different keys."""
        standard = UORAConfig(self.config.rank, self.config.target_modules)
        chosen = {"rank": self.config.rank, "target_modules": self.config.target_modules}
        for field in fields(UORAConfig):
            value = getattr(self.config, field.name)
            chosen |= {field.name: value} if value != getattr(standard, field.name) else {}
        chosen |= {} if self.adapter_name == "default" else {"adapter_name": self.adapter_name}
        return self._generate_state_key(**chosen)

    @property
    def short_key(self) -> str:
        """What :attr:`state_key` was before it told all settings."""
        chosen = {"rank": self.config.rank, "target_modules": self.config.target_modules}
        return self._generate_state_key(**chosen)

    @property
    def refreshes(self) -> list[dict[str, Any]]:
        """Plain records of the refreshes so far, one for each: ``step``, and ``rows`` by projection.

        If the module holds several adapted models, ``model`` is the number of the one that was refreshed.
        """
        if len(self._owners) == 1:
            return self._owners[0].record
        several = [
            {**entry, "model": place} for place, one in enumerate(self._owners) for entry in one.record
        ]
        return sorted(several, key=lambda entry: (entry["step"], entry["model"]))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_companions(trainer, pl_module, self, stage)
        self._saved_groups, self._optimizers_before = None, list(trainer.strategy.optimizers)
        self._resumed_rate = self.vector_lr
        if stage == "fit" or not self._was_detached(pl_module):
            first = partial(convert_first, trainer.precision_plugin, own=self)
            attach_in_time(pl_module, self, others_of_its_kind(trainer, self), self._attached, first)

    def _attached(self, pl_module: LightningModule, owners: list[Projections]) -> None:
        self._owners, self.summary = owners, summarize(pl_module)
        self._adapted = [weakref.ref(pl_module)]

    def _was_detached(self, pl_module: LightningModule) -> bool:
        """Whether adapters that this callback attached were merged or taken away since."""
        return any(one() is pl_module for one in self._adapted) and not is_adapted(pl_module)

    def _speaks(self, trainer: Trainer) -> bool:
        """Of several callbacks of this kind the last one tells what is true of all."""
        others = others_of_its_kind(trainer, self)
        return not others or callbacks_of(trainer).index(self) > callbacks_of(trainer).index(others[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_adapted": []}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_adapted(pl_module)
        check_pruning(trainer)
        self.summary, mine = summarize(pl_module), attachments_of(pl_module, self.config)
        last, saved = self._speaks(trainer), self._saved_groups
        groups = set_vector_rates(trainer, pl_module, mine, self.vector_lr, saved, last)
        self._rates = [(group, group["lr"]) for group in groups]
        warn_of_averaged_rate(trainer, mine)
        if trainer.ckpt_path:
            warn_of_another_rate(self.vector_lr, self._resumed_rate)
        if last:
            log_counts(trainer, self.summary)
            if not trainer.ckpt_path:
                print_table(trainer, pl_module, self.summary)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = attachments_of(pl_module, self.config)
        keep_rates(trainer, self._rates)
        calibrate_if_needed(trainer, pl_module, mine, self.reinit)
        for one in mine:
            settle_statistics(one.root)  # SyncBatchNorm has taken the place of what was held
        self._gradients.put(pl_module)
        if self._refreshing is not None:
            self._refreshing.start(trainer, mine)
        if self._speaks(trainer):
            if trainer.ckpt_path:  # the rates are the checkpoint's from here on
                print_table(trainer, pl_module, summarize(pl_module))
            self._guard.start(trainer, pl_module)
            warn_at_the_start(pl_module, self.config, summarize(pl_module))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._guard.hold(trainer)
        self._rate_used = rate_before_logging(trainer, pl_module)
        if self._refreshing is not None:
            self._refreshing.before_batch(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._refreshing is not None:
            self._refreshing.after_batch(trainer, pl_module, batch, batch_idx)
        self._gradients.after_batch()
        self._guard.after_batch(trainer)
        if self._speaks(trainer):
            log_progress(trainer, pl_module, self._rate_used)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._gradients.before_backward(trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._guard.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._guard.before_step(trainer, optimizer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._guard.judge()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._refreshing is not None:
            self._refreshing.end()
        if self._speaks(trainer):
            warn_at_the_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._speaks(trainer):
            log_figures(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        forget_configure_model(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._refreshing is None else {"refresher": self._refreshing.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._refreshing is not None and "refresher" in state_dict:
            self._refreshing.load_state(state_dict["refresher"])

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.setdefault("uora_vector_lr", {})[self.state_key] = self._resumed_rate
        if gradients := self._gradients.saved(trainer, pl_module):
            checkpoint["uora_gradients"] = gradients

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._gradients.load(checkpoint.get("uora_gradients", {}))
        self._resumed_rate = checkpoint.get("uora_vector_lr", {}).get(self.state_key, self.vector_lr)
        if trainer.strategy.optimizers == self._optimizers_before:  # else a finder puts back what it saved
            self._saved_groups = saved_groups(checkpoint)
