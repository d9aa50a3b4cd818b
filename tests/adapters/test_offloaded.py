"""Layers that accelerate keeps in memory or on disk: adapted where they run, trained, saved, never merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    calibrate,
    detach_uora,
    export_peft,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.reports import progress

accelerate = pytest.importorskip("accelerate")
SIZES = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
X = torch.randint(0, 53, (2, 5), generator=torch.Generator().manual_seed(0))
CONFIG = UORAConfig(rank=4, target_modules="all-linear")


def base(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def offloaded(how: str, folder: Path, kind: str = "llama") -> Any:
    model = base(kind)
    if how == "memory":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"], "cpu")
    places |= {"model.layers.1": "disk", "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def moved(model: nn.Module, config: UORAConfig = CONFIG) -> nn.Module:
    attach_uora(model, config)
    return move(model)


def move(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_d.copy_(torch.randn(module.uora_d.shape, generator=generator))
            module.uora_b.copy_(0.3 * torch.randn(module.uora_b.shape, generator=generator))
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=X, labels=X).loss.backward()
    return {name: module.uora_d.grad.clone() for name, module in named_adapters(model)}


@pytest.mark.parametrize("how", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_an_offloaded_layer_computes_and_trains_as_one_in_its_place(tmp_path, how: str, kind: str):
    here, away = moved(base(kind)), moved(offloaded(how, tmp_path, kind))
    weights = [p for name, p in away.named_parameters() if "layers.1" in name and "uora" not in name]
    assert all(p.is_meta for p in weights)
    assert torch.equal(away(X).logits, here(X).logits)
    found, wanted = gradients(away), gradients(here)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    optimizer = torch.optim.AdamW([v for _, m in named_adapters(away) for v in (m.uora_d, m.uora_b)], lr=0.1)
    optimizer.step()
    assert not torch.equal(away(X).logits, here(X).logits)
    assert all(p.is_meta for p in weights)


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_its_files_are_those_of_a_model_in_its_place(tmp_path, how: str):
    here, away = moved(base()), moved(offloaded(how, tmp_path / "away"))
    save_adapter(away, tmp_path / "adapter")
    fresh = base()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(X).logits, here(X).logits)
    other = offloaded(how, tmp_path / "other")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(X).logits, here(X).logits)
    wrong = base()
    nn.init.ones_(wrong.model.layers[1].self_attn.q_proj.weight)
    with pytest.raises(ValueError, match="trained on another base"):
        load_adapter(wrong, tmp_path / "adapter")
    export_peft(away, tmp_path / "peft")
    found, wanted = progress(away), progress(here)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_calibration_and_refreshes_work_and_undoing_is_exact(tmp_path):
    plain, model = base(), offloaded("disk", tmp_path)
    kept = {name: dict(m.__dict__) for name, m in model.named_modules() if "_hf_hook" in m.__dict__}
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", init="inputs"))
    calibrate(model, [torch.randint(0, 53, (4, 9)) for _ in range(2)])
    move(model)
    assert refresh(model, ReinitSchedule(threshold=0.9))
    detach_uora(model)
    assert torch.equal(model(X).logits, plain(X).logits)
    for name, before in kept.items():
        now = model.get_submodule(name).__dict__
        assert now["_hf_hook"] is before["_hf_hook"]
        assert now["_old_forward"] == before["_old_forward"]
        assert set(now) == set(before)


def test_merging_an_offloaded_layer_is_refused_by_name_and_changes_nothing(tmp_path):
    model = moved(offloaded("disk", tmp_path))
    before = model(X).logits
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj' is offloaded.*Nothing was"):
        detach_uora(model, merge=True)
    assert torch.equal(model(X).logits, before)


def test_training_what_was_offloaded_after_attaching_is_refused_by_name(tmp_path):
    """Accelerate would load d and b anew for each forward; without gradients they are as they were."""
    model = accelerate.cpu_offload(moved(base()), execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(X).logits, moved(base())(X).logits)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' was offloaded after its"):
        model(X)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("merge", [False, True])
def test_hooks_that_are_removed_leave_a_model_that_detaches_and_merges(tmp_path, kind: str, merge: bool):
    """Removing a hook leaves the forward that it kept on the instance, which is then the adapter's."""
    from accelerate.hooks import remove_hook_from_submodules

    model = moved(offloaded("disk", tmp_path, kind))
    wanted, plain = model(X).logits, base(kind)
    remove_hook_from_submodules(model)
    if any(p.is_meta for p in model.parameters()):
        state = plain.state_dict()
        for name, p in list(model.named_parameters()):
            if p.is_meta:
                path, _, leaf = name.rpartition(".")
                dict(model.named_modules())[path]._parameters[leaf] = nn.Parameter(state[name].clone(), False)
    torch.testing.assert_close(model(X).logits, wanted)
    detach_uora(model, merge=merge)
    torch.testing.assert_close(model(X).logits, wanted if merge else plain(X).logits)


def test_experts_that_were_offloaded_after_attaching_are_refused_by_name():
    model = base("mixtral")
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("this version of transformers keeps experts as Linear layers")
    attach_uora(model, UORAConfig(rank=4, target_modules=["experts"], trainable_modules=()))
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"experts 'model.layers.0.mlp.experts.\w+' were offloaded after"):
        model(X)


def test_a_hook_of_accelerate_leaves_layers_factored_and_dropping(tmp_path):
    """It keeps the forward that it found; the adapter's own takes that place."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layer = nn.Sequential(nn.Linear(7, 5))
    add_hook_to_module(layer[0], AlignDevicesHook(execution_device="cpu"))
    attach_uora(layer, UORAConfig(rank=3, target_modules=["0"], dropout=0.5))
    nn.init.normal_(layer[0].uora_b)
    x = torch.ones(4, 7)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    detach_uora(layer)
    assert torch.equal(layer(x), layer(x))


def test_counters_see_a_model_on_meta_and_its_weights_may_come_later():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear", trainable_modules=()))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 7, device="meta")).sum().backward()
    assert counter.get_total_flops() > 2 * 2 * (7 * 5 + 5 * 3)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    twin = copy.deepcopy(plain)
    model.load_state_dict(plain.state_dict(), assign=True, strict=False)
    attach_uora(twin, UORAConfig(rank=4, target_modules="all-linear", trainable_modules=()))
    x = torch.randn(3, 7)
    assert torch.equal(move(model)(x), move(twin)(x))
