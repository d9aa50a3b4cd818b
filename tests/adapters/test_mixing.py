"""A batch in which every sample has its own adapter equals each sample with its adapter alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    add_adapter,
    attach_uora,
    named_adapters,
    param_groups,
    refresh,
    set_adapter,
    use_adapters,
)

NAMES = ["second", None, "default", "second", "third", "default"]


class Net(nn.Module):
    """Linear layers on (batch, tokens, width), flattened to rows, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(7, 6, 3, padding=1)
        self.rows = nn.Linear(6, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.transpose(1, 2)).transpose(1, 2)
        h = self.rows(h.reshape(-1, 6)).reshape(len(x), -1, 5)
        return self.head(self.mix(h.tanh()).mean(1))


class Attends(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x)
        return self.head(out.mean(1))


def scatter(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Vectors and heads as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_b.copy_(scale * torch.randn(module.uora_b.shape, generator=generator))
            module.uora_d.copy_(torch.randn(module.uora_d.shape, generator=generator))
        for name, p in model.named_parameters():
            if p.requires_grad and "uora" not in name:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def three(model: nn.Module, config: UORAConfig, others: dict[str, UORAConfig] | None = None) -> nn.Module:
    attach_uora(model, config)
    scatter(model, 1)
    for seed, name in enumerate(("second", "third"), 2):
        add_adapter(model, name, (others or {}).get(name))
        scatter(model, seed)
    return model


def alone(model: nn.Module, run: Any, x: Any, names: list[str | None]) -> Tensor:
    """Each sample by itself, with its adapter set."""
    outs = []
    for sample, name in zip(range(len(names)), names, strict=True):
        set_adapter(model, name)
        outs.append(run(model, {k: v[sample : sample + 1] for k, v in x.items()}))
    set_adapter(model, "third")
    return torch.cat(outs)


def inputs(*shape: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(len(NAMES), *shape, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    }


def call(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return model(**x)


LINEAR = UORAConfig(rank=4, target_modules=["rows", "mix"])
CASES: dict[str, Any] = {
    "linear": (Net, LINEAR, {}, (4, 7)),
    "without a head": (Net, UORAConfig(rank=4, target_modules=["rows"], trainable_modules=()), {}, (4, 7)),
    "convolution": (Net, UORAConfig(rank=4, target_modules=["conv", "rows"]), {}, (4, 7)),
    "biases": (Net, UORAConfig(rank=4, target_modules=["rows", "mix"], bias="adapted"), {}, (4, 7)),
    "others": (
        Net,
        LINEAR,
        {
            "second": UORAConfig(rank=9, target_modules=["rows"], seed=3),
            "third": UORAConfig(rank=4, target_modules=["mix", "conv"]),
        },
        (4, 7),
    ),
    "attention": (Attends, UORAConfig(rank=4, target_modules="attention"), {}, (3, 8)),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_sample_is_as_with_its_adapter_alone(kind: str):
    make, config, others, shape = CASES[kind]
    torch.manual_seed(0)
    model = three(make().double().eval(), config, others)
    x = inputs(*shape)
    with torch.no_grad():
        head = {k: v.clone() for k, v in model.head.state_dict().items()}
        wanted = alone(model, call, x, NAMES)
        set_adapter(model, None)
        base = call(model, x)[1:2]
        set_adapter(model, "third")
        with use_adapters(model, NAMES):
            found = call(model, x)
        after = call(model, x)
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
    others_than_base = [i for i, name in enumerate(NAMES) if name is not None]
    torch.testing.assert_close(found[others_than_base], wanted[others_than_base])
    torch.testing.assert_close(found[1:2], base)  # with the head of the adapter in use
    set_adapter(model, "third")
    with torch.no_grad():
        assert torch.equal(after, call(model, x))
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_every_named_adapter_gets_its_gradient_and_the_others_none():
    torch.manual_seed(0)
    model = three(Net().double(), LINEAR)
    add_adapter(model, "fourth")
    x, toward = inputs(4, 7), torch.randn(6, 3, dtype=torch.double)
    names = ["default", "second", "second", "default", "second", "default"]
    wanted: dict[str, list[Tensor]] = {}
    for name in ("default", "second"):
        twin = copy.deepcopy(model)
        set_adapter(twin, name)
        mine = [i for i, n in enumerate(names) if n == name]
        (call(twin, {"x": x["x"][mine]}) * toward[mine]).sum().backward()
        wanted[name] = [p.grad for p in trained(twin)]
    with use_adapters(model, names):
        out = call(model, x)
    (out * toward).sum().backward()
    for name in ("default", "second", "third", "fourth"):
        set_adapter(model, name)
        found = [p.grad for p in trained(model)]
        if name in wanted:
            for one, two in zip(found, wanted[name], strict=True):
                torch.testing.assert_close(one, two)
        else:
            assert all(g is None or not g.any() for g in found)


def trained(model: nn.Module) -> list[nn.Parameter]:
    vectors = [v for _, m in named_adapters(model) for v in (m.uora_d, m.uora_b)]
    return [*vectors, *model.head.parameters()]


def test_adapters_trained_side_by_side_end_where_each_ends_alone():
    """Three at once, by one optimizer, against three runs."""
    torch.manual_seed(0)
    model = Net().double()
    attach_uora(model, LINEAR)
    for name in ("second", "third"):
        add_adapter(model, name)
    base, x = copy.deepcopy(model), inputs(4, 7)
    goal = torch.randn(6, 3, dtype=torch.double)
    names = ["default", "second", "third"] * 2
    groups = [group for name in names[:3] for group in param_groups(model, 0.05, 0.05, 0.01, name)]
    assert [group["name"] for group in groups[:2]] == ["default/others", "default/uora_vectors"]
    for group in groups:
        group["weight_decay"] = 0.01
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        with use_adapters(model, names):
            (call(model, x) - goal).square().sum().backward()
        optimizer.step()
    for name in ("default", "second", "third"):
        twin = copy.deepcopy(base)
        set_adapter(twin, name)
        mine = [i for i, n in enumerate(names) if n == name]
        its = torch.optim.AdamW(trained(twin), lr=0.05)
        for _ in range(4):
            its.zero_grad()
            (call(twin, {"x": x["x"][mine]}) - goal[mine]).square().sum().backward()
            its.step()
        set_adapter(model, name)
        for one, two in zip(trained(model), trained(twin), strict=True):
            torch.testing.assert_close(one, two)


def test_refreshed_rows_mix():
    torch.manual_seed(0)
    model = three(Net().double().eval(), LINEAR)
    refresh(model, ReinitSchedule(threshold=9.0, max_fraction=0.5))
    set_adapter(model, "second")
    refresh(model, ReinitSchedule(threshold=9.0, max_fraction=0.25))
    set_adapter(model, "third")
    names = ["second", "third", "default", "third", "third", "second"]
    x = inputs(4, 7)
    wanted = alone(model, call, x, names)
    with use_adapters(model, names):
        torch.testing.assert_close(call(model, x), wanted)


@pytest.mark.filterwarnings("ignore")
def test_a_bert_and_its_heads_mix():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)).double().eval()
    three(model, UORAConfig(rank=4, target_modules="all-linear"))
    ids = torch.randint(0, 30, (6, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    x, names = {"input_ids": ids, "attention_mask": mask}, [n or "third" for n in NAMES]

    def run(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
        return model(**x).logits

    with torch.no_grad():
        wanted = alone(model, run, x, names)
        with use_adapters(model, names):
            torch.testing.assert_close(run(model, x), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_beams_and_left_padding_mixes(beams: int):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).double().eval()
    three(model, UORAConfig(rank=4, target_modules="all-linear", trainable_modules=()))
    ids = torch.randint(1, 40, (6, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    names = [n or "third" for n in NAMES]

    def run(model: Any, x: dict[str, Tensor]) -> Tensor:
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return model.generate(**x, num_beams=beams, **how)

    x = {"input_ids": ids, "attention_mask": mask}
    wanted = alone(model, run, x, names)
    with use_adapters(model, names):
        found = run(model, x)
    assert torch.equal(found, wanted)
    assert len({tuple(row.tolist()) for row in found[:, 4:]}) > 1


def test_checkpointing_inside_the_context_and_autocast_mix():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = three(Net(), LINEAR)
    x, names = inputs(4, 7)["x"].float(), ["second", "default"] * 3
    grads = []
    for again in (False, True):
        model.zero_grad()
        with use_adapters(model, names):
            out = checkpoint(model, x, use_reentrant=False) if again else model(x)
            out.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad(), use_adapters(model, names), torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    with torch.no_grad(), use_adapters(model, names):
        torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.1)


def narrow(model: nn.Module) -> None:
    add_adapter(model, "narrow")
    model.head.weight = nn.Parameter(model.head.weight[:2].detach().clone())
    model.head.bias = nn.Parameter(model.head.bias[:2].detach().clone())


def enter(model: nn.Module, names: Any, rows: int = 6) -> None:
    with use_adapters(model, names):
        model(torch.zeros(rows, 4, 7))


def alone_in(model: nn.Module) -> None:
    with use_adapters(model, ["second"] * 6):
        model.rows(torch.zeros(5, 6))


WRONG: dict[str, Any] = {
    "unknown": (lambda m: enter(m, ["secnd"] * 6), "no adapter is called 'secnd'; near misses: 'second'"),
    "length": (
        lambda m: enter(m, ["second"] * 6, 5),
        "batch has 5 samples, but use_adapters was given 6 names",
    ),
    "a string": (lambda m: enter(m, "second"), "names must be a list of one name for each sample"),
    "empty": (lambda m: enter(m, []), "names must be a list of one name for each sample"),
    "heads": (lambda m: (narrow(m), enter(m, ["narrow", "default"] * 3)), "within one batch"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_mixed_is_one_line_and_the_model_as_it_was(kind: str):
    torch.manual_seed(0)
    model = three(Net(), LINEAR)
    do, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        do(model)
    assert not any({"forward", "generate"} & set(m.__dict__) for m in model.modules())
    assert not model._forward_pre_hooks
    assert model.uora_projections.disabled == 0


def test_attention_that_is_not_batch_first_is_refused_by_name():
    model = Attends(batch_first=False)
    attach_uora(model, UORAConfig(rank=4, target_modules="attention"))
    with pytest.raises(ValueError, match="Attention 'attention' is not batch first"):
        enter(model, ["default"])
    encoder = nn.TransformerEncoderLayer(8, 2, 12)
    attach_uora(encoder, UORAConfig(rank=4, target_modules=["linear1"], trainable_modules=()))
    with pytest.raises(ValueError, match="MultiheadAttention 'self_attn' is not batch first"):
        enter(encoder, ["default"])


@pytest.mark.filterwarnings("ignore")
def test_models_that_see_tokens_first_are_refused_by_name():
    from transformers import XLNetConfig, XLNetModel

    model = XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))
    attach_uora(model, UORAConfig(rank=2, target_modules="all-linear", trainable_modules=()))
    with pytest.raises(ValueError, match="XLNetModel '' is not batch first"):
        enter(model, ["default"])


class Reads(Net):
    """Takes the weight of its layer, and asks what it is."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows.weight
        assert rows.dtype == x.dtype
        assert rows.shape == (5, 6) and rows.size(0) == 5 and rows.device == x.device
        h = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(nn.functional.linear(h, rows, self.rows.bias).mean(1))


def test_a_weight_that_another_module_computes_with_is_refused_instead_of_the_base():
    torch.manual_seed(0)
    model = three(Reads().double(), LINEAR)
    x = inputs(4, 7)["x"]
    before = model(x)
    with (
        use_adapters(model, NAMES),
        pytest.raises(ValueError, match="another module reads the weight of 'rows'"),
    ):
        model(x)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_layers_mix_where_they_would_take_a_fused_path(training: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train(training)
    three(model, UORAConfig(4, "all", trainable_modules=()))
    x = torch.randn(6, 3, 8, dtype=torch.double)
    with torch.no_grad():
        wanted = alone(model, lambda m, s: m(s["src"]), {"src": x}, NAMES)
        with use_adapters(model, NAMES):
            torch.testing.assert_close(model(x), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_mixes(backend: str):
    torch.manual_seed(0)
    model = three(Net(), LINEAR)
    x = inputs(4, 7)["x"].float()
    compiled = torch.compile(model, backend=backend)
    for names in (NAMES, NAMES[::-1]):
        grads = []
        for one in (model, compiled):
            model.zero_grad()
            with use_adapters(model, names):
                out = one(x)
                out.square().sum().backward()
            grads.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted)
    set_adapter(model, "default")
    torch.testing.assert_close(compiled(x), model(x))


def test_autocast_mixes_as_each_sample_does():
    torch.manual_seed(0)
    model = three(Net(), LINEAR)
    x = {"x": inputs(4, 7)["x"].float()}
    names = [name or "default" for name in NAMES]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = alone(model, call, x, names)
        with use_adapters(model, names):
            found = call(model, x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
