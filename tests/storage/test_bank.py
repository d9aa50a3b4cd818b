"""A bank: adapters come from their folders when they are first named, and go when others are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_uora import (
    AdapterBank,
    UORAConfig,
    adapter_names,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    save_adapter,
)

X = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five adapters, "a" to "e"."""
    for number, name in enumerate("abcde"):
        model = net()
        attach_uora(model, UORAConfig(rank=4, target_modules=["0"], trainable_modules=["2"]))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, module in named_adapters(model):
                module.uora_b.copy_(torch.randn(module.uora_b.shape, generator=generator))
            model[2].bias.add_(number)
        save_adapter(model, tmp_path / name)
    return tmp_path


def alone(folder: Path, name: str | None) -> Tensor:
    model = net()
    if name is not None:
        load_adapter(model, folder / name)
    return model(X).detach()


def test_a_batch_names_adapters_and_the_least_recently_named_goes(folder):
    model = net()
    bank = AdapterBank(model, folder, limit=3)
    assert bank.names == list("abcde")
    assert bank.resident == []
    for names in (["a", "b", "a", "b"], ["c", "a", "c", "a"], ["d", "d", "e", "a"]):
        with torch.no_grad(), bank.use(names):
            found = model(X)
        for sample, name in enumerate(names):
            torch.testing.assert_close(found[sample], alone(folder, name)[sample])
    assert bank.resident == ["d", "e", "a"]
    assert set(adapter_names(model)) == {"(base)", "a", "d", "e"}
    bank.set("b")
    torch.testing.assert_close(model(X), alone(folder, "b"))
    assert bank.resident == ["e", "a", "b"]
    detach_uora(model)


def test_what_was_on_the_model_stays(folder):
    model = net()
    load_adapter(model, folder / "a", name="mine")
    bank = AdapterBank(model, folder, limit=1)
    for name in "bcd":
        with torch.no_grad(), bank.use([name, "mine"] * 2):
            found = model(X)
        torch.testing.assert_close(found[1::2], alone(folder, "a")[1::2])
        assert adapter_names(model) == ["mine", name]
    torch.testing.assert_close(model(X), alone(folder, "a"))


def test_the_base_stays_the_base(folder):
    """Of a model without adapters, and of one whose adapter is switched off while others are loaded."""
    model = net()
    plain, bank = model(X), AdapterBank(model, folder)
    bank.set(None)
    with bank.use([None] * 4):
        assert torch.equal(model(X), plain)
    bank.set("a")
    bank.set(None)
    off = model(X)
    with bank.use(["b"] * 4):
        torch.testing.assert_close(model(X), alone(folder, "b"))
    assert torch.equal(model(X), off)
    bank.set("a")
    torch.testing.assert_close(model(X), alone(folder, "a"))


def test_threads_take_turns(folder):
    model, wrong = net(), []
    bank = AdapterBank(model, folder, limit=2)
    expected = {name: alone(folder, name) for name in "abcde"}

    def work(name: str) -> None:
        for _ in range(5):
            with torch.no_grad(), bank.use([name] * 4):
                if not torch.allclose(model(X), expected[name], atol=1e-6):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcde"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_folder_that_cannot_be_loaded_is_refused_by_name_and_disturbs_no_other(folder):
    model = net()
    bank = AdapterBank(model, folder, limit=3)
    bank.set("a")
    (folder / "b" / "uora_config.json").write_text("{")
    foreign = net(9)
    attach_uora(foreign, UORAConfig(rank=4, target_modules=["0"], trainable_modules=()))
    save_adapter(foreign, folder / "f")
    for name, message in (
        ("b", "adapter 'b' of the bank: .*is damaged"),
        ("f", "adapter 'f' of the bank: .*another base"),
        ("g", "has no adapter 'g'; it has 'a', 'b', 'c', 'd', 'e'"),
        ("../a", r"has no adapter '\.\./a'"),
    ):
        with pytest.raises(ValueError, match=message), bank.use([name] * 4):
            pass
        torch.testing.assert_close(model(X), alone(folder, "a"))
        assert bank.resident == ["a"]
    with pytest.raises(ValueError, match="4 different adapters are named, but the bank's limit is 3"):
        bank._fetch(list("acde"))
    with pytest.raises(ValueError, match="limit=0 is not allowed"):
        AdapterBank(model, folder, limit=0)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        AdapterBank(model, folder / "nowhere")


def test_a_plain_base_computes_as_it_did_outside_and_for_none(folder):
    model = net()
    plain, bank = model(X).detach(), AdapterBank(model, folder)
    with torch.no_grad(), bank.use(["a"] * 4):
        torch.testing.assert_close(model(X), alone(folder, "a"))
    torch.testing.assert_close(model(X), plain)
    with torch.no_grad(), bank.use([None, "b"] * 2):
        found = model(X)
    torch.testing.assert_close(found[::2], plain[::2])
    torch.testing.assert_close(found[1::2], alone(folder, "b")[1::2])
    with torch.no_grad(), bank.use([None] * 4):
        torch.testing.assert_close(model(X), plain)
    bank.set("c")
    torch.testing.assert_close(model(X), alone(folder, "c"))
    bank.set(None)
    torch.testing.assert_close(model(X), plain)


@pytest.mark.parametrize("name", ["a/", "./a", "../a", "a/../a", ""])
def test_a_name_is_that_of_a_folder(folder, name):
    bank = AdapterBank(net(), folder)
    with pytest.raises(ValueError, match="has no adapter"):
        bank.set(name)


def test_a_plain_base_stays_the_base_while_adapters_come_and_go(folder):
    model = net()
    plain, bank = model(X).detach(), AdapterBank(model, folder, limit=1)
    for name in "abc":
        with torch.no_grad(), bank.use([name] * 4):
            torch.testing.assert_close(model(X), alone(folder, name))
        torch.testing.assert_close(model(X), plain)
    bank.set("a")  # and it is dropped while it computes
    with torch.no_grad(), bank.use(["b"] * 4):
        torch.testing.assert_close(model(X), alone(folder, "b"))
    assert adapter_names(model) == ["(base)", "b"]
    torch.testing.assert_close(model(X), plain)


def test_heads_of_unlike_shapes_are_refused_with_what_to_do_and_can_be_left_out(folder):
    wider = nn.Sequential(*net()[:2], nn.Linear(6, 5))
    attach_uora(wider, UORAConfig(rank=4, target_modules=["0"], trainable_modules=["2"]))
    save_adapter(wider, folder / "wide")
    model = net()
    with pytest.raises(ValueError, match=r"adapter .wide. of the bank: .*pass head=False"):
        AdapterBank(model, folder).set("wide")
    bank, plain = AdapterBank(model, folder, head=False), net()
    load_adapter(plain, folder / "a", head=False)
    with torch.no_grad(), bank.use(["a", "wide", "a", None]):
        found = model(X)
    torch.testing.assert_close(found[0], plain(X)[0])
    assert not torch.equal(found[0], alone(folder, "a")[0])
    torch.testing.assert_close(found[[1, 3]], net()(X)[[1, 3]])  # "wide" was never trained


def test_a_first_folder_that_is_refused_leaves_a_plain_base(folder):
    model = net(seed=5)
    keys, bank = list(model.state_dict()), AdapterBank(model, folder)
    with pytest.raises(ValueError, match=r"adapter 'a' of the bank: .*another base"):
        bank.set("a")
    assert adapter_names(model) == []
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
