"""Mixtures of experts in a batch of several adapters: as each sample alone, however tokens are routed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_uora import UORAConfig, add_adapter, attach_uora, named_adapters, set_adapter, use_adapters
from tests.adapters.test_experts import Block, stacked
from tests.adapters.test_mixing import scatter

NAMES = ["second", None, "default", "second"]
FREE: dict[str, Any] = {"trainable_modules": ()}


class Listed(nn.Module):
    """Experts as a list of modules, each of which gets the tokens that were sent to it, none perhaps."""

    def __init__(self, count: int = 4, n: int = 7) -> None:
        super().__init__()
        self.router = nn.Linear(n, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, n)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            here = (logits.argmax(-1) == number).nonzero().flatten()
            out = out.index_add(0, here, expert(rows[here]))
        return out.reshape(x.shape), logits


class Flat(Block):
    """The toy of stacked experts, on (batch, tokens, width)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self.out(self.experts(rows, self.router(rows).topk(2).indices)).reshape(x.shape)


class Layered(nn.Module):
    """Two blocks and a layer between them."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.before, self.between, self.after = kind(), nn.Linear(7, 7), kind()

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.before, self.between, self.after):
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def made(kind: Any, second: UORAConfig | None = None, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Layered(kind).double()
    attach_uora(model, UORAConfig(**{"rank": 4, "target_modules": "all-linear", **FREE, **options}))
    scatter(model, 1)
    add_adapter(model, "second", second)
    scatter(model, 2)
    return model, torch.randn(4, 5, 7, dtype=torch.double)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """Each sample with its adapter."""
    outs = []
    for sample, name in zip(x, NAMES, strict=True):
        set_adapter(model, name)
        outs.append(model(sample[None]))
    set_adapter(model, "default")
    return torch.cat(outs)


CASES: dict[str, Any] = {
    "stacked": (Flat, {}),
    "listed": (Listed, {}),
    "one of them without experts": (Flat, {"second": UORAConfig(4, ["between"], **FREE)}),
    "one of them with experts alone": (
        Flat,
        {"second": UORAConfig(3, ["*.up_proj"], seed=2, **FREE), "target_modules": ["between"]},
    ),
}


@pytest.mark.parametrize("computes", ["default", "second", None])
@pytest.mark.parametrize("kind", CASES)
def test_each_sample_is_as_with_its_adapter_alone(kind: str, computes: str | None):
    build, options = CASES[kind]
    model, x = made(build, **options)
    wanted = alone(model, x)
    set_adapter(model, computes)
    classes = [type(m) for m in model.modules()]
    with use_adapters(model, NAMES):
        found = model(x)
    torch.testing.assert_close(found, wanted)
    assert len({tuple(row.flatten().tolist()) for row in found}) == 4
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(alone(model, x), wanted)


@pytest.mark.parametrize("kind", ["stacked", "listed"])
def test_every_named_adapter_gets_the_gradient_of_its_samples(kind: str):
    model, x = made(CASES[kind][0])
    toward = torch.randn_like(x)
    wanted = {}
    for name in ("default", "second"):
        twin = copy.deepcopy(model)
        set_adapter(twin, name)
        mine = [i for i, n in enumerate(NAMES) if n == name]
        (twin(x[mine]) * toward[mine]).sum().backward()
        wanted[name] = {p: (m.uora_d.grad, m.uora_b.grad) for p, m in named_adapters(twin)}
    with use_adapters(model, NAMES):
        out = model(x)
    (out * toward).sum().backward()
    for name, gradients in wanted.items():
        for path, layer in named_adapters(model, name):
            for found, grad in zip((layer.uora_d.grad, layer.uora_b.grad), gradients[path], strict=True):
                torch.testing.assert_close(found, grad, msg=f"{name} {path}")


@stacked
def test_a_mixtral_mixes_and_refuses_what_routers_would_record():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    attach_uora(model, UORAConfig(4, "all-linear", **FREE))
    scatter(model, 1)
    add_adapter(model, "second")
    scatter(model, 2)
    ids = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(3))
    wanted = {}
    for name in ("default", "second", None):
        set_adapter(model, name)
        wanted[name] = model(input_ids=ids).logits
    with use_adapters(model, NAMES):
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, torch.stack([wanted[n][i] for i, n in enumerate(NAMES)]))
    with torch.no_grad(), use_adapters(model, NAMES):
        told = model.generate(ids, max_new_tokens=3, do_sample=False)
    set_adapter(model, "second")
    assert torch.equal(told[3], model.generate(ids[3:], max_new_tokens=3, do_sample=False)[0])
    with (
        use_adapters(model, NAMES),
        pytest.raises(ValueError, match="output_router_logits=True does not work in a mixed"),
    ):
        model(input_ids=ids, output_router_logits=True)
    with use_adapters(model, ["second"] * 4):
        assert len(model(input_ids=ids, output_router_logits=True).router_logits) == 2


class Cached(Layered):
    """A block that is handed a cache."""

    def forward(self, x: Tensor) -> Tensor:
        return self.before(x, object())


class Asked(Flat):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return super().forward(x)


class Counted(Flat):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.sum()


def test_a_block_that_cannot_be_split_is_refused_by_name():
    torch.manual_seed(0)
    for build, kind, message in (
        (
            Cached,
            Asked,
            "block 'before' around experts receives a value of type object, which cannot be split",
        ),
        (Layered, Counted, r"'before' returns a tensor \(\), which cannot be split into samples"),
    ):
        model = build(kind).double()
        attach_uora(model, UORAConfig(4, "all-linear", **FREE))
        add_adapter(model, "second")
        x = torch.randn(4, 5, 7, dtype=torch.double)
        with use_adapters(model, NAMES), pytest.raises(ValueError, match=message):
            model(x)
        assert model.uora_projections.disabled == 0
        assert not model.uora_projections.mixing
        model(x)
