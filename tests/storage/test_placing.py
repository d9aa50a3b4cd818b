"""An adapter finds the part of a model that it is for, with or without the head that was trained with it."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext

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
    with pytest.raises(ValueError, match=r"'head.weight', 'head.bias', trained with the adapter.*head=False"):
        load_adapter(other, tmp_path)
    assert not list(named_adapters(other))
    load_adapter(other, tmp_path, head=False)
    torch.testing.assert_close(features(other), features(model))
    for name in ("head.weight", "head.bias"):
        if classes:
            assert torch.equal(other.state_dict()[name], before[name])
            assert dict(other.named_parameters())[name].requires_grad
    lenient = vit(classes)
    with pytest.warns(UserWarning, match="Not loaded from the adapter: 'head.bias', 'head.weight'"):
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


def test_names_of_a_module_around_the_model_are_matched(tmp_path):
    model = trained(Lit())
    save_adapter(model, tmp_path)
    inner = vit(0)
    with pytest.raises(ValueError, match=r"'own.weight', 'own.bias', trained with the adapter.*head=False"):
        load_adapter(inner, tmp_path)
    names = load_adapter(inner, tmp_path, head=False)
    assert names == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    torch.testing.assert_close(features(inner), features(model.model))


def test_names_of_a_part_are_matched_and_that_is_said(tmp_path):
    model = trained(vit(0))
    save_adapter(model, tmp_path)
    around = Lit()
    with pytest.warns(UserWarning, match="saved from a part of this model; it was loaded into 'model'"):
        names = load_adapter(around, tmp_path)
    assert names == ["model.blocks.0.attn.qkv", "model.blocks.0.attn.proj"]
    torch.testing.assert_close(features(around.model), features(model))
    with pytest.raises(ValueError, match="fits several parts of this model: 'a', 'b'; pass the one"):
        load_adapter(nn.ModuleDict({"a": vit(0), "b": vit(0)}), tmp_path)


def test_a_model_without_the_modules_is_another_architecture(tmp_path):
    save_adapter(trained(vit(0)), tmp_path)
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"another architecture: the adapter is for 'blocks.0.attn.qkv'"):
        load_adapter(other, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not list(named_adapters(other))


class P(nn.Module):
    """Odd sizes, and a layer that does not train."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.lin, self.norm, self.out = nn.Linear(width, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.lin(x)))


def at(path: str, part: nn.Module, **beside: nn.Module) -> nn.ModuleDict:
    """A model with ``part`` at a path, and others beside it."""
    first, *rest = path.split(".")
    return nn.ModuleDict({first: at(".".join(rest), part) if rest else part, **beside})


def saved(model: nn.Module, folder, **options) -> nn.Module:
    trained(model, **{"target_modules": ["lin"], "trainable_modules": (), **options})
    save_adapter(model.eval(), folder)
    return model


PREFIXES = [
    ("model", "backbone"),
    ("model", "backbone.0"),
    ("model", "model.inner"),
    ("a.b", "backbone"),
    ("a.b", "x.y.z"),
    ("model.0", "backbone.1"),
]


@pytest.mark.parametrize(("there", "here"), PREFIXES)
def test_a_prefix_that_differs_is_found_and_said(there, here, tmp_path):
    model, other = saved(at(there, P()), tmp_path), at(here, P()).eval()
    said = re.escape(f"What the adapter calls {there!r} is {here!r} in this model.")
    with pytest.warns(UserWarning, match=f"^{said}$"):
        names = load_adapter(other, tmp_path)
    assert names == [f"{here}.lin"]
    x = torch.randn(4, 7)
    assert torch.equal(other.get_submodule(here)(x), model.get_submodule(there)(x))


def test_of_parts_with_the_same_names_the_one_of_the_same_sizes_is_taken(tmp_path):
    model = saved(at("model", P()), tmp_path)
    other = at("small", P(4), backbone=P(), large=P(9)).eval()
    with pytest.warns(UserWarning, match=r"What the adapter calls 'model' is 'backbone' in this model"):
        assert load_adapter(other, tmp_path) == ["backbone.lin"]
    x = torch.randn(4, 7)
    assert torch.equal(other["backbone"](x), model["model"](x))


def test_where_several_parts_fit_they_are_named_and_nothing_changes(tmp_path):
    saved(at("model", P()), tmp_path)
    other = at("a", P(), b=P(), c=P(4))
    with pytest.raises(ValueError, match="fits several parts of this model: 'a', 'b'; pass the one"):
        load_adapter(other, tmp_path)
    assert not list(named_adapters(other))


def test_the_longest_rest_of_the_names_counts(tmp_path):
    """``lin`` alone is in two places, ``inner.lin`` in one."""
    saved(at("model.inner", P()), tmp_path)
    other = at("backbone.inner", P(), other=P())
    with pytest.warns(UserWarning, match=r"What the adapter calls 'model' is 'backbone' in this model"):
        assert load_adapter(other, tmp_path) == ["backbone.inner.lin"]


def test_a_part_of_other_sizes_alone_is_refused_with_its_size(tmp_path):
    saved(at("model", P()), tmp_path)
    with pytest.raises(ValueError, match=r"has shape|differ"):
        load_adapter(at("backbone", P(9)), tmp_path)
    with pytest.raises(ValueError, match=r"another architecture: the adapter is for 'model.lin'"):
        load_adapter(at("backbone", nn.Linear(7, 5)), tmp_path)


def test_another_base_behind_another_prefix_is_refused(tmp_path):
    saved(at("model", P()), tmp_path)
    other = at("backbone", P())
    with torch.no_grad():
        other["backbone"].lin.weight.mul_(2.0)
    with pytest.raises(ValueError, match=r"trained on another base \(different: 'lin.weight'"):
        load_adapter(other, tmp_path)
    assert not list(named_adapters(other))


def test_what_trained_inside_the_prefix_comes_along(tmp_path):
    model = saved(at("model", P()), tmp_path, trainable_modules=["out"])
    other = at("backbone", P()).eval()
    with pytest.warns(UserWarning, match=r"What the adapter calls 'model'"):
        load_adapter(other, tmp_path)
    assert torch.equal(other["backbone"].out.weight, model["model"].out.weight)
    assert other["backbone"].out.weight.requires_grad


def test_what_trained_outside_of_the_prefix_is_refused_or_left_aside(tmp_path):
    saved(at("model", P(), out=nn.Linear(3, 2)), tmp_path, trainable_modules=["out"])
    other = at("backbone", P(), out=nn.Linear(3, 2)).eval()
    with pytest.raises(ValueError, match=r"'out.weight', 'out.bias', trained with the adapter.*head=False"):
        load_adapter(other, tmp_path)
    with pytest.warns(UserWarning, match=r"What the adapter calls 'model'"):
        assert load_adapter(other, tmp_path, head=False) == ["backbone.lin"]


def test_a_head_outside_is_not_taken_for_one_of_its_name_inside(tmp_path):
    """Both are called ``out`` once the prefix is off."""
    model = at("model", P(), out=nn.Linear(5, 3))
    saved(model, tmp_path, trainable_modules=["re:out", "model.out"])
    inner = P().eval()
    with pytest.warns(UserWarning, match=r"Not loaded from the adapter: 'out.bias', 'out.weight'"):
        load_adapter(inner, tmp_path, base_mismatch="warn")
    assert torch.equal(inner.out.weight, model["model"].out.weight)
    assert inner.out.weight.requires_grad


def test_what_lay_frozen_beside_the_part_is_not_asked_for(tmp_path):
    """A teacher with running statistics of its own, as in distillation."""
    model = saved(at("model", P(), teacher=nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))), tmp_path)
    x = torch.randn(4, 7)
    for other, path in ((P(), ""), (at("backbone", P()), "backbone")):
        with pytest.warns(UserWarning, match="'model'") if path else nullcontext():
            load_adapter(other.eval(), tmp_path)
        assert torch.equal(other.get_submodule(path)(x), model["model"](x))


def test_the_adapter_of_a_bare_layer_loads_into_the_model_around_it(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    around = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))
    around[2].load_state_dict(layer.state_dict())
    attach_uora(layer, UORAConfig(rank=4, target_modules="re:", trainable_modules=()))
    save_adapter(layer, tmp_path)
    with pytest.warns(UserWarning, match="loaded into '2'"):
        assert load_adapter(around, tmp_path) == ["2"]
