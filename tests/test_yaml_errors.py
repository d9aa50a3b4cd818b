"""What a plain ``LightningCLI`` refuses is one line within ``one_line_errors``."""

from __future__ import annotations

import sys

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_uora.yaml_errors import one_line_errors
from tests.toys import Toy, data

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(Toy):
    def train_dataloader(self):
        return data()


class Failing(Module):
    def training_step(self, batch, batch_index):
        raise ValueError("of training")


def run(monkeypatch, tmp_path, cls, *arguments, **options) -> None:
    callback = {"class_path": "lightning_uora.UORACallback", "init_args": {"rank": 4, **options}}
    trainer = {"callbacks": [callback], "logger": False, "max_steps": 1, "accelerator": "cpu"}
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": trainer}))
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--config", str(config), *arguments])
    with one_line_errors():
        LightningCLI(cls, save_config_callback=None)


REFUSED = [
    ({"rank": -1}, "rank=-1 is not allowed; rank must be an integer of at least 1."),
    ({"d_init": float("inf")}, "d_init=inf is not allowed; d_init must be a finite number."),
    ({"reinit": {"start": 0.5, "stop": 0.1}}, "stop=0.1 is not allowed; stop must be at least start=0.5."),
    ({"reinit": {"growth": "inputs"}}, "growth='inputs' needs init='inputs', got init='orthogonal'"),
]


PARSED = [
    ({"rank": "sixteen"}, "rank: Expected a <class 'int'>. Got value: sixteen"),
    ({"rnk": 4}, ("Option 'rnk' is not accepted", "Validation failed: Key 'rnk' is not expected")),
    ({"init": "input"}, ("init: Expected a typing.Literal['orthogonal',", "init: Cannot take a Union")),
    ({"vector_lr": "fast"}, ("vector_lr: 'fast' is none of", "vector_lr: Does not validate")),
    ({"reinit": {"treshold": 0.1}}, ("Option 'treshold' is not", "Validation failed: Key 'treshold' is not")),
    ({"reinit": {"threshold": "high"}}, "threshold: Expected a <class 'float'>. Got value: high"),
]
OF_MODELS = [
    ({"target_modules": "boby.0"}, "target_modules='boby.0' matches no module."),
    ({"trainable_modules": "haed"}, "trainable_modules='haed' matches no module or parameter."),
]


@pytest.mark.parametrize(("options", "said"), REFUSED + PARSED + OF_MODELS)
def test_a_refused_value_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, Module, **options)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert line.removeprefix("error: ").startswith(said)


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "is damaged"), (0.4, "is damaged"), (0.98, "is damaged"), (None, "other.ckpt")]
)
def test_a_checkpoint_that_cannot_be_read_is_one_line(monkeypatch, tmp_path, capsys, share, said):
    torch.save({"state_dict": Toy().state_dict()}, tmp_path / "other.ckpt")
    if share is not None:
        whole = (tmp_path / "other.ckpt").read_bytes()
        (tmp_path / "last.ckpt").write_bytes(whole[: int(share * len(whole))])
    given = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, Module, given, target_modules="body.0", trainable_modules="head")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert line.startswith("error: ")
    assert said in line


def test_what_goes_wrong_in_training_keeps_its_traceback(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="of training"):
        run(monkeypatch, tmp_path, Failing, target_modules="body.0", trainable_modules="head")


def test_what_is_right_runs(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, Module, target_modules="body.0", trainable_modules="head")
