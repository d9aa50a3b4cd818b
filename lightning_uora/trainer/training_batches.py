"""Training batches through a LightningModule without training: no gradients, no logging, no batch used up."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich.progress import Progress

from lightning_uora.inputs import random_states_kept
from lightning_uora.trainer.loaders import states_kept, twin

__all__ = ["TrainingBatches"]


class TrainingBatches:
    """Running training batches through the LightningModule as training would, to look at its layers' inputs.

    Raises:
        MisconfigurationException: Nothing says how a batch goes through the module.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.module = trainer, trainer.lightning_module
        own: Any = getattr(self.module, "calibration_step", None)
        self._step: Any = own or self.module.training_step
        taken = is_param_in_hook_signature(self._step, "dataloader_iter", explicit=True)
        if own is None and (taken or not self.module.automatic_optimization):
            why = "takes a dataloader_iter" if taken else "uses manual optimisation"
            raise MisconfigurationException(
                f"init='inputs' needs forwards without optimisation, but training_step {why}; give "
                f"{type(self.module).__name__} a method calibration_step(self, batch, batch_idx) that "
                "only runs the model."
            )

    def first_batches(self, count: int) -> list[Any]:
        """The first batches of an epoch, from copies: the loaders and random states stay as they are."""
        loader = self.trainer.fit_loop._combined_loader
        assert loader is not None
        other = copy.copy(loader)
        other._iterator = None
        with random_states_kept(self.module), states_kept(loader.flattened):
            other.flattened = [twin(one) for one in loader.flattened]
            batches = [(batch, index) for batch, index, _ in itertools.islice(other, count)]
            other.reset()
        return batches

    def step(self, item: tuple[Any, int]) -> None:
        """One batch, on its device, through the module."""
        batch, index = item
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        with self.trainer.precision_plugin.train_step_context():
            self._step(batch, index) if takes_index else self._step(batch)

    def fetched_step(self, item: tuple[Any, int]) -> None:
        """One batch from a loader through the module, after what Lightning does to it on its way."""
        batch = self.trainer.precision_plugin.convert_input(item[0])
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        self.step((self.trainer.strategy.batch_to_device(batch, dataloader_idx=0), item[1]))

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """``log`` and ``log_dict`` do nothing, and loggers are dummies."""
        loggers = self.trainer.loggers
        own: dict[str, Any] = self.module.__dict__
        shadowed: dict[str, Any] = {name: own[name] for name in ("log", "log_dict") if name in own}
        own["log"] = own["log_dict"] = _nothing
        self.trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            self.trainer.loggers = loggers
            for name in ("log", "log_dict"):
                del own[name]
            own.update(shadowed)

    @contextmanager
    def progress(self) -> Iterator[Callable[[Any], None]]:
        """:meth:`fetched_step` with a bar that goes away, where the trainer shows one."""
        bar = self.trainer.progress_bar_callback
        shown = self.trainer.is_global_zero and getattr(bar, "is_enabled", False)
        with Progress(transient=True, disable=not shown) as progress:
            task = progress.add_task("UORA: looking at inputs", total=None)

            def forward(item: Any) -> None:
                self.fetched_step(item)
                progress.advance(task)

            yield forward


def _nothing(*_: Any, **__: Any) -> None:
    """What logging does while only looking."""
