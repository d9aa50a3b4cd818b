"""Every way in which Lightning's loops run: adapters train, schedules count, nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from lightning_uora import ReinitSchedule, named_adapters
from tests.toys import Toy, callback, data, trainer

EVERY_2 = ReinitSchedule(every_n_steps=2, threshold=2.0, start=2, stop=1_000)


def steps(uora) -> list[int]:
    return [entry["step"] for entry in uora.refreshes]


def trained(model: nn.Module) -> bool:
    """Every adapter moved."""
    return all(module.uora_b.abs().max() > 0 for _, module in named_adapters(model))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # Lightning, of barebones
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, [2, 4]),
        ({"max_epochs": -1, "max_steps": 5}, [2, 4]),
        ({"max_epochs": 2, "limit_train_batches": 3}, [2, 4, 6]),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, [2]),
        ({"max_epochs": 2, "val_check_interval": 2}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "overfit_batches": 1}, [2]),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 2}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "gradient_clip_val": 0.1}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "detect_anomaly": True}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "deterministic": True}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "barebones": True}, [2, 4, 6, 8]),
        ({"fast_dev_run": 3}, [2]),
        ({"min_epochs": 1, "max_time": "00:00:10:00", "max_epochs": 1}, [2, 4]),
    ],
    ids=str,
)
def test_option_of_the_trainer(options, expected):
    """Adapters train, and refreshes come after the optimizer steps that the schedule names."""
    model, uora = Toy(), callback(reinit=EVERY_2)
    if options.get("barebones"):  # Lightning refuses these even at False
        bare = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        )
        options = {**options, **bare}
    run = trainer(uora, **options)
    run.fit(model, data(), None if options.get("barebones") else data())
    assert steps(uora) == expected
    assert trained(model)


def test_an_accumulation_schedule_counts_optimizer_steps():
    """4 batches an epoch: 4 steps, then 2, then 1."""
    model, uora = Toy(), callback(reinit=EVERY_2)
    run = trainer(uora, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), max_epochs=3)
    run.fit(model, data())
    assert run.global_step == 7
    assert steps(uora) == [2, 4, 6]


class TwoOptimizers(Toy):
    """Manual optimisation with one optimizer for the vectors and one for the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        vectors, others = ([p for n, p in named if ("uora_" in n) is which] for which in (True, False))
        return torch.optim.SGD(vectors, lr=0.5), torch.optim.SGD(others, lr=0.1)

    def training_step(self, batch, batch_index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def test_two_optimizers_of_manual_optimisation_count_batches():
    model, uora = TwoOptimizers(), callback(reinit=EVERY_2)
    trainer(uora, max_epochs=1).fit(model, data())
    assert steps(uora) == [2, 4]
    assert trained(model)


class Skips(Toy):
    """Every other batch has nothing to learn from."""

    def training_step(self, batch, batch_index):
        return super().training_step(batch, batch_index) if batch_index % 2 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_none_is_no_failure():
    model, uora = Skips(), callback(reinit=EVERY_2)
    trainer(uora, max_epochs=4).fit(model, data())
    assert trained(model)
    assert steps(uora)
    assert steps(uora) == sorted(set(steps(uora)))


def test_early_stopping_ends_a_run_and_its_refreshes():
    class Worse(Toy):
        def validation_step(self, batch, batch_index):
            self.log("val", float(self.current_epoch))

    model, uora = Worse(), callback(reinit=EVERY_2)
    run = trainer(uora, EarlyStopping("val", patience=1), max_epochs=50)
    run.fit(model, data(), data())
    assert run.current_epoch < 4
    assert steps(uora) == list(range(2, run.global_step + 1, 2))


def test_several_dataloaders_at_once_and_in_a_row():
    class Combined(Toy):
        def training_step(self, batch, batch_index):
            return sum(super(Combined, self).training_step(part, batch_index) for part in batch.values())

        def validation_step(self, batch, batch_index, dataloader_idx=0):
            super().validation_step(batch, batch_index)

        def predict_step(self, batch, batch_index, dataloader_idx=0):
            return self(batch[0])

    model, uora = Combined(), callback(reinit=EVERY_2)
    loaders = CombinedLoader({"a": data(16), "b": data(8)}, "max_size_cycle")
    run = trainer(uora, max_epochs=1)
    run.fit(model, loaders, [data(8), data(8)])
    assert steps(uora) == [2, 4]
    assert trained(model)
    assert len(run.predict(model, [data(8), data(8)])) == 2


class Fails(Toy):
    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_index):
        if self.error is not None and self.global_step == 3:
            raise self.error
        return super().training_step(batch, batch_index)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_after_a_failure_in_the_middle_the_same_objects_train_on(error):
    """The adapters stay as trained, hooks are gone, a second fit with the same callback goes on."""
    model, uora = Fails(error), callback(reinit=EVERY_2)
    with pytest.raises((RuntimeError, SystemExit)):  # Lightning ends an interrupted run by exiting
        trainer(uora, max_epochs=2).fit(model, data())
    kept = {name: module.uora_b.detach().clone() for name, module in named_adapters(model)}
    assert any(b.any() for b in kept.values())
    assert steps(uora) == [2]
    model.error = None
    trainer(uora, max_epochs=2).fit(model, data())
    assert all(not torch.equal(module.uora_b, kept[name]) for name, module in named_adapters(model))
    assert steps(uora) == [2, 2, 4, 6, 8]


def test_fit_twice_with_one_trainer_goes_on_counting():
    """As Lightning does: the second fit of the same trainer starts where the first ended."""
    model, uora = Toy(), callback(reinit=EVERY_2)
    run = trainer(uora, max_epochs=1)
    run.fit(model, data())
    assert steps(uora) == [2, 4]
    run.fit_loop.max_epochs = 2
    run.fit(model, data())
    assert steps(uora) == [2, 4, 6, 8]
    assert trained(model)
