"""No forward uses an effective weight that is out of date, whatever wrote d, b, A, B or W."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from lightning_uora import UORAConfig, attach_uora
from tests import reference

SIZES = {"small": (7, 5), "wide": (130, 65)}


def adapted(size: str, **options) -> nn.Module:
    torch.manual_seed(0)
    n, m = SIZES[size]
    model = nn.Sequential(nn.Linear(n, m), nn.Tanh())
    attach_uora(model, UORAConfig(rank=3, target_modules=["0"], trainable_modules=(), **options))
    nn.init.normal_(model[0].uora_b)
    return model.eval()


def expected(model: nn.Module, x: Tensor) -> Tensor:
    layer, owner = model[0], model.uora_projections
    m, n = layer._parameters["weight"].shape
    W = reference.effective_weight(
        layer._parameters["weight"], owner.down(n), owner.up(m), layer.uora_d, layer.uora_b
    )
    return torch.tanh(x.double() @ W.t() + layer.bias.detach().double())


def sources(model: nn.Module) -> dict[str, Tensor]:
    owner, layer = model.uora_projections, model[0]
    m, n = layer._parameters["weight"].shape
    return {
        "W": layer._parameters["weight"],
        "A": owner._buffers[f"A_{n}"],
        "B": owner._buffers[f"B_{m}"],
        "d": layer.uora_d,
        "b": layer.uora_b,
    }


def swap(t: Tensor) -> None:
    t.data = t.data * 1.5


HOW = {
    "copy_": lambda t: t.copy_(t * 1.5),
    "data.mul_": lambda t: t.data.mul_(1.5),
    "data.copy_": lambda t: t.data.copy_(t.data + 0.5),
    "data = ": swap,
    "numpy": lambda t: t.detach().numpy().__imul__(1.5),
    "first entry": lambda t: t.data.view(-1)[:1].add_(3.0) if t.is_contiguous() else t.data[0, :1].add_(3.0),
    "foreach": lambda t: torch._foreach_mul_([t.data], 1.5),
    "another thread": lambda t: in_thread(lambda: t.data.mul_(1.5)),
}


def in_thread(job) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", "WABdb")
@pytest.mark.parametrize("how", HOW)
def test_a_write_is_seen_by_the_next_forward(how, source, size, mode):
    model = adapted(size)
    x = torch.randn(4, SIZES[size][0])
    with mode():
        before = model(x)
        assert model[0].weight is model[0].weight, "nothing is kept: the test tests nothing"
        with torch.no_grad():
            HOW[how](sources(model)[source])
        after = model(x)
    assert (after - before).abs().max() > 1e-6
    torch.testing.assert_close(after.double(), expected(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", [0, 3, 6])
def test_a_single_entry_of_a_small_weight_is_seen(where):
    model, x = adapted("small"), torch.randn(4, 7)
    with torch.no_grad():
        model(x)
        model[0]._parameters["weight"].data[2, where] += 1.0
        torch.testing.assert_close(model(x).double(), expected(model, x), atol=1e-5, rtol=1e-5)


OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.3, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.3, fused=True),
    "foreach Adam": lambda p: torch.optim.Adam(p, lr=0.3, foreach=True),
    "plain RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.3, foreach=False),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=2),
}


@pytest.mark.parametrize("compute", ["merged", "auto"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_forwards_between_optimizer_steps_use_the_present_adapter(kind, compute):
    """A model in eval mode that trains, with rollouts without gradients between: reinforcement learning."""
    model, x = adapted("small", compute=compute), torch.randn(4, 7)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            rollout = model(x)
        torch.testing.assert_close(rollout.double(), expected(model, x), atol=1e-5, rtol=1e-5)
        optimizer.step(closure)


@pytest.mark.parametrize("assign", [True, False])
def test_a_loaded_state_is_seen(assign):
    model, other, x = adapted("small"), adapted("small"), torch.randn(4, 7)
    nn.init.normal_(other[0].uora_b)
    with torch.no_grad():
        model(x)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        torch.testing.assert_close(model(x).double(), expected(other, x), atol=1e-5, rtol=1e-5)


def test_two_threads_share_no_weight_of_a_forward():
    """Attention holds its weight while its forward runs; another thread's forward must build its own."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    attach_uora(model, UORAConfig(rank=3, target_modules="all", trainable_modules=()))
    nn.init.normal_(model.uora_b)
    x, failed = torch.randn(2, 5, 4), []
    want = model(x, x, x)[0].sum()
    want.backward()
    gradient = model.uora_b.grad.clone()

    def run() -> None:
        try:
            for _ in range(20):
                got = torch.autograd.grad(model(x, x, x)[0].sum(), model.uora_b)[0]
                torch.testing.assert_close(got, gradient)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not model._uora.held


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_a_write_is_seen_in_any_memory_layout(layout):
    """A probe must be a view: of a copy it would compare the copy with itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(20, 24, 3))
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    else:
        model[0].weight = nn.Parameter(torch.randn(24, 40, 3, 3)[:, ::2])
    attach_uora(model, UORAConfig(rank=3, target_modules=["0"], trainable_modules=()))
    nn.init.normal_(model[0].uora_b)
    x, W = torch.randn(1, 20, 5, 5), model.eval()[0]._parameters["weight"]
    assert W.numel() > 2_048
    with torch.no_grad():
        before = model(x)
        W.data.mul_(2.0)
        after = model(x)
    assert (after - before).abs().max() > 0.01
