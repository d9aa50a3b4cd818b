"""Several adapters in one Lightning checkpoint: all of them come back, into a plain module too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORACallback,
    adapter_names,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    set_adapter,
)
from lightning_uora.adapters import activated, attachment_of
from lightning_uora.cli import main
from lightning_uora.storage import read_checkpoint
from tests.trainer.test_names import Task, X, data

REFRESHES = ReinitSchedule(every_n_steps=1, threshold=0.9, start=0, stop=0.9)
WHAT: dict[str, dict[str, Any]] = {
    "magnitude": {"reinit": REFRESHES},
    "inputs": {"init": "inputs", "calibration_batches": 1, "reinit": REFRESHES},
    "another rank": {"reinit": None, "rank": 3, "target_modules": ["body.2"]},
}


def outputs(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(X)


def callback(name: str, kind: str, **options: Any) -> UORACallback:
    given = {"rank": 4, "target_modules": ["body.0", "body.2"], "vector_lr": 0.05, "reinit": None}
    return UORACallback(**{**given, **options}, adapter_name=name, checkpoint=kind)


def fit(module: Task, seed: int, one: UORACallback, epochs: int = 2, path: Path | None = None) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[one],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data(seed), ckpt_path=path)
    return trainer


def of_all(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name in adapter_names(module):
        with activated(module, name):
            found[name] = outputs(module)
    return found


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert adapter_names(found) == adapter_names(expected)
    there, here = of_all(found), of_all(expected)
    assert all(torch.equal(there[name], here[name]) for name in here)
    for name in here:
        with activated(found, name), activated(expected, name):
            one, two = attachment_of(found, "a test").owner, attachment_of(expected, "a test").owner
            assert one.record == two.record
            assert one.config == two.config


@pytest.fixture(params=["full", "adapter"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(WHAT))
def trained(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> tuple[Task, Path, dict[str, Any]]:
    """A module with three adapters, the one in the middle on it, saved after one epoch of two."""
    module, options = Task(), WHAT[request.param]
    fit(module, 1, callback("default", kind, **options), 1)
    save_adapter(module, tmp_path / "late")
    load_adapter(module, tmp_path / "late", name="three")
    trainer = fit(module, 2, callback("two", kind), 1)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    fit(module, 2, callback("two", kind), 2, tmp_path / "all.ckpt")
    return module, tmp_path / "all.ckpt", options


def test_a_plain_module_resumes_with_all_adapters_and_ends_where_the_run_ended(trained, kind):
    module, path, _ = trained
    fresh = Task()
    fit(fresh, 2, callback("two", kind), 2, path)
    assert_same(fresh, module)
    for (name, one), (other, two) in zip(fresh.named_parameters(), module.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two)


def test_a_checkpoint_loads_without_a_trainer_with_all_adapters(trained, kind):
    module, path, _ = trained
    found = load_from_checkpoint(Task, path)
    assert adapter_names(found) == ["default", "three", "two"]
    for name in ("default", "three"):
        with activated(found, name), activated(module, name):
            assert torch.equal(outputs(found), outputs(module))


def test_an_adapter_checkpoint_holds_no_projections_of_those_that_wait(trained, kind):
    _, path, options = trained
    held = [k for k in read_checkpoint(path)["state_dict"] if ".projections." in k or "uora_projections" in k]
    if kind == "full":
        assert any(k.startswith("uora_shelf.default.projections.B_") for k in held)
    elif options.get("init") == "inputs":
        assert held
        assert all(k.rpartition(".")[2][0] == "A" for k in held)
    else:
        assert not held


@pytest.mark.parametrize("name", ["default", "two", "three", None])
def test_merge_and_export_take_the_adapter_that_is_named(trained, kind, tmp_path, capsys, name):
    module, path, _ = trained
    module = load_from_checkpoint(Task, path)
    given = [] if name is None else ["--adapter", name]
    source = ["--class", "tests.trainer.test_names:Task"] if kind == "adapter" else []
    assert main(["merge", str(path), str(tmp_path / "plain.ckpt"), *given, *source]) == 0
    told = capsys.readouterr().out
    merged = Task.load_from_checkpoint(tmp_path / "plain.ckpt", map_location="cpu")
    set_adapter(module, name or "two")
    assert torch.allclose(outputs(merged), outputs(module), atol=1e-5)
    if kind == "full":
        assert f"of adapter {name or 'two'!r}" in " ".join(told.split())
    assert main(["export", str(path), str(tmp_path / "peft"), *given]) == 0
    assert f"of adapter {name or 'two'!r}" in " ".join(capsys.readouterr().out.split())


def test_show_lists_them(trained, kind, capsys):
    assert main(["show", str(trained[1])]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "two (active), default, three" in told
    assert "inactive adapters" in told


class Lean(Task):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_what_the_module_has_beside_the_checkpoint_stays(kind, tmp_path):
    module = Lean()
    trainer = fit(module, 1, callback("default", kind), 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit(module, 2, callback("two", kind), 1)
    two = outputs(module)
    set_adapter(module, "default")
    fit(module, 1, callback("default", kind), 2, tmp_path / "one.ckpt")
    set_adapter(module, "two")
    assert torch.equal(outputs(module), two)


def test_another_name_or_configuration_is_one_line_and_the_module_as_it_was(trained, kind):
    _, path, _ = trained
    with pytest.raises(
        ValueError, match=r"adapter 'two' is active in the checkpoint, but 'other' is active here; .*"
    ):
        fit(Task(), 2, callback("other", kind), 2, path)
    module = Task()
    fit(module, 1, callback("default", kind, rank=2), 1)
    before = outputs(module)
    with pytest.raises(ValueError, match=r"adapter 'default' of the checkpoint is not the one here: "):
        fit(module, 2, callback("two", kind), 2, path)
    set_adapter(module, "default")
    assert torch.equal(outputs(module), before)


def test_an_unknown_adapter_is_refused_by_the_command(trained, tmp_path, capsys):
    assert main(["export", str(trained[1]), str(tmp_path / "peft"), "--adapter", "tow"]) == 2
    assert "no adapter is called 'tow'; there are: 'two', 'default', 'three'" in capsys.readouterr().err


DAMAGES = {
    "a name": lambda m: m["waiting"][0].update(adapter="a.b"),
    "the same name": lambda m: m["waiting"][0].update(adapter="two"),
    "the order": lambda m: m.update(order=["two"]),
    "a shelf in the shelf": lambda m: m["waiting"][0].update(waiting=[]),
    "what trained": lambda m: m["waiting"][0].update(besides={"t_0": "elsewhere"}),
    "a rank": lambda m: m["waiting"][0]["config"].update(rank=-1),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_shelf_is_refused_in_a_line(tmp_path, what):
    module = Task()
    fit(module, 1, callback("default", "full"), 1)
    fit(module, 2, callback("two", "full"), 1).save_checkpoint(tmp_path / "all.ckpt")
    checkpoint = torch.load(tmp_path / "all.ckpt", weights_only=True)
    DAMAGES[what](checkpoint["uora"])
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="is damaged"):
        load_from_checkpoint(Task, tmp_path / "bad.ckpt")
