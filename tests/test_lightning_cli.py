"""A Lightning CLI user writes YAML only."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
QUIET = [
    *("--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.accelerator", "cpu"),
]
ONE = ["--trainer.max_epochs", "1"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the weights of the small ViT lie that the YAML names (here untrained)."""
    path = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from vision_timm import small_vit
    (path / "outputs").mkdir()
    torch.save(small_vit().state_dict(), path / "outputs/small_vit.pt")
    return path


def cli(monkeypatch, folder: Path, *arguments: str):
    """What the example's command line made, run in ``folder``; None where it only printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    made = []
    from lightning.pytorch.cli import LightningCLI

    original = LightningCLI.__init__

    def keep(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LightningCLI, "__init__", keep)
    try:
        runpy.run_path(str(EXAMPLES / "cli/main.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return made[0]


def test_yaml_alone_trains_adapters_with_a_nested_schedule(monkeypatch, folder):
    config = EXAMPLES / "cli/vision.yaml"
    made = cli(
        monkeypatch, folder, "fit", "--config", str(config), "--data.init_args.batch_size", "8", *ONE, *QUIET
    )
    (callback,) = (c for c in made.trainer.callbacks if type(c).__name__ == "UORACallback")
    assert callback.config.target_modules == ("qkv", "proj", "fc1", "fc2")
    assert (callback.reinit.start, callback.reinit.stop) == (0.03, 0.2)
    assert callback.refreshes
    assert callback.summary.adapter_params == 24 * 64 + 6 * (192 + 64 + 128 + 64)
    vectors = [p for name, p in made.model.named_parameters() if name.endswith("uora_b")]
    assert vectors
    assert all(v.abs().max() > 0 for v in vectors)


def test_an_optimizer_from_the_command_line_trains_the_adapters(monkeypatch, folder):
    """``--optimizer`` is built from the parameters before the adapters exist."""
    config, rate = (
        str(EXAMPLES / "cli/vision.yaml"),
        ["--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.03"],
    )
    made = cli(monkeypatch, folder, "fit", "--config", config, *rate, *ONE, *QUIET)
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == 0.03
    vectors = [p for name, p in made.model.named_parameters() if name.endswith("uora_b")]
    assert all(v.abs().max() > 0 for v in vectors)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_the_printed_configuration_is_a_configuration(monkeypatch, folder, capsys, name):
    """Printing what was read from a printed configuration prints the same; the nested schedule is in it."""
    first = EXAMPLES / f"cli/{name}.yaml"
    assert cli(monkeypatch, folder, "fit", "--config", str(first), "--print_config") == 0
    printed = capsys.readouterr().out
    second = folder / f"{name}.yaml"
    second.write_text(printed)
    assert cli(monkeypatch, folder, "fit", "--config", str(second), "--print_config") == 0
    assert capsys.readouterr().out == printed
    (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    wanted = yaml.safe_load(first.read_text())["trainer"]["callbacks"][0]["init_args"]
    found = callback["init_args"]
    assert found["rank"] == wanted["rank"]
    assert (found["reinit"] is None) == (wanted["reinit"] is None)
    if found["reinit"] is not None:
        assert found["reinit"].items() >= wanted["reinit"].items()


def test_help_explains_every_argument_of_the_callback(monkeypatch, folder, capsys):
    asked = "--trainer.callbacks.help=lightning_uora.UORACallback"
    assert cli(monkeypatch, folder, "fit", asked) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Directions r of the shared projections", "when to refresh weak rows of A and B"):
        assert words in text
    assert "--trainer.callbacks.reinit.help" in text
    assert "type: list" not in text
    for name in ("rank", "target_modules", "trainable_modules", "reinit", "checkpoint", "d_init", "share"):
        assert f"--trainer.callbacks.{name} " in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.model=no_such_vit", "timm knows no model 'no_such_vit'"),
        ("--data.init_args.folder=/does/not/exist", "/does/not/exist"),
        ("--trainer.callbacks.init_args.rank=-1", "rank=-1 is not allowed; rank must be an integer of at"),
        ("--trainer.callbacks.init_args.reinit.start=0.5", "stop=0.2 is not allowed; stop must be at least"),
    ],
)
def test_what_cannot_be_made_is_one_line(monkeypatch, folder, capsys, option, message):
    config = str(EXAMPLES / "cli/vision.yaml")
    assert cli(monkeypatch, folder, "fit", "--config", config, option, *QUIET) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert message in line
    assert "Namespace" not in line
