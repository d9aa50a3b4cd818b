"""What holds for every model, configuration and schedule, not only for the examples: drawn by hypothesis."""

from __future__ import annotations

import copy
import math
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    rebuild,
    refresh,
    save_adapter,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=30)
sizes = st.integers(1, 7)
LAYERS = {
    "Linear": lambda n, m, k: nn.Linear(n, m),
    "Linear without bias": lambda n, m, k: nn.Linear(n, m, bias=False),
    "transformers Conv1D": lambda n, m, k: Conv1D(m, n),
    "Conv1d": lambda n, m, k: nn.Conv1d(n, m, k),
    "Conv2d grouped": lambda n, m, k: nn.Conv2d(2 * n, 2 * m, k, groups=2),
    "Conv3d": lambda n, m, k: nn.Conv3d(n, m, (k, 1, 2)),
    "MultiheadAttention": lambda n, m, k: nn.MultiheadAttention(2 * n, 2),
    "MultiheadAttention of three widths": lambda n, m, k: nn.MultiheadAttention(2 * n, 2, kdim=m, vdim=k),
    "LayerNorm": lambda n, m, k: nn.LayerNorm(n),
    "BatchNorm": lambda n, m, k: nn.BatchNorm1d(n),
    "Embedding": lambda n, m, k: nn.Embedding(n, m),
}


@st.composite
def models(draw) -> nn.Module:
    """Up to five layers of any kind in two blocks, an adaptable one among them; some parameters frozen."""
    torch.manual_seed(draw(st.integers(0, 9)))
    kinds = [
        draw(st.sampled_from(list(LAYERS)[:8])),
        *draw(st.lists(st.sampled_from(list(LAYERS)), max_size=4)),
    ]
    layers = [LAYERS[kind](draw(sizes), draw(sizes), draw(st.integers(1, 3))) for kind in kinds]
    model = nn.ModuleDict({"first": nn.ModuleList(layers[::2]), "rest": nn.ModuleDict()})
    for index, layer in enumerate(layers[1::2]):
        model["rest"][f"layer{index}"] = layer
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    return model.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))


def names_of(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, (nn.ModuleDict, nn.ModuleList))
    ]


@st.composite
def configs(draw, model: nn.Module, **fixed) -> UORAConfig:
    """Any rank, seed and target pattern; a pattern may match nothing or what cannot be adapted."""
    pattern = st.one_of(
        st.sampled_from(
            ["attention", "all-linear", "all", "*", "first.*", "rest.layer?", "re:.*[02]", "re:rest.*"]
        ),
        st.sampled_from(names_of(model)),
        st.lists(st.sampled_from(names_of(model)), min_size=1, max_size=3),
    )
    options = {
        "rank": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 5)),
        "target_modules": draw(pattern),
        "exclude_modules": draw(st.sampled_from([(), (), ("first.0",)])),
        "trainable_modules": draw(st.sampled_from([(), "auto"])),
        "init": draw(st.sampled_from(["orthogonal", "kaiming_uniform"])),
        "bias": draw(st.sampled_from(["none", "adapted", "all"])),
        "share": draw(st.sampled_from(["model", "layer"])),
    }
    return UORAConfig(**{**options, **fixed})


@st.composite
def schedules(draw) -> ReinitSchedule:
    return ReinitSchedule(
        threshold=draw(st.floats(0.1, 2.0)),
        max_fraction=draw(st.floats(0.1, 1.0)),
        interpolation=draw(st.sampled_from([0.2, 0.5, 1.0])),
        vectors=draw(st.sampled_from([("d",), ("b",), ("d", "b")])),
        preserve_function=draw(st.booleans()),
    )


@st.composite
def adapted(draw) -> nn.Module:
    """A model with adapters at every layer that takes one, and vectors as after some training."""
    model = draw(models())
    attach_uora(model, draw(configs(model, target_modules="all", exclude_modules=())))
    scatter(model, draw(st.integers(0, 9)))
    return model


def scatter(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in named_adapters(model):
        for vector in (layer.uora_d, layer.uora_b):
            nn.init.normal_(vector, generator=generator)


def everything(model: nn.Module) -> dict:
    """All that an attach may touch, by identity where objects must stay."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "training": [module.training for module in model.modules()],
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Equal keys in equal order, equal values, equal types."""
    return list(ones) == list(others) and all(
        one.dtype == others[name].dtype and torch.equal(one, others[name]) for name, one in ones.items()
    )


@repeatable
@given(st.data())
def test_attach_then_detach_is_the_identity_and_a_refused_attach_changes_nothing(data):
    model = data.draw(models())
    before, state = everything(model), values(model)
    try:
        names = attach_uora(model, data.draw(configs(model)))
    except ValueError:
        names = []
    else:
        assert names
        assert everything(model)["modules"] != before["modules"]
        scatter(model, 0)
        if data.draw(st.booleans()):
            refresh(model, data.draw(schedules()))
        detach_uora(model)
    assert everything(model) == before
    assert same(values(model), state)


@repeatable
@given(st.data())
def test_patterns_adapt_what_they_name_and_nothing_else(data):
    model = data.draw(models())
    named = data.draw(st.lists(st.sampled_from(names_of(model)), min_size=1, max_size=3, unique=True))
    adaptable = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    expected = [n for n, m in model.named_modules() if n in named and isinstance(m, adaptable)]
    config = UORAConfig(rank=2, target_modules=named, trainable_modules=())
    if len(expected) < len(named):
        with pytest.raises(ValueError, match="target_modules="):
            attach_uora(model, config)
    else:
        assert attach_uora(model, config) == expected
        assert [n for n, _ in named_adapters(model)] == expected
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.uora_{v}" for name in expected for v in "db"}


@repeatable
@given(st.data())
def test_save_then_load_is_the_identity(data):
    model = data.draw(models())
    twin = copy.deepcopy(model)
    attach_uora(model, data.draw(configs(model, target_modules="all", exclude_modules=())))
    scatter(model, data.draw(st.integers(0, 9)))
    for _ in range(data.draw(st.integers(0, 2))):
        refresh(model, data.draw(schedules()))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, data.draw(st.sampled_from(["record", "full"])))
        names = load_adapter(twin, folder)
    assert names == [name for name, _ in named_adapters(model)]
    saved, loaded = values(model), values(twin)
    assert same({name: loaded[name] for name in saved}, saved)
    assert set(loaded) == set(saved)
    assert twin.uora_projections.config == model.uora_projections.config
    assert twin.uora_projections.record == model.uora_projections.record
    for (_, one), (_, two) in zip(named_adapters(model), named_adapters(twin), strict=True):
        assert torch.equal(one.delta_weight(), two.delta_weight())
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


def projections(model: nn.Module) -> dict[str, Tensor]:
    owner = model.uora_projections
    names = {name.partition(":")[0] for name in owner.matrices}
    return {name: owner.current(name).clone() for name in sorted(names)}


def before_refresh(before: dict[str, Tensor], name: str) -> Tensor:
    """A layer's own copy starts as the shared one."""
    return before[name] if name in before else before[name.rpartition("_")[0]]


@repeatable
@given(adapted(), schedules())
def test_a_refresh_touches_exactly_the_chosen_rows_and_columns(model, schedule):
    before = projections(model)
    chosen = refresh(model, schedule)
    after = projections(model)
    assert {key.removesuffix(":rows") for key in chosen} | set(before) == set(after)
    for name, now in after.items():
        was = before_refresh(before, name)
        rows, columns = (
            torch.zeros(now.shape[0], dtype=torch.bool),
            torch.zeros(now.shape[1], dtype=torch.bool),
        )
        (columns if name.startswith("B_") else rows)[chosen.get(name, [])] = True
        rows[chosen.get(f"{name}:rows", [])] = True
        touched = rows[:, None] | columns[None, :]
        assert torch.equal(now[~touched], was[~touched])
        for i in rows.nonzero().flatten().tolist():
            assert now.shape[1] == 1 or not torch.equal(now[i], was[i])
        for i in columns.nonzero().flatten().tolist():
            assert now.shape[0] == 1 or not torch.equal(now[:, i], was[:, i])


@repeatable
@given(adapted(), schedules())
def test_a_refresh_leaves_everything_but_the_chosen_entries_alone(model, schedule):
    """The base not at all; of d and b the chosen entries, by the cosine for each side that turned."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    base = {n: p.clone() for n, p in model.named_parameters() if not n.endswith(("uora_d", "uora_b"))}
    layers = dict(named_adapters(model))
    vectors = {name: (m.uora_d.clone(), m.uora_b.clone()) for name, m in layers.items()}
    chosen = refresh(model, schedule, optimizer)
    assert same({n: p.clone() for n, p in model.named_parameters() if n in base}, base)
    lam = schedule.interpolation
    cosine = (1 - lam) / math.hypot(lam, 1 - lam) if schedule.preserve_function else 1.0
    for index, (name, layer) in enumerate(layers.items()):
        own = f"_{index}" if model.uora_projections.config.share == "layer" else ""
        m = len(layer.uora_b)
        turned_A = {i for part in layer.adapted_parts for i in chosen.get(f"A_{part.n}{own}", [])}
        turned_B, turned_rows = chosen.get(f"B_{m}{own}", []), chosen.get(f"B_{m}{own}:rows", [])
        sides = [(i in turned_A) + (i in turned_B) for i in range(len(layer.uora_d))]
        expected_d = vectors[name][0].double() * torch.tensor([cosine**s for s in sides]).double()
        expected_b = vectors[name][1].double() * torch.tensor(
            [cosine if j in turned_rows else 1.0 for j in range(m)]
        )
        torch.testing.assert_close(layer.uora_d.double(), expected_d, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.uora_b.double(), expected_b, atol=1e-6, rtol=1e-6)
        momentum = [optimizer.state[v]["exp_avg"] for v in (layer.uora_d, layer.uora_b)]
        assert [i for i, s in enumerate(sides) if s] == [i for i, x in enumerate(momentum[0]) if x == 0]
        assert list(turned_rows) == [j for j, x in enumerate(momentum[1]) if x == 0]


@repeatable
@given(st.data())
def test_a_and_b_rebuilt_from_the_record_are_bit_equal(data):
    """In place, and in a twin that knows only the configuration and the record."""
    model = data.draw(models())
    twin = copy.deepcopy(model)
    config = data.draw(configs(model, target_modules="all", exclude_modules=()))
    attach_uora(model, config)
    for number in range(data.draw(st.integers(1, 3))):
        scatter(model, number)
        refresh(model, data.draw(schedules()))
    expected = projections(model)
    attach_uora(twin, config)
    twin.uora_projections.record = copy.deepcopy(model.uora_projections.record)
    for one in (twin, model):
        rebuild(one)
        assert set(projections(one)) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in projections(one).items())
