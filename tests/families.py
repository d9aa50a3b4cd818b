"""Small random members of some architecture families; ``tests/sweep`` has them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import nn

TIMM = {
    "test_vit": "attention",
    "test_vit2": "all",
    "test_vit4": "all-linear",
    "test_byobnet": "all",
    "test_convnext": "all",
    "test_convnext2": "all-linear",
    "test_efficientnet": "all",
    "test_efficientnet_gn": "all",
    "test_mambaout": "all",
    "test_nfnet": "all",
    "test_resnet": "all",
    "test_vit_relpos": "attention",
    "beit_tiny": "attention",
    "swinv2": "attention",
    "swin": "all-linear",
    "edgenext_xx_small": "all",
    "levit_128s": "all",
    "mobilenetv3_small_050": "all",
    "resnetv2_50": "all",
}
SMALLER = {
    "beit_tiny": ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 64}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "img_size": 64},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "img_size": 56},
    ),
    "resnetv2_50": ("resnetv2_50", {"layers": (1, 1, 1, 1)}),
}


def timm_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode and one batch for it."""
    real, options = SMALLER.get(name, (name, {}))
    if not timm.is_model(real):
        pytest.skip(f"timm {timm.__version__} has no {real}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(real, num_classes=3, **options).eval()
    size = options.get("img_size", model.pretrained_cfg["input_size"][-1])
    return wake(model), torch.randn(1, 3, size, size)


def wake(model: nn.Module) -> nn.Module:
    """Give constant parameters (zero-initialised scales, layer scale at 1e-5) a spread, so that gradients
    flow.
    """
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and (p.numel() == 1 or p.std() < 1e-4):
                p.copy_(0.5 + 0.5 * torch.rand_like(p))
    return model


WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LLAMA = {**WIDTH, "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0}
BERT = {**WIDTH, "vocab_size": 50, "pad_token_id": 0}
IMAGE = {**WIDTH, "image_size": 16, "patch_size": 8}
TEXT = {
    "Bert": BERT,
    "Roberta": BERT,
    "Electra": {**BERT, "embedding_size": 8},
    "Deberta": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DistilBert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 24,
        "vocab_size": 50,
        "pad_token_id": 0,
    },
    "Albert": {**BERT, "embedding_size": 8},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    "GPTNeoX": {**WIDTH, "vocab_size": 50},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    "OPT": {**WIDTH, "ffn_dim": 24, "word_embed_proj_dim": 16, "vocab_size": 50},
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 4},
    "Gemma": {**LLAMA, "head_dim": 4},
    "Phi3": LLAMA,
    "Mixtral": {**LLAMA, "num_local_experts": 2},
}
SEQ2SEQ = {
    "T5": {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 50},
    "Bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "vocab_size": 50,
    },
}
VISION = {"ViT": IMAGE, "CLIPVision": IMAGE, "Dinov2": {**WIDTH, "image_size": 16, "patch_size": 8}}


def transformers_model(name: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The model in eval mode and a function that runs it."""
    options = {**TEXT, **SEQ2SEQ, **VISION}[name]
    config = getattr(transformers, f"{name}Config")(**options)
    model = wake(transformers.AutoModel.from_config(config).eval())

    def output(out) -> torch.Tensor:
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state if pooled is None else out.last_hidden_state + pooled[:, None]

    if name in VISION:
        pixels = torch.randn(1, 3, 16, 16)
        return model, lambda m: output(m(pixel_values=pixels))
    ids = torch.randint(3, 50, (2, 6))
    if name in SEQ2SEQ:
        return model, lambda m: m(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    return model, lambda m: output(m(input_ids=ids))
