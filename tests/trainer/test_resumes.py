"""What a resumed run takes from its checkpoint, and what it says of settings that it does not take."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_uora import UORAConfig, attach_uora, load_from_checkpoint, summarize
from tests.toys import TENSORS_ONLY, Toy, callback, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Resumable(DataLoader):
    """Tells where it is, as Lightning's warning about resumes inside an epoch advises."""

    def __init__(self) -> None:
        super().__init__(data().dataset, batch_size=4)
        self.begun, self.loaded = 0, None

    def __iter__(self):
        first, self.loaded = self.loaded or 0, None
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.begun = number + 1
                yield batch

    def state_dict(self):
        return {"begun": self.begun}

    def load_state_dict(self, state):
        self.loaded = state["begun"]


def test_a_loader_that_tells_its_place_goes_on_there_under_the_automatic_rate(tmp_path):
    torch.manual_seed(0)
    start = Toy().state_dict()

    def run(module: Toy, path=None):
        module.load_state_dict(start)
        each = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        adapters = callback(trainable_modules="head")
        own = trainer(adapters, each, enable_checkpointing=True)
        loader = Resumable()
        own.fit(module, loader, ckpt_path=path, **(TENSORS_ONLY if path else {}))
        return module, loader

    whole, _ = run(Toy())
    resumed, loader = run(Toy(), tmp_path / "step=6.ckpt")
    assert loader.begun == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Goes:
    """No ``DataLoader``: goes on where it is at every ``iter``."""

    def __init__(self) -> None:
        self.batches, self.place = list(data()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_a_calibration_leaves_such_a_loader_where_it_is():
    seen = []

    class Counts(Toy):
        def on_train_batch_start(self, batch, batch_index):
            seen.append(batch[0])

    loader = Goes()
    trainer(callback(init="inputs", calibration_batches=3), max_epochs=1).fit(Counts(), loader)
    assert len(seen) == 4
    assert all(torch.equal(x, batch[0]) for x, batch in zip(seen, loader.batches, strict=True))


def test_another_vector_lr_on_a_resume_is_said_to_be_unused(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="it")
    trainer(callback(vector_lr=0.1), save, max_epochs=1, enable_checkpointing=True).fit(Toy(), data())
    with pytest.warns(UserWarning, match=r"vector_lr=0.5 is not used.*vector_lr=0.1"):
        trainer(callback(vector_lr=0.5)).fit(Toy(), data(), ckpt_path=tmp_path / "it.ckpt", **TENSORS_ONLY)


def test_a_second_resume_still_knows_the_rate_of_the_first_run(tmp_path):
    def run(rate, epochs, path=None, name="it"):
        save = ModelCheckpoint(tmp_path, filename=name)
        own = trainer(callback(vector_lr=rate), save, max_epochs=epochs, enable_checkpointing=True)
        own.fit(Toy(), data(), ckpt_path=path, **(TENSORS_ONLY if path else {}))

    run(0.1, 1)
    run(0.5, 2, tmp_path / "it.ckpt", "second")
    with pytest.warns(UserWarning, match=r"vector_lr=0.5 is not used.*vector_lr=0.1"):
        run(0.5, 3, tmp_path / "second.ckpt", "third")


def test_the_logged_rate_is_the_one_that_the_step_was_made_with(tmp_path):
    class Scheduled(Toy):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            halved = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halved, "interval": "step"}}

    logger = CSVLogger(tmp_path)
    trainer(callback(vector_lr=0.4), logger=logger, log_every_n_steps=1, max_steps=3).fit(Scheduled(), data())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rates = [float(row["uora/vector_lr"]) for row in csv.DictReader(file) if row.get("uora/vector_lr")]
    assert all(math.isclose(a, b) for a, b in zip(rates, (0.4, 0.2, 0.1), strict=True))


def test_a_checkpoint_of_an_adapter_with_another_name_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="it")
    trainer(callback(), save, max_epochs=1, enable_checkpointing=True).fit(Toy(), data())
    with pytest.raises(ValueError, match=r"'default' is active in the checkpoint.*'german'"):
        trainer(callback(adapter_name="german")).test(
            Toy(), data(), ckpt_path=tmp_path / "it.ckpt", verbose=False, **TENSORS_ONLY
        )


@pytest.mark.parametrize("share", [0.3, 0.98])
def test_a_checkpoint_that_ends_too_early_is_called_damaged(tmp_path, share):
    save = ModelCheckpoint(tmp_path, filename="it")
    trainer(callback(), save, max_epochs=1, enable_checkpointing=True).fit(Toy(), data())
    whole = (tmp_path / "it.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut.ckpt is damaged or not a checkpoint"):
        load_from_checkpoint(Toy, tmp_path / "cut.ckpt")


def test_gradient_checkpointing_of_a_model_in_evaluation_mode_is_said_to_do_nothing():
    class Inner(nn.Linear):
        gradient_checkpointing = True

    class Asked(Toy):
        def build(self):
            self.body, self.head = nn.Sequential(Inner(6, 6)).eval(), nn.Linear(6, 3)

    with pytest.warns(UserWarning, match="Gradient checkpointing does nothing"):
        trainer(callback(target_modules="body.0", trainable_modules="head")).fit(Asked(), data())


def test_a_known_head_that_the_patterns_leave_out_is_said_to_be_frozen():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    attach_uora(model, UORAConfig(4, "attn.qkv", trainable_modules="norm"))
    assert summarize(model).left == ("head",)
    with pytest.warns(UserWarning, match="Frozen at their start: head"):
        trainer(callback(target_modules="body.0", trainable_modules="body.2")).fit(Toy(), data())


def test_vectors_alone_at_a_rate_for_heads_are_warned_about():
    class Alone(Toy):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    with pytest.warns(UserWarning, match="which hardly moves them"):
        trainer(callback(trainable_modules=(), vector_lr="auto")).fit(Alone(), data())
