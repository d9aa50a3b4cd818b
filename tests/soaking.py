"""A long run that can be broken anywhere and continued: ``python -m tests.soaking FOLDER STEPS KIND``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_uora import ReinitSchedule, UORACallback
from tests.toys import TENSORS_ONLY, Toy, data, trainer

REFRESH_EVERY, SAVE_EVERY = 10, 50
Kind = Literal["full", "adapter"]


class Soaked(Toy):
    """A Toy with a BatchNorm whose batches, and draws in training, are functions of the step alone."""

    def build(self):
        super().build()
        self.body.insert(1, nn.BatchNorm1d(6))
        self.body.append(nn.Dropout(0.1))

    def on_train_batch_start(self, batch, batch_index):
        torch.manual_seed(self.trainer.global_step)

    def training_step(self, batch, batch_index):
        x = torch.randn(5, 6)
        return nn.functional.cross_entropy(self(x), x[:, :3].argmax(1))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999), "interval": "step"}
        ]


def made() -> Soaked:
    torch.manual_seed(4)
    return Soaked()


def callback(kind: Kind) -> UORACallback:
    when = {"every_n_steps": REFRESH_EVERY, "start": REFRESH_EVERY, "stop": 1.0}
    schedule = ReinitSchedule(**when, threshold=0.9, criterion="ema")  # averages that a resume must keep
    return UORACallback(
        rank=8, target_modules="all-linear", trainable_modules="auto", reinit=schedule, checkpoint=kind
    )


def fit(folder: Path, steps: int, kind: Kind, *callbacks: Callback) -> tuple[Soaked, Trainer, UORACallback]:
    """Run to the end from the newest checkpoint in ``folder`` that is whole, or from the start."""
    saves = ModelCheckpoint(
        folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=SAVE_EVERY
    )
    model, uora = made(), callback(kind)
    run = trainer(uora, saves, *callbacks, max_steps=steps, max_epochs=-1, enable_checkpointing=True)
    run.fit(model, data(64, 1), ckpt_path=newest(folder), **TENSORS_ONLY)
    return model, run, uora


def newest(folder: Path) -> Path | None:
    """A kill in the middle of a save leaves a file that cannot be read; the one before it is there still."""
    for path in sorted(folder.glob("*.ckpt"), key=step_of, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path
    return None


def step_of(path: Path) -> int:
    return int(path.stem.partition("=")[2].partition("-")[0])


def end_state(model: nn.Module, run: Trainer, uora: UORACallback) -> tuple[dict[str, Tensor], list[dict]]:
    """Everything that two runs could differ in, as tensors by name, and the record of refreshes."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, moments in run.optimizers[0].state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    state["lr"] = torch.tensor(run.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
    state["step"] = torch.tensor(run.global_step)
    refresher = uora.state_dict()["refresher"]
    state |= {f"average.{name}": value for name, value in refresher["averages"].items()}
    state["refreshed"] = torch.tensor(refresher["refreshed"])
    return state, uora.refreshes


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    fit(Path(sys.argv[1]), int(sys.argv[2]), "adapter" if sys.argv[3] == "adapter" else "full")
