"""Which modules are chosen: presets by family, patterns, exclusions, heads, and what every wrong choice
says.
"""

from __future__ import annotations

import re

import pytest
import timm
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, CLIPConfig

from lightning_uora import UORAConfig
from lightning_uora.adapters.roles import find_heads
from lightning_uora.adapters.targets import select


def chosen(model: nn.Module, target="attention", **options) -> tuple[str, ...]:
    return select(model, UORAConfig(rank=2, target_modules=target, **options)).adapted


def endings(names: tuple[str, ...]) -> set[str]:
    """The last name of each, with numbers dropped."""
    return {re.sub(r"\.\d+", "", name).rsplit(".", 1)[-1] for name in names}


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=10)


TEXT = {
    "BertConfig": {"query", "key", "value", "dense"},
    "RobertaConfig": {"query", "key", "value", "dense"},
    "DistilBertConfig": {"q_lin", "k_lin", "v_lin", "out_lin"},
    "DebertaConfig": {"in_proj", "dense"},
    "DebertaV2Config": {"query_proj", "key_proj", "value_proj", "dense"},
    "ElectraConfig": {"query", "key", "value", "dense"},
    "GPT2Config": {"c_attn", "c_proj"},
    "GPTNeoXConfig": {"query_key_value", "dense"},
    "LlamaConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "MistralConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "Qwen2Config": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "GemmaConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "T5Config": {"q", "k", "v", "o"},
    "CLIPVisionConfig": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "WhisperConfig": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "CpmAntConfig": {"project_q", "project_k", "project_v", "attention_out"},
    "FunnelConfig": {"q_head", "k_head", "v_head", "post_proj"},
}


def on_meta(config_name: str) -> nn.Module:
    config = getattr(transformers, config_name)()
    with torch.device("meta"):
        try:
            return AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("config", TEXT)
def test_attention_finds_the_projections_of_text_families(config: str):
    """Four projections for each attention, or two where query, key and value are fused; nothing from the
    MLP.
    """
    model = on_meta(config)
    names = chosen(model)
    assert endings(names) == TEXT[config]
    assert not any("mlp" in n or "intermediate" in n or "pooler" in n or "ffn" in n for n in names)
    per_kind = [sum(n.endswith(f".{kind}") for n in names) for kind in TEXT[config]]
    assert len(set(per_kind)) == 1


def test_attention_finds_vit_of_transformers_by_either_naming():
    names = chosen(on_meta("ViTConfig"))
    assert len(names) == 48
    assert all(".attention." in name for name in names)


OF_FEATURE_MAPS = {
    "CvtConfig": {"projection_query": 13, "projection_key": 13, "projection_value": 13, "dense": 13},
    "LevitConfig": {"queries_keys_values": 12, "queries": 2, "keys_values": 2, "projection": 14},
    "MobileViTV2Config": {"qkv_proj": 9, "out_proj": 9},
}


@pytest.mark.parametrize("config", OF_FEATURE_MAPS)
def test_attention_finds_the_projections_of_attention_over_feature_maps(config: str):
    names = [re.sub(r"\.(linear|convolution)$", "", name) for name in chosen(on_meta(config))]
    leaves = [name.rsplit(".", 1)[-1] for name in names]
    assert {leaf: leaves.count(leaf) for leaf in leaves} == OF_FEATURE_MAPS[config]


VISION = {
    "vit_tiny_patch16_224": ({"qkv", "proj"}, 24),
    "swinv2_tiny_window8_256": ({"qkv", "proj"}, 24),
    "beit_base_patch16_224": ({"qkv", "proj"}, 24),
    "eva02_base_patch14_224": ({"q_proj", "k_proj", "v_proj", "proj"}, 48),
    "cait_xxs24_224": ({"qkv", "q", "k", "v", "proj"}, 56),
    "levit_128s": ({"linear"}, 24),
    "pvt_v2_b0": ({"q", "kv", "proj"}, 24),
    "maxvit_tiny_rw_224": ({"qkv", "proj"}, None),
    "coat_tiny": ({"qkv", "proj"}, None),
    "xcit_nano_12_p16_224": ({"qkv", "q", "k", "v", "proj"}, 32),
    "edgenext_xx_small": ({"qkv", "proj"}, 6),
    "mobilevit_s": ({"qkv", "proj"}, 18),
    "iformer_t": ({"c"}, 20),
}


@pytest.mark.parametrize("name", VISION)
def test_attention_finds_the_projections_of_timm_families(name: str):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        model = timm.create_model(name)
    names = chosen(model)
    expected, count = VISION[name]
    assert endings(names) == expected
    assert count is None or len(names) == count
    assert not any("mlp" in n or "pos" in n for n in names)


def test_attention_of_torch_covers_in_proj_and_out_proj():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    expected = tuple(f"layers.{i}.self_attn{end}" for i in (0, 1) for end in ("", ".out_proj"))
    assert chosen(encoder) == expected


def test_short_names_count_beside_each_other_or_in_attention_alone():
    """A key and a value without a query are a mixer, not attention, unless the block is called so."""

    def block(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    model = nn.ModuleDict(
        {"mixer": block("k", "v", "out"), "block": block("q", "k"), "attn": block("k", "v")}
    )
    assert chosen(model) == ("block.q", "block.k", "attn.k", "attn.v")
    with pytest.raises(ValueError, match="finds nothing to adapt"):
        chosen(nn.ModuleDict({"mixer": block("q", "v")}))


@pytest.mark.parametrize(
    ("name", "proposed"),
    [("resnet18", "'all'"), ("convnext_atto", "'all'"), ("mixer_s32_224", "'all-linear' or 'all'")],
)
def test_attention_on_a_model_without_attention_proposes_presets_that_find_something(name, proposed):
    """A head alone is nothing to find: ``"all-linear"`` of a ResNet would be refused as well."""
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=rf"finds nothing to adapt.* Use {proposed}, or name layers"):
        chosen(model)


class Recurrent(nn.Module):
    """An LSTM, and layers of which each may be left out."""

    def __init__(self, **others: nn.Module):
        super().__init__()
        self.lstm = nn.LSTM(4, 5)
        for name, module in others.items():
            self.add_module(name, module)


@pytest.mark.parametrize("preset", ["attention", "all-linear", "all"])
def test_a_preset_that_finds_nothing_names_what_there_is_and_recommends_nothing_that_is_refused(preset):
    with pytest.raises(
        ValueError, match=r"layers with weights are: 1 LSTM\. UORA adapts nn\.Linear"
    ) as error:
        chosen(Recurrent(), preset)
    assert " Use " not in str(error.value)
    with pytest.raises(ValueError, match=r"heads that train in full: 'fc'; to adapt one") as error:
        chosen(Recurrent(fc=nn.Linear(5, 2)), preset)
    assert " Use " not in str(error.value)
    assert chosen(Recurrent(fc=nn.Linear(5, 2)), "fc") == ("fc",)


def test_what_was_given_is_not_recommended():
    model = Recurrent(conv=nn.Conv1d(3, 4, 2))
    with pytest.raises(ValueError, match=r"1 LSTM, 1 Conv1d.* Use 'all', or name layers"):
        chosen(model, "all-linear")
    with pytest.raises(ValueError, match="These layers are excluded") as error:
        chosen(model, "all", exclude_modules=["conv"])
    assert " Use " not in str(error.value)


def test_all_linear_and_all_leave_head_and_lm_head():
    config = transformers.LlamaConfig(num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1))
        vit = timm.create_model("test_vit", num_classes=10)
        resnet = timm.create_model("resnet18")
    assert len(chosen(model, "all-linear")) == 7
    assert chosen(gpt2, "all-linear") == tuple(
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    assert not any("head" in name for name in chosen(vit, "all-linear") + chosen(model, "all"))
    assert "patch_embed.proj" in chosen(vit, "all")
    assert "patch_embed.proj" not in chosen(vit, "all-linear")
    assert len(chosen(resnet, "all")) == 20


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.0.attn.qkv", ["blocks.0.attn.qkv"]),
        ("attn.qkv", [f"blocks.{i}.attn.qkv" for i in range(6)]),
        ("qkv", [f"blocks.{i}.attn.qkv" for i in range(6)]),
        ("blocks.*.attn.qkv", [f"blocks.{i}.attn.qkv" for i in range(6)]),
        ("blocks.[01].mlp.*", [f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)]),
        (
            r"re:blocks\.[24]\.attn\.(qkv|proj)",
            [f"blocks.{i}.attn.{n}" for i in (2, 4) for n in ("qkv", "proj")],
        ),
        (["fc1", "patch_embed.proj"], ["patch_embed.proj", *(f"blocks.{i}.mlp.fc1" for i in range(6))]),
        (["attention", "fc1"], None),
    ],
)
def test_patterns(vit: nn.Module, pattern, expected):
    """Full names, dotted suffixes, globs, regular expressions and lists, in model order; also below a
    Lightning module.
    """
    names = chosen(vit, pattern)
    assert len(names) == 18 if expected is None else list(names) == expected
    wrapped = nn.ModuleDict({"model": vit})
    if not (isinstance(pattern, str) and pattern.startswith(("re:", "blocks.0"))):
        assert chosen(wrapped, pattern) == tuple(f"model.{name}" for name in names)


def test_a_suffix_matches_whole_name_parts_only(vit: nn.Module):
    with pytest.raises(ValueError, match="matches no module"):
        chosen(vit, "kv")


BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("pattern", "blocks", "inner"),
    [
        ("blocks.3", [3], BLOCK),
        (r"re:blocks\.[14]", [1, 4], BLOCK),
        ("blocks.[14]", [1, 4], BLOCK),
        ("mlp", range(6), BLOCK[2:]),
        ("blocks", range(6), BLOCK),
    ],
)
def test_a_container_stands_for_the_linear_layers_in_it(vit: nn.Module, pattern, blocks, inner):
    assert chosen(vit, pattern) == tuple(f"blocks.{i}.{name}" for i in blocks for name in inner)
    assert len(chosen(vit, [pattern, "patch_embed.proj"])) == len(blocks) * len(inner) + 1


def test_of_a_container_exclusions_heads_and_what_is_trained_stay_out(vit: nn.Module):
    assert chosen(vit, "blocks.3", exclude_modules=["fc2"]) == tuple(f"blocks.3.{n}" for n in BLOCK[:3])
    model = nn.ModuleDict({"net": nn.ModuleDict({"a": nn.Linear(3, 3), "head": nn.Linear(3, 2)})})
    assert chosen(model, "net") == ("net.a",)
    assert chosen(model, "net", trainable_modules=["a"]) == ("net.head",)


def test_a_container_of_attention_is_taken_whole():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    inner = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    assert chosen(encoder, "layers.1") == tuple(f"layers.1.{name}" for name in inner)


def test_a_pattern_that_matches_a_layer_takes_no_container_of_the_same_name():
    """What it meant in saved configurations it still means."""
    inner = nn.ModuleDict({"proj": nn.Linear(3, 3)})
    model = nn.ModuleDict({"proj": nn.Sequential(nn.Linear(3, 3)), "attn": inner})
    assert chosen(model, "proj") == ("attn.proj",)


class Experts(nn.Module):
    """All experts' weights in one parameter, as in transformers."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 3, 3))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "experts",
            r"'experts' is a Experts whose weights are bare parameters with 3 axes \(up\), which UORA",
        ),
        ("experts.up", r"have shape \(4, 3, 3\), which does not show which axis is which; set is_transposed"),
        ("convs", r"Sequential without Linear-like layers in it; name its convolutions, such as 'convs\.1'"),
        ("lstm", "'lstm' is a LSTM; UORA adapts nn.Linear"),
    ],
)
def test_what_holds_nothing_to_adapt_is_refused_with_the_reason(pattern: str, message: str):
    convs = nn.Sequential(nn.ReLU(), nn.Conv1d(3, 4, 2))
    with pytest.raises(ValueError, match=message):
        chosen(Recurrent(experts=Experts(), convs=convs, linear=nn.Linear(3, 3)), pattern)


def test_exclusions_win_and_a_container_excludes_all_inside(vit: nn.Module):
    names = chosen(vit, "all-linear", exclude_modules=["blocks.0", "re:.*fc2"])
    assert not any(name.startswith("blocks.0.") or name.endswith("fc2") for name in names)
    assert len(names) == 5 * 3


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (lambda: timm.create_model("test_vit"), ("head",)),
        (lambda: timm.create_model("test_convnext"), ("head.fc",)),
        (lambda: timm.create_model("resnet18"), ("fc",)),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), ("head", "head_dist")),
        (lambda: timm.create_model("test_vit", num_classes=0), ()),
        (lambda: on_meta("BertConfig"), ("classifier",)),
        (lambda: on_meta("RobertaConfig"), ("classifier",)),
        (lambda: on_meta("DistilBertConfig"), ("pre_classifier", "classifier")),
        (lambda: on_meta("LlamaConfig"), ("score",)),
        (lambda: on_meta("T5Config"), ("classification_head",)),
        (lambda: AutoModelForImageClassification.from_config(CLIPConfig()), ("classifier",)),
        (lambda: transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1)), ()),
        (
            lambda: transformers.AutoModelForMaskedLM.from_config(
                transformers.BertConfig(num_hidden_layers=1)
            ),
            (),
        ),
        (lambda: nn.ModuleDict({"encoder": nn.Linear(3, 3), "classifier": nn.Linear(3, 2)}), ("classifier",)),
        (lambda: nn.Sequential(nn.Linear(3, 3)), ()),
    ],
)
def test_heads_are_found(make, heads: tuple[str, ...]):
    with torch.device("meta"):
        model = make()
    assert find_heads(model) == heads
    wrapped = nn.ModuleDict({"net": model})
    assert find_heads(wrapped) == tuple(f"net.{head}" for head in heads)


def test_a_lightning_modules_own_head_beside_a_headless_backbone_is_found():
    with torch.device("meta"):
        backbone = timm.create_model("test_vit", num_classes=0)
        module = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(8, 2)})
    assert find_heads(module) == ("head",)


def test_a_head_is_adapted_only_when_named_in_full(vit: nn.Module):
    assert "head" in chosen(vit, ["qkv", "head"])
    assert select(vit, UORAConfig(rank=2, target_modules=["qkv", "head"])).trained == ()
    assert not any("head" in name for name in chosen(vit, "re:.*(qkv|head)"))
    with pytest.raises(ValueError, match="excluded or trained"):
        chosen(vit, "re:head")
    with pytest.raises(ValueError, match="both name 'head'"):
        chosen(vit, ["head"], trainable_modules=["head"])


def test_trainable_modules_by_pattern_or_none(vit: nn.Module):
    config = UORAConfig(rank=2, trainable_modules=["re:norm", "blocks.5"])
    selection = select(vit, config)
    assert selection.trained == ("blocks.5", "norm")
    assert not any(name.startswith("blocks.5") for name in selection.adapted)
    assert select(vit, UORAConfig(rank=2, trainable_modules=())).trained == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "qvk"}, r"target_modules='qvk' matches no module. Near misses: 'qkv'"),
        ({"target_modules": "atention"}, r"Near misses: .*'attention'"),
        (
            {"target_modules": "xyzzy"},
            r"can be adapted end in: .*qkv.*presets are attention, all-linear, all",
        ),
        ({"target_modules": "re:(["}, r"target_modules='re:\(\[' is not a valid regular expression"),
        ({"target_modules": "norm1"}, r"'blocks.0.norm1' is a LayerNorm; UORA adapts nn.Linear"),
        ({"target_modules": "norm"}, r"'norm' is a LayerNorm; UORA adapts nn.Linear"),
        ({"target_modules": "act"}, r"'blocks.0.mlp.act' is a GELU; UORA adapts nn.Linear"),
        ({"target_modules": "attn.qkv.weight"}, r"is a parameter, 'blocks.0.attn.qkv.weight', but UORA"),
        ({"target_modules": "blocks.0", "exclude_modules": "blocks"}, "only modules that are excluded"),
        (
            {"target_modules": r"re:attn\.qkv"},
            r"must match the whole name: 're:\.\*\(attn\\\\.qkv\)' matches 'blocks.0.attn.qkv', 'blocks.1",
        ),
        (
            {"target_modules": r"re:mlp\.f"},
            r"'re:\.\*\(mlp\\\\.f\)\.\*' matches 'blocks.0.mlp.fc1'",
        ),
        (
            {"target_modules": r"re:block\.0\.attn\.qkv"},
            r"must match the whole name\. Near misses: 'blocks.0.attn.qkv', ",
        ),
        ({"target_modules": r"re:xyzzy{9}"}, r"An expression must match the whole name\.$"),
        (
            {"trainable_modules": [r"re:hea"]},
            r"no module or parameter. An expression must match the whole name: 're:\.\*\(hea\)\.\*' matches",
        ),
        ({"exclude_modules": ["fc9"]}, r"exclude_modules='fc9' matches no module. Near misses: 'fc"),
        (
            {"trainable_modules": ["haed"]},
            r"'haed' matches no module or parameter. The head here is 'head'. Near misses: 'head'",
        ),
        ({"target_modules": "all", "dropout": 0.1}, r"dropout=0.1 needs .* 'patch_embed.proj' is a Conv2d"),
    ],
)
def test_wrong_choices_say_what_came_and_what_is_there(vit: nn.Module, options, message: str):
    with pytest.raises(ValueError, match=message):
        select(vit, UORAConfig(rank=2, **options))


def test_two_targets_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        chosen(model, "all-linear")
    assert chosen(model, "all-linear", exclude_modules=["1"]) == ("0",)
