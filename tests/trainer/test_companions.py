"""Callbacks and tuners that copy, save or restore the module: right, or refused with what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from lightning_uora import ReinitSchedule, attach_uora, named_adapters, param_groups
from tests.toys import BuiltInConfigureModel, Toy, callback, data, needs_weight_averaging, trainer

AVERAGING = [
    pytest.param(lambda: callbacks.EMAWeightAveraging(decay=0.5), marks=needs_weight_averaging),
    lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", AVERAGING)
def test_averaging_after_this_callback_averages_the_vectors(make):
    """The same run without averaging ends elsewhere; A and B are the same in both."""
    ends = []
    for companions in ([make()], []):
        torch.manual_seed(0)
        model = Toy()
        trainer(callback(), *companions, max_epochs=3).fit(model, data())
        ends.append(model)
    averaged, plain = ends
    for (_, one), (_, two) in zip(named_adapters(averaged), named_adapters(plain), strict=True):
        assert one.uora_b.abs().max() > 0
        assert not torch.equal(one.uora_b, two.uora_b)
    pairs = zip(averaged.uora_projections.buffers(), plain.uora_projections.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", AVERAGING)
def test_averaging_is_refused_where_it_would_be_wrong(make):
    with pytest.raises(
        MisconfigurationException, match=r"rows that a refresh replaces; use UORACallback\(reinit=None"
    ):
        trainer(callback(reinit=ReinitSchedule()), make()).fit(Toy(), data())
    with pytest.raises(MisconfigurationException, match="before it has adapters"):
        trainer(callback(), make()).fit(BuiltInConfigureModel(), data())


@pytest.mark.parametrize("make", AVERAGING)
def test_averaging_before_this_callback_is_refused(make):
    with pytest.raises(MisconfigurationException, match="put UORACallback before it"):
        trainer(make(), callback()).fit(Toy(), data())


class Tunable(Toy):
    def __init__(self, lr: float = 0.05, batch_size: int = 2):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self):
        return data(64, self.batch_size)

    def val_dataloader(self):
        return data(8, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_finders_leave_the_adapters_as_they_found_them(tmp_path, kind: str, tune: str):
    """They save, train without this callback, and restore."""
    schedule = ReinitSchedule(threshold=2.0, start=0.0, stop=1.0, every_n_steps=3)
    uora = callback(reinit=schedule, checkpoint=kind)
    model = Tunable()
    run = trainer(uora, max_epochs=1, default_root_dir=tmp_path)
    options = {"num_training": 10} if tune == "lr_find" else {"max_trials": 2}
    getattr(Tuner(run), tune)(model, **options)
    for _, module in named_adapters(model):
        assert torch.equal(module.uora_d, torch.full((4,), 0.1))
        assert not module.uora_b.any()
    assert model.uora_projections.record == []
    run = trainer(callback(reinit=schedule, checkpoint=kind), max_epochs=1)
    run.fit(model)
    assert model.body[0].uora_b.abs().max() > 0
    assert model.uora_projections.record[0]["step"] == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_callback_saves_the_best_and_the_last(tmp_path, when: str):
    """Wherever it stands in the list: its files hold the adapters as they were at that epoch."""
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last=True)
    model, uora = Toy(), callback(checkpoint="adapter")
    companions = (keep, uora) if when == "before" else (uora, keep)
    trainer(*companions, enable_checkpointing=True, max_epochs=3).fit(model, data())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    states = [torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in names]
    assert not torch.equal(states[0]["body.0.uora_b"], states[1]["body.0.uora_b"])
    assert torch.equal(states[2]["body.0.uora_b"], states[3]["body.0.uora_b"])
    assert torch.equal(states[3]["body.0.uora_b"], model.body[0].uora_b)


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
def test_a_model_summary_shows_the_adapted_model(capsys, caplog, summary):
    """Frozen and trained parameters as they are in training: 2 adapters of 4 + 6, a head of 21."""
    caplog.set_level("INFO", "lightning.pytorch")
    trainer(callback(), summary(max_depth=2)).fit(Toy(), data())
    shown = capsys.readouterr().out + caplog.text
    assert "41" in [word for word in shown.replace("│", " ").split() if word.isdigit()]
    assert "UORALinear" in shown


def test_the_learning_rate_monitor_sees_the_groups(tmp_path):
    class Groups(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(param_groups(self, 0.01, 0.5))
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
    trainer(callback(), monitor, logger=logger, log_every_n_steps=1).fit(Groups(), data())
    assert monitor.lrs["lr-AdamW/others"] != monitor.lrs["lr-AdamW/uora_vectors"]


def test_backbone_finetuning_is_refused():
    """It would train the frozen base from some epoch on."""
    with pytest.raises(MisconfigurationException, match=r"BackboneFinetuning .*trainable_modules"):
        trainer(callback(), BackboneFinetuning()).fit(Toy(), data())


def test_pruning_of_adapted_weights_is_refused():
    """With its default it prunes every weight; named modules that are not adapted are pruned."""
    for pruning in (ModelPruning("l1_unstructured"), None):
        model = Toy()
        if pruning is None:
            pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(model.body[0], "weight")])
        with pytest.raises(MisconfigurationException, match=r"ModelPruning .* adapted"):
            trainer(callback(), pruning).fit(model, data())


@pytest.mark.filterwarnings("ignore")
def test_pruning_of_other_weights_goes_on():
    model = Toy()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(model.head, "weight")], amount=0.5)
    trainer(callback(), pruning).fit(model, data())
    assert (model.head.weight == 0).sum() >= 9
    assert all(module.uora_b.abs().max() > 0 for _, module in named_adapters(model))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_reaches_the_vectors(algorithm: str):
    """At a clip of zero nothing trains."""

    class Plain(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)

    model = Plain()
    head = model.head.weight.clone()
    trainer(callback(vector_lr=1.0), gradient_clip_val=1e-12, gradient_clip_algorithm=algorithm).fit(
        model, data()
    )
    assert torch.allclose(model.head.weight, head, atol=1e-9)
    for _, module in named_adapters(model):
        assert module.uora_b.abs().max() < 1e-9
    free = Plain()
    trainer(callback(vector_lr=1.0)).fit(free, data())
    assert all(module.uora_b.abs().max() > 1e-3 for _, module in named_adapters(free))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_module_trains_the_same(when: str):
    """Compiled before the fit, and compiled after adapters were attached, on the eager backend."""
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Toy()
        if when == "after":
            attach_uora(model, callback().config)
        fitted = torch.compile(model, backend="eager") if compiled else model
        trainer(callback(reinit=ReinitSchedule(every_n_steps=3, threshold=2.0, start=2, stop=99))).fit(
            fitted, data()
        )
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    assert ends[0].keys() == ends[1].keys()
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end)
    assert all(end.abs().max() > 0 for name, end in ends[0].items() if name.endswith("uora_b"))


def test_one_averaged_rate_for_all_groups_is_said_to_slow_the_vectors():
    class Grouped(Toy):
        def configure_optimizers(self):
            return torch.optim.Adam(param_groups(self, lr=0.01, vector_lr=0.3))

    for model, rate in ((Toy(), 0.3), (Grouped(), "auto")):
        run = trainer(callback(vector_lr=rate), StochasticWeightAveraging(0.01, swa_epoch_start=1))
        with pytest.warns(UserWarning, match=r"vectors from lr=0.3 to swa_lrs=0.01; give it a list"):
            run.fit(model, data())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        averaging = StochasticWeightAveraging([0.01, 0.3], swa_epoch_start=1)
        trainer(callback(vector_lr=0.3), averaging).fit(Toy(), data())
    assert not any("swa_lrs" in str(one.message) for one in said)
