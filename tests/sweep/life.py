"""The whole life of an adapter on one model, each promise checked against the model without it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_uora import UORAConfig, adapters_disabled, attach_uora, detach_uora, named_adapters
from lightning_uora.adapters.kinds import named_parts
from lightning_uora.adapters.stacked import home, named_layers

RANK = 4
Run = Callable[[nn.Module], Any]


class NotRunnableError(Exception):
    """The model cannot be run, or not twice alike, before any adapter is there."""


@dataclass(frozen=True)
class Life:
    """What was seen of a life without fault: adapted layers, and how many of them lie on a live path."""

    names: tuple[str, ...]
    with_gradient: int


# Note [What equal to the base means]
# torch multiplies some inputs otherwise where the weight wants a gradient, in no_grad as well (matmul folds
# its batch then), and the last bits differ. So a frozen base is what a fresh adapter's output equals without
# a graph; with one, it is the base in which the adapted weights alone want a gradient.


@dataclass(frozen=True)
class Base:
    """The model as it was before: outputs and everything that an adapter might disturb.

    ``outputs`` are the frozen model's, ``untouched`` those with its own ``requires_grad``, both without a
    graph; ``rounding`` is how far each output moves when every weight moves by a millionth.
    """

    outputs: list[Tensor]
    untouched: list[Tensor]
    rounding: list[Tensor]
    classes: list[type]
    requires_grad: list[bool]
    state: dict[str, Tensor]


def tensors(output: Any) -> Iterator[Tensor]:
    """Every floating tensor of a nested output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield torch.view_as_real(output) if output.is_complex() else output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from tensors(value)


def outputs(model: nn.Module, run: Run) -> list[Tensor]:
    """One run from one random state: models that draw in evaluation draw the same each time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return [t for t in tensors(run(model)) if t.numel()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def loss(results: list[Tensor]) -> Tensor:
    """A fixed random projection: no normalisation at the end of a model makes it constant."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for result in results:
        weights = torch.randn(result.shape, generator=generator)
        total = total + (result.float() * weights).mean()
    return total


def look_at(model: nn.Module, run: Run) -> Base:
    """The base, after making sure that it can be compared with anything.

    Raises:
        NotRunnableError: No output, one that is not finite or differs from run to run, or no gradient.
    """
    with torch.no_grad():
        once, twice = outputs(model, run), outputs(model, run)
    if not once:
        raise NotRunnableError("the output holds no floating tensor")
    if not all(t.isfinite().all() for t in once):
        raise NotRunnableError("the output is not finite")
    if not equal(once, twice):
        raise NotRunnableError("the output differs from run to run")
    result = outputs(model, run)
    if not loss(result).requires_grad:
        raise NotRunnableError("the forward pass keeps no graph")
    loss(result).backward()
    weights = [p for p in model.parameters() if p.grad is not None and p.dim() > 1]
    reach = max((float((p.grad * p).abs().sum()) for p in weights), default=0.0)
    if not reach > 1e-7 * max(float(t.abs().max()) for t in once):
        raise NotRunnableError("no weight changes the output by more than rounding")
    model.zero_grad(set_to_none=True)
    with torch.no_grad(), wanting_gradients(model, ()):
        frozen = outputs(model, run)
        nudged = nudged_outputs(model, run)
    rounding = [(a - b).abs().max() for a, b in zip(frozen, nudged, strict=True)]
    if any(move > 1e-4 * a.abs().max() for move, a in zip(rounding, frozen, strict=True)):
        raise NotRunnableError(
            "ill-conditioned: a millionth of the weights moves an output by a ten-thousandth"
        )
    return Base(frozen, once, rounding, *facts(model))


def nudged_outputs(model: nn.Module, run: Run) -> list[Tensor]:
    """Outputs after every weight has moved by a millionth of itself; the model is as before."""
    generator = torch.Generator().manual_seed(5)
    before = [p.clone() for p in model.parameters()]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randint(0, 2, parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + 1e-6 * (2 * noise - 1))
    found = outputs(model, run)
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.copy_(value)
    return found


@contextmanager
def wanting_gradients(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the weights that an adapter of the named modules changes want gradients and no others."""
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    layers = named_layers(model)
    for name in names:
        for part in named_parts(layers[name]):
            home(layers[name]).get_parameter(part).requires_grad_(True)
    try:
        yield
    finally:
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(value)


def facts(model: nn.Module) -> tuple[list[type], list[bool], dict[str, Tensor]]:
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()], state


def check(model: nn.Module, run: Run, target: str) -> Life:
    """Attach, train, disable, detach, merge: raises ``AssertionError`` naming the first broken promise.

    Raises:
        ValueError: The package refuses the model.
        NotRunnableError: The model does not run without an adapter.
    """
    base = look_at(model, run)
    config = UORAConfig(rank=RANK, target_modules=target, trainable_modules=())
    names = attach_uora(model, config)
    assert names, "nothing was adapted"
    check_fresh(model, run, base)
    scatter(model)
    trained, gradients = train(model, run)
    moved = max(map(difference, trained, base.outputs))
    if any(grad is not None and grad.any() for grad in gradients.values()):
        assert moved > 0, "trained vectors change no output"
    check_without_graph(model, run, base, trained)
    detach_uora(model)
    check_as_before(model, run, base)
    check_fresh_merged(model, run, config, names)
    attach_uora(model, config)
    scatter(model)
    expected = merge(model, run, base, trained)
    alive = check_gradients(gradients, expected)
    if not alive:
        raise NotRunnableError("none of the adapted weights has a gradient in the base")
    return Life(tuple(names), alive)


def check_fresh(model: nn.Module, run: Run, base: Base) -> None:
    with torch.no_grad():
        assert equal(outputs(model, run), base.outputs), "fresh output differs without a graph"
    assert_near(
        [t.detach() for t in outputs(model, run)], base.outputs, base, "fresh output differs with a graph"
    )


def check_fresh_merged(model: nn.Module, run: Run, config: UORAConfig, names: list[str]) -> None:
    """With a graph, bit for bit: see Note [What equal to the base means]."""
    with wanting_gradients(model, names):
        expected = [t.detach() for t in outputs(model, run)]
    attach_uora(model, replace(config, compute="merged"))
    found = [t.detach() for t in outputs(model, run)]
    detach_uora(model)
    assert equal(found, expected), "fresh merged output differs with a graph"


def scatter(model: nn.Module) -> None:
    """Vectors as after some training: no entry is zero."""
    generator = torch.Generator().manual_seed(1)
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, std=0.1, generator=generator)
        nn.init.normal_(module.uora_d, std=0.3, generator=generator)


def train(model: nn.Module, run: Run) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and the gradient of every vector."""
    result = outputs(model, run)
    assert all(t.isfinite().all() for t in result), "trained output is not finite"
    total = loss(result)
    if total.requires_grad:
        total.backward()
    vectors = {f"{n}.{v}": getattr(m, v) for n, m in named_adapters(model) for v in ("uora_d", "uora_b")}
    return [t.detach() for t in result], {name: vector.grad for name, vector in vectors.items()}


def check_without_graph(model: nn.Module, run: Run, base: Base, trained: list[Tensor]) -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_near(outputs(model, run), trained, base, f"{context.__name__} output differs")
    with torch.no_grad(), adapters_disabled(model):
        assert equal(outputs(model, run), base.outputs), "disabled output differs from the base"


def difference(one: Tensor, other: Tensor) -> float:
    """The largest of any entry; the largest entry where shapes depend on values (points in an image)."""
    return float((one - other).abs().max() if one.shape == other.shape else one.abs().max())


def assert_near(found: list[Tensor], trained: list[Tensor], base: Base, what: str) -> None:
    """Within 2 % of what training changed, and the rounding of the numbers as this model carries it on."""
    assert len(found) == len(trained), what
    for a, b, c, rounding in zip(found, trained, base.outputs, base.rounding, strict=True):
        assert a.shape == b.shape, f"{what} in shape"
        room = 0.02 * difference(b, c) + 1e-5 * b.abs().max() + 3 * rounding + 1e-6
        assert (a - b).abs().max() <= room, f"{what} by {(a - b).abs().max():.3g}, room is {room:.3g}"


def check_as_before(model: nn.Module, run: Run, base: Base) -> None:
    classes, requires_grad, state = facts(model)
    assert classes == base.classes, "detached: other classes"
    assert requires_grad == base.requires_grad, "detached: other requires_grad"
    assert list(state) == list(base.state), "detached: other state-dict keys"
    assert all(map(torch.equal, state.values(), base.state.values())), "detached: other values"
    with torch.no_grad():
        assert equal(outputs(model, run), base.untouched), "detached: other output"


def merge(model: nn.Module, run: Run, base: Base, trained: list[Tensor]) -> dict[str, Tensor]:
    """Merge, compare, and give the gradient that each vector should have had, by name."""
    adapters = dict(named_adapters(model))
    literal = {name: literal_gradients(module) for name, module in adapters.items()}
    parts = {name: list(module._uora.parts) for name, module in adapters.items()}
    detach_uora(model, merge=True)
    weights = {name: [home(adapters[name])._parameters[part] for part in parts[name]] for name in adapters}
    assert facts(model)[0] == base.classes, "merged: other classes"
    assert list(model.state_dict()) == list(base.state), "merged: other state-dict keys"
    with torch.no_grad():
        assert_near(outputs(model, run), trained, base, "merged output differs")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameters in weights.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    total = loss(outputs(model, run))
    if total.requires_grad:
        total.backward()
    return {
        f"{name}.{vector}": gradient
        for name, parameters in weights.items()
        for vector, gradient in literal[name]([p.grad for p in parameters]).items()
    }


def literal_gradients(module: nn.Module) -> Callable[[list[Tensor | None]], dict[str, Tensor]]:
    """From dL/dW_eff of a module's parts: ∂b = ((G Aᵀ) ⊙ B) d and ∂d = bᵀ ((G Aᵀ) ⊙ B), in float64."""
    owner, parts = module._uora.owner, module.adapted_parts
    d, b = (v.detach().double().clone() for v in (module.uora_d, module.uora_b))
    B = owner.up(b.shape[-1], module.layer_index).double().clone()
    As = [owner.down(part.n, module.layer_index).double().clone() for part in parts]

    def of(Gs: list[Tensor | None]) -> dict[str, Tensor]:
        grad_d, grad_b = torch.zeros_like(d), torch.zeros_like(b)
        for part, A, G in zip(parts, As, Gs, strict=True):
            if G is not None and part.experts:
                G3 = (G.transpose(1, 2) if part.transposed else G).double()
                H = (G3 @ A.t()) * B
                grad_b, grad_d = (H @ d[:, :, None])[:, :, 0], (b[:, None] @ H)[:, 0]
            elif G is not None:
                G2 = (G.t() if part.transposed else G.reshape(part.m, part.n)).double()
                rows = slice(part.row, part.row + part.m)
                H = (G2 @ A.t()) * B[rows]
                grad_b[rows] += H @ d
                grad_d += b[rows] @ H
        return {"uora_d": grad_d, "uora_b": grad_b}

    return of


def check_gradients(gradients: dict[str, Tensor | None], expected: dict[str, Tensor]) -> int:
    """A vector has a gradient exactly where the merged weight has, and it is the literal one.

    What is below a 10⁻⁷th of the largest gradient is rounding, and is not compared.
    """
    assert list(gradients) == list(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    alive = 0
    for name, right in expected.items():
        found, size = gradients[name], float(right.abs().max())
        if found is None or not found.any():
            assert size <= 1e-7 * largest, f"no gradient for {name}, where the weight has one"
            continue
        alive += name.endswith("uora_b")
        room = 0.02 * size + 1e-4 * largest
        error = float((found.double() - right).abs().max())
        assert error <= room, f"gradient of {name} is off by {error:.3g}, room is {room:.3g}"
    return alive
