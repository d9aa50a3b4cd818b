"""torch.func's transforms, forward mode and tracers see the formula, in both forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from lightning_uora import UORAConfig, attach_uora, named_adapters
from tests.reference import linear

FORMS = ["merged", "factored"]
STRICT = 2 if torch.__version__ >= "2.14" else 1
"""Strict export of torch 2.7 takes a subclass of nn.Linear for nn.Linear itself."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 5), nn.Conv1d(5, 4, 2)
        self.m, self.h = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(torch.tanh(self.a(x)).transpose(1, 2)).transpose(1, 2)
        return self.h(self.m(y, y, y)[0])  # with weights: torch has no forward mode of its fused attention


def adapted(compute: str) -> Net:
    torch.manual_seed(0)
    model = Net()
    attach_uora(model, UORAConfig(rank=3, target_modules="all", trainable_modules=["h"], compute=compute))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("compute", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_per_sample_are_those_of_a_loop(compute, training):
    model, x = adapted(compute).train(training), torch.randn(4, 7, 6)

    def loss(parameters, one):
        return functional_call(model, parameters, (one[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(trained(model), x)
    for index, one in enumerate(x):
        model.zero_grad()
        model(one[None]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(found[name][index], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compute", FORMS)
def test_a_batch_of_adapters_runs_at_once(compute):
    model, x = adapted(compute).eval(), torch.randn(2, 7, 6)
    sets = [{n: torch.randn_like(p) for n, p in trained(model).items()} for _ in range(3)]
    stacked = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
    found = vmap(lambda p: functional_call(model, p, (x,)))(stacked)
    for index, one in enumerate(sets):
        torch.testing.assert_close(found[index], functional_call(model, one, (x,)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compute", FORMS)
def test_forward_mode_is_reverse_mode_transposed(compute):
    """For f of x and b: ⟨w, J v⟩ by jvp equals ⟨Jᵀ w, v⟩ by backward."""
    model, x = adapted(compute).double(), torch.randn(2, 7, 6, dtype=torch.float64)
    b = trained(model)["a.uora_b"]
    v = (torch.randn_like(x), torch.randn_like(b))

    def f(x, b):
        return functional_call(model, {"a.uora_b": b}, (x,))

    out, tangent = jvp(f, (x, b), v)
    w = torch.randn_like(out)
    x, b = x.requires_grad_(), b.requires_grad_()
    gx, gb = torch.autograd.grad((f(x, b) * w).sum(), (x, b))
    torch.testing.assert_close(
        (tangent * w).sum(), (gx * v[0]).sum() + (gb * v[1]).sum(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("compute", FORMS)
def test_dual_numbers_without_torch_func(compute):
    model, x = adapted(compute).train(), torch.randn(2, 7, 6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(tangent, jvp(model, (x,), (torch.ones_like(x),))[1])


@pytest.mark.parametrize("compute", FORMS)
def test_second_derivatives_of_a_layer(compute):
    """The literal formula is linear in b; the loss is its square, so the hessian in b is 2 Jᵀ J."""
    layer, x = nn.Linear(6, 5).double(), torch.randn(3, 6, dtype=torch.float64)
    root = nn.Sequential(layer)
    attach_uora(root, UORAConfig(rank=3, target_modules=["0"], trainable_modules=(), compute=compute))
    A, B = root.uora_projections.down(6), root.uora_projections.up(5)
    b = torch.randn(5, dtype=torch.float64)

    def loss(b):
        return functional_call(root, {"0.uora_b": b}, (x,)).square().sum()

    zero = torch.zeros(5)
    ones = [linear(x, 0 * layer._parameters["weight"], None, A, B, layer.uora_d, e) for e in torch.eye(5)]
    J = torch.stack(
        [one - linear(x, 0 * layer._parameters["weight"], None, A, B, layer.uora_d, zero) for one in ones]
    )
    torch.testing.assert_close(hessian(loss)(b), 2 * torch.einsum("imn,jmn->ij", J, J), atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compute", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_and_an_exported_model_compute_the_same(compute, training):
    model, x = adapted(compute).train(training), torch.randn(2, 7, 6)
    with torch.no_grad():
        want = model(x)
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), want, atol=1e-5, rtol=1e-5)
        for strict in (False, True)[:STRICT]:
            program = torch.export.export(model, (x,), strict=strict).module()
            torch.testing.assert_close(program(x), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compute", FORMS)
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_computes_the_same(compute, dynamo, tmp_path):
    """Needs onnx, onnxscript and onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    model, x = adapted(compute).eval(), torch.randn(2, 7, 6)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["x"])
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-4, rtol=1e-4)


def test_scripting_says_to_merge():
    with pytest.raises(
        ValueError, match=r"torch.jit.script cannot compile an adapted Linear; call detach_uora"
    ):
        torch.jit.script(adapted("auto"))
