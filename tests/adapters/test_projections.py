"""One owner of A and B: sharing survives everything that copies, moves or saves a model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_uora import UORAConfig, attach_uora, named_adapters
from lightning_uora.adapters.projections import OWNER, seeded_generator


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))


def adapted(**options) -> nn.Module:
    model = stack()
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", **options))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    return model


def test_layers_of_one_shape_share_one_a_and_one_b():
    model = adapted()
    assert sorted(dict(model.uora_projections.named_buffers())) == ["A_5", "A_7", "B_5", "B_7"]
    assert model.uora_projections.down(7).shape == (4, 7)
    assert model.uora_projections.up(7).shape == (7, 4)


def test_state_dict_adds_only_vectors_and_one_copy_of_each_projection():
    base, model = stack(), adapted()
    added = set(model.state_dict()) - set(base.state_dict())
    vectors = {f"{i}.uora_{v}" for i in (0, 2, 4) for v in "db"}
    assert added == vectors | {f"{OWNER}.{name}" for name in ("A_5", "A_7", "B_5", "B_7")}
    assert set(base.state_dict()) <= set(model.state_dict())


def test_draws_of_one_shape_do_not_depend_on_other_layers_or_on_order():
    one = nn.Sequential(nn.Linear(7, 5))
    attach_uora(one, UORAConfig(rank=4, target_modules="all-linear"))
    assert torch.equal(one.uora_projections.down(7), adapted().uora_projections.down(7))


def test_seeds_and_labels_give_different_draws():
    draws = [
        torch.randn(3, generator=seeded_generator(*key)) for key in [(0, "A", 5), (1, "A", 5), (0, "B", 5)]
    ]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def through_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", [True, False])
def test_copies_are_exact_independent_and_share_within_themselves(how: str, mode: bool):
    model = adapted().train(mode)
    x = torch.randn(3, 7)
    with torch.no_grad():
        expected = model(x)
    twin = COPIES[how](model)
    with torch.no_grad():
        assert torch.equal(twin(x), expected)
    owners = {id(module._uora.owner) for _, module in named_adapters(twin)}
    assert owners == {id(twin.uora_projections)}
    assert id(model.uora_projections) not in owners
    with torch.no_grad():
        twin[0].uora_b.add_(1.0)
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_stay_float32_under_every_cast_and_keep_their_bits(dtype: torch.dtype):
    model = adapted()
    before = [(m.uora_d.clone(), m.uora_b.clone(), m.uora_d) for _, m in named_adapters(model)]
    model.to(dtype)
    for (d, b, d_object), (_, module) in zip(before, named_adapters(model), strict=True):
        assert module.uora_d is d_object
        assert torch.equal(module.uora_d, d)
        assert torch.equal(module.uora_b, b)
        assert module.uora_d.dtype == module.uora_b.dtype == torch.float32
        assert module._parameters["weight"].dtype == dtype
    assert model.uora_projections.down(7).dtype == dtype
    model.float()
    assert all(m.uora_d.dtype == torch.float32 for _, m in named_adapters(model))


def test_gradients_move_with_their_vectors_and_are_not_cast():
    model = adapted()
    model(torch.randn(3, 7)).sum().backward()
    model.bfloat16()
    assert all(m.uora_b.grad.dtype == torch.float32 for _, m in named_adapters(model))


def test_a_model_attached_on_meta_is_drawn_when_it_gets_storage():
    """``to_empty`` leaves no undefined numbers in A, B, d or b."""
    with torch.device("meta"):
        model = stack()
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear"))
    assert model.uora_projections.down(7).is_meta
    model.to_empty(device="cpu")
    expected = adapted()
    for name in ("A_5", "A_7", "B_5", "B_7"):
        found, drawn = getattr(model.uora_projections, name), getattr(expected.uora_projections, name)
        assert torch.equal(found, drawn)
        assert found.stride() == drawn.stride()  # which decides how products with it are summed
    for _, module in named_adapters(model):
        assert torch.equal(module.uora_d, torch.full((4,), 0.1))
        assert not module.uora_b.any()


def test_casting_to_half_and_back_rounds_the_projections_only():
    model = adapted()
    A = model.uora_projections.down(7).clone()
    model.half().float()
    assert torch.equal(model.uora_projections.down(7), A.half().float())
