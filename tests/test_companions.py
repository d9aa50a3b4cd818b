"""Callbacks and tuners that copy, save or restore the module: right, or refused with what to do."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner

from lightning_uora import ReinitSchedule, named_adapters
from tests.toys import BuiltInConfigureModel, Toy, callback, data, trainer

AVERAGING = [
    lambda: EMAWeightAveraging(decay=0.5),
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


def test_averaging_before_this_callback_is_refused():
    with pytest.raises(MisconfigurationException, match="put UORACallback before it"):
        trainer(EMAWeightAveraging(decay=0.5), callback()).fit(Toy(), data())


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
    assert model.uora_projections.record[0]["step"] == 1
