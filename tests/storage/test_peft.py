"""PEFT loads what we export and computes the same, after training and refreshes; what it cannot say is
refused.
"""

from __future__ import annotations

import copy

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
        "0.bias was trained by itself",
    ),
    "unknown format": (
        lambda: trained(nn.Sequential(nn.Linear(5, 5)), target_modules="all"),
        "loha",
        "format='loha' is not allowed",
    ),
    "no adapter": (lambda: nn.Linear(3, 3), "lora", "holds no adapter"),
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
    model = trained(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), target_modules="all")
    with pytest.warns(UserWarning, match="no place for BatchNorm statistics"):
        export_peft(model, tmp_path)
