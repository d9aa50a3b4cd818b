"""Whoever writes to an adapted layer's weight reads it back, or is told; the base is never adapted twice."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.pytorch_utils import Conv1D

from lightning_uora import UORAConfig, attach_uora, detach_uora, named_adapters
from tests import reference

MODULES = {
    "Linear": lambda: nn.Linear(7, 5),
    "transformers Conv1D": lambda: Conv1D(5, 7),
    "Conv2d grouped": lambda: nn.Conv2d(6, 4, (3, 2), groups=2),
}
WRITES = {
    "copy_": lambda w: w.copy_(torch.arange(w.numel(), dtype=w.dtype).reshape(w.shape)),
    "mul_": lambda w: w.mul_(2.0),
    "operator": lambda w: w.__imul__(0.5),
    "entry": lambda w: w.__setitem__(0, 3.0),
    "masked": lambda w: w.masked_fill_(w > 0, -1.0),
    "zeros": lambda w: nn.init.zeros_(w),
    "trunc_normal": lambda w: nn.init.trunc_normal_(w, generator=torch.Generator().manual_seed(1)),
    "data": lambda w: w.data.mul_(-1.0),
    "data of data": lambda w: w.data.data.add_(1.0),
    "detach": lambda w: w.detach().add_(1.0),
    "clamp": lambda w: w.clamp_(min=0.1),
}


def adapted(make, training: bool, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = make()
    root = nn.Sequential(layer, nn.Identity())
    attach_uora(root, UORAConfig(rank=3, target_modules=["0"], trainable_modules=(), **options))
    with torch.no_grad():
        layer.uora_b.normal_()
        layer.uora_d.normal_()
    return root.train(training), layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", MODULES)
def test_what_is_written_in_place_reads_back_and_changes_the_base_alone(kind, write, training):
    """With P a plain tensor of the effective weight's numbers: after the same write both hold the same."""
    root, layer = adapted(MODULES[kind], training)
    d, b = layer.uora_d.clone(), layer.uora_b.clone()
    with torch.no_grad():
        P, delta = layer.weight.clone(), layer.delta_weight().clone()
        WRITES[write](P)
        WRITES[write](layer.weight)
        torch.testing.assert_close(layer.weight.clone(), P, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer._parameters["weight"], P - delta, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.uora_d, d)
    assert torch.equal(layer.uora_b, b)
    assert not layer._parameters["weight"].requires_grad
    detach_uora(root)
    torch.testing.assert_close(layer.weight.data, P - delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_reset_parameters_reaches_the_base(kind, training):
    if kind == "transformers Conv1D":
        pytest.skip("transformers' Conv1D has none")
    _, layer = adapted(MODULES[kind], training)
    before = layer._parameters["weight"].clone()
    layer.reset_parameters()
    assert (layer._parameters["weight"] - before).abs().min() > 0


def test_attention_takes_writes_to_each_of_its_weights():
    for sizes in ({}, {"kdim": 5, "vdim": 3}):
        layer = nn.MultiheadAttention(4, 2, **sizes)
        attach_uora(layer, UORAConfig(rank=3, target_modules="all", trainable_modules=()))
        with torch.no_grad():
            layer.uora_b.normal_()
        for part in layer.adapted_parts:
            with torch.no_grad():
                getattr(layer, part.name).fill_(0.25)
            torch.testing.assert_close(getattr(layer, part.name), torch.full((part.m, part.n), 0.25))


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_that_is_assigned_reads_back_and_stays_frozen(trained):
    _, layer = adapted(lambda: nn.Linear(7, 5), training=True)
    if not trained:
        nn.init.zeros_(layer.uora_b)
    new = nn.Parameter(torch.randn(5, 7))
    layer.weight = new
    torch.testing.assert_close(layer.weight, new.detach())
    assert (layer._parameters["weight"] is new) != trained
    assert not layer._parameters["weight"].requires_grad
    mine = layer._parameters["weight"]
    layer.weight = mine  # as tie_weights does
    assert layer._parameters["weight"] is mine


def test_what_cannot_be_a_weight_is_refused_and_nothing_changes():
    root, layer = adapted(lambda: nn.Linear(7, 5), training=False)
    x = torch.randn(3, 7)
    with torch.no_grad():
        before = root(x)
    with pytest.raises(
        ValueError, match=r"an nn.Parameter of its shape \(5, 7\), not to a Parameter of shape"
    ):
        layer.weight = nn.Parameter(torch.zeros(6, 7))
    with pytest.raises(ValueError, match="detach_uora"):
        layer.weight = None
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = torch.zeros(5, 7)
    with torch.no_grad():
        assert torch.equal(root(x), before)


def test_batch_norm_folds_into_an_adapted_convolution():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    x = torch.randn(4, 3, 7, 6)
    block(x)
    block.eval()
    attach_uora(block, UORAConfig(rank=4, target_modules=["0"], trainable_modules=()))
    with torch.no_grad():
        block[0].uora_b.normal_()
        torch.testing.assert_close(fuse_conv_bn_eval(block[0], block[1])(x), block(x), atol=1e-5, rtol=1e-5)


def test_a_weight_that_was_read_copies_and_pickles_as_a_plain_tensor():
    _, layer = adapted(lambda: nn.Linear(7, 5), training=True)
    for read in (copy.deepcopy(layer.weight.detach()), pickle.loads(pickle.dumps(layer.weight.detach()))):
        assert type(read) is torch.Tensor
        torch.testing.assert_close(read, layer.weight.detach())
        with torch.no_grad():
            read.zero_()
        assert layer.weight.abs().sum() > 0
    assert type(layer.weight + 1) is torch.Tensor


CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "l1": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "structured": lambda m: prune.ln_structured(m, "weight", 0.3, n=2, dim=0),
    "identity": lambda m: prune.identity(m, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_parametrising_and_pruning_are_refused_in_a_line_and_the_module_is_intact(change, training):
    root, layer = adapted(lambda: nn.Linear(7, 5), training)
    x, keys = torch.randn(3, 7), list(root.state_dict())
    expected = root(x)
    with pytest.raises(
        ValueError, match=r"cannot be parametrised, pruned or removed: call detach_uora\(model"
    ):
        CHANGES[change](layer)
    assert torch.equal(root(x), expected)
    assert list(root.state_dict()) == keys
    assert not hasattr(layer, "weight_mask")
    CHANGES[change](nn.Linear(7, 5))  # what is not adapted goes on


def test_pruning_a_bias_goes_on():
    root, layer = adapted(lambda: nn.Linear(7, 5), training=True)
    prune.l1_unstructured(layer, "bias", 0.4)
    W = reference.effective_weight(
        layer._parameters["weight"], root.uora_projections.down(7), root.uora_projections.up(5),
        layer.uora_d, layer.uora_b,
    )  # fmt: skip
    x = torch.randn(3, 7)
    torch.testing.assert_close(root(x).double(), x.double() @ W.t() + layer.bias.double())
    assert len(list(named_adapters(root))) == 1
