"""The callback inside Lightning: models built early or late, optimizers built early, loggers, refused
plugins.
"""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_uora import UORACallback, UORAConfig, attach_uora, named_adapters
from tests.toys import BUILT, BuiltInConfigureModel, BuiltInSetup, HeadFirst, Toy, callback, data, trainer


@pytest.mark.parametrize("cls", BUILT)
def test_training_moves_the_vectors_and_the_head_and_nothing_else(cls):
    model, uora = cls(), callback()
    before: dict[str, torch.Tensor] = {}

    class Remember(Callback):
        def on_fit_start(self, trainer, pl_module):
            before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    trainer(uora, Remember()).fit(model, data())
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    names = [name for name, _ in named_adapters(model)]
    assert len(names) == (3 if cls is HeadFirst else 2)
    assert moved == {f"{n}.uora_{v}" for n in names for v in "db"} | {"head.weight", "head.bias"}
    assert uora.summary.adapter_params == len(names) * (4 + 6)
    assert "configure_model" not in model.__dict__


@pytest.mark.parametrize("cls", BUILT)
@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_evaluation_alone_attaches_too_and_fit_afterwards_keeps_the_adapters(cls, call: str):
    model, uora = cls(), callback()
    run = trainer(uora)
    getattr(run, call)(model, data(), **({} if call == "predict" else {"verbose": False}))
    adapters = [module.uora_b for _, module in named_adapters(model)]
    assert adapters
    run.fit(model, data(), data())
    after = [module.uora_b for _, module in named_adapters(model)]
    assert all(a is b for a, b in zip(after, adapters, strict=True))
    assert all(b.abs().max() > 0 for b in adapters)


def test_one_callback_serves_two_modules_and_two_fits():
    uora = callback()
    first, second = Toy(), BuiltInConfigureModel()
    run = trainer(uora)
    run.fit(first, data())
    trained = copy.deepcopy(first.state_dict())
    run = trainer(uora)
    run.fit(second, data())
    assert len(list(named_adapters(second))) == 2
    assert all(torch.equal(v, trained[k]) for k, v in first.state_dict().items())
    trainer(uora).fit(first, data())
    assert not torch.equal(first.body[0].uora_b, trained["body.0.uora_b"])


def test_adapters_attached_by_hand_are_accepted_if_the_configuration_is_the_same():
    config = UORAConfig(rank=4, target_modules="all-linear")

    class ByHand(BuiltInConfigureModel):
        def configure_model(self):
            super().configure_model()
            attach_uora(self, config)

    model = ByHand()
    trainer(callback()).fit(model, data())
    assert model.body[0].uora_b.abs().max() > 0
    with pytest.raises(
        ValueError, match=r"another configuration: rank \(4 in the module, 8 in the callback\)"
    ):
        trainer(callback(rank=8)).fit(model, data())


class BuiltEarly(Toy):
    """What ``LightningCLI --optimizer AdamW`` does: the optimizer knows the parameters of ``__init__``
    only.
    """

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=20)

    def configure_optimizers(self):
        return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step"}]


def test_vectors_missing_from_an_early_optimizer_get_a_group():
    model = BuiltEarly()
    trainer(callback()).fit(model, data())
    assert [group.get("name") for group in model.optimizer.param_groups] == [None, "uora_vectors"]
    assert all(m.uora_b.abs().max() > 0 for _, m in named_adapters(model))
    assert all((m.uora_d != 0.1).any() for _, m in named_adapters(model))


def test_an_optimizer_that_holds_the_vectors_is_left_alone(recwarn):
    trainer(callback()).fit(Toy(), data())
    assert not any("optimizer" in str(w.message) for w in recwarn)


def test_parameters_without_gradient_are_reported_by_name():
    class Unused(Toy):
        def build(self):
            super().build()
            self.spare = nn.Linear(6, 6)

    with pytest.warns(
        UserWarning, match="first optimizer step for spare.uora_d, spare.uora_b: the loss does not reach"
    ):
        trainer(callback()).fit(Unused(), data())


def test_hyperparameters_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    uora = callback()
    trainer(uora, logger=loggers).fit(Toy(), data())
    expected = {
        "uora/adapter_params": 20,
        "uora/trainable_params": 41,
        "uora/total_params": 125,
        "uora/trainable_fraction": 41 / 125,
    }
    assert expected.items() <= loggers[0].experiment.hparams.items()
    assert expected.items() <= loggers[1].hparams.items()
    text = (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text()
    assert "uora/adapter_params: 20" in text


def test_table_is_printed_at_fit_start_unless_summaries_are_off(capsys):
    trainer(callback(), enable_model_summary=True).fit(Toy(), data())
    assert "UORA adapters" in capsys.readouterr().out
    trainer(callback()).fit(Toy(), data())
    assert "UORA adapters" not in capsys.readouterr().out


def test_a_precision_that_replaces_linear_layers_by_others_is_refused():
    """The library is not installed here, so the plugin is made without its own constructor."""
    plugin = "TransformerEnginePrecision"
    from lightning.pytorch import plugins

    uora, model, run = callback(), Toy(), trainer()
    fake = object.__new__(getattr(plugins, plugin))
    run.strategy._precision_plugin = fake
    with pytest.raises(MisconfigurationException, match=f"{plugin} replaces every Linear"):
        uora.setup(run, model, "fit")
    assert not list(named_adapters(model))


def test_a_model_without_targets_is_refused_and_left_alone():
    model = Toy()
    with pytest.raises(ValueError, match="matches no module"):
        trainer(callback(target_modules="qkv")).fit(model, data())
    assert not list(named_adapters(model))
    late = BuiltInConfigureModel()
    with pytest.raises(ValueError, match="matches no module"):
        trainer(callback(target_modules="qkv")).fit(late, data())
    assert "configure_model" not in late.__dict__


def test_fit_without_adapters_raises():
    class Replaces(BuiltInSetup):
        def setup(self, stage):
            super().setup(stage)
            self.configure_model = lambda: None

    with pytest.raises(MisconfigurationException, match="attached no adapter"):
        trainer(callback()).fit(Replaces(), data())


def test_wrong_arguments_are_refused_when_the_callback_is_made():
    with pytest.raises(ValueError, match=r"^rank=0 is not allowed"):
        UORACallback(rank=0)


def test_buffers_of_the_owner_are_kept_from_travelling_with_ddp():
    model = Toy()
    trainer(callback(share="model")).fit(model, data())
    assert model._ddp_params_and_buffers_to_ignore == ["uora_projections.A_6", "uora_projections.B_6"]


def test_the_global_random_state_is_not_touched_by_setup():
    model, uora, run = Toy(), callback(), trainer()
    state = torch.get_rng_state()
    uora.setup(run, model, "fit")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_vectors_stay_float32_and_move_in_every_precision(precision: str):
    model = Toy()
    trainer(callback(), precision=precision).fit(model, data())
    for _, module in named_adapters(model):
        assert module.uora_d.dtype == module.uora_b.dtype == torch.float32
        assert module.uora_b.abs().max() > 0


@pytest.mark.parametrize("reinit", [{"threshold": 0.5}, True])
def test_a_schedule_of_another_type_is_refused(reinit):
    with pytest.raises(ValueError, match="reinit must be a ReinitSchedule or None"):
        UORACallback(reinit=reinit)
