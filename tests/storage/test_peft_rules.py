"""PEFT puts each exported adapter where it came from, or the module is refused by name."""

from __future__ import annotations

import copy
import importlib.util
import json

import peft
import pytest
import transformers
from packaging.version import Version
from torch import nn

from lightning_uora import UORAConfig, attach_uora, export_peft, save_adapter
from lightning_uora.cli import main
from lightning_uora.storage import peft_rules
from lightning_uora.storage.peft_rules import require_placed
from tests import families

pytestmark = pytest.mark.filterwarnings("ignore")
recent = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.17"),
    reason="PEFT 0.15 has other rules and adapts Mamba's out_proj",
)
asked = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5")
    or importlib.util.find_spec(peft_rules.CONVERSION) is None,
    reason="PEFT goes by transformers' patterns from transformers 5 on",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.ModuleDict({"gate_proj": nn.Linear(5, 7), "down_proj": nn.Linear(7, 5)})
        self.o_proj = nn.Linear(5, 5)


class Config(transformers.PretrainedConfig):
    model_type = "laguna"


class Laguna(transformers.PreTrainedModel):
    """The names of Laguna's shared experts, without the rest."""

    config_class = Config
    base_model_prefix = "model"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Block()})])

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


def adapted(*targets: str) -> nn.Module:
    model = Laguna(Config())
    attach_uora(model, UORAConfig(3, list(targets), trainable_modules=()))
    return model


@asked
def test_a_module_that_peft_renames_is_refused_and_nothing_is_written(tmp_path):
    """Laguna's pattern `mlp.shared_expert.` finds `mlp.shared_experts` as well."""
    message = r"^PEFT would rename module 'layers.0.mlp.shared_experts.down_proj' while it loads"
    with pytest.raises(ValueError, match=message):
        export_peft(adapted("o_proj", "shared_experts.down_proj"), tmp_path)
    assert not list(tmp_path.iterdir())
    export_peft(adapted("o_proj"), tmp_path)


@asked
def test_a_file_tells_the_family_and_is_refused_likewise(tmp_path, capsys):
    for target in ("shared_experts.down_proj", "o_proj"):
        save_adapter(adapted(target), tmp_path / target)
    assert json.loads((tmp_path / "o_proj" / "uora_config.json").read_text())["families"] == ["laguna"]
    assert main(["export", str(tmp_path / "shared_experts.down_proj"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "PEFT may take module 'layers.0.mlp.shared_experts.down_proj' for another one" in said
    assert main(["export", str(tmp_path / "o_proj"), str(tmp_path / "out")]) == 0


def lora(**changes: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["read"], **changes}


TWO = {"read": nn.Linear(5, 5), "write": nn.Linear(5, 5)}
WRONG = {
    "not adapt": (lora(target_modules=["write"]), r"^PEFT would not adapt module 'read', by its rules"),
    "adapt too": (lora(target_modules=["read", "write"]), r"^PEFT would adapt module 'write' too"),
    "saved whole": (lora(modules_to_save=["read"]), r"^PEFT would not adapt module 'read'"),
}


@recent
@pytest.mark.parametrize("kind", WRONG)
def test_what_the_names_would_not_tell_peft_is_refused(kind: str):
    config, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        require_placed(nn.ModuleDict(TWO), ["read"], {}, config)


def test_what_peft_will_not_convert_and_what_it_scales_otherwise_is_refused(monkeypatch):
    class Rules:
        """PEFT's, of a family that fuses what is adapted."""

        error: Exception | None = ValueError("cannot convert\nbecause")

        def convert_peft_config_for_transformers(self, settings, model, conversions):
            settings.lora_alpha = 6
            if self.error is not None:
                raise self.error

        def convert_peft_adapter_state_dict_for_transformers(self, model, settings, tensors):
            return tensors

    rules, model = Rules(), nn.ModuleDict(TWO)
    model.config = Config()
    monkeypatch.setattr(peft_rules, "_conversion", lambda: rules)
    with pytest.raises(ValueError, match=r"^PEFT would not load this export: cannot convert; use detach"):
        require_placed(model, ["read"], {}, lora())
    rules.error = None
    with pytest.raises(ValueError, match=r"^PEFT would give module 'read' another rank or scale"):
        require_placed(model, ["read"], {}, lora())


@recent
def test_what_peft_refuses_in_mamba_is_refused_before_it_is_written(tmp_path):
    config = transformers.MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1, vocab_size=50)
    model = transformers.MambaModel(config)
    attach_uora(model, UORAConfig(2, ["out_proj"], trainable_modules=()))
    with pytest.raises(
        ValueError, match=r"PEFT does not adapt module 'layers.0.mixer.out_proj'|reads the weight"
    ):
        export_peft(model, tmp_path)


def hide_peft(monkeypatch) -> None:
    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "peft" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)


@asked
def test_without_peft_a_family_that_it_may_rename_is_warned_of(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *p: None if name == "peft" else found(name, *p)
    )
    with pytest.warns(
        UserWarning, match=r"^PEFT is not installed here, and it may rename modules of a Laguna"
    ):
        export_peft(adapted("o_proj"), tmp_path / "warned")


def test_a_plain_model_is_exported_without_peft_and_without_a_word(tmp_path, monkeypatch, recwarn):
    base, _ = families.transformers_model("Bert")
    model = copy.deepcopy(base)
    attach_uora(model, UORAConfig(3, ["query"], trainable_modules=()))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *p: None if name == "peft" else found(name, *p)
    )
    export_peft(model, tmp_path)
    assert not [w for w in recwarn if "PEFT is not installed" in str(w.message)]
