"""A from the inputs: against float64 eigenvectors of inputs computed literally, for every kind of layer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    calibrate,
    detach_uora,
    export_peft,
    load_adapter,
    named_adapters,
    rebuild,
    refresh,
    save_adapter,
)
from lightning_uora.adapters import attachment_of
from lightning_uora.inputs.calibration import inputs_observed
from lightning_uora.inputs.passes import Watch
from tests import families
from tests.inputs.test_moments import literal_axes, sines
from tests.toys import on_two_ranks, projections_of


def adapted(model: nn.Module, targets="all", rank: int = 3, **options) -> nn.Module:
    attach_uora(model, UORAConfig(rank=rank, target_modules=targets, init="inputs", **options))
    return model


def check_axes(A: torch.Tensor, inputs: torch.Tensor) -> None:
    """A's rows are the leading eigenvectors of ``inputs``, one by one, up to float16."""
    A, expected = A.float(), literal_axes(inputs)[0][: len(A)]
    cosines = (A.double() * expected).sum(1).abs() / math.sqrt(2)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=2e-3, rtol=0)
    torch.testing.assert_close(A.norm(dim=1), torch.full((len(A),), math.sqrt(2)), atol=2e-3, rtol=0)


def skewed(*shape: int) -> torch.Tensor:
    """Inputs with axes that are well apart."""
    return (
        torch.randn(*shape) @ torch.diag(0.5 ** torch.arange(shape[-1])) @ torch.randn(shape[-1], shape[-1])
    )


def own(model: nn.Module, name: str, n: int) -> torch.Tensor:
    return projections_of(model).down(n, dict(named_adapters(model))[name].layer_index)


def test_linear_layers_get_the_axes_of_what_they_receive_from_the_frozen_model():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 6))
    plain = copy.deepcopy(model)
    calibrate(adapted(model, "all-linear"), batches := [skewed(20, 7), skewed(3, 4, 7)])
    x = torch.cat([batch.reshape(-1, 7) for batch in batches])
    check_axes(own(model, "0", 7), x)
    check_axes(own(model, "2", 5), plain[1](plain[0](x)).detach())


def test_transformers_conv1d_has_its_inputs_in_columns():
    module = nn.Sequential(transformers.pytorch_utils.Conv1D(5, 7))
    calibrate(adapted(module), [x := skewed(30, 7)])
    check_axes(own(module, "0", 7), x)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_convolutions_get_the_axes_of_their_patches(mode: str):
    """Also where the module pads by itself, before the convolution."""
    model = nn.Sequential(nn.Conv2d(2, 4, 2, stride=2, padding=1, padding_mode=mode))
    calibrate(adapted(model), [x := torch.randn(5, 2, 9, 9)])
    padded = functional.pad(x, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    check_axes(own(model, "0", 8), functional.unfold(padded, 2, stride=2).mT.reshape(-1, 8))


def test_a_grouped_convolution_counts_every_groups_slice():
    model = nn.Sequential(nn.Conv1d(6, 4, 3, groups=2, dilation=2))
    calibrate(adapted(model), [x := torch.randn(8, 6, 11)])
    rows = [x[:, g : g + 3, t : t + 5 : 2].reshape(8, 9) for g in (0, 3) for t in range(7)]
    check_axes(own(model, "0", 9), torch.cat(rows))


def test_a_standardised_weight_is_still_the_layers():
    model = nn.Sequential(timm.layers.StdConv2d(2, 4, 2))
    calibrate(adapted(model), [x := torch.randn(5, 2, 9, 9)])
    check_axes(own(model, "0", 8), functional.unfold(x, 2).mT.reshape(-1, 8))


def attention_output(module: nn.MultiheadAttention, q, k, v) -> torch.Tensor:
    """What reaches ``out_proj``, one head at a time; batch first."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    parts = [x @ W.t() + b for x, W, b in zip((q, k, v), weights, module.in_proj_bias.chunk(3), strict=True)]
    out = []
    for Q, K, V in zip(*(part.chunk(module.num_heads, -1) for part in parts), strict=True):
        out.append(torch.softmax(Q @ K.mT / math.sqrt(Q.shape[-1]), -1) @ V)
    return torch.cat(out, -1).reshape(-1, q.shape[-1]).detach()


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)
        nn.init.normal_(self.attention.in_proj_bias)
        nn.init.normal_(self.attention.out_proj.weight)

    def forward(self, q, k, v):
        return self.attention(q, k, v)[0]


def test_fused_attention_pools_what_it_receives_and_out_proj_gets_its_own():
    model = Attends()
    plain = copy.deepcopy(model.attention)
    q, k = skewed(4, 5, 6), skewed(4, 7, 6)
    calibrate(adapted(model, "attention"), [(q, k, k), (q, q, q)])
    flat_q, flat_k = q.reshape(-1, 6), k.reshape(-1, 6)
    check_axes(own(model, "attention", 6), torch.cat([flat_q, flat_k, flat_q]))
    reached = [attention_output(plain, q, k, k), attention_output(plain, q, q, q)]
    check_axes(own(model, "attention.out_proj", 6), torch.cat(reached))


@pytest.mark.parametrize(("kdim", "vdim"), [(4, 5), (4, 4), (6, 4)])
def test_separate_attention_has_one_a_for_each_width(kdim: int, vdim: int):
    model = Attends(kdim=kdim, vdim=vdim)
    plain = copy.deepcopy(model.attention)
    q, k, v = skewed(4, 5, 6), skewed(4, 7, kdim), skewed(4, 7, vdim)
    calibrate(adapted(model, "attention"), [(q, k, v)])
    for n in {6, kdim, vdim}:
        pooled = [x.reshape(-1, n) for x in (q, k, v) if x.shape[-1] == n]
        check_axes(own(model, "attention", n), torch.cat(pooled))
    check_axes(own(model, "attention.out_proj", 6), attention_output(plain, q, k, v))


def test_the_fused_path_of_a_transformer_layer_is_not_taken_and_every_part_is_seen():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2)
    first = copy.deepcopy(model.layers[0]).eval()
    calibrate(adapted(model, "all-linear"), [x := skewed(9, 5, 6)])
    check_axes(own(model, "layers.0.self_attn", 6), x.reshape(-1, 6))
    middle = first.norm1(x + first.self_attn(x, x, x)[0])
    check_axes(own(model, "layers.0.linear1", 6), middle.reshape(-1, 6).detach())


@pytest.mark.filterwarnings("ignore")
def test_beit_reads_its_weight_past_the_module_and_is_seen():
    model, x = families.timm_model("beit_tiny")
    images = torch.cat([x, torch.randn_like(x)])
    inputs = []
    model.blocks[0].norm1.register_forward_hook(lambda module, args, out: inputs.append(out))
    adapted(model, "attention")
    calibrate(model, [images])
    check_axes(own(model, "blocks.0.attn.qkv", 48), inputs[0].detach().reshape(-1, 48))


SWEPT = [*(f"timm {name}" for name in families.TIMM), "Bert", "GPT2", "Llama", "T5", "Bart", "ViT", "Mixtral"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SWEPT)
def test_every_layer_of_a_family_is_reached(family: str):
    if family.startswith("timm "):
        model, x = families.timm_model(family[5:])
        batches, run, target = [x, x.flip(-1), torch.randn_like(x)], None, families.TIMM[family[5:]]
    else:
        model, once = families.transformers_model(family)
        batches, run, target = [0, 1], lambda _: once(model), "all-linear"
    adapted(model, target, rank=1)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, batches, run)
    names = {f"A_{p.n}_{m.layer_index}" for _, m in named_adapters(model) for p in m.adapted_parts}
    buffers = dict(projections_of(model).named_buffers())
    assert names <= set(buffers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)


def test_a_wide_layer_is_sketched_to_nearly_the_same_axes():
    model = nn.Sequential(nn.Linear(300, 5))
    spread = torch.linalg.qr(torch.randn(300, 300))[0] * torch.arange(1.0, 301) ** -1.0
    batches = [torch.randn(200, 300) @ spread.t() for _ in range(3)]
    calibrate(adapted(model, "all-linear", rank=6), batches)
    assert sines(own(model, "0", 300), literal_axes(torch.cat(batches))[0][:6]).max() < 0.05


def test_shared_projections_come_from_all_inputs_of_a_width():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    plain = copy.deepcopy(model)
    calibrate(adapted(model, "all-linear", share="model"), [x := skewed(40, 5)])
    assert set(projections_of(model)._buffers) == {"A_5", "B_5"}
    check_axes(projections_of(model).down(5), torch.cat([x, plain[1](plain[0](x))]).detach())


@pytest.mark.parametrize("compute", ["merged", "factored"])
def test_b_is_the_seeded_draw_and_a_is_made_of_float16_numbers(compute: str):
    model, other = nn.Sequential(nn.Linear(7, 5)), nn.Sequential(nn.Linear(7, 5))
    calibrate(adapted(model, "all-linear", compute=compute), [x := skewed(20, 7)])
    attach_uora(other, UORAConfig(rank=3, target_modules="all-linear"))
    assert torch.equal(projections_of(model).up(5, 0), projections_of(other).up(5, 0))
    A = own(model, "0", 7)
    assert torch.equal(A, A.half().float())
    nn.init.normal_(model[0].uora_b)
    model(x).square().sum().backward()
    assert model[0].uora_d.grad.abs().min() > 0


def test_calibration_is_deterministic_and_depends_on_no_global_state():
    results = []
    for seed in (1, 2):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 81, 4))
        model.load_state_dict({k: torch.full_like(v, 0.1) for k, v in model.state_dict().items()})
        torch.manual_seed(seed)
        batches = [torch.randn(3, 2, 11, 11, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        state = torch.get_rng_state()
        calibrate(adapted(model, rank=5), batches)
        assert torch.equal(state, torch.get_rng_state())
        results.append(dict(projections_of(model).named_buffers()))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Shifting(nn.Module):
    """BatchNorm, dropout, a counter."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.second(functional.dropout(self.norm(self.first(x)), 0.5, self.training))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_a_changes(training: bool):
    model = adapted(Shifting().train(training), "all-linear")
    model.norm.eval()
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    calibrate(model, [torch.randn(9, 4)])
    after = model.state_dict()
    new = {"uora_projections.A_4_0", "uora_projections.A_6_1", "uora_projections.record"}
    assert set(after) - set(state) == new
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert [m.training for m in model.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.calls == []
    assert projections_of(model).on_read is None
    assert projections_of(model).disabled == 0


def nan_in_second(model: Shifting) -> None:
    with torch.no_grad():
        model.norm.weight[2] = float("nan")


def never_second(model: Shifting) -> None:
    model.second.forward = lambda x: x


BAD = {
    "no batch": ([], None, "batches is empty"),
    "one tensor": (torch.randn(9, 4), None, r"batches is one Tensor; .* such as \[batch\]"),
    "nothing": (None, None, "batches is None"),
    "one mapping": ({"x": torch.randn(9, 4)}, None, "batches is one dict"),
    "refused": (
        [torch.randn(9, 4), torch.randn(9, 5)],
        None,
        "batch 1 was refused by the model: RuntimeError",
    ),
    "labels too": (
        [(torch.randn(9, 4), torch.zeros(9))],
        None,
        r"refused .*TypeError.*It was called with its 2 items as arguments; say what it takes: "
        r"calibrate\(model, batches, forward=lambda batch: model\(batch\[0\]\)\)\.$",
    ),
    "labels by name": (
        [{"x": torch.randn(9, 4), "labels": torch.zeros(9)}],
        None,
        r"its 2 entries as named arguments; .* forward=lambda batch: model\(batch\['x'\]\)\)\.$",
    ),
    "non-finite inside": (
        [torch.randn(9, 4)],
        nan_in_second,
        "inputs of weight of module 'second' have non-finite",
    ),
    "non-finite batch": ([torch.full((9, 4), float("inf"))], None, "inputs of weight of module 'first' have"),
    "too few": ([torch.randn(2, 4)], None, "module 'first' receives only 2 rows, but calibration needs 3"),
    "not reached": (
        [torch.randn(9, 4)],
        never_second,
        "no calibration batch reaches weight of module 'second'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_a_clear_error_and_the_model_stays_as_it_was(kind: str):
    batches, spoil, message = BAD[kind]
    model = adapted(Shifting(), "all-linear")
    if spoil is not None:
        spoil(model)
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in after.items())
    assert [m.training for m in model.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert (model.calls, projections_of(model).disabled, projections_of(model).on_read) == ([], 0, None)
    assert projections_of(model).uncalibrated
    assert torch.equal(random_state, torch.get_rng_state())


def test_calibrate_is_for_a_model_that_waits_for_it():
    with pytest.raises(ValueError, match="holds no adapted model"):
        calibrate(nn.Linear(3, 3), [])
    other = nn.Sequential(nn.Linear(4, 3))
    attach_uora(other, UORAConfig(rank=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="needs init='inputs'; the model has init='orthogonal'"):
        calibrate(other, [torch.randn(9, 4)])
    model = adapted(Shifting(), "all-linear")
    calibrate(model, [torch.randn(9, 4)])
    with pytest.raises(ValueError, match=r"already calibrated.*detach_uora"):
        calibrate(model, [torch.randn(9, 4)])
    with torch.device("meta"):
        empty = Shifting()
    with pytest.raises(ValueError, match="on the meta device"):
        calibrate(adapted(empty, "all-linear"), [torch.randn(9, 4, device="meta")])


def test_mappings_are_named_arguments_and_forward_may_say_otherwise():
    results = []
    for batches, forward in (
        ([torch.ones(9, 4).tril()], None),
        ([{"x": torch.ones(9, 4).tril()}], None),
        ([("label", torch.ones(9, 4).tril())], lambda batch: results[0](batch[1])),
    ):
        torch.manual_seed(0)
        model = adapted(Shifting(), "all-linear")
        results.insert(0, model)
        calibrate(model, iter(batches), forward)
    assert torch.equal(own(results[0], "first", 4), own(results[2], "first", 4))
    assert torch.equal(own(results[1], "second", 6), own(results[2], "second", 6))


def peft_folder(model, path):
    export_peft(model, path)


@pytest.mark.filterwarnings("ignore:PEFT's format cannot store BatchNorm")
@pytest.mark.parametrize(
    ("action", "run"),
    [
        ("training", lambda model, path: model(torch.randn(9, 4))),
        ("training", lambda model, path: model.eval()(torch.randn(9, 4))),
        ("saving an adapter", save_adapter),
        ("saving an adapter", lambda model, path: save_adapter(model, path, "full")),
        ("an export", peft_folder),
        ("a refresh", lambda model, path: refresh(model, ReinitSchedule())),
    ],
)
@pytest.mark.parametrize("compute", ["merged", "factored"])
def test_without_calibration_nothing_trains_is_saved_exported_or_refreshed(tmp_path, action, run, compute):
    model = adapted(Shifting(), "all-linear", compute=compute)
    with pytest.raises(ValueError, match=f"{action} needs A, .* comes from calibrate"):
        run(model, tmp_path / "a")
    with torch.no_grad():
        model(torch.randn(9, 4))
    calibrate(model, [torch.randn(9, 4)])
    run(model, tmp_path / "b")


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state dict": lambda model: loaded(adapted(Shifting(), "all-linear"), model),
}


def loaded(model: nn.Module, source: nn.Module) -> nn.Module:
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("how", COPIES)
def test_copies_know_whether_they_are_calibrated(how: str):
    model = adapted(Shifting(), "all-linear")
    assert projections_of(COPIES[how](model)).uncalibrated
    calibrate(model, [torch.randn(9, 4)])
    twin = COPIES[how](model)
    assert not projections_of(twin).uncalibrated
    x = torch.randn(9, 4)
    for one in (model, twin):
        nn.init.ones_(one.first.uora_b)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    detach_uora(twin)
    assert projections_of(adapted(twin, "all-linear")).uncalibrated


def test_a_model_that_lost_its_storage_has_to_be_calibrated_again():
    model, fresh = adapted(Shifting(), "all-linear"), adapted(Shifting(), "all-linear")
    calibrate(model, [torch.randn(9, 4)])
    refresh(model, ReinitSchedule(threshold=9.0))
    owner = projections_of(model.to("meta").to_empty(device="cpu"))
    assert owner.uncalibrated
    assert owner.record == []
    drawn = dict(projections_of(fresh).named_buffers())
    assert set(dict(owner.named_buffers())) == set(drawn)
    assert all(torch.equal(t, drawn[name]) for name, t in owner.named_buffers())


def trained(share: str = "layer", dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = adapted(Shifting().to(dtype), "all-linear", share=share)
    calibrate(model, [torch.randn(30, 4).to(dtype)])
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
        nn.init.normal_(module.uora_d)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("projections", ["record", "full"])
@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_saved_adapter_loads_to_equal_outputs(tmp_path, share, projections, refreshed, dtype):
    model = trained(share, dtype)
    if refreshed:
        for _ in range(2):
            refresh(model, ReinitSchedule(threshold=1.0, max_fraction=0.7))
        assert len(projections_of(model).record) == 2
    save_adapter(model, tmp_path, projections)
    torch.manual_seed(0)
    twin = Shifting().to(dtype)
    load_adapter(twin, tmp_path)
    x = torch.randn(5, 4).to(dtype)
    assert torch.equal(twin.eval()(x), model(x))
    assert not projections_of(twin).uncalibrated
    buffers = dict(projections_of(model).named_buffers())
    assert all(torch.equal(t, buffers[name]) for name, t in projections_of(twin).named_buffers())


def test_a_record_holds_a_in_float16_and_b_not_at_all(tmp_path):
    from safetensors.torch import load_file

    save_adapter(trained(), tmp_path)
    stored = {k: t for k, t in load_file(tmp_path / "uora_adapter.safetensors").items() if "projections" in k}
    assert set(stored) == {"uora_projections.A_4_0", "uora_projections.A_6_1"}
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_a_stored_a_that_was_changed_is_found(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        projections_of(model).down(4, 0).mul_(1.5)
    from lightning_uora.storage.adapter_files import read
    from lightning_uora.storage.restoring import restore

    manifest, tensors = read(tmp_path)
    tensors["uora_projections.A_4_0"] = projections_of(model).down(4, 0).half()
    torch.manual_seed(0)
    other = adapted(Shifting(), "all-linear")
    with pytest.raises(ValueError, match="'A_4_0' are not those of the run"):
        restore(attachment_of(other, "a test"), manifest, tensors)
    assert projections_of(other).uncalibrated
    assert "A_4_0" not in dict(projections_of(other).named_buffers())


def test_rebuild_keeps_a_and_replays_b():
    model = trained()
    refresh(model, ReinitSchedule(threshold=1.0, max_fraction=0.7))
    before = {name: t.clone() for name, t in projections_of(model).named_buffers()}
    rebuild(model)
    after = dict(projections_of(model).named_buffers())
    assert set(after) == set(before)
    assert all(torch.equal(t, before[name]) for name, t in after.items())


@pytest.mark.filterwarnings("ignore")
def test_export_as_lora_loads_in_peft_with_equal_outputs_and_vera_is_refused(tmp_path):
    import peft

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 7))
    model = adapted(copy.deepcopy(plain), "all-linear")
    calibrate(model, [torch.randn(30, 7)])
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    export_peft(model, tmp_path / "lora")
    x = torch.randn(4, 7)
    there = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(there(x), model(x))
    with pytest.raises(ValueError, match="VeRA has one A and one B for all; use format='lora'"):
        export_peft(model, tmp_path / "vera", format="vera")


GROW = ReinitSchedule(growth="inputs", threshold=1.0, max_fraction=0.4, interpolation=1.0)


@pytest.mark.parametrize("share", ["layer", "model"])
def test_growth_by_inputs_takes_the_leading_axes_that_no_row_uses(share: str):
    """Literally: eigenvectors of the inputs' moment in the complement of all rows, largest first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    adapted(model, "all-linear", rank=3, share=share)
    calibrate(model, [torch.randn(30, 7)])
    nn.init.uniform_(model[0].uora_d)
    x = skewed(40, 7)
    before = projections_of(model).down(7, 0).clone()
    with inputs_observed(model, [x]):
        rows = refresh(model, GROW)
    (chosen,) = [indices for key, indices in rows.items() if key.startswith("A")]
    after = projections_of(model).down(7, 0)
    unit = before.double() / math.sqrt(2)
    rest = x.double() - x.double() @ unit.t() @ unit
    expected = literal_axes(rest)[0]
    assert len(chosen) == 1
    cosine = (after[chosen[0]].double() / math.sqrt(2)) @ expected[0]
    assert abs(cosine) > 0.999
    assert torch.equal(after, after.half().float())
    stay = [i for i in range(3) if i not in chosen]
    assert torch.equal(after[stay], before[stay])
    assert projections_of(model).unused_axes is None


def test_growth_by_inputs_looks_at_the_adapted_model_as_it_is():
    """The second layer's inputs are those that the adapters of the first make."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5))
    adapted(model, "all-linear", rank=3, compute="factored")
    x = skewed(40, 7)
    calibrate(model, [x])
    for module in model[:2]:
        nn.init.normal_(module.uora_d)
        nn.init.normal_(module.uora_b, std=3.0)
    with torch.no_grad():
        inner = model[0](x).double()
    unit = projections_of(model).down(7, 1).double() / math.sqrt(2)
    with inputs_observed(model, [x]):
        found = projections_of(model).unused_axes("A_7_1", torch.linalg.qr(unit.t())[0], 2)
    expected = literal_axes(inner - inner @ unit.t() @ unit)[0][:2]
    assert (found * expected).sum(1).abs().min() > 0.999


def test_growth_beyond_the_axes_that_are_there_draws_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 5))
    adapted(model, "all-linear", rank=4)
    calibrate(model, [torch.randn(30, 9)])
    nn.init.uniform_(model[0].uora_d)
    schedule = ReinitSchedule(growth="inputs", threshold=9.0, max_fraction=1.0, interpolation=1.0)
    with inputs_observed(model, [torch.randn(20, 1) @ torch.randn(1, 9)]):
        rows = refresh(model, schedule)
    A = projections_of(model).down(9, 0).float()
    assert rows["A_9_0"] == [0, 1, 2, 3]
    torch.testing.assert_close(A @ A.t(), 2 * torch.eye(4), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("init", "message"),
    [("orthogonal", "growth='inputs' needs init='inputs'"), ("inputs", "inside `with .*inputs_observed")],
)
def test_growth_by_inputs_says_what_it_needs(init: str, message: str):
    model = nn.Sequential(nn.Linear(7, 5))
    attach_uora(model, UORAConfig(rank=3, target_modules="all-linear", init=init))
    if init == "inputs":
        calibrate(model, [torch.randn(30, 7)])
    with pytest.raises(ValueError, match=message):
        refresh(model, GROW)


def test_a_compiled_model_is_calibrated_as_it_is_written():
    model = adapted(Shifting(), "all-linear")
    other = copy.deepcopy(model)
    x = torch.randn(9, 4)
    compiled = torch.compile(model, backend="eager")
    calibrate(model, [x], forward=compiled)
    calibrate(other, [x])
    assert torch.equal(own(model, "second", 6), own(other, "second", 6))


def _rank_calibrates(rank: int, path: str, port: int) -> None:
    meeting = f"tcp://localhost:{port}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 300), nn.Linear(300, 2)), "all-linear")
    x = torch.load(f"{path}/x.pt")
    calibrate(model, [x[rank::2]])
    own_error = ""
    fails = adapted(nn.Sequential(nn.Linear(7, 5)), "all-linear")
    try:
        calibrate(fails, [torch.randn(9, 7 + rank)])
    except ValueError as error:
        own_error = str(error)
    torch.save((dict(projections_of(model).named_buffers()), own_error), f"{path}/{rank}.pt")


def test_ranks_sum_their_moments_to_the_same_a_and_fail_together(tmp_path):
    x = skewed(60, 7)
    torch.save(x, tmp_path / "x.pt")
    on_two_ranks(_rank_calibrates, tmp_path)
    (one, error), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert set(one) == set(two)
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    check_axes(one["A_7_0"], x)
    assert "another process failed" in error
    assert "batch 0 was refused" in other


class Projected(nn.Module):
    """Query, key and value of one tensor, and a layer after them; ``odd`` says what is odd about it."""

    def __init__(self, odd: str = ""):
        super().__init__()
        self.q, self.k, self.v, self.after = (nn.Linear(7, 7) for _ in range(4))
        self.odd, self.calls = odd, 0
        self.got: dict[str, list[torch.Tensor]] = {name: [] for name in ("q", "k", "v", "after")}

    def use(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.got[name].append(x.detach().clone())
        return getattr(self, name)(x)

    def forward(self, x):
        self.calls += 1
        q = self.use("q", x)
        if self.odd == "written between":
            x.mul_(torch.linspace(1, 9, 7))
        if not (self.odd == "key left out" and self.calls == 2):
            k = self.use("k", -x.flip(-1) if self.odd == "key of another" and self.calls > 1 else x)
            q = q + k
        if self.odd == "query twice":
            q = q + self.use("q", x.flip(-1).contiguous())
        if self.odd == "value twice":
            q = q + self.use("v", x)
        return self.use("after", q + self.use("v", x))


@pytest.mark.parametrize(
    "odd", ["", "key of another", "key left out", "query twice", "value twice", "written between"]
)
def test_layers_that_get_one_tensor_share_a_moment_and_all_get_their_own_axes(odd: str):
    """Whatever company they keep, each A is that of what the layer received; sharing only spares memory."""
    plain, batches = Projected(odd), [skewed(20, 7) for _ in range(3)]
    models = [adapted(copy.deepcopy(plain), "all-linear") for _ in range(2)]
    with torch.no_grad():
        for x in batches:
            plain(x.clone())
    watch = Watch(attachment_of(models[0], "a test"), 3, off=True)
    watch.run([x.clone() for x in batches], None, models[0], fewest=0)
    assert len(watch.moments) == {"": 2, "written between": 3}.get(odd, 4)
    calibrate(models[1], [x.clone() for x in batches])
    for name, rows in plain.got.items():
        check_axes(own(models[1], name, 7), torch.cat(rows))
