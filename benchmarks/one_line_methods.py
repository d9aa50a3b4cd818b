"""The methods of ``one_line.py`` as a user writes them: a module, its optimizer, perhaps a callback."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from one_line_runs import LineRun
from quality_methods import POLICIES, Method, build
from quality_tasks import Task
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_uora import UORACallback, summarize

OWN = {"groups": ("uora_d", "uora_b"), "lora-own": ("lora_A.default.weight", "lora_B.default.weight")}
"""Ends of the names of the parameters that have a rate of their own."""


def shape(step: int, steps: int) -> float:
    """Of the base rate: linear warm-up over the first tenth of the steps, then a cosine to zero."""
    warm = max(1, round(0.1 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Learner(LightningModule):
    """A task's model with the optimizer that everybody writes."""

    def __init__(self, task: Task, model: nn.Module, run: LineRun) -> None:
        super().__init__()
        self.task, self.model, self.run = task, model, run

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The task's loss on those rows."""
        return self.task.loss(self.model, batch)

    def configure_optimizers(self) -> dict:
        """AdamW on everything at the base rate, or with a group by hand; its schedule."""
        optimizer = torch.optim.AdamW(
            self.groups() if self.run.method in OWN else self.parameters(), lr=self.run.base_lr
        )
        if self.run.schedule == "constant":
            return {"optimizer": optimizer}
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def groups(self) -> list[dict]:
        """What a user who knows better writes: the adapters in a group of their own, at their own rate."""
        named, ends = list(self.named_parameters()), OWN[self.run.method]
        own = {"params": [p for name, p in named if name.endswith(ends)], "lr": self.run.lr}
        if self.run.method == "groups":
            own["weight_decay"] = 0.0
        return [{"params": [p for name, p in named if not name.endswith(ends)]}, own]


def callbacks(task: Task, run: LineRun) -> list[UORACallback]:
    """The one line."""
    init = {"init": "inputs"} if run.method.endswith("+inputs") else {}
    return [
        UORACallback(
            rank=run.rank,
            target_modules=task.names,
            trainable_modules=[task.head] if task.head else (),
            seed=run.seed,
            reinit=POLICIES[run.refresh],
            **init,
        )
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """No word from Lightning on devices and loaders; afterwards it speaks as before."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@quiet()
def train(task: Task, run: LineRun) -> tuple[nn.Module, int, float]:
    """Fit one method. The model, its adapter parameters, and seconds of the fit."""
    ours = run.method in ("line", "line+inputs", "groups")
    torch.manual_seed(run.seed)
    kind = Method(run.method.removesuffix("-own"), run.rank)
    model, trained, _ = (task.model(), [], []) if ours else build(kind, task, run.seed)
    learner = Learner(task, model.train(), run)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks(task, run) if ours else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(run.seed)  # the same dropout for all methods, whatever they drew before
    start = time.perf_counter()
    trainer.fit(learner, DataLoader(task.order, batch_size=None))
    seconds = time.perf_counter() - start
    count = summarize(learner).adapter_params if ours else sum(p.numel() for p in trained)
    return model, count, seconds
