"""A weighted sum of adapters, merged: W plus every update times its weight, and nothing but that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    adapter_names,
    add_adapter,
    attach_uora,
    detach_uora,
    named_adapters,
    refresh,
    set_adapter,
)
from tests.adapters.test_mixing import Attends, Net, call, inputs, scatter, three
from tests.reference import delta as reference_delta

WEIGHTS = {"default": 0.7, "second": -0.4, "third": 1.5}
FREE = {"trainable_modules": ()}
CASES: dict[str, Any] = {
    "linear": (Net, UORAConfig(4, ["rows", "mix"], **FREE), {}, (4, 7)),
    "convolution": (Net, UORAConfig(4, ["conv", "rows"], **FREE), {}, (4, 7)),
    "others": (
        Net,
        UORAConfig(4, ["rows", "mix"], **FREE),
        {"second": UORAConfig(9, ["rows"], seed=3, **FREE), "third": UORAConfig(4, ["mix", "conv"], **FREE)},
        (4, 7),
    ),
    "attention": (Attends, UORAConfig(4, "attention", **FREE), {}, (3, 8)),
}


def made(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    build, config, others, shape = CASES[kind]
    torch.manual_seed(0)
    return three(build().double(), config, others), inputs(*shape)


def deltas(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """By adapter and layer."""
    return {
        name: {path: layer.delta_weight().detach().clone() for path, layer in named_adapters(model, name)}
        for name in WEIGHTS
    }


@pytest.mark.parametrize("kind", CASES)
def test_the_merged_weight_is_the_base_plus_the_weighted_updates(kind: str):
    model, x = made(kind)
    base = copy.deepcopy(model)
    detach_uora(base)
    updates = deltas(model)
    if kind == "others":
        refresh(model, ReinitSchedule(threshold=0.9))  # rows of its own
        updates = deltas(model)
        assert updates["third"].keys() == {"conv", "mix"}
    weights = dict(base.named_parameters())
    expected = copy.deepcopy(weights)
    for name, weight in WEIGHTS.items():
        for path, delta in updates[name].items():
            key = f"{path}.in_proj_weight" if path == "attention" else f"{path}.weight"
            expected[key] = expected[key] + weight * delta
    detach_uora(model, merge=True, name=WEIGHTS)
    assert adapter_names(model) == []
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[key], rtol=1e-12, atol=1e-12)
    assert not torch.equal(call(model, x), call(base, x))


def test_one_of_weight_one_is_the_plain_merge_bit_for_bit():
    (one, _), (two, _) = made("linear"), made("linear")
    detach_uora(one, merge=True, name="second")
    detach_uora(two, merge=True, name={"second": 1.0})
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_stand_in_of_one_that_waits_has_its_vectors_and_the_update_of_the_formula():
    model, _ = made("linear")
    layers = dict(named_adapters(model, "second"))
    assert list(layers) == ["rows", "mix"]
    set_adapter(model, "second")
    for path, module in named_adapters(model):
        waiting = layers[path]
        assert waiting.uora_d is module.uora_d
        assert waiting.uora_b is module.uora_b
        A, B, d, b = module._uora_tensors(module.adapted_parts[0].n)
        torch.testing.assert_close(waiting.delta_weight(), reference_delta(A, B, d, b))


def test_heads_stay_of_the_one_that_has_some_and_several_are_refused():
    torch.manual_seed(0)
    model = Net().double()
    attach_uora(model, UORAConfig(4, ["rows"], **FREE))
    scatter(model, 1)
    add_adapter(model, "headed", UORAConfig(4, ["mix"], trainable_modules=["head"]))
    scatter(model, 2)
    head = model.head.weight.detach().clone()
    set_adapter(model, "default")
    both = copy.deepcopy(model)
    detach_uora(both, merge=True, name={"default": 1.0, "headed": 1.0})
    assert torch.equal(both.head.weight, head)
    add_adapter(model, "other", UORAConfig(4, ["mix"], trainable_modules=["head"]))
    scatter(model, 3)
    set_adapter(model, "default")
    x = inputs(4, 7)
    before = call(model, x)
    with pytest.raises(
        ValueError, match=r"'headed' and 'other' have each trained 'head\.weight', .*head=Fal"
    ):
        detach_uora(model, merge=True, name={"headed": 1.0, "default": 1.0, "other": 1.0})
    assert torch.equal(call(model, x), before)
    assert adapter_names(model) == ["default", "headed", "other"]


WRONG: dict[str, tuple[Any, str]] = {
    "none": ({}, "names no adapter"),
    "unknown": ({"default": 1.0, "sceond": 1.0}, "no adapter is called 'sceond'; near misses: 'second'"),
    "not finite": ({"default": float("nan")}, "a finite number"),
    "far too large": ({"default": 1.7e308, "third": 1.7e308}, "non-finite values into the weight of module"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_summed_is_one_line_and_the_model_as_it_was(kind: str):
    model, x = made("linear")
    set_adapter(model, "second")
    before, (weights, message) = call(model, x), WRONG[kind]
    with pytest.raises(ValueError, match=message) as raised:
        detach_uora(model, merge=True, name=weights)
    assert "\n" not in str(raised.value)
    assert torch.equal(call(model, x), before)
    with pytest.raises(ValueError, match="name can be a mapping only with merge=True"):
        detach_uora(model, name={"default": 1.0})


def test_a_quantised_base_becomes_plain_with_the_sum():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"), nn.Tanh(), nn.Linear(32, 3))
    model[0].weight.data = torch.randn(32, 64)
    model = model.to("cpu")
    attach_uora(model, UORAConfig(4, ["0"], **FREE))
    scatter(model, 1)
    add_adapter(model, "second")
    scatter(model, 2)
    W = model[0].dequantised()
    parts = [
        layer.delta_weight() for name in ("default", "second") for _, layer in named_adapters(model, name)
    ]
    with pytest.raises(ValueError, match=r"dequantize=True\), which leaves plain Linear"):
        detach_uora(model, merge=True, name={"default": 0.5, "second": 2.0})
    detach_uora(model, merge=True, dequantize=True, name={"default": 0.5, "second": 2.0})
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight, W + 0.5 * parts[0] + 2.0 * parts[1])


def test_a_tied_weight_is_left_to_the_other_module():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    model[1].weight = model[0].weight
    attach_uora(model, UORAConfig(4, ["0"], **FREE))
    scatter(model, 1)
    add_adapter(model, "second")
    scatter(model, 2)
    W = model[1].weight.detach().clone()
    detach_uora(model, merge=True, name={"default": 1.0, "second": 1.0})
    assert torch.equal(model[1].weight, W)
    assert not torch.equal(model[0].weight, W)
