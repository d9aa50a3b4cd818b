"""Trainable parameters against published tables, on the meta device.

VeRA (arXiv:2310.11454) tables 2, 3 and 7 give adapter parameters without heads for query and value.
"""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

from lightning_uora import UORAConfig, attach_uora, summarize


def build(name: str):
    configs = {
        "roberta-base": transformers.RobertaConfig(),
        "roberta-large": transformers.RobertaConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
        "vit-base": transformers.ViTConfig(),
        "vit-large": transformers.ViTConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
        "gpt2-medium": transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    }
    with torch.device("meta"):
        return transformers.AutoModel.from_config(configs[name])


QUERY_VALUE = {
    "roberta": ["query", "value"],
    "vit": [r"re:.*attention.*(query|value|q_proj|v_proj)"],
    "gpt2": ["c_attn"],
}


@pytest.mark.parametrize(
    ("name", "rank", "published"),
    [
        ("roberta-base", 1024, 43_008),
        ("roberta-large", 256, 61_440),
        ("vit-base", 256, 24_576),
        ("vit-large", 256, 61_440),
        # fused c_attn is (3072, 1024): 24 * (1024 + 3072); VeRA's own 98k is the same count
        ("gpt2-medium", 1024, 98_304),
    ],
)
def test_adapter_parameters_equal_the_published_count(name: str, rank: int, published: int):
    model = build(name)
    targets = QUERY_VALUE[name.split("-")[0]]
    attach_uora(model, UORAConfig(rank=rank, target_modules=targets, trainable_modules=()))
    summary = summarize(model)
    assert summary.adapter_params == summary.trainable_params == published


def test_timm_vit_base_by_hand():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    attach_uora(model, UORAConfig(rank=1024, target_modules="attn.qkv", trainable_modules=()))
    assert summarize(model).trainable_params == 12 * (1024 + 3 * 768)
