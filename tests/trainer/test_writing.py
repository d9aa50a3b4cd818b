"""Checkpoints that Lightning writes are verified before they replace what was there."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_uora import load_from_checkpoint
from tests.toys import Toy, callback, data, trainer

WRITE = TorchCheckpointIO.save_checkpoint


def spoiled(change):
    """A ``save_checkpoint`` that writes something else than it is given, as a bad disk does."""

    def save(self, checkpoint, path, storage_options=None):
        checkpoint = copy.deepcopy(checkpoint)
        change(checkpoint)
        WRITE(self, checkpoint, path, storage_options)

    return save


def change_value(part: str):
    def change(checkpoint):
        key = next(key for key in checkpoint["state_dict"] if part in key)
        value = checkpoint["state_dict"][key]
        value[(0,) * value.dim()] += 1

    return change


def change_count(checkpoint):
    checkpoint["state_dict"].popitem()


def change_manifest(checkpoint):
    checkpoint["uora"]["config"]["seed"] += 1


CHANGES = {
    "d": change_value("uora_d"),
    "b": change_value("uora_b"),
    "A": change_value("A_6"),
    "B": change_value("B_6"),
    "head": change_value("head.bias"),
    "count": change_count,
    "manifest": change_manifest,
}


@pytest.fixture(scope="module")
def fitted() -> Trainer:
    run = trainer(callback(), max_epochs=1)
    run.fit(Toy(), data())
    return run


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_reads_back_otherwise_leaves_the_old_file(
    what, weights_only, fitted, tmp_path, monkeypatch
):
    path = tmp_path / "last.ckpt"
    fitted.save_checkpoint(path, weights_only=weights_only)
    before = path.read_bytes()
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", spoiled(CHANGES[what]))
    with pytest.raises(
        OSError, match=r"what was written does not read back the same \(.*The old files are unch"
    ):
        fitted.save_checkpoint(path, weights_only=weights_only)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_cut_off_is_not_put_in_place(fitted, tmp_path, monkeypatch):
    def cut(self, checkpoint, path, storage_options=None):
        WRITE(self, checkpoint, path)
        Path(path).write_bytes(Path(path).read_bytes()[:-200])

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", cut)
    with pytest.raises(OSError, match=r"does not read back the same \(it cannot be read"):
        fitted.save_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_the_frozen_base_is_not_read_back(fitted, tmp_path, monkeypatch):
    """Its pages stay on the disk: a large base costs no time."""
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", spoiled(change_value("body.0.weight")))
    fitted.save_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_model_checkpoint_writes_during_a_fit_is_verified(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", spoiled(change_value("uora_b")))
    run = trainer(callback(checkpoint=kind), ModelCheckpoint(tmp_path), enable_checkpointing=True)
    with pytest.raises(OSError, match="does not read back the same"):
        run.fit(Toy(), data())
    assert not list(tmp_path.iterdir())


class Own(TorchCheckpointIO):
    """Writes in a way of its own."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.saved = path
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("make", [TorchCheckpointIO, Own])
def test_the_users_plugin_is_as_it_was(make, tmp_path):
    plugin = make()
    run = trainer(callback(), max_epochs=1, plugins=[plugin])
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "sub" / "last.ckpt")
    assert run.strategy.checkpoint_io is plugin
    assert "save_checkpoint" not in plugin.__dict__
    assert load_from_checkpoint(Toy, tmp_path / "sub" / "last.ckpt")


def test_plugins_that_write_otherwise_are_left_alone(tmp_path):
    class Nothing(CheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.path = path

        def load_checkpoint(self, path, map_location=None, weights_only=None):
            return {}

        def remove_checkpoint(self, path): ...

    plugin = Nothing()
    run = trainer(callback(), max_epochs=1, plugins=[plugin])
    run.fit(Toy(), data())
    run.save_checkpoint("somewhere://else")
    assert plugin.path == "somewhere://else"


def test_asynchronous_writes_are_verified_in_their_thread(tmp_path, monkeypatch):
    run = trainer(callback(), max_epochs=1, plugins=[AsyncCheckpointIO(TorchCheckpointIO())])
    run.fit(Toy(), data())
    run.strategy.checkpoint_io = plugin = AsyncCheckpointIO(TorchCheckpointIO())  # the fit has shut its own
    for number in range(3):
        run.save_checkpoint(tmp_path / f"{number}.ckpt")
    plugin.teardown()
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", spoiled(change_value("uora_b")))
    run.strategy.checkpoint_io = plugin = AsyncCheckpointIO(TorchCheckpointIO())
    run.save_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(OSError, match="does not read back the same"):
        plugin.teardown()
    load_from_checkpoint(Toy, tmp_path / "1.ckpt")


def test_a_plugin_that_waits_for_its_write_pickles_and_copies(fitted, tmp_path):
    plugin = fitted.strategy.checkpoint_io
    fitted._checkpoint_connector.dump_checkpoint()  # complete, and not written
    assert "save_checkpoint" in plugin.__dict__
    for twin in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        assert twin.save_checkpoint.__self__.plugin is twin
    plugin.save_checkpoint({"other": torch.zeros(3)}, tmp_path / "other.ckpt")
    assert "save_checkpoint" not in plugin.__dict__


class Strange:
    """Cannot be read without harm."""

    def __reduce__(self):
        return (pytest.fail, ("objects of others were made",))


def test_objects_of_others_are_written_and_not_made(fitted, tmp_path):
    fitted.lightning_module.hparams["strange"] = Strange()
    fitted.lightning_module._hparams_name = "kwargs"
    try:
        fitted.save_checkpoint(tmp_path / "last.ckpt")
    finally:
        del fitted.lightning_module.hparams["strange"]
    assert (tmp_path / "last.ckpt").is_file()
