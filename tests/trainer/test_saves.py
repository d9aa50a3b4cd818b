"""Checkpoints that people write and load in ways of their own: right, or one line."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_uora import ReinitSchedule, detach_uora, load_from_checkpoint, save_adapter
from lightning_uora.storage import adapter_files
from tests.toys import TENSORS_ONLY, Toy, callback, data, equal_batches, needs_weight_averaging, trainer

EVERY_2 = ReinitSchedule(threshold=9.0, max_fraction=0.5, start=2, stop=99, every_n_steps=2)


class Seeded(Toy):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()


class Everything(Seeded):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def out(model: Toy) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(next(iter(data(8, 8)))[0])


@pytest.mark.parametrize("cls", [Seeded, Everything])
def test_a_fit_from_a_plain_checkpoint_is_refused_before_anything_changes(cls, tmp_path):
    run = trainer()
    run.fit(cls(), data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    model = cls()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(
        MisconfigurationException, match=r"of a run without UORA adapters.*load_from_checkpoint"
    ):
        trainer(callback(), max_epochs=4).fit(
            model, data(), ckpt_path=tmp_path / "plain.ckpt", **TENSORS_ONLY
        )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_plain_checkpoint_over_trained_adapters_is_said(tmp_path):
    run = trainer()
    run.fit(Seeded(), data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    model, run = Seeded(), trainer(callback())
    run.predict(
        model, data(), ckpt_path=tmp_path / "plain.ckpt", **TENSORS_ONLY
    )  # fresh ones: nothing to say
    run.fit(model, data())
    with pytest.warns(UserWarning, match="holds no UORA adapters, so the module keeps its own trained ones"):
        run.predict(model, data(), ckpt_path=tmp_path / "plain.ckpt", **TENSORS_ONLY)


class Small(Seeded):
    """Keeps what trains, as many do."""

    keeps = "trains"

    def __init__(self):
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        names = {n for n, p in self.named_parameters() if p.requires_grad}
        if self.keeps == "less":
            names = {n for n in names if "uora_b" not in n}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}


@pytest.mark.parametrize("share", ["layer", "model"])
def test_a_checkpoint_of_what_trains_rebuilds_a_and_b(tmp_path, share):
    model, run = Small(), trainer(callback(reinit=EVERY_2, share=share))
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "small.ckpt")
    want, other = out(model), Small()
    found = trainer(callback(reinit=EVERY_2, share=share)).predict(
        other, data(8, 8), ckpt_path=tmp_path / "small.ckpt", **TENSORS_ONLY
    )
    torch.testing.assert_close(torch.cat(found), want)
    torch.testing.assert_close(out(load_from_checkpoint(Small, tmp_path / "small.ckpt")), want)


def test_axes_that_cannot_be_rebuilt_are_an_error(tmp_path):
    settings = {"init": "inputs", "rank": 3}
    run = trainer(callback(**settings))
    run.fit(Small(), data())
    run.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(ValueError, match="are not those of the run"):
        trainer(callback(**settings)).predict(
            Small(), data(), ckpt_path=tmp_path / "small.ckpt", **TENSORS_ONLY
        )


def test_a_checkpoint_without_what_trained_is_not_written(tmp_path):
    model, run = Small(), trainer(callback())
    run.fit(model, data())
    model.keeps = "less"
    with pytest.raises(
        ValueError, match=r"Small leaves out 'body\.0\.uora_b', 'body\.2\.uora_b', which trained"
    ):
        run.save_checkpoint(tmp_path / "small.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_merged_stays_merged_until_the_next_fit():
    model, run = Seeded(), trainer(callback())
    run.fit(model, data())
    want = out(model)
    detach_uora(model, merge=True)
    for job in (run.predict, run.test, run.validate):
        job(model, data())
    assert set(model.state_dict()) == set(Seeded().state_dict())
    torch.testing.assert_close(out(model), want, atol=1e-5, rtol=1e-5)
    run.fit_loop.max_epochs = 4
    run.fit(model, data())
    assert any("uora" in name for name in model.state_dict())


class Fails(Seeded):
    at, where = (9, 9), "step"

    def training_step(self, batch, batch_index):
        loss = super().training_step(batch, batch_index)
        if (self.current_epoch, batch_index) == self.at and self.where == "step":
            raise RuntimeError("stop")
        return loss

    def on_after_backward(self):
        if (self.current_epoch, self.trainer.fit_loop.batch_idx) == self.at and self.where == "backward":
            raise RuntimeError("stop")

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def saves_at_errors(folder):
    return OnExceptionCheckpoint(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["step", "backward"])
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5])
def test_a_resume_from_an_error_inside_an_accumulation_window_is_the_unbroken_run(tmp_path, batch, where):
    """Windows of 3 in epochs of 6 micro-batches: the error is in any of them, forward or backward."""
    settings = {"accumulate_grad_batches": 3, "max_epochs": 2}
    whole = Fails()
    trainer(callback(), **settings).fit(whole, equal_batches(6))
    broken = Fails()
    broken.at, broken.where = (1, batch), where
    with pytest.raises(RuntimeError, match="stop"):
        trainer(callback(), saves_at_errors(tmp_path), enable_checkpointing=True, **settings).fit(
            broken, equal_batches(6)
        )
    again, path = Fails(), tmp_path / "on_exception.ckpt"
    trainer(callback(), **settings).fit(again, equal_batches(6), ckpt_path=path, **TENSORS_ONLY)
    torch.testing.assert_close(out(again), out(whole), atol=1e-6, rtol=1e-6)


@needs_weight_averaging
def test_averaging_callbacks_keep_adapter_checkpoints_small_and_resumable(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Wide(Seeded):
        def build(self):
            self.body = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 6))
            self.head = nn.Linear(6, 3)

    def run(epochs: int, model: Toy, **options) -> int:
        saves = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
        averages = EMAWeightAveraging(decay=0.5)
        uora = callback(checkpoint="adapter")
        job = trainer(uora, averages, saves, enable_checkpointing=True, max_epochs=epochs)
        job.fit(model, equal_batches(), **options)
        return (tmp_path / "last.ckpt").stat().st_size

    whole = Wide()
    run(4, whole)
    size = run(2, Wide())
    assert size < 4 * sum(p.nbytes for n, p in whole.named_parameters() if p.requires_grad) + 40_000
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state in ("state_dict", "current_model_state"):
        assert not any(key.endswith("body.0.weight") for key in held[state])
    again = Wide()
    run(4, again, ckpt_path=tmp_path / "last.ckpt", **TENSORS_ONLY)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_file_that_reads_back_otherwise_leaves_the_old_one(tmp_path, monkeypatch):
    model = Seeded()
    trainer(callback()).fit(model, data())
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = adapter_files.load_file

    def bad(path):
        tensors = real(path)
        tensors["body.0.uora_b"][0] += 1
        return tensors

    monkeypatch.setattr(adapter_files, "load_file", bad)
    with pytest.raises(OSError, match="does not read back the same"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
