"""What trains is settled at the start of a fit: nothing of the base joins, and false alarms are not given."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import nn

from lightning_uora import load_adapter, save_adapter
from tests.toys import TENSORS_ONLY, Toy, callback, data, trainer


def base(model: Toy) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.body.named_parameters() if "uora" not in n}


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=1e-3)


class ByHand(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.body.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [pl_module.body[0].bias], "lr": 0.1})


class InTheStep(Toy):
    def training_step(self, batch, batch_index):
        self.body.requires_grad_(True)
        return super().training_step(batch, batch_index)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@pytest.mark.parametrize(("cls", "other"), [(Toy, Unfreezes), (Toy, ByHand), (InTheStep, Callback)])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_unfrozen_during_the_run_stays_frozen_and_is_named(cls, other, first):
    torch.manual_seed(0)
    model, uora = cls(), callback()
    before = base(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(*([uora, other()] if first else [other(), uora]), max_epochs=3).fit(model, data())
    for name, value in base(model).items():
        assert torch.equal(value, before[name]), name
    lines = [str(one.message) for one in said if "began to require gradients" in str(one.message)]
    assert len(lines) == 1
    assert "body.0.weight" in lines[0]
    assert ("(by Unfreezes?)" in lines[0]) == (other is Unfreezes)
    assert not any(p.requires_grad for n, p in model.body.named_parameters() if "uora" not in n)
    assert model.body[0].uora_b.abs().sum() > 0


def test_a_run_with_a_finetuning_callback_resumes(tmp_path):
    """That callback makes an optimizer group during the run, and makes it again when it resumes."""
    run = trainer(callback(), Unfreezes(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "two.ckpt")
    model = Toy()
    path = {"ckpt_path": tmp_path / "two.ckpt", **TENSORS_ONLY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback(), Unfreezes(), max_epochs=3).fit(model, data(), **path)
    assert model.body[0].uora_b.abs().sum() > 0


class FrozenLater(Toy):
    where = "configure_optimizers"

    def configure_optimizers(self):
        if self.where == "configure_optimizers":
            self.body.requires_grad_(False)
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def on_fit_start(self):
        if self.where == "on_fit_start":
            self.body.requires_grad_(False)


@pytest.mark.parametrize("where", ["configure_optimizers", "on_fit_start"])
def test_vectors_that_were_frozen_before_the_first_step_are_named(where):
    model = FrozenLater()
    model.where = where
    with pytest.warns(UserWarning, match="body.0.uora_d, body.0.uora_b.* should train, but something froze"):
        trainer(callback(), max_epochs=1).fit(model, data())


OTHERS = ".*(num_workers|log_every_n_steps|hardly moved|LeafSpec|validation_step)"


class GAN(Toy):
    """Two optimizers by hand, the discriminator first; or each in its own batch."""

    alternates = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))

    def training_step(self, batch, batch_index):
        generator, critic = self.optimizers()
        if not self.alternates or batch_index % 3 < 2:
            critic.zero_grad()
            self.manual_backward(self.critic(self.body(batch[0]).detach()).mean())
            critic.step()
        if not self.alternates or batch_index % 3 == 2:
            generator.zero_grad()
            self.manual_backward(-self.critic(self.body(batch[0])).mean() + self(batch[0]).square().mean())
            generator.step()

    def configure_optimizers(self):
        parts = [*self.body.parameters(), *self.head.parameters()], self.critic.parameters()
        return [torch.optim.Adam([p for p in part if p.requires_grad], 0.05) for part in parts]


@pytest.mark.parametrize("alternates", [False, True])
def test_a_gan_gets_no_false_alarm_and_a_true_one(alternates):
    model = GAN()
    model.alternates = alternates
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message=".*(num_workers|log_every_n_steps|hardly moved|LeafSpec|validation_step)"
        )
        trainer(callback(trainable_modules=["head"]), logger=False).fit(model, data())
    assert model.body[0].uora_b.abs().sum() > 0
    model = GAN()
    model.spare = nn.Linear(6, 6)
    with pytest.warns(UserWarning, match="first optimizer step for spare.uora_d, spare.uora_b: the loss"):
        trainer(callback(trainable_modules=["head"])).fit(model, data())


def test_what_trained_by_hand_is_in_the_file_after_freeze(tmp_path):
    class Bare(Toy):
        def build(self):
            super().build()
            self.shift = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return super().forward(x + self.shift)

        def configure_optimizers(self):
            self.shift.requires_grad_(True)
            return super().configure_optimizers()

    torch.manual_seed(0)
    model = Bare()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trainer(callback(trainable_modules=["head"])).fit(model, data())
    assert model.shift.abs().sum() > 0
    model.freeze()
    save_adapter(model, tmp_path)
    other = Bare()
    other.load_state_dict(start)
    load_adapter(other, tmp_path)
    assert torch.equal(other.shift, model.shift)
