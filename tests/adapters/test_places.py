"""Adapters are found wherever they are: in wrappers, in several roots, from a part, on other devices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertForSequenceClassification

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    adapters_disabled,
    add_adapter,
    attach_uora,
    detach_uora,
    export_peft,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
    summarize,
)
from lightning_uora.adapters import attach_beside, attachments
from lightning_uora.adapters.names import named_modules, named_parameters, plain, unwrapped

ALL = ReinitSchedule(threshold=9.0, max_fraction=0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def move(model: nn.Module) -> nn.Module:
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": lambda: compiled(net()),
    "compiled inside": lambda: Around(compiled(net())),
    "twice": lambda: compiled(Around(compiled(net()))),
    "Fabric": lambda: Around(Fabric(accelerator="cpu", devices=1).setup(net())),
    "data parallel": lambda: Around(nn.DataParallel(net())),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through_by_patterns_heads_and_files(wrapper, tmp_path):
    """An adapter of the wrapped model has the plain model's names, and loads there."""
    model = WRAPPERS[wrapper]()
    names = attach_uora(model, UORAConfig(rank=3, target_modules=["body.*"]))
    inner = "model." if "model" in dict(unwrapped(model).named_children()) else ""
    assert names == [f"{inner}body.0", f"{inner}body.2"]
    assert [name for name, _ in named_adapters(model)] == names
    assert [name for name, _ in summarize(model).trained] == [f"{inner}head"]
    move(model)
    x = torch.randn(4, 6)
    want = model(x).detach()
    save_adapter(model, tmp_path / "own")
    other = Around(net()) if inner else net()
    load_adapter(other, tmp_path / "own")
    torch.testing.assert_close(other(x), want)
    if inner:
        export_peft(unwrapped(model).model, tmp_path / "peft")
        text = (tmp_path / "peft" / "adapter_config.json").read_text()
        assert '"base_model_class": "Net"' in text
        assert "_orig_mod" not in text
    detach_uora(model, merge=True)
    torch.testing.assert_close(model(x), want)
    assert not attachments(model)


def test_a_compiled_transformer_is_adapted_like_a_plain_one():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertForSequenceClassification(BertConfig(vocab_size=33, **sizes))
    plain_names = attach_uora(copy.deepcopy(bert), UORAConfig(rank=4))
    around = Around(compiled(bert))
    assert attach_uora(around, UORAConfig(rank=4)) == [f"model.{name}" for name in plain_names]
    assert around.model.classifier.weight.requires_grad


def test_plain_names():
    assert plain("model._orig_mod.body.0.weight") == "model.body.0.weight"
    assert plain("_orig_mod.a._forward_module") == "a"
    assert plain("my_orig_mod.weight") == "my_orig_mod.weight"
    model = Around(compiled(net()))
    assert list(named_modules(model)) == ["", "model", *(f"model.{n}" for n, _ in net().named_modules() if n)]
    assert list(named_parameters(model)) == [f"model.{n}" for n, _ in net().named_parameters()]


def towers() -> nn.ModuleDict:
    torch.manual_seed(1)
    model = nn.ModuleDict({"vision": net(), "text": Net()})
    attach_uora(model["vision"], UORAConfig(rank=3, target_modules=["body.*"]))
    attach_uora(model["text"], UORAConfig(rank=2, target_modules=["body.0"], share="model"))
    return move(model)


def test_every_root_is_counted_refreshed_disabled_and_detached():
    model, x = towers(), torch.randn(4, 6)
    assert [one.path for one in attachments(model)] == ["vision", "text"]
    assert summarize(model).adapter_params == (3 + 5) + (3 + 6) + (2 + 5)
    rows = refresh(model, ALL)
    assert {key.partition(".")[0] for key in rows} == {"vision", "text"}
    assert all(len(one.owner.record) == 1 for one in attachments(model))
    with adapters_disabled(model), torch.no_grad():
        assert torch.equal(model["vision"].body(x), net().body(x))
    want = [tower(x).detach() for tower in model.values()]
    detach_uora(model, merge=True)
    for tower, expected in zip(model.values(), want, strict=True):
        torch.testing.assert_close(tower(x), expected, atol=1e-5, rtol=1e-5)
    assert not list(named_adapters(model))


def test_two_owners_at_one_root_keep_apart():
    model, x = net(), torch.randn(4, 6)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    attach_uora(model, UORAConfig(rank=3, target_modules=["body.0"]))
    with pytest.raises(ValueError, match=r"'body\.0' is already adapted"):
        attach_beside(model, UORAConfig(rank=2, target_modules=["body.*"]))
    attach_beside(model, UORAConfig(rank=2, target_modules=["body.2"]))
    first, second = attachments(model)
    assert ([n for n, _ in first.layers], [n for n, _ in second.layers]) == (["body.0"], ["body.2"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "body.0.uora_d", "body.0.uora_b", "body.2.uora_d", "body.2.uora_b", "head.weight", "head.bias",
    }  # fmt: skip
    move(model)
    assert len(refresh(model, ALL)) == 4
    want = model(x).detach()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), want)
    with pytest.raises(ValueError, match="takes one adapted model, but there are several"):
        add_adapter(model, "another")
    detach_uora(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    torch.testing.assert_close(twin(x), want)


def test_a_copy_of_a_part_shares_nothing_with_the_refreshes_of_the_model():
    """A momentum teacher that is never used: its presence changes no row."""
    plain_model, model = net(), net()
    for one in (plain_model, model):
        attach_uora(one, UORAConfig(rank=4, target_modules=["body.*"]))
    model.teacher = copy.deepcopy(model.body).requires_grad_(False)
    with torch.no_grad():
        for one in (plain_model, model):
            for index, layer in enumerate((one.body[0], one.body[2])):
                layer.uora_d.copy_(torch.tensor([0.01, 1.0, 1.0, 1.0]).roll(index))
        model.teacher[0].uora_d.fill_(9.0)
    rows = refresh(model, ReinitSchedule())
    assert rows
    assert rows == refresh(plain_model, ReinitSchedule())


def test_the_part_and_the_whole_are_as_good_as_the_root(tmp_path):
    whole, x = Around(net()), torch.randn(4, 6)
    attach_uora(whole, UORAConfig(rank=3, target_modules=["body.*"]))
    move(whole)
    want = whole(x).detach()
    with adapters_disabled(whole.model):
        torch.testing.assert_close(whole(x), net()(x))
    save_adapter(whole.model, tmp_path / "part")
    other = net()
    assert load_adapter(other, tmp_path / "part") == ["body.0", "body.2"]
    torch.testing.assert_close(other(x), want)
    with pytest.raises(ValueError, match="does not hold everything that was trained"):
        save_adapter(whole.model.body, tmp_path / "less")
    assert not (tmp_path / "less").exists()
    detach_uora(whole.model, merge=True)
    torch.testing.assert_close(whole(x), want)
    inner = net()
    attach_uora(inner, UORAConfig(rank=3, target_modules=["body.*"]))
    around = Around(inner)
    save_adapter(around, tmp_path / "around")
    assert load_adapter(Around(net()), tmp_path / "around") == ["model.body.0", "model.body.2"]


@pytest.mark.skipif(torch.__version__ < "2.14", reason="fake CUDA tensors of torch 2.7 ask for a driver")
@pytest.mark.parametrize("compute", ["merged", "factored"])
def test_a_and_b_are_where_the_layer_is(compute):
    """A part on another device (fake, no GPU needed) gets A and B there."""
    model = Around(net())
    attach_uora(model, UORAConfig(rank=3, target_modules=["body.*"], compute=compute))
    inside = set(model.model.modules())
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            device = "cuda" if module in inside else "cpu"
            for store in (module._parameters, module._buffers):
                for name, value in list(store.items()):
                    fake = torch.empty(value.shape, device=device)
                    store[name] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
        assert model(torch.empty(4, 6, device="cuda")).device.type == "cuda"


def test_copies_on_other_devices_follow_the_owner():
    model = net()
    attach_uora(model, UORAConfig(rank=3, target_modules=["body.0"]))
    owner, here = model.uora_projections, torch.device("cpu")
    A, B = owner.down(6), owner.up(5)
    assert owner.found_on(here, A, B)[0] is A
    owner.elsewhere[id(A), torch.device("meta")] = ((id(A), A.data_ptr(), A._version - 1), A, "stale")
    assert owner.found_on(torch.device("meta"), A)[0] != "stale"
    assert copy.deepcopy(model).uora_projections.elsewhere == {}


@pytest.mark.parametrize("compute", ["merged", "factored"])
def test_a_model_on_meta_runs_and_gets_its_storage_by_assignment(compute):
    config = UORAConfig(rank=3, target_modules=["0", "2", "3"], trainable_modules=(), compute=compute)

    def build() -> nn.Module:
        torch.manual_seed(0)
        parts = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        return nn.Sequential(*parts[:3], parts[3]) if not compute else nn.ModuleList(parts)

    def run(model: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        y = model[2](model[1](model[0](x)))
        return model[3](y, y, y)[0]

    with torch.device("meta"):
        model = build()
        attach_uora(model, config)
        out = run(model, torch.randn(2, 7, 6))
        assert out.is_meta
        out.sum().backward()
    base = build()
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    other = build()
    attach_uora(other, config)
    x = torch.randn(2, 7, 6)
    for one in (model, other):
        for number, (_, module) in enumerate(named_adapters(one)):
            nn.init.normal_(module.uora_b, generator=torch.Generator().manual_seed(number))
    torch.testing.assert_close(run(model, x), run(other, x))


def test_a_copy_of_a_layer_copies_nothing_else():
    """Pickled, a layer of a model with a large embedding is as small as one of a model without."""
    sizes = []
    for rows in (1, 5_000):
        model = nn.ModuleDict(
            {"body": nn.Linear(6, 5), "table": nn.Embedding(rows, 40), "head": nn.Linear(5, 2)}
        )
        attach_uora(model, UORAConfig(rank=3, target_modules=["body"], trainable_modules=["head"]))
        sizes.append(len(pickle.dumps(model["body"])))
        assert copy.deepcopy(model["body"])._uora.owner is not model.uora_projections
    assert abs(sizes[1] - sizes[0]) < 100


@pytest.mark.parametrize("copied", [False, True])
def test_detaching_the_part_that_holds_everything_leaves_nothing_behind(copied):
    whole = Around(net())
    keys, trains = list(whole.state_dict()), {n: p.requires_grad for n, p in whole.named_parameters()}
    attach_uora(whole, UORAConfig(rank=3, target_modules=["body.*"], trainable_modules=()))
    if copied:
        whole = copy.deepcopy(whole)
        assert summarize(whole).layers
    detach_uora(whole.model.body)
    assert list(whole.state_dict()) == keys
    assert {n: p.requires_grad for n, p in whole.named_parameters()} == trains
    assert attach_uora(whole, UORAConfig(rank=2, target_modules=["body.0"])) == ["model.body.0"]
    assert "uora_projections" in dict(whole.named_children())


def test_a_head_around_the_root_is_in_the_file_after_freeze(tmp_path):
    def build() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(6, 6)), "head": nn.Linear(6, 3)})

    model = build()
    attach_uora(model["backbone"], UORAConfig(rank=3, target_modules=["0"]))
    save_adapter(model, tmp_path / "before")  # what trains is written down when something is saved
    with torch.no_grad():
        model["head"].weight.add_(1.0)
    model.requires_grad_(False)
    save_adapter(model, tmp_path / "after")
    other = build()
    load_adapter(other, tmp_path / "after")
    assert torch.equal(other["head"].weight, model["head"].weight)
