"""A layer's own rows: they stand for a copy of A and B in every form, and take the memory of rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.adapters.functional import add_delta, factored_linear
from lightning_uora.adapters.own_rows import NOTHING, Own, packed, replaced, unpacked
from tests import reference

R, M, N = 6, 9, 11


def own(which: str) -> Own:
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(2, N, generator=g, dtype=torch.float64)
    columns = torch.randn(M, 3, generator=g, dtype=torch.float64)
    lines = torch.randn(2, R, generator=g, dtype=torch.float64)
    return Own(
        *((rows, torch.tensor([1, 4])) if "A" in which else (None, None)),
        *((columns, torch.tensor([0, 2, 5])) if "B" in which else (None, None)),
        *((lines, torch.tensor([3, 7])) if "b" in which else (None, None)),
    )


def by_hand(A, B, mine: Own):
    A, B = A.clone(), B.clone()
    if mine.rows is not None:
        A[[1, 4]] = mine.rows
    if mine.columns is not None:
        B[:, [0, 2, 5]] = mine.columns
    if mine.lines is not None:
        B[[3, 7]] = mine.lines
    return A, B


def numbers():
    g = torch.Generator().manual_seed(0)
    shapes = ((M, N), (R, N), (M, R), (R,), (M,))
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("which", ["A", "B", "b", "AB", "ABb"])
def test_both_forms_compute_with_a_layers_own_rows_and_pass_gradcheck(which: str):
    W, A, B, d, b = numbers()
    mine = own(which)
    exact = reference.effective_weight(W, *by_hand(A, B, mine), d, b)
    torch.testing.assert_close(add_delta(W, A, B, d, b, mine), exact)
    x = torch.randn(5, N, dtype=torch.float64)
    torch.testing.assert_close(factored_linear(x, W, None, A, B, d, b, mine), x @ exact.t())
    d, b, x = d.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, b: add_delta(W, A, B, d, b, mine), (d, b))
    assert torch.autograd.gradcheck(lambda x, d, b: factored_linear(x, W, None, A, B, d, b, mine), (x, d, b))


def test_backward_keeps_what_is_shared_and_own_and_no_copy_of_both():
    W, A, B, d, b = numbers()
    mine, kept = own("ABb"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_delta(W, A, B, d.requires_grad_(), b.requires_grad_(), mine)
    places = {t.data_ptr() for t in (A, B, d, b, *mine.tensors)}
    assert {t.data_ptr() for t in kept} <= places


def test_parts_of_b_have_their_own_columns_and_rows():
    _, A, B, _, _ = numbers()
    for which in ("AB", "ABb"):
        mine = own(which)
        part, left = mine.part(B, 2, 4)
        assert torch.equal(left.up(part), by_hand(A, B, mine)[1][2:6])
        assert left.rows is mine.rows


def test_rows_are_put_among_those_that_are_there():
    values, places = replaced(None, None, 0, [2, 5], torch.tensor([[2.0], [5.0]]))
    values, places = replaced(values, places, 0, [1, 5, 7], torch.tensor([[1.0], [55.0], [7.0]]))
    assert places.tolist() == [1, 2, 5, 7]
    assert values.flatten().tolist() == [1.0, 2.0, 55.0, 7.0]


@pytest.mark.parametrize("rows", [[], [0], [7, 8], list(range(0, 1000, 3)), [4095]])
def test_a_record_is_packed_and_unpacked(rows):
    record = [{"step": 3, "interpolation": 0.2, "rows": {"A_9_0": rows, "B_7_0": [1]}}]
    assert unpacked(packed(record)) == record
    assert unpacked(record) == record
    assert len(packed(record)[0]["rows"]["A_9_0"]) <= max(rows, default=0) // 6 + 8


class Two(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))


def refreshed(vectors=("d", "b"), **config) -> nn.Module:
    model = Two()
    attach_uora(model, UORAConfig(rank=8, target_modules="all-linear", **config))
    g = torch.Generator().manual_seed(2)
    for number in range(3):
        with torch.no_grad():
            for _, layer in named_adapters(model):
                layer.uora_d.copy_(torch.randn(8, generator=g))
                layer.uora_b.copy_(torch.randn(len(layer.uora_b), generator=g))
        refresh(model, ReinitSchedule(threshold=0.8, vectors=vectors, interpolation=0.3 + 0.2 * number))
    return model


def test_memory_grows_with_rows_that_were_refreshed():
    model = refreshed(vectors=("d",))
    owner = model.uora_projections
    for index, (n, m) in enumerate(((12, 16), (16, 12))):
        ever = {i for entry in owner.record for i in entry["rows"].get(f"A_{n}_{index}", ())}
        assert 0 < len(ever) < 8
        assert owner.matrices[f"A_{n}_{index}:rows"].shape == (len(ever), n)
        assert owner.matrices[f"B_{m}_{index}:columns"].shape == (m, len(ever))
        assert f"A_{n}_{index}" not in owner.matrices


def as_before(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that versions with whole copies wrote."""
    owner, state = model.uora_projections, {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("uora_projections.")
        if key == name or ":" not in name:
            state[key] = value
        else:
            whole = name.partition(":")[0]
            state[f"uora_projections.{whole}"] = owner.current(whole).clone()
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("vectors", [("d",), ("b",), ("d", "b")])
def test_whole_copies_of_before_become_rows(vectors, assign):
    model, twin = refreshed(vectors), refreshed()
    twin.load_state_dict(as_before(model), assign=assign)
    for name in {name.partition(":")[0] for name in model.uora_projections.matrices}:
        assert torch.equal(twin.uora_projections.current(name), model.uora_projections.current(name))
    for (_, one), (_, other) in zip(named_adapters(model), named_adapters(twin), strict=True):
        assert torch.equal(one.delta_weight(), other.delta_weight())
    if vectors == ("d",):
        assert set(twin.uora_projections.matrices) == set(model.uora_projections.matrices)
    again = refreshed()
    again.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert torch.equal(again(torch.ones(2, 12)), twin(torch.ones(2, 12)))


def test_a_folder_with_full_projections_names_places_and_refuses_wrong_ones(tmp_path):
    model = refreshed()
    save_adapter(model, tmp_path / "one", "full")
    twin = Two()
    load_adapter(twin, tmp_path / "one")
    assert torch.equal(model(torch.ones(2, 12)), twin(torch.ones(2, 12)))
    owner = twin.uora_projections
    good = {name: t.clone() for name, t in owner.named_buffers()}
    for change in (
        lambda at: at + 100,
        lambda at: -at,
        lambda at: at.flip(0),
        lambda at: at[:-1],
        lambda at: at.float(),
    ):
        with pytest.raises(ValueError, match="is not a projection of this model"):
            owner.set({**good, "A_12_0:rows:at": change(good["A_12_0:rows:at"])})
    assert torch.equal(model(torch.ones(2, 12)), twin(torch.ones(2, 12)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_own_rows_are_cast_and_places_are_not(dtype):
    model = refreshed().to(dtype)
    owner = model.uora_projections
    assert {t.dtype for t in owner.matrices.values()} == {dtype}
    assert owner._buffers["A_12_0:rows:at"].dtype == torch.long
    model(torch.ones(2, 12, dtype=dtype)).sum().backward()


def test_nothing_of_ones_own_is_the_shared_one_itself():
    _, A, B, _, _ = numbers()
    assert NOTHING.down(A) is A
    assert NOTHING.up(B) is B


@pytest.mark.parametrize("vectors", [("d",), ("b",), ("d", "b")])
def test_a_kept_weight_is_built_again_when_own_rows_come(vectors):
    """Found by the machine of any order: the sources of a kept weight are more after a first refresh."""
    model = Two()
    attach_uora(model, UORAConfig(rank=8, target_modules="all-linear"))
    with torch.no_grad():
        for _, layer in named_adapters(model):
            layer.uora_d.copy_(torch.linspace(0.01, 1, 8))
            layer.uora_b.copy_(torch.linspace(0.01, 1, len(layer.uora_b)))
    model.eval()
    with torch.no_grad():
        before = model[0].weight.clone()
        refresh(model, ReinitSchedule(threshold=0.5, vectors=vectors, preserve_function=False))
        now = model[0].weight
    torch.testing.assert_close(now, model[0]._parameters["weight"] + model[0].delta_weight())
    assert not torch.equal(now, before)
