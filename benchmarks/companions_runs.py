"""One row of the table of companions: a real fit, broken off and resumed, with the adapters and without."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_uora import UORACallback, UORAConfig, attach_uora, named_adapters

EPOCHS, BREAK, BATCHES = 4, 2, 2
UNSAFE = {"weights_only": False} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}
"""Files of callbacks that keep more than tensors; before 2.6 Lightning had no such option."""


class Net(LightningModule):
    """A backbone of two layers and a head; the batch is always the same, so a resume may start anywhere."""

    def __init__(self, config: UORAConfig | None = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lr, self.batch_size = 0.05, 4
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)
        if config is not None:
            attach_uora(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Three scores a row."""
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, logged."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The same, as "val"."""
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The scores."""
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        """Two batches, or two for each of two ranks."""
        x = rows()
        return DataLoader(
            TensorDataset(x.repeat(BATCHES, 1), x[:, :3].argmax(1).repeat(BATCHES)),
            batch_size=self.batch_size,
        )

    val_dataloader = predict_dataloader = train_dataloader


class Sharded(Net):
    """As FSDP2's documentation has it."""

    done = False

    def configure_model(self) -> None:
        """Once."""
        if not self.done:
            self.done = True
            fully_shard(self.backbone)
            fully_shard(self)


def rows() -> Tensor:
    """The rows of every batch."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


class Dies(Callback):
    """Raises inside of an epoch, as a job that runs out of time."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Net, batch: Any, batch_idx: int) -> None:
        """At the last batch of an epoch; where gradients accumulate, some wait."""
        if trainer.global_step >= 3 and batch_idx == BATCHES - 1:
            raise RuntimeError("the job was broken off")


@dataclass(frozen=True)
class Entry:
    """One row: what stands beside ``UORACallback``, and how a run with it is made.

    Attributes:
        kind: callback, strategy, precision, logger or pair.
        name: As Lightning exports it.
        setting: What was chosen where there is a choice.
        make: From a folder to options of the Trainer; ``callbacks`` among them.
        why: Why it cannot stand alone, where it cannot ("a base class").
        hollow: A class that may be refused where it cannot run: made without its constructor.
        dies: The run that is resumed dies of an exception, and the callback itself has saved it.
        once: The run is not resumed, which another row of its sort does.
        attached: Adapters are attached before the fit, as spawned processes and shards need.
        sharded: The model is sharded in ``configure_model``.
    """

    kind: str
    name: str
    setting: str = ""
    make: Callable[[Path], dict[str, Any]] = lambda folder: {}
    why: str = ""
    hollow: type | None = None
    dies: bool = False
    once: bool = False
    attached: bool = False
    sharded: bool = False


@dataclass
class Ended:
    """What a run left."""

    faults: list[str] = field(default_factory=list)
    outputs: Tensor | None = None
    resumes: bool = False
    error: BaseException | None = None


def uora() -> UORACallback:
    """Small, and the same in every run."""
    return UORACallback(4, "all-linear", reinit=None, vector_lr=0.02)


def trainer(options: dict[str, Any], folder: Path, adapted: bool, *more: Callback) -> Trainer:
    """UORACallback first, then what is tried."""
    companions = [*options.get("callbacks", []), *more]
    bars = any(isinstance(one, ProgressBar) for one in companions)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": True,
        "enable_progress_bar": bars,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    callbacks = [*([uora()] if adapted else []), *companions]
    return Trainer(**{**settings, **options, "callbacks": callbacks})


def saves(folder: Path) -> ModelCheckpoint:
    """A file after every epoch."""
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


def made(entry: Entry, adapted: bool) -> Net:
    """A fresh model."""
    config = uora().config if adapted and (entry.attached or entry.sharded) else None
    return Sharded(config) if entry.sharded else Net(config)


def live(entry: Entry, folder: Path, adapted: bool, ended: Ended) -> None:
    """Fit, validate, predict; then the run from a checkpoint of its middle."""
    model = made(entry, adapted)
    base = {n: p.detach().clone() for n, p in Net().named_parameters() if n.startswith("backbone")}
    run = trainer(entry.make(folder / "1"), folder / "1", adapted, saves(folder / "1"))
    run.fit(model)
    if adapted:
        ended.faults += faults(model, base)
    ended.outputs = answers(model)
    if run.world_size == 1:
        run.validate(model, verbose=False)
        predicted = torch.cat(run.predict(model)).double()
        if not torch.allclose(predicted, ended.outputs.repeat(BATCHES, 1), 0.05, 0.05, equal_nan=True):
            ended.faults.append("trainer.predict answers otherwise than the model")
    if not ended.outputs.isfinite().all():
        ended.faults.append("the outputs are not finite")
    if entry.once:
        ended.resumes = True
        return
    path = broken(entry, folder, adapted) if entry.dies else folder / "1" / f"epoch={BREAK - 1}.ckpt"
    again = made(entry, adapted)
    run = trainer(entry.make(folder / "2"), folder / "2", adapted, saves(folder / "2"))
    run.fit(again, ckpt_path=path, **UNSAFE)
    ended.resumes = torch.equal(answers(again), ended.outputs)


def broken(entry: Entry, folder: Path, adapted: bool) -> Path:
    """A run that died; the file that the callback under test left."""
    options = entry.make(folder / "died")
    with contextlib.suppress(RuntimeError):
        trainer(options, folder / "died", adapted, Dies()).fit(made(entry, adapted))
    (path,) = (folder / "died" / "exception").glob("*.ckpt")
    return path


def whole(t: Tensor) -> Tensor:
    """A sharded parameter whole; a collective."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def faults(model: Net, base: dict[str, Tensor]) -> list[str]:
    """Whether every vector moved, and no bit of the base."""
    layers = [layer for _, layer in named_adapters(model)]
    moved = [
        (whole(v.detach()) != start).any()
        for one in layers
        for v, start in ((one.uora_d, 0.1), (one.uora_b, 0))
    ]
    now = {n: whole(p.detach()) for n, p in model.named_parameters() if n in base}
    stood = len(now) == len(base) and all(torch.equal(p, base[n].to(p.dtype)) for n, p in now.items())
    found = [] if len(layers) == 2 else ["the adapters are gone"]
    found += [] if all(moved) else ["the vectors did not move"]
    return found + ([] if stood else ["the base moved"])


@torch.no_grad()
def answers(model: Net) -> Tensor:
    """The scores of one batch, without a Trainer; on every rank the same."""
    model.eval()
    found = model(rows().to(model.head.weight.dtype))
    return whole(found).double()


def line_of(error: BaseException) -> str:
    """An error in a line that says nothing of this machine."""
    text = " ".join(str(error).split())
    sentence = text.partition(". ")[0].partition("; ")[0]
    return f"{type(error).__name__}: {sentence}"[:180]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, no tables, no warnings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, out = [logger.level for logger in loggers], io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def attempt(entry: Entry, folder: Path, adapted: bool) -> Ended:
    """What a run left, and what it died of if it did."""
    ended = Ended()
    with quiet():
        try:
            live(entry, folder, adapted, ended)
        except (Exception, SystemExit) as error:
            ended.error = error
    return ended


def refused(entry: Entry) -> str:
    """What ``UORACallback`` says to a class that this machine cannot run, made without its constructor."""
    own, plugin = uora(), object.__new__(entry.hollow)
    with quiet():
        run = trainer({}, Path.cwd(), False)
    connector = run._accelerator_connector
    if entry.kind == "strategy":
        connector.strategy, plugin._precision_plugin = plugin, None
    else:
        connector.strategy._precision_plugin = plugin
    try:
        own.setup(run, Net(), "fit")
    except MisconfigurationException as error:
        return f"refused: {line_of(error)}"
    except Exception:  # hollow through and through
        return ""
    return ""


def verdict(entry: Entry, folder: Path) -> str:
    """What the row says, from what was measured."""
    if entry.why:
        return f"does not apply: {entry.why}"
    ours = attempt(entry, folder / "with", True)
    if ours.resumes and not ours.faults:
        return "right"
    plain = attempt(entry, folder / "without", False)
    if plain.faults:
        return f"does not apply: without adapters too {', '.join(plain.faults)}"
    if ours.faults:
        return f"wrong: {', '.join(ours.faults)}"
    if plain.error is not None:
        said = refused(entry) if entry.hollow is not None else ""
        return said or f"does not apply: without adapters too {line_of(plain.error)}"
    if ours.error is not None:
        asked = isinstance(ours.error, MisconfigurationException) and ours.outputs is None
        return f"{'refused' if asked else 'wrong'}: {line_of(ours.error)}"
    if plain.resumes:
        return "wrong: a resume ends elsewhere than the unbroken run"
    return "right: without adapters a resume ends elsewhere too"
