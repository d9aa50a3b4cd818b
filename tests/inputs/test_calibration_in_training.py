"""The callback with ``init="inputs"``: calibrated before the first step, and otherwise the same run."""

from __future__ import annotations

import copy
import csv
import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import RichProgressBar, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.aggregation import MeanMetric

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    calibrate,
    load_from_checkpoint,
    named_adapters,
)
from lightning_uora.cli import main
from tests.inputs.test_calibration import check_axes
from tests.toys import (
    BUILT,
    TENSORS_ONLY,
    Toy,
    callback,
    data,
    equal_batches,
    needs_weight_averaging,
    on_two_ranks,
    projections_of,
    trainer,
)

KINDS = ["full", "adapter"]
RESUMING = "ignore:You're resuming from a checkpoint that ended before the epoch ended"


def inputs(**options):
    return callback(init="inputs", **options)


def made(cls=Toy):
    torch.manual_seed(4)
    return cls()


class Watching(Toy):
    """Keeps what training shows it, uses dropout, a metric and the logger, and counts in every way."""

    def __init__(self):
        super().__init__()
        self.mean, self.batches, self.modes, self.outputs = MeanMetric(), [], [], []
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch, batch_index):
        self.modes.append((self.training, torch.is_grad_enabled()))
        x = nn.functional.dropout(batch[0], 0.2, self.training) + 0.1 * torch.randn(6)
        loss = nn.functional.cross_entropy(self(x), batch[1])
        self.mean(loss.detach())
        self.steps += 1
        self.batches.append(batch[0].clone())
        self.outputs.append(loss.detach())
        self.log_dict({"loss": loss, "mean": self.mean})
        if self.logger is not None:
            self.logger.log_metrics({"seen": 1.0})
        return loss


LOADERS = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "shuffled by a generator": {"shuffle": True, "generator": 7},
}


def loader(generator: int | None = None, **options) -> DataLoader:
    if generator is not None:
        options["generator"] = torch.Generator().manual_seed(generator)
    return DataLoader(data().dataset, batch_size=4, **options)


@pytest.mark.parametrize("kind", LOADERS)
def test_training_sees_the_batches_and_random_numbers_it_would_have_seen(kind: str):
    runs = []
    for uora in (callback(), inputs(calibration_batches=3)):
        model = made(Watching)
        trainer(uora).fit(model, loader(**LOADERS[kind]))
        runs.append((model, torch.rand(3)))
    (one, state), (two, other) = runs
    assert len(one.batches) == len(two.batches) == 8
    assert all(torch.equal(a, b) for a, b in zip(one.batches, two.batches, strict=True))
    assert torch.equal(one.outputs[0], two.outputs[0])  # b = 0: the first loss knows no A
    assert not torch.equal(one.outputs[-1], two.outputs[-1])
    assert set(two.modes) == {(True, True)}
    assert torch.equal(one.steps, two.steps)
    assert one.mean.update_count == two.mean.update_count
    assert torch.equal(state, other)


def test_a_is_that_of_the_first_batches_of_the_frozen_model():
    model = made()
    plain = copy.deepcopy(model)
    trainer(inputs(calibration_batches=3)).fit(model, data())
    x = torch.cat([batch[0] for batch, _ in zip(data(), range(3), strict=False)])
    owner = projections_of(model)
    check_axes(owner.down(6, 0), x)
    check_axes(owner.down(6, 1), plain.body[1](plain.body[0](x)).detach())


@pytest.mark.parametrize("cls", BUILT)
def test_models_built_early_or_late_train(cls):
    model = cls()
    trainer(inputs()).fit(model, data())
    assert all(module.uora_b.abs().max() > 0 for _, module in named_adapters(model))
    assert not projections_of(model).uncalibrated


def test_by_hand_calibrated_adapters_are_kept():
    model = made()
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", init="inputs"))
    calibrate(model, [torch.randn(20, 6)])
    before = projections_of(model).down(6, 0).clone()
    trainer(inputs()).fit(model, data())
    assert torch.equal(projections_of(model).down(6, 0), before)


def test_a_second_fit_keeps_a():
    model, uora = made(), inputs()
    trainer(uora).fit(model, data())
    before = projections_of(model).down(6, 0).clone()
    trainer(uora).fit(model, equal_batches())
    assert torch.equal(projections_of(model).down(6, 0), before)


@pytest.mark.parametrize(
    ("options", "rows"), [({"fast_dev_run": True}, 4), ({"limit_train_batches": 2}, 8), ({}, 16)]
)
def test_where_there_are_fewer_batches_those_are_used(options, rows: int):
    model = made()
    trainer(inputs(), **options).fit(model, data())
    check_axes(projections_of(model).down(6, 0)[:2], data().dataset.tensors[0][:rows])


def test_too_few_rows_name_the_module_but_not_in_a_smoke_run():
    with pytest.raises(ValueError, match=r"'body.0' receives only 4 rows, but calibration needs 6"):
        trainer(inputs(rank=8, calibration_batches=1)).fit(made(), data())
    trainer(inputs(rank=8), fast_dev_run=True).fit(made(), data())


def test_logging_is_silent_and_loggers_come_back(tmp_path):
    logger = CSVLogger(tmp_path)
    model = made(Watching)
    trainer(inputs(), logger=logger, log_every_n_steps=1).fit(model, data())
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [len([row for row in rows if row[name]]) for name in ("seen", "loss")] == [8, 8]
    assert model.trainer.loggers == [logger]
    assert not {"log", "log_dict"} & set(model.__dict__)


def test_the_time_taken_is_said_and_a_bar_may_be_shown(capsys, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        run = trainer(inputs(), RichProgressBar(), enable_progress_bar=True)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").propagate = True
        logging.getLogger("lightning.pytorch").propagate = True
        run.fit(made(), data(), data())
    assert "set A of 2 modules from the inputs of 4 batches, in " in caplog.text


class ByHand(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class ByHandWithStep(ByHand):
    def calibration_step(self, batch, batch_index):
        self(batch[0])


def test_manual_optimisation_needs_a_calibration_step():
    with pytest.raises(
        MisconfigurationException, match="uses manual optimisation; give ByHand a method calibration_step"
    ):
        trainer(inputs()).fit(made(ByHand), data())
    model = made(ByHandWithStep)
    trainer(inputs()).fit(model, data())
    check_axes(projections_of(model).down(6, 0), data().dataset.tensors[0])


def test_manual_optimisation_with_growth_by_inputs_is_told_at_the_start_and_not_at_the_refresh():
    def calibrated(cls):
        model = made(cls)
        attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", init="inputs"))
        calibrate(model, [torch.randn(20, 6)])
        return model

    schedule = ReinitSchedule(growth="inputs", start=3, stop=5, threshold=2.0)
    model = calibrated(ByHand)
    with pytest.raises(MisconfigurationException, match="give ByHand a method calibration_step"):
        trainer(inputs(reinit=schedule)).fit(model, data())
    assert model.body[0].uora_b.abs().max() == 0
    uora = inputs(reinit=schedule)
    trainer(uora).fit(calibrated(ByHandWithStep), data())
    assert uora.refreshes


def test_a_calibration_step_is_taken_before_the_training_step():
    class Half(Toy):
        def calibration_step(self, batch):
            self(batch[0] * torch.tensor([9.0, 1, 1, 1, 1, 1]))

    model = made(Half)
    trainer(inputs()).fit(model, data())
    check_axes(
        projections_of(model).down(6, 0), data().dataset.tensors[0] * torch.tensor([9.0, 1, 1, 1, 1, 1])
    )


def test_hooks_of_the_batch_transfer_and_the_precision_are_passed():
    class Doubles(Toy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=batch[0].dtype), batch[1]]

    model = made(Doubles)
    trainer(inputs(), precision="64-true").fit(model, data())
    x = data().dataset.tensors[0] * torch.tensor([9.0, 1, 1, 1, 1, 1])
    check_axes(projections_of(model).down(6, 0).float(), x)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_trains(precision: str):
    model = made()
    trainer(inputs(), precision=precision).fit(model, data())
    A = projections_of(model).down(6, 0)
    assert torch.equal(A, A.half().to(A.dtype))
    assert all(module.uora_b.abs().max() > 0 for _, module in named_adapters(model))


class Stream(IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 16:
            self.at += 1
            yield data().dataset[self.at - 1]


def test_an_iterable_dataset_is_not_used_up_and_an_iterator_is_refused():
    model = made(Watching)
    trainer(inputs(), max_epochs=1).fit(model, DataLoader(Stream(), batch_size=4))
    assert torch.equal(torch.cat(model.batches), data().dataset.tensors[0])
    with pytest.raises(ValueError, match="would use up the training data"):
        trainer(inputs(), limit_train_batches=3).fit(made(), (batch for batch in data()))


def test_several_loaders_give_their_batches_together():
    class Both(Toy):
        def training_step(self, batch, batch_index):
            x = torch.cat([batch["one"][0], batch["two"][0]])
            return nn.functional.cross_entropy(self(x), torch.cat([batch["one"][1], batch["two"][1]]))

    x = torch.randn(16, 6)
    two = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)
    model = made(Both)
    trainer(inputs()).fit(model, {"one": data(), "two": two})
    check_axes(projections_of(model).down(6, 0), torch.cat([data().dataset.tensors[0], x]))


def test_an_error_leaves_nothing_behind():
    class Breaks(Watching):
        def training_step(self, batch, batch_index):
            super().training_step(batch, batch_index)
            raise RuntimeError("broken")

    model = made(Breaks)
    run = trainer(inputs(), logger=False)
    with pytest.raises(ValueError, match=r"batch 0 was refused by the model: RuntimeError\('broken'\)"):
        run.fit(model, data())
    assert (model.batches, model.outputs, model.mean.update_count) == ([], [], 0)
    assert model.training
    assert projections_of(model).uncalibrated
    assert not {"log", "log_dict"} & set(model.__dict__)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StochasticWeightAveraging(0.1),
        pytest.param(lambda: callbacks.WeightAveraging(), marks=needs_weight_averaging),
    ],
)
def test_averaging_is_refused_unless_a_is_there_when_it_copies_the_module(make):
    with pytest.raises(
        MisconfigurationException, match="copies the module before A is found; call attach_uora"
    ):
        trainer(inputs(), make()).fit(made(), data())


def test_growth_by_inputs_needs_a_from_inputs():
    with pytest.raises(ValueError, match="growth='inputs' needs init='inputs', got init='orthogonal'"):
        callback(reinit=ReinitSchedule(growth="inputs"))


def growing(kind: str = "full", growth: str = "inputs", **options):
    schedule = ReinitSchedule(
        growth=growth, threshold=2.0, start=0.0, stop=1.0, max_fraction=0.5, every_n_steps=2
    )
    return inputs(reinit=schedule, checkpoint=kind, **options)


@pytest.mark.parametrize("growth", ["inputs", "random"])
@pytest.mark.parametrize("share", ["layer", "model"])
def test_rows_grow_in_training_and_stay_float16_numbers(growth: str, share: str):
    model, uora = made(Watching), growing(growth=growth, share=share)
    trainer(uora, max_epochs=3).fit(model, data())
    assert len(uora.refreshes) > 3
    assert len(model.batches) == 12
    for name, A in projections_of(model).named_buffers():
        if name.startswith("A_6_") or (share == "model" and name == "A_6"):
            assert torch.equal(A, A.half().float())


@pytest.mark.filterwarnings(RESUMING)
@pytest.mark.parametrize("growth", ["inputs", "random"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batches", "accumulate"), [(3, 1), (5, 2)])
def test_a_resume_equals_the_unbroken_run(tmp_path, kind: str, growth: str, batches: int, accumulate: int):
    path = tmp_path / "middle.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.fit_loop.total_batch_idx + 1 == batches and not path.exists():
                trainer.save_checkpoint(path)

    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    model, one = made(), growing(kind, growth)
    trainer(one, Save(), **options).fit(model, equal_batches())
    resumed, two = made(), growing(kind, growth)
    trainer(two, **options).fit(resumed, equal_batches(), ckpt_path=path, **TENSORS_ONLY)
    assert two.refreshes == one.refreshes
    assert len(one.refreshes) >= 2
    state, other = model.state_dict(), resumed.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(v, other[k]) for k, v in state.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["layer", "model"])
def test_checkpoints_load_show_merge_and_export(tmp_path, capsys, kind: str, share: str):
    model = made()
    run = trainer(growing(kind, share=share))
    run.fit(model, data())
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    stored = {k.split(".")[1]: v for k, v in state.items() if k.startswith("uora_projections.A")}
    if kind == "adapter":
        assert set(stored) == ({"A_6_0", "A_6_1"} if share == "layer" else {"A_6"})
        assert {t.dtype for t in stored.values()} == {torch.float16}
    torch.manual_seed(4)
    loaded = load_from_checkpoint(Toy, path)
    x = torch.randn(5, 6)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert main(["show", str(path)]) == 0
    size = 2 * 4 * 6 * len(stored)
    assert kind == "full" or f"{size} bytes" in " ".join(capsys.readouterr().out.split())
    assert main(["export", str(path), str(tmp_path / "peft")]) == 0
    if kind == "full":
        assert main(["merge", str(path), str(tmp_path / "plain.ckpt")]) == 0
        plain = Toy.load_from_checkpoint(tmp_path / "plain.ckpt", **TENSORS_ONLY)
        torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def test_a_full_checkpoint_from_before_calibration_is_calibrated_on_resume(tmp_path):
    class Early(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    first = made()
    trainer(inputs(), Early()).fit(first, data())
    second = made()
    trainer(inputs()).fit(second, data(), ckpt_path=tmp_path / "early.ckpt", **TENSORS_ONLY)
    assert torch.equal(projections_of(first).down(6, 0), projections_of(second).down(6, 0))


def test_an_adapter_checkpoint_from_before_calibration_is_refused(tmp_path):
    class Early(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    with pytest.raises(ValueError, match="an adapter checkpoint needs A"):
        trainer(inputs(checkpoint="adapter"), Early()).fit(made(), data())


def test_a_finder_that_trains_before_calibration_says_so(tmp_path):
    from lightning.pytorch.tuner import Tuner

    class Rated(Toy):
        lr = 0.01

    run = trainer(inputs(), default_root_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"training needs A.*finders run earlier: before them, call it yourself"
    ):
        Tuner(run).lr_find(made(Rated), data(), num_training=3)


def _rank_trains(rank: int, path: str, port: int) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0", "RANK": str(rank)}
    model, uora = made(), growing()
    options = {"strategy": "ddp", "num_nodes": 2, "devices": 1, "max_epochs": 1}
    trainer(uora, **options).fit(model, DataLoader(data().dataset, batch_size=2))
    torch.save((model.state_dict(), uora.refreshes), f"{path}/{rank}.pt")


@pytest.mark.filterwarnings("ignore")
def test_two_processes_under_ddp_train_the_same_model(tmp_path):
    on_two_ranks(_rank_trains, tmp_path)
    (one, refreshes), (two, other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert len(refreshes) >= 1 and refreshes == other
    assert set(one) == set(two)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
