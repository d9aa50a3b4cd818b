"""An adapter finds the part of a model that it is for, with or without the head that was trained with it."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch import nn

from lightning_uora import UORAConfig, attach_uora, load_adapter, named_adapters, save_adapter


def vit(classes: int) -> nn.Module:
    """The same backbone whatever the head."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    model.reset_classifier(classes)
    return model.eval()


class Lit(nn.Module):
    """As in a LightningModule, with a head beside the model."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.model, self.own = vit(0), nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(self.model(x))


def trained(model: nn.Module, **options) -> nn.Module:
    attach_uora(model, UORAConfig(**{"rank": 4, **options}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape))
    return model


def features(model: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.forward_features(x)


@pytest.mark.parametrize("classes", [0, 7])
def test_another_head_is_told_and_left_aside_where_asked(classes, tmp_path):
    model = trained(vit(5))
    save_adapter(model, tmp_path)
    other = vit(classes)
    before = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"'head.weight', 'head.bias' trained with the adapter.*head=False"):
        load_adapter(other, tmp_path)
    assert not list(named_adapters(other))
    load_adapter(other, tmp_path, head=False)
    torch.testing.assert_close(features(other), features(model))
    for name in ("head.weight", "head.bias"):
        if classes:
            assert torch.equal(other.state_dict()[name], before[name])
            assert dict(other.named_parameters())[name].requires_grad
    lenient = vit(classes)
    with pytest.warns(UserWarning, match="'head.bias', 'head.weight' of the adapter is left aside"):
        load_adapter(lenient, tmp_path, base_mismatch="warn")
    torch.testing.assert_close(features(lenient), features(model))


def test_a_head_that_fits_is_left_aside_only_where_asked(tmp_path):
    model = trained(vit(5))
    save_adapter(model, tmp_path)
    same, without = vit(5), vit(5)
    start = without.head.weight.clone()
    load_adapter(same, tmp_path)
    load_adapter(without, tmp_path, head=False)
    assert torch.equal(same.head.weight, model.head.weight)
    assert torch.equal(without.head.weight, start)
    torch.testing.assert_close(features(same), features(without))


def test_what_trained_inside_the_backbone_is_no_head(tmp_path):
    model = trained(vit(5), trainable_modules=["head", "norm1", "cls_token"])
    save_adapter(model, tmp_path)
    other = vit(0)
    load_adapter(other, tmp_path, head=False)
    assert torch.equal(other.cls_token, model.cls_token)
    torch.testing.assert_close(features(other), features(model))


def test_names_of_a_module_around_the_model_are_matched_and_that_is_said(tmp_path):
    model = trained(Lit())
    save_adapter(model, tmp_path)
    inner = vit(0)
    with pytest.raises(ValueError, match=r"'own.weight', 'own.bias' trained with the adapter.*head=False"):
        load_adapter(inner, tmp_path)
    with pytest.warns(UserWarning, match="saved from a model around this one: 'model' is it"):
        names = load_adapter(inner, tmp_path, head=False)
    assert names == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    torch.testing.assert_close(features(inner), features(model.model))


def test_names_of_a_part_are_matched_and_that_is_said(tmp_path):
    model = trained(vit(0))
    save_adapter(model, tmp_path)
    around = Lit()
    with pytest.warns(UserWarning, match="saved from a part of this model, and is loaded into 'model'"):
        names = load_adapter(around, tmp_path)
    assert names == ["model.blocks.0.attn.qkv", "model.blocks.0.attn.proj"]
    torch.testing.assert_close(features(around.model), features(model))
    with pytest.raises(ValueError, match="fits several parts of this model: 'a', 'b'; give the one"):
        load_adapter(nn.ModuleDict({"a": vit(0), "b": vit(0)}), tmp_path)


def test_a_model_without_the_modules_is_another_architecture(tmp_path):
    save_adapter(trained(vit(0)), tmp_path)
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"another architecture: the adapter is for 'blocks.0.attn.qkv'"):
        load_adapter(other, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not list(named_adapters(other))
