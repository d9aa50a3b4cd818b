"""``uora inspect`` says what an adapter costs, before anything is downloaded."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lightning_uora import UORAConfig, attach_uora, calibrate, save_adapter, summarize
from lightning_uora.cli import main
from lightning_uora.reports import inspect_model, model_on_meta
from tests import families


@pytest.mark.filterwarnings("ignore")  # PEFT on transformers 5
def test_counts_are_those_of_the_attached_model_and_of_pefts_lora_and_vera():
    """On a real RoBERTa with the same target modules; PEFT counts its own."""

    def model() -> nn.Module:
        return transformers.AutoModel.from_config(transformers.RobertaConfig(**families.BERT))

    names = ["query", "value"]
    config = UORAConfig(rank=4, target_modules=names, trainable_modules=())
    found = inspect_model(model(), config).totals()
    attached = model()
    attach_uora(attached, config)
    assert found["adapter_params"] == summarize(attached).adapter_params
    lora = get_peft_model(model(), LoraConfig(r=8, target_modules=names))
    vera = get_peft_model(model(), VeraConfig(r=4, target_modules=names, projection_prng_key=0))
    assert found["lora_r8_params"] == lora.get_nb_trainable_parameters()[0]
    assert found["vera_params"] == vera.get_nb_trainable_parameters()[0]
    shared = {n: t for n, t in vera.named_buffers() if "vera_" in n}
    projections = sum(t.nbytes for t in {t.data_ptr(): t for t in shared.values()}.values())
    assert found["vera_bytes"] - found["adapter_bytes"] == projections
    assert found["base_params"] == sum(p.numel() for p in model().parameters())


@pytest.mark.parametrize(("tokens", "rank", "form"), [(6, 1, "factored"), (6000, 40, "merged")])
def test_what_is_kept_for_backward_is_what_autograd_keeps(tokens, rank, form):
    """Bytes that the adapted model saves over the frozen one; A, B, d and b, which exist anyway, left out."""

    def saved(model: nn.Module) -> int:
        seen: dict[int, int] = {}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
            return t

        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(tokens, 6, requires_grad=True)).sum().backward()
        return sum(seen.values())

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).requires_grad_(False)
    frozen = saved(model)
    found = inspect_model(model, UORAConfig(rank=rank, target_modules="all", trainable_modules=()), tokens)
    assert {layer.form for layer in found.layers} == {form}
    assert saved(model) - frozen == found.totals()["activation_bytes"]


def test_a_layers_form_is_the_one_that_it_takes():
    model = nn.Sequential(nn.Linear(64, 64))
    config = UORAConfig(rank=24, target_modules="all", trainable_modules=())
    forms = {t: inspect_model(nn.Sequential(nn.Linear(64, 64)), config, t).layers[0].form for t in (1, 9999)}
    assert forms == {1: "factored", 9999: "merged"}
    attach_uora(model, config)
    for tokens, form in forms.items():
        grads = type(model(torch.randn(tokens, 64)).grad_fn).__name__
        assert ("FactoredLinear" in grads) == (form == "factored"), grads


def test_seventy_billion_parameters_cost_no_memory(tmp_path, capsys):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    config = transformers.LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    assert (
        main(["inspect", str(tmp_path), "--rank", "1024", "--target-modules", "q_proj", "v_proj", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert 70e9 < found["totals"]["base_params"] < 71e9
    assert found["totals"]["adapter_params"] == 80 * (1024 + 8192 + 1024 + 1024)
    assert found["totals"]["lora_r8_params"] == 80 * 8 * (8192 + 8192 + 8192 + 1024)
    assert len(found["layers"]) == 160
    assert found["version"] == 1


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "convnext_tiny", "gpt2", "t5", "bert", "deepseek_v3"]
)
def test_any_name_of_either_library_gives_a_table(name, capsys):
    targets = ["--target-modules", "all"] if name == "convnext_tiny" else []
    assert main(["inspect", name, *targets]) == 0
    out = capsys.readouterr().out
    assert "LoRA r 8" in out
    assert "extra memory in training" in out


def test_nothing_gets_storage():
    for name in ("vit_base_patch16_224", "llama"):
        model = model_on_meta(name)
        inspect_model(model, UORAConfig())
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} <= {"meta", "cpu"}
        assert all(p.is_meta for p in model.parameters())


def test_own_copies_are_counted_once_for_each_layer_and_size():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=8, vdim=6), nn.Linear(8, 8))
    config = UORAConfig(rank=3, target_modules=["0", "1"], trainable_modules=())
    found = inspect_model(model, config).totals()
    assert found["projection_bytes"] == 4 * 3 * (8 + 6 + 24 + 8)
    assert found["own_projection_bytes"] == 4 * 3 * ((8 + 6 + 24) + (8 + 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_bse_patch16_224"], "Near misses: "),
        (["no/such-model"], "no timm model"),
        (["resnet18"], "use 'all-linear' or 'all'"),
        (["bert", "--tokens", "0"], "tokens=0 must be at least 1"),
        (["bert", "--rank", "0"], "rank=0"),
    ],
)
def test_what_cannot_be_inspected_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    assert main(["inspect", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_either_library_the_command_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in ("timm", "transformers") else real(n, *a)
    )
    assert main(["inspect", "bert"]) == 2
    assert "pip install timm transformers" in capsys.readouterr().err


def test_a_damaged_configuration_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_timm_models_counts_are_those_of_the_real_one():
    config = UORAConfig(rank=7, target_modules="all-linear")
    real = timm.create_model("test_vit")
    attach_uora(real, config)
    found = inspect_model(model_on_meta("test_vit"), config)
    assert found.adapter_params == summarize(real).adapter_params
    assert found.head_params == summarize(real).trainable_params - found.adapter_params


@pytest.mark.parametrize("share", ["layer", "model"])
def test_the_bytes_on_disk_with_draws_from_the_inputs_are_those_that_are_saved(tmp_path, share: str):
    """Vectors in float32 and A in float16, of every layer or of every width."""
    config = UORAConfig(rank=3, target_modules="all", trainable_modules=(), init="inputs", share=share)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    found = inspect_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)), config).totals()
    attach_uora(model, config)
    calibrate(model, [torch.randn(20, 8)])
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "uora_adapter.safetensors")
    assert found["adapter_bytes"] == sum(t.nbytes for t in tensors.values())
    assert main(["inspect", "test_vit", "--init", "inputs", "--json"]) == 0


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 99}
LLAMA |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_projections_have_the_dtype_that_the_configuration_names(tmp_path, capsys, key: str):
    """Rank 8, width and heights 64: A and B, in two bytes each."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA).replace("dtype", key))
    assert main(["inspect", str(tmp_path), "--rank", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["projection_bytes"] == 2 * (8 * 64 + 64 * 8)


def test_an_architecture_that_transformers_lacks_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["FooForCausalLM"]}))
    with pytest.warns(UserWarning, match="no class 'FooForCausalLM': its backbone, LlamaModel, is counted"):
        assert main(["inspect", str(tmp_path), "--rank", "8", "--json"]) == 0


def test_a_narrow_terminal_loses_no_number(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["inspect", str(tmp_path), "--rank", "8"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert "model.layers.*.self_attn.q_proj" in out


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden_size": "big"},
        {"hidden_size": -5},
        pytest.param(
            {"num_attention_heads": 7},
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5"), reason="transformers 4 makes a model of it"
            ),
        ),
    ],
)
def test_a_configuration_that_makes_no_model_is_one_line(tmp_path, capsys, bad):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | bad))
    assert main(["inspect", str(tmp_path), "--rank", "8"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
