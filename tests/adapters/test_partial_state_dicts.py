"""State dicts of what trains, without A and B: both are rebuilt from the record, or it is an error."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    add_adapter,
    attach_uora,
    calibrate,
    named_adapters,
    refresh,
    set_adapter,
)
from lightning_uora.adapters.projections import OWNER
from tests.toys import projections_of

BOTH = ReinitSchedule(threshold=9.0, max_fraction=0.4, interpolation=0.5, vectors=("d", "b"))


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def config(**options) -> UORAConfig:
    return UORAConfig(**{"rank": 4, "target_modules": "all-linear", "trainable_modules": (), **options})


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(11, 7, generator=generator) for _ in range(2)]


def scramble_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_d.copy_(torch.randn(module.uora_d.shape, generator=generator))
            module.uora_b.copy_(torch.randn(module.uora_b.shape, generator=generator))


def run_of(refreshes: int = 2, **options) -> nn.Module:
    """A model whose A and B are no longer those of the draw."""
    model = base()
    attach_uora(model, config(**options))
    if options.get("init") == "inputs":
        calibrate(model, batches())
    for number in range(refreshes):
        scramble_(model, number)
        refresh(model, BOTH)
    return model


def kept(model: nn.Module, *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if any(part in key for part in parts)}


def same_projections(one: nn.Module, two: nn.Module) -> bool:
    a, b = (dict(projections_of(model).named_buffers()) for model in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


WHERE = {"fresh": 0, "refreshed otherwise": 3}
"""The model that a state dict is loaded into, by its refreshes."""


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vectors_and_record_alone_bring_a_and_b_back_bit_for_bit(share, where, dtype):
    model, other = base().to(dtype), base().to(dtype)
    for one, refreshes in ((model, 2), (other, WHERE[where])):
        attach_uora(one, config(share=share))
        for number in range(refreshes):
            scramble_(one, refreshes + number)
            refresh(one, BOTH)
    found = other.load_state_dict(kept(model, "uora_d", "uora_b", "record"), strict=False)
    assert same_projections(other, model)
    assert projections_of(other).record == projections_of(model).record
    x = batches()[0].to(dtype)
    assert torch.equal(other(x), model(x))
    assert f"{OWNER}.A_7" in found.missing_keys


PARTS = {
    "A": ("record", ".A_"),
    "B": ("record", ".B_"),
    "what is shared": ("record", "A_7", "A_5", "B_3", "B_5", "B_7"),
    "rows without places": ("record", ":rows"),
    "one matrix": ("record", "A_7"),
}


@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_and_b_is_completed(part, share):
    model, other = run_of(2, share=share), run_of(1, share=share)
    state = kept(model, "uora_d", "uora_b", *PARTS[part])
    if part == "rows without places":
        state = {key: value for key, value in state.items() if not key.endswith(":at")}
    if part == "what is shared":
        state = {key: value for key, value in state.items() if ":" not in key}
    other.load_state_dict(state, strict=False)
    assert same_projections(other, model)


def test_growth_by_gradient_is_replayed_without_a_gradient():
    from lightning_uora.reinit import gradients_collected

    model, other = run_of(1), run_of(0)
    with gradients_collected(model):
        model(batches()[0]).square().sum().backward()
        refresh(model, ReinitSchedule(threshold=9.0, max_fraction=0.5, growth="gradient", candidates=9))
    other.load_state_dict(kept(model, "uora_d", "uora_b", "record"), strict=False)
    assert same_projections(other, model)


@pytest.mark.parametrize("share", ["layer", "model"])
def test_a_from_the_inputs_that_is_kept_completes_b(share):
    model, other = run_of(2, share=share, init="inputs"), run_of(1, share=share, init="inputs")
    other.load_state_dict(kept(model, "uora_d", "uora_b", "record", ".A_"), strict=False)
    assert same_projections(other, model)


@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("only", ["", ".B_", ".A_7"])
def test_a_from_the_inputs_that_is_not_there_is_an_error_that_names_it(share, only):
    model = run_of(1, share=share, init="inputs")
    other = run_of(0, share=share, init="inputs")
    before = copy.deepcopy(dict(projections_of(other).named_buffers()))
    state = kept(model, "uora_d", "uora_b", "record", *filter(None, [only]))
    with pytest.raises(RuntimeError, match=r"uora_projections: the state dict lacks 'A_\d.*A comes from the"):
        other.load_state_dict(state, strict=False)
    after = dict(projections_of(other).named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_record_of_another_seed_is_an_error_where_a_and_b_are_absent():
    model, other = run_of(1, seed=3), run_of(0, seed=4)
    with pytest.raises(
        RuntimeError, match="its run had seed=3, but this model has seed=4; attach with the run's conf"
    ):
        other.load_state_dict(kept(model, "uora_d", "uora_b", "record"), strict=False)
    other.load_state_dict(model.state_dict())  # whole, they need no seed
    assert same_projections(other, model)


def test_a_strict_load_still_names_what_is_missing():
    with pytest.raises(RuntimeError, match=r'Missing key.*"uora_projections.A_5"'):
        run_of(0).load_state_dict({**base().state_dict(), **kept(run_of(1), "uora_d", "uora_b", "record")})


def test_vectors_without_a_record_leave_a_and_b_as_they_are():
    """Nothing can be known of them then: the documentation says so."""
    model, other = run_of(2), run_of(1)
    twin = copy.deepcopy(other)
    other.load_state_dict(kept(model, "uora_d", "uora_b"), strict=False)
    assert same_projections(other, twin)


def test_records_of_before_that_told_no_names_rebuild_too():
    model, other = run_of(2), run_of(1)
    state = kept(model, "uora_d", "uora_b", "record")
    told = json.loads(bytes(state[f"{OWNER}.record"].tolist()))
    del told["own"], told["draw"]
    state[f"{OWNER}.record"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    other.load_state_dict(state, strict=False)
    assert same_projections(other, model)


def test_an_adapter_that_waits_is_rebuilt_likewise():
    model, other = run_of(1), run_of(1)
    for one, refreshes in ((model, 2), (other, 1)):
        add_adapter(one, "second", config(seed=9))
        for number in range(refreshes):
            scramble_(one, 7 + number)
            refresh(one, BOTH)
        set_adapter(one, "default")
    state = {
        key: value
        for key, value in model.state_dict().items()
        if "uora" in key and (key.endswith("record") or (".A_" not in key and ".B_" not in key))
    }
    other.load_state_dict(state, strict=False)
    for name in ("default", "second"):
        set_adapter(model, name)
        set_adapter(other, name)
        assert same_projections(other, model), name
        assert torch.equal(other(batches()[0]), model(batches()[0]))


def test_assigned_to_a_model_on_meta_they_are_rebuilt():
    model = run_of(2)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    attach_uora(other, config())
    state = {key: value for key, value in model.state_dict().items() if ".A_" not in key and ".B_" not in key}
    other.load_state_dict(state, strict=False, assign=True)
    assert same_projections(other, model)
    assert torch.equal(other(batches()[0]), model(batches()[0]))


def test_b_of_a_resized_layer_that_is_not_there_is_an_error():
    model, other = run_of(1), run_of(0)
    projections_of(model).resized = ["B_7"]
    with pytest.raises(
        RuntimeError, match=r"lacks 'B_7', which cannot be rebuilt from the record \(its layer was"
    ):
        other.load_state_dict(kept(model, "uora_d", "uora_b", "record"), strict=False)
