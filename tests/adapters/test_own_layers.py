"""New layers beside a pretrained model train, or are named; what the user froze as a whole stays frozen."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
import transformers
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uora import UORAConfig, attach_uora, load_adapter, save_adapter, summarize
from tests import families
from tests.toys import callback, data, trainer


def vit(**options):
    return timm.create_model("test_vit", num_classes=0, **options)


def bert():
    return transformers.BertModel(transformers.BertConfig(**families.BERT))


class Around(LightningModule):
    """A pretrained model and whatever stands beside it."""

    def __init__(self, backbone: nn.Module, **beside: nn.Module | nn.Parameter):
        super().__init__()
        self.backbone = backbone
        for name, part in beside.items():
            setattr(self, name, part)

    def training_step(self, batch):
        raise NotImplementedError


def trained(model: nn.Module, targets="attention", **options) -> set[str]:
    attach_uora(model, UORAConfig(rank=2, target_modules=targets, **options))
    return {name for name, _ in summarize(model).trained}


@pytest.mark.parametrize("backbone", [vit, bert])
@pytest.mark.parametrize(
    "name", ["linear", "out", "proj", "decoder", "predictor", "regressor", "logits", "projector", "whatever"]
)
def test_a_head_of_any_name_beside_a_librarys_model_trains(backbone, name: str):
    assert trained(Around(backbone(), **{name: nn.Linear(8, 3)})) == {name}


def test_small_networks_and_bare_parameters_beside_it_train_too():
    mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    scale = nn.Parameter(torch.ones(()))
    model = Around(vit(), anything=mlp, logit_scale=scale)
    assert trained(model, "all-linear") == {"anything", "logit_scale"}
    assert scale.requires_grad


def test_a_network_around_a_librarys_model_is_the_users_at_any_depth():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleDict({"image": vit(), "text": bert()})
            self.out = nn.Linear(8, 2)

    assert trained(Around(Net(), temperature=nn.Parameter(torch.ones(1)))) == {"backbone.out", "temperature"}


def test_torchvisions_head_and_what_stands_beside_it():
    model = Around(torchvision.models.resnet18(), calibrator=nn.Linear(3, 3))
    assert trained(model, "all") == {"backbone.fc", "calibrator"}


def test_what_is_no_head_is_named_in_the_table_and_before_the_fit():
    model = Around(vit(), memory=nn.GRU(8, 8), linear=nn.Linear(8, 3))
    assert trained(model) == {"linear"}
    assert summarize(model).left == ("memory",)
    assert "frozen at their start: memory" in str(summarize(model))


@pytest.mark.parametrize("settings", [{"trainable_modules": ["memory"]}, {"exclude_modules": ["memory"]}])
def test_what_was_named_is_not_told_again(settings):
    model = Around(vit(), memory=nn.GRU(8, 8), linear=nn.Linear(8, 3))
    attach_uora(model, UORAConfig(rank=2, **settings))
    assert "memory" not in summarize(model).left


def test_what_the_user_froze_as_a_whole_stays_frozen_and_is_not_told():
    teacher, head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2)
    model = Around(vit(), teacher=teacher, linear=head)
    assert trained(model) == {"linear"}
    assert summarize(model).left == ()


class Plain(LightningModule):
    """No library's model: names decide what is a head."""

    def __init__(self, **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch, batch_idx):
        h = self.body(batch[0])
        for name in ("odd", "linear"):
            h = getattr(self, name, nn.Identity())(h)
        return nn.functional.cross_entropy(h, batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_without_a_librarys_model_usual_names_train_and_others_are_told():
    model = Plain(linear=nn.Linear(6, 3), odd=nn.Linear(6, 6), shift=nn.Parameter(torch.zeros(6)))
    assert trained(model, ["body.*"]) == {"linear"}
    assert summarize(model).left == ("odd", "shift")


def test_a_fit_warns_of_what_stays_frozen():
    model = Plain(linear=nn.Linear(6, 3), odd=nn.Linear(6, 6))
    with pytest.warns(UserWarning, match=r"Frozen at their start: odd. If they are new, name them in "):
        trainer(callback(target_modules=["body.*"])).fit(model, data())


def test_parameters_can_be_named_and_travel(tmp_path):
    def model():
        torch.manual_seed(0)
        return vit()

    adapted = model()
    attach_uora(adapted, UORAConfig(rank=2, trainable_modules=["cls_token", "blocks.*.norm1", "norm.weight"]))
    names = {name for name, p in adapted.named_parameters() if p.requires_grad and "uora" not in name}
    norms = {f"blocks.{i}.norm1.{leaf}" for i in range(len(adapted.blocks)) for leaf in ("weight", "bias")}
    assert names == {"cls_token", "norm.weight", *norms}
    with torch.no_grad():
        adapted.cls_token.add_(1.0)
        adapted.norm.weight.mul_(3.0)
    save_adapter(adapted, tmp_path)
    other = model()
    load_adapter(other, tmp_path)
    assert torch.equal(other.cls_token, adapted.cls_token)
    assert torch.equal(other.norm.weight, adapted.norm.weight)


def test_a_name_that_matches_neither_module_nor_parameter_is_refused():
    with pytest.raises(ValueError, match=r"trainable_modules='cls_tokens' matches no module or parameter"):
        attach_uora(vit(), UORAConfig(rank=2, trainable_modules=["cls_tokens"]))
