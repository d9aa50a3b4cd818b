"""A merged quantised model of transformers is saved and read back as what it now is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lightning_uora import UORAConfig, attach_uora, detach_uora, named_adapters, summarize

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_what_save_pretrained_writes_after_merging_computes_the_same(targets, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit)
    attach_uora(model, UORAConfig(rank=4, target_modules=targets))
    counted = summarize(model)
    assert counted.total_params - counted.adapter_params == sum(p.numel() for p in plain.parameters())
    for _, layer in named_adapters(model):
        nn.init.normal_(layer.uora_b, std=0.05)
    detach_uora(model, merge=True, dequantize=True)
    model.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(read(ids).logits, model(ids).logits)
    packed = any(isinstance(m, bnb.nn.Linear4bit) for m in read.modules())
    assert packed == (targets == "attention")
    if not packed:
        model.to(torch.float32)  # transformers forbids it of quantised models
