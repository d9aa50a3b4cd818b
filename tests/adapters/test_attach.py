"""Attach, detach, merge, freeze: exact, undone exactly, and nothing changed after an error."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    adapters_disabled,
    attach_uora,
    calibrate,
    detach_uora,
    named_adapters,
    param_groups,
    refresh,
    summarize,
)
from tests import reference


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=10).eval()


def snapshot(model: nn.Module) -> dict:
    """Everything that an attach touches."""
    return {
        "classes": [type(m) for m in model.modules()],
        "children": [n for n, _ in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()],
        "keys": list(model.state_dict()),
        "dicts": [sorted(m.__dict__) for m in model.modules()],
    }


def test_attach_adapts_in_model_order_and_freezes_the_rest():
    model = vit()
    names = attach_uora(model, UORAConfig(rank=8))
    assert names == [n for n, _ in model.named_modules() if n.endswith(("attn.qkv", "attn.proj"))]
    assert [n for n, _ in named_adapters(model)] == names
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    vectors = {f"{n}.uora_{v}" for n in names for v in "db"}
    assert trainable == vectors | {"head.weight", "head.bias"}


@pytest.mark.parametrize("bias", ["none", "adapted", "all"])
def test_bias_trains_what_it_says(bias: str):
    model = vit()
    attach_uora(model, UORAConfig(rank=8, target_modules="qkv", bias=bias))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")} - {
        "head.bias"
    }
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")} - {"head.bias"}
    adapted = {n for n in every if "qkv" in n}
    assert trained == {"none": set(), "adapted": adapted, "all": every}[bias]


def test_attention_in_proj_bias_counts_as_a_bias():
    model = nn.MultiheadAttention(8, 2)
    attach_uora(model, UORAConfig(rank=2, bias="adapted"))
    assert model.in_proj_bias.requires_grad
    assert model.out_proj.bias.requires_grad


def test_detach_restores_classes_keys_and_requires_grad_exactly():
    model = vit()
    model.norm.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    before, x = snapshot(model), torch.randn(1, 3, 160, 160)
    expected = model(x)
    attach_uora(model, UORAConfig(rank=8, target_modules="all"))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    assert not torch.equal(model(x), expected)
    detach_uora(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


def test_merge_leaves_the_effective_weight():
    model = vit()
    x = torch.randn(2, 3, 160, 160)
    attach_uora(model, UORAConfig(rank=8, target_modules="all"))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, std=0.1)
    expected = model(x)
    keys = [k for k in model.state_dict() if "uora" not in k]
    detach_uora(model, merge=True)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_merge_of_half_weights_is_computed_in_float32():
    """And rounded once: the nearest bfloat16 but where float32 sums in another order may round otherwise."""
    model = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    attach_uora(model, UORAConfig(rank=32, target_modules="all"))
    nn.init.normal_(model[0].uora_b)
    owner, W = model.uora_projections, model[0]._parameters["weight"]
    d, b = model[0].uora_d, model[0].uora_b
    exact = reference.effective_weight(W, owner.down(64), owner.up(48), d, b)
    absolute = (t.detach().abs() for t in (W, owner.down(64), owner.up(48), d, b))
    room = 2e-6 * reference.effective_weight(*absolute)  # of 35 roundings
    low, high = (exact - room).bfloat16(), (exact + room).bfloat16()
    assert (low == high).float().mean() > 0.97
    detach_uora(model, merge=True)
    assert ((low <= model[0].weight) & (model[0].weight <= high)).all()


def test_a_merge_that_is_not_finite_changes_nothing():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    attach_uora(model, UORAConfig(rank=2, target_modules="all"))
    nn.init.normal_(model[0].uora_b)
    with torch.no_grad():
        model[1].uora_b[2] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="weight of module '1'; nothing was merged"):
        detach_uora(model, merge=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, atol=0, rtol=0)


def refused_models() -> dict:
    class TwoBit(nn.Conv2d):
        def __init__(self):
            super().__init__(5, 5, 1)
            self.weight = nn.Parameter(torch.zeros(5, 5, 1, 1, dtype=torch.int8), requires_grad=False)

    non_finite = nn.Linear(5, 5)
    non_finite.weight.data[1, 2] = float("inf")
    return {
        "embedding": (nn.Embedding(5, 5), "'bad' is a Embedding; UORA adapts"),
        "transposed convolution": (nn.ConvTranspose2d(5, 5, 3), "'bad' is a ConvTranspose2d"),
        "quantised": (TwoBit(), r"weight of module 'bad' \(TwoBit\) has dtype torch.int8"),
        "parametrised": (parametrizations.orthogonal(nn.Linear(5, 5)), "'bad' .* is parametrised"),
        "weight-normed": (torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), "is parametrised"),
        "lazy": (nn.LazyLinear(5), "has no shape yet"),
        "non-finite": (non_finite, "weight of module 'bad' has non-finite values"),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "embedding",
        "transposed convolution",
        "quantised",
        "parametrised",
        "weight-normed",
        "lazy",
        "non-finite",
    ],
)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(kind: str):
    bad, message = refused_models()[kind]
    model = nn.ModuleDict({"good": nn.Linear(5, 5), "bad": bad})
    before = snapshot(model) if kind != "lazy" else None
    with pytest.raises(ValueError, match=message):
        attach_uora(model, UORAConfig(rank=2, target_modules=["good", "bad"]))
    assert kind == "lazy" or snapshot(model) == before
    assert type(model["good"]) is nn.Linear


def test_old_weight_norm_is_refused():
    linear = nn.Linear(5, 5)
    linear.register_parameter("weight_g", nn.Parameter(linear.weight.norm(dim=1, keepdim=True)))
    linear.register_parameter("weight_v", nn.Parameter(linear.weight.detach().clone()))
    del linear.weight
    linear.weight = linear.weight_v * linear.weight_g
    with pytest.raises(ValueError, match="is not a plain parameter"):
        attach_uora(nn.Sequential(linear), UORAConfig(rank=2, target_modules="0"))
    assert not parametrize.is_parametrized(linear)


def test_presets_refuse_rather_than_skip_what_they_would_miss():
    model = nn.Sequential(nn.Linear(5, 5), parametrizations.orthogonal(nn.Linear(5, 5)))
    with pytest.raises(ValueError, match=r"'1' .* is parametrised"):
        attach_uora(model, UORAConfig(rank=2, target_modules="all-linear"))
    assert attach_uora(model, UORAConfig(rank=2, target_modules="all-linear", exclude_modules=["1"])) == ["0"]


def test_an_adapted_model_is_refused_and_so_is_one_with_an_adapted_part():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(5, 5))})
    attach_uora(model["net"], UORAConfig(rank=2, target_modules="all"))
    for root in (model, model["net"]):
        before = snapshot(root)
        with pytest.raises(ValueError, match="already adapted; call detach_uora"):
            attach_uora(root, UORAConfig(rank=2, target_modules="all"))
        assert snapshot(root) == before
    detach_uora(model)
    assert not list(named_adapters(model))


@pytest.mark.parametrize("call", [detach_uora, lambda m: adapters_disabled(m).__enter__()])
def test_calls_that_need_adapters_say_so(call):
    with pytest.raises(ValueError, match="holds no adapted model; call attach_uora first"):
        call(nn.Linear(3, 3))


def test_failure_in_the_middle_of_attaching_is_rolled_back(monkeypatch):
    from lightning_uora.adapters import attach

    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    before, inner, calls = snapshot(model), attach.specialise, []

    def second_fails(module, owner, index):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        return inner(module, owner, index)

    monkeypatch.setattr(attach, "specialise", second_fails)
    with pytest.raises(MemoryError):
        attach_uora(model, UORAConfig(rank=2, target_modules="all"))
    assert snapshot(model) == before


def test_the_global_random_state_is_not_touched():
    model = vit()
    before = torch.get_rng_state()
    attach_uora(model, UORAConfig(rank=8, target_modules="all"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_draw_and_nothing_else():
    models = [vit() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(7)
        attach_uora(model, UORAConfig(rank=8, seed=seed))
    one, same, other = ([*m.uora_projections.buffers()] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_modules_used_twice_are_adapted_once():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert attach_uora(model, UORAConfig(rank=2, target_modules="all")) == ["0"]


def test_mixed_dtypes_keep_their_own_and_projections_take_the_widest():
    model = nn.Sequential(nn.Linear(6, 6).bfloat16(), nn.Linear(6, 6))
    attach_uora(model, UORAConfig(rank=3, target_modules="all"))
    assert model.uora_projections.down(6).dtype == torch.float32
    nn.init.normal_(model[0].uora_b)
    assert model[0](torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_summary_counts_and_prints():
    model = vit()
    attach_uora(model, UORAConfig(rank=8, target_modules="qkv"))
    summary = summarize(model)
    width = model.blocks[0].attn.qkv.out_features
    head = sum(p.numel() for p in model.head.parameters())
    assert summary.adapter_params == len(model.blocks) * (8 + width)
    assert summary.trainable_params == summary.adapter_params + head
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    assert summary.trainable_fraction == summary.trainable_params / summary.total_params
    assert [layer.name for layer in summary.layers] == [n for n, _ in named_adapters(model)]
    text = str(summary)
    assert f"{summary.adapter_params:,}" in text
    assert re.search(r"\*\.attn\.qkv +│ +6 │", text)
    assert "head " in text
    assert max(map(len, text.splitlines())) <= 80
    assert summarize(vit()).layers == ()


def test_a_trained_adapter_survives_deepcopy_detach_of_the_copy():
    model = nn.Sequential(nn.Linear(5, 5))
    attach_uora(model, UORAConfig(rank=2, target_modules="all"))
    nn.init.normal_(model[0].uora_b)
    twin = copy.deepcopy(model)
    detach_uora(twin, merge=True)
    x = torch.randn(3, 5)
    torch.testing.assert_close(twin(x), model(x))
    assert type(twin[0]) is nn.Linear
    assert len(list(named_adapters(model))) == 1


def test_param_groups_give_the_vectors_a_rate_of_their_own_and_no_decay():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 2))
    (whole,) = param_groups(model, 1e-3, 1e-1, weight_decay=0.5)
    assert len(whole["params"]) == 6
    attach_uora(model, UORAConfig(rank=4, target_modules=["0", "2"], trainable_modules=["3"]))
    others, vectors = param_groups(model, 1e-3, 1e-1, weight_decay=0.5)
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.5)
    assert (vectors["lr"], vectors["weight_decay"]) == (1e-1, 0.0)
    assert {id(p) for p in others["params"]} == {id(p) for p in model[3].parameters()}
    expected = [v for _, module in named_adapters(model) for v in (module.uora_d, module.uora_b)]
    assert {id(p) for p in vectors["params"]} == {id(v) for v in expected}
    torch.optim.AdamW([others, vectors])
    model.requires_grad_(False)  # what trains is written down: freeze() does not change it
    assert len(param_groups(model, 1e-3, 1e-1)) == 2
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        param_groups(nn.Linear(3, 2).requires_grad_(False), 1e-3, 1e-1)


def test_inference_mode_is_refused_where_it_would_leave_a_model_that_cannot_train():
    x, model = torch.randn(9, 7), torch.nn.Sequential(torch.nn.Linear(7, 5))
    config = UORAConfig(3, "all-linear", init="inputs")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"attach_uora inside torch\.inference_mode"):
        attach_uora(model, config)
    attach_uora(model, config)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"calibrate inside torch\.inference_mode"):
        calibrate(model, [x])
    calibrate(model, [x])
    with torch.inference_mode(), pytest.raises(ValueError, match=r"a refresh inside torch\.inference_mode"):
        refresh(model, ReinitSchedule())
    model(x).sum().backward()
    assert model[0].uora_b.grad is not None
