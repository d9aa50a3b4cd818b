"""Quantised layers: the adapter around them trains as on the dequantised weight in float64."""

from __future__ import annotations

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn

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
from lightning_uora.adapters.functional import factored_delta
from lightning_uora.adapters.opaque import dequantised
from lightning_uora.adapters.own_rows import Own
from lightning_uora.reports import progress

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
LOWEST = ReinitSchedule(threshold=0.25, threshold_mode="fraction")
KINDS = ["nf4", "nf4 double", "fp4", "int8", "torchao int8", "torchao int4", "packed in buffers"]


class Packed(nn.Module):
    """As GPTQ's and AWQ's layers: integers and scales in buffers, no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x):
        return x @ (self.qweight.float() * self.scales).t() + self.bias


def quantised(model: nn.Sequential, kind: str, places=(0, 2)) -> nn.Sequential:
    for i in places:
        old = model[i]
        if kind in ("nf4", "nf4 double", "fp4"):
            options = {"quant_type": kind[:3], "compress_statistics": "double" in kind}
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, **options)
            new.load_state_dict(old.state_dict())
        elif kind == "int8":
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
        elif kind == "packed in buffers":
            new = Packed(old)
        else:
            continue
        model[i] = new
    model = model.to("cpu")  # bitsandbytes packs here
    if kind.startswith("torchao"):
        int8 = torchao.Int8WeightOnlyConfig()
        config = int8 if kind.endswith("8") else torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
        torchao.quantize_(model, config, lambda m, name: m in [model[i] for i in places])
    return model


def net(kind: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Linear(64, 5))
    return quantised(model, kind) if kind else model


def adapted(kind: str, **config) -> nn.Sequential:
    model = net(kind)
    names = attach_uora(
        model, UORAConfig(rank=8, target_modules=["0", "2"], trainable_modules=["3"], **config)
    )
    assert names == ["0", "2"]
    return model


def moved(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in named_adapters(model):
            layer.uora_d.copy_(torch.randn(8, generator=g))
            layer.uora_b.copy_(torch.randn(len(layer.uora_b), generator=g))
    return model


def inputs() -> torch.Tensor:
    return torch.randn(7, 64, generator=torch.Generator().manual_seed(2))


def plain(model: nn.Module) -> nn.Sequential:
    """The same in float64, of plain layers that hold the dequantised weights, adapted alike."""
    twin = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Linear(64, 5)).double()
    with torch.no_grad():
        for i in (0, 2):
            twin[i].weight.copy_(model[i].dequantised())
            twin[i].bias.copy_(model[i].bias)
        twin[3].load_state_dict(model[3].state_dict())
    config = model.uora_projections.config
    attach_uora(twin, config)
    twin.uora_projections.set({n: t.clone() for n, t in model.uora_projections.named_buffers()})
    with torch.no_grad():
        for (_, one), (_, other) in zip(named_adapters(twin), named_adapters(model), strict=True):
            one.uora_d.copy_(other.uora_d)
            one.uora_b.copy_(other.uora_b)
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit_and_disabling_gives_the_base(kind):
    base, model = net(kind), adapted(kind)
    x = inputs()
    assert torch.equal(model(x), base(x))
    moved(model)
    assert not torch.equal(model(x), base(x))
    with adapters_disabled(model):
        assert torch.equal(model(x), base(x))
    detach_uora(model)
    assert torch.equal(model(x), base(x))
    assert [type(layer) for layer in model] == [type(layer) for layer in base]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dequantised_weights_in_float64(kind):
    model = moved(adapted(kind))
    twin = plain(model)
    x = inputs().requires_grad_()
    y = x.detach().double().requires_grad_()
    model(x).square().sum().backward()
    twin(y).square().sum().backward()
    tolerance = 3e-2 if kind == "int8" else 1e-4  # bitsandbytes rounds the input to 8 bits as well
    torch.testing.assert_close(model(x).double(), twin(y), rtol=tolerance, atol=tolerance * 30)
    pairs = [(x.grad, y.grad)]
    for (_, one), (_, other) in zip(named_adapters(model), named_adapters(twin), strict=True):
        pairs += [(one.uora_d.grad, other.uora_d.grad), (one.uora_b.grad, other.uora_b.grad)]
    for one, other in pairs:
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("own", [False, True])
def test_the_adapters_own_part_passes_gradcheck_and_gradgradcheck(own):
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 4), (3, 4), (6, 3), (3,), (6,))
    x, A, B, d, b = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    rows = Own(torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])) if own else Own()
    wanted = [t.requires_grad_() for t in (x, d, b)]

    def part(x, d, b):
        return factored_delta(x, A, B, d, b, rows)

    assert torch.autograd.gradcheck(part, wanted)
    assert torch.autograd.gradgradcheck(part, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_training_refreshing_saving_and_loading_go_on_as_with_plain_layers(kind, tmp_path):
    model = adapted(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, losses = inputs(), []
    for step in range(8):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 4:
            assert refresh(model, LOWEST, optimizer)
    assert losses[-1] < losses[0]
    assert set(progress(model)) == {"update_ratio", "norm_d", "norm_b"}
    assert summarize(model).adapter_params == 8 + 128 + 8 + 64
    save_adapter(model, tmp_path / "adapter")
    twin = net(kind)
    load_adapter(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 10_000
    export_peft(model, tmp_path / "lora", format="lora")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_onto_the_unquantised_base_where_that_is_asked_for(kind, tmp_path):
    model = moved(adapted(kind))
    save_adapter(model, tmp_path)
    other = net()
    with pytest.raises(ValueError, match="trained on another base"):
        load_adapter(other, tmp_path)
    with pytest.warns(UserWarning, match="trained on another base"):
        load_adapter(other, tmp_path, base_mismatch="warn")
    difference = (other(inputs()) - model(inputs())).norm() / model(inputs()).norm()
    assert difference < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_or_leaves_plain_linear_layers(kind):
    model = moved(adapted(kind))
    x = inputs()
    expected, weights = model(x), [model[i].dequantised() + model[i].delta_weight() for i in (0, 2)]
    with pytest.raises(ValueError, match=r"module '0' .* is quantised.*dequantize=True"):
        detach_uora(model, merge=True)
    assert torch.equal(model(x), expected)
    detach_uora(model, merge=True, dequantize=True)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    for i, W in zip((0, 2), weights, strict=True):
        assert torch.equal(model[i].weight, W)
    torch.testing.assert_close(
        model(x), expected, rtol=1e-2 if kind == "int8" else 1e-4, atol=0.3 if kind == "int8" else 1e-3
    )


@pytest.mark.parametrize("kind", ["nf4", "torchao int8", "packed in buffers"])
def test_copies_and_pickles_compute_the_same(kind):
    model = moved(adapted(kind))
    x = inputs()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if kind == "packed in buffers":
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8", "packed in buffers"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    model = moved(adapted(kind))
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    y = torch.utils.checkpoint.checkpoint(model, inputs().requires_grad_(), use_reentrant=reentrant)
    y.square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "torchao int4", "packed in buffers"])
def test_dropout_inputs_and_16_bits(kind):
    model = adapted(kind, dropout=0.5)
    moved(model).train()
    assert not torch.equal(model(inputs()), model(inputs()))
    model = adapted(kind, init="inputs")
    calibrate(model, [torch.randn(40, 64)])
    moved(model)(inputs()).sum().backward()
    assert model.uora_projections.matrices["A_64_0"].dtype == torch.float16
    model = moved(adapted(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(inputs())
    assert (y.float() - model(inputs())).norm() < 0.05 * y.float().norm()


def test_what_cannot_be_is_refused_in_a_line_and_the_model_is_as_it_was():
    model = net("nf4")
    with pytest.raises(ValueError, match=r"compute='merged' .* '0' .* is quantised"):
        attach_uora(model, UORAConfig(rank=4, target_modules=["0"], compute="merged"))
    model[0].forward = types.MethodType(type(model[0]).forward, model[0])
    with pytest.raises(ValueError, match=r"'0' .* its instance has a forward of its own"):
        attach_uora(model, UORAConfig(rank=4, target_modules=["0"]))
    del model[0].forward
    both = nn.Sequential(bnb.nn.Embedding4bit(9, 64), model)
    with pytest.raises(ValueError, match=r"is a Embedding4bit"):
        attach_uora(both, UORAConfig(rank=4, target_modules=["0"]))
    assert not hasattr(model, "uora_projections")
    adapted_one = adapted("nf4")
    with pytest.raises(ValueError, match=r"growth='gradient' .* module '0' is quantised"):
        refresh(adapted_one, ReinitSchedule(growth="gradient", threshold=9.0))


def test_mixed_quantisations_are_adapted_together():
    torch.manual_seed(0)
    model = quantised(net("nf4"), "packed in buffers", places=(3,))
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", trainable_modules=()))
    assert [name for name, _ in named_adapters(model)] == ["0", "2", "3"]
    model(inputs()).sum().backward()
    assert all(layer.uora_b.grad is not None for _, layer in named_adapters(model))


def test_a_forward_that_accelerate_keeps_goes_through_the_adapter():
    hooks = pytest.importorskip("accelerate.hooks")
    base = net("nf4")
    for layer in base:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
    before = base(inputs())
    attach_uora(base, UORAConfig(rank=8, target_modules=["0", "2"], trainable_modules=["3"]))
    assert torch.equal(base(inputs()), before)
    moved(base)
    torch.testing.assert_close(base(inputs()), moved(adapted("nf4"))(inputs()))
    detach_uora(base)
    assert torch.equal(base(inputs()), before)


def test_a_quantised_transformer_from_transformers_trains_and_generates(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=97, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(  # noqa: E731
            tmp_path / "base", quantization_config=quantisation, device_map={"": "cpu"}
        )
        model, ids = load().requires_grad_(False), torch.arange(24).reshape(2, 12)
        before = model.train()(ids).logits  # in evaluation some CPUs compute otherwise without an adapter
        names = attach_uora(model, UORAConfig(rank=16, target_modules="all-linear"))
        assert len(names) == 14
        assert torch.equal(model(ids).logits, before)
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses = []
        for _ in range(6):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.eval()
        made = model.generate(ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
        save_adapter(model, tmp_path / "adapter")
        twin = load()
        load_adapter(twin, tmp_path / "adapter")
        assert torch.equal(twin.generate(ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0), made)


def test_a_layer_without_a_way_of_its_own_is_dequantised_by_unit_vectors():
    packed = Packed(net()[0])
    torch.testing.assert_close(dequantised(packed, packed.forward), packed.qweight.float() * packed.scales)


def test_an_evaluation_neither_changes_the_base_nor_stops_its_gradients(tmp_path):
    """Some CPUs make bitsandbytes pack its 4-bit weights otherwise as soon as they evaluate."""
    model = net("nf4").eval()
    with torch.no_grad():
        model(inputs())
    attach_uora(model, UORAConfig(rank=8, target_modules=["0", "2"], trainable_modules=["3"]))
    moved(model)
    save_adapter(model, tmp_path / "before")
    with torch.no_grad():
        evaluated = model(inputs())
    assert torch.equal(model(inputs()), evaluated)
    x = inputs().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().max() > 0
    save_adapter(model, tmp_path / "after")
    for folder in ("before", "after"):
        twin = net("nf4").eval()
        with torch.no_grad():
            twin(inputs())
        load_adapter(twin, tmp_path / folder)
    detach_uora(model)
    assert (
        model[0].__dict__.items()
        >= {"support_avx512bf16_for_cpu": net("nf4")[0].support_avx512bf16_for_cpu}.items()
    )


def test_dequantising_without_merging_is_refused():
    model = adapted("nf4")
    with pytest.raises(ValueError, match=r"dequantize=True needs merge=True"):
        detach_uora(model, dequantize=True)
    assert hasattr(model, "uora_projections")


@pytest.mark.parametrize("kind", ["nf4", "packed in buffers"])
def test_a_quantised_layer_may_be_the_whole_model(kind, tmp_path):
    """Then A and B lie inside of it, and are not its packed numbers."""
    model, twin = (net(kind)[0] for _ in range(2))
    attach_uora(model, UORAConfig(rank=8, target_modules="all-linear"))
    moved(model)
    refresh(model, LOWEST)
    save_adapter(model, tmp_path)
    load_adapter(twin, tmp_path)
    assert torch.equal(twin(inputs()), model(inputs()))


def test_a_quantised_layer_beside_one_that_is_not_is_adapted_too():
    """Its weight never wants a gradient, which is no sign that its user froze it."""
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(layer), nn.LayerNorm(64))
    assert attach_uora(model, UORAConfig(4, "all-linear", trainable_modules=())) == ["0", "1.0"]


def test_a_quantised_part_that_its_user_froze_stays_as_it_is():
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    teacher = nn.Sequential(layer, nn.LayerNorm(64)).requires_grad_(False)
    model = nn.Sequential(nn.Linear(64, 64), teacher)
    assert attach_uora(model, UORAConfig(4, "all-linear", trainable_modules=())) == ["0"]
    assert summarize(model).kept == ("1",)


class Clipped(Packed):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Doubled(Packed):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, -1)


class ClippedFourBits(bnb.nn.Linear4bit):
    def forward(self, x):
        return super().forward(x).clamp(-0.1, 0.1)


def clipped_four_bits() -> nn.Module:
    new = ClippedFourBits(8, 5, compute_dtype=torch.float32, quant_type="nf4")
    new.load_state_dict(nn.Linear(8, 5).state_dict())
    return new.to("cpu")


@pytest.mark.parametrize(
    "make", [lambda: Clipped(nn.Linear(8, 5)), lambda: Doubled(nn.Linear(8, 5)), clipped_four_bits]
)
def test_a_packed_module_that_is_no_linear_map_is_refused_by_name_and_the_model_is_as_it_was(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(5, 2))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"module '0' \(\w+\) is quantised and not a linear map"):
        attach_uora(model, UORAConfig(2, ["0", "1"], trainable_modules=()))
    assert list(model.state_dict()) == list(before.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alone", [True, False])
def test_eight_bits_without_a_bias_merge_to_the_models_dtype(dtype, alone):
    """The layer tells no dtype: its first output does, or the rest of the model."""
    torch.manual_seed(0)
    old = nn.Linear(8, 8, bias=False)
    new = bnb.nn.Linear8bitLt(8, 8, bias=False, has_fp16_weights=False)
    new.load_state_dict(old.state_dict())
    model = nn.Sequential(new, *([] if alone else [nn.Linear(8, 8)])).to(dtype).to("cpu")
    attach_uora(model, UORAConfig(3, ["0"], trainable_modules=()))
    nn.init.normal_(model[0].uora_b)
    x = torch.randn(5, 8).to(dtype)
    with torch.no_grad():
        y = model(x)
        detach_uora(model, merge=True, dequantize=True)
        assert model[0].weight.dtype == dtype
        assert (model(x).float() - y.float()).norm() < 0.05 * y.float().norm()
    if not alone:
        assert attach_uora(model, UORAConfig(3, ["0"], trainable_modules=())) == ["0"]
