"""A small model of every kind of layer, and the formula that its outputs must follow at any time.

All in float64 from what the model holds now: parameters, d and b, and its owner's A and B. Each number comes
with the sum of the absolute values that it was made of: times a few roundings of the model's dtype, that is
how far an output may lie from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_uora import UORAConfig, attach_uora, named_adapters

ROUNDINGS = 8
"""How many roundings of the sum of absolute values an output may be off."""
PARTS = ("", "first", "conv", "attention", "attention.out_proj", "one", "two", "head")
ADAPTABLE = ("first", "conv", "attention", "attention.out_proj", "one", "two", "head")


class Mixed(nn.Module):
    """A Linear, a convolution, an attention and two Linears with one weight, side by side under a head."""

    def __init__(self, seed: int = 0, tied: bool = True, frozen: Iterable[str] = ()):
        super().__init__()
        self.frozen = tuple(frozen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(9, 5)
            self.conv = nn.Conv2d(1, 3, (2, 3))
            self.attention = nn.MultiheadAttention(9, 3, batch_first=True)
            self.one = nn.Linear(9, 7)
            self.two = nn.Linear(9, 7, bias=False)
            self.head = nn.Linear(31, 2)
        self.two.weight = self.one.weight
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        if not tied:
            self.two.weight = nn.Parameter(self.one.weight.detach().clone(), self.one.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x).mean(1), self.conv(x[:, None]).mean((2, 3))]
        seen += [self.attention(x, x, x, need_weights=False)[0].mean(1)]
        seen += [self.one(x).mean(1), self.two(x[:, :1]).mean(1)]
        return self.head(torch.cat(seen, dim=1).tanh())


def is_tied(model: Mixed) -> bool:
    return model.one._parameters["weight"] is model.two._parameters["weight"]


def dtype_of(model: nn.Module) -> torch.dtype:
    return model.first._parameters["weight"].dtype


def adapted_name(layer: nn.Module) -> str:
    """Which parameter of a layer an adapter changes."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def raw(layer: nn.Module) -> nn.Parameter:
    """The base's own weight, whatever reading ``layer.weight`` returns."""
    return layer._parameters[adapted_name(layer)]


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Both vectors of every adapted layer by their full names."""
    return {
        f"{name}.{v}": getattr(layer, v)
        for name, layer in named_adapters(model)
        for v in ("uora_d", "uora_b")
    }


def fresh(like: Mixed, config: UORAConfig | None) -> Mixed:
    """Another model of the same make and dtype, with other values; adapted, or plain for None."""
    other = Mixed(5, is_tied(like), like.frozen)
    if config is not None:
        attach_uora(other, config)
    return other.to(dtype_of(like))


@dataclass(frozen=True)
class About:
    """A value in float64, and the sum of the absolute values that it was made of."""

    value: Tensor
    size: Tensor

    def map(self, f) -> About:
        """For f linear in its input with positive weights."""
        return About(f(self.value), f(self.size))


def formula(model: nn.Module, disabled: bool = False) -> dict[str, About]:
    """``W + diag(b) B diag(d) A`` of every adapted layer, and W of the others, by the layer's name."""
    found = {}
    index = {name: i for i, (name, _) in enumerate(named_adapters(model))}
    for name in ADAPTABLE:
        layer = model.get_submodule(name)
        W = raw(layer).detach().double()
        found[name] = About(W, W.abs())
        if name in index and not disabled:
            n, m, owner = W[0].numel(), W.shape[0], model.uora_projections
            A, B = owner.down(n, index[name]).double(), owner.up(m, index[name]).double()
            d, b = layer.uora_d.detach().double(), layer.uora_b.detach().double()
            delta = b[:, None] * (B @ (d[:, None] * A))
            size = b.abs()[:, None] * (B.abs() @ (d.abs()[:, None] * A.abs()))
            found[name] = About(W + delta.reshape(W.shape), W.abs() + size.reshape(W.shape))
    return found


def _bias(layer: nn.Module, name: str = "bias") -> About:
    bias = layer._parameters.get(name)
    zero = torch.zeros((), dtype=torch.float64)
    return About(zero, zero) if bias is None else About(bias.detach().double(), bias.detach().double().abs())


def _linear(x: About, W: About, bias: About) -> About:
    value = x.value @ W.value.t() + bias.value
    return About(value, x.size @ W.size.t() + bias.size)


def _attention(x: About, layer: nn.Module, W: About, out: About) -> About:
    """``softmax(q k^T / sqrt) v`` of three heads; an error of the scores counts twice in the weights."""
    both = _linear(x, W, _bias(layer, "in_proj_bias"))

    def heads(t: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (3, 3)).transpose(1, 2) for part in t.chunk(3, dim=-1)]

    q, k, v = heads(both.value)
    q_size, k_size, v_size = heads(both.size)
    weights = (q @ k.mT / 3**0.5).softmax(-1)
    doubt = 1 + 2 * (q_size @ k_size.mT / 3**0.5).amax(-1, keepdim=True)
    value = (weights @ v).transpose(1, 2).flatten(2)
    size = (doubt * v_size.amax(2, keepdim=True)).transpose(1, 2).flatten(2)
    return _linear(About(value, size), out, _bias(layer.out_proj))


def inputs_of(name: str, dtype: torch.dtype) -> Tensor:
    """The fixed input of a layer, or of the whole model for ``""``."""
    generator = torch.Generator().manual_seed(3)
    shape = {"conv": (2, 1, 5, 9), "head": (2, 31)}.get(name, (2, 5, 9))
    return torch.randn(shape, generator=generator).to(dtype)


def called(part: nn.Module, name: str, x: Tensor) -> Tensor:
    """The output of a part on its input; an attention attends to its own."""
    return part(x, x, x, need_weights=False)[0] if name == "attention" else part(x)


def expected(model: Mixed, names: Iterable[str], disabled: bool = False) -> dict[str, About]:
    """What each layer, or the whole model for ``""``, must answer to its fixed input, literally."""
    weights, found = formula(model, disabled), {}
    for name in names:
        x = inputs_of(name, dtype_of(model)).double()
        x = About(x, x.abs())
        found[name] = _layer(model, name, x, weights) if name else _whole(model, x, weights)
    return found


def _layer(model: Mixed, name: str, x: About, weights: dict[str, About]) -> About:
    layer = model.get_submodule(name)
    if name == "attention":
        return _attention(x, layer, weights[name], weights["attention.out_proj"])
    if name == "conv":
        W, bias = weights[name], _bias(layer)
        value = functional.conv2d(x.value, W.value, bias.value)
        return About(value, functional.conv2d(x.size, W.size, bias.size))
    return _linear(x, weights[name], _bias(layer))


def _whole(model: Mixed, x: About, weights: dict[str, About]) -> About:
    seen = [_layer(model, "first", x, weights).map(lambda t: t.mean(1))]
    seen += [_layer(model, "conv", x.map(lambda t: t[:, None]), weights).map(lambda t: t.mean((2, 3)))]
    seen += [_layer(model, name, x, weights).map(lambda t: t.mean(1)) for name in ("attention", "one")]
    seen += [_layer(model, "two", x.map(lambda t: t[:, :1]), weights).map(lambda t: t.mean(1))]
    value = torch.cat([one.value for one in seen], dim=1).tanh()
    size = torch.cat([one.size for one in seen], dim=1) + value.abs()
    return _layer(model, "head", About(value, size), weights)


def assert_near(found: Tensor, about: About, dtype: torch.dtype, what: str) -> None:
    """Within rounding of ``dtype``, which is also the dtype of what was found."""
    assert found.dtype == dtype, f"{what} is {found.dtype} and not {dtype}"
    gap = (found.detach().double() - about.value).abs()
    allowed = ROUNDINGS * torch.finfo(dtype).eps * (about.size + 1e-30)
    worst = (gap / allowed).max().item()
    assert worst <= 1, f"{what} is off by {gap.max():.3g}, {worst:.3g} times what rounding explains"
