"""What the README shows runs as it stands there, with small models in place of downloads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import lightning.pytorch
import pytest
import timm
import torch
import transformers
import yaml
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uora import UORACallback, UORAConfig, attach_uora
from lightning_uora.cli import main
from lightning_uora.trainer.rates import AUTO_RATE, auto_rate
from tests import families

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
VISION, TEXT, GROUPS, PLAIN, INPUTS, QUANTISED, EXPERTS, SEVERAL, FILES = SNIPPETS
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Names that the README leaves to the reader, small models, and a Trainer that makes two steps."""
    create, real = timm.create_model, lightning.pytorch.Trainer
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **how: create("test_vit", **how))
    config = transformers.RobertaConfig(**families.BERT)
    auto = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(auto, "from_pretrained", lambda name, **how: auto.from_config(config))

    def quick(**options):
        settings = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
        made.append(real(**settings, enable_progress_bar=False, **options))
        return made[-1]

    made: list = []
    monkeypatch.setattr(lightning.pytorch, "Trainer", quick)
    images = TensorDataset(torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 3]))
    tokens = {"input_ids": torch.randint(3, 50, (2, 6)), "labels": torch.tensor([0, 1])}
    return {
        "train_loader": DataLoader(images, 2),
        "tokenised_loader": DataLoader([tokens] * 2, batch_size=None),
        "made": made,
    }


def vectors_moved(trainer) -> bool:
    named = trainer.lightning_module.named_parameters()
    return all(p.abs().max() > 0 for name, p in named if name.endswith("uora_b"))


def test_the_lines_for_vision_and_text_train(small):
    exec(VISION + TEXT, small)
    vision, text = small["made"]
    for trainer, rate in ((vision, 1e-4), (text, 2e-5)):
        assert vectors_moved(trainer)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert rates == [rate, auto_rate(2, 4)]
    assert f"without weight decay, at {AUTO_RATE:g} under" in README
    assert sum(m.uora_d.numel() == 256 for m in vision.lightning_module.modules() if hasattr(m, "uora_d"))


def test_the_lines_for_quantised_bases_run():
    bnb = pytest.importorskip("bitsandbytes")
    plain, model = torch.nn.Linear(64, 64), torch.nn.Sequential(bnb.nn.Linear4bit(64, 64))
    model[0].load_state_dict(plain.state_dict())
    model = model.to("cpu")
    x = torch.randn(3, 64)
    before = model.train()(x)
    exec(QUANTISED, {"quantised_model": model})
    assert type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


def test_the_lines_for_experts_run(capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=30, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("this version of transformers keeps experts as Linear layers")
    exec(EXPERTS, {"mixture": model})
    assert "model.layers.0.mlp.experts.down_proj (4, 64) (4, 16)" in capsys.readouterr().out


def test_the_lines_for_several_adapters_run(capsys):
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear"))
    names = {"model": model, "batch": torch.randn(3, 7)}
    exec(SEVERAL, names)
    assert names["outputs"].shape == (3, 3)
    assert capsys.readouterr().out == "['default', 'german']\n"


def test_the_groups_written_by_hand_run(small):
    exec(VISION, small)
    names = {**small, "module": small["made"][0].lightning_module}
    exec(GROUPS, names)
    assert [group["max_lr"] for group in names["optimizer"].param_groups] == [1e-4, 1e-2]


def test_the_lines_without_a_trainer_run(small, capsys):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    exec(PLAIN, {**small, "model": model, "x": torch.randn(2, 6)})
    assert "UORA adapters" in capsys.readouterr().out
    assert type(model[0]) is nn.Linear


def test_the_line_with_draws_from_the_inputs_trains(small):
    exec(
        VISION.rpartition("Trainer(")[0]
        + INPUTS.replace('init="inputs")])', 'init="inputs")]).fit(Classifier(), train_loader)'),
        small,
    )
    (trainer,) = small["made"]
    assert vectors_moved(trainer)
    assert trainer.lightning_module.uora_projections.calibrated


def test_the_lines_about_files_and_the_commands_run(small, capsys):
    exec(VISION, small)
    small["made"][0].save_checkpoint("last.ckpt")
    make = lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))  # noqa: E731
    torch.manual_seed(1)
    model = make()
    torch.manual_seed(1)
    names = {**small, "model": model, "fresh_base": make()}
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear"))
    exec(FILES, names)
    assert names["small"].checkpoint == "adapter"
    assert Path("adapter/uora_config.json").exists()
    assert Path("peft/adapter_config.json").exists()
    layers = "nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))"
    Path("my_model.py").write_text(
        f"import torch\nfrom torch import nn\ndef Base():\n torch.manual_seed(1)\n return {layers}\n"
    )
    commands = re.findall(r"^uora (?:show|merge|export).*$", README, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, command


def test_the_yaml_is_a_callback():
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (given,) = yaml.safe_load(text)["trainer"]["callbacks"]
    parser = ArgumentParser()
    parser.add_subclass_arguments(lightning.pytorch.Callback, "callback")
    callback = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert isinstance(callback, UORACallback)
    assert callback.config.rank == 64
    assert callback.reinit.stop == 0.2


def test_the_inspect_commands_run(small, tmp_path, capsys):
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    transformers.LlamaConfig(**families.LLAMA).save_pretrained(folder)
    commands = re.findall(r"^uora inspect.*$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


def test_the_tree_names_every_room_and_every_link_leads_somewhere():
    root = Path(__file__).parent.parent
    tree = README.partition("## Tree")[2]
    for path in (root / "lightning_uora").glob("[a-z]*"):
        if path.suffix == ".py" or path.is_dir():
            assert f"\n  {path.name}{'/' if path.is_dir() else ''} " in tree, path.name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
