"""Adapted modules: every supported kind computes base plus delta wherever its weight is read, and nothing
else changes.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from transformers.pytorch_utils import Conv1D

from lightning_uora import UORAConfig, adapters_disabled, attach_uora, detach_uora, named_adapters
from tests import reference


class ScaledLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


KINDS = {
    "Linear": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "Linear without bias": (lambda: nn.Linear(7, 5, bias=False), (4, 7)),
    "Linear on a vector": (lambda: nn.Linear(7, 5), (7,)),
    "Linear subclass": (lambda: ScaledLinear(7, 5), (4, 7)),
    "transformers Conv1D": (lambda: Conv1D(5, 7), (2, 3, 7)),
    "Conv1d dilated": (lambda: nn.Conv1d(6, 4, 3, dilation=2), (2, 6, 11)),
    "Conv2d strided": (lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1), (2, 3, 9, 8)),
    "Conv2d grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 7, 7)),
    "Conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7)),
    "Conv2d padded by reflection": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        (2, 3, 7, 7),
    ),
    "Conv2d standardised": (lambda: StdConv2d(3, 5, 3), (2, 3, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5)),
}


def adapt(module: nn.Module, rank: int = 4, move: bool = True, **options) -> nn.Module:
    attach_uora(module, UORAConfig(rank=rank, target_modules="all", trainable_modules=(), **options))
    if move:
        for _, adapted in named_adapters(module):
            nn.init.normal_(adapted.uora_d)
            nn.init.normal_(adapted.uora_b)
    return module


def raw(module: nn.Module) -> torch.Tensor:
    return module._parameters["weight"]


# Note [Like with like]
# On some processors torch computes a layer differently in the last bits when its weight wants a gradient, in
# no_grad too. So what must be equal bit for bit is compared with a frozen copy of the base; where a graph is
# built through a merged weight, the copy's weight wants a gradient as well.


def frozen_twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


def assert_fresh_is_equal(module: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """In both modes, with and without a graph; the output's layout too. See Note [Like with like]."""
    merged = module.form(x.numel() // x.shape[-1]) == "merged"
    for mode in (True, False):
        for graph in (True, False):
            plain.weight.requires_grad_(graph and merged)
            with torch.set_grad_enabled(graph):
                found, expected = module.train(mode)(x), plain.train(mode)(x)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", ["auto", "merged", "factored"])
def test_fresh_output_is_bit_equal_and_trained_output_is_base_plus_delta(kind: str, compute: str):
    make, shape = KINDS[kind]
    module, x = make(), torch.randn(shape)
    plain = frozen_twin(module)
    adapt(module, move=False, compute=compute)
    assert_fresh_is_equal(module, plain, x)
    nn.init.normal_(module.uora_b)
    plain = make()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "uora" not in k})
    owner, (part,) = module.uora_projections, module.adapted_parts
    W = raw(module).t() if part.transposed else raw(module)
    W_eff = reference.effective_weight(W, owner.down(part.n), owner.up(part.m), module.uora_d, module.uora_b)
    plain.weight.data.copy_(W_eff.t() if part.transposed else W_eff)
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(x), plain(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.delta_weight(), plain.weight - raw(module), atol=1e-4, rtol=1e-4)
    assert module.delta_weight().shape == raw(module).shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute", ["merged", "factored"])
def test_a_fresh_linear_layer_is_bit_equal_on_an_input_that_torch_does_not_fold(compute: str, bias: bool):
    """A transposed batch: a frozen weight and one that wants a gradient are multiplied by other kernels."""
    module, x = nn.Linear(32, 48, bias=bias), torch.randn(9, 2, 32).transpose(0, 1)
    plain = frozen_twin(module)
    assert_fresh_is_equal(adapt(module, move=False, compute=compute), plain, x)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_weight_keeps_its_memory_format(kernel: int):
    """It decides the kernel and the layout of a convolution's output."""
    module, x = nn.Conv2d(16, 24, kernel).to(memory_format=torch.channels_last), torch.randn(2, 16, 9, 8)
    plain = frozen_twin(module)
    assert_fresh_is_equal(adapt(module, move=False), plain, x)
    assert module.weight.stride() == raw(module).stride()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_factored_give_the_same_gradients(kind: str):
    make, shape = KINDS[kind]
    module, x = make(), torch.randn(shape, requires_grad=True)
    gradients = []
    for compute in ("merged", "factored"):
        twin = adapt(copy.deepcopy(module), move=False, compute=compute)
        with torch.no_grad():
            twin.uora_b.copy_(torch.linspace(-1, 1, len(twin.uora_b)))
        gradients.append(torch.autograd.grad(twin(x).square().sum(), (x, twin.uora_d, twin.uora_b)))
    for merged, factored in zip(*gradients, strict=True):
        torch.testing.assert_close(merged, factored, atol=1e-3, rtol=1e-4)


def forms_taken(module: nn.Module, x: torch.Tensor, monkeypatch) -> list[str]:
    from lightning_uora.adapters import forms, kinds

    taken: list[str] = []
    for place, name in ((kinds, "add_delta"), (forms, "factored_linear")):
        inner = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *a, name=name, inner=inner, **k: (taken.append(name), inner(*a, **k))[1]
        )
    module(x)
    return taken


def test_auto_takes_the_form_that_the_cost_model_prefers(monkeypatch):
    few, many = torch.randn(2, 32), torch.randn(500, 32)
    module = adapt(nn.Linear(32, 24), rank=64)
    assert forms_taken(module, few, monkeypatch) == ["factored_linear"]
    assert forms_taken(module, many, monkeypatch) == ["add_delta"]


def test_bookkeeping_of_the_module_is_untouched():
    """Same object, parameters, names, hooks, mode, buffers and isinstance; repr and state dict still
    readable.
    """
    module = nn.Linear(7, 5).eval()
    module.register_buffer("extra", torch.ones(2))
    weight, bias, calls = module.weight, module.bias, []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    names = list(module.state_dict())
    adapt(module)
    assert isinstance(module, nn.Linear)
    assert module._parameters["weight"] is weight
    assert module.bias is bias
    assert not module.training
    assert [n for n in module.state_dict() if "uora" not in n] == names
    module(torch.randn(2, 7))
    assert calls == ["pre", "forward"]
    assert "uora_rank=4" in repr(module)
    detach_uora(module)
    assert type(module) is nn.Linear
    assert module.weight is weight
    assert list(module.state_dict()) == names
    assert "_uora" not in module.__dict__


def test_a_new_weight_that_is_assigned_reads_back():
    module = adapt(nn.Linear(7, 5))
    new = nn.Parameter(torch.zeros(5, 7))
    module.weight = new
    torch.testing.assert_close(module.weight, new.detach())
    with pytest.raises(TypeError):
        module.weight = torch.zeros(5, 7)


def attention_reference(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A plain attention whose weights are the effective ones, by the literal formula."""
    state = {k: v.clone() for k, v in module.state_dict().items() if "uora" not in k}
    owner = module.uora_projections
    for name, adapted in named_adapters(module):
        B = owner.up(len(adapted.uora_b))
        for part in adapted.adapted_parts:
            rows = slice(part.row, part.row + part.m)
            key = f"{name}.{part.name}" if name else part.name
            state[key] = reference.effective_weight(
                state[key], owner.down(part.n), B[rows], adapted.uora_d, adapted.uora_b[rows]
            ).float()
    plain = nn.MultiheadAttention(
        module.embed_dim, module.num_heads, kdim=module.kdim, vdim=module.vdim, batch_first=module.batch_first
    )
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_multihead_attention_adapts_its_projections_and_out_proj(sizes: dict[str, int]):
    """``in_proj_weight`` or q, k and v apart, and ``out_proj``, which attention reads without calling it."""
    module = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 4, module.kdim), torch.randn(2, 4, module.vdim)
    plain = frozen_twin(module)
    adapt(module, move=False)
    assert [name for name, _ in named_adapters(module)] == ["", "out_proj"]
    for graph in (True, False):  # see Note [Like with like]
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(graph and name.endswith("weight"))
        with torch.set_grad_enabled(graph):
            assert torch.equal(module(q, k, v)[0], plain(q, k, v)[0])
    for _, adapted in named_adapters(module):
        nn.init.normal_(adapted.uora_b)
    expected = attention_reference(module)(q, k, v)[0]
    for mode in (True, False):
        module.train(mode)
        torch.testing.assert_close(module(q, k, v)[0], expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(module(q, k, v)[0], expected, atol=1e-5, rtol=1e-4)
    module(q, k, v)[0].square().sum().backward()
    for _, adapted in named_adapters(module):
        assert adapted.uora_d.grad.abs().min() > 0
        assert adapted.uora_b.grad.abs().min() > 0
    width = 8 + module.kdim + module.vdim if sizes else 8
    assert module.delta_weight().shape == (8 if sizes else 24, width)


def test_training_attention_builds_its_weight_once(monkeypatch):
    module = adapt(nn.MultiheadAttention(8, 2, batch_first=True)).train()
    x = torch.randn(2, 3, 8)
    from lightning_uora.adapters import kinds

    calls = []
    inner = kinds.add_delta
    monkeypatch.setattr(kinds, "add_delta", lambda *a: (calls.append(a[0].shape), inner(*a))[1])
    module(x, x, x)
    assert calls.count(torch.Size([24, 8])) == 1


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_agrees_in_every_mode(norm_first: bool):
    """The fused evaluation path, with padding mask and with nested tensors, sees the adapters."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 6, 16)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
    fresh = encoder(x, src_key_padding_mask=mask)
    adapt(encoder)
    assert len(list(named_adapters(encoder))) == 8
    expected = encoder.train()(x, src_key_padding_mask=mask)
    assert (expected - fresh)[~mask].abs().max() > 0.1
    outputs = [encoder.eval()(x, src_key_padding_mask=mask)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                outputs.append(encoder(x, src_key_padding_mask=mask))
    for output in outputs:
        output = F.pad(output, (0, 0, 0, 6 - output.shape[1]))
        torch.testing.assert_close(output[~mask], expected[~mask], atol=1e-4, rtol=1e-4)


def test_effective_weight_is_kept_without_gradients_until_a_source_changes():
    module = adapt(nn.Conv2d(3, 4, 3)).eval()
    with torch.no_grad():
        first = module.weight
        assert module.weight is first
        for change in (
            lambda: module.uora_d.add_(1.0),
            lambda: module.uora_b.mul_(2.0),
            lambda: raw(module).add_(1.0),
            lambda: module.uora_projections.down(27).add_(1.0),
            lambda: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
            lambda: module.weight.zero_(),
            lambda: setattr(module.uora_b, "data", torch.ones(4)),
        ):
            change()
            again = module.weight
            assert again is not first
            expected = raw(module) + module.delta_weight()
            torch.testing.assert_close(again, expected)
            first = again
        module.uora_b.data.copy_(
            torch.zeros(4)
        )  # .data writes leave no trace; train() and eval() drop what was kept
        module.eval()
        assert torch.equal(module.weight, raw(module))


def test_nothing_is_kept_while_training_or_under_gradients():
    module = adapt(nn.Conv2d(3, 4, 3)).train()
    with torch.no_grad():
        assert module.weight is not module.weight
    module.eval()
    assert module.weight.requires_grad
    assert not module._uora.cache


def test_a_weight_kept_in_inference_mode_can_be_used_by_autograd_afterwards():
    module = adapt(nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    with torch.inference_mode():
        module(x)
    for _, adapted in named_adapters(module):
        adapted.requires_grad_(False)
    module(x).sum().backward()
    assert x.grad is not None


def test_input_gradients_and_functional_call_see_the_adapter():
    module = adapt(nn.Linear(7, 5))
    x = torch.randn(3, 7)
    state = {"uora_b": torch.zeros(5)}
    assert torch.equal(torch.func.functional_call(module, state, x), F.linear(x, raw(module), module.bias))
    assert not torch.equal(module(x), F.linear(x, raw(module), module.bias))


def test_dropout_acts_on_the_adapters_input_in_training_only():
    module = adapt(nn.Linear(64, 5), dropout=0.5).train()
    x = torch.ones(3, 64)
    base = F.linear(x, raw(module), module.bias)
    outputs = torch.stack([module(x) - base for _ in range(400)])
    full = module.eval()(x) - base
    assert outputs.std(0).min() > 0
    torch.testing.assert_close(outputs.mean(0), full, atol=4 * (outputs.std(0) / 20).max().item(), rtol=0)
    torch.testing.assert_close(full, x @ module.delta_weight().t())


def test_reading_the_weight_past_dropout_warns():
    module = adapt(nn.Linear(7, 5), dropout=0.5).train()
    with pytest.warns(UserWarning, match="is used without dropout"):
        F.linear(torch.randn(2, 7), module.weight)


@pytest.mark.parametrize("kind", ["Linear", "transformers Conv1D", "Conv2d grouped", "Linear subclass"])
@pytest.mark.parametrize("mode", [True, False])
def test_torch_compile_takes_the_whole_graph(kind: str, mode: bool):
    make, shape = KINDS[kind]
    module = adapt(make()).train(mode)
    x = torch.randn(shape)
    expected = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    want = torch.autograd.grad(expected.sum(), (module.uora_d, module.uora_b))
    got = torch.autograd.grad(compiled(x).sum(), (module.uora_d, module.uora_b))
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


def test_disabled_adapters_give_the_base_through_nesting_and_exceptions():
    """The frozen base, see Note [Like with like]: with and without a graph, the fused path included."""
    module = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 16)
    plain = frozen_twin(module)
    adapt(module)
    for mode in (True, False):
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                fresh, changed = plain.train(mode)(x), module.train(mode)(x)
                with adapters_disabled(module):
                    assert torch.equal(module(x), fresh)
                    with pytest.raises(KeyError), adapters_disabled(module):
                        raise KeyError
                    assert torch.equal(module(x), fresh)
                assert torch.equal(module(x), changed)
                assert not torch.equal(changed, fresh)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    module = adapt(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 7)), rank=3)
    x = torch.randn(200, 7, requires_grad=True)
    vectors = [v for _, m in named_adapters(module) for v in (m.uora_d, m.uora_b)]
    module(x).square().sum().backward()
    want = [v.grad.clone() for v in vectors]
    for v in vectors:
        v.grad = None
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    for v, expected in zip(vectors, want, strict=True):  # in the hundreds; reentrant starts without a graph
        torch.testing.assert_close(v.grad, expected, atol=1e-4, rtol=1e-5)
