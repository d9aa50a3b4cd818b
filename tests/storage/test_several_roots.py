"""Several adapted models in one module: each is saved, loaded, merged and exported, or none."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORACallback,
    UORAConfig,
    add_adapter,
    attach_uora,
    detach_uora,
    load_adapter,
    load_from_checkpoint,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.cli import main

ORDINARY = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
ORDINARY |= {"enable_progress_bar": False, "enable_model_summary": False}
X = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))


class Towers(LightningModule):
    """Two towers of odd sizes, with statistics, and a head on their product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.seen = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
        self.read = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.seen(x) * self.read(x))

    def training_step(self, batch, batch_idx):
        return self(batch).square().sum()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def two_roots() -> Towers:
    towers = Towers()
    attach_uora(towers.seen, UORAConfig(3, "all-linear", trainable_modules=()))
    attach_uora(towers.read, UORAConfig(2, "all-linear", trainable_modules=(), seed=4, share="model"))
    return towers


def two_callbacks(**how) -> list[UORACallback]:
    first = UORACallback(3, ["seen.*"], trainable_modules=["head"], reinit=None, **how)
    return [first, UORACallback(2, ["read.0", "read.2"], trainable_modules=(), seed=4, **how)]


def fitted(towers: Towers, callbacks: list[UORACallback]) -> Trainer:
    trainer = Trainer(**ORDINARY, callbacks=callbacks, max_epochs=2)
    trainer.fit(towers, torch.utils.data.DataLoader(X, batch_size=4))
    return trainer


def moved(towers: Towers) -> Towers:
    """With vectors, head and statistics as after some training, and refreshed rows."""
    with torch.no_grad():
        for _, layer in named_adapters(towers):
            layer.uora_b.normal_()
            layer.uora_d.normal_()
        for p in towers.head.parameters():
            p.add_(0.3)
        towers.seen[1].running_mean.add_(0.2)
    refresh(towers, ReinitSchedule(threshold=0.4, threshold_mode="fraction"))
    return towers.eval()


def output(towers: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return towers.eval()(X)


@pytest.mark.parametrize("projections", ["record", "full"])
def test_two_towers_travel_in_one_folder_with_the_head_and_the_statistics(tmp_path, projections):
    towers = moved(two_roots())
    save_adapter(towers, tmp_path, projections)
    fresh = Towers()
    names = load_adapter(fresh, tmp_path)
    assert names == [name for name, _ in named_adapters(towers)] == ["seen.0", "seen.2", "read.0", "read.2"]
    assert torch.equal(output(fresh), output(towers))
    assert fresh.head.weight.requires_grad
    assert list(fresh.state_dict()) == list(towers.state_dict())


def test_two_callbacks_adapters_travel_in_one_folder(tmp_path):
    towers = Towers()
    fitted(towers, two_callbacks())
    save_adapter(towers, tmp_path)
    fresh = Towers()
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(towers))
    assert list(fresh.state_dict()) == list(towers.state_dict())
    save_adapter(fresh, tmp_path / "again")
    assert json.loads((tmp_path / "again/uora_config.json").read_text())["several"]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_two_callbacks_checkpoints_load_merge_and_export(tmp_path, kind, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    towers = Towers()
    fitted(towers, two_callbacks(checkpoint=kind)).save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Towers, tmp_path / "a.ckpt")
    assert torch.equal(output(loaded), output(towers))
    assert [m.uora_d.numel() for _, m in named_adapters(loaded)] == [3, 3, 2, 2]
    of = ["--class", "tests.storage.test_several_roots:Towers"]
    assert main(["merge", "a.ckpt", "b.ckpt", *(of if kind == "adapter" else [])]) == 0
    merged = Towers.load_from_checkpoint(tmp_path / "b.ckpt")
    assert torch.allclose(output(merged), output(towers), atol=1e-6)
    assert main(["export", "a.ckpt", "out"]) == 2
    assert "read.0" in (said := capsys.readouterr().err)
    assert "seen.0" in said
    assert main(["export", "a.ckpt", "out", "--submodule", "read"]) == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] <= 4


def test_a_folder_of_two_towers_is_shown_and_merged_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    towers = moved(two_roots())
    save_adapter(towers, tmp_path / "folder")
    assert main(["show", "folder"]) == 0
    assert capsys.readouterr().out.count("rank") >= 2
    assert main(["merge", "folder", "b.ckpt", "--class", "tests.storage.test_several_roots:Towers"]) == 0
    merged = Towers.load_from_checkpoint(tmp_path / "b.ckpt")
    assert torch.allclose(output(merged), output(towers), atol=1e-5)


def damaged_base(towers: Towers) -> None:
    with torch.no_grad():
        towers.read[0].weight[0, 0] += 1.0


def another_head(towers: Towers) -> None:
    towers.head = nn.Linear(3, 4)


def no_tower(towers: Towers) -> None:
    towers.read = nn.Identity()


@pytest.mark.parametrize(
    ("change", "said"),
    [(damaged_base, "another base"), (another_head, "head=False"), (no_tower, "another architecture")],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(tmp_path, change, said):
    save_adapter(moved(two_roots()), tmp_path)
    fresh = Towers()
    change(fresh)
    before = copy.deepcopy(fresh)
    with pytest.raises(ValueError, match=said):
        load_adapter(fresh, tmp_path)
    here, there = fresh.state_dict(), before.state_dict()
    assert list(here) == list(there)
    assert all(torch.equal(here[name], there[name]) for name in there)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in before.parameters()]
    assert [type(m) for m in fresh.modules()] == [type(m) for m in before.modules()]


def test_without_its_head_a_folder_of_two_towers_fits_another_head(tmp_path):
    towers = moved(two_roots())
    save_adapter(towers, tmp_path)
    fresh = Towers()
    another_head(fresh)
    load_adapter(fresh, tmp_path, head=False)
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh.seen(X), towers.seen(X))
        assert torch.equal(fresh.read(X), towers.read(X))


def test_a_second_folder_of_several_is_refused_in_a_line(tmp_path):
    towers = moved(two_roots())
    save_adapter(towers, tmp_path)
    with pytest.raises(ValueError, match="call detach_uora"):
        load_adapter(towers, tmp_path, name="again")
    with pytest.raises(ValueError, match=r"seen \('0', 2 layers\), read \('0', 2 layers\); pass one of them"):
        add_adapter(towers, "again")


def test_a_damaged_list_of_manifests_is_refused(tmp_path):
    save_adapter(moved(two_roots()), tmp_path)
    path = tmp_path / "uora_config.json"
    whole = json.loads(path.read_text())
    for change in ({"several": []}, {"trained": 7}, {"several": [{**whole["several"][0], "root": 3}] * 2}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="damaged"):
            load_adapter(Towers(), tmp_path)
    path.write_text(json.dumps(whole | {"version": 99}))
    with pytest.raises(ValueError, match="update"):
        load_adapter(Towers(), tmp_path)


def test_when_the_second_callback_is_refused_the_module_is_as_it_was():
    towers, before = Towers(), Towers()
    callbacks = [UORACallback(3, ["seen.0"]), UORACallback(2, ["seen.0"], seed=4)]
    with pytest.raises(ValueError, match="already adapted"):
        fitted(towers, callbacks)
    assert list(towers.state_dict()) == list(before.state_dict())
    assert all(p.requires_grad for p in towers.parameters())
    assert "on_save_checkpoint" not in towers.__dict__


def test_callbacks_that_differ_in_what_they_exclude_alone_train_together(tmp_path):
    towers = Towers()
    how = {"rank": 2, "target_modules": "all-linear", "trainable_modules": ["head"]}
    callbacks = [UORACallback(**how, exclude_modules=[one]) for one in ("seen.*", "read.*")]
    trainer = fitted(towers, callbacks)
    assert len(list(named_adapters(towers))) == 4
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Trainer(**ORDINARY, max_epochs=3, callbacks=copy.deepcopy(callbacks))
    resumed.fit(Towers(), torch.utils.data.DataLoader(X, batch_size=4), ckpt_path=tmp_path / "a.ckpt")


def test_one_setting_given_twice_is_refused_in_a_line():
    callbacks = [UORACallback(2, ["seen.0"]), UORACallback(2, ["seen.0"], adapter_name="other")]
    towers = Towers()
    with pytest.raises(Exception, match=r"UORACallback\(rank=2, .*is given twice"):
        fitted(towers, callbacks)
    assert not list(named_adapters(towers))


def test_a_merge_of_two_towers_computes_as_before():
    towers = moved(two_roots())
    before = output(towers)
    detach_uora(towers, merge=True)
    assert torch.allclose(output(towers), before, atol=1e-5)
