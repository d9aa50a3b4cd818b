"""What is written to memory that a layer's weight was read from reaches the base, and nothing is stale."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_uora import UORAConfig, attach_uora, detach_uora
from tests import reference

MODULES = {
    "Linear": lambda: nn.Linear(7, 5),
    "transformers Conv1D": lambda: Conv1D(5, 7),
    "Conv2d": lambda: nn.Conv2d(3, 5, (3, 2)),
}


def each(parts, job) -> None:
    for number, part in enumerate(parts):
        job(part, number)


ALIASES = {
    "view": lambda w: w.flatten(1).view(-1).fill_(7.0) if w.is_contiguous() else w.t().view(-1).fill_(7.0),
    "T": lambda w: w.transpose(0, 1).mul_(3.0),
    "slice": lambda w: w[:2].fill_(7.0),
    "row": lambda w: w[1].zero_(),
    "entry of a row": lambda w: w[1].__setitem__(2, 4.0),
    "rows": lambda w: each(w, lambda row, number: row.fill_(number)),
    "unbind": lambda w: each(w.unbind(1), lambda part, number: part.fill_(number)),
    "split": lambda w: each(w.split(2), lambda part, number: part.mul_(number)),
    "chunk": lambda w: each(w.chunk(3), lambda part, number: part.mul_(number)),
    "torch.split": lambda w: each(torch.split(w, 2), lambda part, number: part.mul_(number)),
    "flatten": lambda w: torch.flatten(w, 2).mul_(2.0) if w.dim() > 2 else torch.t(w).mul_(2.0),
    "narrow": lambda w: w.narrow(0, 1, 2).neg_(),
    "torch.select": lambda w: torch.select(w, 1, 2).neg_(),
    "permute": lambda w: w.permute(*reversed(range(w.dim()))).exp_(),
    "unsqueeze": lambda w: w.unsqueeze(0).neg_(),
    "data, then a view": lambda w: nn.init.ones_(w.data.transpose(0, 1)),
    "view, then data": lambda w: w[:2].data.fill_(7.0),
    "detach, then a slice": lambda w: w.detach()[:, 2].neg_(),
    "numpy": lambda w: w.detach().numpy().__setitem__(slice(0, 2), 7.0),
    "data.numpy": lambda w: w.data.numpy().__imul__(2.0),
    "view.numpy": lambda w: w.transpose(0, 1).numpy().__setitem__(0, 7.0),
    "asarray": lambda w: np.asarray(w).fill(2.0),
    "dlpack": lambda w: torch.from_dlpack(w.detach()).fill_(3.0),
    "storage": lambda w: w.untyped_storage().copy_(torch.full_like(w, 2.0).untyped_storage()),
    "out": lambda w: torch.add(w, 1.0, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 0.0),
    "data =": lambda w: setattr(w, "data", torch.full_like(w, 3.0)),
    "optimizer": lambda w: torch.optim.SGD([grown(nn.Parameter(w))], lr=0.5).step(),
}


def grown(p: Tensor) -> Tensor:
    p.grad = torch.ones_like(p)
    return p


def adapted(make, training: bool, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = make()
    root = nn.Sequential(layer)
    attach_uora(root, UORAConfig(rank=3, target_modules=["0"], trainable_modules=(), **options))
    with torch.no_grad():
        layer.uora_b.normal_()
        layer.uora_d.normal_()
    return root.train(training), layer


def oracle(root: nn.Module, layer: nn.Module) -> Tensor:
    """What the layer must compute with, from d, b, A, B and W as they are."""
    W, owner = layer._parameters["weight"].detach(), root.uora_projections
    (part,) = layer.adapted_parts
    flat = W.t() if part.transposed else W.flatten(1)
    found = reference.effective_weight(flat, owner.down(part.n), owner.up(part.m), layer.uora_d, layer.uora_b)
    return found.t() if part.transposed else found.reshape(W.shape)


def given(kind: str) -> Tensor:
    return torch.randn(2, 3, 7, 5) if kind == "Conv2d" else torch.randn(3, 7)


def same_everywhere(root: nn.Module, layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        kept, again = root(x), root(x)
    torch.testing.assert_close(layer.weight.detach().double(), oracle(root, layer), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept, root(x).detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(kept, again)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("state", ["training", "evaluation", "kept"])
@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("kind", MODULES)
def test_what_is_written_through_an_alias_reads_back(kind, alias, state, mode):
    """With P a plain parameter of the effective weight's numbers: after the same write both hold the same."""
    root, layer = adapted(MODULES[kind], state == "training")
    x = given(kind)
    with mode():
        if state == "kept":
            root(x)
    with torch.no_grad():
        P = torch.empty_strided(layer.weight.shape, layer.weight.stride()).copy_(layer.weight)
        ALIASES[alias](P)
    with mode() if alias != "optimizer" else torch.no_grad():
        ALIASES[alias](layer.weight)
        torch.testing.assert_close(layer.weight.clone(), P, atol=1e-5, rtol=1e-5)
    same_everywhere(root, layer, x)
    detached = P - layer.delta_weight().detach()
    detach_uora(root)
    torch.testing.assert_close(layer.weight.data, detached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alias", ["view", "slice", "torch.split", "numpy", "dlpack", "foreach"])
@pytest.mark.parametrize("training", [True, False])
def test_a_written_alias_that_is_gone_has_reached_the_base_at_once(alias, training):
    _, layer = adapted(MODULES["Linear"], training)
    before = layer._parameters["weight"].clone()
    with torch.no_grad():
        ALIASES[alias](layer.weight)
    layer._uora.cache.clear()
    assert (layer._parameters["weight"] - before).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_an_alias_that_stays_is_seen_by_each_forward_and_by_a_state_dict(training):
    root, layer = adapted(MODULES["Linear"], training)
    x = torch.randn(3, 7)
    with torch.no_grad():
        rows = torch.narrow(layer.weight, 0, 1, 2)  # a plain view
        for value in (1.0, 2.0):
            rows.fill_(value)
            torch.testing.assert_close(root(x)[:, 1], x.sum(1) * value + layer.bias[1])
            rows = torch.narrow(layer.weight, 0, 1, 2)
        rows.fill_(5.0)
        saved = root.state_dict()["0.weight"].clone()
        rows.fill_(6.0)
        wanted = copy.deepcopy(root.state_dict())
        rows.fill_(7.0)
        root.load_state_dict(wanted)
        del rows
    assert not torch.equal(saved, wanted["0.weight"])
    assert torch.equal(layer._parameters["weight"], wanted["0.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_reading_an_alias_changes_nothing(training):
    root, layer = adapted(MODULES["Linear"], training)
    before = layer._parameters["weight"].clone()
    with torch.no_grad():
        read = layer.weight
        for numbers in (read.numpy(), np.asarray(read), torch.from_dlpack(read), read[:], read.T.T):
            np.testing.assert_array_equal(np.asarray(numbers), reference_numbers(layer))
        assert read.untyped_storage().nbytes() == 140
        assert read.data_ptr() % 4 == 0
        root(torch.randn(3, 7))
    del read
    assert torch.equal(layer._parameters["weight"], before)


def reference_numbers(layer: nn.Module) -> np.ndarray:
    return layer.weight.detach().clone().numpy()


POISONS = {
    "numpy": lambda w: w.numpy().fill(0.0),
    "data.view": lambda w: w.data.view(-1).fill_(1.0),
    "data.numpy": lambda w: w.data.numpy().fill(0.0),
    "dlpack": lambda w: torch.from_dlpack(w).fill_(0.0),
    "storage": lambda w: w.untyped_storage().fill_(0),
    "data of a plain view": lambda w: torch.flatten(w).data.fill_(1.0),
    "numpy of a plain view": lambda w: torch.flatten(w).numpy().fill(1.0),
    "pointer": lambda w: __import__("ctypes").memset(w.data_ptr(), 0, 4 * w.numel()),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("size", [(7, 5), (130, 65)])
@pytest.mark.parametrize("poison", POISONS)
def test_a_kept_weight_that_is_written_to_is_never_used_for_another(poison, size, mode):
    """In evaluation the memory that was handed out is the cache's own."""
    root, layer = adapted(lambda: nn.Linear(*size), training=False)
    x = torch.randn(3, size[0])
    with mode():
        before = root(x)
        POISONS[poison](layer.weight)
        after = root(x)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after.clone(), root(x).detach(), atol=1e-4, rtol=1e-4)
    same_everywhere(root, layer, x)


AUGMENTED = {
    "+=": lambda m, name: exec(f"m.{name} += 1.0", {"m": m}),
    "*=": lambda m, name: exec(f"m.{name} *= 2.0", {"m": m}),
    "-= of a row": lambda m, name: exec(f"m.{name}[1] -= 3.0", {"m": m}),
    "data +=": lambda m, name: exec(f"m.{name}.data += 1.0", {"m": m}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", AUGMENTED)
@pytest.mark.parametrize("kind", [*MODULES, "attention"])
def test_augmented_assignment_is_applied_once(kind, how, training):
    make = MODULES.get(kind, lambda: nn.MultiheadAttention(4, 2))
    name = "in_proj_weight" if kind == "attention" else "weight"
    _, layer = adapted(make, training) if kind != "attention" else attention(training)
    plain = nn.Module()
    plain.__dict__[name] = getattr(layer, name).detach().clone()
    base = layer._parameters[name]
    with torch.no_grad():
        AUGMENTED[how](plain, name)
        AUGMENTED[how](layer, name)
    torch.testing.assert_close(getattr(layer, name).detach(), plain.__dict__[name], atol=1e-5, rtol=1e-5)
    assert layer._parameters[name] is base
    assert not base.requires_grad


def attention(training: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2)
    attach_uora(layer, UORAConfig(rank=3, target_modules="all", trainable_modules=()))
    nn.init.normal_(layer.uora_b)
    return layer.train(training), layer


def test_what_was_read_is_assigned_back_without_a_change_and_another_layers_is_refused():
    _, layer = adapted(MODULES["Linear"], training=True)
    _, other = adapted(MODULES["Linear"], training=True)
    before = layer._parameters["weight"].clone()
    layer.weight = layer.weight
    assert torch.equal(layer._parameters["weight"], before)
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = other.weight


def test_an_older_reading_that_is_assigned_reads_back():
    _, layer = adapted(MODULES["Linear"], training=True)
    with torch.no_grad():
        old = layer.weight
        layer.uora_b.mul_(2.0)
        layer.weight = old
    torch.testing.assert_close(layer.weight.detach(), old, atol=1e-5, rtol=1e-5)


def test_attention_resets_to_what_reads_back():
    _, layer = attention(training=True)
    torch.manual_seed(1)
    layer._reset_parameters()
    plain = nn.MultiheadAttention(4, 2)
    torch.manual_seed(1)
    plain._reset_parameters()
    torch.testing.assert_close(layer.in_proj_weight.detach(), plain.in_proj_weight.detach())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_layer_resets_to_what_reads_back(kind, training):
    _, layer = adapted(MODULES[kind], training)
    plain = MODULES[kind]()
    for one in (layer, plain):
        torch.manual_seed(1)
        one.reset_parameters()
    torch.testing.assert_close(layer.weight.detach(), plain.weight.detach(), atol=1e-5, rtol=1e-5)


def test_what_would_change_the_shape_is_refused():
    _, layer = adapted(MODULES["Linear"], training=True)
    for change in ("t_()", "resize_(7, 5)", "unsqueeze_(0)"):
        with pytest.raises(ValueError, match="would change the shape of an adapted layer's weight"):
            exec(f"w.{change}", {"w": layer.weight})
    with pytest.raises(ValueError, match=r"weight of shape \(5, 7\) cannot take shape \(7, 5\)"):
        layer.weight.data = torch.zeros(7, 5)
    with pytest.raises(ValueError, match=r"cannot take shape \(3,\)"):
        layer.weight.data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"cannot be given other memory \(set_\)"):
        layer.weight.set_(torch.zeros(5, 7))


def test_a_weight_held_past_a_detach_is_the_plain_layers():
    root, layer = adapted(MODULES["Linear"], training=True)
    with torch.no_grad():
        held = layer.weight
        detach_uora(root)
        held[:2].fill_(4.0)
    assert torch.equal(layer.weight[:2], torch.full((2, 7), 4.0))


def test_gradients_do_not_hang_on_who_watches():
    _, layer = adapted(MODULES["Linear"], training=True)
    (layer.weight.view(-1) * 2.0).sum().backward()
    got = layer.uora_b.grad.clone()
    layer.uora_b.grad = None
    (layer.weight * 2.0).sum().backward()
    torch.testing.assert_close(got, layer.uora_b.grad)
    assert len(layer._uora.handed["weight"].watches) <= 2


@pytest.mark.parametrize("training", [True, False])
def test_no_weight_outlives_its_reader_nor_the_model(training):
    root, layer = adapted(MODULES["Linear"], training, compute="merged")
    root(torch.randn(3, 7)).sum().backward()
    with torch.no_grad():
        root(torch.randn(3, 7))
    alive = [ref for ref in layer._uora.handed["weight"].watches if ref() is not None]
    assert len(alive) == (0 if training else 1)
    gone = weakref.ref(layer)
    del root, layer
    gc.collect()
    assert gone() is None
    assert all(ref() is None for ref in alive)
