"""Small Lightning modules, their data and a quiet trainer."""

from __future__ import annotations

import faulthandler
import inspect
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uora import UORACallback
from lightning_uora.adapters import Projections, attachment_of

TENSORS_ONLY = {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}
"""Lightning unpickles nothing but tensors; before 2.6 it had no such option."""


def projections_of(model: nn.Module) -> Projections:
    """The owner of A and B of the only adapted model in ``model``."""
    return attachment_of(model, "a test").owner


needs_weight_averaging = pytest.mark.skipif(
    not hasattr(lightning.pytorch.callbacks, "WeightAveraging"),
    reason="WeightAveraging came with Lightning 2.6",
)


class Toy(LightningModule):
    """Two blocks and a head; built in ``__init__`` unless ``late`` says where."""

    late = ""

    def __init__(self):
        super().__init__()
        if not self.late:
            self.build()

    def build(self):
        if not hasattr(self, "body"):
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
            self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_index):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_index):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class BuiltInSetup(Toy):
    late = "setup"

    def setup(self, stage):
        self.build()


class BuiltInConfigureModel(Toy):
    late = "configure_model"

    def configure_model(self):
        self.build()


class HeadFirst(Toy):
    """The head exists from the start; the rest comes in ``configure_model``."""

    late = "configure_model"

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)

    def configure_model(self):
        self.build()

    def forward(self, x):
        return super().forward(self.first(x))


BUILT = [Toy, BuiltInSetup, BuiltInConfigureModel, HeadFirst]


def data(count: int = 16, batch: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch)


def equal_batches(count: int = 4) -> DataLoader:
    """Batches that are all the same, so that where a resume starts in the epoch does not matter."""
    (x, y) = next(iter(data(4, 4)))
    return DataLoader(TensorDataset(x.repeat(count, 1), y.repeat(count)), batch_size=4)


RANKS_SECONDS = 240


def on_two_ranks(work: Callable[[int, str, int], None], path: Path) -> None:
    """Run ``work(rank, path, port)`` in two processes; what hangs is ended and fails.

    Ranks meet at a port: over a file torch 2.7 now and then waits for ever.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = int(free.getsockname()[1])
    ranks = torch.multiprocessing.spawn(_one_rank, (work, str(path), port), nprocs=2, join=False)
    try:
        last = time.monotonic() + RANKS_SECONDS
        while not ranks.join(timeout=1):
            assert time.monotonic() < last, f"the ranks did not end within {RANKS_SECONDS} seconds"
    finally:
        for process in ranks.processes:
            process.kill()


def _one_rank(rank: int, work: Callable[[int, str, int], None], path: str, port: int) -> None:
    """Work, then leave without taking the group down.

    There torch 2.7 holds the GIL while it waits for a thread that may still be freeing the last object that
    was gathered, and now and then waits for ever, with a barrier before it or without (seen by py-spy).
    """
    faulthandler.dump_traceback_later(RANKS_SECONDS - 20)
    work(rank, path, port)
    torch.distributed.barrier()
    os._exit(0)


def trainer(*callbacks, **options) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def callback(**options) -> UORACallback:
    return UORACallback(**{"rank": 4, "target_modules": "all-linear", "reinit": None, **options})
