"""Several adapted models in one LightningModule: two callbacks, two towers; files, resumes, merges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORACallback,
    UORAConfig,
    attach_uora,
    detach_uora,
    load_from_checkpoint,
    summarize,
)
from lightning_uora.adapters import attachments
from lightning_uora.cli import main
from lightning_uora.trainer.attachment import _know_older_keys
from tests.toys import TENSORS_ONLY, BuiltInConfigureModel, Toy, callback, data, equal_batches, trainer

EVERY_2 = ReinitSchedule(threshold=9.0, max_fraction=0.5, start=2, stop=99, every_n_steps=2)


def pair(**options):
    both = {"reinit": EVERY_2, **options}
    first = callback(rank=3, target_modules=["body.0"], **both)
    return first, callback(rank=2, target_modules=["body.2"], trainable_modules=(), **both)


class Seeded(Toy):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()


class Towers(Seeded):
    def build(self):
        make = lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))  # noqa: E731
        self.vision, self.text, self.head = make(), make(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.vision(x) * self.text(x))


def towers() -> Towers:
    model = Towers()
    for tower in (model.vision, model.text):
        attach_uora(tower, UORAConfig(rank=4, target_modules="all-linear"))
    return model


def out(model: Toy) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(next(iter(data(8, 8)))[0])


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("cls", [Seeded, BuiltInConfigureModel])
def test_two_callbacks_adapt_what_is_theirs_and_resume_like_an_unbroken_run(tmp_path, kind, cls):
    def start() -> Toy:
        torch.manual_seed(0)
        return cls()

    whole, both = start(), pair(checkpoint=kind)
    torch.manual_seed(1)
    trainer(*both, max_epochs=4).fit(whole, equal_batches())
    assert summarize(whole).adapter_params == (3 + 6) + (2 + 6)
    assert [len(one.refreshes) for one in both] == [8, 8]
    assert [set(one.refreshes[0]["rows"]) for one in both] == [{"A_6_0", "B_6_0"}] * 2
    half, run = start(), trainer(*pair(checkpoint=kind), max_epochs=2)
    torch.manual_seed(1)
    run.fit(half, equal_batches())
    run.save_checkpoint(tmp_path / "half.ckpt")
    again, both = start(), pair(checkpoint=kind)
    torch.manual_seed(1)
    trainer(*both, max_epochs=4).fit(again, equal_batches(), ckpt_path=tmp_path / "half.ckpt", **TENSORS_ONLY)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert [len(one.refreshes) for one in both] == [8, 8]


def test_the_vectors_of_each_callback_get_a_group_of_their_own():
    class All(Seeded):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    model, (first, second) = All(), pair()
    first.vector_lr, second.vector_lr = 0.02, 0.03
    run = trainer(first, second)
    run.fit(model, data())
    groups = {group.get("name"): group for group in run.optimizers[0].param_groups}
    assert {id(p) for p in groups["uora_vectors"]["params"]} == {
        id(model.body[0].uora_d),
        id(model.body[0].uora_b),
    }
    assert (groups["uora_vectors"]["lr"], groups["uora_vectors_2"]["lr"]) == (0.02, 0.03)


def test_the_same_module_twice_is_refused_in_a_line():
    first, _ = pair()
    with pytest.raises(ValueError, match=r"'body\.0' is already adapted"):
        trainer(first, callback(rank=2, target_modules=["body.*"])).fit(Seeded(), data())


def test_several_callbacks_write_one_kind_of_checkpoint():
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    first, _ = pair()
    with pytest.raises(MisconfigurationException, match="give all of them the same checkpoint="):
        trainer(first, pair(checkpoint="adapter")[1]).fit(Seeded(), data())


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_two_towers_are_refreshed_saved_loaded_and_merged(tmp_path, kind, capsys):
    model, uora = towers(), callback(reinit=EVERY_2, checkpoint=kind)
    run = trainer(uora)
    run.fit(model, data())
    path, plain, want = tmp_path / "towers.ckpt", tmp_path / "plain.ckpt", out(model)
    run.save_checkpoint(path)
    assert [len(one.owner.record) for one in attachments(model)] == [4, 4]
    assert [entry["model"] for entry in uora.refreshes] == [0, 1] * 4
    loaded = load_from_checkpoint(Towers, path)
    assert torch.equal(out(loaded), want)
    assert [one.path for one in attachments(loaded)] == ["vision", "text"]
    assert main(["show", str(path)]) == 0
    named = [] if kind == "full" else ["--class", "tests.trainer.test_several:Towers"]
    assert main(["merge", str(path), str(plain), *named]) == 0
    merged = Towers.load_from_checkpoint(plain, **TENSORS_ONLY)
    torch.testing.assert_close(out(merged), want, atol=1e-5, rtol=1e-5)
    capsys.readouterr()
    assert main(["export", str(path), str(tmp_path / "peft")]) == 2
    assert "several adapted models, at vision, text; choose one with --submodule" in capsys.readouterr().err
    assert main(["export", str(path), str(tmp_path / "peft"), "--submodule", "text"]) == 0


def test_a_checkpoint_of_other_roots_is_refused(tmp_path):
    run = trainer(callback())
    run.fit(towers(), data())
    run.save_checkpoint(tmp_path / "towers.ckpt")
    model = Towers()
    attach_uora(model.vision, UORAConfig(rank=4, target_modules="all-linear"))
    with pytest.raises(
        ValueError, match=r"adapters at 'vision', 'text', but the module has them at 'vision'"
    ):
        trainer(callback()).predict(model, data(), ckpt_path=tmp_path / "towers.ckpt", **TENSORS_ONLY)


def test_a_checkpoint_that_names_a_callback_by_less_resumes_its_state():
    """A callback's key once told rank and targets alone, and before several were possible, nothing."""
    own = UORACallback(3, ["a"], seed=4)
    for older in (own.short_key, "UORACallback"):
        saved = {older: {"refresher": 1}, "Other": {}}
        _know_older_keys(saved, [own])
        assert saved == {own.state_key: {"refresher": 1}, "Other": {}}
    twin = UORACallback(3, ["b"])
    saved = {"UORACallback": {}}
    _know_older_keys(saved, [own, twin])
    assert saved == {"UORACallback": {}}  # whose it is cannot be told


def test_a_model_that_was_adapted_inside_another_module_is_refused_until_it_is_detached():
    class Around(Toy):
        def __init__(self, body):
            super().__init__()
            self.body = body

    first = Toy()
    trainer(callback()).fit(first, data())
    for body in (first.body, copy.deepcopy(first.body)):
        second = Around(body)
        with pytest.raises(
            ValueError, match="holds a model that was adapted inside another module; call detach"
        ):
            trainer(callback()).fit(second, data())
        detach_uora(body)
        trainer(callback()).fit(Around(body), data())
