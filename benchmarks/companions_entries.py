"""What may stand beside ``UORACallback``: every callback, strategy, precision and logger of Lightning."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import lightning.pytorch.plugins.precision
import lightning.pytorch.strategies
import torch
from companions_runs import Entry, Net
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as all_callbacks
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import precision as precisions
from lightning.pytorch.strategies import StrategyRegistry

RANKS = {"devices": 2, "accelerator": "cpu"}
SPAWNED = ("spawn", "fork", "notebook")


class Unfreezes(all_callbacks.BaseFinetuning):
    """Gradual unfreezing as its documentation has it."""

    def freeze_before_training(self, pl_module: Net) -> None:
        """The backbone."""
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Net, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """The backbone again, after the first epoch."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Writes(all_callbacks.BasePredictionWriter):
    """Predictions into a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(self, trainer: Trainer, pl_module: Net, predictions: Any, indices: Any) -> None:
        """Once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(predictions, self.folder / "predictions.pt")


class Saves(all_callbacks.Checkpoint):
    """A user's own way to save: weights at the end of a fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Net) -> None:
        """Once."""
        trainer.save_checkpoint(self.folder / "own" / "end.ckpt", weights_only=True)


class Bar(all_callbacks.ProgressBar):
    """A user's own bar, which shows nothing."""

    def enable(self) -> None:
        """Finders put it back on."""

    def disable(self) -> None:
        """Finders put it off."""

    def on_train_batch_end(self, *args: Any) -> None:
        """Asks for what a bar shows."""
        super().on_train_batch_end(*args)
        self.get_metrics(self.trainer, args[1])


class Keeps(Logger):
    """A user's own logger."""

    name, version = "keeps", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nowhere."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nowhere."""


def logged(callback: Callable[[], Callback]) -> Callable[[Path], dict[str, Any]]:
    """For callbacks that want a logger."""
    return lambda folder: {"callbacks": [callback()], "logger": CSVLogger(folder)}


def alone(callback: Callable[[], Callback]) -> Callable[[Path], dict[str, Any]]:
    """For callbacks that want nothing."""
    return lambda folder: {"callbacks": [callback()]}


def pruned(folder: Path) -> dict[str, Any]:
    """Pruning of the head alone, which is known when the model is."""

    class OfTheHead(all_callbacks.ModelPruning):
        def setup(self, trainer: Trainer, pl_module: Net, stage: str) -> None:
            self._parameters_to_prune = [(pl_module.head, "weight")]
            super().setup(trainer, pl_module, stage)

    return {"callbacks": [OfTheHead("l1_unstructured", amount=0.3)]}


def spikes(folder: Path) -> dict[str, Any]:
    """The file of bad batches goes into the folder."""
    return {"callbacks": [all_callbacks.SpikeDetection(exclude_batches_path=folder / "skip.json")]}


C = all_callbacks
CALLBACKS: dict[str, list[Entry]] = {
    "BackboneFinetuning": [
        Entry("callback", "BackboneFinetuning", "", alone(lambda: C.BackboneFinetuning(1, verbose=False)))
    ],
    "BaseFinetuning": [Entry("callback", "BaseFinetuning", "unfreezes the backbone", alone(Unfreezes))],
    "BasePredictionWriter": [
        Entry("callback", "BasePredictionWriter", "epoch", lambda folder: {"callbacks": [Writes(folder)]})
    ],
    "BatchSizeFinder": [
        Entry("callback", "BatchSizeFinder", "", alone(lambda: C.BatchSizeFinder(max_trials=1)))
    ],
    "Callback": [Entry("callback", "Callback", "", alone(Callback))],
    "Checkpoint": [
        Entry("callback", "Checkpoint", "saves weights", lambda folder: {"callbacks": [Saves(folder)]})
    ],
    "DeviceStatsMonitor": [Entry("callback", "DeviceStatsMonitor", "", logged(C.DeviceStatsMonitor))],
    "EarlyStopping": [
        Entry("callback", "EarlyStopping", "", alone(lambda: C.EarlyStopping("val", patience=9)))
    ],
    "GradientAccumulationScheduler": [
        Entry(
            "callback",
            "GradientAccumulationScheduler",
            "2 from epoch 1",
            alone(lambda: C.GradientAccumulationScheduler({1: 2})),
        )
    ],
    "LambdaCallback": [
        Entry(
            "callback",
            "LambdaCallback",
            "",
            alone(lambda: C.LambdaCallback(on_train_batch_end=lambda *args: None)),
        )
    ],
    "LearningRateFinder": [
        Entry("callback", "LearningRateFinder", "", alone(lambda: C.LearningRateFinder(num_training_steps=6)))
    ],
    "LearningRateMonitor": [
        Entry("callback", "LearningRateMonitor", "step", logged(lambda: C.LearningRateMonitor("step")))
    ],
    "ModelCheckpoint": [
        Entry(
            "callback",
            "ModelCheckpoint",
            "best and last",
            lambda folder: {"callbacks": [C.ModelCheckpoint(folder / "best", monitor="val", save_last=True)]},
        )
    ],
    "ModelPruning": [
        Entry(
            "callback", "ModelPruning", "all", alone(lambda: C.ModelPruning("l1_unstructured", amount=0.3))
        ),
        Entry("callback", "ModelPruning", "the head", pruned),
    ],
    "ModelSummary": [Entry("callback", "ModelSummary", "", alone(C.ModelSummary))],
    "OnExceptionCheckpoint": [
        Entry(
            "callback",
            "OnExceptionCheckpoint",
            "",
            lambda folder: {"callbacks": [C.OnExceptionCheckpoint(folder / "exception")]},
            dies=True,
        )
    ],
    "ProgressBar": [Entry("callback", "ProgressBar", "a user's own", alone(Bar))],
    "RichModelSummary": [Entry("callback", "RichModelSummary", "", alone(C.RichModelSummary))],
    "RichProgressBar": [Entry("callback", "RichProgressBar", "", alone(C.RichProgressBar))],
    "StochasticWeightAveraging": [
        Entry(
            "callback",
            "StochasticWeightAveraging",
            "from epoch 1",
            alone(lambda: C.StochasticWeightAveraging(0.01, swa_epoch_start=1)),
        )
    ],
    "SpikeDetection": [Entry("callback", "SpikeDetection", "", spikes)],
    "ThroughputMonitor": [
        Entry(
            "callback",
            "ThroughputMonitor",
            "",
            logged(lambda: C.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2)),
        )
    ],
    "Timer": [Entry("callback", "Timer", "", alone(lambda: C.Timer(datetime.timedelta(days=1))))],
    "TQDMProgressBar": [Entry("callback", "TQDMProgressBar", "", alone(C.TQDMProgressBar))],
    "WeightAveraging": [Entry("callback", "WeightAveraging", "", alone(lambda: C.WeightAveraging()))],
    "EMAWeightAveraging": [
        Entry("callback", "EMAWeightAveraging", "decay 0.5", alone(lambda: C.EMAWeightAveraging(decay=0.5)))
    ],
}
"""By exported name."""


def callbacks() -> Iterator[Entry]:
    """Those that this version of Lightning has."""
    for name in C.__all__:
        yield from CALLBACKS[name]


def pairs(right: list[Entry]) -> Iterator[Entry]:
    """Two callbacks that are right alone, in the order of Lightning's list."""
    for one, two in combinations(right, 2):
        yield Entry("pair", f"{one.name}, {two.name}", "", _both(one, two), dies=one.dies or two.dies)


def _both(one: Entry, two: Entry) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        first, second = one.make(folder), two.make(folder)
        return {**first, **second, "callbacks": first["callbacks"] + second["callbacks"]}

    return make


def strategies() -> Iterator[Entry]:
    """All that can be named by a string, then the classes that cannot."""
    S = lightning.pytorch.strategies
    for name in StrategyRegistry.available_strategies():
        options = {"strategy": name}
        if name.startswith("ddp"):
            options |= RANKS
        hollow = {"deepspeed": S.DeepSpeedStrategy, "fsdp": S.FSDPStrategy}.get(name.partition("_")[0])
        attached = any(how in name for how in SPAWNED)
        once = name.startswith("ddp_spawn_")  # new processes take most of a minute
        setting = "attached before the fit" + (", not resumed" if once else "")
        yield Entry(
            "strategy",
            name,
            setting if attached else "",
            lambda folder, options=options: dict(options),
            hollow=hollow,
            once=once,
            attached=attached,
        )
    base = "a base class"
    yield Entry("strategy", "Strategy", why=base)
    yield Entry("strategy", "ParallelStrategy", why=base)
    yield Entry("strategy", "SingleDeviceStrategy", "", lambda f: {"strategy": S.SingleDeviceStrategy("cpu")})
    yield Entry("strategy", "DDPStrategy", "gloo", lambda f: {"strategy": S.DDPStrategy(), **RANKS})
    yield Entry(
        "strategy",
        "ModelParallelStrategy",
        "2 shards",
        lambda f: {
            "strategy": S.ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
            **RANKS,
        },
        sharded=True,
    )
    for cls in (S.DeepSpeedStrategy, S.FSDPStrategy):
        yield Entry("strategy", cls.__name__, "", lambda f, cls=cls: {"strategy": cls()}, hollow=cls)


PRECISIONS = {
    "Precision": ["32-true"],
    "DoublePrecision": ["64-true"],
    "HalfPrecision": ["bf16-true", "16-true"],
    "MixedPrecision": ["bf16-mixed", "16-mixed"],
    "TransformerEnginePrecision": ["transformer-engine", "transformer-engine-float16"],
    "BitsandbytesPrecision": ["nf4", "int8"],
    "DeepSpeedPrecision": [""],
    "FSDPPrecision": [""],
    "XLAPrecision": [""],
}
"""Plugins, and the strings (of bitsandbytes the modes) that name them."""


def all_precisions() -> Iterator[Entry]:
    """Every plugin by every string."""
    for name, settings in PRECISIONS.items():
        for setting in settings:
            cls = getattr(precisions, name)
            if name == "BitsandbytesPrecision":
                make = _plugin(cls, setting)
            elif setting:
                make = _precision(setting)
            else:
                make = _plugin(cls, "32-true")
            yield Entry("precision", name, setting, make, hollow=None if setting in ("32-true",) else cls)


def _precision(setting: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"precision": setting}


def _plugin(cls: type, *arguments: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"plugins": [cls(*arguments)]}


def loggers() -> Iterator[Entry]:
    """Every logger; those that write to a service are off line."""
    L = lightning.pytorch.loggers
    makers: dict[str, Callable[[Path], Any]] = {
        "CSVLogger": CSVLogger,
        "Logger": lambda folder: Keeps(),
        "TensorBoardLogger": TensorBoardLogger,
        "MLFlowLogger": lambda folder: L.MLFlowLogger(tracking_uri=f"file:{folder}"),
        "WandbLogger": lambda folder: L.WandbLogger(save_dir=folder, offline=True),
        "CometLogger": lambda folder: L.CometLogger(online=False),
        "LitLogger": lambda folder: L.LitLogger(),
    }
    for name in L.__all__:
        setting = "a user's own" if name == "Logger" else ""
        yield Entry("logger", name, setting, lambda f, make=makers[name]: {"logger": make(f)})


def exported() -> dict[str, set[str]]:
    """Every public name that the table must have a row for, by kind."""
    names = {
        kind: set(importlib.import_module(f"lightning.pytorch.{place}").__all__)
        for kind, place in (
            ("callback", "callbacks"),
            ("strategy", "strategies"),
            ("precision", "plugins.precision"),
            ("logger", "loggers"),
        )
    }
    names["strategy"] |= set(StrategyRegistry.available_strategies())
    return names


def entries(kind: str) -> list[Entry]:
    """All of a kind; pairs are made from rows that are there."""
    return list(
        {"callback": callbacks, "strategy": strategies, "precision": all_precisions, "logger": loggers}[
            kind
        ]()
    )
