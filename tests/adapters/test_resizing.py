"""An adapted output layer goes on as it was when the vocabulary is resized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from tests.adapters.test_what_trains import llama

IDS = torch.arange(9)[None]


def adapted(tied: bool, share: str = "layer", refreshes: int = 0) -> nn.Module:
    model = llama(tied)
    attach_uora(model, UORAConfig(4, ["q_proj", "lm_head"], trainable_modules=(), share=share))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    for _ in range(refreshes):
        refresh(model, ReinitSchedule(threshold=9.0, max_fraction=0.5))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [40, 21])
@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("refreshes", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_the_old_tokens_stay_and_files_hold_the_new_size(tied, refreshes, share, size, tmp_path):
    model = adapted(tied, share, refreshes)
    before, frozen = model(IDS).logits, [n for n, p in model.named_parameters() if p.requires_grad]
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, before.shape[-1])
    torch.testing.assert_close(model(IDS).logits[..., :kept], before[..., :kept], atol=1e-5, rtol=1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == frozen
    assert model.lm_head.uora_b.shape == (size,)
    assert not model.lm_head.uora_b[kept:].any()
    model.lm_head.uora_b.data.add_(0.1)
    save_adapter(model, tmp_path)
    other = llama(tied)
    other.resize_token_embeddings(size, mean_resizing=False)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "uora" not in k})
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)
    save_adapter(other, tmp_path / "again")
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits)
    want = model(IDS).logits
    detach_uora(model, merge=True)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-5)
    assert "resize_token_embeddings" not in model.__dict__


@pytest.mark.filterwarnings("ignore")
def test_a_resize_of_a_model_without_an_adapted_head_is_its_own():
    model = llama()
    attach_uora(model, UORAConfig(rank=4, target_modules=["q_proj"]))
    assert "resize_token_embeddings" not in model.__dict__
    model.resize_token_embeddings(40)
    assert model(IDS).logits.shape[-1] == 40


def test_a_weight_that_changed_its_shape_otherwise_is_told():
    model = adapted(tied=False)
    layer = model.model.layers[0].self_attn.q_proj
    layer._parameters["weight"].data = torch.zeros(20, 16)
    with pytest.raises(ValueError, match=r"was 16 x 16 and is now \(20, 16\); call detach_uora"):
        _ = layer.weight


def test_b_of_other_layers_of_the_same_height_stays():
    """The vocabulary is as large as the hidden size: the query shares B with the output layer."""
    model = llama(tied=False)
    model.resize_token_embeddings(16, mean_resizing=False)
    attach_uora(model, UORAConfig(4, ["q_proj", "lm_head"], trainable_modules=()))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    before = model(IDS).logits
    model.resize_token_embeddings(20, mean_resizing=False)
    torch.testing.assert_close(model(IDS).logits[..., :16], before, atol=1e-5, rtol=1e-5)
