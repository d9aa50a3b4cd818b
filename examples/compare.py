"""Train several methods from the same start on the same data; a table, a plot; common options."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

Build = Callable[[], tuple[LightningModule, list[Callback]]]


@dataclass(frozen=True)
class Result:
    """A trained module, its test score as a percentage, what it trained, and for how long."""

    module: LightningModule
    callbacks: list[Callback]
    score: float
    trained: int
    seconds: float


def positive(text: str) -> int:
    """An option's value, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def options(doc: str, epochs: int, rank: int, out: str) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=positive, default=rank)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs", out))
    return parser


def text_options(doc: str, model: str, epochs: int, out: str) -> argparse.ArgumentParser:
    """And those of the examples that can run without a hub."""
    parser = options(doc, epochs, 256, out)
    parser.add_argument("--offline", action=argparse.BooleanOptionalAction, help="bundled model and text")
    parser.add_argument("--online", dest="offline", action="store_false")
    parser.add_argument("--model", default=model, help="of the hub; online only")
    parser.add_argument("--limit", type=positive, help="use at most so many rows of each part")
    return parser


def compare(
    methods: dict[str, Build], data: LightningDataModule, epochs: int, seed: int, out: Path
) -> dict[str, Result]:
    """Fit and test every method; prints the table and draws ``results.png`` in ``out``.

    The module's ``test_step`` logs one number called ``score``, in [-1, 1].
    """
    out.mkdir(parents=True, exist_ok=True)
    results = {name: fit(build, data, epochs, seed) for name, build in methods.items()}
    table = Table("method", "score x 100", "trainable parameters", "seconds", title="held-out data")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        table.add_row(name, f"{result.score:.1f}", f"{result.trained:,}", f"{result.seconds:.0f}")
        axes.semilogx(result.trained, result.score, "o", markersize=10, label=name)
    axes.set(xlabel="trainable parameters", ylabel="score x 100, held-out data")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / "results.png", dpi=120)
    Console().print(table)
    return results


def fit(build: Build, data: LightningDataModule, epochs: int, seed: int) -> Result:
    """One method, from the seed."""
    seed_everything(seed, verbose=False)
    module, callbacks = build()
    start, trainer = time.perf_counter(), quiet_trainer(epochs, callbacks)
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    seconds = time.perf_counter() - start
    (scores,) = trainer.test(module, data.test_dataloader(), verbose=False)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Result(module, callbacks, 100 * scores["score"], trained, seconds)


def quiet_trainer(epochs: int, callbacks: list[Callback] | None = None) -> Trainer:
    """Lightning's trainer with its progress bar; the examples keep no checkpoints or logs."""
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=bool(callbacks),
        log_every_n_steps=1,
    )


def train_only_head(model: nn.Module, head: nn.Module) -> None:
    """Freeze all but ``head``: the linear probe."""
    model.requires_grad_(False)
    head.requires_grad_(True)


def quiet_transformers() -> None:
    """No tables of which weights were loaded: a new head is what is expected here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
