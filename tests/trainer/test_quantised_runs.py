"""Runs on quantised bases: small checkpoints that resume, and the Trainer's own quantisation first."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uora import UORACallback, attach_uora, load_from_checkpoint, named_adapters
from lightning_uora.cli import main
from lightning_uora.trainer import convert_first

bnb = pytest.importorskip("bitsandbytes")


class Quantised(LightningModule):
    def __init__(self, kind: str = "nf4", seed: int = 0):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.body = nn.Sequential(*[self.layer(kind) for _ in range(2)]).to("cpu")
        self.head = nn.Linear(64, 3)

    @staticmethod
    def layer(kind: str) -> nn.Module:
        plain = nn.Linear(64, 64)
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.load_state_dict(plain.state_dict())
        return layer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(32, 64, generator=g), torch.arange(32) % 3), 8)


def uora(**more) -> UORACallback:
    return UORACallback(
        rank=16,
        target_modules=["body.0", "body.1"],
        trainable_modules=["head"],
        vector_lr=0.02,
        reinit=None,
        **more,
    )


def fitted(folder, module, callback, epochs, ckpt_path=None):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_resumes_and_loads(kind, checkpoint, tmp_path):
    whole = fitted(tmp_path / "one", Quantised(kind), uora(checkpoint=checkpoint), 4)
    assert all(layer.uora_b.abs().max() > 0 for _, layer in named_adapters(whole))
    half = tmp_path / "two"
    fitted(half, Quantised(kind), uora(checkpoint=checkpoint), 2)
    resumed = fitted(half, Quantised(kind), uora(checkpoint=checkpoint), 4, half / "epoch=1.ckpt")
    x = torch.randn(5, 64)
    for (_, one), (_, other) in zip(named_adapters(whole), named_adapters(resumed), strict=True):
        torch.testing.assert_close(one.uora_b, other.uora_b)
    path = tmp_path / "one" / "epoch=3.ckpt"
    loaded = load_from_checkpoint(Quantised, path)
    torch.testing.assert_close(loaded.eval()(x), whole.eval()(x))
    saved = torch.load(path, weights_only=True)["state_dict"]
    if checkpoint == "adapter":
        assert sum(t.numel() for t in saved.values()) < 1000
        assert not any("absmax" in key or "SCB" in key for key in saved)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_another_quantised_base_is_refused(checkpoint, tmp_path):
    fitted(tmp_path, Quantised(), uora(checkpoint=checkpoint), 1)
    with pytest.raises(ValueError, match=r"another (quantised )?base"):
        load_from_checkpoint(Quantised, tmp_path / "epoch=0.ckpt", seed=1)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.head = nn.Linear(64, 3)


def test_the_trainers_own_quantisation_comes_before_the_adapters_and_leaves_the_head():
    """Lightning runs it on CUDA alone; what it does to the module can be seen anywhere."""
    module, plugin = Plain(), BitsandbytesPrecision("nf4", dtype=torch.float32)
    callback = uora()
    callback = UORACallback(rank=16, target_modules="all-linear")
    convert_first(plugin, module, callback)
    assert isinstance(module.body[0], bnb.nn.Linear4bit)
    assert type(module.head) is nn.Linear
    attach_uora(module, callback.config)
    classes = [type(m) for m in module.modules()]
    plugin.convert_module(module)  # as the strategy does later
    convert_first(plugin, module, callback)
    assert [type(m) for m in module.modules()] == classes
    assert [name for name, _ in named_adapters(module)] == ["body.0", "body.2"]


def test_a_quantised_layer_is_not_trained_as_it_is():
    module = Quantised()
    with pytest.raises(ValueError, match=r"trainable_modules: 'body.1' \(Linear4bit\) is quantised"):
        attach_uora(
            module, UORACallback(rank=4, target_modules=["body.0"], trainable_modules=["body.1"]).config
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_command_line_does_not_merge_into_quantised_numbers(kind, tmp_path, capsys):
    fitted(tmp_path, Quantised(kind), uora(), 1)
    assert main(["merge", str(tmp_path / "epoch=0.ckpt"), str(tmp_path / "out.ckpt")]) == 2
    assert "module 'body.0' is quantised" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()
