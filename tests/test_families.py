"""Real architectures of timm and transformers: equal when fresh, alive when trained, the base when disabled,
undone exactly.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_uora import UORAConfig, adapters_disabled, attach_uora, detach_uora, named_adapters
from tests import families


def first_tensor(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else first_tensor(output[0])


def check(model: nn.Module, run, target: str) -> None:
    """The whole life of an adapter on ``model``; ``run(model)`` gives an output."""
    with torch.no_grad():
        base = first_tensor(run(model))
    classes = [type(m) for m in model.modules()]
    names = attach_uora(model, UORAConfig(rank=4, target_modules=target, trainable_modules=()))
    assert names
    assert torch.equal(first_tensor(run(model)), base)
    generator = torch.Generator().manual_seed(1)
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, std=0.3, generator=generator)
    trained = first_tensor(run(model))
    assert (trained - base).abs().max() > 1e-4
    trained.square().sum().backward()
    for name, module in named_adapters(model):
        for vector in (module.uora_d, module.uora_b):
            assert vector.grad is not None, name
            assert vector.grad.abs().max() > 0, name
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(first_tensor(run(model)), trained.detach(), atol=2e-3, rtol=2e-3)
    with torch.no_grad(), adapters_disabled(model):
        assert torch.equal(first_tensor(run(model)), base)
    detach_uora(model, merge=True)
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        torch.testing.assert_close(first_tensor(run(model)), trained.detach(), atol=2e-3, rtol=2e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.TIMM)
def test_timm_family(name: str):
    model, x = families.timm_model(name)
    check(model, lambda m: m(x), families.TIMM[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*families.TEXT, *families.SEQ2SEQ, *families.VISION])
@pytest.mark.parametrize("target", ["attention", "all-linear"])
def test_transformers_family(name: str, target: str):
    model, run = families.transformers_model(name)
    check(model, run, target)
