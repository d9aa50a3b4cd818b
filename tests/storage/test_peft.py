"""PEFT loads what we export and computes the same, after training and refreshes; what it cannot say is
refused.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re

import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    export_peft,
    named_adapters,
    refresh,
)
from lightning_uora.storage.peft_names import known_targets, shortest_targets, task_type
from tests import families

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(model: nn.Module, **options) -> nn.Module:
    """Adapters with vectors and heads away from their start, and refreshes behind them."""
    attach_uora(model, UORAConfig(**{"rank": 5, **options}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    for _ in range(2):
        refresh(model, ReinitSchedule(threshold=9.0, max_fraction=0.5))
    return model


def check(base: nn.Module, model: nn.Module, run, folder, format: str) -> None:
    model.eval()
    export_peft(model, folder, format)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        want, got, start = run(model), run(loaded), run(base.eval())
    assert (want - start).abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("share", ["model", "layer"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("test_vit", ["qkv"]),
        ("test_vit", "all-linear"),
        ("test_vit", "all"),
        ("test_vit", ["patch_embed.proj", "fc1"]),
        ("test_vit", ["qkv", "head"]),
    ],
)
def test_timm_vit_as_lora(tmp_path, name: str, targets, share: str):
    base = timm.create_model(name, num_classes=3)
    x = torch.randn(2, 3, 160, 160)
    model = trained(copy.deepcopy(base), target_modules=targets, share=share)
    check(base, model, lambda m: m(x), tmp_path, "lora")


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama", "DistilBert", "ViT", "T5"])
def test_transformers_as_lora(tmp_path, name: str):
    base, run = families.transformers_model(name)
    model = trained(copy.deepcopy(base), target_modules="all-linear")
    check(base, model, run, tmp_path, "lora")


def test_a_task_model_takes_its_head_along(tmp_path):
    config = transformers.BertConfig(**families.BERT, num_labels=3)
    base = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = torch.randint(3, 50, (2, 6))
    model = trained(copy.deepcopy(base))
    assert model.classifier.weight.requires_grad
    check(base, model, lambda m: m(input_ids=ids).logits, tmp_path, "lora")


def test_the_part_of_a_lightning_module_is_exported_under_its_own_names(tmp_path):
    base = timm.create_model("test_vit", num_classes=3)
    module = trained(nn.ModuleDict({"model": copy.deepcopy(base)}))
    x = torch.randn(2, 3, 160, 160)
    check(base, module["model"], lambda m: m(x), tmp_path, "lora")


@pytest.mark.parametrize("rank", [5, 100])
def test_vera_with_shared_projections(tmp_path, rank: int):
    base = timm.create_model("test_vit", num_classes=3)
    x = torch.randn(2, 3, 160, 160)
    model = trained(copy.deepcopy(base), target_modules=["qkv"], share="model", rank=rank)
    check(base, model, lambda m: m(x), tmp_path, "vera")
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.vera_A", "base_model.vera_A.default"} <= keys


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Chain(nn.Sequential):
    """Some module again at the end, the same object."""

    def __init__(self, *modules: nn.Module, first: int) -> None:
        super().__init__(*modules, modules[first])


class Tied(nn.Module):
    """Two Linears that share their weight, and one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.between, self.write = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6)
        self.write.weight = self.read.weight

    def forward(self, x):
        return self.write(self.between(self.read(x)).tanh())


OUT = {"target_modules": ["body"], "trainable_modules": ["out"], "share": "model"}
REFUSED = {
    "several widths": (
        lambda: trained(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)), target_modules="all", share="model"),
        "vera",
        "'1' has other projections.*use format='lora'",
    ),
    "own rows": (
        lambda: trained(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), target_modules="all", share="layer"),
        "vera",
        "'1' has other projections",
    ),
    "convolution as vera": (
        lambda: trained(nn.Sequential(nn.Conv2d(3, 4, 3)), target_modules="all"),
        "vera",
        "'0' is a convolution",
    ),
    "grouped": (
        lambda: trained(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules="all"),
        "lora",
        "'0' is a grouped, dilated",
    ),
    "dilated": (
        lambda: trained(nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), target_modules="all"),
        "lora",
        "'0' is a grouped, dilated",
    ),
    "own forward": (
        lambda: trained(nn.Sequential(Scaled(4, 4)), target_modules="all"),
        "lora",
        r"'0' \(Scaled\) computes more than a product",
    ),
    "fused attention": (
        lambda: trained(nn.TransformerEncoderLayer(8, 2, 16), target_modules="attention"),
        "lora",
        "'self_attn' .* is fused attention",
    ),
    "trained biases": (
        lambda: trained(nn.Sequential(nn.Linear(5, 5)), target_modules="all", bias="all"),
        "lora",
        "0.bias is a bare parameter that was trained",
    ),
    "unknown format": (
        lambda: trained(nn.Sequential(nn.Linear(5, 5)), target_modules="all"),
        "loha",
        "format='loha' is not allowed",
    ),
    "no adapter": (lambda: nn.Linear(3, 3), "lora", "holds no adapter"),
    "adapted itself": (
        lambda: trained(nn.Linear(3, 3), target_modules="all", trainable_modules=()),
        "lora",
        "model is itself the adapted module",
    ),
    "one module in two places": (
        lambda: trained(Chain(nn.Linear(5, 5), nn.Tanh(), first=0), target_modules="all"),
        "lora",
        "modules '0' and '2' are one adapted module",
    ),
    "a name that PEFT has itself": (
        lambda: trained(nn.ModuleDict({"body": nn.Linear(5, 5), "out": nn.Linear(5, 3)}), **OUT),
        "lora",
        "PEFT would mistake its own 'lora_dropout' for the trained module 'out'",
    ),
    "a name that PEFT has itself, as vera": (
        lambda: trained(nn.ModuleDict({"body": nn.Linear(5, 5), "out": nn.Linear(5, 3)}), **OUT),
        "vera",
        "PEFT would mistake its own 'vera_dropout' for the trained module 'out'",
    ),
    "a trained weight shared with all that is adapted": (
        lambda: trained(Tied(), target_modules=["write"], trainable_modules=["read"]),
        "lora",
        "modules 'write' and 'read' share a trained weight",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_cannot_say_is_refused_by_name_and_nothing_is_written(tmp_path, kind: str):
    make, format, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        export_peft(make(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_convolution_as_lora_with_stride_and_padding(tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), nn.Flatten(), nn.Linear(100, 2))
    x = torch.randn(2, 3, 9, 8)
    model = trained(copy.deepcopy(base), target_modules="all")
    assert len(list(named_adapters(model))) == 2
    check(base, model, lambda m: m(x), tmp_path, "lora")


def test_batchnorm_statistics_are_warned_about(tmp_path):
    model = trained(
        nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), target_modules="all", batch_norm="moving"
    )
    with pytest.warns(UserWarning, match="cannot store BatchNorm statistics"):
        export_peft(model, tmp_path)


T5 = {**families.SEQ2SEQ["T5"], "decoder_start_token_id": 0}
GPT2 = {**families.TEXT["GPT2"], "pad_token_id": 0}
ADAPTED_HEAD = {"target_modules": ["classifier", "query"], "trainable_modules": ()}
AUTO = [
    ("LlamaForCausalLM", families.LLAMA, {}, "ForCausalLM", "CAUSAL_LM"),
    ("GPT2LMHeadModel", GPT2, {}, "ForCausalLM", "CAUSAL_LM"),
    ("T5ForConditionalGeneration", T5, {}, "ForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ("LlamaForSequenceClassification", families.LLAMA, {}, "ForSequenceClassification", "SEQ_CLS"),
    ("BertForSequenceClassification", families.BERT, {}, "ForSequenceClassification", "SEQ_CLS"),
    ("RobertaForSequenceClassification", families.BERT, {}, "ForSequenceClassification", "SEQ_CLS"),
    (
        "DistilBertForSequenceClassification",
        families.TEXT["DistilBert"],
        {},
        "ForSequenceClassification",
        "SEQ_CLS",
    ),
    ("GPT2ForTokenClassification", GPT2, {}, "ForTokenClassification", "TOKEN_CLS"),
    ("BertForQuestionAnswering", families.BERT, {}, "ForQuestionAnswering", "QUESTION_ANS"),
    ("BertModel", families.BERT, {}, "ForFeatureExtraction", None),
    ("BertModel", families.BERT, {}, "", None),
    ("ViTForImageClassification", families.IMAGE, {}, "", None),
]
AUTO += [(name, options, {"trainable_modules": ()}, auto, task) for name, options, _, auto, task in AUTO[3:9]]
AUTO += [
    (
        "BertForSequenceClassification",
        families.BERT,
        {"target_modules": ["classifier", "query"]},
        *AUTO[4][3:],
    ),
    (
        "BertForSequenceClassification",
        families.BERT,
        {**ADAPTED_HEAD, "target_modules": "classifier"},
        "",
        None,
    ),
]


def run_transformer(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What a model computes from tokens, or from an image."""
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)).logits
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found = model(input_ids=ids, **decoder)
    return next(found[key] for key in ("logits", "start_logits", "last_hidden_state") if key in found)


@pytest.mark.parametrize(("name", "options", "uora", "auto", "task"), AUTO)
def test_auto_peft_finds_the_base_and_computes_the_same(tmp_path, name, options, uora, auto, task):
    """Also where the task makes PEFT load a head that was not trained, or was adapted."""
    cls = getattr(transformers, name)
    cls(cls.config_class(**options)).save_pretrained(tmp_path / "base")
    base = cls.from_pretrained(tmp_path / "base").eval()
    model = trained(cls.from_pretrained(tmp_path / "base"), **{"target_modules": "all-linear", **uora})
    ids = torch.randint(3, 50, (2, 6))
    check(base, model, lambda m: run_transformer(m, ids), tmp_path / "peft", "lora")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    loaded = getattr(peft, f"AutoPeftModel{auto}").from_pretrained(tmp_path / "peft").eval()
    with torch.no_grad():
        want, got = run_transformer(model, ids), run_transformer(loaded, ids)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


class ForCausalLM(nn.Module):
    """Not of transformers, whatever it is called."""

    main_input_name = "input_ids"

    def generate(self) -> None:
        pass


class Mine(transformers.LlamaForCausalLM):
    """Somebody's own, by inheritance."""


def small_llava() -> nn.Module:
    text, image = transformers.LlamaConfig(**families.LLAMA), transformers.CLIPVisionConfig(**families.IMAGE)
    config = transformers.LlavaConfig(text_config=text, vision_config=image, image_token_index=3)
    return transformers.LlavaForConditionalGeneration(config)


TASKS = {
    "by inheritance": (lambda: Mine(transformers.LlamaConfig(**families.LLAMA)), "CAUSAL_LM"),
    "the decoder of a pair": (
        lambda: transformers.BartForCausalLM(transformers.BartConfig(**families.SEQ2SEQ["Bart"])),
        "CAUSAL_LM",
    ),
    "generates from images, without an encoder of text": (small_llava, None),
    "from sound": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(**families.SEQ2SEQ["Bart"], max_source_positions=8, pad_token_id=0)
        ),
        None,
    ),
    "fills gaps": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**families.BERT)), None),
    "a name alone": (ForCausalLM, None),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_told_only_where_peft_has_a_class_that_runs_the_model(kind: str):
    make, task = TASKS[kind]
    assert task_type(make()) == task


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_configuration_tells_of_the_model_what_peft_tells(tmp_path, task: str | None):
    cls = transformers.LlamaForCausalLM if task else transformers.LlamaModel
    base = cls(transformers.LlamaConfig(**families.LLAMA))
    theirs = peft.LoraConfig(target_modules=["q_proj"], task_type=task)
    peft.get_peft_model(copy.deepcopy(base), theirs).save_pretrained(tmp_path / "theirs")
    export_peft(trained(base, target_modules=["q_proj"]), tmp_path / "ours")
    want, got = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")
    )
    for key in ("task_type", "auto_mapping", "peft_version", "target_modules", "modules_to_save", "bias"):
        assert got.get(key) == want.get(key), key
    assert set(got) <= set(want)


@pytest.mark.parametrize(
    ("installed", "written"), [("0.17.1", None), ("0.18.0", "0.18.0"), ("1.0.0", "1.0.0")]
)
def test_the_version_of_peft_is_written_from_the_one_on_that_writes_it(
    tmp_path, monkeypatch, installed, written
):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
    export_peft(trained(nn.Sequential(nn.Linear(5, 5)), target_modules="all"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.get("peft_version") == written


def test_without_peft_no_version_is_written(tmp_path, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    export_peft(trained(nn.Sequential(nn.Linear(5, 5)), target_modules="all"), tmp_path)
    assert "peft_version" not in json.loads((tmp_path / "adapter_config.json").read_text())


def matched(targets: list[str] | str, names: list[str]) -> set[str]:
    """Names that PEFT takes for ``target_modules``, by its rule written out."""
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)}


NAMES = ["a", "a.proj", "a.out", "b", "b.proj", "b.out", "c", "c.a", "c.a.proj", "c.a.out", "proj", "axproj"]


@pytest.mark.parametrize(
    ("adapted", "want"),
    [
        (["a.proj", "b.proj", "c.a.proj", "proj"], ["proj"]),
        (["a.out", "b.out", "c.a.out"], ["out"]),
        (["b.proj", "b.out"], ["b.proj", "b.out"]),
        (["c.a.proj"], ["c.a.proj"]),
        (["a.proj", "c.a.proj"], ["a.proj"]),
        (["a.out", "b.out"], r"a\.out|b\.out"),
        (["proj"], "proj"),
        (["a.proj"], r"a\.proj"),
        (["b.out", "c.a.out", "a.out", "b.proj"], ["out", "b.proj"]),
        (["axproj", "c"], ["axproj", "c"]),
    ],
)
def test_targets_are_the_shortest_endings_that_only_the_adapted_modules_have(adapted, want):
    targets = shortest_targets(adapted, NAMES)
    assert targets == want
    assert matched(targets, NAMES) == set(adapted)


@pytest.mark.parametrize("seed", range(20))
def test_targets_match_what_is_adapted_and_no_ending_could_be_shorter(seed: int):
    """Any half of the modules of a model: literally PEFT's rule, and each entry tried one part shorter."""
    names = [name for name, _ in families.transformers_model("T5")[0].named_modules() if name]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    adapted = [names[i] for i in sorted(order[: len(names) // 2 if seed % 2 else 3])]
    targets = shortest_targets(adapted, names)
    assert matched(targets, names) == set(adapted)
    for target in targets if isinstance(targets, list) else []:
        shorter = target.partition(".")[2]
        assert not shorter or not matched([shorter], names) <= set(adapted)


def test_a_model_whose_names_no_list_can_tell_is_loaded_by_an_expression(tmp_path):
    base = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3))
    model = trained(copy.deepcopy(base), target_modules=["re:0"], trainable_modules=())
    x = torch.randn(3, 5)
    check(base, model, lambda m: m(x), tmp_path, "lora")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "0"


@pytest.mark.parametrize(
    ("adapted", "known", "want"),
    [
        (["a.q", "b.q"], ["a", "b", "a.q", "b.q", "head"], ["a.q", "b.q"]),
        (["a.q", "b.q"], ["a.q", "b.q", "c.a.q"], r"a\.q|b\.q"),
        (["a.q", "0"], ["a.q", "0"], r"a\.q|0"),
    ],
)
def test_without_a_model_full_names_are_listed_where_nothing_known_ends_with_them(adapted, known, want):
    assert known_targets(adapted, known) == want


TIED = [
    ("LlamaForCausalLM", {**families.LLAMA, "tie_word_embeddings": True}, "embed_tokens", ["q_proj"]),
    (
        "LlamaForCausalLM",
        {**families.LLAMA, "tie_word_embeddings": True},
        "embed_tokens",
        ["q_proj", "lm_head"],
    ),
    ("LlamaForCausalLM", {**families.LLAMA, "tie_word_embeddings": True}, (), ["lm_head"]),
    ("GPT2LMHeadModel", GPT2, "wte", ["c_attn"]),
    ("T5ForConditionalGeneration", T5, "shared", ["q", "v"]),
    ("BertForMaskedLM", families.BERT, "word_embeddings", ["query"]),
]


@pytest.mark.parametrize(("name", "options", "train", "targets"), TIED)
def test_a_weight_with_several_names_is_exported_under_all_of_them(tmp_path, name, options, train, targets):
    cls = getattr(transformers, name)
    base = cls(cls.config_class(**options)).eval()
    model = trained(copy.deepcopy(base), target_modules=targets, trainable_modules=train)
    ids = torch.randint(3, 50, (2, 6))
    check(base, model, lambda m: run_transformer(m, ids), tmp_path, "lora")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] or []
    embedding = base.get_input_embeddings().weight
    tied = [n for n, m in base.named_modules(remove_duplicate=False) if getattr(m, "weight", 0) is embedding]
    assert len(tied) > 1
    assert saved == (tied if train else [])


@pytest.mark.parametrize(
    ("train", "targets"),
    [
        (["read"], ["between"]),
        (["read"], ["between", "write"]),
        ((), ["read", "between"]),
        ((), ["write"]),
    ],
)
def test_linears_that_share_a_weight_compute_the_same_in_peft(tmp_path, train, targets):
    """Trained under one name, adapted under the other, or both at once."""
    base, x = Tied(), torch.randn(3, 6)
    model = trained(copy.deepcopy(base), target_modules=targets, trainable_modules=train)
    check(base, model, lambda m: m(x), tmp_path, "lora")


def test_a_module_under_two_names_of_one_parent_is_exported(tmp_path):
    base, x = Chain(nn.Sequential(nn.Linear(5, 5)), nn.Tanh(), first=0), torch.randn(3, 5)
    model = trained(copy.deepcopy(base), target_modules="all", trainable_modules=())
    check(base, model, lambda m: m(x), tmp_path, "lora")


def test_modules_whose_names_end_like_a_trained_one_are_saved_as_they_are(tmp_path):
    """PEFT takes them for trained: plain ones, adapted ones, and those around other modules."""
    base = nn.Sequential()
    for name in ("body", "subhead", "overhead", "head"):
        base.add_module(name, nn.Linear(5, 5))
    base.forehead = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    model = trained(
        copy.deepcopy(base), target_modules=["body", "overhead", "forehead.2"], trainable_modules=["re:head"]
    )
    x = torch.randn(3, 5)
    check(base, model, lambda m: m(x), tmp_path, "lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["subhead", "overhead", "head", "forehead"]
    assert config["target_modules"] == ["body"]


class Reader(nn.Module):
    """Computes with a weight of its own submodule, as Mamba's mixers do."""

    def __init__(self):
        super().__init__()
        self.read, self.both, self.plain = (nn.Linear(5, 5) for _ in range(3))
        self.fast = False

    def reset_weights(self):
        nn.init.zeros_(self.plain.weight)

    def forward(self, x):
        x = nn.functional.linear(self.plain(x), self.read.weight, self.read.bias)
        return nn.functional.linear(x, self.both.weight) if self.fast else self.both(x)


def test_a_weight_that_only_its_holder_reads_is_not_exported(tmp_path):
    model = nn.Sequential(Reader())
    attach_uora(model, UORAConfig(2, ["read", "plain"], trainable_modules=()))
    with pytest.raises(ValueError, match=r"Reader.forward reads the weight of '0.read' without calling"):
        export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_its_holder_may_read_is_warned_about(tmp_path):
    model = nn.Sequential(Reader())
    attach_uora(model, UORAConfig(2, ["both"], trainable_modules=()))
    with pytest.warns(UserWarning, match=r"Reader.forward may read the weight of '0.both'"):
        export_peft(model, tmp_path)


def test_a_module_that_is_called_is_exported_without_a_word(tmp_path):
    model = nn.Sequential(Reader())
    attach_uora(model, UORAConfig(2, ["plain"], trainable_modules=()))
    export_peft(model, tmp_path)


class Hacked(nn.Module):
    """Calls its Linear only where transformers has quantised the model, as Jamba does."""

    def __init__(self):
        super().__init__()
        self.config, self.read = transformers.PretrainedConfig(), nn.Linear(5, 5, bias=False)

    def forward(self, x):
        if hasattr(self.config, "_is_quantized"):
            return self.read(x)
        return x @ self.read.weight.t()


def test_a_weight_that_is_called_only_when_quantised_is_read(tmp_path):
    model = nn.Sequential(Hacked())
    attach_uora(model, UORAConfig(2, ["read"], trainable_modules=()))
    with pytest.raises(ValueError, match=r"Hacked.forward reads the weight of '0.read' without calling"):
        export_peft(model, tmp_path / "plain")
    model.config = model[0].config
    model.config._is_quantized = True
    with pytest.warns(UserWarning, match=r"Hacked.forward may read the weight of '0.read'"):
        export_peft(model, tmp_path / "quantised")
