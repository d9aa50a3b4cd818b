"""Mixed batches and what trains besides the vectors: heads, biases, tied weights; who may do what inside."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_uora import (
    UORAConfig,
    adapters_disabled,
    add_adapter,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    remove_adapter,
    save_adapter,
    set_adapter,
    use_adapters,
)
from tests.adapters.test_mixing import LINEAR, Reads, inputs, scatter, three

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.double)
NAMES = ["default", "second", None, "second"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, :5].abs().long().clamp(max=8)
        return self.out(self.mid(self.embed(ids)).mean(1))


class Pools(nn.Module):
    """Attention that is not adapted, and trains."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.pool = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(x).reshape(-1, 1, 8).expand(-1, 3, -1) * torch.arange(1, 4)[:, None]
        return self.pool(h, h, h)[0].mean(1)


class Scaled(nn.Module):
    """A parameter that trains by itself, around layers that see tokens as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mid = nn.Parameter(torch.ones(8)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mid((x * self.scale).reshape(-1, 2)).reshape(-1, 8)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None] * torch.arange(1, 4)[:, None]).mean(1)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def config(*targets: str, **options: Any) -> UORAConfig:
    return UORAConfig(rank=4, target_modules=list(targets), **{"trainable_modules": (), **options})


CASES: dict[str, Any] = {
    "one without a head": (plain, config("0"), config("0", trainable_modules=["2"])),
    "the first with a head": (plain, config("0", trainable_modules=["2"]), config("0")),
    "a head where the other adapts": (plain, config("0", "2"), config("0", trainable_modules=["2"])),
    "tied, by its output": (Tied, config("mid", trainable_modules=["out"]), None),
    "tied, by its input": (Tied, config("mid", trainable_modules=["embed"]), None),
    "attention that trains": (Pools, config("mid", trainable_modules=["pool"]), None),
    "its projection": (Pools, config("mid", trainable_modules=["pool.out_proj"]), None),
    "a parameter of a container": (Scaled, config("mid", trainable_modules=["scale"]), None),
    "biases of an encoder": (Encoder, config("*.linear1", bias="all"), None),
    "a norm of an encoder": (Encoder, config("*.linear1", trainable_modules=["layers.layers.1.norm1"]), None),
    "a layer of an encoder": (
        Encoder,
        config("*.0.linear1", trainable_modules=["layers.layers.1.linear2"]),
        None,
    ),
}


def two(kind: str) -> nn.Module:
    build, first, second = CASES[kind]
    torch.manual_seed(0)
    model = build().double().eval()
    attach_uora(model, first)
    scatter(model, 1)
    add_adapter(model, "second", second)
    scatter(model, 2)
    return model


@pytest.mark.filterwarnings("ignore:.* are one weight")
@pytest.mark.parametrize("computes", ["default", "second", None])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", CASES)
def test_what_trained_besides_is_its_adapters_own(kind: str, graph: bool, computes: str | None):
    model, wanted = two(kind), []
    with torch.set_grad_enabled(graph):
        for sample, name in zip(X, NAMES, strict=True):
            set_adapter(model, name or computes or "second")
            set_adapter(model, name)  # None: with the heads of the one in use
            wanted.append(model(sample[None])[0])
        set_adapter(model, computes or "second")
        set_adapter(model, computes)
        before = model(X)
        with use_adapters(model, NAMES):
            found = model(X)
        torch.testing.assert_close(found, torch.stack(wanted))
        assert torch.equal(model(X), before)
    assert not torch.equal(found[1], found[3])


def test_a_vit_whose_class_token_trains_mixes():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).double().eval()
    attach_uora(model, UORAConfig(4, "attention", trainable_modules=["head", "cls_token"]))
    scatter(model, 1)
    add_adapter(model, "second")
    scatter(model, 2)
    images, names = torch.randn(4, 3, 160, 160, dtype=torch.double), ["default", "second"] * 2
    with torch.no_grad():
        wanted = []
        for image, name in zip(images, names, strict=True):
            set_adapter(model, name)
            wanted.append(model(image[None])[0])
        with use_adapters(model, names):
            torch.testing.assert_close(model(images), torch.stack(wanted))


class ReadsHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.mid(x), self.head.weight)


def test_a_head_that_another_module_computes_with_is_refused_by_name():
    torch.manual_seed(0)
    model = ReadsHead().double()
    attach_uora(model, config("mid", trainable_modules=["head"]))
    add_adapter(model, "second")
    before = model(X)
    with (
        use_adapters(model, NAMES),
        pytest.raises(ValueError, match="another module reads the weight of 'head'"),
    ):
        model(X)
    assert torch.equal(model(X), before)
    assert type(model.head) is nn.Linear
    assert "_uora_reading" not in model.head.__dict__


@pytest.mark.parametrize("way", ["data", "fused"])
def test_vectors_that_are_written_inside_a_context_count(way: str):
    model = two("one without a head").float()
    with torch.no_grad(), use_adapters(model, ["second"] * 4):
        before = model(X.float())
        layer = dict(named_adapters(model))["0"]
        if way == "data":
            layer.uora_b.data.mul_(2.0)
        else:
            layer.uora_b.grad = torch.ones_like(layer.uora_b)
            torch.optim.Adam([layer.uora_b], lr=0.5, fused=True).step()
        after = model(X.float())
    assert not torch.allclose(before, after)
    set_adapter(model, "second")
    torch.testing.assert_close(after, model(X.float()))


def test_a_batch_without_gradients_wakes_nobody():
    model = two("one without a head")
    wanting = [p.requires_grad for p in model.parameters()]
    with torch.no_grad(), use_adapters(model, NAMES):
        model(X)
    assert [p.requires_grad for p in model.parameters()] == wanting


INSIDE: dict[str, Any] = {
    "set": lambda m: set_adapter(m, "default"),
    "add": lambda m: add_adapter(m, "third"),
    "remove": lambda m: remove_adapter(m, "default"),
    "detach": lambda m: detach_uora(m),
    "switch off": lambda m: adapters_disabled(m).__enter__(),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_adapters_are_not_changed_inside_of_a_batch(kind: str):
    model = two("one without a head")
    before = model(X)
    with use_adapters(model, NAMES):
        found = model(X)
        with pytest.raises(ValueError, match="inside use_adapters would change the batch that is running"):
            INSIDE[kind](model)
        assert torch.equal(model(X), found)
    assert torch.equal(model(X), before)
    assert model.uora_projections.disabled == 0


def test_a_batch_of_the_base_and_one_whose_adapter_has_fewer_layers():
    torch.manual_seed(0)
    model = plain().double()
    bare = model(X).detach()
    attach_uora(model, config("0", "2"))
    scatter(model, 1)
    add_adapter(model, "second", config("0"))
    scatter(model, 2)
    second = model(X)
    set_adapter(model, "default")
    with use_adapters(model, [None] * 4):
        torch.testing.assert_close(model(X), bare)
    with use_adapters(model, ["second", None] * 2):
        found = model(X)
    torch.testing.assert_close(found[::2], second[::2])
    torch.testing.assert_close(found[1::2], bare[1::2])


def test_layers_are_called_by_the_name_of_their_input():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.mid(input=x)

    torch.manual_seed(0)
    model = Named().double()
    attach_uora(model, config("mid"))
    scatter(model, 1)
    wanted = model.mid(X)
    assert torch.equal(model(X), wanted)
    with use_adapters(model, ["default", None] * 2):
        torch.testing.assert_close(model(X)[::2], wanted[::2])


def test_quantised_layers_are_called_by_the_name_of_their_input():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    quantize_(model, Int8WeightOnlyConfig())
    attach_uora(model, config("1"))
    scatter(model, 1)
    wanted = model[1](X.float())
    assert torch.equal(model[1](input=X.float()), wanted)
    with use_adapters(model, ["default"] * 4):
        torch.testing.assert_close(model[1](input=X.float()), wanted)


def test_a_context_inside_of_another_leaves_the_outer_one_as_it_was():
    torch.manual_seed(0)
    model = three(Reads().double(), LINEAR)
    x = inputs(4, 7)["x"]
    with use_adapters(model, ["second"] * 6):
        with use_adapters(model, ["default"] * 6):
            pass
        with pytest.raises(ValueError, match="another module reads the weight of 'rows'"):
            model(x)


def test_names_are_any_sequence_of_names():
    numpy = pytest.importorskip("numpy")
    model = two("one without a head")
    with use_adapters(model, ["second"] * 4):
        wanted = model(X)
    for names in (("second",) * 4, numpy.array(["second"] * 4), iter(["second"] * 4)):
        with use_adapters(model, names):
            assert torch.equal(model(X), wanted)
    for wrong in ({0: "second"}, 3, ["second", 1], b"x"):
        with (
            pytest.raises(ValueError, match="names must be a list of one name for each sample"),
            use_adapters(model, wrong),
        ):
            pass
    with pytest.raises(ValueError, match="name must be an adapter's name, or a mapping"):
        detach_uora(model, merge=True, name=["second"])
    with pytest.raises(ValueError, match="None is not an adapter's name"):
        detach_uora(model, merge=True, name={None: 1.0})


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_running_statistics_that_moved_are_told_and_a_file_does_not_move_them(tmp_path):
    model, x = normed(), X.float()
    attach_uora(model, config("0", batch_norm="moving"))
    save_adapter(model, tmp_path)
    add_adapter(model, "second")
    with torch.no_grad():
        model(x + 3)
    with pytest.warns(UserWarning, match=r"have changed since 'default' was last active \('1.running_mean'"):
        set_adapter(model, "default")
    mean = model[1].running_mean.clone()
    with pytest.warns(UserWarning, match="trained with other running statistics .*'1.running_mean'"):
        load_adapter(model, tmp_path, name="third")
    assert torch.equal(model[1].running_mean, mean)
    set_adapter(model, "second")
