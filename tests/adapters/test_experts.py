"""Experts: many weights in one parameter, each with vectors of its own, however they are run."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    adapters_disabled,
    attach_uora,
    calibrate,
    detach_uora,
    export_peft,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
    summarize,
)
from lightning_uora.adapters.by_row import delta_by_row
from lightning_uora.adapters.experts import AdaptedExperts
from lightning_uora.adapters.stand_in import ExpertsWeight
from lightning_uora.cli import main
from tests.experts_runs import adapted, look
from tests.sweep import transformers_models

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "llama4_text", "phimoe"]
FAMILIES += ["granitemoe", "jamba", "jetmoe", "nemotron_h", "aria_text", "lfm2_moe"]


class Block(nn.Module):
    """A router and experts of odd sizes, run one after the other; transposed or not."""

    def __init__(self, transposed: bool = False, experts: int = 5, n: int = 7, inner: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(n, experts)
        self.experts = Experts(transposed, experts, n, inner)
        self.out = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x, self.router(x).topk(2).indices))


class Experts(nn.Module):
    def __init__(self, transposed: bool, experts: int, n: int, inner: int) -> None:
        super().__init__()
        self.is_transposed, self.num_experts = transposed, experts
        up, down = ((n, inner), (inner, n)) if transposed else ((inner, n), (n, inner))
        self.up_proj = nn.Parameter(torch.randn(experts, *up) / 3)
        self.down_proj = nn.Parameter(torch.randn(experts, *down) / 3)

    def one(self, x: Tensor, W: Any) -> Tensor:
        return x @ W if self.is_transposed else functional.linear(x, W)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in chosen.unique():
            rows = (chosen == e).any(1)
            out = out.index_put(
                (rows,), self.one(self.one(x[rows], self.up_proj[e]).tanh(), self.down_proj[e]), True
            )
        return out


def model_and_input(**settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(9, settings.get("n", 7), dtype=torch.double)
    return Block(**settings).double().requires_grad_(False), x


stacked = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="transformers 4 keeps experts as Linear layers"
)


@stacked
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_computes_as_its_merged_copy_in_every_way_to_run_experts(kind: str):
    """Outputs and gradients, those of experts that were not hit zero; undone exactly."""
    try:
        built = transformers_models.build(kind)
    except (transformers_models.NotRunnableError, KeyError) as reason:
        pytest.skip(f"{kind}: {str(reason)[:80]}")
    seen = look(built.model, built.run)
    assert seen["output"] < 1e-5, seen
    assert seen["gradient"] < 1e-4, seen
    assert seen["moved"] > 1e-3, seen


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fresh_adapter_changes_no_bit_and_leaves_the_router_alone(transposed: bool):
    model, x = model_and_input(transposed=transposed)
    before = model(x)
    names = attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", trainable_modules=()))
    assert names == ["experts.up_proj", "experts.down_proj", "out"]
    assert torch.equal(model(x), before)
    assert summarize(model).adapter_params == 5 * (4 + 6) + 5 * (4 + 7) + 4 + 7


@pytest.mark.parametrize(
    "targets",
    [["experts"], ["experts.up_proj", "down_proj"], ["re:.*_proj"], "all"],
    ids=lambda t: str(t),
)
def test_experts_are_found_by_their_module_their_parameter_and_by_presets(targets):
    model, _ = model_and_input()
    names = attach_uora(model, UORAConfig(rank=4, target_modules=targets, trainable_modules=()))
    assert [name for name in names if name != "out"] == ["experts.up_proj", "experts.down_proj"]


def test_excluded_experts_stay_as_they_are():
    model, _ = model_and_input()
    config = UORAConfig(4, "all-linear", exclude_modules=["experts.up_proj"], trainable_modules=())
    assert attach_uora(model, config) == ["experts.down_proj", "out"]


USES = {
    "linear": lambda W, x, e: functional.linear(x, W[e]),
    "matmul": lambda W, x, e: x @ W[e].T,
    "mm": lambda W, x, e: torch.mm(x, W[e].t()),
    "addmm": lambda W, x, e: torch.addmm(torch.ones(6, dtype=x.dtype), x, W[e].mT),
    "unbind": lambda W, x, e: functional.linear(x, W.unbind()[e]),
    "iterate": lambda W, x, e: torch.stack([functional.linear(x, one) for one in W]),
    "cast": lambda W, x, e: functional.linear(x, W[e].to(x.dtype)),
    "bmm": lambda W, x, e: torch.bmm(x.expand(5, *x.shape), W.transpose(1, 2)),
    "bmm left": lambda W, x, e: W.bmm(x.t().expand(5, 7, 9)) if isinstance(W, Tensor) else torch.bmm(
        W, x.t().expand(5, 7, 9)
    ),
    "picked": lambda W, x, e: torch.bmm(W[torch.tensor([1, e, 1])], x[:3, :, None]),
    "slice": lambda W, x, e: torch.bmm(x.expand(2, *x.shape), W[1:3].mT),
    "mask": lambda W, x, e: torch.bmm(x[None], W[torch.arange(5) == e].transpose(-2, -1)),
    "chunk": lambda W, x, e: x @ W[e].chunk(2)[0].t(),
    "scaled": lambda W, x, e: x @ (2.0 * W[e] + 1.0).T,
    "whole": lambda W, x, e: torch.einsum("tn,emn->etm", x, W),
    "grouped": lambda W, x, e: grouped(W, x),
}  # fmt: skip


def grouped(W: Any, x: Tensor) -> Tensor:
    ends = torch.tensor([2, 2, 5, 8, 9], dtype=torch.int32)
    if isinstance(W, ExpertsWeight):
        return torch._grouped_mm(x.float(), W.transpose(-2, -1), offs=ends)
    starts = [0, *ends.tolist()]
    parts = [x[a:b].float() @ W[e].T for e, (a, b) in enumerate(pairwise(starts))]
    return torch.cat(parts)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("use", list(USES))
def test_whatever_is_done_with_the_weight_it_is_the_effective_one(use: str, transposed: bool):
    """Against the effective weight written out, and the gradients of the vectors too."""
    aligned = {"n": 8, "inner": 16} if use == "grouped" else {}  # as its kernels want rows
    model, x = model_and_input(transposed=transposed, **aligned)
    if use == "grouped":
        if not hasattr(torch, "_grouped_mm"):
            pytest.skip("torch has no grouped product")
        model, x = model.float(), x.float()
    attach_uora(model, UORAConfig(rank=4, target_modules=["experts.up_proj"], trainable_modules=()))
    (_, layer), generator = next(named_adapters(model)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.uora_b.copy_(torch.randn(layer.uora_b.shape, generator=generator))
        layer.uora_d.copy_(torch.randn(layer.uora_d.shape, generator=generator))
    W = model.experts._parameters["up_proj"]
    found, vectors = model.experts.up_proj, (layer.uora_d, layer.uora_b)
    written = W + layer.delta_weight()
    if transposed:
        found, written = found.transpose(1, 2), written.transpose(1, 2)
    try:
        mine = USES[use](found, x, 3)
    except (NotImplementedError, RuntimeError) as reason:
        if use == "grouped":
            pytest.skip(f"no kernel here: {str(reason)[:60]}")
        raise
    wanted = USES[use](written, x, 3)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    toward = torch.randn(wanted.shape, generator=generator, dtype=wanted.dtype)
    for one, two in zip(
        torch.autograd.grad(mine, vectors, toward), torch.autograd.grad(wanted, vectors, toward), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_the_update_by_row_has_the_gradients_of_its_formula():
    """First and second order in float64, with rows that pick one expert twice and one never."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (6, 5), "A": (4, 5), "B": (3, 4), "D": (3, 4), "b": (3, 3)}
    made = {k: torch.randn(s, generator=generator, dtype=torch.double) for k, s in shapes.items()}
    index = torch.tensor([0, 2, 2, 0, 2, 0])

    def run(x: Tensor, D: Tensor, b: Tensor) -> Tensor:
        return delta_by_row(x, index, made["A"], made["B"], D, b)

    given = [made[k].requires_grad_() for k in ("x", "D", "b")]
    each = [b * ((D * (made["A"] @ x)) @ made["B"].T) for x, D, b in
            ((made["x"][t], made["D"][i], made["b"][i]) for t, i in enumerate(index))]  # fmt: skip
    torch.testing.assert_close(run(*given), torch.stack(each))
    tokens = torch.tensor([0, 2, 1])  # one for two rows each
    torch.testing.assert_close(
        delta_by_row(made["x"], tokens, made["A"], made["B"], made["D"], made["b"]),
        delta_by_row(made["x"], tokens.repeat_interleave(2), made["A"], made["B"], made["D"], made["b"]),
    )
    assert gradcheck(
        lambda x, D, b: delta_by_row(x.reshape(3, 2, 5), tokens, made["A"], made["B"], D, b), given
    )
    assert gradcheck(run, given)
    assert gradgradcheck(run, given)
    run(*given).sum().backward()
    assert not made["D"].grad[1].any()
    assert not made["b"].grad[1].any()


def test_disabled_adapters_show_the_base_and_writes_reach_it():
    model, x = model_and_input()
    before = model(x)
    attach_uora(model, UORAConfig(rank=4, target_modules=["experts"], trainable_modules=()))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    assert not torch.allclose(model(x), before)
    with adapters_disabled(model):
        assert torch.equal(model(x), before)
    wanted = torch.randn(6, 7, dtype=torch.double)
    model.experts.up_proj[2].copy_(wanted)
    torch.testing.assert_close(model.experts.up_proj[2] * 1.0, wanted)
    nn.init.constant_(model.experts.down_proj, 0.5)
    torch.testing.assert_close(model.experts.down_proj.built(), torch.full((5, 7, 6), 0.5).double())
    whole = nn.Parameter(torch.randn(5, 6, 7, dtype=torch.double))
    model.experts.up_proj = whole
    torch.testing.assert_close(model.experts.up_proj * 1.0, whole * 1.0)
    with pytest.raises(ValueError, match=r"can only be set to an nn\.Parameter"):
        model.experts.up_proj = nn.Parameter(torch.zeros(4, 6, 7))
    with pytest.raises(ValueError, match=r"jit.script cannot compile adapted experts"):
        torch.jit.script(model.experts)


def test_copies_pickles_and_state_dicts_carry_experts():
    model, x = model_and_input()
    plain = copy.deepcopy(model)
    adapted(model)
    wanted = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
        assert other.experts is not model.experts
        nn.init.zeros_(next(m for _, m in named_adapters(other)).uora_b)
        assert not torch.equal(other(x), wanted)
    for assign in (False, True):
        twin = copy.deepcopy(plain)
        attach_uora(twin, UORAConfig(rank=5, target_modules="all-linear", trainable_modules=()))
        twin.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(twin(x), wanted)
    detach_uora(model)
    assert type(model.experts) is Experts
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("share", ["layer", "model"])
def test_experts_are_refreshed_saved_loaded_and_merged(tmp_path, share: str):
    model, x = model_and_input()
    base = copy.deepcopy(model)
    config = UORAConfig(6, ["experts", "out"], trainable_modules=(), share=share)
    attach_uora(model, config)
    generator = torch.Generator().manual_seed(4)
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, generator=generator)
        nn.init.normal_(module.uora_d, std=0.01, generator=generator)
        module.uora_d.data[..., [0, 2]] = 1e-6  # weak in every expert
    rows = refresh(model, ReinitSchedule(threshold=0.1, max_fraction=0.5))
    assert rows
    assert all({0, 2} <= set(chosen) for chosen in rows.values())
    wanted = model(x)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(x), wanted)
    if share == "layer":
        model.uora_projections.gradients = {(0, "up_proj"): torch.zeros(())}
        with pytest.raises(ValueError, match="holds experts, whose weight is never built whole"):
            refresh(model, ReinitSchedule(growth="gradient"))
    detach_uora(model, merge=True)
    torch.testing.assert_close(model(x), wanted)


def test_a_row_that_one_expert_needs_is_not_weak():
    model, _ = model_and_input()
    attach_uora(model, UORAConfig(6, ["experts.up_proj"], trainable_modules=()))
    (_, layer) = next(named_adapters(model))
    layer.uora_d.data[:, 3] = 0.0
    layer.uora_d.data[4, 3] = 0.04  # weak in the mean of the experts, and not in this one
    assert refresh(model, ReinitSchedule(threshold=0.1)) == {}


def test_a_comes_from_the_inputs_of_all_experts():
    """Through the factored products, with adapters off: A spans the inputs' largest direction."""
    model, x = model_and_input()
    x[:, 2] *= 100.0
    attach_uora(model, UORAConfig(3, ["experts"], trainable_modules=(), init="inputs"))
    calibrate(model, [x])
    A = model.uora_projections.down(7, 0)
    assert A[0, 2].abs() > 0.99


@pytest.mark.parametrize("bias", ["adapted", "all"])
def test_biases_of_adapted_experts_train_when_asked(bias: str):
    model, _ = model_and_input()
    model.experts.up_proj_bias = nn.Parameter(torch.zeros(5, 6))
    attach_uora(model, UORAConfig(4, ["experts.up_proj"], trainable_modules=(), bias=bias))
    assert model.experts.up_proj_bias.requires_grad
    assert not model.experts._parameters["up_proj"].requires_grad


def test_dropout_acts_on_what_the_update_sees():
    model, x = model_and_input()
    attach_uora(model, UORAConfig(4, ["experts.up_proj"], trainable_modules=(), dropout=0.5))
    (_, layer) = next(named_adapters(model))
    nn.init.normal_(layer.uora_b)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@stacked
@pytest.mark.parametrize("max_rank", [None, 3])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_peft_loads_the_export_with_equal_outputs(tmp_path, kind: str, max_rank: int | None):
    built = transformers_models.build(kind)
    base = copy.deepcopy(built.model)
    model = adapted(built.model)
    export_peft(model, tmp_path / "out", max_rank=max_rank)
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert any(name.endswith("experts.down_proj") for name in told["target_parameters"])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    with torch.no_grad():
        found, wanted, plain = (built.run(m)[0] for m in (loaded, model, base))
    error, moved = (found - wanted).norm(), (plain - wanted).norm()
    assert error < (1e-4 if max_rank is None else 0.9) * moved
    attach_uora(base, UORAConfig(4, ["experts.down_proj"], trainable_modules=()))
    with pytest.raises(ValueError, match="holds experts, which PEFT's VeRA does not support"):
        export_peft(base, tmp_path / "vera", format="vera")


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 12}
SMALL |= {"num_experts_per_tok": 2}


def beside(kind: str) -> nn.Module:
    """Mixtures with dense or shared MLPs, whose layers are called as experts once were."""
    torch.manual_seed(0)
    if kind == "dense":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4, mlp_only_layers=[0])).eval()
    shared = {"shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **shared, num_experts=4)).eval()


@stacked
@pytest.mark.parametrize("target", ["all-linear", "down_proj"])
@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_dense_layers_beside_experts_reach_peft_too(tmp_path, kind: str, target: str):
    """PEFT takes their names for the experts'; so they go as parameters. From a folder as well."""
    base = beside(kind)
    model = copy.deepcopy(base)
    attach_uora(model, UORAConfig(4, target, trainable_modules=()))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, std=0.3)
    export_peft(model, tmp_path / "out")
    save_adapter(model, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "command")]) == 0
    x = torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        wanted, plain = model(x).logits, base(x).logits
        for folder in ("out", "command"):
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
            assert (loaded(x).logits - wanted).norm() < 1e-4 * (plain - wanted).norm()


def test_experts_called_w1_and_w2_are_told_by_their_sizes():
    model, _ = model_and_input()
    experts = nn.Module()
    experts.num_experts = 5
    experts.w1, experts.w2 = nn.Parameter(torch.zeros(5, 12, 7)), nn.Parameter(torch.zeros(5, 7, 6))
    model.experts = experts
    assert attach_uora(model, UORAConfig(4, "experts", trainable_modules=())) == ["experts.w1", "experts.w2"]


def test_experts_that_cannot_be_read_are_named_by_a_preset_outside_of_blocks_too():
    with pytest.warns(UserWarning, match=r"does not adapt 'up'.*is_transposed on their module"):
        assert attach_uora(Unclear(), UORAConfig(2, "all-linear", trainable_modules=())) == ["lin"]


class Unclear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.num_experts = nn.Linear(3, 3), 4
        self.up = nn.Parameter(torch.zeros(4, 3, 3))


@pytest.mark.parametrize("make", ["unclear", "quantised"])
def test_experts_that_cannot_be_read_are_refused_by_name(make: str):
    if make == "unclear":
        model: nn.Module = Unclear()
        name, reason = "up", "which does not show which axis is which"
    else:
        model, _ = model_and_input()
        packed = nn.Parameter(torch.zeros(5, 6, 7, dtype=torch.int8), requires_grad=False)
        model.experts.up_proj = packed
        name, reason = "experts.up_proj", "quantised experts cannot be adapted"
    before = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=reason) as raised:
        attach_uora(model, UORAConfig(rank=2, target_modules=[name], trainable_modules=()))
    assert repr(name) in str(raised.value)
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == before


@stacked
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_a_step_never_holds_a_copy_of_all_experts(way: str):
    """Peak memory of a step with adapters on all layers, against LoRA on attention alone plus one expert."""
    script = f"""
        import resource, sys, torch, peft
        from transformers import MixtralConfig, MixtralForCausalLM
        from lightning_uora import UORAConfig, attach_uora
        sizes = dict(hidden_size=512, intermediate_size=1792, num_attention_heads=8, num_key_value_heads=2)
        config = MixtralConfig(vocab_size=256, num_hidden_layers=1, num_local_experts=8, **sizes)
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
        model.set_experts_implementation({way!r})
        if sys.argv[1] == "uora":
            attach_uora(model, UORAConfig(rank=64, target_modules="all-linear"))
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        x = torch.randint(0, 256, (1, 128))
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        for _ in range(2):
            model(input_ids=x, labels=x).loss.backward()
        print(peak() - before)
    """
    found = {}
    for method in ("uora", "lora"):
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[method] = int(done.stdout.split()[-1])
    one_expert = 3 * 512 * 1792 * 4
    every_expert = 8 * one_expert
    assert found["uora"] < 1.3 * (found["lora"] + one_expert), found
    assert found["uora"] < found["lora"] + every_expert / 2, found


def test_a_kernel_that_wants_the_memory_is_told_what_to_do():
    model, _ = model_and_input()
    attach_uora(model, UORAConfig(rank=4, target_modules=["experts"], trainable_modules=()))
    assert model.experts.up_proj.data_ptr() < 64  # alignment, and no address
    weight = model.experts.up_proj
    weight._base = weight._base.to("meta")
    with pytest.raises(ValueError, match="set_experts_implementation"):
        weight.data_ptr()


def test_the_vectors_of_experts_are_named_modules():
    model, _ = model_and_input()
    attach_uora(model, UORAConfig(rank=4, target_modules=["experts"], trainable_modules=()))
    named = dict(named_adapters(model))
    assert {name: tuple(m.uora_d.shape) for name, m in named.items()} == {
        "experts.up_proj": (5, 4),
        "experts.down_proj": (5, 4),
    }
    assert all(isinstance(m, AdaptedExperts) for m in named.values())
    assert named["experts.up_proj"].delta_weight().shape == (5, 6, 7)
    assert torch.allclose(named["experts.up_proj"].update_norm(), torch.zeros(()))
    nn.init.normal_(named["experts.up_proj"].uora_b)
    whole = named["experts.up_proj"].delta_weight().norm()
    torch.testing.assert_close(
        named["experts.up_proj"].update_norm().double(), whole.double(), rtol=1e-4, atol=0
    )


class Listed(nn.Module):
    """A mixture whose experts are modules of their own."""

    def __init__(self, gate: str, experts: str = "experts"):
        super().__init__()
        made = [nn.Linear(6, 6) for _ in range(3)]
        self.add_module(experts, nn.ModuleList(made))
        self.add_module(gate, nn.Linear(6, 3))
        self.after = nn.Linear(6, 5)


@pytest.mark.parametrize("gate", ["gate", "router", "chooser"])
def test_routers_beside_experts_in_a_list_are_left_alone(gate):
    """Told by their name, or by as many outputs as there are experts."""
    model = nn.Sequential(Listed(gate), nn.Linear(6, 3))
    names = attach_uora(model, UORAConfig(2, "all-linear", trainable_modules=()))
    assert names == ["0.experts.0", "0.experts.1", "0.experts.2", "0.after", "1"]


def test_a_router_that_is_named_is_adapted():
    model = nn.Sequential(Listed("gate"))
    assert attach_uora(model, UORAConfig(2, ["0.gate"], trainable_modules=())) == ["0.gate"]


def test_nllb_moe_and_dbrx_keep_their_routers():
    transformers = pytest.importorskip("transformers")
    nllb = transformers.NllbMoeConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_experts=4,
        encoder_sparse_step=1, decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.NllbMoeModel(nllb).get_encoder()
    names = attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", trainable_modules=()))
    assert any("experts" in name for name in names)
    assert not [name for name in names if "router" in name]


class FlatExperts(nn.Module):
    """All experts in one matrix, as DBRX keeps them, in a model without numbered blocks."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4 * 6, 6))

    def forward(self, x):
        return x @ self.w1[:6].t()


def test_experts_in_one_matrix_are_named_where_no_block_is_numbered():
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "mixture": FlatExperts()})
    with pytest.warns(UserWarning, match=r"does not adapt 'mixture.w1'"):
        attach_uora(model, UORAConfig(2, "all-linear", trainable_modules=()))
