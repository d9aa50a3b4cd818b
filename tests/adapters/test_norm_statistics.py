"""BatchNorm of the frozen base: what it computes with, what it keeps, and when it moves after all."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_uora import (
    UORACallback,
    UORAConfig,
    add_adapter,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    remove_adapter,
    save_adapter,
    set_adapter,
)
from lightning_uora.adapters import moving_norms
from tests.toys import Toy, data, trainer


def convnet(affine: bool = True) -> nn.Sequential:
    """With statistics as of a pretrained network, and a head with a BatchNorm of its own."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(7 * 5 * 5, affine=affine), nn.Linear(7 * 5 * 5, 3))
    body = nn.Sequential(
        nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7)
    )
    model = nn.Sequential()
    model.body, model.head = body, head
    for norm in (body[1], body[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model


CONFIG = UORAConfig(rank=3, target_modules="all", trainable_modules="head")
x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def statistics(model: nn.Module, of: str) -> dict[str, torch.Tensor]:
    named = model.named_buffers()
    return {n: b.clone() for n, b in named if n.startswith(of) and ("running" in n or "batches" in n)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_base_computes_as_in_evaluation_and_keeps_its_statistics_while_it_trains():
    model = convnet()
    body = copy.deepcopy(model.body).eval()
    attach_uora(model, CONFIG)
    before = statistics(model, "body")
    for _ in range(2):
        model.train()  # as users and Lightning do at any time
        torch.testing.assert_close(model.body(x), body(x), rtol=0, atol=0)
        model(x).sum().backward()
    assert same(statistics(model, "body"), before)


def test_the_heads_own_batch_norm_moves():
    for affine in (True, False):
        model = convnet(affine)
        attach_uora(model, CONFIG)
        before = statistics(model, "head")
        model.train()(x)
        assert not same(statistics(model, "head"), before), affine
        assert moving_norms(model) == ["head.1"]


def test_moving_is_what_torch_does():
    model = convnet()
    twin = copy.deepcopy(model).train()
    attach_uora(model, UORAConfig(3, "all", trainable_modules="head", batch_norm="moving"))
    model.train()
    torch.testing.assert_close(model(x), twin(x))
    assert same(statistics(model, ""), statistics(twin, ""))


def test_what_is_trained_or_unfrozen_by_hand_moves():
    model = convnet()
    attach_uora(model, UORAConfig(3, "all", trainable_modules=["head", "body.1"]))
    model.body[4].requires_grad_(True)
    before = statistics(model, "body")
    model.train()(x)
    after = statistics(model, "body")
    assert all(not torch.equal(before[n], after[n]) for n in before)


def test_detaching_gives_back_the_base_and_its_modes_exactly():
    model = convnet()
    model.train()
    model.body[1].eval()  # by the user
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attach_uora(model, CONFIG)
    model.head.requires_grad_(False).eval()
    model(x)
    model.head.train()
    detach_uora(model)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, state[n]) for n, a in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_copies_and_pickles_keep_theirs_too():
    model = convnet()
    attach_uora(model, CONFIG)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = statistics(twin, "body")
        twin.train()(x)
        assert same(statistics(twin, "body"), before)
        detach_uora(twin)
        assert not any(m._forward_pre_hooks for m in twin.modules())


@pytest.mark.filterwarnings("ignore:running statistics have changed")  # of the head
def test_they_stay_with_the_base_whatever_adapter_is_active(tmp_path):
    model = convnet()
    attach_uora(model, CONFIG)
    add_adapter(model, "second")
    before = statistics(model, "body")
    for name in ("second", "default", None):
        set_adapter(model, name)
        model.train()(x)
    set_adapter(model, "default")
    remove_adapter(model, "second")
    model.train()(x)
    assert same(statistics(model, "body"), before)
    save_adapter(model, tmp_path)
    fresh = convnet()
    load_adapter(fresh, tmp_path)
    fresh.train()(x)
    assert same(statistics(fresh, "body"), before)


class Images(Toy):
    def build(self):
        self.body, self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), nn.Linear(6, 3)


def test_what_has_never_seen_a_batch_is_said():
    callback = UORACallback(rank=2, target_modules="body.0", trainable_modules="head")
    with pytest.warns(UserWarning, match=r"'body.1' has never seen a batch.*batch_norm='moving'"):
        trainer(callback).fit(Images(), data())


def test_the_active_adapter_decides_and_detaching_one_of_two_frees_what_is_nobodys():
    model = convnet()
    attach_uora(model, CONFIG)
    add_adapter(model, "second", UORAConfig(3, "all", trainable_modules="head", batch_norm="moving"))
    assert len(moving_norms(model)) == 3
    set_adapter(model, "default")
    assert moving_norms(model) == ["head.1"]
    set_adapter(model, "second")
    assert len(moving_norms(model)) == 3
    detach_uora(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_evolved_norms_are_held_like_any_other():
    evo = pytest.importorskip("timm.layers").EvoNorm2dB0(5)
    with torch.no_grad():
        evo.running_var.fill_(2.0)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), evo, nn.Conv2d(5, 3, 1))
    attach_uora(model, UORAConfig(2, ["0", "2"], trainable_modules=()))
    model.train()(x)
    assert torch.equal(evo.running_var, torch.full((5,), 2.0))
    assert moving_norms(model) == []


def test_a_trainer_keeps_them_and_finds_what_was_exchanged_since():
    class Exchanged(Images):
        def on_fit_start(self):  # where strategies convert to SyncBatchNorm, after callbacks' setup
            old = self.body[1]
            self.body[1] = nn.BatchNorm1d(6).requires_grad_(False)
            self.body[1].load_state_dict(old.state_dict())

    module = Exchanged()
    module.body[1].running_mean.fill_(0.3)
    callback = UORACallback(rank=2, target_modules="body.0", trainable_modules="head")
    trainer(callback).fit(module, data())
    assert torch.equal(module.body[1].running_mean, torch.full((6,), 0.3))
    assert any(bool(layer.uora_b.any()) for _, layer in named_adapters(module))
