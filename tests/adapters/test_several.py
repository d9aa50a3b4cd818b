"""Several adapters on one base: one computes, the others wait, and each comes back as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    adapter_names,
    add_adapter,
    attach_uora,
    detach_uora,
    export_peft,
    load_adapter,
    named_adapters,
    refresh,
    remove_adapter,
    save_adapter,
    set_adapter,
    summarize,
    use_adapters,
)
from lightning_uora.adapters.names import SHELF


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 7))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


X = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
CONFIG = UORAConfig(rank=4, target_modules=["body.0", "body.2"])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, steps: int = 3, seed: int = 0) -> Tensor:
    """A few steps of AdamW on what wants gradients; the output after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    goal = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - goal).square().mean().backward()
        optimizer.step()
    return model(X).detach()


def two() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with two trained adapters, and what each puts out."""
    model = net()
    attach_uora(model, CONFIG)
    outputs = {"default": train(model, seed=1)}
    assert add_adapter(model, "second") == ["body.0", "body.2"]
    outputs["second"] = train(model, seed=2)
    return model, outputs


def test_each_adapter_with_its_head_computes_when_it_is_set():
    model, outputs = two()
    assert adapter_names(model) == ["default", "second"]
    for name in ("default", "second", "second", "default"):
        set_adapter(model, name)
        assert torch.equal(model(X), outputs[name])
    assert not torch.equal(outputs["default"], outputs["second"])


def test_a_fresh_one_changes_nothing_and_trains_alone():
    """Its head starts as a copy; those that wait get no gradient and do not move."""
    model = net()
    attach_uora(model, CONFIG)
    before = train(model)
    waiting = [v.detach().clone() for _, m in named_adapters(model) for v in (m.uora_d, m.uora_b)]
    add_adapter(model, "fresh")
    with torch.no_grad():
        assert torch.equal(model(X), model.head(model.body(X)))
    for _, module in named_adapters(model):
        assert not module.uora_b.any()
    train(model, seed=5)
    set_adapter(model, "default")
    now = [v for _, m in named_adapters(model) for v in (m.uora_d, m.uora_b)]
    assert all(torch.equal(a, b) for a, b in zip(waiting, now, strict=True))
    assert torch.equal(model(X), before)


def test_an_optimizer_finds_its_parameters_again():
    """The very same objects come back, so a run that was interrupted by another goes on."""
    model = net()
    attach_uora(model, CONFIG)
    alone = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, other = (
        torch.optim.AdamW(ps, lr=0.05)
        for ps in (parameters, [p for p in alone.parameters() if p.requires_grad])
    )
    for step in range(4):
        if step == 2:
            add_adapter(model, "between")
            train(model, seed=9)
            set_adapter(model, "default")
            assert [id(p) for p in model.parameters() if p.requires_grad] == list(map(id, parameters))
        for one, its in ((model, optimizer), (alone, other)):
            its.zero_grad()
            one(X).square().mean().backward()
            its.step()
    assert torch.equal(model(X), alone(X))


def test_the_state_dict_of_one_adapter_is_as_ever_and_of_two_comes_back():
    one = net()
    attach_uora(one, CONFIG)
    plain = list(one.state_dict())
    model, outputs = two()
    twin = net()
    attach_uora(twin, CONFIG)
    add_adapter(twin, "second")
    twin.load_state_dict(model.state_dict())
    for name, wanted in outputs.items():
        set_adapter(twin, name)
        assert torch.equal(twin(X), wanted)
    remove_adapter(twin, "default")
    assert list(twin.state_dict()) == plain
    assert adapter_names(twin) == ["second"]


def test_a_and_b_are_one_memory_for_equal_draws_also_after_a_cast():
    model, outputs = two()

    def memories() -> set[int]:
        every = model.named_buffers(remove_duplicate=False)
        found = [b for n, b in every if n.endswith(("A_7", "B_6", "A_6", "B_7"))]
        assert len(found) == 8
        return {b.data_ptr() for b in found}

    assert len(memories()) == 4
    model.double()
    assert len(memories()) == 4
    for name in outputs:
        set_adapter(model, name)
        assert {v.dtype for _, m in named_adapters(model) for v in (m.uora_d, m.uora_b)} == {torch.float32}
        torch.testing.assert_close(model(X.double()).float(), outputs[name], rtol=1e-4, atol=1e-5)


def test_adapters_of_other_ranks_seeds_and_layers_stand_side_by_side():
    model, outputs = two()
    base = [p.detach().clone() for p in net().body.parameters()]
    names = add_adapter(model, "wide", UORAConfig(rank=9, target_modules=["body.2"], seed=7))
    assert names == ["body.2"]
    outputs["wide"] = train(model, seed=4)
    assert {m.uora_d.numel() for _, m in named_adapters(model)} == {9}
    for name, wanted in outputs.items():
        set_adapter(model, name)
        assert torch.equal(model(X), wanted)
    set_adapter(model, "wide")
    detach_uora(model)
    assert SHELF not in model._modules
    assert all(torch.equal(a, b) for a, b in zip(base, model.body.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert not any("uora" in key for key in model.state_dict())


def test_refreshed_rows_belong_to_their_adapter():
    model, _ = two()
    refresh(model, ReinitSchedule(threshold=9.0, max_fraction=0.5))
    refreshed = model(X).detach()
    set_adapter(model, "default")
    untouched = model(X).detach()
    set_adapter(model, "second")
    assert torch.equal(model(X), refreshed)
    fresh, outputs = two()
    set_adapter(fresh, "default")
    assert torch.equal(untouched, outputs["default"])


def test_none_is_the_base_until_one_is_set_again():
    model, outputs = two()
    set_adapter(model, None)
    set_adapter(model, None)
    with torch.no_grad():
        hidden = net().body(X)
        assert torch.equal(model(X), model.head(hidden))
    set_adapter(model, "default")
    assert torch.equal(model(X), outputs["default"])
    set_adapter(model, "second")
    assert torch.equal(model(X), outputs["second"])


def test_one_that_was_switched_off_computes_again_when_it_is_set_after_another():
    model, outputs = two()
    set_adapter(model, None)
    add_adapter(model, "third")
    set_adapter(model, "second")
    assert torch.equal(model(X), outputs["second"])


@pytest.mark.parametrize("name", ["default", "second"])
def test_each_is_saved_by_its_name_and_loads_beside_others(tmp_path, name: str):
    model, outputs = two()
    save_adapter(model, tmp_path / name, name=name)
    assert adapter_names(model) == ["default", "second"]
    assert torch.equal(model(X), outputs["second"])  # what computes is what computed
    fresh = net()
    load_adapter(fresh, tmp_path / name)
    assert torch.equal(fresh(X), outputs[name])
    assert load_adapter(model, tmp_path / name, name="third") == ["body.0", "body.2"]
    assert adapter_names(model) == ["default", "second", "third"]
    assert torch.equal(model(X), outputs[name])
    for one, wanted in outputs.items():
        set_adapter(model, one)
        assert torch.equal(model(X), wanted)


def test_copies_and_pickles_carry_all_of_them():
    model, outputs = two()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("default", "second"):
            set_adapter(twin, name)
            assert torch.equal(twin(X), outputs[name])
    assert torch.equal(model(X), outputs["second"])


def test_merging_takes_the_one_that_computes():
    model, outputs = two()
    set_adapter(model, "default")
    detach_uora(model, merge=True)
    torch.testing.assert_close(model(X), outputs["default"])
    assert adapter_names(model) == []


def test_the_functions_take_a_name_and_leave_what_computes(tmp_path):
    model, outputs = two()
    add_adapter(model, "wide", UORAConfig(rank=9, target_modules=["body.2"]))
    set_adapter(model, "second")
    table = summarize(model, name="wide")
    assert table.adapter_params == 9 + 7
    assert table.waiting == ("default", "second")
    assert "inactive adapters: default, wide" in str(summarize(model))
    assert dict(named_adapters(model, "second")) == dict(named_adapters(model))
    assert [path for path, _ in named_adapters(model, "wide")] == ["body.2"]
    with pytest.raises(ValueError, match="no adapter is called 'wild'; near misses: 'wide'"):
        next(named_adapters(model, "wild"))
    peft = pytest.importorskip("peft")
    export_peft(model, tmp_path / "peft", name="default")
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "peft").eval()
    torch.testing.assert_close(loaded(X), outputs["default"])
    assert torch.equal(model(X), outputs["second"])
    detach_uora(model, merge=True, name="default")
    torch.testing.assert_close(model(X), outputs["default"])


def test_what_is_not_trainable_wants_no_gradient_and_the_table_counts_one():
    model, _ = two()
    count = summarize(model).adapter_params
    add_adapter(model, "still", trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert summarize(model).adapter_params == count


def broken(tmp_path: Any) -> Any:
    model, _ = two()
    save_adapter(model, tmp_path)
    (tmp_path / "uora_config.json").write_text("{")
    return tmp_path


WRONG = {
    "unknown": (lambda m, t: set_adapter(m, "defalt"), "called 'defalt'; near misses: 'default'"),
    "far off": (lambda m, t: set_adapter(m, "xyz"), "there are: 'default', 'second'"),
    "twice": (lambda m, t: add_adapter(m, "second"), "the model already has an adapter 'second'"),
    "dot": (lambda m, t: add_adapter(m, "a.b"), "must not be empty or contain a dot"),
    "in use": (lambda m, t: remove_adapter(m, "second"), "is the active adapter"),
    "remove unknown": (lambda m, t: remove_adapter(m, "first"), "no adapter is called 'first'"),
    "targets": (
        lambda m, t: add_adapter(m, "third", UORAConfig(4, ["nothing"])),
        "matches no module",
    ),
    "save unknown": (lambda m, t: save_adapter(m, t, name="no"), "no adapter is called 'no'"),
    "load in use": (lambda m, t: load_adapter(m, saved(t), name="second"), "is already adapted, by 'second'"),
    "load damaged": (lambda m, t: load_adapter(m, broken(t), name="third"), "is damaged"),
    "load another base": (lambda m, t: load_adapter(m, foreign(t), name="third"), "another base"),
}  # fmt: skip


def saved(folder: Any) -> Any:
    model, _ = two()
    save_adapter(model, folder)
    return folder


def foreign(folder: Any) -> Any:
    torch.manual_seed(9)
    model = Net()
    attach_uora(model, CONFIG)
    train(model)
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_is_one_line_and_changes_nothing(tmp_path, kind: str):
    model, outputs = two()
    keys, wanting = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    do, message = WRONG[kind]
    with pytest.raises(ValueError, match=message) as raised:
        do(model, tmp_path)
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == wanting
    for name, wanted in [*outputs.items()][::-1]:
        set_adapter(model, name)
        assert torch.equal(model(X), wanted)


def test_a_plain_model_has_none():
    assert adapter_names(net()) == []
    with pytest.raises(ValueError, match="holds no adapted model"):
        add_adapter(net(), "x")


def test_switched_off_is_saved_and_merged_with_its_own_head(tmp_path):
    model, outputs = two()
    set_adapter(model, None)
    save_adapter(model, tmp_path)
    fresh = net()
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(X), outputs["second"])
    twin, _ = two()
    twin.load_state_dict(model.state_dict())
    set_adapter(twin, "second")
    assert torch.equal(twin(X), outputs["second"])
    detach_uora(model, merge=True)
    torch.testing.assert_close(model(X), outputs["second"])


def test_what_stood_in_the_model_before_is_cast_with_it():
    model = net()
    attach_uora(model, UORAConfig(rank=4, target_modules=["body.0"], trainable_modules=()))
    base = train(model)
    add_adapter(model, "headed", UORAConfig(rank=4, target_modules=["body.2"], trainable_modules=["head"]))
    train(model)
    model.double()
    set_adapter(model, "default")
    torch.testing.assert_close(model(X.double()).float(), base)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.lin(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.model = Inner()

    def forward(self, x):
        return self.model(x)


def moved_by(seed: int, model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    return model


def adapted_outer(seed: int = 0) -> Outer:
    model = Outer()
    attach_uora(model, UORAConfig(2, ["lin"], trainable_modules=["head"]))
    return moved_by(seed, model)


@pytest.mark.parametrize("given", ["whole", "part", "around"])
@pytest.mark.parametrize("saved", ["whole", "part", "around"])
def test_a_second_adapter_loads_whatever_was_saved_and_whatever_is_given(tmp_path, given, saved):
    """Names of the whole, of the part, of a module around: each finds its place beside the first adapter."""

    def seen(model: Outer, how: str) -> nn.Module:
        return {"whole": model, "part": model.model, "around": nn.ModuleDict({"outer": model})}[how]

    other, model = adapted_outer(7), adapted_outer(8)
    save_adapter(seen(other, saved), tmp_path)
    first, x = model(torch.ones(1, 5)), torch.ones(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(seen(model, given), tmp_path, name="second")
    assert torch.equal(model(x), other(x))
    assert adapter_names(seen(model, given)) == ["default", "second"]
    set_adapter(seen(model, given), "default")
    assert torch.equal(model(x), first)
    with use_adapters(seen(model, given), ["second", "default"]):
        assert torch.allclose(model(torch.ones(2, 5)), torch.cat([other(x), first]), atol=1e-6)
    remove_adapter(seen(model, given), "second")
    assert adapter_names(model) == ["default"]


def test_a_second_adapter_that_is_refused_by_a_part_leaves_the_whole_as_it_was(tmp_path):
    class Wider(Outer):
        def __init__(self):
            super().__init__()
            self.model.lin = nn.Linear(6, 7)

    wider = Wider()
    attach_uora(wider, UORAConfig(2, ["lin"], trainable_modules=["head"]))
    save_adapter(wider, tmp_path)
    model = adapted_outer()
    keys, x = list(model.state_dict()), torch.ones(1, 5)
    wants, before = [p.requires_grad for p in model.parameters()], model(x)
    with pytest.raises(ValueError, match=r"shape|another"):
        load_adapter(model.model, tmp_path, name="second")
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.equal(model(x), before)


def test_an_adapter_is_added_through_a_part_and_a_copy_of_a_part_is_refused():
    model = adapted_outer()
    assert add_adapter(model.model, "second") == ["lin"]
    assert adapter_names(model) == ["default", "second"]
    copied = copy.deepcopy(model.model)
    with pytest.raises(ValueError, match="the model that you gave to attach_uora"):
        set_adapter(copied, "default")
