"""What trains is decided when adapters are attached, written down, and found again by identity."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_uora import (
    UORAConfig,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    param_groups,
    save_adapter,
    summarize,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6))
        self.norm, self.body, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.norm(x + self.token)))


def trained(**options) -> Net:
    torch.manual_seed(0)
    model = Net()
    attach_uora(model, UORAConfig(rank=4, target_modules=["body"], **options))
    move(model)
    return model


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


FREEZES = {
    "all": lambda m: m.requires_grad_(False),
    "vectors": lambda m: [p.requires_grad_(False) for n, p in m.named_parameters() if "uora" in n],
    "head": lambda m: [m.head.requires_grad_(False)],
    "copied": lambda m: copy.deepcopy(m).requires_grad_(False),
    "pickled": lambda m: pickle.loads(pickle.dumps(m)).requires_grad_(False),
}


@pytest.mark.parametrize("freeze", FREEZES)
def test_freezing_after_training_changes_nothing_of_what_a_file_holds(freeze, tmp_path):
    model, x = trained(trainable_modules=["head"]), torch.randn(5, 6)
    want, counts = model(x), summarize(model)
    found = FREEZES[freeze](model)
    model = found if isinstance(found, nn.Module) else model
    assert summarize(model) == counts
    assert sum(len(group["params"]) for group in param_groups(model, 1e-3, 1e-2)) == 4
    save_adapter(model, tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), want)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        "body.uora_d", "body.uora_b", "head.weight", "head.bias",
    }  # fmt: skip


def test_what_is_unfrozen_by_hand_travels(tmp_path):
    model, x = trained(), torch.randn(5, 6)
    for p in (model.token, *model.norm.parameters()):
        p.requires_grad_(True)
    move(model)
    save_adapter(model, tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    assert torch.equal(other.token, model.token)
    torch.testing.assert_close(other(x), model(x))
    assert other.norm.weight.requires_grad
    model.requires_grad_(False)  # once saved it is written down
    save_adapter(model, tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    assert torch.equal(other.token, model.token)


def test_detaching_gives_back_who_trained_before():
    model = base()
    model.norm.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    attach_uora(model, UORAConfig(rank=4, target_modules=["body"]))
    model.requires_grad_(False)
    detach_uora(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=33, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval()


def test_a_tied_weight_trains_under_either_name_and_that_is_said(tmp_path):
    for name, other in (("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")):
        model = llama()
        with pytest.warns(UserWarning, match=f"and {other}.weight are one weight: training one trains both"):
            attach_uora(model, UORAConfig(rank=4, target_modules=["q_proj"], trainable_modules=[name]))
        assert model.lm_head.weight.requires_grad
        move(model)
        save_adapter(model, tmp_path)
        again = llama()
        load_adapter(again, tmp_path)
        ids = torch.arange(8)[None]
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_merging_leaves_the_other_users_of_a_shared_weight_alone(target):
    model, ids = llama(), torch.arange(8)[None]
    embedding = model.model.embed_tokens.weight.clone()
    attach_uora(model, UORAConfig(rank=4, target_modules=[target], trainable_modules=()))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    want = model(ids).logits
    detach_uora(model, merge=True)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (target != "lm_head")


class Student(nn.Module):
    """A net that trains, a teacher that its user froze, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.teacher = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))).requires_grad_(False)
        self.head = nn.Linear(6, 3)


def test_what_the_user_froze_beside_parts_that_train_stays_and_the_table_says_so():
    for targets in ("all-linear", "*.0", ["net.*", "teacher.*"]):
        model = Student()
        assert all(name.startswith("net.") for name in attach_uora(model, UORAConfig(4, targets)))
        assert summarize(model).kept == ("teacher",)
        assert "frozen by you: teacher" in str(summarize(model))


def test_a_frozen_layer_that_is_named_in_full_is_adapted():
    model = Student()
    assert attach_uora(model, UORAConfig(4, ["net.0", "teacher.1.0"])) == ["net.0", "teacher.1.0"]
    assert summarize(model).kept == ()


def test_a_backbone_that_its_user_froze_as_a_whole_is_adapted():
    model = Student()
    del model.teacher
    model.net.requires_grad_(False)
    assert attach_uora(model, UORAConfig(4, "all-linear")) == ["net.0", "net.1"]


@pytest.mark.parametrize("target", ["all-linear", "all"])
def test_experts_that_a_preset_passes_by_are_named(target):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=33, num_key_value_heads=2, num_local_experts=4, **sizes)
    )
    stacks = [m for m in model.modules() if "gate_up_proj" in m._parameters]
    if not stacks:
        pytest.skip("this version of transformers keeps experts as Linear layers")
    for module in stacks:  # as a quantiser would leave them
        module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.int8), requires_grad=False)
    with pytest.warns(
        UserWarning, match=r"does not adapt 'model.layers.\*.mlp.experts.gate_up_proj'.*% of the weights"
    ):
        names = attach_uora(model, UORAConfig(rank=4, target_modules=target))
    assert "model.layers.1.mlp.experts.down_proj" in names


class Distilling(nn.Module):
    """Two models of a library, in either order, of which the teacher may be frozen."""

    def __init__(self, student: str, teacher: str, frozen: bool, student_first: bool) -> None:
        super().__init__()
        made = {"student": timm.create_model(student, num_classes=4), "teacher": timm.create_model(teacher)}
        made["teacher"].requires_grad_(not frozen)
        for name in ("student", "teacher") if student_first else ("teacher", "student"):
            setattr(self, name, made[name])


VIT, CONV = "test_vit", "test_efficientnet"


@pytest.mark.parametrize("student_first", [True, False])
@pytest.mark.parametrize(
    ("student", "teacher", "targets"),
    [(VIT, VIT, "attention"), (VIT, CONV, "attention"), (CONV, VIT, "all"), (CONV, CONV, "all")],
)
def test_a_frozen_teacher_stays_as_it_is_head_and_all(student, teacher, targets, student_first: bool):
    model = Distilling(student, teacher, True, student_first)
    assert all(name.startswith("student.") for name in attach_uora(model, UORAConfig(4, targets)))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher.") for name in training)
    assert any(name.startswith("student.") and "uora" not in name for name in training)  # its head
    assert summarize(model).kept == ("teacher",)


@pytest.mark.parametrize("bias", ["adapted", "all"])
def test_biases_and_heads_of_a_frozen_part_stay_too_also_where_the_file_is_loaded(bias, tmp_path):
    model = nn.ModuleDict({"student": Net(), "teacher": Net().requires_grad_(False)})
    attach_uora(model, UORAConfig(4, ["body"], bias=bias))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"student.body.bias", "student.head.weight"} <= training
    assert ("student.norm.bias" in training) == (bias == "all")
    assert not any(name.startswith("teacher.") for name in training)
    save_adapter(model, tmp_path)
    plain = nn.ModuleDict({"student": Net(), "teacher": Net()})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "uora" not in k}, strict=False)
    load_adapter(plain, tmp_path, base_mismatch="warn")
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == training


def test_targets_within_a_frozen_teacher_alone_are_refused_unless_named_in_full():
    model = Distilling(CONV, VIT, True, True)
    with pytest.raises(ValueError, match="finds layers only in teacher, which you froze beside a model that"):
        attach_uora(model, UORAConfig(4))
    assert not any("uora" in name for name, _ in model.named_modules())
    attach_uora(model, UORAConfig(4, ["teacher.blocks.0.attn.qkv"]))
    assert [name for name, _ in named_adapters(model)] == ["teacher.blocks.0.attn.qkv"]


@pytest.mark.parametrize("frozen", ["both", "neither"])
def test_two_models_that_are_both_frozen_or_both_not_are_both_adapted(frozen: str):
    model = Distilling(VIT, VIT, False, True).requires_grad_(frozen == "neither")
    names = attach_uora(model, UORAConfig(4))
    assert {name.partition(".")[0] for name in names} == {"student", "teacher"}
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad and "head" in n} == {
        "student",
        "teacher",
    }


def test_a_features_only_backbone_is_a_model_and_what_stands_beside_it_is_new():
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model(CONV, features_only=True)
            self.mix = nn.Linear(8, 8)
            self.up = nn.Conv2d(8, 2, 1)

    model = Segmenter()
    attach_uora(model, UORAConfig(4, "re:encoder.*conv_pw"))
    assert model.mix.weight.requires_grad
    assert summarize(model).left == ("up",)
